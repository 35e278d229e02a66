"""Datasets, transforms, samplers and mixup."""

import itertools
import os
import random
import resource
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from helpers import digits_config, write_images
from PIL import Image, ImageDraw
from torchvision.transforms import InterpolationMode

from checkpoint import class_difference
from config import ConfigError
from data import DataError, build_loaders
from data.datasets import TrainingSamples, build_dataset, list_folder
from data.samplers import TrainBatchSampler, evaluation_shard
from data.transforms import (
    aspect_box,
    build_augmentation,
    build_transform,
    covering_size,
    normalization,
    posterize_from_0_bits,
)
from distributed import seed_everything, seeded

FULL_RECIPE = ["AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.HFLIP", 0.5, "AUG.REPROB", 0.5]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "train", 8)
    write_images(tmp_path / "val", 3, seed=1)
    return str(tmp_path)


def batches(folder, workers, *opts):
    config = digits_config("DATA.NUM_WORKERS", workers, *FULL_RECIPE, *opts, data_path=folder, batch_size=4)
    return list(build_loaders(config)[0])


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_augmentation_is_the_same_for_any_number_of_workers(folder, backend):
    alone, with_workers = (batches(folder, workers, "DATA.BACKEND", backend) for workers in (0, 2))
    assert len(alone) == len(with_workers) == 6
    for (a, x), (b, y) in zip(alone, with_workers):
        assert torch.equal(a, b) and torch.equal(x, y) and a.dtype == torch.float32


def test_loading_leaves_the_generators_of_the_training_process_where_they_are(folder):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    config = digits_config("DATA.NUM_WORKERS", 0, *FULL_RECIPE, data_path=folder, batch_size=4)
    loading = iter(build_loaders(config)[0])
    next(loading)  # the first asks torch for a seed of workers
    seed_everything("test", 0)
    expected = draw()
    seed_everything("test", 0)
    next(loading)
    assert draw() == expected


def test_an_image_is_augmented_differently_in_other_epochs_and_for_other_seeds(folder):
    config = digits_config(*FULL_RECIPE)
    dataset = build_dataset(folder, "train", build_transform(config, is_train=True))
    places = [(0, 0, 5), (0, 1, 5), (1, 0, 5)]  # seed, epoch, image
    images = [TrainingSamples(dataset, seed, skip=False)[place][0] for seed, *place in places]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(images, 2))
    assert torch.equal(images[1], TrainingSamples(dataset, 0, skip=False)[1, 5][0])


def test_what_replaces_a_broken_image_depends_on_seed_and_epoch():
    class Numbers(list):
        def __getitem__(self, index):
            if index == 5:
                raise DataError("broken")
            return index, 0

    places = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]  # seed, epoch
    *found, again = (
        TrainingSamples(Numbers(range(999)), seed, skip=True)[epoch, 5] for seed, epoch in places
    )
    assert found[0] == again and len({index for index, *_ in found}) == 4
    assert all(failed == [5] for *_, failed in found)


def test_purposes_draw_different_numbers():
    found = []
    for purpose, number in (("dropout", 0), ("mixup", 0), ("mixup", 1)):
        with seeded(purpose, number):
            found += [torch.rand(1).item(), random.random(), np.random.rand()]
    assert len(set(found)) == 9


PLAIN = ["AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.0, "AUG.HFLIP", 0.0]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_images_are_flipped_with_their_probability(size, probability):
    config = digits_config(*PLAIN, "DATA.IMG_SIZE", size, "AUG.HFLIP", probability)
    transform = build_transform(config, is_train=True)
    brighter_to_the_right = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    for seed in range(20):
        with seeded("test", seed):
            columns = transform(brighter_to_the_right)[0, 8:-8].mean(0)
        assert (columns[8] > columns[-8]) == bool(probability)


@pytest.mark.parametrize("size", [16, 64])
def test_training_takes_whole_images_where_it_does_not_crop(size):
    config = digits_config(*PLAIN, "DATA.IMG_SIZE", size, "AUG.CROP", False)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    mean, std = (np.float32(values)[:, None, None] for values in normalization(3))
    wanted = (pixels.transpose(2, 0, 1) / np.float32(255) - mean) / std
    found = build_transform(config, is_train=True)(Image.fromarray(pixels))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_images_are_erased_with_their_probability(probability):
    config = digits_config(*PLAIN, "DATA.IMG_SIZE", 64, "AUG.REPROB", probability)
    transform, grey = build_transform(config, is_train=True), Image.new("RGB", (256, 256), (128, 128, 128))
    for seed in range(20):
        with seeded("test", seed):
            assert (transform(grey)[0].unique().numel() > 1) == bool(probability)


def test_loading_in_the_training_process_leaves_its_random_numbers_alone(folder):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    batches(folder, 0)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_the_recipe_survives_posterize_to_0_bits():
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    assert posterize_from_0_bits(image, 0).getextrema() == ((0, 0), (0, 0), (0, 0))
    assert posterize_from_0_bits(image, 1).getpixel((0, 0)) == (128, 0, 0)
    assert posterize_from_0_bits(image, 8) is image
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m10-mstd101-inc1-n9", "original", "augmix-m10-mstd101"):
        transform = build_transform(digits_config("AUG.AUTO_AUGMENT", policy), is_train=True)
        random.seed(0), np.random.seed(0)
        for _ in range(60):
            assert transform(image).shape == (3, 32, 32)


def test_an_update_sees_the_same_images_however_it_is_spread():
    def updates(batch_size, accumulation, world_size):
        ranks = [
            list(TrainBatchSampler(50, batch_size, accumulation, rank, world_size, seed=1))
            for rank in range(world_size)
        ]
        assert {len(micro_batches) for micro_batches in ranks} == {len(ranks[0])}
        flat = [key for step in zip(*ranks) for micro_batch in step for key in micro_batch]
        return [sorted(flat[i : i + 12]) for i in range(0, len(flat), 12)]

    expected = updates(12, 1, 1)
    assert len(expected) == 4 and len({key for update in expected for key in update}) == 48
    for spread in ((4, 3, 1), (6, 1, 2), (2, 2, 3), (3, 4, 1)):
        assert updates(*spread) == expected


def test_epochs_and_seeds_are_permuted_differently():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = TrainBatchSampler(100, 10, 1, 0, 1, seed)
        sampler.start(epoch)
        orders.append([index for batch in sampler for _, index in batch])
        assert sorted(orders[-1]) == list(range(100))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_image_is_evaluated_by_exactly_one_process(world_size):
    shards = [index for rank in range(world_size) for index in evaluation_shard(5, rank, world_size)]
    assert sorted(shards) == list(range(5))


def test_mixup_depends_on_seed_epoch_step_and_rank_only():
    opts = ["AUG.MIXUP", 0.8, "AUG.CUTMIX", 1.0, "SEED"]
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    places = [(0, 0, 5), (0, 0, 5), (0, 0, 6), (0, 1, 5), (1, 0, 5)]  # seed, rank, step
    mixed = [
        build_augmentation(digits_config(*opts, seed), rank, "cpu")(images.clone(), targets, 0, step)
        for seed, rank, step in places
    ]
    assert torch.equal(mixed[0][0], mixed[1][0]) and torch.equal(mixed[0][1], mixed[1][1])
    assert all(not torch.equal(mixed[0][0], other) for other, _ in mixed[2:])
    torch.testing.assert_close(mixed[0][1].sum(1), torch.ones(4))


def test_mixup_of_probability_0_smooths_labels_only_and_there_is_none_when_both_parameters_are_0():
    config = digits_config(
        "AUG.MIXUP", 0.8, "AUG.MIXUP_PROB", 0.0, "MODEL.LABEL_SMOOTHING", 0.2, "MODEL.NUM_CLASSES", 4
    )
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([3, 0, 2, 2])
    found, soft = build_augmentation(config, 0, "cpu")(images.clone(), targets, 0)
    assert torch.equal(found, images)
    torch.testing.assert_close(soft, 0.8 * torch.eye(4)[targets] + 0.2 / 4)
    off = digits_config("AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)
    assert build_augmentation(off, 0, "cpu").mixup is None


NORMALIZE = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (97, 133), (256, 256), (50, 390)])
def test_evaluation_at_a_square_size_is_torchvisions_resize_and_centre_crop(shape):
    image = Image.effect_noise(shape, 90).convert("RGB")
    transform = build_transform(digits_config("DATA.IMG_SIZE", 96), is_train=False)
    resize = torchvision.transforms.Resize(int(256 / 224 * 96), InterpolationMode.BICUBIC)
    steps = [resize, torchvision.transforms.CenterCrop(96), torchvision.transforms.ToTensor(), NORMALIZE]
    assert torch.equal(transform(image), torchvision.transforms.Compose(steps)(image))


@pytest.mark.parametrize("cover", [(256, 256), (109, 256), (256, 73), (40, 1000)])
def test_an_image_covers_both_sides_with_its_aspect_kept_and_is_no_larger(cover):
    rng = random.Random(0)
    for _ in range(300):
        _, _, width, height = aspect_box(rng.randrange(1, 5000), rng.randrange(1, 5000), cover)
        rows, columns = covering_size(width, height, cover)
        assert rows >= cover[0] and columns >= cover[1] and (rows == cover[0] or columns == cover[1])
        scale = max(Fraction(cover[0], height), Fraction(cover[1], width))
        assert (rows, columns) == (int(scale * height), int(scale * width))


@pytest.mark.parametrize("size", [[112, 224], [224, 112]])
def test_the_crop_of_two_sides_has_the_same_margins(size):
    """As for a square, an eighth of the resized image is left out of the side that just covers."""
    width, height = image_size = [side * 256 // 224 for side in reversed(size)]
    transform = build_transform(digits_config("DATA.IMG_SIZE", size), is_train=False)
    for margin, edge in ((0, 1.0), (1, 0.0)):
        image, (left, top) = Image.new("L", image_size), (width // 16 + margin, height // 16 + margin)
        image.paste(255, (left, top, width - left, height - top))
        out = transform(image.convert("RGB"))[0] * 0.229 + 0.485
        assert out.shape == tuple(size)
        for side in (out[0], out[-1], out[:, 0], out[:, -1]):
            torch.testing.assert_close(side, torch.full(side.shape, edge))


def aspects_of_a_disc(size, seeds=40):
    """Width over height of a disc as training at ``size`` shows it."""
    image = Image.new("RGB", (400, 400))
    ImageDraw.Draw(image).ellipse((195, 195, 205, 205), fill=(255, 255, 255))
    transform = build_transform(digits_config(*PLAIN, "DATA.IMG_SIZE", size), is_train=True)
    for seed in range(seeds):
        with seeded("test", seed):
            bright = transform(image)[0] > 0
        rows, columns = bright.any(1), bright.any(0)
        if rows.any() and not (rows[0] or rows[-1] or columns[0] or columns[-1]):
            yield columns.sum().item() / rows.sum().item()


@pytest.mark.parametrize("size", [[240, 240], [160, 320], [320, 160]])
def test_training_stretches_images_by_a_third_at_most_whatever_the_size(size):
    aspects = list(aspects_of_a_disc(size))
    assert len(aspects) > 10 and 0.6 < min(aspects) < 0.95 and 1.05 < max(aspects) < 1.6


@pytest.mark.parametrize("size", [[32, 48], [100, 20]])
def test_up_to_32_px_on_the_short_side_the_whole_image_is_resized(size):
    rows, columns = size
    image = Image.effect_noise((90, 70), 90).convert("RGB")
    whole = torchvision.transforms.ToTensor()(image.resize((columns, rows), Image.Resampling.BICUBIC))
    config = digits_config(*PLAIN, "DATA.IMG_SIZE", size)
    torch.testing.assert_close(build_transform(config, is_train=False)(image), NORMALIZE(whole))
    padded = torch.nn.functional.pad(whole, (4,) * 4)
    crops = [NORMALIZE(padded[:, y : y + rows, x : x + columns]) for y in range(9) for x in range(9)]
    found = build_transform(config, is_train=True)(image)
    assert any(torch.allclose(found, crop, atol=1e-5) for crop in crops)


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-m9-q5", "randm", "augmixx"])
def test_a_wrong_augmentation_string_names_its_key(policy):
    with pytest.raises(ConfigError, match="AUG.AUTO_AUGMENT is"):
        build_transform(digits_config("AUG.AUTO_AUGMENT", policy), is_train=True)


def refusal(folder, **changes):
    with pytest.raises(DataError) as error:
        build_loaders(digits_config("DATA.NUM_WORKERS", 0, data_path=str(folder), **changes))
    return str(error.value)


def test_folders_that_cannot_be_used_are_named(tmp_path):
    assert "give --data-path" in refusal("")
    assert f"{tmp_path / 'none' / 'val'} is not a folder" in refusal(tmp_path / "none")
    os.makedirs(tmp_path / "val")
    assert "no class folders" in refusal(tmp_path)
    write_images(tmp_path / "val", 0)
    assert "no images" in refusal(tmp_path)
    write_images(tmp_path / "val", 1)
    assert f"{tmp_path / 'train'} is not a folder" in refusal(tmp_path)
    write_images(tmp_path / "train", 2, classes=("a", "b", "d"))
    assert "different classes" in refusal(tmp_path) and "c, d" in refusal(tmp_path)
    os.rename(tmp_path / "train" / "d", tmp_path / "train" / "c")
    assert "6 images, fewer than an update takes: 8 per process" in refusal(tmp_path, batch_size=8)
    os.makedirs(tmp_path / "train" / "e"), os.makedirs(tmp_path / "val" / "e")
    assert f"{tmp_path / 'train' / 'e'} holds no images" in refusal(tmp_path, batch_size=2)


def tree(folder, *paths):
    """Write empty files below a folder; ``a -> b`` is a link."""
    for path in paths:
        name, _, target = path.partition(" -> ")
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        if target:
            os.symlink(target, folder / name)
        else:
            (folder / name).touch()
    return str(folder)


def test_images_are_found_in_torchvisions_order(tmp_path):
    root = tree(
        tmp_path, "val/b/2.png", "val/b/10.PNG", "val/b/d/1.jpg", "val/b/d/.x.webp", "val/b-c/1.tif",
        "val/b/d-e/1.ppm", "val/b/D/1.bmp", "val/b/d/f.jpg/1.pgm", "val/b/.hidden/1.jpeg", "val/b/d/a.txt",
        "val/A/1.png", "other/z/1.png", "other/y/1.png", "val/b/linked -> ../../other/z",
        "val/c -> ../other/y", "val/b/again -> d", "val/A/lost.png -> nowhere", "val/A/.#lock -> me@here",
    )  # fmt: skip
    expected = torchvision.datasets.ImageFolder(os.path.join(root, "val"))
    expected.samples = [sample for sample in expected.samples if "/.hidden/" not in sample[0]]
    found = build_dataset(root, "val", None)
    assert found.samples == expected.samples and len(found.samples) == 15
    assert found.targets == [target for _, target in expected.samples]
    assert found.classes == expected.classes == ["A", "b", "b-c", "c"]


def test_hidden_folders_and_notes_of_a_mac_are_no_images(tmp_path):
    root = tree(
        tmp_path, "val/a/1.png", "val/a/.cache/1.png", "val/a/b/.trash/b/2.png", "val/a/._1.png",
        "val/a/b/._2.JPG", "val/a/.shown.png", "val/._3.png",
    )  # fmt: skip
    dataset = build_dataset(root, "val", None)
    assert [os.path.basename(path) for path in dataset.paths] == [".shown.png", "1.png"]
    assert dataset.ignored == {"hidden folders": 2, "notes of a Mac (._*)": 3}


def test_a_single_class_is_refused_unless_it_is_asked_for(tmp_path):
    def found(*opts):
        return build_loaders(digits_config(*opts, data_path=str(tmp_path), batch_size=1))[3]

    for split in ("train", "val"):
        tree(tmp_path / split, "images/cat/1.png", "images/dog/1.png", "images/.git/1")
    advice = "holds the folders cat, dog: if they are the classes, --data-path must hold val/cat and not "
    with pytest.raises(DataError, match=f"has a single class, images; .*val/images {advice}val/images/cat;"):
        found()
    assert found("MODEL.NUM_CLASSES", 1) == ["images"]
    tree(tmp_path / "val/images", "train/1", "val/1")
    with pytest.raises(DataError, match=f"take --data-path {tmp_path}/val/images; MODEL.NUM_CLASSES 1 asks"):
        found()
    for split in ("train", "val"):
        tree(tmp_path / split, "more/1.png")
    assert found() == ["images", "more"]
    write_images(tmp_path / "flat" / "val", 1, classes=("a",))  # without folders in the class
    words = "val has a single class, a; MODEL.NUM_CLASSES 1 asks for a single class"
    assert refusal(tmp_path / "flat").endswith(words)


@pytest.mark.parametrize("off", ["", "set/train"])
def test_a_data_path_that_is_a_folder_off_is_told(tmp_path, off):
    tree(tmp_path, "set/train/a/1.png", "set/train/b/1.png", "set/val/a/1.png", "set/val/b/1.png", "z/1", "1")
    assert refusal(tmp_path / off).endswith(f"; {tmp_path}/set does: --data-path {tmp_path}/set")
    assert "does:" not in refusal(tmp_path / "z")


def test_a_set_within_a_set_is_told(tmp_path, caplog):
    root = tree(tmp_path, "train/a/1.png", "train/val/1.png", "train/train/a/1.png", "train/train/b/1.png")
    build_dataset(root, "train", None).report()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{root}/train/train, which holds folders, is taken for a class")


def test_names_in_two_unicode_forms_are_told_apart(tmp_path):
    composed, apart = "caf\xe9", "cafe\u0301"
    for folder in (f"train/{composed}", "train/x", f"val/{apart}", "val/x", "val/y"):
        tree(tmp_path, f"{folder}/1.png")
    words = refusal(tmp_path)
    assert "'caf\\xe9', 'cafe\\u0301', 'y';" in words and "(NFC and NFD): rename" in words
    assert "'cafe\\u0301' and 'caf\\xe9' are both" in class_difference([composed, "x"], [apart, "x"])
    assert "Unicode" not in class_difference(["caf\xe8"], [composed])


@pytest.mark.parametrize(
    "images, batch, accumulation, advice",
    [
        (150, 100, 1, "--batch-size 75 leaves out fewer"),
        (23, 10, 1, "--batch-size 11 leaves out fewer"),
        (23, 10, 2, "--batch-size 11 leaves out fewer"),
        (23, 2, 6, "a lower TRAIN.ACCUMULATION_STEPS leaves out fewer"),
        (100, 90, 1, None),
        (100, 50, 1, None),
    ],
)
def test_more_than_a_tenth_left_out_is_a_warning_with_a_better_batch_size(
    tmp_path, caplog, images, batch, accumulation, advice
):
    tree(tmp_path, *(f"{split}/{i % 2}/{i}.png" for split in ("train", "val") for i in range(images)))
    opts = ["DATA.NUM_WORKERS", 0, "TRAIN.ACCUMULATION_STEPS", accumulation]
    train = build_loaders(digits_config(*opts, data_path=str(tmp_path), batch_size=batch))[0]
    with caplog.at_level("INFO"):
        train.report()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == bool(advice)
    assert not advice or told[0].endswith(f"{accumulation} accumulated: {advice}")


def test_workers_are_as_many_as_the_cores_and_the_log_says_so(folder, caplog, monkeypatch):
    def workers(asked, **environment):
        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level("INFO"):
            patch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
            for key, value in environment.items():
                patch.setenv(key, value)
            config = digits_config("DATA.NUM_WORKERS", asked, data_path=folder, batch_size=4)
            train, _, val, _ = build_loaders(config)
            train.report(), val.report()
        assert train.loader.num_workers == val.loader.num_workers
        return train.loader.num_workers, [line for line in caplog.messages if "NUM_WORKERS" in line]

    assert workers(0) == (0, []) and workers(6) == (6, [])
    assert workers(8) == (6, ["DATA.NUM_WORKERS 8 -> 6, the cores of each process"])
    assert workers(8, LOCAL_WORLD_SIZE="2")[0] == 3 and workers(8, LOCAL_WORLD_SIZE="7")[0] == 1


def test_links_to_a_parent_do_not_multiply_images(tmp_path):
    root = tree(
        tmp_path, "val/a/1.png", "val/a/self -> .", "val/a/sub/2.png", "val/a/sub/up -> ..",
        "val/a/sub/top -> ../../..", "val/a/far -> ../../far/x", "far/x/3.png", "far/x/up -> ..", "far/4.png",
    )  # fmt: skip
    dataset = build_dataset(root, "val", None)
    assert [os.path.basename(path) for path, _ in dataset.samples] == ["1.png", "3.png", "2.png"]
    assert dataset.ignored == {"links to folders that hold them": 4}
    os.symlink("..", tmp_path / "val" / "b")
    with pytest.raises(DataError, match="val/b is a link to a folder that holds it: remove it"):
        build_dataset(root, "val", None)


@pytest.mark.parametrize("link", ["val/b -> nowhere", "val/b -> b", "val/a/b -> nowhere", "val/a/b/c -> c"])
def test_links_that_lead_nowhere_are_named(tmp_path, link):
    root = tree(tmp_path, "val/a/1.png", link)
    with pytest.raises(DataError, match=f"cannot follow {tmp_path / link.split()[0]} "):
        build_dataset(root, "val", None)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    tree(tmp_path, "val/a/1.png")
    here = os.open(tmp_path / "val" / "a", os.O_RDONLY)
    for _ in range(20):  # deeper than a path may be long
        os.mkdir("x" * 250, dir_fd=here)
        below = os.open("x" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(DataError, match=f"cannot follow {tmp_path}/val/a/xxx.*File name too long"):
        build_dataset(str(tmp_path), "val", None)


def test_what_is_found_and_ignored_is_said(tmp_path, caplog):
    for split in ("train", "val"):
        tree(
            tmp_path / split, *(f"a/{i}.png" for i in range(7)), "b/1.JPG", "b/1.HEIC", "b/2.heic",
            "b/3.avif", "b/deep/4.svg", "b/README", "c.txt", "7.png", ".git/8.png",
        )  # fmt: skip
    config = digits_config("DATA.NUM_WORKERS", 0, data_path=str(tmp_path), batch_size=3)
    train, _, val, _ = build_loaders(config)
    with caplog.at_level("INFO"):
        train.report(), val.report()
    ignored = ".heic 2, .avif 1, .svg 1, .txt 1, hidden folders 1, images outside the class folders 1"
    found, left, found_in_val = caplog.messages
    for message, split in ((found, "train"), (found_in_val, "val")):
        beginning, listed = message.split("; ignored: ")
        assert beginning == f"{tmp_path}/{split}: 8 images in 2 classes"
        assert sorted(listed.split(", ")) == sorted([*ignored.split(", "), "no ending 1"])
    assert left == (
        "2 of these images, others each time, are left out of an epoch: they do not fill an update of 3 per "
        "process, 1 processes, 1 accumulated: --batch-size 2 leaves out fewer"
    )


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_a_good_image_is_not_blamed_where_no_file_descriptors_are_left(backend, data):
    """With ON_ERROR skip it would be left out, one after another."""
    config = digits_config("DATA.BACKEND", backend, "DATA.ON_ERROR", "skip", data_path=str(data))
    train, _, val, _ = build_loaders(config)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as last:
        free = last.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        for samples, key in ((train.loader.dataset, (0, 1)), (val.loader.dataset, 1)):
            with pytest.raises(OSError, match="Too many open files"):
                samples[key]
        with pytest.raises(OSError, match="Too many open files"):
            list_folder(str(data))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
