"""The whole detector, from a batch of images to losses or detections, new or trained."""

import copy
import math
import os
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import grid_sample
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import checkpoint as ckpt
from models.attention import at_least_float32
from models.from_checkpoint import Ready, read_described

from .backbone import build_backbone
from .cascade import CascadeHeads, CascadeStage, DetectionLimits, HeadLayers
from .loaders import BatchToDevice, collate_detection
from .proposals import ProposalNetwork
from .transforms import build_detection_transform


class Detector(nn.Module):
    """An MSGBackbone, torchvision's feature pyramid, a ProposalNetwork and CascadeHeads."""

    def __init__(self, backbone, fpn, rpn, heads):
        super().__init__()
        self.backbone, self.fpn, self.rpn, self.heads = backbone, fpn, rpn, heads

    def forward(self, images, sizes, targets=None):
        """Losses in training mode, detections otherwise.

        Args:
            images: (B, 3, H, W), normalised, zero outside of each image.
            sizes: (height, width) of each image.
            targets: of each image, boxes (M, 4), labels (M,) from 1, and masks (M, H, W) uint8, in pixels of
                ``images``.

        Returns:
            dict of losses by name, or for each image a dict of boxes, labels, scores and masks.
        """
        maps = self.backbone(images, sizes)
        maps = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps))).values()
        # What follows sorts, matches and compares: half precision stays in the heads.
        maps = [at_least_float32(x) for x in maps]
        proposals, losses = self.rpn(maps, sizes, targets)
        if self.training:
            return dict(losses, **self.heads.losses(maps, proposals, sizes, targets))
        return self.heads.detect(maps, proposals, sizes)

    def no_weight_decay(self):
        """Names of the parameters that weight decay must leave alone, besides biases and 1-d ones."""
        return {f"backbone.model.{name}" for name in self.backbone.model.no_weight_decay()}


def count_detector_macs(detector, height, width, boxes=1000, masks=100):
    """Multiply-accumulate operations for an image, in the way of the paper's tables.

    These count: the backbone (:meth:`MSGBackbone.macs`), and every convolution and linear layer of the
    feature pyramid, of the proposal network, of each box head for ``boxes`` proposals and of each mask head
    for ``masks`` of them. Pooling, box decoding and suppression do not.
    """
    backbone, rest = detector.backbone, copy.deepcopy(detector).to("meta").eval()
    strides = [info["reduction"] for info in backbone.model.feature_info]
    maps = OrderedDict(
        (str(i), torch.empty(1, channels, -(-height // stride), -(-width // stride), device="meta"))
        for i, (channels, stride) in enumerate(zip(backbone.channels, strides))
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = list(rest.fpn(maps).values())
        rest.rpn.head(features)
        for stage in rest.heads.stages:
            stage.predict_boxes(features[0].new_empty(boxes, features[0].shape[1], 7, 7))
            stage.predict_masks(features[0].new_empty(masks, features[0].shape[1], 14, 14))
    return backbone.macs(height, width) + counter.get_total_flops() // 2


def build_detector(config, classes):
    """The detector that ``config.MODEL`` and ``config.DET`` describe, freshly initialised.

    ``classes`` is the number of kinds of objects.

    Raises:
        UserError: a combination that cannot be built; the message names the key to change.
    """
    det, backbone = config.DET, build_backbone(config)
    channels = det.CHANNELS
    fpn = FeaturePyramidNetwork(backbone.channels, channels, LastLevelMaxPool())
    strides = [info["reduction"] for info in backbone.model.feature_info]
    anchors = [*strides, 2 * strides[-1]], det.ANCHOR_SCALE, det.ANCHOR_RATIOS
    most = det.PROPOSALS_TRAIN, det.PROPOSALS_TEST
    rpn = ProposalNetwork(channels, *anchors, det.RPN_SAMPLES, most)
    layers = HeadLayers(channels, 1 + classes, det.BOX_CONVS, det.BOX_FCS, det.MASK_CONVS)
    stages = [
        CascadeStage(layers, iou, stds, det.BOX_LOSS) for iou, stds in zip(det.IOU_THRESHOLDS, det.DELTA_STDS)
    ]
    limits = DetectionLimits(det.SCORE_THRESHOLD, det.NMS_IOU, det.PER_IMAGE)
    heads = CascadeHeads(stages, strides, det.LOSS_WEIGHTS, det.ROI_SAMPLES, det.ROI_POSITIVE, limits)
    detector = Detector(backbone, fpn, rpn, heads)
    _initialise(detector)
    return detector


def _initialise(detector):
    """Draw the first weights where mmdet's differ from torchvision's."""
    for module in detector.fpn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
    for stage in detector.heads.stages:
        for module in stage.box_head.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module, std in ((stage.box_predictor.cls_score, 0.01), (stage.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
        for module in (stage.mask_predictor.conv5_mask, stage.mask_predictor.mask_fcn_logits):
            nn.init.zeros_(module.bias)


def load_pretrained(detector, checkpoint, path):
    """Load the weights that a new run starts from.

    Args:
        checkpoint: what ``read_checkpoint`` returned for ``path``: of a classifier, for the backbone; or of a
            detector, whose class and mask predictors are left out where the classes differ. Other sizes are
            fitted as :func:`checkpoint.resize.fit_weights` does.

    Raises:
        CheckpointError: weights of another architecture, with what differs.
    """
    weights = ckpt.without_prefix(ckpt.weights_of(checkpoint, path), detector.state_dict(), path)
    if any(name.startswith("backbone.model.") for name in weights):
        described = {name: checkpoint.get(name) for name in ("classes", "config")}
        ckpt.load_weights(detector, dict(model=weights, **described), path, new_head=True)
        return
    backbone = detector.backbone.model
    weights = ckpt.without_prefix(weights, backbone.state_dict(), path)
    kept = {name: value for name, value in weights.items() if not name.startswith(("norm.", "head."))}
    ckpt.load_weights(backbone, dict(model=kept, config=checkpoint.get("config")), path, new_head=True)


def to_original_size(detection, size, original):
    """A detection in pixels of the image as it was before resizing, on the CPU.

    ``size`` and ``original`` are the (height, width) that the detector saw, and of the image. Masks become
    bool (N, height, width).
    """
    detection = {
        name: value.float().cpu() if value.is_floating_point() else value.cpu()
        for name, value in detection.items()
    }
    scale = [there / here for there, here in zip(original, size)]
    boxes = detection["boxes"] * torch.tensor([scale[1], scale[0]] * 2)
    return dict(detection, boxes=boxes, masks=paste_masks(detection["masks"][:, 0], boxes, original))


def paste_masks(masks, boxes, size):
    """Masks of boxes as masks of the image.

    A pixel takes the probability at its centre, bilinear between the centres of the cells and falling to 0
    beyond them, and belongs to the object from 0.5.

    Args:
        masks: probabilities (N, side, side) of the cells of each box.
        boxes: (N, 4) in pixels of the image, exact: not rounded.

    Returns:
        bool (N, height, width), where ``size`` is (height, width).
    """
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for place, mask, box in zip(pasted, masks, boxes):
        x1, y1, x2, y2 = box.tolist()
        left, right = max(0, math.floor(x1)), min(size[1], math.ceil(x2))
        top, bottom = max(0, math.floor(y1)), min(size[0], math.ceil(y2))
        if left >= right or top >= bottom:
            continue
        x = (torch.arange(left, right).to(mask) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom).to(mask) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        values = grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        place[top:bottom, left:right] = values >= 0.5
    return pasted


class ImageToBatch:
    """A PIL image as evaluation shows it to a detector, by a :class:`~detection.transforms.Transform`."""

    def __init__(self, transform):
        self.transform = transform
        self.to_device = BatchToDevice(torch.device("cpu"))

    def __call__(self, image):
        """(1, 3, H, W), resized and normalised, and a list of its (H, W)."""
        resized, _ = self.transform(image, {})
        batch, targets, _ = collate_detection([(resized, {}, [])])
        return self.to_device.move((batch, targets))[0]


def load(path, cfg=None, weights="auto"):
    """The detector of a checkpoint, its evaluation transform, and the names of its classes.

    ``model(*transform(image))[0]`` holds boxes, labels, scores and masks in pixels of the resized image;
    label 1 is the first class. :func:`to_original_size` brings them to those of the
    image.

    The arguments and errors are those of :func:`models.load`; checkpoints of classifiers are refused. Returns
    a :class:`~models.from_checkpoint.Ready`, with an :class:`ImageToBatch` as its transform.
    """
    return build_ready_detector(*read_described(path, cfg, weights), path)


def build_ready_detector(config, checkpoint, path):
    """The :class:`~models.from_checkpoint.Ready` of what ``read_described`` returned for a path."""
    if config.DATA.DATASET != "coco":
        raise ckpt.CheckpointError(f"{path} is of a classifier: use models.load")
    names = checkpoint["classes"]
    model = build_detector(config, config.MODEL.NUM_CLASSES)
    model.classes = names
    ckpt.load_weights(model, checkpoint, os.fspath(path))
    return Ready(model.eval(), ImageToBatch(build_detection_transform(config, is_train=False)), names)
