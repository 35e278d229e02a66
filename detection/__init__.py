"""COCO detection: Cascade Mask R-CNN on an MSG-Transformer backbone."""
