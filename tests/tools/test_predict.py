"""tools/predict.py: what it takes, what it computes, and what it writes."""

import argparse
import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import coco_config as shapes_config
from helpers import digits_config, fill_weights, write_images
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import detect
import detection
import distributed
import models
from analysis.report import BAR, caption
from config import dump_config
from detection.detector import build_detector
from detection.loaders import build_detection_loaders
from detection.pictures import annotate
from distributed import Compute
from models import build_model
from tools import predict
from tools.predict import Pictures, find_files
from utils import UserError

SHAPES = "MODEL.MSG.EMBED_DIM 16 MODEL.MSG.DEPTHS [1,1,1] MODEL.MSG.NUM_HEADS [1,2,4] DET.CHANNELS 16"
SHAPES += " DET.BOX_FCS [32] DET.TEST_SIZE 64 DET.SCORE_THRESHOLD 0.0 DET.PER_IMAGE 5 DATA.NUM_WORKERS 0"
CPU = Compute(torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A classifier of three classes with images of 48 px, and names that CSV and a path must quote."""
    changes = ["MODEL.NUM_CLASSES", "3", "DATA.IMG_SIZE", "48", "MODEL.MSG.PATCH_SIZE", "4"]
    config = digits_config(*changes)
    content = dict(model=fill_weights(build_model(config)).state_dict(), config=dump_config(config))
    path = str(tmp_path_factory.mktemp("checkpoint") / "classifier.pth")
    torch.save(dict(content, classes=["a, b", 'c "d"', "é"]), path)
    return path


def run(monkeypatch, *words):
    """Run the tool in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words), "--device", "cpu"])
    try:
        predict.main(predict.parse_args())
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_are_those_of_the_loaded_model_in_the_order_of_the_files(
    checkpoint, data, tmp_path, monkeypatch, workers
):
    options = ["--batch-size", 2, "--workers", workers, "--top", 2, "--csv", tmp_path / "new" / "p.csv"]
    assert run(monkeypatch, checkpoint, data / "val", *options, "--json", tmp_path / "p.json") == 0
    model, transform, names = models.load(checkpoint)
    paths = [str(data / "val" / name / f"{i}.png") for name in "abc" for i in range(3)]
    with torch.no_grad():
        images = [transform(Image.open(path).convert("RGB")) for path in paths]
        expected = model(torch.stack(images)).softmax(1)
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["class_names"] == names and content["skipped"] == {}
    assert [entry["file"] for entry in content["predictions"]] == paths
    with open(tmp_path / "new" / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for scores, entry, row, path in zip(expected, content["predictions"], rows, paths):
        best = scores.argsort(descending=True)[:2].tolist()
        assert [found["index"] for found in entry["classes"]] == best
        for i, found in zip(best, entry["classes"]):
            assert found["class"] == names[i] and found["score"] == pytest.approx(scores[i].item(), abs=1e-5)
        assert row["file"] == path and row["class_2"] == names[best[1]]
        assert float(row["score_1"]) == pytest.approx(scores[best[0]].item(), abs=1e-5)


def test_a_runtime_is_asked_for_in_float32(checkpoint, data, tmp_path, monkeypatch):
    content, asked = torch.load(checkpoint), []
    content["config"] = content["config"].replace("AMP_OPT_LEVEL: O0", "AMP_OPT_LEVEL: O1")
    torch.save(content, tmp_path / "mixed.pth")

    def build(config, model, compute):
        asked.append((config.RUNTIME, compute.dtype))
        return model

    monkeypatch.setattr(predict, "build_runtime", build)
    monkeypatch.setattr(distributed, "cpu_has_bfloat16", lambda: True)
    for name in ("pytorch", "openvino"):
        assert run(monkeypatch, tmp_path / "mixed.pth", data / "val" / "a", "--runtime", name) == 0
    assert asked == [("pytorch", torch.bfloat16), ("openvino", None)]


def test_what_cannot_be_read_is_listed_and_the_exit_code_says_so(
    checkpoint, data, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "photos"
    write_images(folder, 1, classes=("a",), size=64)
    whole = (folder / "a" / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left alone")
    words = [checkpoint, folder, tmp_path / "none*.png", "--json", tmp_path / "p.json", "--workers", 2]
    assert run(monkeypatch, *words) == 3
    told, content = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert [entry["file"] for entry in content["predictions"]] == [str(folder / "a" / "0.png")]
    bad = {*(str(folder / name) for name in ("half.png", "words.jpg")), str(tmp_path / "none*.png")}
    assert set(content["skipped"]) == bad and "skipped 3 of 4 files" in told and "ignored: .txt 1" in told
    assert all(path in told for path in bad)


def test_files_of_names_that_are_no_utf_8_are_read_and_listed(checkpoint, data, tmp_path, monkeypatch):
    name = os.fsdecode(b"\xc2\xed.png")
    shutil.copy(data / "val" / "a" / "0.png", tmp_path / name)
    (tmp_path / "._clip.png").write_bytes(b"a note of a Mac")
    options = ["--workers", 0, "--csv", tmp_path / "p.csv", "--json", tmp_path / "p.json"]
    assert run(monkeypatch, checkpoint, tmp_path, *options, "--pictures", tmp_path / "drawn") == 0
    (row,) = (tmp_path / "p.csv").read_text("utf-8").splitlines()[1:]
    assert row.startswith(rf"{tmp_path}/\udcc2\udced.png,")
    (found,) = json.loads((tmp_path / "p.json").read_text())["predictions"]
    assert Path(found["file"]).name == name and (tmp_path / "drawn" / name).exists()


def test_transparency_reaches_models_that_see_it(tmp_path):
    Image.new("RGBA", (4, 4), (9, 8, 7, 100)).save(tmp_path / "glass.png")
    for mode, pixel in (("RGBA", [9, 8, 7, 100]), ("RGB", [9, 8, 7])):
        (picture,) = Pictures([str(tmp_path / "glass.png")], np.asarray, mode=mode)
        assert picture.inputs[0, 0].tolist() == pixel


def test_files_folders_and_patterns_name_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a/2.JPG", "a/deep/1.png", "a/[x] é.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.png").symlink_to("b.png")
    paths, missing, ignored = find_files(["b.png", "link.png", "a", "a/**/*.png", "a/[x] é.png", "*.gif"])
    assert paths[0] == "b.png" and ignored == {".txt": 1}
    assert paths[1:] == ["a/2.JPG", "a/[x] é.png", "a/deep/1.png"] and list(missing) == ["*.gif"]
    assert find_files(["."])[0] == ["./b.png", *(f"./{path}" for path in paths[1:])]


def test_pictures_are_drawn_below_another_folder_and_never_over_their_images(
    checkpoint, tmp_path, monkeypatch, capsys
):
    write_images(tmp_path / "in", 1, size=64)
    before = (tmp_path / "in" / "a" / "0.png").read_bytes()
    Image.new("RGB", (40, 30)).save(tmp_path / "in" / "a" / "0.bmp")
    assert run(monkeypatch, checkpoint, tmp_path / "in", "--pictures", tmp_path / "out") == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    written = {str(path.relative_to(tmp_path / "out")) for path in files}
    assert written == {"a/0.png", "a/0.bmp.png", "b/0.png", "c/0.png"}
    assert f"wrote 4 annotated images below {tmp_path / 'out'}\n" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "a" / "0.png").height > Image.open(tmp_path / "in/a/0.png").height
    with pytest.raises(UserError, match="would overwrite the images"):
        run(monkeypatch, checkpoint, tmp_path / "in", "--pictures", tmp_path / "in")
    assert (tmp_path / "in" / "a" / "0.png").read_bytes() == before


def test_bars_are_as_long_as_their_scores():
    sheet = np.asarray(caption(Image.new("RGB", (300, 100)), [("one", 0.75), ("two", 0.2)]))
    bars = (sheet == [int(BAR[i : i + 2], 16) for i in (1, 3, 5)]).all(2)[100:]
    lengths = {int(row.nonzero()[0].max()) for row in bars if row.all(where=np.arange(300) < 50)}  # no text
    assert lengths == {60, 225}


def test_classes_are_numbers_where_the_checkpoint_has_no_names(checkpoint, data, tmp_path, monkeypatch):
    torch.save(dict(torch.load(checkpoint), classes=None), tmp_path / "unnamed.pth")
    path = data / "val" / "a" / "0.png"
    assert run(monkeypatch, tmp_path / "unnamed.pth", path, "--json", tmp_path / "p.json") == 0
    assert json.loads((tmp_path / "p.json").read_text())["class_names"] == ["0", "1", "2"]


def test_a_detector_finds_what_its_evaluation_finds_and_writes_a_coco_file(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "val").mkdir()
    records = []
    for number, (height, width) in enumerate([(80, 100), (64, 48)]):
        pixels = rng.integers(0, 256, (height // 8, width // 4, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(tmp_path / "val" / f"{number}.png")
        records.append(dict(id=number, file_name=f"{number}.png", height=height, width=width))
    item = dict(image_id=0, category_id=3, bbox=[4, 4, 9, 9], segmentation=[[4, 4, 13, 4, 13, 13]], id=1)
    categories = [dict(id=i + 3, name=name) for i, name in enumerate(("circle", "box", "a triangle"))]
    (tmp_path / "annotations").mkdir()
    content = dict(images=records, categories=categories, annotations=[item])
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(content))
    config = shapes_config(
        "shapes",
        *SHAPES.split(),
        "DATA.DATA_PATH",
        tmp_path,
        "EVAL_MODE",
        True,
        "OUTPUT",
        tmp_path,
        "MODEL.NUM_CLASSES",
        3,
    )
    torch.manual_seed(0)
    detector = build_detector(config, 3)
    names = [category["name"] for category in categories]
    path = tmp_path / "detector.pth"
    torch.save(dict(model=detector.state_dict(), config=dump_config(config), classes=names), path)

    _, _, loader, val = build_detection_loaders(config)
    (tmp_path / "shapes" / "default").mkdir(parents=True)
    detect.evaluate(detector, loader, val, CPU, config)
    expected = json.loads((tmp_path / "shapes" / "default" / "detections.json").read_text())
    options = ["--json", tmp_path / "found.json", "--csv", tmp_path / "found.csv", "--score", 0.0]
    assert run(monkeypatch, path, tmp_path / "val", *options, "--pictures", tmp_path / "drawn") == 0
    coco = COCO(str(tmp_path / "found.json"))
    found = [
        dict(
            {name: entry[name] for name in ("bbox", "score", "segmentation")},
            image_id=entry["image_id"] - 1,
            category_id=entry["category_id"] + 2,
        )
        for entry in coco.dataset["annotations"]
    ]
    assert len(found) > 4 and found == [dict(entry) for entry in expected]
    assert [image["file_name"] for image in coco.dataset["images"]] == [
        str(tmp_path / "val" / f"{i}.png") for i in (0, 1)
    ]
    for entry in coco.dataset["annotations"]:
        assert entry["area"] == coco_mask.decode(entry["segmentation"]).sum()
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["x"]) for row in rows] == [entry["bbox"][0] for entry in found]
    assert [row["class"] for row in rows] == [names[entry["category_id"] - 3] for entry in found]
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["0.png", "1.png"]
    with pytest.raises(UserError, match="of a detector: use detection.load"):
        models.load(path)
    with pytest.raises(
        UserError, match="--runtime is for classifiers, and .* is of a detector: leave it out"
    ):
        run(monkeypatch, path, tmp_path / "val", "--runtime", "openvino")
    model, transform, loaded = detection.load(path)
    with models.inference(model):
        (direct,) = model(*transform(Image.open(tmp_path / "val" / "0.png").convert("RGB")))
    scores = [round(score, 5) for score in direct["scores"].tolist()]
    assert scores == [entry["score"] for entry in found if entry["image_id"] == 0] and loaded == names


def test_objects_below_the_score_are_neither_shown_nor_drawn(monkeypatch):
    monkeypatch.setattr(predict, "annotate", lambda image, found, names: found["scores"].tolist())
    task = predict.Objects(None, ["box"], CPU, argparse.Namespace(score=0.5))
    assert task.draw(None, dict(scores=torch.tensor([0.75, 0.25, 0.5]))) == [0.75, 0.5]
    assert task.words([dict(score=0.25, category_id=1)]) == "nothing of score 0.5 and more"


def test_annotated_objects_have_their_masks_and_boxes_where_they_are():
    image, mask = Image.new("RGB", (500, 460)), torch.zeros(1, 460, 500, dtype=torch.bool)
    mask[0, 200:300, 100:200] = True
    detection = dict(boxes=torch.tensor([[100.0, 200, 220, 300]]), labels=torch.tensor([1]), masks=mask)
    pixels = np.asarray(annotate(image, dict(detection, scores=torch.tensor([0.9])), ["box"])).astype(int)
    colour = np.array([31, 119, 180])  # matplotlib's C0
    assert (pixels[250, 150] == (0.4 * colour).astype(int)).all() and not pixels[250, 210].any()
    assert (pixels[250, 100] == colour).all() and (pixels[300, 150] == colour).all()
    assert not pixels[330:].any() and not pixels[:, 240:].any()
    none = {name: value[:0] for name, value in dict(detection, scores=torch.tensor([0.9])).items()}
    assert not np.asarray(annotate(image, none, ["box"])).any()
