"""Grey images: MODEL.MSG.IN_CHANS 1 with data."""

import numpy as np
import pytest
import torch
from helpers import digits_config, write_images
from PIL import Image

from config import ConfigError
from data.datasets import load_image
from data.transforms import build_transform, image_mode
from distributed import seeded

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of torchvision's models


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_normalises_every_channel(tmp_path, image, channels):
    image.save(tmp_path / "image.png")
    loaded = load_image(str(tmp_path / "image.png"), mode=image_mode(channels))
    found = build_transform(digits_config("MODEL.MSG.IN_CHANS", channels), False)(loaded)
    pixels = np.asarray(image, np.float64) / 255
    if channels == 1:
        grey = np.asarray(image.convert("L"), np.float64)[..., None] / 255
        wanted = (grey - MEAN.mean()) / STD.mean()
    else:
        wanted = (pixels - MEAN) / STD
    np.testing.assert_allclose(found.numpy(), wanted.transpose(2, 0, 1), atol=1e-5)


def test_colours_become_grey(tmp_path):
    write_images(tmp_path, 1, ("a",))
    grey = build_transform(digits_config("MODEL.MSG.IN_CHANS", 1), False)
    loaded = load_image(str(tmp_path / "a" / "0.png"))
    assert torch.equal(grey(loaded), grey(loaded.convert("L")))


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5", "original", "none"])
def test_every_augmentation_takes_grey_images(image, policy, size):
    opts = ["MODEL.MSG.IN_CHANS", 1, "AUG.AUTO_AUGMENT", policy, "DATA.IMG_SIZE", size]
    config = digits_config(*opts, "AUG.HFLIP", 0.5, "AUG.COLOR_JITTER", 0.4, "AUG.REPROB", 0.5)
    transform = build_transform(config, is_train=True)
    for seed in range(15):
        with seeded("test", seed):
            found = transform(image)
        assert found.shape == (1, size, size) and found.isfinite().all()


def test_opencv_and_other_numbers_are_refused(data):
    for opts in (["MODEL.MSG.IN_CHANS", 2], ["MODEL.MSG.IN_CHANS", 1, "DATA.BACKEND", "opencv"]):
        with pytest.raises(ConfigError, match="MODEL.MSG.IN_CHANS is ., but must be 1 or 3 with data"):
            digits_config(*opts, data_path=str(data))
    with pytest.raises(ConfigError, match="images have 1 or 3 channels"):
        build_transform(digits_config("MODEL.MSG.IN_CHANS", 2), False)
