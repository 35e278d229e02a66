"""The augmentation recipe of detection: steps are drawn first, then done to pixels, boxes and masks."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional


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


def resized(size, shortest, longest):
    """(height, width) with a short side of ``shortest``, or less where the long side would be too long.

    Sides, in pixels, are rounded to the nearest, as by mmcv, and are never 0.
    """
    scale = min(shortest / min(size), longest / max(size))
    return tuple(max(1, int(side * scale + 0.5)) for side in size)


def _random(low, high):
    return int(torch.randint(low, high + 1, ()))


@dataclass(frozen=True)
class Recipe:
    """What is drawn for an image: a flip, half of the time a resize and a crop, a resize."""

    sides: list  # short sides that are chosen from, in pixels
    longest: int  # most pixels on a side
    flip: float | None = None  # probability
    crop: tuple = ()  # short sides before the crop, and the least and greatest side of the crop; or nothing

    def draw(self, size):
        """Steps for an image of ``size``, (height, width), in order."""
        steps = []
        if self.flip is not None and torch.rand(1) < self.flip:
            steps.append(Flip(size))
        if self.crop and torch.rand(1) < 0.5:
            sides, (low, high) = self.crop
            steps.append(self._resize(size, sides))
            steps.append(self._crop(steps[-1].size, low, high))
            size = steps[-1].size
        return [*steps, self._resize(size, self.sides)]

    def _resize(self, size, sides):
        return Resize(resized(size, sides[_random(0, len(sides) - 1)], self.longest))

    def _crop(self, size, low, high):
        box = []
        for side in size:  # the whole of one that is shorter
            length = _random(min(low, side), min(high, side))
            box.append((_random(0, side - length), length))
        (top, height), (left, width) = box
        return Crop(top, left, (height, width))


class Transform:
    """Draws steps, and does them to an image and to its objects.

    ``draw`` makes the steps for an image of (height, width), as :class:`Recipe` does.
    """

    def __init__(self, draw):
        self.draw = draw

    def __call__(self, image, target):
        """A PIL image as (3, H, W), uint8, and its target with masks (M, H, W), uint8.

        The ``target`` has boxes (M, 4), labels (M,), and a list of masks as pycocotools' run lengths, or none
        of them. Objects are left out if less than a pixel of their box is left, or no pixel of their mask.
        """
        steps = self.draw(image.size[::-1])
        if "boxes" in target:
            target = change_objects(target, image.size[::-1], steps)
        image = functional.pil_to_tensor(image)
        for step in steps:
            image = step.change(image)
        return image, target


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


def take_masks(codes, rows, columns):
    """The masks of these rows and columns of an image, each of them ascending or descending.

    Only the rectangle of an object is worked on: most are far smaller than the image.

    Args:
        codes: pycocotools' run lengths, a list.
        rows, columns: arrays of the rows and columns of the image to take, in order; some more than once.

    Returns:
        The masks that are not empty, uint8 (M, rows, columns), and bool (len(codes),), which these are.
    """
    parts, seen = [], torch.zeros(len(codes), dtype=torch.bool)
    for place, code in enumerate(codes):
        left, top, width, height = map(int, coco_mask.toBbox(code))
        of_rows, of_columns = _within(rows, top, height), _within(columns, left, width)
        # The columns are what lies in a row in memory.
        mask = coco_mask.decode(code).T[left : left + width, top : top + height]
        part = np.ascontiguousarray(mask[columns[of_columns] - left].T)[rows[of_rows] - top]
        seen[place] = bool(part.size and part.max())
        if seen[place]:
            parts.append((part, of_rows, of_columns))
    masks = torch.zeros(len(parts), len(rows), len(columns), dtype=torch.uint8)
    for mask, (part, of_rows, of_columns) in zip(masks, parts):
        mask[of_rows, of_columns] = torch.from_numpy(part)
    return masks, seen


def _within(places, first, length):
    """The slice of an array, ascending or descending, that holds ``first`` and the ``length`` from there."""
    found = np.flatnonzero((places >= first) & (places < first + length))
    return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def build_detection_transform(config, is_train):
    """The :class:`Transform` of training or evaluation, which only resizes."""
    det = config.DET
    if not is_train:
        return Transform(Recipe([det.TEST_SIZE], det.MAX_SIZE).draw)
    crop = (det.CROP_MIN_SIZES, det.CROP_SIZES) if det.CROP_MIN_SIZES and det.CROP_SIZES else ()
    return Transform(Recipe(det.MIN_SIZES, det.MAX_SIZE, config.AUG.HFLIP, crop).draw)
