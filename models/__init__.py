"""The architecture (``msg_transformer.py``), how a config (``build.py``) or a timm name (``timm_names.py``)
builds it, and what makes it fast or says how fast it could be."""

from . import timm_names
from .apex import choose_layer_norm
from .build import build_model
from .compiled import compile_model
from .cpu import use_onednn
from .fixed_weights import inference

__all__ = ["build_model", "choose_layer_norm", "compile_model", "inference", "timm_names", "use_onednn"]
