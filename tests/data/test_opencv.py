"""DATA.BACKEND opencv against Pillow: the same choices, nearly the same pixels, the same refusals."""

import itertools
import random
import sys

import cv2
import numpy as np
import pytest
import torch
from helpers import digits_config
from PIL import Image
from test_hostile_images import (
    mutated,
    originals,
    picture,
    whole,
)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple

from config import ConfigError
from data import DataError, build_loaders
from data.datasets import load_image
from data.loaders import ToDevice
from data.opencv.operations import resize
from data.opencv.transforms import ImageFile, build_opencv_transform
from data.transforms import augment_operations, build_augmentation, build_transform
from distributed import seeded

RECIPE = ["AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.HFLIP", 0.5]
MEAN, STD = (torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def photograph(size, seed=0):
    """An image with the statistics of a photograph: details at every scale, the more the coarser."""
    rng = np.random.default_rng(seed)
    width, height = size
    pixels = np.full((height, width, 3), 110.0)
    for side in (3, 6, 12, 24, 48, 96):
        coarse = rng.normal(0, 90 / side**0.5, (side, side, 3))
        pixels += cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(path, image, **options):
    image.save(path, "JPEG", **options)
    return str(path)


def transforms(is_train, *opts):
    """The transform of each backend: (pil, opencv)."""
    config = digits_config(*opts, "AUG.REPROB", 0.0)
    return [build(config, is_train) for build in (build_transform, build_opencv_transform)]


def values(images):
    """Normalised images as values from 0 to 255."""
    return (images * STD + MEAN) * 255


def test_damaged_jpegs_are_read_or_refused_as_by_pillow(tmp_path):
    rng, path, refused = random.Random(5), str(tmp_path / "damaged.jpg"), 0
    for _ in range(200):
        with open(path, "wb") as file:
            file.write(mutated(rng.choice(originals(rng)[:4]), rng))
        try:
            expected = np.asarray(load_image(path))
        except DataError:
            refused += 1
            with pytest.raises(DataError):
                whole(path)
        else:
            np.testing.assert_array_equal(whole(path), expected)
    assert 30 < refused < 170


SIZES = [(500, 375), (375, 500), (300, 300), (800, 550), (1200, 1550), (97, 133), (2000, 260), (80, 900)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Files of photographs of these sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    return {size: jpeg(folder / f"{size}.jpg", photograph(size), quality=92) for size in SIZES}


SIDES = [33, 64, 96, 200, [96, 200], [160, 48], [33, 400]]


@pytest.mark.parametrize(
    "interpolation, all_sides, most",
    [(name, [224, [112, 208]], 1) for name in ("bicubic", "bilinear", "lanczos")]
    + [("nearest", [224, [112, 208]], 4), ("bicubic", SIDES, 2)],
)
def test_evaluation_sees_what_it_sees_with_pillow(photographs, interpolation, all_sides, most):
    for crop, sides in itertools.product((True, False), all_sides):
        opts = ["DATA.IMG_SIZE", sides, "TEST.CROP", crop, "DATA.INTERPOLATION", interpolation]
        pil, opencv = transforms(False, *opts)
        for size, path in photographs.items():
            expected, found = values(pil(load_image(path))), opencv(ImageFile(path))
            assert found.shape == (3, *to_2tuple(sides)) and found.dtype == torch.uint8
            assert (expected - found).abs().mean() < most, size


def test_large_images_are_decoded_at_the_scale_that_the_crop_needs(tmp_path):
    file = ImageFile(jpeg(tmp_path / "large.jpg", photograph((2000, 1600)), quality=92))
    for scale, reduction in ((1, 1), (3.9, 1), (4, 2), (7.9, 2), (8, 4), (100, 8)):
        found = file.crop(400, 160, 800, 640, scale)
        assert found.shape == (640 / reduction, 800 / reduction, 3)
        expected = photograph((2000, 1600)).crop((400, 160, 1200, 800)).resize(found.shape[1::-1], Image.BOX)
        assert abs(found.astype(float) - expected).mean() < 1


@pytest.mark.parametrize(
    "opts",
    [
        [*RECIPE, "DATA.IMG_SIZE", 224],
        ["AUG.AUTO_AUGMENT", "augmix-m5-w4-d2"],
        ["AUG.AUTO_AUGMENT", "originalr-mstd0.5"],
        ["AUG.AUTO_AUGMENT", "rand-m9-tweights"],
        ["AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.4],
        [*RECIPE, "DATA.INTERPOLATION", "random"],
        [*RECIPE, "DATA.INTERPOLATION", "lanczos"],
        [*RECIPE, "DATA.INTERPOLATION", "nearest"],
        [*RECIPE, "DATA.IMG_SIZE", 32],
        [*RECIPE, "DATA.IMG_SIZE", [64, 112]],
        [*RECIPE, "DATA.IMG_SIZE", [112, 64]],
        [*RECIPE, "DATA.IMG_SIZE", [32, 48]],
        [*RECIPE, "AUG.CROP", False],
    ],
    ids=lambda opts: "-".join(map(str, opts[-2:])),
)
def test_every_recipe_gives_what_it_gives_with_pillow(tmp_path, opts):
    """Another crop box, flip or operation would differ by tens."""
    path = jpeg(tmp_path / "photograph.jpg", photograph((300, 240)), quality=92)
    pil, opencv = transforms(True, "DATA.IMG_SIZE", 96, *opts)
    differences = []
    for seed in range(20):
        images, after = [], []
        for transform, read in ((pil, load_image), (opencv, ImageFile)):
            with seeded("test", seed):
                images.append(transform(read(path)))
                after.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert after[0] == after[1], seed
        differences.append((values(images[0]) - images[1]).abs().mean().item())
    assert np.mean(differences) < 1.5 and max(differences) < 8


@pytest.mark.parametrize("sides", [(32, 32), (32, 48), (48, 32)])
def test_images_are_resized_unless_both_sides_are_right(sides):
    pixels = np.array(picture(size=sides))
    found = resize(pixels, 32, 32, "bicubic")
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC))
    assert found.shape == expected.shape and abs(found.astype(int) - expected).max() <= 1
    assert sides != (32, 32) or np.array_equal(found, pixels)


WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.mark.parametrize(
    "image", [photograph((224, 224)), picture(size=(64, 48)), Image.new("RGB", (32, 32), (9, 99, 200))]
)
def test_operations_change_pixels_as_pillow_does(image):
    pil, opencv = (
        next(augment_operations(step) for step in transform.transforms if augment_operations(step))
        for transform in transforms(
            True, "DATA.IMG_SIZE", 224, "AUG.AUTO_AUGMENT", "rand-m10-mstd101-p1-inc1"
        )
    )
    assert len(pil) == 15
    for theirs, ours in zip(pil, opencv):
        for seed in range(20):
            with seeded("test", seed):
                expected = np.asarray(theirs(image)).astype(float)
            with seeded("test", seed):
                found = ours(np.asarray(image))
            assert found.dtype == np.uint8 and found.shape == expected.shape
            difference = abs(found - expected)
            if not theirs.name.startswith(WARPS):
                assert difference.max() == 0, theirs.name
            else:  # OpenCV treats the border of the image differently
                inside = difference[4:-4, 4:-4]
                assert np.median(inside) <= 1 and inside.mean() < 4, (theirs.name, seed)


def opencv_config(folder, *opts, **flags):
    return digits_config("DATA.BACKEND", "opencv", *RECIPE, *opts, data_path=str(folder), **flags)


def test_batches_are_normalised_as_torchvision_does_it(data):
    path = str(data / "val" / "a" / "0.png")
    pil, opencv = transforms(False)
    images = opencv(ImageFile(path))[None].repeat(3, 1, 1, 1)
    ((found, _),) = ToDevice(torch.device("cpu"))([(images, torch.zeros(3))])
    assert torch.equal(found[0], pil(load_image(path))) and torch.equal(found[0], found[2])


def test_erasing_depends_on_the_place_in_the_run_and_follows_its_probability():
    config = opencv_config("", "AUG.REPROB", 0.25, "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)
    images, targets = torch.zeros(2000, 3, 8, 8), torch.zeros(2000, dtype=torch.long)
    augment = build_augmentation(config, 0, "cpu")
    torch.manual_seed(0)
    first, unchanged = augment(images.clone(), targets, 3, 128, 0)
    again, _ = augment(images.clone(), targets, 3, 128, 0)
    other, _ = augment(images.clone(), targets, 3, 256, 0)
    assert torch.equal(first, again) and not torch.equal(first, other) and unchanged is targets
    assert 0.2 < first.flatten(1).any(1).float().mean() < 0.3
    none = opencv_config("", "AUG.REPROB", 0.0)
    assert build_augmentation(none, 0, "cpu").erasing is None
    pil = digits_config("AUG.REPROB", 0.5)  # erased by the transform already
    assert build_augmentation(pil, 0, "cpu").erasing is None


def test_a_missing_opencv_is_one_clear_message(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "data.opencv.transforms", None)
    with pytest.raises(ConfigError, match="DATA.BACKEND opencv: .*pip install opencv-python"):
        build_loaders(opencv_config(data, "DATA.NUM_WORKERS", 0, batch_size=4))
