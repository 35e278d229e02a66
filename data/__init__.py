"""From a folder of images to batches: datasets, transforms, samplers, mixup, and loaders that join them."""

from .datasets import DataError
from .loaders import build_loaders

__all__ = ["DataError", "build_loaders"]
