"""What the recipe of transforms.py does to pixels, on OpenCV: arrays (H, W, 3), RGB, uint8, in and out.

The warps of RandAugment take the arguments of timm's and change pixels as Pillow does, up to rounding.
"""

import math
import random

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torch.nn import functional

_WARP = {
    Image.Resampling.NEAREST: cv2.INTER_NEAREST,
    Image.Resampling.BILINEAR: cv2.INTER_LINEAR,
    Image.Resampling.BICUBIC: cv2.INTER_CUBIC,
}


class RandomFlip:
    """torchvision's random horizontal flip, for arrays."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, pixels):
        return cv2.flip(pixels, 1) if torch.rand(1) < self.probability else pixels


class ThroughPillow:
    """Apply a function of a Pillow image, such as a transform, to an array."""

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
    if pixels.shape[:2] == (height, width):  # which would give the same pixels
        return pixels
    if interpolation in ("lanczos", "nearest"):
        mode = Image.Resampling[interpolation.upper()]
        return np.asarray(Image.fromarray(pixels).resize((width, height), mode))
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # 1, 3, H, W
    images = functional.interpolate(images, (height, width), mode=interpolation, antialias=True)
    return images[0].permute(1, 2, 0).numpy()


def shear_x(pixels, factor, **options):
    """Shift each row sideways by ``factor`` times its distance from the top."""
    return _warp(pixels, (1, factor, 0, 0, 1, 0), **options)


def shear_y(pixels, factor, **options):
    """Shift each column vertically by ``factor`` times its distance from the left."""
    return _warp(pixels, (1, 0, 0, factor, 1, 0), **options)


def translate_x_rel(pixels, share, **options):
    """Shift to the left by a fraction of the width."""
    return _warp(pixels, (1, 0, share * pixels.shape[1], 0, 1, 0), **options)


def translate_y_rel(pixels, share, **options):
    """Shift upwards by a fraction of the height."""
    return _warp(pixels, (1, 0, 0, 0, 1, share * pixels.shape[0]), **options)


def rotate(pixels, degrees, **options):
    """Rotate counterclockwise around the centre."""
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _warp(pixels, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), **options)


def _warp(pixels, matrix, fillcolor, resample):
    """Result (x, y) is taken from (a x + b y + c, d x + e y + f); pixel corners are whole numbers."""
    if isinstance(resample, (list, tuple)):  # timm passes either one filter or several to choose from
        resample = random.choice(resample)
    a, b, c, d, e, f = matrix
    # In OpenCV, pixel centres are whole numbers.
    matrix = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = _WARP[resample] | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, pixels.shape[1::-1], flags=flags, borderValue=fillcolor)


# What replaces timm's warps of the same name, which work through Pillow and are slower. Its operations on
# colours are as fast.
WARPS = (shear_x, shear_y, translate_x_rel, translate_y_rel, rotate)
FASTER = {getattr(auto_augment, function.__name__): function for function in WARPS}
