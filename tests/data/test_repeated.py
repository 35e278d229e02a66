"""Repeated augmentation (AUG.REPEATED) and 3-Augment (AUG.AUTO_AUGMENT 3a)."""

import collections
import itertools

import numpy as np
import pytest
import torch
from helpers import digits_config, logged, write_images
from PIL import Image, ImageFilter, ImageOps
from timm.data.distributed_sampler import RepeatAugSampler

from data import build_loaders
from data.loaders import build_reader
from data.samplers import TrainBatchSampler
from distributed import seeded


def sampler_of(length, batch_size, rank=0, world_size=1, accumulation=1, repeats=3):
    sampler = TrainBatchSampler(length, batch_size, accumulation, rank, world_size, seed=0)
    sampler.repeats = repeats
    return sampler


@pytest.mark.parametrize("repeats, world_size", [(3, 1), (3, 4), (2, 3), (5, 2)])
def test_each_process_takes_the_images_that_timms_sampler_gives_it(monkeypatch, repeats, world_size):
    length, batch_size = 512, 16
    order = np.random.default_rng([0, 7]).permutation(length)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.from_numpy(order))
    for rank in range(world_size):
        sampler = sampler_of(length, batch_size, rank, world_size, repeats=repeats)
        sampler.start(7)
        ours = [index for batch in sampler for _, index, _ in batch]
        timms = list(RepeatAugSampler(range(length), world_size, rank, num_repeats=repeats))
        assert len(ours) == length // (batch_size * world_size) * batch_size
        assert ours == timms[: len(ours)]


def test_an_epoch_takes_a_third_of_the_images_three_times_each():
    keys = list(itertools.chain(*sampler_of(96, 8)))
    assert len(keys) == len(set(keys)) == 96
    counts = collections.Counter(index for _, index, _ in keys)
    assert len(counts) == 32 == sampler_of(96, 8).images_of_an_epoch() and set(counts.values()) == {3}
    assert {repeat for *_, repeat in keys} == {0, 1, 2}
    other = sampler_of(96, 8)
    other.start(1)
    assert {index for _, index, _ in itertools.chain(*other)} != set(counts)


def test_what_is_left_of_an_epoch_is_the_rest_of_it_for_other_processes_too():
    whole = list(itertools.chain(*sampler_of(100, 8)))
    rest = []
    for rank in range(2):
        sampler = sampler_of(100, 2, rank, 2, accumulation=2)
        sampler.start(0, images=40)
        rest += itertools.chain(*sampler)
        first = list(itertools.islice(sampler, 2, 4))
        assert sampler.indices_of(1) == [index for batch in first for _, index, _ in batch]
    assert sorted(rest) == sorted(whole[40:])


def test_without_repeats_nothing_changes():
    order = np.random.default_rng([0, 0]).permutation(50)[:48]
    batches = [key for rank in range(2) for batch in sampler_of(50, 6, rank, 2, repeats=1) for key in batch]
    expected = order.reshape(-1, 2, 6).swapaxes(0, 1).flatten().tolist()
    assert batches == [(0, index) for index in expected]


def test_each_repeat_is_augmented_differently_whatever_the_workers(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split, 4)
    found = []
    for workers in (0, 2):
        opts = ["AUG.REPEATED", 3, "DATA.NUM_WORKERS", workers, "AUG.AUTO_AUGMENT", "3a", "AUG.HFLIP", 0.5]
        loader, sampler, *_ = build_loaders(digits_config(*opts, data_path=str(tmp_path), batch_size=12))
        with logged() as lines:
            loader.report()
        assert "an epoch takes 4 of these images" in lines[-1]
        ((images, targets),) = loader
        found.append(images)
    assert torch.equal(*found)
    for copies, labels in zip(found[0].unflatten(0, (4, 3)), targets.unflatten(0, (4, 3))):
        assert len(set(labels.tolist())) == 1
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(copies, 2))


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_3_augment_is_grey_solarise_or_blur_a_third_of_the_time_each(tmp_path, backend):
    path, rng = str(tmp_path / "image.png"), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    image.save(path)
    plain = ["AUG.HFLIP", 0.0, "AUG.COLOR_JITTER", 0.0, "AUG.AUTO_AUGMENT", "3a", "DATA.BACKEND", backend]
    read, transform = build_reader(digits_config(*plain), is_train=True)
    augment = next(step for step in transform.transforms if type(step).__name__ == "AutoAugment")
    grey, solarised = np.asarray(image.convert("L")), np.asarray(ImageOps.solarize(image, 128))
    blurred = [np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).std() for radius in (0.1, 2.0)]
    counts = collections.Counter()
    for seed in range(300):
        with seeded("test", seed):
            result = np.asarray(augment(image if backend == "pil" else np.asarray(image)))
        if np.array_equal(result, np.dstack([grey] * 3)):
            counts["grey"] += 1
        elif np.array_equal(result, solarised):
            counts["solarised"] += 1
        else:
            counts["blurred"] += blurred[1] - 1 <= result.std() <= blurred[0] + 1
    assert sum(counts.values()) == 300
    assert all(70 <= counts[name] <= 130 for name in ("grey", "solarised", "blurred")), counts
    jitter = build_reader(digits_config(*plain, "AUG.COLOR_JITTER", 0.3), is_train=True)[1]
    assert len(jitter.transforms) == len(transform.transforms) + 1  # as in DeiT III, beside the three
