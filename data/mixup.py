"""What is done to whole training batches on their device: random erasing, mixup and CutMix."""

from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from distributed import seeded


class BatchAugmentation:
    """timm's RandomErasing and Mixup, whose random numbers depend on the seed and the place in the run only.

    On CUDA the noise that fills erased rectangles comes from the device's generator, which is the caller's to
    seed.

    Args:
        erasing: None where the images come erased.
        mixup: None for no mixup.
    """

    def __init__(self, erasing, mixup, seed, rank):
        self.erasing, self.mixup, self.seed, self.rank = erasing, mixup, seed, rank

    def __call__(self, images, targets, *place):
        """Augment a batch.

        Args:
            images: (B, 3, S, S) normalised, on the device, B even for mixup; changed in place.
            targets: (B,) class indices.
            place: whole numbers that tell this micro-batch from others of this process, always as many.

        Returns:
            The images, and the targets or, mixed, soft targets (B, classes) with label smoothing applied.
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
