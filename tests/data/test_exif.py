"""EXIF orientation: one rule for both backends, for classes and objects, and for predictions."""

import io
import json

import numpy as np
import pytest
from helpers import coco_config as shapes_config
from helpers import digits_config
from PIL import Image, ImageOps

from data.datasets import load_image
from data.loaders import build_loaders
from data.opencv.transforms import ImageFile
from detection.loaders import build_detection_loaders
from tools.predict import Pictures

TAG = 0x0112


def encoded(image, orientation, kind="PNG"):
    """The bytes of an image file with an EXIF orientation."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[TAG] = orientation
    image.save(file, kind, exif=exif)
    return file.getvalue()


def noise(height=40, width=64, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_both_backends_turn_as_pillow_does_or_leave_alone(kind):
    for orientation in [*range(1, 9), 0, 9]:
        content = encoded(noise(), orientation, kind)
        with Image.open(io.BytesIO(content)) as file:
            images = {False: file.convert("RGB"), True: ImageOps.exif_transpose(file).convert("RGB")}
        for turn, expected in images.items():
            by_pillow = load_image("x", content=content, turn=turn)
            by_opencv = ImageFile("x", content=content, turn=turn)
            assert by_pillow.size == by_opencv.size == expected.size, orientation
            np.testing.assert_array_equal(by_pillow, expected)
            np.testing.assert_array_equal(by_opencv.crop(4, 8, 16, 24, 1), np.asarray(expected)[8:32, 4:20])
            quarter = by_opencv.crop(0, 0, *expected.size, 8)
            coarse = np.asarray(expected.resize(quarter.shape[1::-1], Image.Resampling.BOX), dtype=float)
            assert np.abs(quarter - coarse).mean() < 10


def test_a_damaged_tag_is_none():
    content = (
        encoded(noise(), 6, "JPEG").replace(b"II*\0", b"\xff\xff\xff\xff").replace(b"MM\0*", b"\xff" * 4)
    )
    assert load_image("x", content=content).size == (64, 40)


@pytest.mark.parametrize("backend", ["pil", "opencv"])
@pytest.mark.parametrize(
    "key, level, words", [("ignore", "WARNING", "ignore leaves"), ("apply", "INFO", "apply turns")]
)
def test_classes_follow_the_key_and_the_log_counts_tags(tmp_path, caplog, backend, key, level, words):
    (tmp_path / "val" / "a").mkdir(parents=True), (tmp_path / "val" / "b").mkdir()
    upright = noise()
    for place, orientation in enumerate((1, 6, 8)):
        (tmp_path / "val" / "ab"[place % 2] / f"{place}.png").write_bytes(encoded(upright, orientation))
    (tmp_path / "val" / "a" / "broken.png").write_bytes(b"none")
    opts = ["DATA.EXIF_ORIENTATION", key, "DATA.BACKEND", backend, "DATA.NUM_WORKERS", 0]
    config = digits_config(
        *opts, "DATA.IMG_SIZE", [40, 64], "DATA.ON_ERROR", "skip", data_path=str(tmp_path), eval=True
    )
    _, _, loader, _ = build_loaders(config)
    with caplog.at_level("INFO"):
        loader.report()
    (record,) = [record for record in caplog.records if "EXIF" in record.message]
    first = tmp_path / "val" / "a" / "2.png"
    told = f"2 of 4 images looked at have an EXIF orientation, such as {first}: DATA.EXIF_ORIENTATION {words}"
    assert record.levelname == level and told in record.message
    dataset = loader.loader.dataset.dataset
    sizes = [dataset.loader(path).size for path in dataset.paths if "broken" not in path]
    turned = (64, 40) if key == "ignore" else (40, 64)
    assert sizes == [(64, 40), turned, turned]


def test_annotations_decide_over_turning_where_sizes_tell_and_else_the_key(tmp_path):
    """Read as it is annotated, an image is white in the box at its upper left, and else black."""
    (tmp_path / "annotations").mkdir(), (tmp_path / "val").mkdir()
    seen = Image.new("RGB", (64, 40))
    seen.paste((255, 255, 255), (0, 0, 16, 8))
    stored_as = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    cases = []  # orientation, whether the annotations are of the image upright, keys that read it so
    for orientation, turn in stored_as.items():
        for is_upright in (True, False):
            right = {"apply", "ignore"} if orientation == 6 else {"apply" if is_upright else "ignore"}
            stored = seen.transpose(turn) if is_upright else seen
            (tmp_path / "val" / f"{len(cases)}.png").write_bytes(encoded(stored, orientation))
            cases.append(right)
    item = dict(category_id=1, bbox=[0, 0, 16, 8], area=128, segmentation=[[0, 0, 16, 0, 16, 8, 0, 8]])
    content = dict(
        images=[dict(id=i, file_name=f"{i}.png", height=40, width=64) for i in range(len(cases))],
        annotations=[dict(item, id=i + 1, image_id=i) for i in range(len(cases))],
        categories=[dict(id=1, name="white")],
    )
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(content))
    for key in ("apply", "ignore"):
        opts = ["DATA.EXIF_ORIENTATION", key, "DATA.DATA_PATH", tmp_path]
        config = shapes_config("shapes", *opts, "DATA.NUM_WORKERS", 0, "EVAL_MODE", True)
        _, _, _, val = build_detection_loaders(config)
        for i, right in enumerate(cases):
            image, _ = val[i]
            height, width = image.shape[1:]
            white = image[:, : height // 5, : width // 4].float().mean() > 200
            assert image.shape[2] > image.shape[1] and white == (key in right), (key, i)


def test_photos_are_predicted_as_people_see_them(tmp_path):
    upright = noise()
    path = tmp_path / "phone.png"
    path.write_bytes(encoded(upright.transpose(Image.Transpose.ROTATE_90), 6))
    (picture,) = Pictures([str(path)], np.asarray, keep=True)
    np.testing.assert_array_equal(picture.inputs, upright)
    assert picture.size == (40, 64) and picture.image.size == (64, 40)
