"""COCO data and evaluation, and runs of detect.py on generated shapes."""

import contextlib
import functools
import io
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from helpers import Started, assert_same_run, coco_config, main_command, run_main
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import checkpoint as ckpt
from data import DataError
from data.samplers import TrainBatchSampler, group
from detection.dataset import Annotations, build_detection_dataset, runs_of
from detection.evaluation import METRICS, average_precision, table, to_results
from detection.loaders import BatchToDevice, build_detection_loaders, collate_detection
from detection.pictures import draw_detections
from detection.transforms import Transform
from logger import read_metrics

SMALL = shlex.split(
    """
    DATA.NUM_WORKERS 1 DATA.BATCH_SIZE 4 MODEL.MSG.EMBED_DIM 16 MODEL.MSG.DEPTHS [1,1,1]
    MODEL.MSG.NUM_HEADS [1,2,4] DET.CHANNELS 16 DET.BOX_FCS [32] DET.ROI_SAMPLES 8 DET.MASK_CONVS 1
    DET.MIN_SIZES [64,80] DET.TEST_SIZE 64 DET.PICTURES 3 DET.SCORE_THRESHOLD 0.0 DET.PER_IMAGE 5
    TRAIN.EPOCHS 2 TRAIN.WARMUP_STEPS 2 PRINT_FREQ 1
    """
)


def content_of(folder, split="train"):
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def write_json(tmp_path, content):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return str(path)


# Changes nothing.
keep = Transform(lambda size: [])

CFG = ["--cfg", "configs/coco/shapes.yaml"]
detect, command = (functools.partial(run, *CFG, program="detect.py") for run in (run_main, main_command))


def test_masks_and_boxes_are_those_of_pycocotools(shapes):
    dataset = build_detection_dataset(str(shapes), "train", "annotations/train.json", keep, skip=False)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(shapes / "annotations" / "train.json"))
    kinds = set()
    for index in range(len(dataset)):
        image, target = dataset[index]
        record = dataset.annotations.images[index]
        with Image.open(shapes / "train" / record["file_name"]) as file:
            np.testing.assert_array_equal(image.movedim(0, 2).numpy(), np.asarray(file))
        items = [item for item in coco.imgToAnns[record["id"]] if not item["iscrowd"]]
        kinds.update(type(item["segmentation"]) for item in items)
        assert target["boxes"].dtype == torch.float32  # whole numbers would be rounded down by every resize
        assert target["labels"].tolist() == [item["category_id"] for item in items]
        assert target["image_id"] == record["id"] and target["original_size"] == tuple(image.shape[1:])
        for item, box, mask in zip(items, target["boxes"].tolist(), target["masks"]):
            x, y, width, height = item["bbox"]
            assert box == [x, y, x + width, y + height]
            np.testing.assert_array_equal(mask.numpy(), coco.annToMask(item))
    assert kinds == {list, dict}  # polygons and run lengths
    crowds = [item for item in content_of(shapes)["annotations"] if item["iscrowd"]]
    assert crowds and len(dataset.annotations.kept()) == len(content_of(shapes)["annotations"])


def broken(**changes):
    item = dict(image_id=0, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)
    return dict(item, segmentation=[[1, 1, 10, 1, 10, 10]]) | changes


@pytest.mark.parametrize(
    "problem, item",
    [
        ("of an image that is not listed", broken(image_id=10**6)),
        ("of an unknown category", broken(category_id=77)),
        ("without a box of four numbers", broken(bbox=[1, 2, 3])),
        ("without a box of four numbers", broken(bbox=[1, 2, 3, float("nan")])),
        ("with a box of no area", broken(bbox=[5, 5, 0, 9])),
        ("with a box outside the image", broken(bbox=[5000, 5, 9, 9])),
        ("without a mask", broken(segmentation=[])),
        ("without a mask", broken(segmentation=None)),
        ("with a polygon of fewer than three points", broken(segmentation=[[1, 1, 5, 5]])),
        ("with a mask of another size than the image", broken(segmentation=dict(size=[3, 3], counts=[9]))),
        ("with a mask outside its box", broken(segmentation=[[20, 20, 30, 20, 30, 30]])),
        ("with a box between 0 and 1", broken(bbox=[0.1, 0.2, 0.5, 0.4])),
        ("with a mask between 0 and 1", broken(segmentation=[[0.1, 0.1, 0.6, 0.1, 0.6, 0.7]])),
        ("with an iscrowd other than 0 and 1", broken(iscrowd="2")),
        ("with an area that is no number", broken(area="large")),
    ],
)
def test_broken_annotations_are_left_out_and_named(tmp_path, shapes, caplog, problem, item):
    content = content_of(shapes)
    whole = len(content["annotations"])
    content["annotations"] += [dict(item, id=9000), dict(item, id=9001)]
    annotations = Annotations(write_json(tmp_path, content))
    assert annotations.problems == {problem: [9000, 9001]} and len(annotations.kept()) == whole
    with caplog.at_level("INFO"):
        annotations.report()
    image = "1000000" if item["image_id"] else content["images"][0]["file_name"]
    told = f"leaving out 2 annotations {problem} (ids 9000, 9001; the first is of {image})"
    assert told in caplog.text
    objects = sum(not item["iscrowd"] for item in annotations.kept())
    assert f": 24 images, 7 of them without objects; {objects} objects in 3 categories" in caplog.text


def changed(content, change):
    """A COCO file with a change of each of its annotations, which gets the annotation and its place."""
    for place, item in enumerate(content["annotations"]):
        item.update(change(item, place))
    return content


def told(annotations, caplog):
    """What a report says."""
    caplog.clear()
    with caplog.at_level("INFO"):
        annotations.report()
    return caplog.text


def test_boxes_that_are_shares_of_the_image_or_two_corners_are_refused(tmp_path, shapes):
    """Unless they are the smaller part of the set, where corners cannot be told from boxes."""

    def shares(item):
        return dict(bbox=[value / 999 for value in item["bbox"]])

    def corners(item):
        x, y, width, height = item["bbox"]
        return dict(bbox=[x, y, x + width, y + height])

    for change, words in (
        (shares, "annotations come with a box between 0 and 1 .*multiply x by the width"),
        (corners, r"boxes fit their masks as \[x1, y1, x2, y2\] .*write \[x1, y1, x2 - x1, y2 - y1\]"),
    ):
        content = changed(content_of(shapes), lambda item, _, change=change: change(item))
        with pytest.raises(DataError, match=r"annotations.json: \d+ of \d+ " + words) as error:
            Annotations(write_json(tmp_path, content))
        first = content["annotations"][0]
        name = next(r["file_name"] for r in content["images"] if r["id"] == first["image_id"])
        assert f"; the first is of {name})" in str(error.value)
        for item in (content := content_of(shapes))["annotations"][:3]:
            item.update(change(item))
        Annotations(write_json(tmp_path, content))


def test_crowds_are_counted_and_a_warning_where_they_are_many(tmp_path, shapes, caplog):
    content = content_of(shapes)
    few = changed(content_of(shapes), lambda item, place: dict(iscrowd=int(place == 1)))
    many = changed(content_of(shapes), lambda item, place: dict(iscrowd=place % 2))
    half, whole = len(content["annotations"]) // 2, len(content["annotations"])
    for changed_content, number, level in ((few, 1, "INFO"), (many, half, "WARNING")):
        text = told(Annotations(write_json(tmp_path, changed_content)), caplog)
        record = next(record for record in caplog.records if "crowds (" in record.message)
        assert record.levelname == level and f": {number} crowds (ids 2" in text
        assert ("set iscrowd to 0" in text) == (level == "WARNING") and whole > 10


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(iscrowd=1), r"crowds \(ids 1, 2, 3, 4, 5 ...; the first"),
        (dict(segmentation=[]), r"without a mask \(.*; docs/detection.md says what"),
    ],
)
def test_a_set_without_objects_is_refused_with_the_reason(tmp_path, shapes, change, words):
    content = changed(content_of(shapes), lambda item, place: change)
    write_json(tmp_path, content)
    with pytest.raises(DataError, match=f"has no objects: {len(content['annotations'])} {words}"):
        build_detection_dataset(str(tmp_path), "images", "annotations.json", keep, skip=False)


def test_wrong_parts_of_a_polygon_are_left_out_and_the_object_stays(small, caplog):
    content = small_content()
    content["annotations"][0]["segmentation"] += [[1, 1, 2, 2], [1e9, 1, 1e9, 9, 1e9, 5], "none"]
    annotations = used(small, content).annotations
    assert not annotations.problems and annotations.kept()[0]["segmentation"] == [[1, 1, 6, 1, 6, 7]]
    text = told(annotations, caplog)
    assert (
        "leaving out 2 parts of masks: a polygon of fewer than three points (ids 5, 5; the first is of 0.png)"
        in text
    )
    assert "leaving out 1 parts of masks: a polygon far larger than an image (ids 5;" in text


def test_objects_below_a_pixel_are_counted_and_evaluated(small, caplog):
    content = small_content()
    content["annotations"][0].update(bbox=[3, 3, 0.4, 2], segmentation=[[3.1, 3, 3.4, 3, 3.4, 5]])
    empty = dict(size=[8, 8], counts=[64])
    content["annotations"][1]["segmentation"] = empty
    annotations = Annotations(write_json(small, content))
    assert len(annotations.kept()) == 4
    assert ": 2 objects with a box below a pixel on a side, or a mask without a pixel (ids 5, 6;" in told(
        annotations, caplog
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_error(small, encoding):
    content = small_content()
    content["categories"][0]["name"] = "é"
    (small / "annotations.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert Annotations(str(small / "annotations.json")).categories[0]["name"] == "é"


def test_numbers_written_as_text_are_numbers(small):
    content = small_content()
    for item in content["annotations"]:
        item.update({key: str(item[key]) for key in ("image_id", "category_id", "area", "iscrowd")})
        item["bbox"] = list(map(str, item["bbox"]))
    content["annotations"][0]["segmentation"] = [["1", "1", "6.0", "1", "6", "7"]]
    kept = used(small, content).annotations.kept()
    assert kept == Annotations(write_json(small, small_content())).kept()
    # And the other way round: the images have text, their annotations numbers.
    content = small_content()
    for record in content["images"]:
        record["id"] = str(record["id"])
    assert {item["image_id"] for item in used(small, content).annotations.kept()} == {"0", "1"}


ODD = [None, True, -1, 0, 1.5, 1e12, 2**63, 10**400, float("nan"), float("inf"), "", "7", "a\0b", "\ud800"]
ODD += ["../..", "/etc", "$\\frac", [], [5], [[5]], [True] * 4, [1e12] * 4, [10**400] * 6, ["a"] * 6, {}]
ODD += [dict(size=5, counts=[1]), dict(size=[8, 8], counts=[32, 32]), dict(size=[8, 8], counts=[-64, 128])]
ODD += [dict(size=[8, 8], counts=text) for text in ("", "o" * 99, "01", "\u20ac", "\ud800", "P", "`0", "0`")]


def small_content():
    """A COCO file of two images and three objects, each with another kind of mask, and a crowd."""
    masks = [np.zeros((8, 8), np.uint8, order="F") for _ in range(2)]
    masks[0][2:6, 1:5], masks[1][4:, 4:] = 1, 1
    packed = coco_mask.encode(masks[0])["counts"].decode()
    runs = [36, 4, 4, 4, 4, 4, 4, 4]
    shapes = [[[1, 1, 6, 1, 6, 7]], dict(size=[8, 8], counts=packed), dict(size=[8, 8], counts=runs)]
    boxes = [[1, 1, 5, 6], [1, 2, 4, 4], [4, 4, 4, 4]]
    items = [
        dict(id=5 + i, image_id=i % 2, category_id=1 + i, bbox=box, area=16, iscrowd=0, segmentation=shape)
        for i, (box, shape) in enumerate(zip(boxes, shapes))
    ]
    return dict(
        images=[dict(id=i, file_name=f"{i}.png", height=8, width=8) for i in range(2)],
        categories=[dict(id=1 + i, name=f"kind {i}") for i in range(3)],
        annotations=[*items, dict(items[2], id=9, iscrowd=1, segmentation=shapes[2])],
    )


def with_record(section, **changes):
    """The text of a COCO file with a change of its second image or category."""
    content = small_content()
    content[section][1].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not valid JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": []}', "has no list 'categories'"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": []}', "has no file_name, height, width"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}', "lists no images"),
        (with_record("images", id=0), "two records of 'images' have the id"),
        (with_record("categories", id=1), "two records of 'categories' have the id"),
        *(
            (with_record("images", height=height), "image 1 has the height and width .*correct or remove")
            for height in (0, 8.0, "8", 10**7)
        ),
        (with_record("images", height=30000, width=30000), "image 1 has the height and width"),
    ],
)
def test_files_that_are_not_coco_are_refused(tmp_path, text, words):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"annotations.json.*{words}"):
        Annotations(str(path))


def precision_of(annotations, results):
    """Figures over all images."""
    return average_precision(annotations.as_coco(), results, [image["id"] for image in annotations.images])


def used(folder, content):
    """All that a run does with a COCO file: its dataset, and its figures for perfect detections."""
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    dataset = build_detection_dataset(str(folder), "images", path.name, keep, skip=False)
    for index in range(len(dataset)):
        dataset[index]
    annotations = dataset.annotations
    annotations.report()
    results = detections_of(annotations, 0, random.Random(0))
    figures, rows = precision_of(annotations, results)
    table(rows)
    assert figures["box_AP"] == pytest.approx(100) and figures["mask_AP"] == pytest.approx(100)
    return dataset


def test_odd_values_anywhere_in_a_coco_file_are_used_or_refused(small):
    """Or left out, with all that pycocotools is given being right: perfect detections get 100%."""
    used(small, small_content())
    outcomes, content = [], small_content()
    places = [(section, 0, key) for section in content for key in [None, *content[section][0]]]
    places += [("annotations", place, "segmentation") for place in (1, 2)]
    rng = random.Random(0)
    for section, place, key in places:
        for value in rng.sample(ODD, 12):
            content = small_content()
            if key is None:
                content[section][place] = value
            else:
                content[section][place][key] = value
            try:
                outcomes.append(used(small, content))
            except DataError as error:
                outcomes.append(error)
                assert "annotations.json" in str(error) and len(str(error)) < 600
    refused = sum(isinstance(outcome, DataError) for outcome in outcomes)
    assert 60 < refused < len(outcomes) - 60


def test_compressed_masks_are_read_as_by_pycocotools():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 9), (60, 80), (1, 70000)):
        for share in (0, 0.001, 0.3, 1):
            mask = np.asfortranarray(rng.random(size) < share, dtype=np.uint8)
            code = coco_mask.encode(mask)
            values = np.concatenate([[0], mask.flatten("F"), [2]])
            starts = np.flatnonzero(np.diff(values[:-1]))
            runs = np.diff([0, *starts, mask.size]).tolist()
            assert runs_of(code["counts"].decode()) == runs
    assert runs_of("P" * 5 + "0") == [0] and runs_of("P" * 6 + "0") == [-1]


def test_an_annotation_file_that_is_a_pipe_is_refused(small):
    os.mkfifo(small / "pipe.json")
    with pytest.raises(DataError, match="pipe.json: it is not a file"):
        build_detection_dataset(str(small), "images", "pipe.json", keep, skip=False)


def test_missing_files_and_wrong_sizes_are_named(tmp_path, shapes):
    folder = tmp_path / "copy"
    shutil.copytree(shapes, folder)
    (folder / "train" / "00003.png").unlink()
    with pytest.raises(DataError, match="1 of the 24 images .* are missing, such as .*00003.png"):
        build_detection_dataset(str(folder), "train", "annotations/train.json", keep, skip=False)
    dataset = build_detection_dataset(str(folder), "train", "annotations/train.json", keep, skip=True)
    with pytest.raises(DataError, match="00003.png"):
        dataset[3]
    Image.new("RGB", (9, 7)).save(folder / "train" / "00004.png")
    with pytest.raises(DataError, match=r"00004.png is 9x7, but .*train.json says"):
        dataset[4]


def test_batches_hold_images_at_the_top_left_and_zeros_elsewhere():
    small = torch.full((3, 5, 9), 200, dtype=torch.uint8)
    large = torch.full((3, 8, 6), 100, dtype=torch.uint8)
    samples = [(small, {}, []), (None, None, [4]), (large, {}, [])]
    (images, sizes), targets, failed = collate_detection(samples)
    assert images.shape == (2, 3, 8, 9) and sizes == [(5, 9), (8, 6)]
    assert failed == [4] and targets == [{}, {}]
    (((images, _), _),) = BatchToDevice(torch.device("cpu"))([((images, sizes), targets)])
    assert (images[0, :, 5:] == 0).all() and (images[1, :, :, 6:] == 0).all()
    assert images[0, 0, 0, 0].item() == pytest.approx((200 / 255 - 0.485) / 0.229, rel=1e-5)
    assert images[1, 2, 7, 5].item() == pytest.approx((100 / 255 - 0.406) / 0.225, rel=1e-5)


def test_batches_are_of_one_aspect_and_every_image_comes_once():
    groups = [index % 3 == 0 for index in range(300)]
    order = np.random.default_rng(0).permutation(300)
    grouped = group(order, groups)
    assert sorted(grouped) == list(range(300)) and not np.array_equal(order, grouped)
    alone = TrainBatchSampler(300, 8, 1, 0, 1, seed=0)
    samplers = [TrainBatchSampler(300, 4, 1, rank, 2, seed=0) for rank in (0, 1)]
    for sampler in (alone, *samplers):
        sampler.groups = groups
    batches = [[index for _, index in batch] for sampler in samplers for batch in sampler]
    mixed = [batch for batch in batches if len({groups[index] for index in batch}) > 1]
    assert len(mixed) <= 2
    # Processes and batch sizes do not change which images come first.
    whole = [index for batch in alone for _, index in batch]
    joined = [index for pair in zip(*samplers) for batch in pair for _, index in batch]
    assert joined == whole


def detections_of(annotations, noise, rng):
    """Results that are the ground truth; with noise, boxes and masks are moved and some classes wrong."""
    results = []
    for record in annotations.images:
        truth = annotations.truth_of(record)
        boxes, labels, masks = truth["boxes"].clone(), truth["labels"].clone(), truth["masks"]
        scores = torch.tensor([rng.uniform(0.1, 1) for _ in labels])
        if noise:
            boxes += torch.tensor([[rng.gauss(0, noise) for _ in range(4)] for _ in labels]).reshape(-1, 4)
            labels = torch.tensor(
                [rng.choice([label, 1 + label % 3]) for label in labels.tolist()], dtype=torch.int64
            )
            masks = torch.stack([mask.roll(rng.randint(-3, 3), 1) for mask in masks]) if len(masks) else masks
        detection = dict(boxes=boxes, labels=labels, scores=scores, masks=masks)
        results += to_results(record["id"], detection, annotations.categories)
    return results


def test_figures_are_those_of_pycocotools_on_the_files(tmp_path, shapes):
    path = shapes / "annotations" / "train.json"
    annotations = Annotations(str(path))
    results = detections_of(annotations, 2.0, random.Random(0))
    figures, rows = precision_of(annotations, results)
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        shown = [{k: v for k, v in result.items() if kind == "bbox" or k != "bbox"} for result in results]
        (tmp_path / "results.json").write_text(json.dumps(shown))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(path))
            evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), kind)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        # Areas of objects decide over the figures by size: those of masks are not those of boxes.
        for name, value in zip(METRICS, evaluation.stats):
            expected = 100 * value if value >= 0 else float("nan")
            assert figures[f"{prefix}_{name}"] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert 5 < figures["box_AP"] < 95 and 5 < figures["mask_AP"] < 95
    assert np.mean([box for _, box, _ in rows]) == pytest.approx(figures["box_AP"])
    assert all(name in table(rows) for name, *_ in rows)
    none, of_none = precision_of(annotations, [])
    assert none["box_AP"] == none["mask_AP"] == 0 and of_none == [(name, 0, 0) for name, *_ in rows]


def crowded(many):
    """A COCO file of an image with so many objects, and results that are all of them."""
    places = [[12 * (i % 20), 12 * (i // 20), 10, 10] for i in range(many)]
    outlines = [[[x, y, x + w, y, x + w, y + h, x, y + h]] for x, y, w, h in places]
    items = [
        dict(image_id=1, category_id=1, bbox=box, area=100, iscrowd=0, segmentation=outline)
        for box, outline in zip(places, outlines)
    ]
    categories = [dict(id=1, name="pig")]
    truth = dict(images=[dict(id=1, file_name="pigs.png", height=240, width=240)], categories=categories)
    codes = [coco_mask.frPyObjects(outline, 240, 240)[0] for outline in outlines]
    shapes = [dict(code, counts=code["counts"].decode()) for code in codes]
    results = [dict(item, score=0.9, segmentation=shape) for item, shape in zip(items, shapes)]
    return dict(truth, annotations=items), results


def test_all_detections_count_also_above_the_100_of_coco():
    figures, rows = average_precision(*crowded(150), [1])
    assert figures["box_AP"] == figures["mask_AP"] == pytest.approx(100) and rows == [("pig", 100, 100)]


def test_other_limits_of_detections_than_coco_has_and_too_low_ones_are_told(small, caplog):
    (small / "annotations.json").write_text(json.dumps(crowded(150)[0]))
    Image.new("RGB", (240, 240)).save(small / "images" / "pigs.png")
    for per_image, words in (
        (100, "1 images have more objects than DET.PER_IMAGE 100, such as pigs.png with 150: raise it"),
        (150, "AP counts up to 150 detections of an image, as DET.PER_IMAGE says; COCO's own figures count"),
    ):
        dataset = build_detection_dataset(
            str(small), "images", "annotations.json", keep, skip=False, per_image=per_image
        )
        text = told(dataset, caplog)
        assert words in text and ("AP counts" in text) != ("more objects" in text)


def test_images_that_were_not_evaluated_are_not_missed(shapes):
    annotations = Annotations(str(shapes / "annotations" / "train.json"))
    ids = [image["id"] for image in annotations.images[:12]]
    results = detections_of(annotations, 0, random.Random(0))
    results = [result for result in results if result["image_id"] in ids]
    figures, _ = average_precision(annotations.as_coco(), results, ids)
    assert figures["box_AP"] == figures["mask_AP"] == pytest.approx(100)


def test_ground_truth_and_detections_are_drawn_side_by_side(tmp_path, shapes):
    annotations = Annotations(str(shapes / "annotations" / "val.json"))
    samples = []
    for record in annotations.images[:3]:
        truth = annotations.truth_of(record)
        scores = torch.linspace(0.9, 0.1, len(truth["labels"]))
        samples.append((str(shapes / "val" / record["file_name"]), truth, dict(truth, scores=scores)))
    path = tmp_path / "detections.png"
    draw_detections(samples, ["circle", "1.5", "$\\frac$"], str(path))
    with Image.open(path) as picture:
        assert picture.width > 700 and len(picture.convert("RGB").getcolors(10**7)) > 1000


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """The output folder of a run of two epochs."""
    output = tmp_path_factory.mktemp("trained")
    detect("--data-path", shapes, "--output", output, "--opts", *SMALL)
    return output / "shapes" / "default"


def test_a_run_writes_checkpoints_curves_metrics_and_detections(trained, shapes):
    names = set(os.listdir(trained))
    assert {"ckpt_epoch_1.pth", "best.pth", "config.yaml"} <= names
    assert {"curves.png", "detections.png", "detections.json"} <= names
    categories = [category["name"] for category in content_of(shapes, "val")["categories"]]
    assert ckpt.read_checkpoint(str(trained / "best.pth"))["classes"] == categories
    rows = read_metrics(trained / "metrics.jsonl", ("epoch", "train_loss", "box_AP", "mask_AP", "loss_mask3"))
    assert [row["epoch"] for row in rows] == [0, 1]
    parts = [value for name, value in rows[0].items() if name.startswith("loss_")]
    assert len(parts) == 11 and sum(parts) == pytest.approx(rows[0]["train_loss"], rel=1e-5)
    ids = {image["id"] for image in content_of(shapes, "val")["images"]}
    results = json.loads((trained / "detections.json").read_text())
    assert results and {result["image_id"] for result in results} <= ids


def test_the_learning_rate_of_the_config_is_for_16_images(trained):
    """2 epochs of 4 updates of 4 of the 17 images with objects, along the cosine of the whole run."""
    rows = read_metrics(trained / "metrics.jsonl", ("epoch", "lr"))
    expected = [1e-5 + (8e-3 - 1e-5) * (1 + math.cos(math.pi * update / 8)) / 2 for update in (3, 7)]
    assert [row["lr"] for row in rows] == pytest.approx([4 / 16 * lr for lr in expected], rel=1e-9)


def figures_of(done):
    return done.stdout.split(" * ")[1].splitlines()[0]


def test_sharded_evaluation_is_that_of_one_process(trained, shapes, tmp_path):
    common = ["--data-path", shapes, "--eval", "--resume", trained / "best.pth", "--amp-opt-level", "O0"]
    alone = detect(*common, "--output", tmp_path / "1", "--opts", *SMALL)
    shared = detect(*common, "--output", tmp_path / "n", "--batch-size", 2, "--opts", *SMALL, processes=2)
    assert figures_of(alone) == figures_of(shared) and figures_of(alone).startswith("box AP")
    first, second = (
        sorted(json.loads((tmp_path / n / "shapes/default/detections.json").read_text()), key=str)
        for n in "1n"
    )
    assert first == second and len(first) > 7


def test_a_killed_run_ends_with_the_same_bits(shapes, tmp_path):
    common = ["--data-path", shapes, "--amp-opt-level", "O1", "--batch-size", 2, "--opts", *SMALL]
    common += ["TRAIN.ACCUMULATION_STEPS", 2, "TRAIN.SAVE_STEPS", 1, "DATA.BATCH_SIZE", 2]
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    detect(*common, "OUTPUT", calm, processes=2)
    run = Started(tmp_path, command(*common, "OUTPUT", disturbed, processes=2))
    run.wait_for("Train: [0/2][1/")
    subprocess.run(["pkill", "-9", "-f", str(disturbed)], check=False)
    assert run.wait() != 0
    done = detect(*common, "OUTPUT", disturbed, processes=2)
    assert "resuming from" in done.stdout
    assert_same_run(disturbed, calm, "shapes")


def test_a_signal_saves_and_asks_for_a_requeue(shapes, tmp_path):
    run = Started(tmp_path, command("--data-path", shapes, "--output", tmp_path, "--opts", *SMALL))
    run.wait_for("Train: [0/2][1/")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 75 and "the same command goes on" in run.text()


@pytest.mark.parametrize(
    "opts, words",
    [
        (["DATA.DATA_PATH", "nowhere"], "cannot read the annotations nowhere/annotations/val.json"),
        ([], "no data: give --data-path"),
        (["DATA.DATA_PATH", "{shapes}", "DET.VAL_IMAGES", "other"], "7 of the 7 images"),
        (["DATA.DATA_PATH", "{shapes}", "DATA.BATCH_SIZE", 100], "has 17 images, fewer than an update takes"),
    ],
)
def test_data_that_cannot_be_used_are_named(shapes, opts, words):
    opts = [str(word).replace("{shapes}", str(shapes)) for word in opts]
    with pytest.raises(DataError, match=words):
        build_detection_loaders(coco_config("shapes", "DATA.NUM_WORKERS", 0, *opts))


def test_evaluation_leaves_out_missing_images_where_it_may(trained, shapes, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shapes, folder)
    content = content_of(folder, "val")
    for number in range(7, 100):
        content["images"].append(dict(content["images"][number % 7], id=number))
    content["images"].append(dict(id=999, file_name="missing.png", height=100, width=100))
    (folder / "annotations" / "val.json").write_text(json.dumps(content))
    arguments = ["--data-path", folder, "--output", tmp_path, "--eval", "--resume", trained / "best.pth"]
    arguments += ["--opts", *SMALL, "DATA.ON_ERROR", "skip"]
    done = detect(*arguments)
    assert "val.json: 101 images, 94 of them without objects; 18 objects in 3" in done.stdout
    assert "skipping" in done.stdout and "missing.png" in done.stdout and "\n100 images" in done.stdout
