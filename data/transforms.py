"""The official augmentation recipe, through timm's transforms."""

import math
import random
import re

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.transforms import str_to_interp_mode
from timm.layers import to_2tuple
from torchvision import transforms
from torchvision.transforms.functional import resize

from config import ConfigError


def image_mode(channels):
    """Pillow's mode of images of 1, 3 or 4 channels, ``MODEL.MSG.IN_CHANS``; a ConfigError for others."""
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ConfigError(f"MODEL.MSG.IN_CHANS is {channels}, but images have 1, 3 or 4 channels")
    return modes[channels]


def normalization(channels):
    """Mean and standard deviation of 1, 3 or 4 channels, of values from 0 to 1.

    ImageNet's for red, green and blue; their averages for grey; 0.5 and 0.5 for alpha, so that what is
    opaque becomes 1 and what is transparent -1.
    """
    if channels == 1:
        return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
    alpha = (0.5,) * (channels - 3)
    return (*IMAGENET_DEFAULT_MEAN, *alpha), (*IMAGENET_DEFAULT_STD, *alpha)


def build_transform(config, is_train):
    """The transform of a PIL image to a normalised float tensor (C, H, W), the sides of ``DATA.IMG_SIZE``.

    C is ``MODEL.MSG.IN_CHANS``: 1 for grey, 3, or 4 for RGBA, whatever the image is, but 3 take RGB images.

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
    channels = config.MODEL.MSG.IN_CHANS
    mode = image_mode(channels)
    if channels != 3:
        steps.insert(0, Convert(mode))
    normalize = transforms.Normalize(*normalization(channels))
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
    channels = config.MODEL.MSG.IN_CHANS
    mode, (mean, std) = image_mode(channels), normalization(channels)
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
            if channels == 4:
                kind = MoveBands if operation.aug_fn in MOVES else KeepAlpha
                operation.aug_fn = kind(operation.aug_fn)
            # Pillow warps with a filter of at most 4 pixels.
            if operation.kwargs["resample"] == Image.Resampling.LANCZOS:
                operation.kwargs["resample"] = Image.Resampling.BICUBIC
    if channels != 3:
        transform.transforms.insert(0, Convert(mode))
    return transform


class Convert:
    """Convert a PIL image to a mode of Pillow."""

    def __init__(self, mode):
        self.mode = mode

    def __call__(self, image):
        return image if image.mode == self.mode else image.convert(self.mode)


# What RandAugment and its like do to the places of pixels; all else changes colours.
MOVES = [
    function for name, function in vars(auto_augment).items() if re.match("shear_|translate_|rotate", name)
]


class KeepAlpha:
    """Apply a function of colours to an RGBA image: most of Pillow's refuse it, others would change alpha."""

    def __init__(self, function):
        self.function = function

    def __call__(self, image, *args, **kwargs):
        result = self.function(image.convert("RGB"), *args, **kwargs)
        result.putalpha(image.getchannel("A"))
        return result


class MoveBands:
    """Move the pixels of an RGBA image band by band: Pillow alone would brighten what fills the rest."""

    def __init__(self, function):
        self.function = function

    def __call__(self, image, *args, fillcolor, resample, **kwargs):
        if isinstance(resample, (list, tuple)):
            resample = random.choice(resample)  # as timm does, but once for all bands
        bands = zip(image.split(), fillcolor)
        moved = [self.function(x, *args, fillcolor=fill, resample=resample, **kwargs) for x, fill in bands]
        return Image.merge(image.mode, moved)


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
