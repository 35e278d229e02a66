"""Progressive resizing: the size of training images and the strength of RandAugment, epoch by epoch."""

from bisect import bisect_right
from dataclasses import dataclass

from timm.layers import to_2tuple


@dataclass(frozen=True)
class Phase:
    """What training images are like from an epoch on.

    Args:
        epoch: the first one, counted from 0.
        size: (height, width) in pixels.
        strength: factor of RandAugment's magnitude; None where ``AUG.AUTO_AUGMENT`` is something else.
    """

    epoch: int
    size: tuple
    strength: float | None = 1.0

    def __str__(self):
        height, width = self.size
        size = height if height == width else f"{height}x{width}"
        augmentation = "no RandAugment" if self.strength is None else f"RandAugment at {self.strength:g}"
        return f"images of {size} px, {augmentation}"


def build_phases(config):
    """The phases of ``DATA.PROGRESSIVE``, in order; none where it is empty."""
    is_random = config.AUG.AUTO_AUGMENT.startswith("rand")
    return [
        Phase(epoch, to_2tuple(size), strength if is_random else None)
        for epoch, size, strength in config.DATA.PROGRESSIVE
    ]


def place_of_phase(phases, epoch):
    """Which of the phases an epoch belongs to, counted from 0."""
    return bisect_right([phase.epoch for phase in phases], epoch) - 1
