"""Cascade heads: every stage refines the boxes of the one before, at a higher IoU (arXiv 1712.00726).

Boxes are (x1, y1, x2, y2) in pixels of the resized image. Class 0 is the background. The parts are
torchvision's; the cascade is ours. With one stage it is Mask R-CNN.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import (
    MultiScaleRoIAlign,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    remove_small_boxes,
)


class CascadeStage(nn.Module):
    """Box and mask head of one stage, with its own box deltas and IoU threshold.

    Args:
        channels: of the feature maps and of every convolution.
        classes: with the background.
        box_convs, box_fcs: 3x3 convolutions of the box head, and the widths of its linear layers.
        mask_convs: 3x3 convolutions of the mask head.
        iou: a proposal of at least this IoU with a ground-truth box belongs to it.
        delta_stds: the deltas (dx, dy, dw, dh) are divided by these.
        box_loss: ``giou`` on decoded boxes, or ``smooth_l1`` on deltas.
    """

    def __init__(self, channels, classes, box_convs, box_fcs, mask_convs, iou, delta_stds, box_loss):
        super().__init__()
        self.box_head = FastRCNNConvFCHead(
            (channels, 7, 7), [channels] * box_convs, box_fcs, nn.BatchNorm2d if box_convs else None
        )
        self.box_predictor = FastRCNNPredictor(box_fcs[-1], classes)
        self.mask_head = MaskRCNNHeads(channels, [channels] * mask_convs, dilation=1)
        self.mask_predictor = MaskRCNNPredictor(channels, channels, classes)
        self.matcher = Matcher(iou, iou, allow_low_quality_matches=False)
        self.coder = BoxCoder(tuple(1 / std for std in delta_stds))
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
        if not len(target["boxes"]):
            zeros = torch.zeros(len(proposals), dtype=torch.int64, device=proposals.device)
            return zeros, zeros
        matched = self.matcher(box_iou(target["boxes"], proposals))
        labels = torch.where(matched >= 0, target["labels"][matched.clamp(min=0)], 0)
        return labels, matched.clamp(min=0)

    def losses(self, logits, deltas, boxes, labels, goals):
        """Class and box loss of sampled boxes, both means over the samples.

        Args:
            logits, deltas: of :meth:`predict_boxes`.
            boxes, labels: (N, 4) and (N,), the sampled boxes and their classes.
            goals: (N, 4), the ground-truth boxes; those of the background do not count.
        """
        if self.box_loss == "smooth_l1":
            return fastrcnn_loss(
                logits, deltas.flatten(1), [labels], [self.coder.encode_single(goals, boxes)]
            )
        found = labels.nonzero()[:, 0]
        decoded = self.decode(deltas[found, labels[found]], boxes[found])
        giou = generalized_box_iou_loss(decoded, goals[found], reduction="sum")
        return cross_entropy(logits, labels), 10 * giou / max(1, len(labels))


class CascadeHeads(nn.Module):
    """From proposals to losses, or to detections.

    Args:
        stages: the :class:`CascadeStage` modules.
        levels: feature maps that boxes are pooled from; the last of all serves proposals only.
        loss_weights: of each stage.
        samples, positive_share: boxes sampled of each image in training, and how many of them at most are
            positive.
        score_threshold, nms_iou, per_image: what detections are kept.
    """

    def __init__(
        self, stages, levels, loss_weights, samples, positive_share, score_threshold, nms_iou, per_image
    ):
        super().__init__()
        self.stages, self.loss_weights = nn.ModuleList(stages), loss_weights
        self.sampler = BalancedPositiveNegativeSampler(samples, positive_share)
        self.score_threshold, self.nms_iou, self.per_image = score_threshold, nms_iou, per_image
        names = [str(level) for level in range(levels)]
        self.box_pool, self.mask_pool = MultiScaleRoIAlign(names, 7, 2), MultiScaleRoIAlign(names, 14, 2)

    def losses(self, features, proposals, sizes, targets):
        """Losses of all stages.

        Args:
            features: name to feature map (B, C, H, W).
            proposals: boxes (N, 4) of each image.
            sizes: (height, width) of each image.
            targets: of each image, boxes (M, 4), labels (M,) from 1 and masks (M, height, width).

        Returns:
            dict of ``class<i>``, ``box<i>`` and ``mask<i>`` for the stages from 1, weighted.
        """
        losses = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights)):
            boxes, labels, indices = self.sample(stage, proposals, targets)
            logits, deltas = stage.predict_boxes(self.box_pool(features, boxes, sizes))
            goals = [
                target["boxes"][index] if len(target["boxes"]) else box
                for target, index, box in zip(targets, indices, boxes)
            ]
            parts = stage.losses(logits, deltas, torch.cat(boxes), torch.cat(labels), torch.cat(goals))
            losses[f"class{i + 1}"], losses[f"box{i + 1}"] = (weight * loss for loss in parts)
            losses[f"mask{i + 1}"] = weight * self._mask_loss(
                stage, features, sizes, targets, boxes, labels, indices
            )
            if i + 1 < len(self.stages):
                with torch.no_grad():
                    proposals = self.refine(stage, logits, deltas, boxes, sizes, labels)
        return losses

    def sample(self, stage, proposals, targets):
        """Match proposals and the ground-truth boxes themselves, and choose those that are trained on.

        Returns:
            For each image boxes (N, 4), labels (N,) and indices of ground-truth boxes (N,).
        """
        candidates = [torch.cat([boxes, target["boxes"]]) for boxes, target in zip(proposals, targets)]
        matches = [stage.match(boxes, target) for boxes, target in zip(candidates, targets)]
        positive, negative = self.sampler([labels for labels, _ in matches])
        chosen = [(p | n).nonzero()[:, 0] for p, n in zip(positive, negative)]
        boxes = [box[index] for box, index in zip(candidates, chosen)]
        labels = [labels[index] for (labels, _), index in zip(matches, chosen)]
        return boxes, labels, [indices[index] for (_, indices), index in zip(matches, chosen)]

    def refine(self, stage, logits, deltas, boxes, sizes, labels=None):
        """The boxes of a stage for the next: moved by the deltas of their class.

        The class is the true one where ``labels`` know it, and else the most probable one but the background.

        Returns:
            Boxes (N, 4) of each image, within it.
        """
        classes = logits[:, 1:].argmax(1) + 1
        if labels is not None:
            labels = torch.cat(labels)
            classes = torch.where(labels > 0, labels, classes)
        rows = torch.arange(len(classes), device=classes.device)
        refined = stage.decode(deltas[rows, classes], torch.cat(boxes)).split([len(box) for box in boxes])
        return [clip_boxes_to_image(box, size) for box, size in zip(refined, sizes)]

    def _mask_loss(self, stage, features, sizes, targets, boxes, labels, indices):
        found = [label.nonzero()[:, 0] for label in labels]
        boxes = [box[index] for box, index in zip(boxes, found)]
        indices = [index_of[index] for index_of, index in zip(indices, found)]
        logits = stage.predict_masks(self.mask_pool(features, boxes, sizes))
        with torch.autocast(logits.device.type, enabled=False):
            masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
            return maskrcnn_loss(logits, boxes, masks, classes, indices)

    def detect(self, features, proposals, sizes):
        """Detections of each image.

        Class scores are the mean over the stages, boxes those of the last, masks the mean over the stages.

        Returns:
            For each image a dict of boxes (N, 4), labels (N,), scores (N,) and masks (N, 1, 28, 28), whose
            values are probabilities within the box; the best first.
        """
        scores = 0
        for i, stage in enumerate(self.stages):
            logits, deltas = stage.predict_boxes(self.box_pool(features, proposals, sizes))
            scores = scores + logits.softmax(1) / len(self.stages)
            if i + 1 < len(self.stages):
                proposals = self.refine(stage, logits, deltas, proposals, sizes)
        counts = [len(boxes) for boxes in proposals]
        repeated = torch.cat(proposals).repeat_interleave(deltas.shape[1], dim=0)
        decoded = stage.decode(deltas.flatten(0, 1), repeated).view_as(deltas).split(counts)
        detections = [self.keep_best(*image) for image in zip(decoded, scores.split(counts), sizes)]
        boxes = [detection["boxes"] for detection in detections]
        pooled = self.mask_pool(features, boxes, sizes)
        labels = [detection["labels"] for detection in detections]
        masks = [maskrcnn_inference(stage.predict_masks(pooled), labels) for stage in self.stages]
        for detection, *masks_of_stages in zip(detections, *masks):
            detection["masks"] = sum(masks_of_stages) / len(self.stages)
        return detections

    def keep_best(self, boxes, scores, size):
        """Threshold, suppress and cut the detections of an image.

        Args:
            boxes: (N, classes, 4).
            scores: (N, classes).
            size: (height, width).
        """
        boxes = clip_boxes_to_image(boxes, size)
        rows, labels = (scores[:, 1:] > self.score_threshold).nonzero().unbind(1)
        labels = labels + 1
        boxes, scores = boxes[rows, labels], scores[rows, labels]
        kept = remove_small_boxes(boxes, 1e-2)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        kept = batched_nms(boxes, scores, labels, self.nms_iou)[: self.per_image]
        return dict(boxes=boxes[kept], labels=labels[kept], scores=scores[kept])


def at_least_float32(x):
    """A tensor in float32, or as it is where that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
