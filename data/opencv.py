"""The recipe of transforms.py on OpenCV: decode what is needed, resize the crop alone, keep 8 bits.

The random choices are timm's own, drawn in the same order as for Pillow; only the work on pixels is done by
others. Images are arrays (H, W, 3), RGB, uint8; batches are normalised and erased on the device.
"""

import math
import random
import re

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, interp_mode_to_str
from torch.nn import functional
from torchvision import transforms

from .datasets import MAX_PIXELS, MAX_SCANS, decoding, open_image
from .transforms import aspect_box, augment_operations, evaluation_sizes, posterize_from_0_bits
from .transforms import build_transform as build_for_pillow

# Markers other than restarts and the end; in a progressive file, other than tables, scans and comments too.
_FOREIGN_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xd9\xff]")
_FOREIGN_IN_SCANS = re.compile(rb"\xff[^\x00\xc4\xd0-\xd7\xd9-\xdd\xfe\xff]")
_WARP = {
    Image.Resampling.NEAREST: cv2.INTER_NEAREST,
    Image.Resampling.BILINEAR: cv2.INTER_LINEAR,
    Image.Resampling.BICUBIC: cv2.INTER_CUBIC,
}


class ImageFile:
    """An image file in memory: the size is read from its header, the pixels are decoded on demand.

    OpenCV decodes JPEGs that look sound, to the same pixels as Pillow; Pillow decodes all else.

    Args:
        max_pixels, max_scans: see :func:`~data.datasets.open_image`.

    Attributes:
        size: (width, height) in pixels; EXIF rotation is ignored, as Pillow does it.

    Raises:
        DataError: the file cannot be decoded, or only beyond the limits; from :meth:`crop`, too.
    """

    def __init__(self, path, max_pixels=MAX_PIXELS, max_scans=MAX_SCANS):
        self.path = path
        self.image, self.data = open_image(path, max_pixels, max_scans)
        self.size = self.image.size
        is_jpeg = self.image.format == "JPEG" and self.image.mode in ("L", "RGB")
        self.is_sound = is_jpeg and self._ends_well()

    def _ends_well(self):
        """Whether a JPEG has an end, and between its first scan and that end only markers that belong there.

        Where a file is damaged, OpenCV may make the rest of the image grey; Pillow mostly refuses it.
        """
        foreign = _FOREIGN_IN_SCANS if "progressive" in self.image.info else _FOREIGN_IN_SCAN
        return self.data.endswith(b"\xff\xd9") and not foreign.search(self.data, self.image.fp.tell())

    def crop(self, left, top, width, height, scale):
        """The pixels of a box, at least twice as many on a side as are wanted where that is decoded faster.

        Args:
            scale: the box is going to be shrunk by this.

        Returns:
            (H, W, 3), H and W being those of the box or the 2nd, 4th or 8th part of them.
        """
        reduction = next((factor for factor in (8, 4, 2) if 2 * factor <= scale), 1)
        with decoding(self.path):
            pixels = self._decode_jpeg(reduction) if self.is_sound else None
            by_pillow = None if pixels is not None else np.array(self.image.convert("RGB"))
        if by_pillow is not None:
            return by_pillow[top : top + height, left : left + width]
        rows, columns = (there / here for there, here in zip(pixels.shape, reversed(self.size)))
        first_row, first_column = round(top * rows), round(left * columns)
        last_row = max(first_row + 1, round((top + height) * rows))
        last_column = max(first_column + 1, round((left + width) * columns))
        pixels = pixels[first_row:last_row, first_column:last_column]
        return pixels if reduction == 1 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def _decode_jpeg(self, reduction):
        # Reduced images come in BGR only.
        color = cv2.IMREAD_COLOR_RGB if reduction == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}")
        return cv2.imdecode(np.frombuffer(self.data, np.uint8), color | cv2.IMREAD_IGNORE_ORIENTATION)


class CropResizedRandomly:
    """timm's random resized crop of an :class:`ImageFile`: its boxes, with only the box resized."""

    def __init__(self, step):
        self.step = step

    def __call__(self, file):
        width, height = file.size
        stand_in = torch.empty(1).expand(3, height, width)  # only its shape is looked at
        top, left, rows, columns = self.step.get_params(stand_in, self.step.scale, self.step.ratio)
        mode = self.step.interpolation
        if isinstance(mode, tuple):
            mode = random.choice(mode)
        target_rows, target_columns = self.step.size
        scale = min(rows / target_rows, columns / target_columns)
        pixels = file.crop(left, top, columns, rows, scale)
        return resize(pixels, target_rows, target_columns, interp_mode_to_str(mode))


class ResizeWhole:
    """An :class:`ImageFile` resized to (size, size)."""

    def __init__(self, size, interpolation):
        self.size, self.interpolation = size, interpolation

    def __call__(self, file):
        pixels = file.crop(0, 0, *file.size, min(file.size) / self.size)
        return resize(pixels, self.size, self.size, self.interpolation)


class ResizeAndCropCenter:
    """The centre of an :class:`ImageFile` whose short side is resized; what is cut off is not resized.

    Args:
        short: short side after resizing, in pixels.
        size: side of the crop.
    """

    def __init__(self, short, size, interpolation):
        self.short, self.size, self.interpolation = short, size, interpolation

    def __call__(self, file):
        left, top, width, height = aspect_box(*file.size)
        pixels = file.crop(left, top, width, height, min(width, height) / self.short)
        resized = [int(self.short * side / min(width, height)) for side in (height, width)]
        if self.interpolation in ("lanczos", "nearest"):
            pixels = resize(pixels, *resized, self.interpolation)
            rows, columns = (
                slice(start := round((side - self.size) / 2), start + self.size) for side in resized
            )
            return pixels[rows, columns]
        cuts = [self._cut(side, target) for side, target in zip(pixels.shape, resized)]
        (rows, skipped_rows), (columns, skipped_columns) = cuts
        factors = [target / side for side, target in zip(pixels.shape, resized)]
        pixels = _interpolate(pixels[rows, columns], self.interpolation, scale_factor=factors)
        pixels = pixels[skipped_rows:, skipped_columns:]
        return pixels[: self.size, : self.size]

    def _cut(self, side, resized):
        """What to resize of an axis of ``side`` pixels: its slice, and the results before those of the crop.

        The cut has to begin where a pixel and a result pixel begin nearly together, or the crop would be
        shifted.
        """
        scale = side / resized
        start = round((resized - self.size) / 2)
        support = math.ceil(2 / min(1, scale)) + 1  # of the bicubic filter, in result pixels
        before = range(start - support, 0, -1)
        first = next((place for place in before if abs(place * scale - round(place * scale)) < 0.04), 0)
        stop = math.ceil((start + self.size + support) * scale)
        return slice(round(first * scale), min(side, stop)), start - first


class Flip:
    """torchvision's random horizontal flip, for arrays."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, pixels):
        return cv2.flip(pixels, 1) if torch.rand(1) < self.probability else pixels


class ThroughPillow:
    """A function of a Pillow image and more, such as a transform, as a function of an array and more."""

    def __init__(self, function):
        self.function = function

    def __call__(self, pixels, *args, **kwargs):
        return np.asarray(self.function(Image.fromarray(pixels), *args, **kwargs))


def to_tensor(pixels):
    """(H, W, 3) to a tensor (3, H, W), uint8."""
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    cv2.split(pixels, list(planes))
    return torch.from_numpy(planes)


def resize(pixels, height, width, interpolation):
    """Resize with antialiasing, as Pillow does: (H, W, 3) to (height, width, 3), both uint8."""
    if interpolation in ("lanczos", "nearest"):
        mode = Image.Resampling[interpolation.upper()]
        return np.asarray(Image.fromarray(pixels).resize((width, height), mode))
    return _interpolate(pixels, interpolation, size=(height, width))


def _interpolate(pixels, interpolation, **size):
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # 1, 3, H, W
    images = functional.interpolate(images, mode=interpolation, antialias=True, **size)
    return images[0].permute(1, 2, 0).numpy()


def build_transform(config, is_train):
    """The transform of an :class:`ImageFile` to a tensor (3, S, S), uint8, S being ``DATA.IMG_SIZE``.

    It is that of transforms.py without normalisation and erasing, which are left to the device. The random
    numbers of all else are the same.
    """
    if not is_train:
        short, size, mode = evaluation_sizes(config)
        mode = interp_mode_to_str(mode)
        crop = ResizeAndCropCenter(short, size, mode) if short else ResizeWhole(size, mode)
        return transforms.Compose([crop, to_tensor])
    later = MaybeToTensor, transforms.Normalize, RandomErasing
    steps = [step for step in build_for_pillow(config, is_train).transforms if not isinstance(step, later)]
    return transforms.Compose([*map(_for_arrays, steps), to_tensor])


def _for_arrays(step):
    if isinstance(step, RandomResizedCropAndInterpolation):
        return CropResizedRandomly(step)
    if isinstance(step, transforms.Resize):
        return ResizeWhole(step.size[0], interp_mode_to_str(step.interpolation))
    if isinstance(step, transforms.RandomHorizontalFlip):
        return Flip(step.p)
    if isinstance(step, (auto_augment.RandAugment, auto_augment.AutoAugment)):
        for operation in augment_operations(step):
            function = operation.aug_fn
            operation.aug_fn = _FASTER.get(function) or ThroughPillow(function)
        return step
    return ThroughPillow(step)


def shear_x(pixels, factor, **options):
    """Shift rows by ``factor`` times their number."""
    return _warp(pixels, (1, factor, 0, 0, 1, 0), **options)


def shear_y(pixels, factor, **options):
    """Shift columns by ``factor`` times their number."""
    return _warp(pixels, (1, 0, 0, factor, 1, 0), **options)


def translate_x(pixels, share, **options):
    """Shift to the left by a share of the width."""
    return _shift(pixels, share * pixels.shape[1], 1, **options)


def translate_y(pixels, share, **options):
    """Shift upwards by a share of the height."""
    return _shift(pixels, share * pixels.shape[0], 0, **options)


def rotate(pixels, degrees, **options):
    """Rotate counterclockwise around the centre."""
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _warp(pixels, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), **options)


def _warp(pixels, matrix, fillcolor, resample):
    """Result (x, y) is taken from (a x + b y + c, d x + e y + f), corners of pixels being whole numbers."""
    a, b, c, d, e, f = matrix
    # OpenCV counts from the centres of pixels.
    matrix = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = _WARP[_chosen(resample)] | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, pixels.shape[1::-1], flags=flags, borderValue=fillcolor)


def _shift(pixels, offset, axis, fillcolor, resample):
    """Result (x) is taken from (x + offset), at a fifth of the cost of a warp."""
    whole = math.floor(offset)
    d = offset - whole
    weights = {
        Image.Resampling.NEAREST: (0, d < 0.5, d >= 0.5, 0),
        Image.Resampling.BILINEAR: (0, 1 - d, d, 0),
        # The filter of Pillow's warps, sharper than OpenCV's.
        Image.Resampling.BICUBIC: (
            -d * (1 - d) ** 2,
            1 - 2 * d**2 + d**3,
            d + d**2 - d**3,
            -(d**2) * (1 - d),
        ),
    }[_chosen(resample)]
    kernel, anchor = np.array([weights], np.float32), (1, 0)
    if axis == 0:
        kernel, anchor = kernel.T, (0, 1)
    filtered = cv2.filter2D(pixels, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    result = np.empty_like(pixels)
    result[:] = fillcolor
    from_, to = (np.moveaxis(array, axis, 0) for array in (filtered, result))
    length = len(to)
    if abs(whole) < length:
        to[max(0, -whole) : length - max(0, whole)] = from_[max(0, whole) : length - max(0, -whole)]
    return result


def _chosen(resample):
    """timm gives a filter, or some to choose from."""
    return random.choice(resample) if isinstance(resample, (list, tuple)) else resample


def sharpen(pixels, factor, **_):
    """Blend with (below 1) or away from (above 1) a smoothed image; the border stays."""
    kernel = np.full((3, 3), (1 - factor) / 13)
    kernel[1, 1] = factor + (1 - factor) * 5 / 13
    result = cv2.filter2D(pixels, -1, kernel)
    for border in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        result[border] = pixels[border]
    return result


def auto_contrast(pixels, **_):
    """Stretch every channel to 0 to 255."""
    tables = []
    for channel in cv2.split(pixels):
        low, high = cv2.minMaxLoc(channel)[:2]
        scale = 255 / max(high - low, 1)
        tables.append((np.arange(256) * scale - low * scale).clip(0, 255) if high > low else np.arange(256))
    return cv2.LUT(pixels, np.dstack(tables).astype(np.uint8))


def equalize(pixels, **_):
    """Make all values of a channel about as frequent."""
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        below = counts.cumsum() - counts
        tables.append(((below + step // 2) // step).clip(0, 255) if step else np.arange(256))
    return cv2.LUT(pixels, np.dstack(tables).astype(np.uint8))


def invert(pixels, **_):
    """255 minus every value."""
    return cv2.bitwise_not(pixels)


def solarize(pixels, thresh, **_):
    """Invert the values from ``thresh`` on."""
    values = np.arange(256)
    return cv2.LUT(pixels, np.where(values < thresh, values, 255 - values).astype(np.uint8))


def solarize_add(pixels, add, thresh=128, **_):
    """Add to the values below ``thresh``."""
    values = np.arange(256)
    return cv2.LUT(pixels, np.where(values < thresh, np.minimum(values + add, 255), values).astype(np.uint8))


def posterize(pixels, bits, **_):
    """Keep the highest bits, 0 to 8 of them."""
    return pixels & np.uint8(256 - 2 ** (8 - min(bits, 8)))


def brightness(pixels, factor, **_):
    """Multiply every value."""
    return cv2.LUT(pixels, _blend(0, factor))


def contrast(pixels, factor, **_):
    """Multiply the difference to the image's mean grey."""
    mean = cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0]
    return cv2.LUT(pixels, _blend(int(mean + 0.5), factor))


def color(pixels, factor, **_):
    """Multiply the difference of every pixel to its grey."""
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, factor, grey, 1 - factor, -0.49)  # Pillow cuts decimals off


def _blend(other, factor):
    """Every value with its difference to another one multiplied."""
    return np.clip(other + np.float32(factor) * (np.arange(256) - other), 0, 255).astype(np.uint8)


# In place of the slower ones of Pillow.
_FASTER = {
    auto_augment.auto_contrast: auto_contrast,
    auto_augment.equalize: equalize,
    auto_augment.invert: invert,
    auto_augment.solarize: solarize,
    auto_augment.solarize_add: solarize_add,
    posterize_from_0_bits: posterize,
    auto_augment.brightness: brightness,
    auto_augment.contrast: contrast,
    auto_augment.color: color,
    auto_augment.shear_x: shear_x,
    auto_augment.shear_y: shear_y,
    auto_augment.translate_x_rel: translate_x,
    auto_augment.translate_y_rel: translate_y,
    auto_augment.rotate: rotate,
    auto_augment.sharpness: sharpen,
}
