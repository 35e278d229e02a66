"""The whole detector, from a batch of images to losses or detections."""

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import checkpoint as ckpt
from config import ConfigError
from models import build_model

from .backbone import MSGBackbone
from .cascade import CascadeHeads, CascadeStage, at_least_float32


class Detector(nn.Module):
    """Backbone, feature pyramid, region proposals and cascade heads.

    Args:
        backbone: an :class:`MSGBackbone`.
        fpn, rpn: torchvision's.
        heads: :class:`CascadeHeads`.
    """

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
        features = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        # What follows sorts, matches and compares: half precision stays in the heads.
        features = OrderedDict((name, at_least_float32(x)) for name, x in features.items())
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        losses = {name.replace("loss_", ""): loss for name, loss in losses.items()}
        if self.training:
            return dict(losses, **self.heads.losses(features, proposals, sizes, targets))
        return self.heads.detect(features, proposals, sizes)

    def no_weight_decay(self):
        """Names of the parameters that weight decay must leave alone, beside biases and 1-d ones."""
        return {f"backbone.model.{name}" for name in self.backbone.model.no_weight_decay()}


def count_macs(detector, height, width, boxes=1000, masks=100):
    """Multiply-accumulate operations for an image, in the way of the paper's tables.

    These count: the backbone (:meth:`MSGBackbone.flops`), and every convolution and linear layer of the
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
    return backbone.flops(height, width) + counter.get_total_flops() // 2


def build_detector(config, classes):
    """The detector that ``config.MODEL`` and ``config.DET`` describe, freshly initialised.

    Args:
        classes: kinds of objects.

    Raises:
        ConfigError: a combination that cannot be built; the message names the key to change.
    """
    det = config.DET
    try:
        backbone = MSGBackbone(build_model(config), det.SHUF_SIZE, det.FROZEN_STAGES)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    channels = det.CHANNELS
    fpn = FeaturePyramidNetwork(backbone.channels, channels, LastLevelMaxPool())
    strides = [info["reduction"] for info in backbone.model.feature_info]
    strides.append(2 * strides[-1])
    anchors = AnchorGenerator(
        tuple((det.ANCHOR_SCALE * stride,) for stride in strides),
        (tuple(float(ratio) for ratio in det.ANCHOR_RATIOS),) * len(strides),
    )
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=det.RPN_SAMPLES,
        positive_fraction=0.5,
        pre_nms_top_n=dict(training=det.PROPOSALS_TRAIN, testing=det.PROPOSALS_TEST),
        post_nms_top_n=dict(training=det.PROPOSALS_TRAIN, testing=det.PROPOSALS_TEST),
        nms_thresh=0.7,
    )
    stages = [
        CascadeStage(
            channels, 1 + classes, det.BOX_CONVS, det.BOX_FCS, det.MASK_CONVS, iou, stds, det.BOX_LOSS
        )
        for iou, stds in zip(det.IOU_THRESHOLDS, det.DELTA_STDS)
    ]
    heads = CascadeHeads(
        stages,
        len(backbone.channels),
        det.LOSS_WEIGHTS,
        det.ROI_SAMPLES,
        det.ROI_POSITIVE,
        det.SCORE_THRESHOLD,
        det.NMS_IOU,
        det.PER_IMAGE,
    )
    return Detector(backbone, fpn, rpn, heads)


def load_pretrained(detector, checkpoint, path):
    """Load the weights that a new run starts from.

    Args:
        checkpoint: what ``read_checkpoint`` returned: of a classifier, for the backbone; or of a detector,
            whose class and mask predictors are left out where the classes differ.
        path: its file, for messages.

    Raises:
        CheckpointError: weights of another architecture, with what differs.
    """
    weights = checkpoint.get("model", checkpoint)
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ckpt.CheckpointError(f"{path} holds no model weights")
    if any(name.startswith("backbone.") for name in weights):
        ckpt.load_weights(detector, checkpoint, path, new_head=True)
        return
    kept = {name: value for name, value in weights.items() if not name.startswith(("norm.", "head."))}
    ckpt.load_weights(detector.backbone.model, kept, path)


def to_original_size(detection, size, original):
    """A detection in pixels of the image as it was before resizing.

    Args:
        detection: boxes (N, 4), labels (N,), scores (N,), masks (N, 1, 28, 28) of the detector.
        size, original: (height, width) that the detector saw, and of the image.

    Returns:
        The same with masks (N, height, width), bool, on the CPU.
    """
    detection = {
        name: value.float().cpu() if value.is_floating_point() else value.cpu()
        for name, value in detection.items()
    }
    scale = [there / here for there, here in zip(original, size)]
    boxes = detection["boxes"] * torch.tensor([scale[1], scale[0]] * 2)
    masks = paste_masks_in_image(detection["masks"], boxes, original)[:, 0] > 0.5
    return dict(detection, boxes=boxes, masks=masks)
