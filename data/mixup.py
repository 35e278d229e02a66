"""Mixup and CutMix of training batches."""

from timm.data import Mixup

from utils import seeded


class SeededMixup:
    """timm's Mixup, with random numbers that depend on the seed and the place in the run only."""

    def __init__(self, mixup, seed, rank):
        self.mixup, self.seed, self.rank = mixup, seed, rank

    def __call__(self, images, targets, *place):
        """Mix a batch.

        Args:
            images: (B, 3, S, S) on any device, B even; changed in place.
            targets: (B,) class indices.
            place: whole numbers that tell this micro-batch from others of this process, always as many.

        Returns:
            Mixed images, and soft targets (B, classes) with label smoothing applied.
        """
        with seeded("mixup", self.seed, self.rank, *place):
            return self.mixup(images, targets)


def build_mixup(config, rank):
    """The mixup of ``config.AUG``, or None where both mixup and CutMix are off."""
    aug = config.AUG
    if aug.MIXUP == 0 and aug.CUTMIX == 0 and aug.CUTMIX_MINMAX is None:
        return None
    mixup = Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )
    return SeededMixup(mixup, config.SEED, rank)
