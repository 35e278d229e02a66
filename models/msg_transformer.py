"""MSG-Transformer (arXiv 2105.15168), in the order in which the paper tells it.

Attention stays inside local windows. Every window carries one messenger (MSG) token, and the messengers of a
shuffle region exchange channel groups in every block: that is the only way information crosses windows.

Shapes: B images, C channels, H rows and W columns of patch tokens. A stage works on windowed tokens of shape
(B*regions, windows, tokens, C): regions row-major, then the windows of a region row-major, then the messenger
as token 0 of its window, then the patch tokens of the window row-major.
"""

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import BACKENDS, windowed_attention
from .attention_triton import triton_missing
from .export import exporting, image_size, replace_messengers


def partition_windows(x, window, region):
    """Cut a token map into windows, grouped by shuffle region.

    Args:
        x: (B, H, W, C) with H and W multiples of ``window * region``.
        window: tokens on a side of a window.
        region: windows on a side of a shuffle region.

    Returns:
        (B*regions, region*region, window*window, C)
    """
    x = x.unflatten(2, (-1, region, window)).unflatten(1, (-1, region, window))
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # B, region rows, cols, window rows, cols, token rows, cols, C
    return x.flatten(5, 6).flatten(3, 4).flatten(0, 2)


def merge_windows(x, window, region, height, width):
    """Undo :func:`partition_windows`.

    Args:
        x: (B*regions, region*region, window*window, C).
        window, region: as in :func:`partition_windows`.
        height, width: H and W of the map, in tokens.

    Returns:
        (B, H, W, C)
    """
    rows, cols = height // (region * window), width // (region * window)
    x = x.unflatten(2, (window, window)).unflatten(1, (region, region)).unflatten(0, (-1, rows, cols))
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # B, region, window and token rows, the same for columns, C
    return x.flatten(4, 6).flatten(1, 3)


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


def relative_position_index(window):
    """Row of the relative position table for every (query, key) pair of patch tokens: (w*w, w*w) int64.

    The row of a pair is (dy + w - 1) * (2w - 1) + (dx + w - 1), with dy and dx the query's position minus the
    key's.
    """
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window - 1) * (2 * window - 1) + (dx + window - 1)


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
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class LocalAttention(nn.Module):
    """Multi-head self-attention over the tokens of each window, with a learned bias per head (paper, section
    3.1).

    Patch to patch, the bias is looked up by relative position; the messenger has two scalars per head:
    ``rel_pos_msg[head, 1]`` where it is the query (itself as key included), ``rel_pos_msg[head, 0]`` where it
    is the key of a patch.
    """

    def __init__(self, dim, window, heads, qkv_bias, qk_scale, drop, tokens, attention="auto"):
        super().__init__()
        self.backend, self.fixed_bias = attention, None
        self.scale = qk_scale or (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.rel_pos_msg = nn.Parameter(torch.empty(heads, 2, 1, 1)) if tokens else None
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        if tokens:
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
        return torch.cat([from_messenger, torch.cat([from_patch, bias], dim=2)], dim=1)

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
        heads = windowed_attention(qkv, bias, self.scale, self.backend, padding)  # as qkv, but C channels
        return self.proj_drop(self.proj(heads[:, :read])).unflatten(0, (-1, x.shape[1]))


class Block(nn.Module):
    """One MSG-Transformer block: local attention, messenger shuffle, MLP, the branches with drop path.

    The shuffle stands between the two residual branches and acts on the residual stream itself.
    """

    def __init__(
        self,
        dim,
        window,
        heads,
        mlp_ratio,
        qkv_bias,
        qk_scale,
        drop,
        drop_path,
        tokens,
        shuffle,
        attention="auto",
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LocalAttention(dim, window, heads, qkv_bias, qk_scale, drop, tokens, attention)
        self.shuffle = shuffle and tokens
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
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
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # B, H/2, W/2, (column offset, row offset, C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks at one resolution, then patch merging unless it is the last stage.

    Args:
        side: patch tokens on a side of this stage's map, for images of the model's own size.
        region, next_region: windows on a side of a shuffle region, here and in the next stage.
        drop_path: a rate for each block; there are as many blocks as rates.
        downsample: kind of merging, or None for the last stage.
        block_args: what else a :class:`Block` takes.
    """

    def __init__(self, dim, side, window, region, next_region, drop_path, tokens, downsample, **block_args):
        super().__init__()
        self.side, self.window, self.tokens = side, window, tokens
        self.region, self.next_region = region, next_region
        self.blocks = nn.ModuleList(
            Block(dim, window, drop_path=rate, tokens=tokens, **block_args) for rate in drop_path
        )
        self.downsample = PatchMerging(dim, downsample) if downsample else None
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
        patches = x[:, :, 1:] if self.tokens else x
        return merge_windows(patches, self.window, self.region, rows * self.window, cols * self.window)

    def merge(self, x, rows, cols):
        """Merge patches, and messengers as their own image, alike; then cut the next stage's windows.

        Args:
            x: windowed tokens.
            rows, cols: windows of the whole map, H/w and W/w.
        """
        patches = self.downsample(self.patch_map(x, rows, cols))
        patches = partition_windows(patches, self.window, self.next_region)
        if not self.tokens:
            return patches
        messengers = merge_windows(x[:, :, :1], 1, self.region, rows, cols)  # B, H/w, W/w, C
        messengers = self.downsample(messengers)
        return torch.cat([partition_windows(messengers, 1, self.next_region), patches], dim=2)

    def flops(self, patches, windows):
        """Multiply-accumulate operations for so many patch tokens in so many windows, merging included."""
        dim = self.blocks[0].norm1.weight.numel()
        messengers = windows * self.tokens
        total = 0
        for block in self.blocks:
            hidden = block.mlp.fc1.out_features
            total += (patches + messengers) * dim * (2 + 4 * dim + 2 * hidden)
            total += 2 * windows * (self.window**2 + self.tokens) ** 2 * dim
        if self.downsample is not None:
            inputs = 8 if self.downsample.kind == "linear" else 18
            total += sum(count // 4 * inputs * dim * dim + count * dim for count in (patches, messengers))
        return total

    def forward(self, x, rows, cols, read=None):
        """Blocks, then merging: windowed tokens of this stage to those of the next.

        Args:
            x, rows, cols: as for :meth:`merge`.
            read: how many tokens of a window anybody reads behind the last stage; None for all.
        """
        if self.downsample is None:
            return self.forward_blocks(x, read)
        return self.merge(self.forward_blocks(x), rows, cols)


class MSGTransformer(nn.Module):
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
        shuffle_size: windows on a side of a shuffle region in each stage (R). The whole side
            where fewer are left.
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
        regions = check_geometry(
            img_size, patch_size, embed_dim, depths, num_heads, window_size, shuffle_size, tokens, manip_type
        )
        for key, value, known in (
            ("MANIP_TYPE", manip_type, ("shuf", "none")),
            ("PATCH_EMBED", patch_embed, ("linear", "conv")),
            ("DOWNSAMPLE", downsample, ("linear", "conv")),
            ("ATTENTION", attention, BACKENDS),
        ):
            if value not in known:
                raise ValueError(f"MODEL.MSG.{key} is {value!r}: use {' or '.join(known)}")
        if attention == "triton" and triton_missing():
            raise ValueError(f"MODEL.MSG.ATTENTION is triton, but {triton_missing()}: use sdpa or auto")
        self.img_size, self.window_size, self.regions = img_size, window_size, regions
        self.num_classes, self.tokens = num_classes, tokens
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info = [
            dict(num_chs=embed_dim * 2**i, reduction=patch_size * 2**i, module=f"layers.{i}")
            for i in range(len(depths))
        ]
        side = img_size // patch_size

        self.absolute_pos_embed = nn.Parameter(torch.empty(1, side * side, embed_dim)) if ape else None
        self.msg_tokens = nn.Parameter(torch.empty(1, regions[0] ** 2, 1, embed_dim)) if tokens else None
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_norm, patch_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        blocks = sum(depths)
        rates = iter([drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)])
        self.layers = nn.ModuleList(
            Stage(
                dim=embed_dim * 2**i,
                side=side // 2**i,
                window=window_size,
                region=regions[i],
                next_region=regions[i + 1] if i + 1 < len(depths) else None,
                drop_path=[next(rates) for _ in range(depths[i])],
                tokens=tokens,
                downsample=downsample if i + 1 < len(depths) else None,
                heads=num_heads[i],
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                shuffle=manip_type == "shuf",
                attention=attention,
            )
            for i in range(len(depths))
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for parameter in (self.msg_tokens, self.absolute_pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        self.apply(init_linear)

    def embed(self, x):
        """Images (B, in_chans, height, width) to the first stage's tokens (B*regions, windows, 1+w*w, C)."""
        x = self.patch_embed(x)  # B, H, W, C
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.unflatten(1, x.shape[1:3])
        side = self.window_size * self.regions[0]
        # Asked for before the windows are cut: of windows, ONNX takes the number for a constant.
        regions = x.shape[0] * (x.shape[1] // side) * (x.shape[2] // side)
        x = partition_windows(
            self.pos_drop(x), self.window_size, self.regions[0]
        )  # B*regions, windows, w*w, C
        if self.msg_tokens is None:
            return x
        messengers = self.msg_tokens.expand(regions, -1, -1, -1)
        return torch.cat([messengers, x], dim=2)

    def forward_features(self, x, read=None):
        """Images (B, in_chans, S, S) to normed tokens of the last window (B, 1+w*w, C), messenger first.

        Args:
            read: leave out the tokens behind the first ``read``: most of the last block's work.

        Raises:
            ValueError: images of another size than the model was built for.
        """
        x, height, width = image_size(x)
        if (height, width) != (self.img_size, self.img_size):
            raise ValueError(
                f"the model takes {self.img_size}x{self.img_size} images, these are "
                f"{height}x{width}: resize them or set DATA.IMG_SIZE"
            )
        x = self.embed(x)
        for stage in self.layers:
            windows = stage.side // stage.window
            x = stage(x, windows, windows, read)
        return self.norm(x.squeeze(1))

    def forward_head(self, x, pre_logits=False):
        """Tokens of the last window (B, 1+w*w, C) to logits (B, num_classes), or to the messenger (B, C)."""
        x = x[:, 0] if self.tokens else x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        """Images (B, in_chans, S, S) to logits (B, num_classes)."""
        # The head reads the messenger alone.
        return self.forward_head(self.forward_features(x, read=1 if self.tokens else None))

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """Patch maps of chosen stages, before merging (timm's interface).

        Args:
            x: images (B, in_chans, height, width); with ``intermediates_only`` and without ``ape`` the sides
                may be any multiples of the model's size.
            indices: stages to return: a list, the last n for an int, all for None.
            norm: apply the final norm to the last stage's map.
            stop_early: accepted for timm; the stages behind the last chosen one never run with
                intermediates_only.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: leave out the final tokens.

        Returns:
            The list of maps, or (final tokens, list of maps).

        Raises:
            ValueError: an image size, format or stage that there is not.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}: use NCHW or NHWC")
        (x, height, width), size = image_size(x), self.img_size
        larger = (height, width) != (size, size)
        for_maps = intermediates_only and self.absolute_pos_embed is None
        if height % size or width % size or (larger and not for_maps):
            raise ValueError(
                f"images of {height}x{width}: use {size}x{size}, or for maps alone, without absolute "
                "positions, multiples of that"
            )
        chosen = stage_indices(indices, len(self.layers))
        scale_y, scale_x = height // size, width // size
        x, maps = self.embed(x), []
        for i, stage in enumerate(self.layers):
            windows = stage.side // stage.window
            rows, cols = scale_y * windows, scale_x * windows
            x = stage.forward_blocks(x)
            if i in chosen:
                y = stage.patch_map(x, rows, cols)
                y = self.norm(y) if norm and i + 1 == len(self.feature_info) else y
                maps.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
            if intermediates_only and i == max(chosen):
                break
            x = stage.merge(x, rows, cols) if stage.downsample is not None else x
        return maps if intermediates_only else (self.norm(x.squeeze(1)), maps)

    def __prepare_scriptable__(self):
        """What ``torch.jit.script`` asks first.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the model cannot be scripted: use torch.jit.trace or torch.export")

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Drop what :meth:`forward_intermediates` does not need for ``indices`` (timm's interface)."""
        chosen = stage_indices(indices, len(self.layers))
        self.layers = self.layers[: max(chosen) + 1]
        self.layers[-1].downsample = None
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def get_classifier(self):
        """The linear head."""
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        """Replace the head by a fresh one of ``num_classes`` outputs, 0 for none.

        Raises:
            ValueError: ``global_pool`` asks for a pooling that this model does not have.
        """
        if global_pool not in (None, "", "token" if self.tokens else "avg"):
            raise ValueError(
                f"global_pool {global_pool!r}: this model only has {'token' if self.tokens else 'avg'}"
            )
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear(head)
        self.head = head.to(weight.device, weight.dtype)

    def set_grad_checkpointing(self, enable=True):
        """Recompute every block in the backward pass instead of storing its activations."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse=False):
        """Patterns that group parameters by depth, for layer-wise learning rates (timm's interface)."""
        stem = r"^(?:absolute_pos_embed|msg_tokens|patch_embed)"
        if coarse:
            return dict(stem=stem, blocks=r"^layers\.(\d+)")
        return dict(
            stem=stem,
            blocks=[
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^layers\.(\d+)\.downsample", (99998,)),
                (r"^norm", (99999,)),
            ],
        )

    def no_weight_decay(self):
        """Names of the parameters that weight decay must leave alone, beside biases and 1-d ones (recipe)."""
        kinds = ("msg_tokens", "absolute_pos_embed", "relative_position_bias_table", "rel_pos_msg")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def flops(self):
        """Multiply-accumulate operations for one image.

        These count: the patch-embedding convolution, every linear layer, q k^T and attention times v over the
        tokens of a window, a LayerNorm as one operation per element, merging of patches and messengers, final
        norm and head.
        """
        side = self.layers[0].side
        dim = self.layers[0].blocks[0].norm1.weight.numel()
        total = side * side * self.patch_embed.proj.weight.numel()
        total += side * side * dim if isinstance(self.patch_embed.norm, nn.LayerNorm) else 0
        total += sum(stage.flops(stage.side**2, (stage.side // stage.window) ** 2) for stage in self.layers)
        return total + self.num_features * (self.window_size**2 + self.tokens + self.num_classes)


def init_linear(module):
    """Truncated normal of std 0.02 for a linear layer's weight, 0 for its bias; other modules as they are."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stage_indices(indices, stages):
    """Numbers of the chosen stages, from None (all), an int (the last n) or a list, -1 for the last stage."""
    if indices is None:
        return list(range(stages))
    if isinstance(indices, int):
        indices = range(stages - indices, stages)
    chosen = [i + stages if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < stages for i in chosen):
        raise ValueError(f"stage indices {list(indices)}: the model has stages 0 to {stages - 1}")
    return chosen


def check_geometry(
    img_size,
    patch_size,
    embed_dim,
    depths,
    num_heads,
    window_size,
    shuffle_size,
    tokens,
    manip_type,
):
    """Check that a classifier of these sizes can be built.

    Returns:
        Windows on a side of a shuffle region in each stage, after clipping to the windows that are left.

    Raises:
        ValueError: what does not fit and which config key to change.
    """
    stages = len(depths)
    lengths = {"DEPTHS": stages, "NUM_HEADS": len(num_heads), "SHUF_SIZE": len(shuffle_size)}
    if not stages or len(set(lengths.values())) > 1:
        listed = ", ".join(f"MODEL.MSG.{key} {length}" for key, length in lengths.items())
        raise ValueError(f"these need one entry per stage, but their lengths are {listed}: make them equal")
    for key, values in (("DEPTHS", depths), ("NUM_HEADS", num_heads), ("SHUF_SIZE", shuffle_size)):
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(
                f"MODEL.MSG.{key} is {list(values)}: every entry must be a positive whole number"
            )
    fitting = patch_size * window_size * 2 ** (stages - 1)
    if img_size != fitting:
        raise ValueError(
            f"DATA.IMG_SIZE is {img_size}, but MODEL.MSG.PATCH_SIZE {patch_size}, WINDOW_SIZE {window_size} "
            f"and {stages} stages need {fitting}, so that the last stage is one window: change one of them"
        )
    regions = []
    for i, (heads, region) in enumerate(zip(num_heads, shuffle_size)):
        dim, windows = embed_dim * 2**i, 2 ** (stages - 1 - i)
        region = min(region, windows)
        if windows % region:
            raise ValueError(
                f"stage {i + 1} has {windows}x{windows} windows, which MODEL.MSG.SHUF_SIZE[{i}]={region} "
                "does not divide: use a power of two"
            )
        if dim % heads:
            raise ValueError(
                f"stage {i + 1} has {dim} channels, which MODEL.MSG.NUM_HEADS[{i}]={heads} does not divide: "
                "change it or MODEL.MSG.EMBED_DIM"
            )
        if tokens and manip_type == "shuf" and dim % region**2:
            raise ValueError(
                f"the {dim} channels of stage {i + 1} cannot be split among the {region**2} windows of its "
                f"{region}x{region} shuffle region: make MODEL.MSG.EMBED_DIM a multiple of "
                f"{region**2 // 2**i or 1} or lower MODEL.MSG.SHUF_SIZE[{i}]"
            )
        regions.append(region)
    return regions
