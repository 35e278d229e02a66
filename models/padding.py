"""Images of any size: where tokens are stored when windows reach over the edge of an image.

A map of patch tokens is extended at the bottom and on the right to whole shuffle regions. Images of a batch
may differ in size, so that an image can have more empty space around it than its own regions need. Its
features do not depend on that:

- A *full* window holds patches of its image only.
- A *padded* window holds some. For attention alone it is filled up, with tokens that nobody attends to.
- An *empty* window is its messenger alone, one token instead of 1+w*w. It starts every stage as zeros,
  attends to itself, takes part in the exchange of its shuffle region and in the MLP like any other, and is
  zero after the stage. (An even number of blocks exchanges channel groups back to where they came from, so
  nothing is lost.)

The tokens of a stage are rows (N, T, C): those of full windows, then those of padded windows, then the
messengers of empty windows, and no others, so that linear layers and norms work on nothing else. N is 1, with
the whole batch in the rows, except where operations are recorded: there it is the number of images, so that
what is exported takes any number of them.
"""

import contextlib
import functools
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .fast.fused_block import fused_block
from .geometry import patch_grid
from .tracing import exporting, image_size, plain_sizes, unwarned_trace

KEPT = 64  # layouts that are remembered


@dataclass(frozen=True)
class Extent:
    """How much of a map (B, H, W, C) the images of a batch cover, from the top left."""

    height: int  # of the map, in tokens
    width: int
    sizes: tuple | None = None  # (rows, columns) of each image, in tokens; None where all cover the map

    @classmethod
    def of_images(cls, height, width, patch_size, sizes=None):
        """The extent of the map of a batch, from its sides and those of each image, in pixels."""
        tokens = tuple(patch_grid(sides, patch_size) for sides in sizes or ())
        whole = patch_grid((height, width), patch_size)
        return cls(*whole, tokens if any(size != whole for size in tokens) else None)

    def windows(self, window_size):
        """How many windows hold the map, vertically and horizontally."""
        return -(-self.height // window_size), -(-self.width // window_size)

    def whole(self, side):
        """Whether the images cover the map, and it consists of squares of ``side`` tokens."""
        return self.sizes is None and self.height % side == 0 and self.width % side == 0

    def merged(self):
        """The extent after patch merging."""
        sizes = self.sizes and tuple(((rows + 1) // 2, (columns + 1) // 2) for rows, columns in self.sizes)
        return Extent((self.height + 1) // 2, (self.width + 1) // 2, sizes)

    def inside(self, device):
        """Which places of a map belong to their image: bool (B, H, W, 1)."""
        rows, columns = (torch.tensor(sides, device=device)[:, None] for sides in zip(*self.sizes))
        rows = torch.arange(self.height, device=device) < rows  # B, H
        columns = torch.arange(self.width, device=device) < columns  # B, W
        return (rows[:, :, None] & columns[:, None])[..., None]


def pad_to_patches(x, patch_size, sizes=None):
    """Images (B, channels, height, width) with zeros added to whole patches, and the extent of their map."""
    x, height, width = image_size(x)
    extent = Extent.of_images(height, width, patch_size, sizes)
    missing = extent.height * patch_size - height, extent.width * patch_size - width
    return functional.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x, extent


def pad_to_even(x):
    """A map (B, H, W, C) with zeros added where a side is odd, for patch merging."""
    height, width = plain_sizes(*x.shape[1:3])
    if height % 2 == 0 and width % 2 == 0:
        return x
    return functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))


def convolve(convolution, x):
    """A convolution with a stride on maps (B, C, H, W): (B, C', H/stride, W/stride), sides rounded up.

    On the CPU, channels come last in memory, which took 0.6 of the time on an Intel Xeon. In bfloat16 on
    processors with AMX, PyTorch 2.14 gives garbage, in the result or in the gradient of the weight, for some
    maps that end as one column (oneDNN). On the CPU, such maps get columns of zeros, and the result loses
    what comes of these.
    """
    if x.device.type != "cpu" or exporting():
        return convolution(x)
    (width,) = plain_sizes(x.shape[3])
    x, stride = x.contiguous(memory_format=torch.channels_last), convolution.stride[1]
    if width > stride:
        return convolution(x)
    return convolution(functional.pad(x, (0, 2 * stride - width)))[..., :1]


def resample_positions(positions, grid_size, extent):
    """Absolute positions (1, rows*columns, C) of a grid for a map, or each image of it: (1 or B, H, W, C)."""

    def resample(height, width):
        # timm compares sizes, which are constants in a trace.
        with unwarned_trace() if torch.jit.is_tracing() else contextlib.nullcontext():
            x = resample_abs_pos_embed(positions, [height, width], list(grid_size), num_prefix_tokens=0)
        return functional.pad(
            x.unflatten(1, (height, width)), (0, 0, 0, extent.width - width, 0, extent.height - height)
        )

    if extent.sizes is None:
        return resample(extent.height, extent.width)
    return torch.cat([resample(*size) for size in extent.sizes])


class Rows(NamedTuple):
    """Where rows are taken from: their indices, and the rows that come from nowhere and are zero."""

    index: torch.Tensor | None
    blank: torch.Tensor | None

    @classmethod
    def of(cls, index, device):
        """From a numpy array of indices, with -1 for nowhere."""
        index = index.ravel()
        return cls(_moved(index.clip(min=0), device), _moved(np.flatnonzero(index < 0), device))


def _moved(array, device):
    """A numpy array on a device; None for an empty one, which OpenVINO and torch.export cannot store."""
    return torch.from_numpy(array).to(device) if array.size else None


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a stage are, for images of given sizes.

    A token of a window that no row stands for is hidden. Tensors that would be empty are None.
    """

    images: int  # that share the rows
    extent: Extent  # of their maps
    window_size: int
    regions: int  # shuffle regions of these images
    windows: int  # in a region
    has_messengers: bool
    full: int  # windows whose tokens are all patches
    padded: int  # windows with some patches
    empty: int  # windows without patches
    tokens: int  # of a window, the messenger included
    held: int  # rows of all padded windows
    rows: Rows  # each row's place in the map of patches followed by that of messengers, both flattened
    maps: Rows  # each place's row; the opposite of ``rows``
    spread: Rows  # the row of each token of the padded windows, from their first; hidden tokens are zero
    gathered: Rows  # the token of each row of the padded windows; the opposite of ``spread``
    messengers: torch.Tensor  # (regions * windows,), the row of each window's messenger
    order: torch.Tensor  # (regions * windows,), each window's number: first the full, last the empty ones
    messenger_map: Rows  # each place's window in the map of messengers, among regions * windows
    region: torch.Tensor  # each row's region
    hidden: torch.Tensor | None  # bool (padded windows, tokens)

    @classmethod
    def build(cls, images, extent, window_size, shuffle_size, has_messengers, device="cpu"):
        """The layout of a stage.

        Args:
            images: how many share the rows: the length of ``extent.sizes``, where that is given.
            extent: of the stage's maps.
            window_size, shuffle_size, has_messengers: of the stage.
            device: of the tensors.
        """
        height, width = extent.windows(window_size)
        region_rows, region_columns = -(-height // shuffle_size), -(-width // shuffle_size)
        regions, windows = images * region_rows * region_columns, shuffle_size**2

        def places(height, width, side, sizes):
            """Places of a map by windows of ``side`` tokens, as partition_windows orders them; -1 outside."""
            y = np.arange(region_rows * shuffle_size * side)[:, None]
            x = np.arange(region_columns * shuffle_size * side)
            inside = np.stack([(y < rows) & (x < columns) for rows, columns in sizes])
            place = np.arange(images)[:, None, None] * (height * width) + y * width + x
            cut = (images, region_rows, shuffle_size, side, region_columns, shuffle_size, side)
            place = np.where(inside, place, -1).reshape(cut).transpose(0, 1, 4, 2, 5, 3, 6)
            return place.reshape(regions * windows, side**2)

        sizes = extent.sizes or ((extent.height, extent.width),) * images
        tokens = places(extent.height, extent.width, window_size, sizes)
        held = (tokens >= 0).sum(1)
        full, padded = np.flatnonzero(held == window_size**2), np.flatnonzero(held % window_size**2)
        empty, of_maps = np.flatnonzero(held == 0), images * extent.height * extent.width
        in_windows = [(-(-rows // window_size), -(-columns // window_size)) for rows, columns in sizes]
        messengers = places(height, width, 1, in_windows)
        if has_messengers:
            tokens = np.concatenate([np.where(messengers < 0, -1, of_maps + messengers), tokens], axis=1)
            of_maps += images * height * width
        else:
            empty = empty[:0]

        by_row = np.concatenate([full, padded, empty])  # each window, in the order of the rows
        of_padded = tokens[padded].ravel()
        gathered = np.flatnonzero(of_padded >= 0)
        rows = np.concatenate([tokens[full].ravel(), of_padded[gathered], np.full(len(empty), -1)])
        lengths = np.concatenate(
            [(tokens[by_row[: len(full) + len(padded)]] >= 0).sum(1), np.ones_like(empty)]
        )
        order, first = np.zeros((2, regions * windows), dtype=np.int64)
        order[by_row], first[by_row] = np.arange(len(by_row)), lengths.cumsum() - lengths

        return cls(
            images=images,
            extent=extent,
            window_size=window_size,
            regions=regions,
            windows=windows,
            has_messengers=has_messengers,
            full=len(full),
            padded=len(padded),
            empty=len(empty),
            tokens=tokens.shape[1],
            held=len(gathered),
            rows=Rows.of(rows, device),
            maps=Rows.of(_inverse(rows, of_maps), device),
            spread=Rows.of(_inverse(gathered, len(of_padded)), device),
            gathered=Rows.of(gathered, device),
            messengers=_moved(first, device),
            order=_moved(order, device),
            messenger_map=Rows.of(_inverse(messengers.ravel(), images * height * width), device),
            region=_moved((by_row // windows).repeat(lengths), device),
            hidden=_moved(tokens[padded] < 0, device),
        )

    def cut(self, patches, messengers):
        """Maps to rows (N, T, C).

        Args:
            patches: (B, H, W, C).
            messengers: (B, H/w, W/w, C); (R, R, C) for the same in every region; None without messengers.
        """
        x = patches.reshape(-1, self.images * self.extent.height * self.extent.width, patches.shape[3])
        if messengers is not None:
            rows, columns = self.extent.windows(self.window_size)
            if messengers.dim() == 3:
                region = plain_sizes(*messengers.shape[:2])
                times = -(-rows // region[0]), -(-columns // region[1])
                messengers = messengers.repeat(*times, 1)[:rows, :columns]
                messengers = messengers.expand(patches.shape[0], -1, -1, -1)
            x = torch.cat([x, messengers.reshape(-1, self.images * rows * columns, x.shape[2])], dim=1)
        return _take(x, self.rows, self.maps)

    def restore(self, x):
        """Undo :meth:`cut`; what belongs to no image is zero."""
        x = _take(x, self.maps, self.rows)
        patches = self.images * self.extent.height * self.extent.width
        messengers = self._messenger_map(x[:, patches:]) if self.has_messengers else None
        return x[:, :patches].reshape(-1, self.extent.height, self.extent.width, x.shape[2]), messengers

    def restore_messengers(self, x):
        """The map of messengers (B, H/w, W/w, C) of windows (N*regions, windows, 1, C)."""
        x = x.reshape(-1, self.regions * self.windows, x.shape[3])
        return self._messenger_map(_rows_of(x, self.messenger_map))

    def _messenger_map(self, x):
        return x.reshape(-1, *self.extent.windows(self.window_size), x.shape[2])

    def read_messengers(self, x):
        """The messengers of rows (N, T, C) as windows of one token, (N*regions, windows, 1, C)."""
        return x.index_select(1, self.messengers).reshape(-1, self.windows, 1, x.shape[2])

    def attend(self, x, attention, alone, only_messengers=False):
        """Attention in every window.

        Args:
            x: rows (N, T, channels).
            attention: of windows, (windows, tokens, channels) to (windows, tokens, C), where some tokens are
                ``hidden``: bool (windows, tokens).
            alone: the same for messengers of empty windows, (N, empty, channels) to (N, empty, C).
            only_messengers: whether the result is that of the messengers alone.

        Returns:
            Rows (N, T, C), or windows of one token (N*regions, windows, 1, C).
        """
        whole = self.full * self.tokens
        of_full, of_padded, of_empty = x.split([whole, self.held, self.empty], dim=1)
        parts = []
        if self.full:
            full = attention(self._windows(of_full)).unflatten(0, (-1, self.full))  # N, full, tokens, C
            parts.append(full[:, :, 0] if only_messengers else full.flatten(1, 2))
        if self.padded:
            padded = self._windows(_take(of_padded, self.spread, self.gathered))
            hidden = self.hidden.repeat(x.shape[0], 1) if exporting() or not x.shape[0] else self.hidden
            padded = attention(padded, hidden=hidden).unflatten(0, (-1, self.padded))  # N, padded, tokens, C
            if only_messengers:
                parts.append(padded[:, :, 0])
            else:
                parts.append(_take(padded.flatten(1, 2), self.gathered, self.spread))
        if self.empty:
            parts.append(alone(of_empty))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if not only_messengers:
            return x
        return x.index_select(1, self.order).reshape(-1, self.windows, 1, x.shape[2])

    def _windows(self, x):
        """Rows of whole windows (N, n*tokens, channels) as windows (N*n, tokens, channels)."""
        return x.unflatten(1, (-1, self.tokens)).flatten(0, 1)

    def add(self, x, branch, drop_path):
        """The sum of a residual stream and a branch, whose path is dropped for whole regions."""
        if drop_path.training and drop_path.drop_prob:
            kept = drop_path(branch.new_ones(x.shape[0] * self.regions, 1))
            branch = branch * kept.unflatten(0, (-1, self.regions)).index_select(1, self.region)
        return x + branch

    def exchange(self, x, exchange):
        """Rows whose messengers have exchanged channels; x may be changed in place."""
        if exporting() or torch.compiler.is_compiling():
            return x.index_copy(1, self.messengers, self.exchanged(x, exchange))
        return _Exchange.apply(x, self, exchange)

    def exchanged(self, x, exchange):
        """The messengers (N, regions * windows, C) of rows, after an exchange (N*regions, windows, C)."""
        messengers = exchange(self.read_messengers(x)[:, :, 0])
        return messengers.reshape(-1, self.regions * self.windows, x.shape[2])


class _Exchange(torch.autograd.Function):
    """The exchange in place. Rows of patches are not copied, and gradients go through it without sums."""

    @staticmethod
    def forward(ctx, x, layout, exchange):
        ctx.mark_dirty(x)
        ctx.layout, ctx.exchange = layout, exchange
        return x.index_copy_(1, layout.messengers, layout.exchanged(x, exchange))

    @staticmethod
    def backward(ctx, grad):
        rows = grad.index_select(1, ctx.layout.messengers)
        windows = rows.reshape(-1, ctx.layout.windows, rows.shape[2])
        _, transposed = torch.func.vjp(ctx.exchange, windows)  # linear, so that any argument serves
        (exchanged,) = transposed(windows)
        return grad.index_copy(1, ctx.layout.messengers, exchanged.reshape(rows.shape)), None, None


def _take(x, rows, back):
    """Rows of x (N, S, C), each taken at most once; ``back`` is where the rows of x end up."""
    if exporting() or torch.compiler.is_compiling():
        return _rows_of(x, rows)
    return _Take.apply(x, *rows, *back)


def _rows_of(x, rows):
    x = x.index_select(1, rows.index)
    return x if rows.blank is None else x.index_fill_(1, rows.blank, 0)


class _Take(torch.autograd.Function):
    """Rows taken from x, whose gradient takes them back instead of adding them up."""

    @staticmethod
    def forward(ctx, x, index, blank, back_index, back_blank):
        ctx.save_for_backward(back_index, back_blank)
        return _rows_of(x, Rows(index, blank))

    @staticmethod
    def backward(ctx, grad):
        index, blank = ctx.saved_tensors
        return _rows_of(grad, Rows(index, blank)), None, None, None, None


def _inverse(index, count):
    """For each of ``count`` places where an array of indices names it, -1 where it does not."""
    inverse = np.full(count, -1, dtype=np.int64)
    named = np.flatnonzero(index >= 0)
    inverse[index[named]] = named
    return inverse


def attend_on_rows(attn, x, layout, only_messengers=False):
    """What a LocalAttention does to windows, done to rows (N, T, C); the result is as for Layout.attend."""
    attention = partial(attn.attention, bias=attn.bias())
    heads = layout.attend(attn.qkv(x), attention, _value, only_messengers)
    return attn.proj_drop(attn.proj(heads))


def _value(qkv):
    """What a token that attends to itself alone gets: (..., 3C) to (..., C)."""
    return qkv.chunk(3, dim=-1)[2]


def block_on_rows(block, x, layout):
    """What a Block does to windows, done to rows (N, T, C)."""
    if fused := fused_block(block, x):
        out = layout.attend(x, fused.attend, fused.attend_alone)
        return fused.mlp(layout.exchange(out, block.exchange) if block.exchange else out, x)
    attend = partial(attend_on_rows, layout=layout)
    x = layout.add(x, block.attn(block.norm1(x), attend), block.drop_path)
    if block.exchange:
        x = layout.exchange(x, block.exchange)
    return layout.add(x, block.mlp(block.norm2(x)), block.drop_path)


def block_on_messengers(block, x, layout):
    """The messengers of :func:`block_on_rows` alone, as windows of one token, (N*regions, windows, 1, C)."""
    if fused := fused_block(block, x):
        out = layout.attend(x, fused.attend, fused.attend_alone, only_messengers=True)
        return fused.mlp(block.shuffle(out), x)
    attend = partial(attend_on_rows, layout=layout, only_messengers=True)
    x = layout.read_messengers(x) + block.drop_path(block.attn(block.norm1(x), attend))
    x = block.shuffle(x)
    return x + block.drop_path(block.mlp(block.norm2(x)))


class PaddedStage(nn.Module):
    """A stage that takes maps of any size. Its subclass has ``blocks``, and a ``forward_regions``."""

    def __init__(self, window_size, shuffle_size, tokens):
        super().__init__()
        self.window_size, self.shuffle_size, self.tokens = window_size, shuffle_size, tokens
        self.grad_checkpointing = False

    def forward(self, patches, messengers, extent, only_messengers=False):
        """Apply the blocks to the windows of two maps, and return these again.

        Args:
            patches: (B, H, W, C).
            messengers: (B, H/w, W/w, C), sides rounded up; (R, R, C) for the same in every region; None
                without messengers.
            extent: of the patches, an :class:`Extent`.
            only_messengers: leave out what only patches need: they will be None.
        """
        layout = self.layout(extent, patches)
        if layout is None:
            return self.forward_regions(patches, messengers, only_messengers)
        x, each = layout.cut(patches, messengers), partial(block_on_rows, layout=layout)
        if only_messengers:
            x = self.forward_blocks(x, each, partial(block_on_messengers, layout=layout))
            return None, layout.restore_messengers(x)
        return layout.restore(self.forward_blocks(x, each, each))

    def layout(self, extent, x):
        """The :class:`Layout` of maps x (B, H, W, C), or None if they consist of whole regions."""
        if extent.whole(self.window_size * self.shuffle_size):
            return None
        recorded = exporting()
        images = 1 if extent.sizes is None and (recorded or not x.shape[0]) else x.shape[0]
        asked = images, extent, self.window_size, self.shuffle_size, self.tokens
        if recorded:  # what is made here belongs to the recording
            with unwarned_trace():
                return Layout.build(*asked, x.device)
        if torch.compiler.is_compiling():
            sizes = extent.height, extent.width, extent.sizes
            parts = _constant_parts(images, sizes, *asked[2:], str(x.device))
            return Layout(parts[0], extent, *parts[1:])
        return _layout(*asked, x.device)

    def forward_blocks(self, x, each=None, last=None):
        """Apply the blocks to tokens.

        Args:
            x: tokens, as the blocks take them.
            each: function of a block and of tokens that runs in place of the block's forward, or None.
            last: the same for the last block.
        """
        for block in self.blocks:
            instead = last if block is self.blocks[-1] else each
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, instead, use_reentrant=False)
            else:
                x = block(x, instead)
        return x


@functools.lru_cache(KEPT)
def _layout(*asked):
    with torch.inference_mode(False):  # or no training could use it
        return Layout.build(*asked)


@torch.compiler.assume_constant_result
def _constant_parts(images, sizes, *asked):
    """The fields of a layout without its extent: torch.compile takes no other objects for constants."""
    layout = _layout(images, Extent(*sizes), *asked)
    return tuple(getattr(layout, field.name) for field in fields(Layout) if field.name != "extent")
