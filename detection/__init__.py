"""COCO detection: Cascade Mask R-CNN on an MSG-Transformer backbone."""

from .detector import load

__all__ = ["load"]
