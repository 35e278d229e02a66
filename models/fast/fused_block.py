"""Blocks in two passes over the tokens, for inference on CPUs with AVX-512: builds and calls fused_block.cpp.

The C++ file is compiled when :func:`models.inference` first wants it, in a few seconds, and kept beside what
PyTorch's hub downloads. Without a compiler, and for whatever the file does not compute, blocks run layer by
layer as elsewhere.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .choices import CPUINFO, chosen
from .fixed_weights import Fixed, are_plain
from .mlp import are_watched, is_fusible

logger = logging.getLogger("msg_transformer")
SOURCE = Path(__file__).with_suffix(".cpp")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")
LANES = 16  # channels, hidden channels and those of a head are multiples of it
WIDEST = 128  # columns of a panel of weights


def use_fused_block(block):
    """Give a Block of msg_transformer.py the forward of this file, and weights that can be fixed."""
    block.fixed = Fixed()
    block.forward, block.fix_weights = partial(block_forward, block), partial(_pack, block)


def block_forward(block, x, instead=None):
    """The forward of a Block, or of its messengers alone; padding.py asks for blocks on other tokens."""
    whole = type(block)
    only_messengers = instead is whole.forward_messengers
    fused = fused_block(block, x) if only_messengers or instead is None else None
    if fused is None:
        return whole.forward(block, x, instead)
    out = fused.attend(x.flatten(0, 1), queries=1 if only_messengers else None)
    return fused.mlp(block.shuffle(out.unflatten(0, x.shape[:2])), x)


def fused_block(block, x):
    """The :class:`FusedBlock` that may compute a block for tokens x, or None."""
    if "fixed" not in vars(block) or torch.compiler.is_compiling():
        return None
    fused = block.fixed.of(block.norm1.weight)
    if fused is None or x.device.type != "cpu" or not x.numel():
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    suits = fused.dtype == dtype and x.dtype in fused.functions
    return fused if suits and fused.is_current() else None


def _pack(block, dtype):
    """Keep a :class:`FusedBlock` if it gives what the block gives; see :func:`models.inference`."""
    if chosen().block != "fused" or not _is_usual(block):
        return
    if not (functions := load_library().get(dtype)):
        return
    fused = FusedBlock(block, dtype, functions)
    if _agrees(block, fused):
        block.fixed.keep(fused, block.norm1.weight)
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.fixed.keep(None, layer.weight)  # it needs no packed weight of its own


def _is_usual(block):
    """Whether a block is as msg_transformer.py built it, of sizes that suit, and nobody watches inside."""
    norms, attn, mlp = (block.norm1, block.norm2), block.attn, block.mlp
    usual = (
        all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
        and attn.backend == "auto"
        and "forward" not in vars(attn)
        and is_fusible(mlp)
        and not are_watched((*norms, attn, attn.qkv, attn.proj))
        and are_plain(*block.parameters())
        and all(parameter.device.type == "cpu" for parameter in block.parameters())
    )
    if not usual:
        return False
    sizes = attn.qkv.in_features, mlp.fc1.out_features, attn.qkv.in_features // _heads(attn)
    return not any(size % LANES for size in sizes)


def _heads(attn):
    return attn.relative_position_bias_table.shape[1]


def _agrees(block, fused):
    """Whether both give the same for one window of random tokens."""
    sizes, generator = (1, 1, fused.bias.shape[1], fused.channels), torch.Generator().manual_seed(0)
    x = torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = type(block).forward(block, x.to(block.norm1.weight.dtype)).float()
    found = fused.mlp(fused.attend(x[0])[None], x)
    scale, tolerance = expected.abs().max(), 1e-4 if fused.dtype == torch.float32 else 5e-2
    agrees = torch.allclose(found, expected, rtol=0, atol=float(tolerance * scale), equal_nan=True)
    if not agrees:
        unused = f"{SOURCE.name} is not used for {fused.channels} channels"
        logger.warning(f"{unused}, because its numbers are wrong on this machine")
    return agrees


class FusedBlock:
    """A block with its weights in float32 or packed in the dtype it computes in.

    Args:
        block: a Block.
        dtype: float32 or bfloat16.
        functions: for the dtype, of :func:`load_library`.
    """

    def __init__(self, block, dtype, functions):
        attn, mlp, heads = block.attn, block.mlp, _heads(block.attn)
        self.dtype, self.scale, self.heads, self.channels = dtype, attn.scale, heads, attn.qkv.in_features
        self.functions = functions
        self.norms = [(n.weight.float(), n.bias.float(), n.eps) for n in (block.norm1, block.norm2)]
        # The rows of a weight are sorted by head: queries, keys and values of the first one, then the next.
        by_head = [x.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2) for x in _weights(attn.qkv)]
        self.qkv = _Packed(*by_head, dtype, 3 * self.channels // heads)
        self.proj, self.fc1, self.fc2 = (
            _Packed(*_weights(layer), dtype) for layer in (attn.proj, mlp.fc1, mlp.fc2)
        )
        bias = attn.bias().float()  # heads, tokens, tokens
        self.bias, self.bias_alone = _pad_keys(bias, -torch.inf), _pad_keys(bias[:, :1, :1], -torch.inf)
        self.modules = list(block.modules())
        self.parts = [(held, dict(held)) for m in self.modules for held in (m._modules, m._parameters)]

    def is_current(self):
        """Whether the block still has its modules and parameters, and no hooks inside."""
        return not (
            are_watched(self.modules[1:])
            or any(module.training for module in self.modules)
            or any(held.get(key) is not value for held, parts in self.parts for key, value in parts.items())
        )

    def attend(self, x, hidden=None, queries=None):
        """The sum of windows x (windows, tokens, C) and their attention: float32 (windows, queries, C).

        Args:
            hidden: bool (windows, tokens), the tokens that nobody attends to, or None.
            queries: 1 for the first token of each window; None for all tokens.
        """
        windows, tokens, channels = x.shape
        queries = queries or tokens
        x = x.contiguous()
        out = x.new_empty((windows, queries, channels), dtype=torch.float32)  # not the default one
        hidden = None if hidden is None else _pad_keys(hidden, True)
        bias = self.bias if tokens == self.bias.shape[1] else self.bias_alone
        weight, shift, eps = self.norms[0]
        self.functions[x.dtype][0](
            *(_address(x), _address(out), windows, tokens, queries, channels, self.heads, eps, self.scale),
            *(_address(weight), _address(shift), *self.qkv.arguments[:2], *self.proj.arguments),
            *(_address(bias), _address(hidden), torch.get_num_threads()),
        )
        return out

    def attend_alone(self, x):
        """The same for tokens that attend to themselves alone: (N, tokens, C), float32."""
        return self.attend(x.flatten(0, 1)[:, None]).view(x.shape)

    def mlp(self, x, like):
        """The sum of tokens x, float32 (..., C), and their MLP; in float32, it is written into x.

        Args:
            like: tokens of the dtype that the result has.
        """
        x, (weight, shift, eps) = x.contiguous(), self.norms[1]
        rows, hidden = x.numel() // self.channels, self.fc1.columns
        out = x if like.dtype == x.dtype else torch.empty_like(x, dtype=like.dtype)
        self.functions[like.dtype][1](
            *(_address(x), _address(out), rows, self.channels, hidden, eps, _address(weight)),
            *(_address(shift), *self.fc1.arguments, *self.fc2.arguments, torch.get_num_threads()),
        )
        return out


def _weights(layer):
    """The weight and the bias of a linear layer, zeros for none."""
    bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    return layer.weight.detach(), bias.detach()


class _Packed:
    """A linear layer in panels of ``width`` columns, as fused_block.cpp reads it."""

    def __init__(self, weight, bias, dtype, width=None):
        self.columns, channels = weight.shape
        width = width or max(w for w in range(LANES, WIDEST + 1, LANES) if self.columns % w == 0)
        rows = 2 if dtype == torch.bfloat16 else 1  # that are neighbours
        weight = weight.to(dtype).reshape(self.columns // width, width, channels // rows, rows)
        self.weight, self.bias = weight.transpose(1, 2).contiguous(), bias.float().contiguous()
        self.arguments = _address(self.weight), _address(self.bias), width


def _pad_keys(x, value):
    """x (..., keys) with keys added to a multiple of ``LANES``."""
    return F.pad(x, (0, -x.shape[-1] % LANES), value=value).contiguous()


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _address(x):
    return None if x is None else x.data_ptr()


@functools.cache
def load_library():
    """The two functions of fused_block.cpp, by the dtype of products and by that of tokens.

    The file is compiled if it is not yet. The result is empty where that fails, and the log says why.
    """
    text = Path(CPUINFO).read_text(encoding="utf-8") if os.path.exists(CPUINFO) else ""
    flags = text.partition("flags")[2].partition("\n")[0].split()
    if not set(INSTRUCTIONS) <= set(flags):
        return {}
    has_bfloat16 = "avx512_bf16" in flags
    begin = time.monotonic()
    try:
        path, built = _build([*INSTRUCTIONS, *["avx512bf16"] * has_bfloat16])
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        logger.info(f"{SOURCE.name} cannot be used, so inference takes longer on this CPU: {error}")
        return {}
    if built:
        logger.info(f"built {path} in {time.monotonic() - begin:.0f} s, for faster inference")
    size, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    norm, layer = (pointer, pointer), (pointer, pointer, size)
    arguments = dict(
        attend=[*[pointer] * 2, *[size] * 5, *[number] * 2, *norm, *layer[:2], *layer, *[pointer] * 2, size],
        mlp=[*[pointer] * 2, *[size] * 3, number, *norm, *layer, *layer, size],
    )
    found = {}
    for dtype in (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,):
        if not library[f"can_multiply_{_name(dtype)}"]():
            continue
        found[dtype] = {}
        for tokens in {torch.float32, dtype}:
            pair = [library[f"{half}_{_name(dtype)}_{_name(tokens)}"] for half in arguments]
            for function, types in zip(pair, arguments.values()):
                function.argtypes, function.restype = types, None
            found[dtype][tokens] = pair
    return found


def _build(instructions):
    """The path of the library for a processor with these instructions, and whether this call compiled it."""
    root = Path(torch.__file__).parent / "lib"
    flags = [f"-m{name}" for name in instructions]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++17", "-O3", *flags, "-fopenmp", "-fPIC", "-shared"]
    made_of = SOURCE.read_bytes() + f"{command} {torch.__version__} {root}".encode()
    folder = Path(torch.hub.get_dir()) / "msg_transformer"
    path = folder / f"fused_block-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if path.exists():
        return path, False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:  # other processes see a whole file or none
        made = Path(work, path.name)
        libraries = [f"-L{root}", "-ltorch_cpu", "-lc10"]
        result = subprocess.run([*command, SOURCE, "-o", made, *libraries], capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line]
            raise RuntimeError(errors[0] if errors else f"{compiler[0]} failed")
        made.replace(path)
    return path, True
