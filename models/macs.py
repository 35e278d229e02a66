"""Multiply-accumulate operations (MACs) of a model, from its sizes.

These count: the patch-embedding convolution, every linear layer, q k^T and attention times v over the tokens
of a window, a LayerNorm as one operation per element, merging of patches and messengers, final norm and head.
A multiply-accumulate is two floating-point operations.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .padding import Extent


def count_macs(model, shape):
    """The MACs of a classifier for one image of (channels, height, width), ours by :func:`classifier_macs`.

    Of other models those of their linear layers, convolutions and products of attention count.
    """
    if hasattr(model, "flops"):
        return model.flops()
    parameter = next(model.parameters())
    images = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    model.train(training)
    return counter.get_total_flops() / 2


def classifier_macs(model):
    """The MACs of an MSGTransformer for one image of the size it is made for."""
    *_, (patches, windows) = stage_sizes(model, *model.img_size)
    read = patches + windows * model.tokens + model.num_classes
    return backbone_macs(model, *model.img_size) + model.num_features * read


def backbone_macs(model, height, width):
    """The MACs of an MSGTransformer without its final norm and head, for an image of so many pixels.

    Padding does not count: patch tokens are those of the image, windows and messengers those that hold some.
    """
    sizes = stage_sizes(model, height, width)
    stages = [stage_macs(stage, *size) for stage, size in zip(model.layers, sizes)]
    return embedding_macs(model.patch_embed, sizes[0][0]) + sum(stages)


def stage_sizes(model, height, width):
    """Patch tokens and windows of every stage for an image of so many pixels: a list of pairs."""
    extent, sizes = Extent.of_images(height, width, model.patch_size), []
    for stage in model.layers:
        rows, columns = extent.windows(stage.window_size)
        sizes.append((extent.height * extent.width, rows * columns))
        extent = extent.merged()
    return sizes


def embedding_macs(embed, patches):
    """The MACs of a patch embedding that makes so many tokens."""
    normed = 0 if isinstance(embed.norm, nn.Identity) else embed.proj.out_channels
    return patches * (embed.proj.weight.numel() + normed)


def stage_macs(stage, patches, windows):
    """The MACs of a stage for so many patch tokens in so many windows, merging included."""
    dim = stage.blocks[0].norm1.weight.numel()
    messengers = windows * stage.tokens
    total = 0
    for block in stage.blocks:
        hidden = block.mlp.fc1.out_features
        total += (patches + messengers) * dim * (2 + 4 * dim + 2 * hidden)
        total += 2 * windows * (stage.window_size**2 + stage.tokens) ** 2 * dim
    if stage.downsample is not None:
        inputs = 8 if stage.downsample.kind == "linear" else 18
        total += sum(count // 4 * inputs * dim * dim + count * dim for count in (patches, messengers))
    return total
