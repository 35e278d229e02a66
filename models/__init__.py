"""The architecture (``msg_transformer.py``), how a config (``build.py``) or a timm name (``timm_names.py``)
builds it, how it comes back from a checkpoint (``from_checkpoint.py``), what makes it fast (``fast/``) and
what computes in its place (``deploy/``)."""

from pathlib import Path

try:
    from utils import check_environment
except ImportError as error:  # there is none, or another project's
    root = Path(__path__[0]).resolve().parent
    where = f"is hidden by {error.path}: rename that, or" if error.path else "is not found:"
    raise ImportError(f"'utils' of {root} {where} put {root} first into PYTHONPATH or sys.path") from error
else:
    check_environment()

from . import timm_names
from .build import build_model
from .deploy.runtime import build_runtime
from .fast.apex import choose_layer_norm
from .fast.compiled import compile_model
from .fast.cpu import use_onednn
from .fast.fixed_weights import inference
from .from_checkpoint import load
from .macs import count_macs

__all__ = [
    "build_model",
    "build_runtime",
    "choose_layer_norm",
    "compile_model",
    "count_macs",
    "inference",
    "load",
    "timm_names",
    "use_onednn",
]
