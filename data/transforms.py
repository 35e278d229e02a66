"""The official augmentation recipe: of images through timm's transforms, and of whole batches."""

import math

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from timm.layers import to_2tuple
from torchvision import transforms
from torchvision.transforms.functional import resize

from config import ConfigError
from distributed import seeded


def image_mode(channels):
    """Pillow's mode of images of 1 or 3 channels, ``MODEL.MSG.IN_CHANS``; a ConfigError for others."""
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ConfigError(f"MODEL.MSG.IN_CHANS is {channels}, but images have 1 or 3 channels")
    return modes[channels]


def normalization(channels):
    """ImageNet's mean and standard deviation of values from 0 to 1; for grey the averages over colours."""
    if image_mode(channels) == "L":
        return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def build_transform(config, is_train):
    """The transform of a PIL image to a normalised float tensor (C, H, W), the sides of ``DATA.IMG_SIZE``.

    C is ``MODEL.MSG.IN_CHANS``: 1 for grey whatever the image is, or 3, which take RGB images.

    Training images of more than 32 px: random resized crop, flip, AutoAugment or colour jitter, random
    erasing. Up to 32 px a crop of the image padded by 4 px replaces the resized crop, as in the official
    code; with ``AUG.CROP`` off, a resize to the size does. Evaluation: resize until the image covers 256/224
    of the size and centre crop, or (``TEST.CROP`` off, or up to 32 px) resize to the size. Of two sides, the
    shorter one decides what is up to 32 px.
    """
    if is_train:
        return _train_transform(config)
    cover, size, mode = evaluation_sizes(config)
    if cover:
        steps = [ResizeToCover(cover, mode), transforms.CenterCrop(size)]
    else:
        steps = [transforms.Resize(size, mode)]
    if config.MODEL.MSG.IN_CHANS != 3:
        steps.insert(0, transforms.Grayscale())
    normalize = transforms.Normalize(*normalization(config.MODEL.MSG.IN_CHANS))
    return transforms.Compose([*steps, transforms.ToTensor(), normalize])


def evaluation_sizes(config):
    """What evaluation resizes to: (height, width) to cover, (height, width) of the crop, interpolation.

    The first is None where the whole image becomes the crop.
    """
    size = to_2tuple(config.DATA.IMG_SIZE)
    crops = config.TEST.CROP and min(size) > 32
    cover = tuple(int(256 / 224 * side) for side in size) if crops else None
    return cover, size, _resize_mode(config.DATA.INTERPOLATION)


def describe_evaluation(config):
    """What evaluation does to an image, in plain values, for whoever runs an exported model."""
    cover, size, mode = evaluation_sizes(config)
    mean, std = normalization(config.MODEL.MSG.IN_CHANS)
    return dict(
        layout="batch, channels, height, width",
        channels="RGB" if config.MODEL.MSG.IN_CHANS == 3 else config.MODEL.MSG.IN_CHANS,
        resize_to_cover=cover,
        resize_to=None if cover else size,
        interpolation=mode.value,
        centre_crop=size if cover else None,
        divide_by=255,
        mean=mean,
        std=std,
    )


def _resize_mode(interpolation):
    """torchvision's mode of a plain resize; bicubic for ``random``, which timm's random crop takes."""
    return str_to_interp_mode("bicubic" if interpolation == "random" else interpolation)


def _train_transform(config):
    height, width = size = to_2tuple(config.DATA.IMG_SIZE)
    mean, std = normalization(config.MODEL.MSG.IN_CHANS)
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            # timm's own, around the aspect of the size: images look the same in training and evaluation.
            ratio=[ratio * (width / height) for ratio in (3 / 4, 4 / 3)],
            hflip=config.AUG.HFLIP,
            color_jitter=config.AUG.COLOR_JITTER or None,
            auto_augment=config.AUG.AUTO_AUGMENT if config.AUG.AUTO_AUGMENT != "none" else None,
            interpolation=config.DATA.INTERPOLATION,
            re_prob=config.AUG.REPROB,
            re_mode=config.AUG.REMODE,
            re_count=config.AUG.RECOUNT,
            mean=mean,  # what is moved into an image is filled with it, too
            std=std,
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(
            f"AUG.AUTO_AUGMENT is {config.AUG.AUTO_AUGMENT!r}, which timm cannot read ({error}): "
            "use a string such as rand-m9-mstd0.5-inc1, or none"
        ) from error
    whole = transforms.Resize(size, _resize_mode(config.DATA.INTERPOLATION))
    if not config.AUG.CROP:
        transform.transforms[0] = whole
    elif min(size) <= 32:
        transform.transforms[:1] = [whole, transforms.RandomCrop(size, padding=4)]
    for step in transform.transforms:
        for operation in augment_operations(step):
            if operation.aug_fn is posterize:
                operation.aug_fn = posterize_from_0_bits
            # Pillow warps with a filter of at most 4 pixels.
            if operation.kwargs["resample"] == Image.Resampling.LANCZOS:
                operation.kwargs["resample"] = Image.Resampling.BICUBIC
    if config.MODEL.MSG.IN_CHANS != 3:
        transform.transforms.insert(0, transforms.Grayscale())
    return transform


class ResizeToCover:
    """Resize a PIL image, its aspect kept, until it covers ``cover``, (height, width), and no further.

    The ends of a very long image are cut off before; see :func:`aspect_box`.
    """

    def __init__(self, cover, mode):
        self.cover, self.mode = cover, mode

    def __call__(self, image):
        left, top, width, height = aspect_box(*image.size, self.cover)
        if (width, height) != image.size:
            image = image.crop((left, top, left + width, top + height))
        return resize(image, covering_size(width, height, self.cover), self.mode)


def covering_size(width, height, cover):
    """(height, width) of an image that just covers ``cover``, (height, width), rounded as by torchvision."""
    rows, columns = cover
    if columns * height >= rows * width:
        return int(columns * height / width), columns
    return rows, int(rows * width / height)


def aspect_box(width, height, cover, most=8):
    """The middle of an image, at most ``most`` times as long as an image of the aspect of ``cover``.

    A 1x20000 image would need gigabytes once it covers a square, all of which the centre crop throws away.
    Returns (left, top, width, height); ``cover`` is (height, width).
    """
    rows, columns = cover
    new_width = min(width, math.ceil(most * height * columns / rows))
    new_height = min(height, math.ceil(most * width * rows / columns))
    return (width - new_width) // 2, (height - new_height) // 2, new_width, new_height


def augment_operations(step):
    """The single operations inside a RandAugment, AugMix or AutoAugment step; none for any other step."""
    if isinstance(step, (RandAugment, AugMixAugment)):
        return step.ops
    if isinstance(step, AutoAugment):
        return [op for policy in step.policy for op in policy if isinstance(op, AugmentOp)]
    return []


def posterize_from_0_bits(img, bits_to_keep, **_):
    """Keep the highest bits of every channel, 0 to 8 of them.

    RandAugment asks for 0 bits now and then. Pillow used to answer with a black image and raises since
    version 13; the recipe was tuned with the black image, so that is what 0 bits still give.
    """
    if bits_to_keep >= 8:
        return img
    if bits_to_keep <= 0:
        return img.point(lambda _: 0)
    return ImageOps.posterize(img, bits_to_keep)


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
