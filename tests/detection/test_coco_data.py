"""COCO files as they are found: ids, masks, many objects; and what training and evaluation take of them."""

import json
import math
import multiprocessing
import os
import random

import numpy as np
import pytest
import torch
from helpers import coco_config, write_set
from PIL import Image
from pycocotools import mask as coco_mask
from test_coco import detections_of, keep, small_content, used
from torch import nn

import detect
from data import DataError
from detection.dataset import build_detection_dataset
from detection.evaluation import average_precision
from detection.loaders import build_detection_loaders
from detection.transforms import build_detection_transform, take_masks
from distributed import Compute, seeded


@pytest.mark.parametrize("ids", [[0, 1, 0, 1, 0, 1], [-1, -7, -1, 0, 3, -(2**70)], [None] * 6, "abcabc"])
def test_annotations_are_numbered_by_us(small, ids):
    """Perfect detections get 100%, which :func:`used` asserts, whatever the ids are, or without them."""
    content = small_content()
    content["annotations"] = [dict(item, id=number) for item, number in zip(content["annotations"] * 2, ids)]
    for item in content["annotations"]:
        if item["id"] is None:
            del item["id"]
    assert len(used(small, content).annotations.kept()) == 6


FAR = "with a polygon far larger than an image"
FILL = "with a mask that does not fill the image"
DAMAGED = [
    (FAR, [[1e9, 1, 1e9, 9, 1e9, 5]]),
    (FAR, [[-1e9, -1e9, 1e9, -1e9, 0, 1e9]]),
    (FAR, [[0, 0, 9e5, 9e5] * 9]),
    (FAR, [[-9e5, 0, 9e5, 0, 9e5, 5, -9e5, 5]]),
    ("with a polygon of fewer than three points", [[1, 1, float("nan"), 1, 6, 7]]),
    ("with a polygon of fewer than three points", [[1, 1, 1e300, 1, 6, 7]]),
    (FILL, dict(size=[8, 8], counts=[9, 9])),
    (FILL, dict(size=[8, 8], counts=[64, 64])),
    (FILL, dict(size=[8, 8], counts=[-9, 73])),
    (FILL, dict(size=[8, 8], counts=[10**12, -(10**12) + 64])),
    (FILL, dict(size=[8, 8], counts="99")),  # 18 pixels
    (FILL, dict(size=[8, 8], counts="o" * 40 + "0")),
    (FILL, dict(size=[8, 8], counts="T3N")),  # 100 and -2
    (FILL, dict(size=[8, 8], counts="P20P20P20P20")),  # 64 each
]


def test_masks_that_pycocotools_cannot_take_never_reach_it(small):
    """In a process of its own: pycocotools would end it with a signal."""

    def use():
        torch.set_num_threads(1)
        for crowd in (0, 1):
            content = small_content()
            template = dict(content["annotations"][0], iscrowd=crowd)
            content["annotations"] += [
                dict(template, id=100 + i, segmentation=shape) for i, (_, shape) in enumerate(DAMAGED)
            ]
            annotations = used(small, content).annotations
            expected = {}
            for i, (problem, _) in enumerate(DAMAGED):
                expected.setdefault(problem, []).append(100 + i)
            assert annotations.problems == expected
            assert [item["id"] for item in annotations.kept()] == [5, 7, 9, 6]

    process = multiprocessing.get_context("fork").Process(target=use)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_categories_are_by_id_with_gaps_double_names_numbers_for_names_and_ids_of_text(small):
    for ids in ([90, 7, 13], ["zebra", "ant", "cow"]):
        content = small_content()
        for item in content["annotations"]:
            item["category_id"] = ids[item["category_id"] - 1]
        content["categories"] = [dict(id=number, name=name) for number, name in zip(ids, ("x", 1.5, "x"))]
        annotations = used(small, content).annotations
        order = [ids[1], ids[2], ids[0]]
        assert annotations.labels == {number: i + 1 for i, number in enumerate(order)}
        assert [category["name"] for category in annotations.categories] == ["1.5", "x", "x"]
        results = detections_of(annotations, 0, random.Random(0))
        assert [result["category_id"] for result in results] == [ids[0], ids[2], ids[1]]
        # Those of one category wrong: it alone suffers, however it is called.
        wrong = [dict(r, bbox=[0, 0, 1, 1]) if r["category_id"] == ids[0] else r for r in results]
        _, rows = average_precision(annotations.as_coco(), wrong, [0, 1])
        assert [(name, round(box)) for name, box, _ in rows] == [("1.5", 100), ("x", 100), ("x", 0)]


@pytest.mark.parametrize("key, value, shown", [("id", "1", "'a' with the id 1"), ("name", "b", "'[ab]'")])
def test_training_and_validation_have_the_same_categories(tmp_path, key, value, shown):
    content = write_set(tmp_path, [(40, 40, "object")])
    content["categories"][0][key] = value
    for item in content["annotations"] if key == "id" else []:
        item["category_id"] = value
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"have different categories: only one of them has {shown}"):
        build_detection_loaders(coco_config("shapes", "DATA.DATA_PATH", tmp_path, "DATA.NUM_WORKERS", 0))


SIZES = [(7, 3000), (3000, 7), (1, 500), (33, 47), (101, 37), (246, 108), (342, 292)]
RECIPE = dict(MIN_SIZES=[96, 123], MAX_SIZE=176, CROP_MIN_SIZES=[60, 81], CROP_SIZES=[30, 70])


def pick(low, high):
    return int(torch.randint(low, high + 1, ()))


def expected_resize(image, masks, boxes, sides, longest):
    """A random resize of arrays (3, H, W), (M, H, W) and a list of boxes, with a loop over each axis."""
    size = image.shape[1:]
    short = sides[pick(0, len(sides) - 1)]
    scale = min(short / min(size), longest / max(size))
    new = [max(1, int(side * scale + 0.5)) for side in size]
    assert max(new) <= longest and min(new) >= 1
    for axis in (0, 1):
        old_side, side = size[axis], new[axis]
        ratio = old_side / side
        # The weights of an antialiased triangle over the old pixels.
        weights = np.zeros((side, old_side))
        for i in range(side):
            for j in range(max(0, int((i - 1) * ratio - 1)), min(old_side, math.ceil((i + 2) * ratio + 1))):
                weights[i, j] = max(0, 1 - abs(j + 0.5 - (i + 0.5) * ratio) / max(ratio, 1))
            weights[i] /= weights[i].sum()
        image = np.moveaxis(weights @ np.moveaxis(image, axis + 1, 1), 1, axis + 1)
        masks = masks.take([i * old_side // side for i in range(side)], axis=axis + 1)
    rows, columns = new[0] / size[0], new[1] / size[1]
    return image, masks, [[x1 * columns, y1 * rows, x2 * columns, y2 * rows] for x1, y1, x2, y2 in boxes]


def expected_crop(image, masks, boxes, low, high):
    """A random crop, likewise."""
    (top, height), (left, width) = [
        (pick(0, side - length), length)
        for side in image.shape[1:]
        for length in [pick(min(side, low), min(side, high))]
    ]
    boxes = [
        [
            *(min(max(x1 - left, 0), width), min(max(y1 - top, 0), height)),
            *(min(max(x2 - left, 0), width), min(max(y2 - top, 0), height)),
        ]
        for x1, y1, x2, y2 in boxes
    ]
    area = np.s_[:, top : top + height, left : left + width]
    return image[area], masks[area], boxes


def expected_augmentation(image, masks, boxes):
    """The recipe, drawn from torch in the order of its steps: image, masks, boxes, and the objects left."""
    if torch.rand(1) < 0.5:
        width = image.shape[2]
        image, masks = image[:, :, ::-1], masks[:, :, ::-1]
        boxes = [[width - x2, y1, width - x1, y2] for x1, y1, x2, y2 in boxes]
    if torch.rand(1) < 0.5:
        image, masks, boxes = expected_resize(
            image, masks, boxes, RECIPE["CROP_MIN_SIZES"], RECIPE["MAX_SIZE"]
        )
        image, masks, boxes = expected_crop(image.round(), masks, boxes, *RECIPE["CROP_SIZES"])
    image, masks, boxes = expected_resize(image, masks, boxes, RECIPE["MIN_SIZES"], RECIPE["MAX_SIZE"])
    left = [
        i
        for i, (x1, y1, x2, y2) in enumerate(boxes)
        if x2 - x1 >= 1 and y2 - y1 >= 1 and any(value for row in masks[i] for value in row)
    ]
    return image, masks[left], [boxes[i] for i in left], left


def codes_of(masks):
    """Run lengths of masks (M, H, W)."""
    return [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]


@pytest.mark.parametrize("size", SIZES)
def test_augmentation_is_that_of_a_loop_over_pixels(size):
    opts = [word for key, value in RECIPE.items() for word in (f"DET.{key}", str(value))]
    transform = build_detection_transform(coco_config("shapes", *opts), is_train=True)
    rng = np.random.default_rng(size)
    height, width = size
    dropped = 0
    for seed in range(3):
        image = rng.integers(0, 256, (3, *size), dtype=np.uint8)
        boxes, masks = [], np.zeros((6, *size), np.uint8)
        for i in range(6):
            x1, x2 = sorted(rng.random(2) * width)
            y1, y2 = sorted(rng.random(2) * height)
            boxes.append([x1, y1, x2, y2] if i < 4 else [x1, y1, x1 + 0.4, y1 + 0.4])
            part = masks[i, int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)]
            part[:] = rng.random(part.shape) < (0.7 if i != 3 else 0.002)
        target = dict(boxes=torch.tensor(boxes), labels=torch.arange(1, 7), masks=codes_of(masks))
        with seeded("test", seed):
            ours, target = transform(Image.fromarray(image.transpose(1, 2, 0)), target)
        with seeded("test", seed):
            expected, masks, boxes, left = expected_augmentation(image, masks, boxes)
        assert ours.dtype == torch.uint8 and ours.shape == expected.shape
        # Rounded after each axis, and after the first of two resizes.
        assert np.abs(ours.numpy() - expected).max() < 2.6
        assert target["labels"].tolist() == [i + 1 for i in left]
        np.testing.assert_array_equal(target["masks"].numpy(), masks)
        np.testing.assert_allclose(target["boxes"].numpy(), np.reshape(boxes, (-1, 4)), atol=2e-3)
        dropped += 6 - len(left)
    assert dropped


def test_masks_are_taken_whatever_their_runs():
    """Also of objects at the edges, of none, and of runs without length, whose rectangles are too large."""
    rng = np.random.default_rng(0)
    masks = [np.zeros((9, 14), np.uint8, order="F") for _ in range(8)]
    masks[0][:], masks[1][3:5, 6:8], masks[2][8, 13], masks[3][0, 0] = 1, 1, 1, 1
    masks[4][7:, 2] = masks[4][:2, 3] = 1  # a run over the end of a column
    masks[5][:] = rng.random(masks[5].shape) < 0.1
    codes = codes_of(masks)
    # Runs of 0 pixels at the start, within and at the end; masks 6 and 7 are empty.
    for place, counts in ((3, [0, 1, 0, 0, 125, 0]), (4, [25, 2, 0, 2, 97, 0, 0]), (7, [126, 0])):
        codes[place] = coco_mask.frPyObjects(dict(size=[9, 14], counts=counts), 9, 14)
    for _ in range(20):
        rows, columns = (np.sort(rng.integers(side, size=rng.integers(1, 30))) for side in (9, 14))
        columns = columns[:: rng.choice([-1, 1])]
        found, seen = take_masks(codes, rows, columns)
        expected = np.stack(masks)[:, rows][:, :, columns]
        assert seen.tolist() == expected.any((1, 2)).tolist() and found.dtype == torch.uint8
        np.testing.assert_array_equal(found.numpy(), expected[seen.numpy()])
    assert take_masks([], rows, columns)[0].shape == (0, len(rows), len(columns))


MIXED = [(40, 50, ""), (60, 40, "object"), (40, 44, "crowd"), (31, 50, "object"), (50, 31, "object")]
MIXED += [(32, 50, "both"), (90, 32, "object"), (20, 20, ""), (40, 40, "object")]
TRAINED = [1, 5, 6, 8]


def test_training_leaves_out_images_without_objects_and_small_ones(tmp_path, caplog):
    content = write_set(tmp_path, MIXED)
    of_set = ["DATA.DATA_PATH", tmp_path, "DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", 1]
    loader, sampler, val_loader, val = build_detection_loaders(coco_config("shapes", *of_set))
    train = loader.loader.dataset.dataset
    assert train.records == [content["images"][i] for i in TRAINED] and len(train) == 4
    assert loader.paths == train.paths == [str(tmp_path / "train" / f"{i}.png") for i in TRAINED]
    assert sampler.length == len(sampler) == 4 and sampler.groups == [True, False, True, False]
    batches = [(sizes[0], *targets) for (_, sizes), targets in loader]
    assert {target["image_id"] for _, target in batches} == {record["id"] for record in train.records}
    assert all(target["labels"].tolist() == [1] for _, target in batches)  # crowds are none of them

    assert val.records == content["images"] and len(val_loader) == len(MIXED)
    batches = list(val_loader)
    assert [t["image_id"] for _, (t,) in batches] == [record["id"] for record in content["images"]]
    # Objects would be decoded and resized for nothing.
    assert all(set(target) == {"image_id", "original_size"} for _, (target,) in batches)
    with caplog.at_level("INFO"):
        loader.report()
        told = "5 images: 3 without objects, 2 with 2 objects and a side below 32 pixels, such as 3.png"
        assert f"{train.annotations.path}: not training on {told}" in caplog.text
        caplog.clear()
        val_loader.report()
        assert "9 images" in caplog.text and "not training" not in caplog.text


@pytest.mark.parametrize(
    "images, words",
    [
        ([(40, 40, "crowd"), (40, 40, "")], "train.json has no objects"),
        ([(31, 40, "object"), (40, 40, "crowd")], "every image with objects has a side below 32 pixels"),
    ],
)
def test_a_set_that_leaves_nothing_to_train_on_is_refused(tmp_path, images, words):
    write_set(tmp_path, images)
    with pytest.raises(DataError, match=words):
        build_detection_dataset(
            str(tmp_path), "train", "annotations/train.json", keep, skip=False, is_train=True
        )


class Oracle(nn.Module):
    """Finds a box of the image's own width, and nothing else of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images, sizes):
        boxes = [torch.tensor([[0.0, 0, width, height]]) for height, width in sizes]
        rest = dict(labels=torch.tensor([1]), scores=torch.tensor([0.9]), masks=torch.ones(1, 1, 28, 28))
        return [dict(rest, boxes=box) for box in boxes]


def test_evaluation_counts_every_image_and_draws_each_with_its_own_objects(tmp_path, monkeypatch, caplog):
    content = write_set(tmp_path, MIXED)
    of_set = ["DATA.DATA_PATH", tmp_path, "DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", 1]
    _, _, loader, val = build_detection_loaders(coco_config("shapes", *of_set))
    samples = []
    monkeypatch.setattr(detect, "draw_detections", lambda drawn, *_, **__: samples.extend(drawn))
    settings = coco_config("shapes", "OUTPUT", tmp_path, "DET.PICTURES", 8)
    os.makedirs(settings.OUTPUT)
    with caplog.at_level("INFO"):
        detect.evaluate(Oracle(), loader, val, Compute(torch.device("cpu")), settings)
    assert "9 images, 9 detections" in caplog.text
    with open(os.path.join(settings.OUTPUT, "detections.json"), encoding="utf-8") as file:
        results = json.load(file)
    assert [(r["image_id"], r["bbox"]) for r in results] == [
        (record["id"], [0, 0, record["width"], record["height"]]) for record in content["images"]
    ]
    assert len(samples) == 8
    for i, ((height, width, kind), (path, truth, detection)) in enumerate(zip(MIXED, samples)):
        assert path == str(tmp_path / "val" / f"{i}.png")
        assert detection["masks"].shape == (1, height, width)
        expected = [[1, 1, 6 + i, 7]] if kind in ("object", "both") else []
        assert truth["boxes"].tolist() == expected and truth["masks"].shape[1:] == (height, width)


def test_batches_depend_on_epoch_and_image_only(shapes):
    def batches(workers, epoch):
        opts = ["DATA.DATA_PATH", shapes, "DATA.NUM_WORKERS", workers, "DATA.BATCH_SIZE", 2]
        loader, sampler, _, _ = build_detection_loaders(coco_config("shapes", *opts))
        sampler.start(epoch)
        return list(loader)

    alone, with_workers = batches(0, 0), batches(2, 0)
    assert len(alone) == len(with_workers) > 5
    for ((images, sizes), targets), ((same, same_sizes), same_targets) in zip(alone, with_workers):
        assert torch.equal(images, same) and sizes == same_sizes
        for target, same_target in zip(targets, same_targets):
            for name, value in target.items():
                torch.testing.assert_close([value], [same_target[name]], rtol=0, atol=0)
    assert not torch.equal(alone[0][0][0], batches(0, 1)[0][0][0])
