"""The augmentation recipe of detection: steps are drawn first, then done to pixels, boxes and masks."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from .masks import take_masks


class Flip(NamedTuple):
    """Exchange left and right of an image of ``size``, (height, width)."""

    size: tuple

    def change(self, value):
        """Change an image (3, H, W), or tv_tensors.BoundingBoxes."""
        return functional.horizontal_flip(value)

    def places(self, rows, columns):
        """Where the pixels of the result come from, given where those of the image came from."""
        return rows, columns[::-1]


class Resize(NamedTuple):
    """Resize to ``size``, (height, width): bilinear with antialiasing, masks by nearest neighbour."""

    size: tuple

    def change(self, value):
        """Change an image (3, H, W), or tv_tensors.BoundingBoxes."""
        return functional.resize(value, list(self.size))

    def places(self, rows, columns):
        """Where the pixels of the result come from: pixel i is the old pixel floor(i * old / new).

        torch's takes the one before where the quotient is whole and its 32-bit factor rounded down.
        """
        return tuple(old[np.arange(new) * len(old) // new] for old, new in zip((rows, columns), self.size))


class Crop(NamedTuple):
    """Cut out ``size``, (height, width), from ``top`` and ``left`` on."""

    top: int
    left: int
    size: tuple

    def change(self, value):
        """Change an image (3, H, W), or tv_tensors.BoundingBoxes."""
        return functional.crop(value, self.top, self.left, *self.size)

    def places(self, rows, columns):
        """Where the pixels of the result come from."""
        height, width = self.size
        return rows[self.top : self.top + height], columns[self.left : self.left + width]


class RandomShortSide(NamedTuple):
    """A resize whose short side is one of ``sides``, at random, and whose long side is at most ``longest``.

    Sides, in pixels, are rounded to the nearest, as by mmcv, and are never 0.
    """

    sides: list
    longest: int

    def draw(self, size):
        """A :class:`Resize` of an image of ``size``, (height, width)."""
        return Resize(resized(size, self.sides[_random(0, len(self.sides) - 1)], self.longest))


def resized(size, shortest, longest):
    """(height, width) with a short side of ``shortest``, or less where the long side would be too long."""
    scale = min(shortest / min(size), longest / max(size))
    return tuple(max(1, int(side * scale + 0.5)) for side in size)


class RandomCrop(NamedTuple):
    """A crop to random sides between ``low`` and ``high`` pixels, or the whole side where that is shorter."""

    low: int
    high: int

    def draw(self, size):
        """A :class:`Crop` of an image of ``size``, (height, width)."""
        box = []
        for side in size:
            length = _random(min(self.low, side), min(self.high, side))
            box.append((_random(0, side - length), length))
        (top, height), (left, width) = box
        return Crop(top, left, (height, width))


def _random(low, high):
    return int(torch.randint(low, high + 1, ()))


@dataclass(frozen=True)
class Recipe:
    """What is drawn for an image: a flip, half of the time a resize and a crop, a resize."""

    resize: RandomShortSide
    flip: float | None = None  # probability
    crop: tuple = ()  # a RandomShortSide and a RandomCrop, or nothing

    def draw(self, size):
        """Steps for an image of ``size``, (height, width), in order."""
        steps, wanted = [], [self.resize]
        if self.flip is not None and torch.rand(1) < self.flip:
            steps.append(Flip(size))
        if self.crop and torch.rand(1) < 0.5:
            wanted = [*self.crop, self.resize]
        for kind in wanted:
            steps.append(kind.draw(size))
            size = steps[-1].size
        return steps


class Transform:
    """Draws steps, and does them to an image and to its objects.

    ``draw`` makes the steps for an image of (height, width), as :class:`Recipe` does. ``change_pixels`` makes
    of an image as it was read, and of steps, a tensor (3, H, W), uint8.
    """

    def __init__(self, draw, change_pixels):
        self.draw, self.change_pixels = draw, change_pixels

    def __call__(self, image, target):
        """An image (3, H, W), uint8, and its target with masks (M, H, W), uint8.

        The ``target`` has boxes (M, 4), labels (M,), and a list of masks as pycocotools' run lengths, or none
        of them. Objects are left out if less than a pixel of their box is left, or no pixel of their mask.
        """
        steps = self.draw(image.size[::-1])
        if "boxes" in target:
            target = change_objects(target, image.size[::-1], steps)
        return self.change_pixels(image, steps), target


def change_pillow(image, steps):
    """The steps done to an image of Pillow: (3, H, W), uint8."""
    image = functional.pil_to_tensor(image)
    for step in steps:
        image = step.change(image)
    return image


def change_objects(target, size, steps):
    """The objects of an image of ``size``, (height, width), after steps; see :class:`Transform`."""
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    places = tuple(map(np.arange, size))
    for step in steps:
        boxes, places = step.change(boxes), step.places(*places)
    boxes, large = functional.sanitize_bounding_boxes(functional.clamp_bounding_boxes(boxes), min_size=1)
    large = large.nonzero()[:, 0]
    masks, seen = take_masks([target["masks"][i] for i in large], *places)
    # A plain tensor: the class of boxes would slow down every operation on them.
    boxes = boxes.as_subclass(torch.Tensor)[seen]
    return dict(target, boxes=boxes, labels=target["labels"][large[seen]], masks=masks)


def describe_detection(config):
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


def build_detection_transform(config, is_train, change_pixels=change_pillow):
    """The :class:`Transform` of training or evaluation.

    Training: flip; resize to a random short side; half of the time resize and crop before that."""
    det = config.DET
    if not is_train:
        return Transform(Recipe(RandomShortSide([det.TEST_SIZE], det.MAX_SIZE)).draw, change_pixels)
    crop = ()
    if det.CROP_MIN_SIZES and det.CROP_SIZES:
        crop = RandomShortSide(det.CROP_MIN_SIZES, det.MAX_SIZE), RandomCrop(*det.CROP_SIZES)
    recipe = Recipe(RandomShortSide(det.MIN_SIZES, det.MAX_SIZE), config.AUG.HFLIP, crop)
    return Transform(recipe.draw, change_pixels)
