"""MSG-Transformer as a backbone: norms for the maps of its stages, and stages that do not train."""

from torch import nn

from models.geometry import check_exchange
from models.macs import backbone_macs, stage_sizes
from models.padding import Extent


class MSGBackbone(nn.Module):
    """The patch maps of every stage, each through a LayerNorm of its own: strides 4, 8, 16, 32.

    Args:
        model: an MSGTransformer, whose final norm and head are dropped.
        shuffle_size: windows on a side of a shuffle region, for each stage.
        frozen_stages: how many stages do not train; the patch embedding belongs to the first.

    Raises:
        ValueError: shuffle regions that cannot exchange channels.
    """

    def __init__(self, model, shuffle_size, frozen_stages=0):
        super().__init__()
        if len(shuffle_size) != len(model.layers):
            raise ValueError(
                f"DET.SHUF_SIZE {list(shuffle_size)} needs an entry for each stage: {len(model.layers)}"
            )
        model.norm, model.head = nn.Identity(), nn.Identity()
        self.model, self.frozen_stages = model, frozen_stages
        self.channels = [info["num_chs"] for info in model.feature_info]
        for i, (stage, channels) in enumerate(zip(model.layers, self.channels)):
            stage.shuffle_size = shuffle_size[i]
            if any(block.exchange for block in stage.blocks):
                check_exchange(i, channels, stage.shuffle_size, f"DET.SHUF_SIZE[{i}]")
        if model.tokens and model.msg_tokens.shape[1] != shuffle_size[0] ** 2:
            raise ValueError(
                f"DET.SHUF_SIZE[0] is {shuffle_size[0]}, but there are messengers for "
                f"{model.msg_tokens.shape[1]} windows: make it MODEL.MSG.SHUF_SIZE[0]"
            )
        model.shuffle_size = list(shuffle_size)
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
            sizes: (height, width) in pixels of each image, which is at the top left; None where all fill
                ``images``.

        Returns:
            A map (B, C, H / stride, W / stride) for each stage, sides rounded up; zero outside of each image.
        """
        maps, extent = [], Extent.of_images(*images.shape[2:], self.model.patch_size, sizes)
        for (patches, _), norm in zip(self.model.forward_stages(images, sizes), self.norms):
            x = norm(patches)  # B, H, W, C
            if extent.sizes is not None:
                x = x * extent.inside(x.device).to(x)
            maps.append(x.permute(0, 3, 1, 2))
            extent = extent.merged()
        return maps

    def macs(self, height, width):
        """Multiply-accumulate operations for an image, counted as in models/macs.py, without padding."""
        sizes = stage_sizes(self.model, height, width)
        norms = sum(patches * channels for (patches, _), channels in zip(sizes, self.channels))
        return backbone_macs(self.model, height, width) + norms
