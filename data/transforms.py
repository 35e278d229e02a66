"""The official augmentation recipe, through timm's transforms."""

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from config import ConfigError


def build_transform(config, is_train):
    """The transform of a PIL image to a normalised float tensor (3, S, S), S being ``DATA.IMG_SIZE``.

    Training images of more than 32 px: random resized crop, flip, AutoAugment or colour jitter, random
    erasing. Up to 32 px a crop of the image padded by 4 px replaces the resized crop, as in the official
    code. Evaluation: resize to 256/224 of the size and centre crop, or (``TEST.CROP`` off, or up to 32 px)
    resize to the size.
    """
    if is_train:
        return _train_transform(config, config.DATA.IMG_SIZE)
    short, size, mode = evaluation_sizes(config)
    if short:
        steps = [limit_aspect, transforms.Resize(short, mode), transforms.CenterCrop(size)]
    else:
        steps = [transforms.Resize((size, size), mode)]
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*steps, transforms.ToTensor(), normalize])


def evaluation_sizes(config):
    """Short side after resizing (None: the whole image becomes the crop), side of the crop, interpolation."""
    size = config.DATA.IMG_SIZE
    short = int(256 / 224 * size) if config.TEST.CROP and size > 32 else None
    return short, size, _resize_mode(config.DATA.INTERPOLATION)


def _resize_mode(interpolation):
    """torchvision's mode of a plain resize; bicubic for ``random``, which timm's random crop takes."""
    return str_to_interp_mode("bicubic" if interpolation == "random" else interpolation)


def _train_transform(config, size):
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            hflip=config.AUG.HFLIP,
            color_jitter=config.AUG.COLOR_JITTER or None,
            auto_augment=config.AUG.AUTO_AUGMENT if config.AUG.AUTO_AUGMENT != "none" else None,
            interpolation=config.DATA.INTERPOLATION,
            re_prob=config.AUG.REPROB,
            re_mode=config.AUG.REMODE,
            re_count=config.AUG.RECOUNT,
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(
            f"AUG.AUTO_AUGMENT is {config.AUG.AUTO_AUGMENT!r}, which timm cannot read ({error}): "
            "use a string such as rand-m9-mstd0.5-inc1, or none"
        ) from error
    if size <= 32:
        whole = transforms.Resize((size, size), _resize_mode(config.DATA.INTERPOLATION))
        transform.transforms[:1] = [whole, transforms.RandomCrop(size, padding=4)]
    for step in transform.transforms:
        for operation in augment_operations(step):
            if operation.aug_fn is posterize:
                operation.aug_fn = posterize_from_0_bits
            # Pillow warps with a filter of at most 4 pixels.
            if operation.kwargs["resample"] == Image.Resampling.LANCZOS:
                operation.kwargs["resample"] = Image.Resampling.BICUBIC
    return transform


def limit_aspect(image):
    """Cut the ends off a PIL image that is very long; see :func:`aspect_box`."""
    left, top, width, height = aspect_box(*image.size)
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def aspect_box(width, height, most=8):
    """The middle of an image, its long side at most ``most`` times the short: (left, top, width, height).

    A 1x20000 image would need gigabytes once its short side is resized, all of which the centre crop throws
    away.
    """
    new_width, new_height = min(width, most * height), min(height, most * width)
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
