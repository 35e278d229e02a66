"""Images read by OpenCV; large ones are decoded at a reduced size.

The random choices are timm's own, drawn in the same order as for Pillow; only the work on pixels is done by
others. Batches are normalised and erased on the device.
"""

import random
import re

import cv2
import numpy as np
import torch
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, interp_mode_to_str
from torchvision import transforms

from ..datasets import MAX_PIXELS, decoding, in_8_bits, open_image, orientation_of
from ..transforms import aspect_box, augment_operations, build_transform, covering_size, evaluation_sizes
from .operations import FASTER, RandomFlip, ThroughPillow, resize, to_tensor

# JPEG markers that have no place in a scan: all but restarts and the end. In a progressive file, tables,
# scans and comments have a place there too.
_FOREIGN_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xd9\xff]")
_FOREIGN_IN_SCANS = re.compile(rb"\xff[^\x00\xc4\xd0-\xd7\xd9-\xdd\xfe\xff]")


class ImageFile:
    """An image file in memory: its size is read from the header, its pixels are decoded on demand.

    OpenCV decodes JPEGs that look sound, to the same pixels as Pillow; Pillow decodes everything else.

    The arguments are those of :func:`~data.datasets.load_image`; ``size`` is (width, height) in pixels, after
    turning.

    Raises:
        DataError: the file cannot be decoded or exceeds the limit; :meth:`crop` may raise it as well.
    """

    def __init__(self, path, max_pixels=MAX_PIXELS, content=None, turn=True):
        self.path = path
        self.image, self.data = open_image(path, max_pixels, content)
        self.orientation = orientation_of(self.image) if turn else 1
        self.size = self.image.size[:: -1 if self.orientation > 4 else 1]
        is_jpeg = self.image.format == "JPEG" and self.image.mode in ("L", "RGB")
        self.is_sound = is_jpeg and self._ends_well()

    def _ends_well(self):
        """Whether a JPEG has an end and, from its first scan to that end, only markers that belong there.

        Of a damaged file OpenCV may return an image that is partly grey, where Pillow mostly refuses.
        """
        foreign = _FOREIGN_IN_SCANS if "progressive" in self.image.info else _FOREIGN_IN_SCAN
        return self.data.endswith(b"\xff\xd9") and not foreign.search(self.data, self.image.fp.tell())

    def crop(self, left, top, width, height, scale):
        """The pixels of a box, decoded at a reduced size where twice the pixels wanted on a side remain.

        The sides of the box are going to be ``scale`` times smaller. Returns (H, W, 3): the size of the box,
        or a half, a quarter or an eighth of it.
        """
        reduction = next((factor for factor in (8, 4, 2) if 2 * factor <= scale), 1)
        with decoding(self.path):
            pixels = self._decode_jpeg(reduction) if self.is_sound else None
            if pixels is None:
                reduction, pixels = 1, np.array(in_8_bits(self.image, "RGB", self.path))
        pixels = turned(pixels, self.orientation)
        rows, columns = (there / here for there, here in zip(pixels.shape, reversed(self.size)))
        first_row, first_column = round(top * rows), round(left * columns)
        last_row = max(first_row + 1, round((top + height) * rows))
        last_column = max(first_column + 1, round((left + width) * columns))
        pixels = pixels[first_row:last_row, first_column:last_column]
        return pixels if reduction == 1 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def _decode_jpeg(self, reduction):
        # OpenCV decodes reduced images to BGR only.
        color = cv2.IMREAD_COLOR_RGB if reduction == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}")
        return cv2.imdecode(np.frombuffer(self.data, np.uint8), color | cv2.IMREAD_IGNORE_ORIENTATION)


def turned(pixels, orientation):
    """Pixels (H, W, C) stored with an EXIF orientation from 1 to 8, upright."""
    if orientation > 4:
        pixels = cv2.transpose(pixels)
    place = (orientation - 1) % 4
    # cv2's words for an axis: 1 exchanges left and right, 0 top and bottom, -1 both.
    return cv2.flip(pixels, (1, -1, 0)[place - 1]) if place else pixels


class CropResizedRandomly:
    """timm's random resized crop, box for box, of an :class:`ImageFile`."""

    def __init__(self, step):
        self.step = step

    def __call__(self, file):
        width, height = file.size
        stand_in = torch.empty(1).expand(3, height, width)  # timm looks only at its shape
        top, left, rows, columns = self.step.get_params(stand_in, self.step.scale, self.step.ratio)
        mode = self.step.interpolation
        if isinstance(mode, tuple):
            mode = random.choice(mode)
        target_rows, target_columns = self.step.size
        scale = min(rows / target_rows, columns / target_columns)
        pixels = file.crop(left, top, columns, rows, scale)
        return resize(pixels, target_rows, target_columns, interp_mode_to_str(mode))


class CropPadded:
    """torchvision's random crop with a black border, for arrays."""

    def __init__(self, step):
        self.padding, self.size = step.padding, step.size

    def __call__(self, pixels):
        pixels = cv2.copyMakeBorder(pixels, *[self.padding] * 4, cv2.BORDER_CONSTANT)
        stand_in = torch.empty(1).expand(3, *pixels.shape[:2])  # torchvision looks only at its shape
        top, left, rows, columns = transforms.RandomCrop.get_params(stand_in, self.size)
        return pixels[top : top + rows, left : left + columns]


class ResizeWhole:
    """An :class:`ImageFile` resized to ``size``, (height, width)."""

    def __init__(self, size, interpolation):
        self.size, self.interpolation = size, interpolation

    def __call__(self, file):
        (width, height), (rows, columns) = file.size, self.size
        pixels = file.crop(0, 0, width, height, min(height / rows, width / columns))
        return resize(pixels, rows, columns, self.interpolation)


class ResizeAndCropCenter:
    """The centre crop of a resized :class:`ImageFile`.

    ``cover`` and ``size`` are (height, width): what the resized image covers, and the crop.
    """

    def __init__(self, cover, size, interpolation):
        self.cover, self.size, self.interpolation = cover, size, interpolation

    def __call__(self, file):
        left, top, width, height = aspect_box(*file.size, self.cover)
        scale = min(height / self.cover[0], width / self.cover[1])
        resized = covering_size(width, height, self.cover)
        pixels = resize(file.crop(left, top, width, height, scale), *resized, self.interpolation)
        rows, columns = (
            slice(start := round((side - size) / 2), start + size) for side, size in zip(resized, self.size)
        )
        return pixels[rows, columns]


def build_opencv_transform(config, is_train):
    """The transform of an :class:`ImageFile` to a tensor (3, H, W), uint8, the sides of ``DATA.IMG_SIZE``.

    It is the transform of transforms.py without normalisation and erasing, which are left to the device.
    Every other step draws the same random numbers.
    """
    if not is_train:
        cover, size, mode = evaluation_sizes(config)
        mode = interp_mode_to_str(mode)
        crop = ResizeAndCropCenter(cover, size, mode) if cover else ResizeWhole(size, mode)
        return transforms.Compose([crop, to_tensor])
    later = MaybeToTensor, transforms.Normalize, RandomErasing
    whole = build_transform(config, is_train)
    steps = [step for step in whole.transforms if not isinstance(step, later)]
    return transforms.Compose([*map(_for_arrays, steps), to_tensor])


def _for_arrays(step):
    if isinstance(step, RandomResizedCropAndInterpolation):
        return CropResizedRandomly(step)
    if isinstance(step, transforms.Resize):
        return ResizeWhole(step.size, interp_mode_to_str(step.interpolation))
    if isinstance(step, transforms.RandomCrop):
        return CropPadded(step)
    if isinstance(step, transforms.RandomHorizontalFlip):
        return RandomFlip(step.p)
    if isinstance(step, (auto_augment.RandAugment, auto_augment.AutoAugment)):
        for operation in augment_operations(step):
            function = operation.aug_fn
            operation.aug_fn = FASTER.get(function) or ThroughPillow(function)
        return step
    return ThroughPillow(step)
