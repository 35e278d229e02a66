"""Whether a classifier of some sizes can be built, and the sizes of its stages."""

from dataclasses import dataclass

from .attention import BACKENDS
from .attention_triton import triton_missing
from .export import image_size

# The keys of MODEL.MSG that take one word of a few.
CHOICES = {
    "MANIP_TYPE": ("shuf", "none"),
    "PATCH_EMBED": ("linear", "conv"),
    "DOWNSAMPLE": ("linear", "conv"),
    "ATTENTION": BACKENDS,
}


@dataclass(frozen=True)
class StageSizes:
    """One stage.

    Args:
        dim: channels (C).
        heads: of its attention.
        depth: blocks.
        windows: windows on a side of its map, for images of the model's own size.
        shuffle_size: windows on a side of a shuffle region (R), at most ``windows``.
    """

    dim: int
    heads: int
    depth: int
    windows: int
    shuffle_size: int


@dataclass(frozen=True)
class Geometry:
    """The sizes of a classifier, under the names of MSGTransformer's arguments."""

    img_size: int
    patch_size: int
    embed_dim: int
    depths: tuple
    num_heads: tuple
    window_size: int
    shuffle_size: tuple

    def stages(self, exchange):
        """The sizes of each stage.

        Args:
            exchange: whether messengers exchange channel groups, which the channels must allow.

        Returns:
            A list of :class:`StageSizes`.

        Raises:
            ValueError: what does not fit and which config key to change.
        """
        self._check_lists()
        last = len(self.depths) - 1
        fitting = self.patch_size * self.window_size * 2**last
        if self.img_size != fitting:
            raise ValueError(
                f"DATA.IMG_SIZE is {self.img_size}, but MODEL.MSG.PATCH_SIZE {self.patch_size}, WINDOW_SIZE "
                f"{self.window_size} and {1 + last} stages need {fitting}, so that the last stage is one "
                "window: change one of them"
            )
        stages = []
        for i, (depth, heads, shuffle_size) in enumerate(zip(self.depths, self.num_heads, self.shuffle_size)):
            windows = 2 ** (last - i)
            sizes = StageSizes(self.embed_dim * 2**i, heads, depth, windows, min(shuffle_size, windows))
            _check_stage(i, sizes, exchange)
            stages.append(sizes)
        return stages

    def _check_lists(self):
        lists = {"DEPTHS": self.depths, "NUM_HEADS": self.num_heads, "SHUF_SIZE": self.shuffle_size}
        lengths = {key: len(values) for key, values in lists.items()}
        if not self.depths or len(set(lengths.values())) > 1:
            listed = ", ".join(f"MODEL.MSG.{key} {length}" for key, length in lengths.items())
            raise ValueError(
                f"these need one entry per stage, but their lengths are {listed}: make them equal"
            )
        for key, values in lists.items():
            if not all(isinstance(value, int) and value > 0 for value in values):
                raise ValueError(
                    f"MODEL.MSG.{key} is {list(values)}: every entry must be a positive whole number"
                )


def _check_stage(i, sizes, exchange):
    """Raise a ValueError if stage ``i``, counted from 0, cannot be built in these sizes."""
    dim, heads, windows, region = sizes.dim, sizes.heads, sizes.windows, sizes.shuffle_size
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
    if exchange and dim % region**2:
        raise ValueError(
            f"the {dim} channels of stage {i + 1} cannot be split among the {region**2} windows of its "
            f"{region}x{region} shuffle region: make MODEL.MSG.EMBED_DIM a multiple of "
            f"{region**2 // 2**i or 1} or lower MODEL.MSG.SHUF_SIZE[{i}]"
        )


def check_choices(manip_type, patch_embed, downsample, attention):
    """Check the arguments of MSGTransformer that take one of a few words.

    Raises:
        ValueError: a word that is not among those of the key, or attention that cannot run here.
    """
    words = dict(MANIP_TYPE=manip_type, PATCH_EMBED=patch_embed, DOWNSAMPLE=downsample, ATTENTION=attention)
    for key, known in CHOICES.items():
        if words[key] not in known:
            raise ValueError(f"MODEL.MSG.{key} is {words[key]!r}: use {' or '.join(known)}")
    if attention == "triton" and triton_missing():
        raise ValueError(f"MODEL.MSG.ATTENTION is triton, but {triton_missing()}: use sdpa or auto")


def require_size(x, size):
    """Images (B, in_chans, size, size) as they are.

    Raises:
        ValueError: images of another size.
    """
    x, height, width = image_size(x)
    if (height, width) != (size, size):
        raise ValueError(
            f"the model takes {size}x{size} images, these are {height}x{width}: resize them or set "
            "DATA.IMG_SIZE"
        )
    return x
