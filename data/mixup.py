"""What is done to whole training batches on their device: random erasing, mixup and CutMix."""

from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from distributed import seeded


class BatchAugmentation:
    """timm's RandomErasing and Mixup, whose random numbers depend on the seed and the place in the run only.

    Each is None where it is not wanted. On CUDA the noise in erased rectangles comes from the device's
    generator, which the caller seeds.
    """

    def __init__(self, erasing, mixup, seed, rank):
        self.erasing, self.mixup, self.seed, self.rank = erasing, mixup, seed, rank

    def __call__(self, images, targets, *place):
        """Normalised images (B, 3, S, S), changed in place, and the targets (B,).

        Mixed, targets are soft (B, classes) with label smoothing applied, and B is even. ``place`` are whole
        numbers that tell this micro-batch from others of this process, always as many.
        """
        if self.erasing is not None:
            with seeded("erasing", self.seed, self.rank, *place):
                images = self.erasing(images)
        if self.mixup is not None:
            with seeded("mixup", self.seed, self.rank, *place):
                images, targets = self.mixup(images, targets)
        return images, targets


def build_augmentation(config, rank, device):
    """What ``config.AUG`` does to batches: mixup, and erasing where ``DATA.BACKEND`` leaves it to us."""
    aug = config.AUG
    erasing = mixup = None
    if config.DATA.BACKEND == "opencv" and aug.REPROB > 0 and aug.RECOUNT > 0:
        erasing = RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device=device)
    if aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None:
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
    return BatchAugmentation(erasing, mixup, config.SEED, rank)
