"""Grey and RGBA images: MODEL.MSG.IN_CHANS 1 and 4 with data."""

import re

import numpy as np
import pytest
import torch
from helpers import digits_config, write_images
from PIL import Image
from timm.data import auto_augment

from config import ConfigError
from data import build_loaders
from data.datasets import load_image
from data.transforms import KeepAlpha, build_transform, image_mode, normalization
from distributed import seeded

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of torchvision's models


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_evaluation_normalises_every_channel(tmp_path, image, channels):
    image.save(tmp_path / "image.png")
    loaded = load_image(str(tmp_path / "image.png"), mode=image_mode(channels))
    found = build_transform(digits_config("MODEL.MSG.IN_CHANS", channels), False)(loaded)
    pixels = np.asarray(image, np.float64) / 255
    if channels == 1:
        grey = np.asarray(image.convert("L"), np.float64)[..., None] / 255
        wanted = (grey - MEAN.mean()) / STD.mean()
    else:
        wanted = np.dstack([(pixels[..., :3] - MEAN) / STD, (pixels[..., 3:] - 0.5) / 0.5])[..., :channels]
    np.testing.assert_allclose(found.numpy(), wanted.transpose(2, 0, 1), atol=1e-5)


def test_files_without_alpha_are_opaque_and_colours_become_grey(tmp_path):
    write_images(tmp_path, 1, ("a",))
    alpha = build_transform(digits_config("MODEL.MSG.IN_CHANS", 4), False)
    assert (alpha(load_image(str(tmp_path / "a" / "0.png")))[3] == 1).all()
    grey = build_transform(digits_config("MODEL.MSG.IN_CHANS", 1), False)
    loaded = load_image(str(tmp_path / "a" / "0.png"))
    assert torch.equal(grey(loaded), grey(loaded.convert("L")))


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5", "original", "none"])
@pytest.mark.parametrize("channels", [1, 4])
def test_every_augmentation_takes_the_channels(image, channels, policy, size):
    opts = ["MODEL.MSG.IN_CHANS", channels, "AUG.AUTO_AUGMENT", policy, "DATA.IMG_SIZE", size]
    config = digits_config(*opts, "AUG.HFLIP", 0.5, "AUG.COLOR_JITTER", 0.4, "AUG.REPROB", 0.5)
    transform = build_transform(config, is_train=True)
    for seed in range(15):
        with seeded("test", seed):
            found = transform(image)
        assert found.shape == (channels, size, size) and found.isfinite().all()


@pytest.mark.parametrize("name", sorted(auto_augment.NAME_TO_OP))
def test_colour_operations_leave_alpha_and_do_to_colours_what_they_do_without(image, name):
    if re.match("Shear|Translate|Rotate", name):
        return
    arguments = auto_augment.LEVEL_TO_ARG[name]
    arguments = arguments(5, dict(translate_const=10)) if arguments else ()
    function = auto_augment.NAME_TO_OP[name]
    with seeded("test"):
        found = KeepAlpha(function)(image, *arguments)
    with seeded("test"):
        wanted = function(image.convert("RGB"), *arguments)
    assert np.array_equal(found.convert("RGB"), wanted)
    assert np.array_equal(found.getchannel("A"), image.getchannel("A"))


def test_what_is_moved_in_has_the_mean_of_every_channel(image):
    config = digits_config("MODEL.MSG.IN_CHANS", 4, "AUG.AUTO_AUGMENT", "rand-m9", "DATA.IMG_SIZE", 64)
    randaugment = next(
        step
        for step in build_transform(config, True).transforms
        if isinstance(step, auto_augment.RandAugment)
    )
    operation = next(op for op in randaugment.ops if op.name == "TranslateXRel")
    moved = np.asarray(operation.aug_fn(image, 0.5, **operation.kwargs))
    filled = moved[:, 17:] if (moved[0, -1] == moved[5, -1]).all() else moved[:, :15]
    assert (filled == np.round(255 * np.array(normalization(4)[0]))).all()


def test_opencv_and_other_numbers_are_refused(data):
    for opts in (["MODEL.MSG.IN_CHANS", 2], ["MODEL.MSG.IN_CHANS", 4, "DATA.BACKEND", "opencv"]):
        with pytest.raises(ConfigError, match="MODEL.MSG.IN_CHANS is ., but must be 1, 3 or 4 with data"):
            digits_config(*opts, data_path=str(data))
    with pytest.raises(ConfigError, match="images have 1, 3 or 4 channels"):
        build_transform(digits_config("MODEL.MSG.IN_CHANS", 2), False)


def test_loaders_read_alpha(tmp_path, image):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        image.save(tmp_path / split / "a" / "0.png")
    opts = ["MODEL.MSG.IN_CHANS", 4, "DATA.NUM_WORKERS", 0, "MODEL.NUM_CLASSES", 1]
    train, _, val, _ = build_loaders(digits_config(*opts, data_path=str(tmp_path), batch_size=1))
    wanted = torch.from_numpy(np.asarray(image.getchannel("A")) / 255 * 2 - 1).float()
    torch.testing.assert_close(next(iter(val))[0][0, 3], wanted)
    assert next(iter(train))[0].shape == (1, 4, 32, 32)
