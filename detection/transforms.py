"""The augmentation recipe of detection, on torchvision's v2 transforms."""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2


class ResizeShortSide(nn.Module):
    """Resize so that the short side is one of ``sides``, at random, and the long side at most ``longest``.

    Sides, in pixels, are rounded to the nearest, as by mmcv, and are never 0.
    """

    def __init__(self, sides, longest):
        super().__init__()
        self.sides, self.longest = sides, longest

    def forward(self, image, target):
        """Resize an image (3, H, W), and the boxes and masks of its target, where it has some."""
        side = self.sides[_random(0, len(self.sides) - 1)]
        size = resized(image.shape[-2:], side, self.longest)
        target = dict(target)
        if "boxes" in target:
            target["boxes"] = v2.functional.resize(target["boxes"], size)
        if "masks" in target:
            target["masks"] = tv_tensors.Mask(_nearest(target["masks"], size))
        return v2.functional.resize(image, size), target


def resized(size, shortest, longest):
    """(height, width) with a short side of ``shortest``, or less where the long side would be too long."""
    scale = min(shortest / min(size), longest / max(size))
    return [max(1, int(side * scale + 0.5)) for side in size]


def _nearest(masks, size):
    """Masks (M, H, W) by nearest neighbour: pixel i is the old pixel floor(i * old / new).

    torch's takes the one before where the quotient is whole and its 32-bit factor rounded down.
    """
    for axis, new in enumerate(size, 1):
        masks = masks.index_select(axis, torch.arange(new) * masks.shape[axis] // new)
    return masks


class CropToRandomSize(nn.Module):
    """Crop to random sides between ``low`` and ``high`` pixels, or the whole side where that is shorter."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, image, target):
        """Crop an image (3, H, W), and the boxes and masks of its target."""
        box = []
        for side in image.shape[-2:]:
            length = _random(min(self.low, side), min(self.high, side))
            box.append((_random(0, side - length), length))
        (top, height), (left, width) = box
        target = dict(target)
        for name in ("boxes", "masks"):
            target[name] = v2.functional.crop(target[name], top, left, height, width)
        return v2.functional.crop(image, top, left, height, width), target


class DropUnseen(nn.Module):
    """Drop the objects whose mask has no pixel left."""

    def forward(self, image, target):
        """An image and its target, without these objects."""
        seen = target["masks"].flatten(1).any(1).bool()
        return image, dict(target, **{name: target[name][seen] for name in ("boxes", "labels", "masks")})


def _random(low, high):
    return int(torch.randint(low, high + 1, ()))


def describe_evaluation(config):
    """What evaluation does to an image, in plain values, for whoever runs an exported model."""
    return dict(
        layout="batch, channels, height, width",
        channels="RGB",
        resize_short_side_to=config.DET.TEST_SIZE,
        but_long_side_at_most=config.DET.MAX_SIZE,
        interpolation="bilinear",
        divide_by=255,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        then="zeros below and to the right, up to the size",
    )


def build_transform(config, is_train):
    """Image (3, H, W) uint8 and its target to the resized and, in training, augmented image and target.

    Training: flip; resize to a random short side; half of the time resize and crop before that. Objects of
    which less than a pixel is left are dropped.
    """
    det = config.DET
    if not is_train:
        return ResizeShortSide([det.TEST_SIZE], det.MAX_SIZE)
    resize = ResizeShortSide(det.MIN_SIZES, det.MAX_SIZE)
    clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1), DropUnseen()]
    steps = [v2.RandomHorizontalFlip(config.AUG.HFLIP)]
    if det.CROP_MIN_SIZES and det.CROP_SIZES:
        crop = [ResizeShortSide(det.CROP_MIN_SIZES, det.MAX_SIZE), CropToRandomSize(*det.CROP_SIZES)]
        steps.append(v2.RandomApply(crop, 0.5))
    return v2.Compose([*steps, resize, *clean])
