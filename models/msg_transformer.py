"""MSG-Transformer (arXiv 2105.15168), in the order of the paper.

Attention stays inside local windows. Every window carries one messenger (MSG) token, and the messengers of a
shuffle region exchange channel groups in every block: that is the only way information crosses windows.

Shapes: B images, C channels, H rows and W columns of patch tokens, windows of w x w patch tokens, shuffle
regions of R x R windows. A stage works on windowed tokens of shape (B*regions, windows, tokens, C): regions
row-major, then the windows of a region row-major, then the messenger as token 0 of its window, then the patch
tokens of the window row-major.
"""

import math

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import nn

from . import geometry
from .attention import RelativePositions
from .exchange import OTHER_EXCHANGES
from .fast.attention import windowed_attention
from .padding import PaddedStage, convolve, pad_to_even, pad_to_patches, resample_positions
from .timm_interface import TimmInterface, feature_info
from .tracing import count_squares, plain_sizes, replace_messengers, replaceable, split_sides


class PatchEmbed(nn.Module):
    """Image to patch tokens: a strided convolution, then LayerNorm.

    ``linear`` embeds non-overlapping patches (v1). ``conv`` embeds overlapping ones (CVPR 2022): a kernel of
    twice the patch size less one, 7x7 with stride 4 and padding 2 for 4x4 patches.
    """

    def __init__(self, patch_size, in_chans, embed_dim, norm_layer, kind):
        super().__init__()
        kernel, padding = (patch_size, 0) if kind == "linear" else (2 * patch_size - 1, patch_size // 2)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel, stride=patch_size, padding=padding)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x):
        """Embed images (B, in_chans, height, width) as (B, H, W, C)."""
        return self.norm(convolve(self.proj, x).permute(0, 2, 3, 1))  # B, H, W, C


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
    """Undo :func:`partition_windows`: (B*regions, R*R, w*w, C) to (B, height, width, C)."""
    side = window_size * shuffle_size
    x = x.unflatten(2, (window_size, window_size)).unflatten(1, (shuffle_size, shuffle_size))
    x = x.unflatten(0, (-1, height // side, width // side))
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # B, region, window and token rows, the same for columns, C
    return x.flatten(4, 6).flatten(1, 3)  # B, H, W, C


class Block(nn.Module):
    """One MSG-Transformer block: local attention, messenger shuffle, MLP (linear, exact GELU, linear).

    The shuffle stands between the two residual branches and acts on the residual stream itself.
    """

    def __init__(self, dim, heads, drop_path, options):
        super().__init__()
        self.norm1 = options.norm_layer(dim)
        self.attn = LocalAttention(dim, heads, options)
        self.exchange = options.exchange
        self.norm2 = options.norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * options.mlp_ratio), drop=options.proj_drop_rate)
        self.drop_path = DropPath(drop_path)

    @replaceable
    def forward(self, x):
        """Apply the block: (B*regions, windows, tokens, C) to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.shuffle(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def shuffle(self, x):
        """Let the messengers of every shuffle region exchange channels."""
        return replace_messengers(x, self.exchange(x[:, :, 0])) if self.exchange else x

    def forward_messengers(self, x):
        """The messengers of :meth:`forward` alone, (B*regions, windows, 1, C): all that the head may need."""
        x = x[:, :, :1] + self.drop_path(self.attn(self.norm1(x), LocalAttention.forward_messengers))
        x = self.shuffle(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LocalAttention(RelativePositions):
    """Multi-head self-attention over the tokens of each window, with a learned bias per head (section 3.1).

    Patch to patch, the bias is looked up by relative position, query minus key. The messenger has two scalars
    per head: ``rel_pos_msg[head, 1]`` where it is the query (itself as key included) and
    ``rel_pos_msg[head, 0]`` where it is the key of a patch.
    """

    def __init__(self, dim, heads, options):
        super().__init__(options.window_size, heads, options.tokens)
        self.backend, self.attn_drop_rate = options.attention, options.attn_drop_rate
        self.scale = options.qk_scale or (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=options.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(options.proj_drop_rate)
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        if options.tokens:
            trunc_normal_(self.rel_pos_msg, std=0.02)

    def expand_bias(self):
        """The additive bias of all pairs of tokens: (heads, tokens, tokens), query rows and key columns."""
        bias = self.bias_of_patches()  # heads, w*w, w*w
        if self.rel_pos_msg is None:
            return bias
        patches = bias.shape[1]
        from_patch = self.rel_pos_msg[:, 0].expand(-1, patches, 1)  # heads, w*w, 1
        from_messenger = self.rel_pos_msg[:, 1].expand(-1, 1, 1 + patches)  # heads, 1, 1+w*w
        of_patches = torch.cat([from_patch, bias], dim=2)  # heads, w*w, 1+w*w
        return torch.cat([from_messenger, of_patches], dim=1)  # heads, 1+w*w, 1+w*w

    def attention(self, qkv, bias, hidden=None):
        """Softmax(scale q k^T + bias) v, without ``hidden`` keys: (N, tokens, 3C) to (N, tokens, C)."""
        dropout = self.attn_drop_rate if self.training else 0.0
        return windowed_attention(qkv, bias, self.scale, self.backend, hidden, dropout)

    @replaceable
    def forward(self, x):
        """Attend within windows: (B*regions, windows, tokens, C) to the same shape."""
        heads = self.attention(self.qkv(x).flatten(0, 1), self.bias())  # B*regions*windows, tokens, C
        return self.proj_drop(self.proj(heads)).unflatten(0, (-1, x.shape[1]))

    def forward_messengers(self, x):
        """What :meth:`forward` gives to the messengers alone: (B*regions, windows, 1, C)."""
        heads = self.attention(self.qkv(x).flatten(0, 1), self.bias())[:, :1]  # B*regions*windows, 1, C
        return self.proj_drop(self.proj(heads)).unflatten(0, (-1, x.shape[1]))


def shuffle_messengers(messengers):
    """Exchange channel groups between the messengers of every shuffle region (paper, section 3.2).

    With G windows in a region, the new messenger of window j is the j-th of G channel groups of every
    window's old messenger, in window order.

    Args:
        messengers: (B*regions, G, C), with C a multiple of G. The result has its shape.
    """
    groups = messengers.unflatten(2, (messengers.shape[1], -1))  # B*regions, G windows, G groups, C/G
    groups = groups.transpose(1, 2)  # B*regions, G groups, G windows, C/G: group j goes to window j
    return groups.flatten(2)  # B*regions, G, C


class PatchMerging(nn.Module):
    """Halve the sides of a token map and double its channels.

    ``linear`` (v1): the 2x2 neighbours are concatenated in the order (0,0), (1,0), (0,1), (1,1), row offset
    first, then LayerNorm and a linear layer without bias. ``conv`` (CVPR 2022): a 3x3 convolution of stride
    2, then LayerNorm.
    """

    def __init__(self, dim, kind, norm_layer):
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
            self.norm = norm_layer(4 * dim)
        else:
            self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
            self.norm = norm_layer(2 * dim)

    def forward(self, x):
        """Merge a map: (B, H, W, C) to (B, H/2, W/2, 2C), sides rounded up."""
        x = pad_to_even(x)
        if self.kind == "conv":
            return self.norm(convolve(self.reduction, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = split_sides(x, 2)  # B, H/2, row offset, W/2, column offset, C
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # B, H/2, W/2, 4C: column offset, row offset, C
        return self.reduction(self.norm(x))  # B, H/2, W/2, 2C


class Stage(PaddedStage):
    """Blocks at one resolution, and the patch merging after them unless it is the last stage.

    Args:
        sizes, options: a StageSizes and the BlockOptions of geometry.py.
        drop_path: a rate for each block.
        downsample: kind of merging, or None for the last stage.
    """

    def __init__(self, sizes, drop_path, options, downsample=None):
        super().__init__(options.window_size, sizes.shuffle_size, options.tokens)
        self.blocks = nn.ModuleList(Block(sizes.dim, sizes.heads, rate, options) for rate in drop_path)
        self.downsample = PatchMerging(sizes.dim, downsample, options.norm_layer) if downsample else None

    def forward_regions(self, patches, messengers, only_messengers=False):
        """Apply the blocks to maps of whole shuffle regions; arguments as for :meth:`forward`."""
        window, region = self.window_size, self.shuffle_size
        height, width = plain_sizes(*patches.shape[1:3])
        regions = count_squares(patches, window * region)
        x = partition_windows(patches, window, region)  # B*regions, windows, w*w, C
        if self.tokens:  # the messenger comes first in its window
            shared = messengers.dim() == 3  # by all regions
            first = partition_windows(messengers[None] if shared else messengers, 1, region)
            first = first.expand(regions, -1, -1, -1) if shared else first  # B*regions, windows, 1, C
            x = torch.cat([first, x], dim=2)  # B*regions, windows, 1+w*w, C
        x = self.forward_blocks(x, last=Block.forward_messengers if only_messengers else None)
        if self.tokens:
            messengers = merge_windows(x[:, :, :1], 1, region, height // window, width // window)
        if only_messengers:
            return None, messengers
        patches = x[:, :, 1:] if self.tokens else x  # B*regions, windows, w*w, C
        return merge_windows(patches, window, region, height, width), messengers


class MSGTransformer(TimmInterface, nn.Module):
    """MSG-Transformer classifier.

    Args:
        img_size: side of the images it is made for, in pixels, or (height, width). It takes others too.
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
        drop_rate: dropout after the embedding.
        proj_drop_rate: dropout after the attention projection and both MLP layers; None for ``drop_rate``.
        attn_drop_rate: dropout of attention probabilities.
        drop_path_rate: stochastic depth, growing linearly from 0 to this rate over all blocks.
        ape: add a learned absolute position embedding to the patches.
        patch_norm: LayerNorm after the patch embedding.
        shuffle_size: windows on a side of a shuffle region in each stage (R); see ``geometry.fit_regions``.
        manip_type: ``shuf`` exchanges messengers in every block, ``none`` does not; others: exchange.py.
        tokens: False removes the messengers: plain local windows.
        patch_embed, downsample: ``linear`` (v1) or ``conv`` (CVPR 2022).
        attention: how attention is computed, see ``fast/attention.py``; the result does not depend on it.
        norm_layer: class of the norms.
        global_pool: what the head reads of the last stage: ``token``, the mean of its messengers; ``avg``, of
            its patch tokens; an empty string, all of these. None for token, or avg without messengers.
        strict_img_size: refuse images of other sizes.

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
        global_pool=None,
        proj_drop_rate=None,
        attn_drop_rate=0.0,
        norm_layer=nn.LayerNorm,
        strict_img_size=False,
    ):
        super().__init__()
        geometry.check_choices(manip_type, patch_embed, downsample, attention)
        exchange = dict(OTHER_EXCHANGES, shuf=shuffle_messengers)[manip_type] if tokens else None
        stages = geometry.plan_stages(embed_dim, depths, num_heads, shuffle_size, exchange is not None)
        options = geometry.BlockOptions(
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            proj_drop_rate=drop_rate if proj_drop_rate is None else proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            norm_layer=norm_layer,
            tokens=tokens,
            attention=attention,
            exchange=exchange,
        )
        self.img_size, self.strict_img_size = geometry.known_sides(img_size, patch_size), strict_img_size
        self.grid_size = geometry.patch_grid(self.img_size, patch_size)
        self.patch_size, self.shuffle_size = patch_size, list(shuffle_size)
        self.num_classes, self.tokens = num_classes, tokens
        self.global_pool = geometry.known_pool(global_pool, tokens)
        self.num_features = self.head_hidden_size = stages[-1].dim
        self.feature_info = feature_info(stages, patch_size)

        patches, windows = math.prod(self.grid_size), shuffle_size[0] ** 2
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, patches, embed_dim)) if ape else None
        self.msg_tokens = nn.Parameter(torch.empty(1, windows, 1, embed_dim)) if tokens else None
        norm = norm_layer if patch_norm else None
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm, patch_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList()
        for sizes, rates in zip(stages, geometry.drop_path_rates(drop_path_rate, depths)):
            self.layers.append(Stage(sizes, rates, options, downsample if sizes is not stages[-1] else None))
        self.norm = norm_layer(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for parameter in (self.msg_tokens, self.absolute_pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        self.apply(self.init_linear)

    def forward_stages(self, x, sizes=None, count=None, only_messengers=False):
        """Patches and messengers after the blocks of every stage.

        Args:
            x: images (B, in_chans, height, width), zero outside of each image.
            sizes: (height, width) in pixels of each image, which is at the top left; None where all fill x.
            count: how many stages; None for all.
            only_messengers: leave out what only the patches of the last stage need: they will be None.

        Returns:
            Pairs of patches (B, H, W, C) and messengers (B, H/w, W/w, C) or None: sides rounded up, zero
            outside of each image.
        """
        if self.strict_img_size:
            x = geometry.require_size(x, self.img_size)
        x, extent = pad_to_patches(x, self.patch_size, sizes)
        x = self.patch_embed(x)  # B, H, W, C
        if self.absolute_pos_embed is not None:
            x = x + resample_positions(self.absolute_pos_embed, self.grid_size, extent)
        patches, messengers, maps = self.pos_drop(x), None, []
        if self.tokens:
            # A copy, because counters of operations take no view of a parameter where gradients are off.
            messengers = self.msg_tokens.clone().view(*[self.shuffle_size[0]] * 2, -1)  # R, R, C
        for stage in self.layers[:count]:
            last = stage is self.layers[-1]
            patches, messengers = stage(patches, messengers, extent, only_messengers and last)
            maps.append((patches, messengers))
            if stage.downsample is not None and len(maps) != count:
                patches, extent = stage.downsample(patches), extent.merged()
                messengers = stage.downsample(messengers) if self.tokens else None  # in the same way
        return maps

    def forward_features(self, x):
        """Images (B, in_chans, height, width) to the last stage's tokens.

        Returns:
            With ``global_pool`` token (B, 1+H*W, C): the mean of the last stage's messengers, then its patch
            tokens; else its map of patches (B, H, W, C). Normed.
        """
        return self.read_features(*self.forward_stages(x)[-1])

    def read_features(self, patches, messengers):
        """What the head reads of the last stage's maps: see :meth:`forward_features`."""
        if self.global_pool != "token":
            return self.norm(patches)
        return torch.cat([self.pool(messengers), self.norm(patches.flatten(1, 2))], dim=1)

    def pool(self, messengers):
        """The mean of the last stage's normed messengers: (B, rows, columns, C) to (B, 1, C)."""
        return self.norm(messengers.flatten(1, 2)).mean(1, keepdim=True)

    def forward_head(self, x, pre_logits=False):
        """What :meth:`forward_features` gives to logits (B, num_classes), or to what is pooled (B, C)."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x.mean(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def forward(self, x):
        """Images (B, in_chans, height, width) to logits (B, num_classes)."""
        if self.global_pool != "token":
            return self.forward_head(self.forward_features(x))
        _, messengers = self.forward_stages(x, only_messengers=True)[-1]
        return self.forward_head(self.pool(messengers))
