"""Attention inside windows: the formula, in plain operators. Faster ways to compute it: fast/attention.py.

Queries, keys and values stay where the qkv layer wrote them, and the result lies where the projection reads:

    qkv     (N, tokens, 3*heads*D), N windows; a token's queries of all heads, then its keys, then its values
    bias    (heads, tokens, tokens), query rows and key columns
    result  (N, tokens, heads*D)
"""

import torch
import torch.nn.functional as F


def eager(qkv, bias, scale, dropout=0.0):
    """Softmax(scale q k^T + bias) v; the bias may have a dimension for the windows too."""
    q, k, v = qkv_heads(qkv, bias.shape[-3])  # N, heads, tokens, D
    p = probabilities(q, k, bias, scale)  # N, heads, tokens, tokens
    x = (F.dropout(p, dropout) if dropout else p) @ v  # N, heads, tokens, D
    return x.transpose(1, 2).flatten(2)  # N, tokens, heads*D


def hide(bias, hidden):
    """A bias for each window: nobody attends to the tokens that are ``hidden``, bool (N, tokens)."""
    return bias.masked_fill(hidden[:, None, None], -torch.inf)  # N, heads, tokens, tokens


def probabilities(q, k, bias, scale):
    """Softmax(scale q k^T + bias) over the keys: (N, heads, tokens, tokens), taken in at least float32."""
    scores = torch.add(at_least_float32(bias), q @ k.transpose(-1, -2), alpha=scale)
    return scores.softmax(-1).to(q.dtype)


def at_least_float32(x):
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def qkv_heads(qkv, heads):
    """Queries, keys and values as views (N, heads, tokens, D) of (N, tokens, 3*heads*D)."""
    return (heads_of(part, heads) for part in qkv.chunk(3, dim=2))


def heads_of(x, heads):
    """A view (N, heads, tokens, D) of (N, tokens, heads*D)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
