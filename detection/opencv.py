"""DATA.BACKEND opencv for detection: what :mod:`detection.transforms` draws, done to pixels by OpenCV."""

import cv2

from data.opencv.operations import resize, to_tensor

from .transforms import Crop, Flip, Resize


def change_file(file, steps):
    """The steps done to an :class:`~data.opencv.transforms.ImageFile`: (3, H, W), uint8.

    A JPEG that shrinks to a quarter or less is decoded at a reduced size.
    """
    width, height = file.size
    rows, columns = next((step.size for step in steps if isinstance(step, Resize)), (height, width))
    pixels = file.crop(0, 0, width, height, min(height / rows, width / columns))
    for step in steps:
        pixels = _CHANGES[type(step)](pixels, step)
    return to_tensor(pixels)


def _resize(pixels, step):
    if all(new >= old for new, old in zip(step.size, pixels.shape)):
        # Nothing shrinks: antialiasing has nothing to do, and OpenCV is faster.
        return cv2.resize(pixels, step.size[::-1], interpolation=cv2.INTER_LINEAR)
    return resize(pixels, *step.size, "bilinear")


def _crop(pixels, step):
    height, width = step.size
    return pixels[step.top : step.top + height, step.left : step.left + width]


_CHANGES = {Flip: lambda pixels, step: cv2.flip(pixels, 1), Resize: _resize, Crop: _crop}
