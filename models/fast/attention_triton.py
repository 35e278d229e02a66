"""The kernels of attention_kernels.py as PyTorch operators, and where they can run."""

import functools
import importlib.util
import logging
import os

import torch

from utils import UserError

from ..tracing import plain_backward


def triton(qkv, bias, scale, formula):
    """The kernels for GPUs, or in Triton's interpreter; ``formula`` computes the same in plain operators."""
    head_dim = qkv.shape[2] // (3 * bias.shape[0])
    obstacle = triton_obstacle(qkv.device, qkv.dtype, qkv.shape[1], head_dim)
    if obstacle:
        raise UserError(f"MODEL.MSG.ATTENTION is triton, but {obstacle}: use sdpa or auto")
    if torch.compiler.is_compiling():
        return _triton(qkv, bias, float(scale))
    return _Triton.apply(qkv, bias, float(scale), formula)


def triton_obstacle(device, dtype, tokens, head_dim):
    """Why the ``triton`` backend cannot compute attention for tensors of this kind, or None if it can."""
    missing = triton_missing()
    if missing:
        return missing
    if device.type != "cuda" and not _interpreted():
        return f"the model is on the {device.type}, and Triton needs a GPU (or TRITON_INTERPRET=1)"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and _interpreted():
        return "Triton's interpreter multiplies the bits of bfloat16 numbers, not the numbers"
    if tokens > 256 or head_dim > 64:
        return (
            "its kernels take windows of at most 256 tokens and heads of at most 64 channels, not "
            f"{tokens} tokens and {head_dim} channels"
        )
    return None


@torch.compiler.assume_constant_result
def triton_missing():
    """Why Triton cannot run on this machine, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "Triton needs a GPU (or TRITON_INTERPRET=1), and there is none"
    if not _interpreted() and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need a GPU of the Ampere generation or newer"
    return None


@torch.compiler.assume_constant_result
def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_builds():
    """Whether kernels can be built here, which also takes a C compiler, and run; if not, the log says why."""
    try:
        qkv = torch.zeros(1, 16, 48, device="cuda", dtype=torch.bfloat16)
        _Triton.apply(qkv, torch.zeros(1, 16, 16, device="cuda"), 1.0, None)
        torch.cuda.synchronize()
    except Exception as error:  # Triton, its driver and the C compiler raise many kinds
        why = str(error).strip().splitlines() or [type(error).__name__]
        logging.getLogger("msg_transformer").warning(
            f"attention runs through PyTorch's kernels, as Triton cannot build ours here: {why[-1]}"
        )
        return False
    return True


class _Triton(torch.autograd.Function):
    """The kernels, called directly: an operator takes longer to call than they take for a few images.

    Their file, which needs Triton, is imported by the first call. Gradients of the gradients are those of the
    plain formula.
    """

    @staticmethod
    def forward(ctx, qkv, bias, scale, formula):
        from .attention_kernels import attend

        ctx.save_for_backward(qkv, bias)
        ctx.scale, ctx.formula = scale, formula
        return attend(qkv, bias, scale)

    @staticmethod
    def backward(ctx, grad):
        from .attention_kernels import attend_backward

        if plain_backward(grad):
            formula = functools.partial(ctx.formula, scale=ctx.scale)
            return *torch.func.vjp(formula, *ctx.saved_tensors)[1](grad), None, None
        return *attend_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


# The kernels are opaque to torch.compile.
@torch.library.custom_op("msg_transformer::windowed_attention", mutates_args=())
def _triton(qkv: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    from .attention_kernels import attend

    return attend(qkv, bias, scale)


@torch.library.custom_op("msg_transformer::windowed_attention_backward", mutates_args=())
def _triton_backward(
    grad: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from .attention_kernels import attend_backward

    return attend_backward(grad, qkv, bias, scale)


@_triton.register_fake
def _(qkv, bias, scale):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@_triton_backward.register_fake
def _(grad, qkv, bias, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (qkv, bias))


def _save_for_backward(ctx, inputs, output):
    qkv, bias, ctx.scale = inputs
    ctx.save_for_backward(qkv, bias)


def _gradients(ctx, grad):
    return *_triton_backward(grad, *ctx.saved_tensors, ctx.scale), None


_triton.register_autograd(_gradients, setup_context=_save_for_backward)
