"""MSG-Transformer (arXiv 2105.15168), in the order of the paper.

Attention stays inside local windows. Every window carries one messenger (MSG) token, and the messengers of a
shuffle region exchange channel groups in every block: that is the only way information crosses windows.

Shapes: B images, C channels, H rows and W columns of patch tokens, windows of w x w patch tokens, shuffle
regions of R x R windows. A stage works on windowed tokens of shape (B*regions, windows, tokens, C): regions
row-major, then the windows of a region row-major, then the messenger as token 0 of its window, then the patch
tokens of the window row-major.
"""

from dataclasses import dataclass
from itertools import islice

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import windowed_attention
from .export import exporting, replace_messengers
from .geometry import Geometry, check_choices, require_size
from .timm_interface import TimmInterface, feature_info


class PatchEmbed(nn.Module):
    """Image to patch tokens: a strided convolution, then LayerNorm.

    ``linear`` embeds non-overlapping patches (v1). ``conv`` embeds overlapping ones (CVPR 2022): a kernel of
    twice the patch size less one, 7x7 with stride 4 and padding 2 for 4x4 patches.
    """

    def __init__(self, patch_size, in_chans, embed_dim, norm, kind):
        super().__init__()
        kernel, padding = (patch_size, 0) if kind == "linear" else (2 * patch_size - 1, patch_size // 2)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel, stride=patch_size, padding=padding)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, x):
        """Embed images (B, in_chans, height, width) as (B, H, W, C)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # B, H, W, C


def partition_windows(x, window_size, shuffle_size):
    """Cut a token map into windows, grouped by shuffle region.

    Args:
        x: (B, H, W, C) with H and W multiples of ``window_size * shuffle_size``.
        window_size: tokens on a side of a window (w).
        shuffle_size: windows on a side of a shuffle region (R).

    Returns:
        (B*regions, R*R, w*w, C)
    """
    x = x.unflatten(2, (-1, shuffle_size, window_size)).unflatten(1, (-1, shuffle_size, window_size))
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # B, region rows, cols, window rows, cols, token rows, cols, C
    return x.flatten(5, 6).flatten(3, 4).flatten(0, 2)  # B*regions, R*R, w*w, C


def merge_windows(x, window_size, shuffle_size, height, width):
    """Undo :func:`partition_windows`.

    Args:
        x: (B*regions, R*R, w*w, C).
        window_size, shuffle_size: as in :func:`partition_windows`.
        height, width: H and W of the map, in tokens.

    Returns:
        (B, H, W, C)
    """
    side = window_size * shuffle_size
    x = x.unflatten(2, (window_size, window_size)).unflatten(1, (shuffle_size, shuffle_size))
    x = x.unflatten(0, (-1, height // side, width // side))
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # B, region, window and token rows, the same for columns, C
    return x.flatten(4, 6).flatten(1, 3)  # B, H, W, C


def shuffle_messengers(x):
    """Exchange channel groups between the messengers of every shuffle region (paper, section 3.2).

    With G windows in a region, the new messenger of window j is the j-th of G channel groups of every
    window's old messenger, in window order. Patch tokens stay as they are.

    Args:
        x: (B*regions, G, 1+w*w, C), the messenger first in every window; C a multiple of G. It may be changed
            in place, so that the patch tokens are not copied. The result has its shape.
    """
    groups = x[:, :, 0].unflatten(2, (x.shape[1], -1))  # B*regions, G windows, G groups, C/G
    groups = groups.transpose(1, 2)  # B*regions, G groups, G windows, C/G: group j goes to window j
    return replace_messengers(x, groups.flatten(2))  # B*regions, G, 1+w*w, C


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a model have in common.

    Args:
        window_size, mlp_ratio, qkv_bias, qk_scale, drop_rate, tokens, attention: of :class:`MSGTransformer`.
        shuffle: whether messengers exchange channel groups.
    """

    window_size: int
    mlp_ratio: float
    qkv_bias: bool
    qk_scale: float | None
    drop_rate: float
    tokens: bool
    shuffle: bool
    attention: str


def relative_position_index(window_size):
    """Row of the relative position table for every (query, key) pair of patch tokens: (w*w, w*w) int64.

    The row of a pair is (dy + w - 1) * (2w - 1) + (dx + w - 1), with dy and dx the query's position minus the
    key's.
    """
    y, x = torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window_size - 1) * (2 * window_size - 1) + (dx + window_size - 1)


class LocalAttention(nn.Module):
    """Multi-head self-attention over the tokens of each window, with a learned bias per head (section 3.1).

    Patch to patch, the bias is looked up by relative position; the messenger has two scalars per head:
    ``rel_pos_msg[head, 1]`` where it is the query (itself as key included), ``rel_pos_msg[head, 0]`` where it
    is the key of a patch.
    """

    def __init__(self, dim, heads, options):
        super().__init__()
        self.backend, self.fixed_bias = options.attention, None
        self.scale = options.qk_scale or (dim // heads) ** -0.5
        offsets = (2 * options.window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
        self.rel_pos_msg = nn.Parameter(torch.empty(heads, 2, 1, 1)) if options.tokens else None
        self.register_buffer("relative_position_index", relative_position_index(options.window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=options.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(options.drop_rate)
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        if options.tokens:
            trunc_normal_(self.rel_pos_msg, std=0.02)

    def bias(self):
        """The additive attention bias: (heads, tokens, tokens), query rows and key columns."""
        bias = self.relative_position_bias_table[self.relative_position_index]  # w*w, w*w, heads
        bias = bias.movedim(2, 0)  # heads, w*w, w*w
        if self.rel_pos_msg is None:
            return bias
        patches = bias.shape[1]
        from_patch = self.rel_pos_msg[:, 0].expand(-1, patches, 1)  # heads, w*w, 1
        from_messenger = self.rel_pos_msg[:, 1].expand(-1, 1, 1 + patches)  # heads, 1, 1+w*w
        of_patches = torch.cat([from_patch, bias], dim=2)  # heads, w*w, 1+w*w
        return torch.cat([from_messenger, of_patches], dim=1)  # heads, 1+w*w, 1+w*w

    def fix_weights(self, dtype):
        """Keep the expanded bias, or none for None; see :func:`models.inference`."""
        self.fixed_bias = self.bias().detach() if dtype else None

    def forward(self, x, read=None, padding=None):
        """Attend within windows: (B*regions, windows, tokens, C) to the same shape, or to ``read`` tokens.

        Args:
            padding: windows and tokens in them that nobody attends to, see :func:`windowed_attention`.
        """
        bias = self.bias() if self.fixed_bias is None or exporting() else self.fixed_bias
        qkv = self.qkv(x.flatten(0, 1))  # B*regions*windows, tokens, 3*C
        heads = windowed_attention(qkv, bias, self.scale, self.backend, padding)  # the same, but C channels
        out = self.proj_drop(self.proj(heads[:, :read]))  # B*regions*windows, tokens or read, C
        return out.unflatten(0, (-1, x.shape[1]))  # B*regions, windows, tokens or read, C


class Block(nn.Module):
    """One MSG-Transformer block: local attention, messenger shuffle, MLP, the branches with drop path.

    The shuffle stands between the two residual branches and acts on the residual stream itself.
    """

    def __init__(self, dim, heads, drop_path, options):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LocalAttention(dim, heads, options)
        self.shuffle = options.shuffle
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * options.mlp_ratio), drop=options.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, read=None, padding=None):
        """Apply the block: (B*regions, windows, tokens, C) to the same shape, or to ``read`` tokens."""
        x = x[:, :, :read] + self.drop_path(self.attn(self.norm1(x), read, padding))
        if self.shuffle:
            x = shuffle_messengers(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Halve the sides of a token map and double its channels.

    ``linear`` (v1): the 2x2 neighbours are concatenated in the order (0,0), (1,0), (0,1), (1,1), row offset
    first, then LayerNorm and a linear layer without bias. ``conv`` (CVPR 2022): a 3x3 convolution of stride
    2, then LayerNorm.
    """

    def __init__(self, dim, kind):
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
            self.norm = nn.LayerNorm(4 * dim)
        else:
            self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
            self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        """Merge a map: (B, H, W, C) to (B, H/2, W/2, 2C)."""
        if self.kind == "conv":
            return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B, H/2, row offset, W/2, column offset, C
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # B, H/2, W/2, 4C: column offset, row offset, C
        return self.reduction(self.norm(x))  # B, H/2, W/2, 2C


class Stage(nn.Module):
    """Blocks at one resolution, then patch merging unless it is the last stage.

    Args:
        sizes: a :class:`~models.geometry.StageSizes`.
        drop_path: a rate for each block.
        options: of the blocks.
        downsample: kind of merging, or None for the last stage.
        next_shuffle_size: windows on a side of a shuffle region in the next stage.
    """

    def __init__(self, sizes, drop_path, options, downsample=None, next_shuffle_size=None):
        super().__init__()
        self.windows, self.window_size, self.tokens = sizes.windows, options.window_size, options.tokens
        self.shuffle_size, self.next_shuffle_size = sizes.shuffle_size, next_shuffle_size
        self.blocks = nn.ModuleList(Block(sizes.dim, sizes.heads, rate, options) for rate in drop_path)
        self.downsample = PatchMerging(sizes.dim, downsample) if downsample else None
        self.grad_checkpointing = False

    def forward_blocks(self, x, read=None, padding=None):
        """Apply the blocks: (B*regions, windows, tokens, C) to the same shape, or to ``read`` tokens."""
        for block in self.blocks:
            wanted = read if block is self.blocks[-1] else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, wanted, padding, use_reentrant=False)
            else:
                x = block(x, wanted, padding)
        return x

    def patch_map(self, x, rows, cols):
        """The patch tokens of windowed tokens, as a map: (B, H, W, C) of rows x cols windows."""
        patches = x[:, :, 1:] if self.tokens else x  # B*regions, windows, w*w, C
        height, width = rows * self.window_size, cols * self.window_size
        return merge_windows(patches, self.window_size, self.shuffle_size, height, width)

    def merge(self, x, rows, cols):
        """Merge patches, and messengers as their own image, alike; then cut the next stage's windows.

        Args:
            x: windowed tokens.
            rows, cols: windows of the whole map, H/w and W/w.
        """
        patches = self.downsample(self.patch_map(x, rows, cols))  # B, H/2, W/2, 2C
        patches = partition_windows(patches, self.window_size, self.next_shuffle_size)
        if not self.tokens:
            return patches
        messengers = merge_windows(x[:, :, :1], 1, self.shuffle_size, rows, cols)  # B, H/w, W/w, C
        messengers = self.downsample(messengers)  # B, H/2w, W/2w, 2C
        messengers = partition_windows(messengers, 1, self.next_shuffle_size)
        return torch.cat([messengers, patches], dim=2)  # B*regions, windows, 1+w*w, 2C

    def forward(self, x, rows, cols, read=None):
        """Blocks, then merging: windowed tokens of this stage to those of the next.

        Args:
            x, rows, cols: as for :meth:`merge`.
            read: how many tokens of a window are read after the last stage; None for all.
        """
        if self.downsample is None:
            return self.forward_blocks(x, read)
        return self.merge(self.forward_blocks(x), rows, cols)


class MSGTransformer(TimmInterface, nn.Module):
    """MSG-Transformer classifier.

    Args:
        img_size: side of the square images, in pixels; must be
            ``patch_size * window_size * 2**(stages - 1)``, so that the last stage is one window.
        patch_size: side of a patch, in pixels.
        in_chans: image channels.
        num_classes: outputs of the linear head; 0 for none.
        embed_dim: channels of the first stage (C); they double in every stage.
        depths: blocks of each stage; its length is the number of stages.
        num_heads: attention heads of each stage.
        window_size: tokens on a side of a window (w).
        mlp_ratio: hidden channels of the MLP over C.
        qkv_bias: whether the qkv linear has a bias.
        qk_scale: factor of q k^T; None for (C/heads)^-0.5.
        drop_rate: dropout after the embedding, the attention projection and both MLP layers.
        drop_path_rate: stochastic depth, growing linearly from 0 to this rate over all blocks.
        ape: add a learned absolute position embedding to the patches.
        patch_norm: LayerNorm after the patch embedding.
        shuffle_size: windows on a side of a shuffle region in each stage (R), or all where fewer are left.
        manip_type: ``shuf`` exchanges messengers in every block, ``none`` keeps them without exchange.
        tokens: False removes the messengers: plain local windows, classified by the mean of the final tokens.
        patch_embed, downsample: ``linear`` (v1) or ``conv`` (CVPR 2022).
        attention: how attention is computed, see ``attention.py``; the result does not depend on it.

    Raises:
        ValueError: a combination that cannot be built; the message names the config key to change.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=4,
        in_chans=3,
        num_classes=1000,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        drop_rate=0.0,
        drop_path_rate=0.1,
        ape=False,
        patch_norm=True,
        shuffle_size=(4, 4, 2, 1),
        manip_type="shuf",
        tokens=True,
        patch_embed="linear",
        downsample="linear",
        attention="auto",
    ):
        super().__init__()
        shuffle = tokens and manip_type == "shuf"
        sizes = Geometry(img_size, patch_size, embed_dim, depths, num_heads, window_size, shuffle_size)
        stages = sizes.stages(shuffle)
        check_choices(manip_type, patch_embed, downsample, attention)
        options = BlockOptions(
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop_rate=drop_rate,
            tokens=tokens,
            shuffle=shuffle,
            attention=attention,
        )
        self.img_size, self.window_size = img_size, window_size
        self.shuffle_size = [stage.shuffle_size for stage in stages]
        self.num_classes, self.tokens = num_classes, tokens
        self.num_features = self.head_hidden_size = stages[-1].dim
        self.feature_info = feature_info(stages, patch_size)
        patches, windows = (img_size // patch_size) ** 2, self.shuffle_size[0] ** 2

        self.absolute_pos_embed = nn.Parameter(torch.empty(1, patches, embed_dim)) if ape else None
        self.msg_tokens = nn.Parameter(torch.empty(1, windows, 1, embed_dim)) if tokens else None
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_norm, patch_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        last = max(1, sum(depths) - 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depths))])
        self.layers = nn.ModuleList()
        for stage, following in zip(stages, [*stages[1:], None]):
            merging = (downsample, following.shuffle_size) if following else ()
            self.layers.append(Stage(stage, list(islice(rates, stage.depth)), options, *merging))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for parameter in (self.msg_tokens, self.absolute_pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        self.apply(self.init_linear)

    @staticmethod
    def init_linear(module):
        """Truncated normal of std 0.02 for a linear layer's weight, 0 for its bias; nothing else."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, x):
        """Images (B, in_chans, height, width) to the first stage's tokens (B*regions, windows, 1+w*w, C)."""
        x = self.patch_embed(x)  # B, H, W, C
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.unflatten(1, x.shape[1:3])
        side = self.window_size * self.shuffle_size[0]
        # Asked for before the windows are cut: of windows, ONNX takes the number for a constant.
        regions = x.shape[0] * (x.shape[1] // side) * (x.shape[2] // side)
        x = self.pos_drop(x)
        x = partition_windows(x, self.window_size, self.shuffle_size[0])  # B*regions, windows, w*w, C
        if self.msg_tokens is None:
            return x
        messengers = self.msg_tokens.expand(regions, -1, -1, -1)  # B*regions, windows, 1, C
        return torch.cat([messengers, x], dim=2)  # B*regions, windows, 1+w*w, C

    def forward_features(self, x, read=None):
        """Images (B, in_chans, S, S) to normed tokens of the last window (B, 1+w*w, C), messenger first.

        Args:
            read: leave out the tokens after the first ``read``: most of the last block's work.

        Raises:
            ValueError: images of another size than the model was built for.
        """
        x = self.embed(require_size(x, self.img_size))  # B*regions, windows, 1+w*w, C
        for stage in self.layers:
            x = stage(x, stage.windows, stage.windows, read)
        return self.norm(x.squeeze(1))  # B, 1+w*w or read, 8C

    def forward_head(self, x, pre_logits=False):
        """Tokens of the last window (B, 1+w*w, C) to logits (B, num_classes), or to the messenger (B, C)."""
        x = x[:, 0] if self.tokens else x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        """Images (B, in_chans, S, S) to logits (B, num_classes)."""
        # The head reads the messenger alone.
        return self.forward_head(self.forward_features(x, read=1 if self.tokens else None))
