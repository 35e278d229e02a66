"""COCO detection: Cascade Mask R-CNN on an MSG-Transformer backbone."""

from .from_checkpoint import load

__all__ = ["load"]
