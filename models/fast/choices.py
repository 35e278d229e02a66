"""Which library computes what on a CPU, by processor.

The table holds what was measured. Nothing is timed at run time, so the same machine always gives the same
bits. ``python tools/benchmark.py --choices`` measures the alternatives on the machine at hand.
"""

import contextlib
import functools
import platform
import re
from typing import NamedTuple

import torch


class Choices(NamedTuple):
    """What computes: ``onednn`` or ``pytorch`` for linear layers, and for attention one of its backends."""

    linear: str  # in float32, forward and for the gradient of its input; with onednn, inference packs weights
    weight_gradient: str  # of linear layers in float32
    gelu: str  # after a linear layer that needs no gradient; onednn fuses it into the layer
    compiled: str  # linear layers under torch.compile; measured by benchmark.py with <name>:compile
    attention_float32: str  # without gradients
    attention_bfloat16: str
    attention_gradients: str  # in training, in both dtypes
    block: str  # in inference: fused (fused_block.py) or layers
    runtime: str  # pytorch or openvino, for RUNTIME auto; measured by benchmark.py with <name>:openvino


# Where nothing was measured.
PYTORCH = Choices("pytorch", "pytorch", "pytorch", "pytorch", "sdpa", "sdpa", "sdpa", "layers", "pytorch")

# By vendor and the widest instruction set. benchmarks/README.md has the figures: of single operations for AMD
# without AVX-512, of these and of blocks for Intel with AMX, of whole models for AMD with AVX-512.
_OURS = Choices("onednn", "pytorch", "onednn", "onednn", "blocked", "sdpa", "blocked", "layers", "openvino")
MEASURED = {
    ("AuthenticAMD", "avx2"): _OURS._replace(gelu="pytorch", compiled="pytorch"),
    ("AuthenticAMD", "avx512f"): _OURS._replace(weight_gradient="onednn", attention_bfloat16="blocked"),
    ("GenuineIntel", "amx_bf16"): _OURS._replace(attention_float32="sdpa", block="fused", runtime="pytorch"),
}


CPUINFO = "/proc/cpuinfo"  # on Linux


@functools.cache
def processor():
    """The vendor and the widest instruction set of this machine, as in :data:`MEASURED`; "" for unknown."""
    text = platform.processor()
    with contextlib.suppress(OSError), open(CPUINFO, encoding="utf-8") as file:
        text = file.read()
    vendor = re.search("AuthenticAMD|GenuineIntel", text)
    widest = dict(AVX2="avx2", AVX512="avx512f").get(torch.backends.cpu.get_cpu_capability(), "")
    return vendor[0] if vendor else "", "amx_bf16" if " amx_bf16" in text else widest


def has_onednn():
    """Whether this PyTorch has oneDNN's linear layer for x86 and may use it."""
    known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.compiler.assume_constant_result
def chosen():
    """The :class:`Choices` for this machine, a constant for torch.compile."""
    return MEASURED.get(processor(), PYTORCH) if has_onednn() else PYTORCH


def describe():
    """The processor and what is chosen for it, as text for the log and for checkpoints."""
    names = " ".join(filter(None, processor())) or "unknown processor"
    return f"{names}: {', '.join(f'{name} {value}' for name, value in chosen()._asdict().items())}"
