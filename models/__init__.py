"""The architecture (``msg_transformer.py``), how a config or a timm name builds it (``build.py``), and what
makes it fast or says how fast it could be."""

from .build import build_model
from .cpu import use_onednn
from .fixed_weights import inference

__all__ = ["build_model", "inference", "use_onednn"]
