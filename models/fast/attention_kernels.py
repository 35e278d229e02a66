"""Triton kernels for attention in small windows; attention_triton.py is their interface.

A program handles one head of many windows, one after the other: it loads the keys and values of a window as
whole tiles, padded to powers of two, then takes the window's queries in blocks of rows. A row of scores is
never split, so the softmax needs no second pass. Windows of up to 64 tokens are a single block, whose bias
stays in registers from window to window. Stages with many small windows are limited by memory traffic, and
here qkv is read once and the output written once.
"""

import torch
import triton
import triton.language as tl


def attend(qkv, bias, scale):
    """softmax(scale * q k^T + bias) v in every window: (windows, tokens, C) in the dtype of ``qkv``.

    Args:
        qkv: (windows, tokens, 3*C) in float16, bfloat16 or float32.
        bias: (heads, tokens, tokens), floating.
        scale: factor of q k^T.
    """
    qkv, bias = qkv.contiguous(), bias.contiguous()
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    grid, launch = _launch(qkv, bias)
    with torch.cuda.device_of(qkv):
        _forward[grid](qkv, bias, out, qkv.shape[0], scale, **launch)
    return out


def attend_backward(grad, qkv, bias, scale):
    """Gradients of :func:`attend`, with the probabilities computed again.

    Every program sums the bias gradient of its own windows, and the sums of all programs are added at the
    end: two calls with the same tensors give the same bits.

    Args:
        grad: gradient of the output, (windows, tokens, C).
        qkv, bias, scale: as for :func:`attend`; the first two get gradients in their shapes and dtypes.
    """
    grad, qkv, bias = grad.contiguous(), qkv.contiguous(), bias.contiguous()
    dqkv = torch.empty_like(qkv)
    grid, launch = _launch(qkv, bias)
    # Several blocks of rows add to their program's sum window by window, so it starts at zero.
    sums = torch.zeros(grid[0], *bias.shape, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _backward[grid](qkv, bias, grad, dqkv, sums, qkv.shape[0], scale, **launch)
    return dqkv, sums.sum(0).to(bias.dtype)


def _launch(qkv, bias):
    """Grid (programs per head, heads) and the compile-time arguments of both kernels."""
    windows, tokens, width = qkv.shape
    heads = bias.shape[0]
    keys = max(triton.next_power_of_2(tokens), 16)
    head_dim = width // (3 * heads)
    row_bytes = keys * qkv.element_size()
    return (triton.cdiv(windows, windows_per_program(windows, heads)), heads), dict(
        HEADS=heads,
        TOKENS=tokens,
        HEAD_DIM=head_dim,
        # Blocks of scores of 64 by 64, 32 by 128 or 16 by 256 stay in registers on Hopper.
        ROWS=min(keys, 4096 // keys),
        KEYS=keys,
        CHANNELS=max(triton.next_power_of_2(head_dim), 16),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        num_warps=min(max(row_bytes // 32, 1), 4),
        num_stages=2 if row_bytes <= 128 else 1,
    )


def windows_per_program(windows, heads):
    """How many windows share one load of the bias: up to 16, while about 1000 programs fill the GPU."""
    return min(max(windows * heads // 1024, 1), 16)


@triton.jit
def _load(start, stride, tokens, channels, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows ``tokens`` of one head, zero beyond its tokens and channels."""
    inside = (tokens < TOKENS)[:, None] & (channels < HEAD_DIM)[None, :]
    return tl.load(start + tokens[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, stride, tokens, channels, x, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The opposite of :func:`_load`."""
    inside = (tokens < TOKENS)[:, None] & (channels < HEAD_DIM)[None, :]
    pointers = start + tokens[:, None] * stride + channels[None, :]
    tl.store(pointers, x.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _load_bias(bias, rows, keys, TOKENS: tl.constexpr):
    """A block of one head's bias in float32; keys beyond the window get -inf, rows beyond it 0."""
    inside = (rows < TOKENS)[:, None] & (keys < TOKENS)[None, :]
    block = tl.load(bias + rows[:, None] * TOKENS + keys[None, :], mask=inside, other=0.0)
    return tl.where((keys < TOKENS)[None, :], block.to(tl.float32), float("-inf"))


@triton.jit
def _probabilities(q, k, bias, scale, PRECISION: tl.constexpr):
    """softmax(scale * q k^T + bias) for a block of rows, in float32."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(
    qkv,
    bias,
    out,
    windows,
    scale,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(1)
    rows, keys, channels = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    bias += head * TOKENS * TOKENS
    if TOKENS <= ROWS:
        block = _load_bias(bias, rows, keys, TOKENS)
    for window in range(tl.program_id(0), windows, tl.num_programs(0)):
        # A batch can hold more than 2**31 numbers.
        offset = tl.cast(window, tl.int64) * TOKENS * WIDTH
        q_start = qkv + 3 * offset + head * HEAD_DIM
        k = _load(q_start + WIDTH, 3 * WIDTH, keys, channels, TOKENS, HEAD_DIM)
        v = _load(q_start + 2 * WIDTH, 3 * WIDTH, keys, channels, TOKENS, HEAD_DIM)
        for first in range(0, TOKENS, ROWS):
            tokens = first + rows
            q = _load(q_start, 3 * WIDTH, tokens, channels, TOKENS, HEAD_DIM)
            if TOKENS > ROWS:
                block = _load_bias(bias, tokens, keys, TOKENS)
            p = _probabilities(q, k, block, scale, PRECISION)
            x = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            _store(out + offset + head * HEAD_DIM, WIDTH, tokens, channels, x, TOKENS, HEAD_DIM)


@triton.jit
def _backward(
    qkv,
    bias,
    grad,
    dqkv,
    sums,
    windows,
    scale,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(1)
    rows, keys, channels = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    bias += head * TOKENS * TOKENS
    sums += (tl.cast(tl.program_id(0), tl.int64) * HEADS + head) * TOKENS * TOKENS
    total = tl.zeros([ROWS, KEYS], tl.float32)
    if TOKENS <= ROWS:
        block = _load_bias(bias, rows, keys, TOKENS)
    for window in range(tl.program_id(0), windows, tl.num_programs(0)):
        offset = tl.cast(window, tl.int64) * TOKENS * WIDTH
        q_start = qkv + 3 * offset + head * HEAD_DIM
        dq_start = dqkv + 3 * offset + head * HEAD_DIM
        k = _load(q_start + WIDTH, 3 * WIDTH, keys, channels, TOKENS, HEAD_DIM)
        v = _load(q_start + 2 * WIDTH, 3 * WIDTH, keys, channels, TOKENS, HEAD_DIM)
        dk = tl.zeros([KEYS, CHANNELS], tl.float32)
        dv = tl.zeros([KEYS, CHANNELS], tl.float32)
        for first in range(0, TOKENS, ROWS):
            tokens = first + rows
            q = _load(q_start, 3 * WIDTH, tokens, channels, TOKENS, HEAD_DIM)
            dx = _load(grad + offset + head * HEAD_DIM, WIDTH, tokens, channels, TOKENS, HEAD_DIM)
            if TOKENS > ROWS:
                block = _load_bias(bias, tokens, keys, TOKENS)
            p = _probabilities(q, k, block, scale, PRECISION)
            dv += tl.dot(tl.trans(p.to(dx.dtype)), dx, input_precision=PRECISION)
            dp = tl.dot(dx, tl.trans(v), input_precision=PRECISION)
            # Rows beyond the window have dx = 0, and so dp = 0 and ds = 0.
            ds = p * (dp - tl.sum(p * dp, 1)[:, None])
            if TOKENS > ROWS:
                inside = (tokens < TOKENS)[:, None] & (keys < TOKENS)[None, :]
                pointers = sums + tokens[:, None] * TOKENS + keys[None, :]
                tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + ds, mask=inside)
            else:
                total += ds
            ds = ds.to(k.dtype)
            dq = tl.dot(ds, k, input_precision=PRECISION) * scale
            _store(dq_start, 3 * WIDTH, tokens, channels, dq, TOKENS, HEAD_DIM)
            dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        if TOKENS > ROWS:
            # The next window reads what other threads of this program may have written.
            tl.debug_barrier()
        _store(dq_start + WIDTH, 3 * WIDTH, keys, channels, dk * scale, TOKENS, HEAD_DIM)
        _store(dq_start + 2 * WIDTH, 3 * WIDTH, keys, channels, dv, TOKENS, HEAD_DIM)
    if TOKENS <= ROWS:
        inside = (rows < TOKENS)[:, None] & (keys < TOKENS)[None, :]
        tl.store(sums + rows[:, None] * TOKENS + keys[None, :], total, mask=inside)
