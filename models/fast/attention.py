"""Faster ways to compute attention inside windows, with the tensors and the result of ../attention.py.

``eager`` is the formula, ``sdpa`` is PyTorch's scaled_dot_product_attention, ``blocked`` is the formula for
the CPU, a few windows at a time, and ``triton`` are the kernels of attention_kernels.py for GPUs, which never
store the matrix of probabilities. :func:`windowed_attention` chooses among them. In inference with ``auto``,
whole blocks may take fused_block.py instead.
"""

import torch
import torch.nn.functional as F

from ..attention import eager, heads_of, hide, probabilities, qkv_heads
from ..tracing import exporting, plain_backward
from .attention_triton import triton, triton_builds, triton_obstacle
from .choices import chosen

BACKENDS = ("auto", "eager", "sdpa", "blocked", "triton")
BLOCK = 2**22  # bytes, in float32, of the scores that are computed at a time: they stay in the cache


def copied_heads(qkv, heads):
    """As :func:`qkv_heads`, but one copy in bfloat16: products would copy each, and transpose the keys."""
    if qkv.dtype != torch.bfloat16:
        return qkv_heads(qkv, heads)
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()


def sdpa(qkv, bias, scale):
    """PyTorch's fused attention."""
    q, k, v = qkv_heads(qkv, bias.shape[-3])
    # With a mask of four dimensions the CPU takes its fused kernel, where the bias needs no gradient.
    mask = bias.to(q.dtype)
    x = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if mask.dim() == 4 else mask[None], scale=scale
    )
    return x.transpose(1, 2).flatten(2)


def blocked(qkv, bias, scale, hidden=None):
    """The formulas for a block of windows at a time, whose scores never leave the cache.

    Args:
        hidden: bool (N, tokens), the tokens that nobody attends to, or None.
    """
    if _needs_gradients(qkv, bias):
        return _Blocked.apply(qkv, bias, scale, hidden)
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    for of_block, part, result in _blocks(bias, hidden, qkv, out):
        q, k, v = copied_heads(part, bias.shape[0])
        heads_of(result, bias.shape[0]).copy_(probabilities(q, k, of_block, scale) @ v)
    return out


def _needs_gradients(qkv, bias):
    return torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad)


def _blocks(bias, hidden, *tensors):
    """Blocks of windows, with the bias of each: bias, a part of every tensor."""
    windows = max(1, BLOCK // (4 * bias.numel()))
    parts = zip(*(tensor.split(windows) for tensor in tensors))
    if hidden is None:
        return ((bias, *part) for part in parts)
    return ((hide(bias, of_block), *part) for of_block, part in zip(hidden.split(windows), parts))


class _Blocked(torch.autograd.Function):
    """As :func:`blocked`, with its gradients; only the probabilities are stored.

    Gradients of these gradients are those of the plain formula.
    """

    @staticmethod
    def forward(ctx, qkv, bias, scale, hidden):
        windows, tokens, channels = qkv.shape
        heads = bias.shape[0]
        out = qkv.new_empty(windows, tokens, channels // 3)
        stored = qkv.new_empty(windows, heads, tokens, tokens)
        for of_block, part, result, p in _blocks(bias, hidden, qkv, out, stored):
            q, k, v = copied_heads(part, heads)
            p.copy_(probabilities(q, k, of_block, scale))
            heads_of(result, heads).copy_(p @ v)
        ctx.save_for_backward(qkv, bias, hidden, stored)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, bias, hidden, stored = ctx.saved_tensors
        if plain_backward(grad):

            def formula(qkv, bias):
                return eager(qkv, bias if hidden is None else hide(bias, hidden), ctx.scale)

            return *torch.func.vjp(formula, qkv, bias)[1](grad), None, None
        heads = stored.shape[1]
        grad_qkv = torch.empty_like(qkv)
        wide = torch.promote_types(bias.dtype, torch.float32)
        grad_bias = torch.zeros(stored.shape[1:], dtype=wide, device=qkv.device)
        for _, part, grad_part, p, grad_out in _blocks(grad_bias, None, qkv, grad_qkv, stored, grad):
            (q, k, v), (grad_q, grad_k, grad_v) = copied_heads(part, heads), qkv_heads(grad_part, heads)
            grad_out = heads_of(grad_out, heads)
            grad_v.copy_(p.transpose(-1, -2) @ grad_out)
            grad_p = grad_out @ v.transpose(-1, -2)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_bias += grad_scores.sum(0, dtype=wide)
            grad_scores *= ctx.scale
            grad_q.copy_(grad_scores @ k)
            grad_k.copy_(grad_scores.transpose(-1, -2) @ q)
        return grad_qkv, grad_bias.to(bias.dtype), None, None


def windowed_attention(qkv, bias, scale, backend="auto", hidden=None, dropout=0.0):
    """Softmax(scale q k^T + bias) v for every window and head.

    Args:
        qkv, bias: as in ../attention.py; the bias in any floating dtype.
        scale: factor of q k^T.
        backend: one of ``BACKENDS``; ``auto`` leaves it to :func:`choose_backend`. Exports get ``eager``.
        hidden: bool (N, tokens), the tokens that nobody attends to, not all of a window; or None.
        dropout: of the probabilities; they take ``eager``.

    Returns:
        (N, tokens, heads*D) in the dtype of qkv.

    Raises:
        UserError: ``triton`` cannot run for these tensors; the message says why.
    """
    if exporting() or dropout:
        backend = "eager"
    elif backend == "auto":
        backend = choose_backend(qkv, bias)
    if backend == "blocked":
        return blocked(qkv, bias, scale, hidden)
    if hidden is not None:
        bias = hide(bias, hidden)
        backend = "sdpa" if backend == "triton" else backend  # the kernels have one bias for all windows
    if backend == "eager":
        return eager(qkv, bias, scale, dropout)
    return sdpa(qkv, bias, scale) if backend == "sdpa" else triton(qkv, bias, scale, eager)


def choose_backend(qkv, bias):
    """The fastest backend that is known to be right for these queries, keys and values, and this bias.

    On the CPU that depends on the processor, but a compiler fuses the plain formula. On a GPU the kernels of
    ``triton`` take a quarter to a third of the time of ``sdpa`` in half precision, where they can run.
    """
    if qkv.device.type == "cpu":
        if torch.compiler.is_compiling():
            return "eager"
        if _needs_gradients(qkv, bias):
            return chosen().attention_gradients
        return chosen().attention_bfloat16 if qkv.dtype == torch.bfloat16 else chosen().attention_float32
    if qkv.device.type != "cuda" or qkv.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    if triton_obstacle(qkv.device, qkv.dtype, qkv.shape[1], qkv.shape[2] // (3 * bias.shape[-3])):
        return "sdpa"
    # A compiler builds kernels too, so that it would have failed before.
    return "triton" if torch.compiler.is_compiling() or triton_builds() else "sdpa"
