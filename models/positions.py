"""Where tokens are: relative positions in a window, and absolute ones on maps of any size."""

import math

import torch
from timm.layers import gen_relative_position_index, resample_abs_pos_embed
from torch import nn
from torch.nn import functional

from .attention import at_least_float32
from .fast.fixed_weights import Fixed, are_plain


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


def resample_positions(positions, grid_size, extent):
    """Absolute positions (1, rows*columns, C) of a grid for a map, or each image of it: (1 or B, H, W, C)."""

    def resample(height, width):
        x = resample_abs_pos_embed(positions, [height, width], list(grid_size), num_prefix_tokens=0)
        return functional.pad(
            x.unflatten(1, (height, width)), (0, 0, 0, extent.width - width, 0, extent.height - height)
        )

    if extent.sizes is None:
        return resample(extent.height, extent.width)
    return torch.cat([resample(*size) for size in extent.sizes])
