"""A trained detector from its checkpoint, ready for use."""

import os

import torch

import checkpoint as ckpt
from models.from_checkpoint import Ready, read_described

from .detector import build_detector
from .loaders import BatchToDevice, collate_detection
from .transforms import build_detection_transform


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
    label 1 is the first class. :func:`~detection.detector.to_original_size` brings them to those of the
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
