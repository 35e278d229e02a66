"""MSG-Transformer as a backbone: norms for the maps of its stages."""

from torch import nn

from models.build import build_model, regions
from models.geometry import check_exchange
from models.macs import backbone_macs, stage_sizes
from models.padding import Extent
from utils import UserError


class MSGBackbone(nn.Module):
    """The patch maps of every stage, each through a LayerNorm of its own: strides 4, 8, 16, 32.

    The final norm and the head of ``model``, an MSGTransformer, are dropped.
    """

    def __init__(self, model):
        super().__init__()
        model.norm, model.head = nn.Identity(), nn.Identity()
        self.model = model
        self.channels = [info["num_chs"] for info in model.feature_info]
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images, sizes):
        """Images (B, 3, H, W) to a map (B, C, H / stride, W / stride) for each stage, sides rounded up.

        ``sizes`` are the (height, width) in pixels of each image, which is at the top left; None where all
        fill ``images``. Outside of each image, images must be zero and maps are zero.
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


def build_backbone(config):
    """The :class:`MSGBackbone` that ``config.MODEL`` and ``config.DET`` describe, freshly initialised.

    Raises:
        UserError: a combination that cannot be built; the message names the key to change.
    """
    msg, shuffle_size = config.MODEL.MSG, config.DET.SHUF_SIZE
    if len(shuffle_size) != len(msg.DEPTHS):
        raise UserError(f"DET.SHUF_SIZE {shuffle_size} needs an entry for each stage: {len(msg.DEPTHS)}")
    if msg.TOKENS and msg.MANIP_TYPE != "none":
        for i, region in enumerate(shuffle_size):
            try:
                check_exchange(i, msg.EMBED_DIM * 2**i, region, f"DET.SHUF_SIZE[{i}]")
            except ValueError as error:
                raise UserError(str(error)) from error
    first = regions(config)[0]
    if msg.TOKENS and first != shuffle_size[0]:
        raise UserError(
            f"DET.SHUF_SIZE[0] is {shuffle_size[0]}, but there are messengers for {first**2} windows: make "
            "it MODEL.MSG.SHUF_SIZE[0]"
        )
    return MSGBackbone(build_model(config, shuffle_size))
