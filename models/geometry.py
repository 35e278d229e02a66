"""What a classifier is made of in sizes and options, and whether it can be built."""

import itertools
import math
from dataclasses import dataclass

from timm.layers import to_2tuple

from config_rules import CHOICES

from .fast.attention_triton import triton_missing
from .tracing import image_size


@dataclass(frozen=True)
class StageSizes:
    """One stage."""

    dim: int  # channels (C)
    heads: int  # of its attention
    depth: int  # blocks
    shuffle_size: int  # windows on a side of a shuffle region (R)


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What all blocks have in common: arguments of the model, and what messengers exchange."""

    window_size: int
    mlp_ratio: float
    qkv_bias: bool
    qk_scale: float | None
    proj_drop_rate: float
    attn_drop_rate: float
    norm_layer: type
    tokens: bool
    attention: str
    exchange: object  # of messengers, a function; None for none


def plan_stages(embed_dim, depths, num_heads, shuffle_size, exchange):
    """The sizes of each stage, a list of :class:`StageSizes`, from the arguments of MSGTransformer.

    Args:
        exchange: whether messengers exchange channel groups, which the channels must allow.

    Raises:
        ValueError: what does not fit and which config key to change.
    """
    lists = {"DEPTHS": depths, "NUM_HEADS": num_heads, "SHUF_SIZE": shuffle_size}
    lengths = {key: len(values) for key, values in lists.items()}
    if not depths or len(set(lengths.values())) > 1:
        listed = ", ".join(f"MODEL.MSG.{key} {length}" for key, length in lengths.items())
        raise ValueError(f"these need one entry per stage, but their lengths are {listed}: make them equal")
    for key, values in lists.items():
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(
                f"MODEL.MSG.{key} is {list(values)}: every entry must be a positive whole number"
            )
    stages = []
    for i, (depth, heads, region) in enumerate(zip(depths, num_heads, shuffle_size)):
        dim = embed_dim * 2**i
        if dim % heads:
            raise ValueError(
                f"stage {i + 1} has {dim} channels, which MODEL.MSG.NUM_HEADS[{i}]={heads} does not divide: "
                "change it or MODEL.MSG.EMBED_DIM"
            )
        if exchange:
            check_exchange(i, dim, region, f"MODEL.MSG.SHUF_SIZE[{i}]")
        stages.append(StageSizes(dim, heads, depth, region))
    return stages


def fit_regions(shuffle_size, img_size, patch_size=4, window_size=7, embed_dim=96, exchange=True):
    """The shuffle regions of each stage for images of a size.

    Where fewer windows are left than a region has, the region is the whole side if the channels allow it;
    otherwise it stays as it is, with empty windows.

    Args:
        shuffle_size: windows on a side of a shuffle region in each stage, where there are enough.
        img_size: side of the images in pixels, or (height, width).
        patch_size, window_size, embed_dim: of the model.
        exchange: whether messengers exchange channel groups, which the channels must allow.

    Returns:
        A list like ``shuffle_size``.
    """
    fitted, grid = list(shuffle_size), patch_grid(to_2tuple(img_size), patch_size)
    for i, asked in enumerate(fitted):
        windows = max(-(-side // (2**i * window_size)) for side in grid)
        if windows < asked and not (exchange and embed_dim * 2**i % windows**2):
            fitted[i] = windows
    return fitted


def drop_path_rates(rate, depths):
    """The rates of the blocks of each stage, a list of lists: from 0 to ``rate`` in equal steps."""
    last, blocks = max(1, sum(depths) - 1), itertools.count()
    return [[rate * next(blocks) / last for _ in range(depth)] for depth in depths]


def check_exchange(i, dim, region, key):
    """Raise a ValueError if the messengers of a stage cannot exchange their channels.

    Args:
        i: number of the stage, from 0.
        dim: its channels.
        region: windows on a side of a shuffle region.
        key: config key of the region.
    """
    if dim % region**2:
        raise ValueError(
            f"the {dim} channels of stage {i + 1} cannot be split among the {region**2} windows of its "
            f"{region}x{region} shuffle region: make MODEL.MSG.EMBED_DIM a multiple of "
            f"{math.lcm(region**2, 2**i) // 2**i} or lower {key}"
        )


def patch_grid(sides, patch_size):
    """(rows, columns) of the map of patches of an image of (height, width) pixels."""
    return tuple(-(-side // patch_size) for side in sides)


def known_sides(img_size, patch_size):
    """(height, width) of images, in pixels, from one side or both; a ValueError names the config key."""
    sides = to_2tuple(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"DATA.IMG_SIZE is {img_size}: give one side or [height, width], in pixels")
    if min(sides) < patch_size:
        raise ValueError(
            f"images of {sides[0]}x{sides[1]} pixels are smaller than a patch of "
            f"{patch_size}x{patch_size}: raise DATA.IMG_SIZE or lower MODEL.MSG.PATCH_SIZE"
        )
    return sides


def known_window(window_size):
    """Tokens on a side of a window; a ValueError if that is no positive whole number."""
    if type(window_size) is not int or window_size < 1:
        raise ValueError(
            f"window_size (MODEL.MSG.WINDOW_SIZE) is {window_size!r}: windows are square and the same in "
            "every stage, give the tokens on a side as one number"
        )
    return window_size


def known_pool(global_pool, tokens):
    """What the head reads: ``token``, ``avg`` or, for no pooling, an empty string.

    Args:
        global_pool: one of these, or None for what the official models read; others are a ValueError.
        tokens: whether there are messengers.
    """
    known = (*CHOICES["MODEL.MSG.HEAD"], "") if tokens else ("avg", "")
    if global_pool is None:
        return known[0]
    if global_pool not in known:
        raise ValueError(
            f"MODEL.MSG.HEAD (global_pool) is {global_pool!r}: use {' or '.join(filter(None, known))}"
            + ("" if tokens else ", since MODEL.MSG.TOKENS is False")
        )
    return global_pool


def check_choices(manip_type, patch_embed, downsample, attention):
    """Raise a ValueError for words that an argument does not take, or attention that cannot run here."""
    words = dict(MANIP_TYPE=manip_type, PATCH_EMBED=patch_embed, DOWNSAMPLE=downsample, ATTENTION=attention)
    for key, word in words.items():
        choices = CHOICES[f"MODEL.MSG.{key}"]
        if word not in choices:
            raise ValueError(f"MODEL.MSG.{key} is {word!r}: use {' or '.join(choices)}")
    if attention == "triton" and triton_missing():
        raise ValueError(f"MODEL.MSG.ATTENTION is triton, but {triton_missing()}: use sdpa or auto")


def require_size(x, sides):
    """Images (B, in_chans, height, width) as they are; a ValueError if their sides are others."""
    x, height, width = image_size(x)
    if (height, width) != sides:
        raise ValueError(
            f"the model takes {sides[0]}x{sides[1]} images, these are {height}x{width}: resize them or set "
            "DATA.IMG_SIZE"
        )
    return x
