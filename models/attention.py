"""Attention inside windows: the formula, in plain operators. Faster ways to compute it: fast/attention.py.

To try another formula, change :func:`eager` and set ``MODEL.MSG.ATTENTION`` to eager: the faster ways, which
auto takes, know this formula and its gradients.

Queries, keys and values stay where the qkv layer wrote them, and the result lies where the projection reads:

    qkv     (N, tokens, 3*heads*D), N windows; a token's queries of all heads, then its keys, then its values
    bias    (heads, tokens, tokens), query rows and key columns
    result  (N, tokens, heads*D)
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import gen_relative_position_index
from torch import nn

from .fast.fixed_weights import Fixed, are_plain


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


class RelativePositions(nn.Module):
    """The parameters of an attention bias. The subclass expands them to all pairs of tokens: ``expand_bias``.

    ``relative_position_bias_table`` has a row for each relative position of two patches, and a column for
    each head; ``rel_pos_msg`` has the scalars of the messengers, or is None.

    ``position_index`` (w*w, w*w) is the row of the table for each pair of patches. Checkpoints hold it as the
    buffer ``relative_position_index``. Nothing reads the buffer, because
    ``torch.optim.swa_utils.AveragedModel`` averages buffers, which rounds indices down.
    """

    def __init__(self, window_size, heads, tokens):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, heads))
        self.rel_pos_msg = nn.Parameter(torch.empty(heads, 2, 1, 1)) if tokens else None
        self.fixed = Fixed()
        self.set_index(window_size)

    def set_index(self, window_size):
        """Set ``position_index``, on the device of the table."""
        device = self.relative_position_bias_table.device
        with torch.device("cpu" if device.type == "meta" else device):
            self.position_index = gen_relative_position_index((window_size, window_size))
        self.register_buffer("relative_position_index", self.position_index.clone())

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.set_index(math.isqrt(len(self.position_index)))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}relative_position_index"] = self.position_index

    def bias_of_patches(self):
        """The bias of all pairs of patches: (heads, w*w, w*w), query rows and key columns."""
        table, index = self.relative_position_bias_table, self.position_index
        if index.device != table.device:  # replicas of a model move the weights and leave the index behind
            index = index.to(table.device)
        return table[index].movedim(2, 0)

    def bias(self):
        """The attention bias (heads, tokens, tokens), as it was kept if it was."""
        fixed = self.fixed.of(self.relative_position_bias_table, self.rel_pos_msg)
        return self.expand_bias() if fixed is None else fixed

    def fix_weights(self, dtype):
        """Keep the expanded bias; see :func:`models.inference`."""
        if are_plain(self.relative_position_bias_table, self.rel_pos_msg):
            bias = at_least_float32(self.expand_bias().detach())
            self.fixed.keep(bias, self.relative_position_bias_table, self.rel_pos_msg)
