"""Multiply-accumulate operations (MACs) of a model, from its sizes.

These count: the patch-embedding convolution, every linear layer, q k^T and attention times v over the tokens
of a window, a LayerNorm as one operation per element, merging of patches and messengers, final norm and head.
Floating-point operations, which are two for each of these, are in roofline.py.
"""

from torch import nn


def classifier_macs(model):
    """The MACs of an MSGTransformer for one image."""
    first = model.layers[0]
    total = embedding_macs(model.patch_embed, (first.windows * first.window_size) ** 2)
    for stage in model.layers:
        total += stage_macs(stage, (stage.windows * stage.window_size) ** 2, stage.windows**2)
    return total + model.num_features * (model.window_size**2 + model.tokens + model.num_classes)


def embedding_macs(embed, patches):
    """The MACs of a patch embedding that makes so many tokens."""
    normed = embed.proj.out_channels if isinstance(embed.norm, nn.LayerNorm) else 0
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
