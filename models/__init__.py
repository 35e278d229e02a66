"""The architecture (``msg_transformer.py``) and how a config or a timm name builds it (``build.py``)."""

from .build import build_model

__all__ = ["build_model"]
