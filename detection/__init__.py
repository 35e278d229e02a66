"""COCO detection: Cascade Mask R-CNN on an MSG-Transformer backbone."""

from .ready import load

__all__ = ["load"]
