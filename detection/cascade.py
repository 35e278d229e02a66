"""Cascade heads: every stage refines the boxes of the one before, at a higher IoU (arXiv 1712.00726).

Boxes are (x1, y1, x2, y2) in pixels of the resized image. Class 0 is the background. The parts are
torchvision's; the cascade is ours, and does what mmdet's does. With one stage it is Mask R-CNN.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops import (
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    remove_small_boxes,
    roi_align,
)

from models.attention import at_least_float32

from .proposals import LimitedBoxCoder


class HeadLayers(NamedTuple):
    """The layers of a box head and a mask head."""

    channels: int  # of the feature maps and of every convolution
    classes: int  # with the background
    box_convs: int  # 3x3 convolutions of the box head
    box_fcs: list  # widths of its linear layers
    mask_convs: int  # 3x3 convolutions of the mask head


class DetectionLimits(NamedTuple):
    """Which detections of an image are kept."""

    score_threshold: float  # those that score higher
    nms_iou: float  # of two of a class that overlap more than this, the better one
    per_image: int  # at most so many, the best


class Samples(NamedTuple):
    """The boxes of an image that a stage trains on."""

    boxes: torch.Tensor  # (N, 4)
    labels: torch.Tensor  # (N,), 0 for the background
    indices: torch.Tensor  # (N,), of the objects in the target; of no meaning for the background
    are_truth: torch.Tensor  # (N,) bool: the ground-truth boxes themselves


class PyramidRoIAlign(nn.Module):
    """RoIAlign (arXiv 1703.06870) to ``side`` bins on a side, on the map that fits the size of a box.

    Aligned: the centre of a cell is half a cell from its border. A bin takes as many samples as it has cells.
    Boxes of a side below 112 pixels (the root of their area) are pooled from the first map, and from the next
    with every doubling. ``strides`` are those of the maps, in pixels.
    """

    def __init__(self, strides, side):
        super().__init__()
        self.strides, self.side = strides, side

    def forward(self, maps, boxes):
        """Maps (B, C, H, W) and boxes (N, 4) of each image to (all N, C, side, side)."""
        images = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([images, torch.cat(boxes)], dim=1).to(maps[0])
        levels = pyramid_levels(rois[:, 1:], len(self.strides))
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.side, self.side)
        for level, (x, stride) in enumerate(zip(maps, self.strides)):
            chosen = (levels == level).nonzero()[:, 0]
            found = roi_align(x, rois[chosen], self.side, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_copy(0, chosen, found)
        return pooled


def pyramid_levels(boxes, levels):
    """The level (N,) that boxes (N, 4) are pooled from, from 0, as in arXiv 1612.03144."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    doublings = torch.log2((width * height).sqrt() / 56 + 1e-6).floor()
    return doublings.clamp(0, levels - 1).long()


class CascadeStage(nn.Module):
    """Box and mask head of one stage, with its own box deltas and IoU threshold.

    A proposal belongs to a ground-truth box from an IoU of ``iou``. The deltas (dx, dy, dw, dh) are divided
    by ``delta_stds``. ``box_loss`` is ``giou`` on decoded boxes, or ``smooth_l1`` on deltas.
    """

    def __init__(self, layers, iou, delta_stds, box_loss):
        super().__init__()
        channels, classes, box_convs, box_fcs, mask_convs = layers
        self.box_head = FastRCNNConvFCHead(
            (channels, 7, 7), [channels] * box_convs, box_fcs, nn.BatchNorm2d if box_convs else None
        )
        self.box_predictor = FastRCNNPredictor(box_fcs[-1], classes)
        self.mask_head = MaskRCNNHeads(channels, [channels] * mask_convs, dilation=1)
        self.mask_predictor = MaskRCNNPredictor(channels, channels, classes)
        self.matcher = Matcher(iou, iou, allow_low_quality_matches=False)
        self.coder = LimitedBoxCoder(tuple(1 / std for std in delta_stds))
        self.box_loss = box_loss

    def predict_boxes(self, features):
        """RoI features (N, C, 7, 7) to class logits (N, classes), deltas (N, classes, 4), float32 or more."""
        logits, deltas = self.box_predictor(self.box_head(features))
        return at_least_float32(logits), at_least_float32(deltas).unflatten(1, (-1, 4))

    def predict_masks(self, features):
        """RoI features (N, C, 14, 14) to mask logits (N, classes, 28, 28), float32 or more."""
        return at_least_float32(self.mask_predictor(self.mask_head(features)))

    def decode(self, deltas, boxes):
        """The boxes that deltas (N, 4) make of boxes (N, 4)."""
        return self.coder.decode_single(deltas, boxes)

    def match(self, proposals, target):
        """Labels (N,) and indices (N,) of ground-truth boxes for proposals (N, 4); label 0 matches none."""
        if not len(target["boxes"]) or not len(proposals):
            zeros = torch.zeros(len(proposals), dtype=torch.int64, device=proposals.device)
            return zeros, zeros
        matched = self.matcher(box_iou(target["boxes"], proposals))
        labels = torch.where(matched >= 0, target["labels"][matched.clamp(min=0)], 0)
        return labels, matched.clamp(min=0)

    def losses(self, logits, deltas, boxes, labels, goals):
        """Class and box loss of sampled boxes (N, 4) of classes ``labels`` (N,), both means over the samples.

        ``logits`` and ``deltas`` are those of :meth:`predict_boxes`. ``goals`` (N, 4) are the ground-truth
        boxes; those of the background do not count.
        """
        count = max(1, len(labels))
        class_loss = cross_entropy(logits, labels, reduction="sum") / count
        found = labels.nonzero()[:, 0]
        deltas, boxes, goals = deltas[found, labels[found]], boxes[found], goals[found]
        if self.box_loss == "smooth_l1":
            wanted = self.coder.encode_single(goals, boxes)
            return class_loss, smooth_l1_loss(deltas, wanted, beta=1 / 9, reduction="sum") / count
        giou = generalized_box_iou_loss(self.decode(deltas, boxes), goals, reduction="sum")
        return class_loss, 10 * giou / count


class CascadeHeads(nn.Module):
    """From proposals to losses, or to detections.

    Args:
        stages, loss_weights: the :class:`CascadeStage` modules and the weights of their losses.
        strides: of the feature maps that boxes are pooled from, in pixels.
        samples, positive_share: boxes sampled of each image in training, and how many of them at most are
            positive.
        limits: :class:`DetectionLimits`.
    """

    def __init__(self, stages, strides, loss_weights, samples, positive_share, limits):
        super().__init__()
        self.stages, self.loss_weights = nn.ModuleList(stages), loss_weights
        self.sampler = BalancedPositiveNegativeSampler(samples, positive_share)
        self.limits = limits
        self.box_pool, self.mask_pool = PyramidRoIAlign(strides, 7), PyramidRoIAlign(strides, 14)

    def losses(self, maps, proposals, sizes, targets):
        """Weighted losses of all stages, a dict of ``class<i>``, ``box<i>`` and ``mask<i>``, ``i`` from 1.

        Args:
            maps: feature maps (B, C, H, W); those after the last stride serve proposals only.
            proposals: boxes (N, 4) of each image.
            sizes: (height, width) of each image.
            targets: of each image, boxes (M, 4), labels (M,) from 1 and masks (M, height, width).
        """
        losses = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights)):
            samples = [self.sample(stage, *image) for image in zip(proposals, targets)]
            boxes, labels, indices, _ = zip(*samples)
            logits, deltas = stage.predict_boxes(self.box_pool(maps, boxes))
            goals = [
                target["boxes"][index] if len(target["boxes"]) else box
                for target, index, box in zip(targets, indices, boxes)
            ]
            parts = stage.losses(logits, deltas, torch.cat(boxes), torch.cat(labels), torch.cat(goals))
            losses[f"class{i + 1}"], losses[f"box{i + 1}"] = (weight * loss for loss in parts)
            losses[f"mask{i + 1}"] = weight * self._mask_loss(stage, maps, targets, samples)
            if i + 1 < len(self.stages):
                with torch.no_grad():
                    refined = self.refine(stage, logits, deltas, boxes, sizes, labels)
                # Ground truth joins every stage as it is; refined it would come twice.
                proposals = [box[~image.are_truth] for box, image in zip(refined, samples)]
        return losses

    def sample(self, stage, proposals, target):
        """Match the proposals (N, 4) of an image, add the ground truth, and choose the :class:`Samples`."""
        labels, indices = stage.match(proposals, target)
        truth = torch.arange(len(target["boxes"]), device=proposals.device)
        candidates = Samples(
            torch.cat([proposals, target["boxes"]]),
            torch.cat([labels, target["labels"]]),
            torch.cat([indices, truth]),
            torch.arange(len(labels) + len(truth), device=proposals.device) >= len(labels),
        )
        (positive,), (negative,) = self.sampler([candidates.labels])
        chosen = (positive | negative).nonzero()[:, 0]
        return Samples(*(value[chosen] for value in candidates))

    def refine(self, stage, logits, deltas, boxes, sizes, labels=None):
        """The boxes (N, 4) of each image for the next stage: moved by the deltas of their class, and cut off.

        The class is the true one where ``labels`` know it, and otherwise the most probable object class.
        """
        classes = logits[:, 1:].argmax(1) + 1
        if labels is not None:
            labels = torch.cat(labels)
            classes = torch.where(labels > 0, labels, classes)
        rows = torch.arange(len(classes), device=classes.device)
        refined = stage.decode(deltas[rows, classes], torch.cat(boxes)).split([len(box) for box in boxes])
        return [clip_boxes_to_image(box, size) for box, size in zip(refined, sizes)]

    def _mask_loss(self, stage, maps, targets, samples):
        found = [image.labels.nonzero()[:, 0] for image in samples]
        boxes = [image.boxes[index] for image, index in zip(samples, found)]
        labels = torch.cat([image.labels[index] for image, index in zip(samples, found)])
        logits = stage.predict_masks(self.mask_pool(maps, boxes))
        if not len(labels):
            return logits.sum()
        goals = [
            mask_targets(target["masks"], box, image.indices[index], logits.shape[-1])
            for target, box, image, index in zip(targets, boxes, samples, found)
        ]
        rows = torch.arange(len(labels), device=labels.device)
        with torch.autocast(logits.device.type, enabled=False):
            return binary_cross_entropy_with_logits(logits[rows, labels], torch.cat(goals).to(logits))

    def detect(self, maps, proposals, sizes):
        """Detections of each image.

        Scores are the softmax of the class logits' mean over the stages, boxes those of the last stage, and
        masks the mean of the stages' probabilities. Returns for each image a dict of boxes (N, 4), labels
        (N,), scores (N,) and masks (N, 1, 28, 28), whose values are probabilities within the box; the best
        first.
        """
        total = 0
        for i, stage in enumerate(self.stages):
            logits, deltas = stage.predict_boxes(self.box_pool(maps, proposals))
            total = total + logits
            if i + 1 < len(self.stages):
                proposals = self.refine(stage, logits, deltas, proposals, sizes)
        scores = (total / len(self.stages)).softmax(1)
        counts = [len(boxes) for boxes in proposals]
        repeated = torch.cat(proposals).repeat_interleave(deltas.shape[1], dim=0)
        decoded = stage.decode(deltas.flatten(0, 1), repeated).view_as(deltas).split(counts)
        detections = [self.keep_best(*image) for image in zip(decoded, scores.split(counts), sizes)]
        pooled = self.mask_pool(maps, [detection["boxes"] for detection in detections])
        labels = [detection["labels"] for detection in detections]
        masks = [maskrcnn_inference(stage.predict_masks(pooled), labels) for stage in self.stages]
        for detection, *masks_of_stages in zip(detections, *masks):
            detection["masks"] = sum(masks_of_stages) / len(self.stages)
        return detections

    def keep_best(self, boxes, scores, size):
        """The best detections of an image, from boxes (N, classes, 4) and scores (N, classes)."""
        boxes = clip_boxes_to_image(boxes, size)
        rows, labels = (scores[:, 1:] > self.limits.score_threshold).nonzero().unbind(1)
        labels = labels + 1
        boxes, scores = boxes[rows, labels], scores[rows, labels]
        kept = remove_small_boxes(boxes, 1e-2)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        kept = batched_nms(boxes, scores, labels, self.limits.nms_iou)[: self.limits.per_image]
        return dict(boxes=boxes[kept], labels=labels[kept], scores=scores[kept])


def mask_targets(masks, boxes, indices, side):
    """What the mask head learns for boxes: whether at least half of a cell belongs to the object.

    Takes the masks (M, H, W) of the objects of an image, boxes (N, 4) in their pixels, and the index (N,) of
    the mask of each box. Returns (N, side, side): 1 where the mask's mean over the cell, by aligned RoIAlign,
    is 0.5 or more, else 0.
    """
    rois = torch.cat([indices[:, None].to(boxes), boxes], dim=1)
    share = roi_align(masks[:, None].to(boxes), rois, side, sampling_ratio=0, aligned=True)[:, 0]
    return (share >= 0.5).to(boxes)
