"""MSG-Transformer as a backbone: feature maps of images of any size.

Padding, in one place. Each stage pads its map at the bottom and on the right to whole shuffle regions, and
crops it afterwards. Images of a batch differ in size, so that an image may be surrounded by more padding than
its own regions need. Its features do not depend on that:

- Padded tokens are never attended to, and are zero where patch merging or the next layer could see them.
- A window without a token of its image is empty. Its messenger starts every stage as zeros, attends to itself
  alone, takes part in the exchange of its shuffle region like any other, and is dropped after the stage.
  (An even number of blocks exchanges channel groups back to where they came from, so nothing is lost.)
- A region that is larger than the map holds empty windows; it is not made smaller. So the maps are those of
  the classifier where the map of every stage consists of whole regions of the classifier's own sizes.
"""

import torch
from torch import nn
from torch.nn import functional

from models.macs import embedding_macs, stage_macs
from models.msg_transformer import merge_windows, partition_windows


class MSGBackbone(nn.Module):
    """The patch maps of every stage, each through a LayerNorm of its own: strides 4, 8, 16, 32.

    Args:
        model: an MSGTransformer, whose final norm and head are dropped.
        shuffle_size: windows on a side of a shuffle region, for each stage.
        frozen_stages: how many stages do not train; the patch embedding belongs to the first.

    Raises:
        ValueError: shuffle regions that cannot exchange channels, or a model with absolute positions.
    """

    def __init__(self, model, shuffle_size, frozen_stages=0):
        super().__init__()
        if model.absolute_pos_embed is not None:
            raise ValueError("MODEL.MSG.APE is for images of one size: switch it off for detection")
        if len(shuffle_size) != len(model.layers):
            raise ValueError(
                f"DET.SHUF_SIZE {list(shuffle_size)} needs an entry for each stage: {len(model.layers)}"
            )
        model.norm, model.head = nn.Identity(), nn.Identity()
        self.model, self.frozen_stages = model, frozen_stages
        self.channels = [info["num_chs"] for info in model.feature_info]
        for i, (stage, channels) in enumerate(zip(model.layers, self.channels)):
            stage.shuffle_size = shuffle_size[i]
            windows = stage.shuffle_size**2
            if channels % windows and any(block.shuffle for block in stage.blocks):
                raise ValueError(
                    f"the {channels} channels of stage {i + 1} cannot be split among the {windows} windows "
                    f"of a shuffle region: change DET.SHUF_SIZE[{i}]={stage.shuffle_size}"
                )
        if model.tokens and model.msg_tokens.shape[1] != shuffle_size[0] ** 2:
            raise ValueError(
                f"DET.SHUF_SIZE[0] is {shuffle_size[0]}, but there are messengers for "
                f"{model.msg_tokens.shape[1]} windows: make it MODEL.MSG.SHUF_SIZE[0]"
            )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
        for part in self._frozen():
            part.requires_grad_(False)

    def _frozen(self):
        if self.frozen_stages == 0:
            return []
        parts = [self.model.patch_embed, *self.model.layers[: self.frozen_stages]]
        return parts if self.model.msg_tokens is None else [*parts, self.model.msg_tokens]

    def train(self, mode=True):
        """Set training mode, except for what is frozen."""
        super().train(mode)
        for part in self._frozen():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def forward(self, images, sizes):
        """Images to maps.

        Args:
            images: (B, 3, H, W), zero outside of each image.
            sizes: (height, width) in pixels of each image, which is at the top left.

        Returns:
            A map (B, C, H / stride, W / stride) for each stage, sides rounded up; zero outside of each image.
        """
        patch = self.model.patch_embed.proj.stride[0]
        x = functional.pad(images, (0, -images.shape[3] % patch, 0, -images.shape[2] % patch))
        x = self.model.pos_drop(self.model.patch_embed(x))  # B, H, W, C
        sizes = -(-torch.tensor(sizes) // patch)  # B, 2: in tokens
        messengers, maps = None, []
        for i, stage in enumerate(self.model.layers):
            x, messengers = self._run_stage(i, x, messengers, sizes)
            maps.append(self._norm(i, x, sizes))
            if stage.downsample is not None:
                sizes = (sizes + 1) // 2
                x = stage.downsample(_pad_to(x, 2))
                if messengers is not None:
                    messengers = stage.downsample(_pad_to(messengers, 2))
        return maps

    def macs(self, height, width):
        """Multiply-accumulate operations for an image, counted as in models/macs.py.

        Padding does not count: patch tokens are those of the image, windows and messengers those that hold
        some.
        """
        embed = self.model.patch_embed
        rows, columns = (-(-side // embed.proj.stride[0]) for side in (height, width))
        total = embedding_macs(embed, rows * columns)
        for stage, channels in zip(self.model.layers, self.channels):
            windows = -(-rows // stage.window_size) * -(-columns // stage.window_size)
            total += stage_macs(stage, rows * columns, windows) + rows * columns * channels
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return total

    def _norm(self, i, x, sizes):
        x = self.norms[i](x)
        return (x * _inside(sizes, *x.shape[1:3]).to(x)).permute(0, 3, 1, 2)

    def _run_stage(self, i, x, messengers, sizes):
        """Apply the blocks of a stage.

        Args:
            x: map of patch tokens (B, H, W, C).
            messengers: map of messengers (B, rows, columns, C), as merging left it; None in the first stage.
            sizes: (B, 2), rows and columns of tokens of each image.

        Returns:
            The map, and the messengers (B, rows, columns, C), both zero outside of each image.
        """
        stage = self.model.layers[i]
        window_size, shuffle_size = stage.window_size, stage.shuffle_size
        height, width = x.shape[1:3]
        x = _pad_to(x, window_size * shuffle_size)
        rows, columns = x.shape[1] // window_size, x.shape[2] // window_size
        inside = _inside(sizes, *x.shape[1:3])  # B, H, W, 1
        in_windows = partition_windows(inside, window_size, shuffle_size)  # B*regions, windows, w*w, 1
        x = partition_windows(x, window_size, shuffle_size)
        occupied = in_windows.any(2, keepdim=True)  # B*regions, windows, 1, 1
        hidden = ~in_windows.flatten(0, 1).squeeze(2)  # B*regions*windows, w*w
        if self.model.tokens:
            if messengers is None:
                first = self.model.msg_tokens.expand(x.shape[0], -1, -1, -1)
            else:
                missing = (0, 0, 0, columns - messengers.shape[2], 0, rows - messengers.shape[1])
                first = partition_windows(functional.pad(messengers, missing), 1, shuffle_size)
            x = torch.cat([first * occupied.to(first), x], dim=2)
            hidden = functional.pad(hidden, (1, 0))  # a messenger always sees itself
            padded = hidden.any(1)
        else:
            padded = hidden.any(1) & occupied.flatten()  # a token of an empty window would see nothing
        padding = None
        if padded.any():
            padded = padded.nonzero()[:, 0]
            padding = padded.to(x.device), hidden[padded].to(x.device)
        x = stage.forward_blocks(x, padding=padding)
        messengers = None
        if self.model.tokens:
            messengers = merge_windows(x[:, :, :1] * occupied.to(x), 1, shuffle_size, rows, columns)
        x = stage.patch_map(x, rows, columns) * inside.to(x)
        return x[:, :height, :width], messengers


def _pad_to(x, multiple):
    """A map (B, H, W, C) padded with zeros at the bottom and on the right to multiples of a side."""
    return functional.pad(x, (0, 0, 0, -x.shape[2] % multiple, 0, -x.shape[1] % multiple))


def _inside(sizes, height, width):
    """Which places of a map belong to their image: bool (B, height, width, 1), on the CPU."""
    rows = torch.arange(height) < sizes[:, :1]  # B, height
    columns = torch.arange(width) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None])[..., None]
