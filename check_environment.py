"""Whether this Python has what everything here imports: looked up first, and said in one sentence."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# What models/ needs besides itself: of this repository, and of requirements.txt.
OURS = "checkpoint", "config", "data", "memory", "optimizer", "utils"
REQUIRED = "torch", "torchvision", "timm", "yacs", "yaml", "safetensors", "numpy"


def problem():
    """What is missing or hidden, and what to do; "" if all is there."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} has no {', '.join(missing)}: activate the environment (source "
            f".venv/bin/activate), or run {sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
        )
    for name in OURS:
        found = _file_of(name)
        if found is None or not found.is_relative_to(ROOT):
            where = f"is hidden by {found}: rename that, or" if found else "is not found:"
            return f"{name!r} of {ROOT} {where} put {ROOT} first into PYTHONPATH or sys.path"
    return ""


def _file_of(name):
    if name in sys.modules:
        path = getattr(sys.modules[name], "__file__", None)
    else:
        spec = importlib.util.find_spec(name)
        path = spec and spec.origin
    return path and Path(path).resolve()


if found := problem():
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program and Path(program).resolve().is_relative_to(ROOT):
        sys.exit(f"error: {found}")  # of a program of ours: without a traceback
    raise ImportError(found)
