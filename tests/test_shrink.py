"""tools/shrink.py: a copy of an image folder with smaller images."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, write_images
from PIL import Image

import tools.shrink
from data.datasets import build_dataset, load_image
from utils import UserError


def command(*arguments):
    return [sys.executable, str(ROOT / "tools" / "shrink.py"), *map(str, arguments)]


@pytest.fixture
def shrink(monkeypatch):
    """A function that does what the command does, without the seconds that a new process imports."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["shrink.py", *map(str, arguments)])
        tools.shrink.run(tools.shrink.parse_args())

    return run


def content(folder):
    return {
        os.path.relpath(os.path.join(path, name), folder): open(os.path.join(path, name), "rb").read()
        for path, _, names in os.walk(folder)
        for name in names
    }


def save(path, mode="RGB", size=(90, 60), **options):
    shape = (*reversed(size), *([len(mode)] if len(mode) > 1 else []))
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path, **options)


def test_copies_are_what_the_loader_would_make(tmp_path, shrink, capsys):
    source, copy = tmp_path / "source", tmp_path / "copy"
    turned = Image.Exif()
    turned[0x0112] = 6
    save(source / "train" / "a" / "wide.png")
    save(source / "train" / "a" / "deep" / "turned.jpg", exif=turned, icc_profile=b"profile")
    save(source / "train" / "b" / "small.JPEG", size=(200, 30), quality=20)
    save(source / "train" / "b" / "alpha.bmp", "RGBA")
    save(source / "train" / "b" / "grey.tiff", "L")
    (source / "train" / "b" / "notes.txt").write_text("not an image")
    for name in "ab":
        (source / "val" / name).mkdir(parents=True)
    before = content(source)
    shrink(source, copy, "--size", 30)
    assert "not copied: 1 other files" in capsys.readouterr().out
    assert content(source) == before
    train = build_dataset(str(copy), "train", None)
    assert [os.path.relpath(path, copy) for path, _ in train.samples] == [
        os.path.relpath(path, source) for path, _ in build_dataset(str(source), "train", None).samples
    ]
    assert (copy / "val" / "a").is_dir() and (copy / "val" / "b").is_dir()
    assert content(copy)["train/b/small.JPEG"] == before["train/b/small.JPEG"]
    for name in ("a/wide.png", "b/alpha.bmp", "b/grey.tiff"):
        image = load_image(str(source / "train" / name)).resize((45, 30), Image.Resampling.BICUBIC)
        assert np.array_equal(load_image(str(copy / "train" / name)), image), name
    with Image.open(copy / "train" / "a" / "deep" / "turned.jpg") as image:
        assert image.size == (45, 30) and image.getexif()[0x0112] == 6
        assert image.info["icc_profile"] == b"profile"


def test_a_killed_copy_goes_on_with_what_is_missing(tmp_path, shrink, capsys):
    source, copy = tmp_path / "source", tmp_path / "copy"
    write_images(source / "train", 40, size=300)
    process = subprocess.Popen(
        command(source, copy, "--size", 200, "--workers", 1),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not list(copy.glob("train/*/*.png")) and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in copy.glob("train/*/*.png")}
    assert 0 < len(written) < 120
    for path in written:
        assert load_image(str(path)).size == (200, 200)
    (copy / "train" / "a" / "1.png.0123abcd.tmp").touch()  # what a kill within a write leaves
    shrink(source, copy, "--size", 200)
    assert f"120 images, {len(written)} of them copied before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert len(list(copy.glob("train/*/*"))) == len(list(copy.glob("train/*/*.png"))) == 120
    with pytest.raises(UserError, match='begun with {"size": 200'):
        shrink(source, copy, "--size", 100)


def test_broken_files_are_named_and_left_out(tmp_path, shrink):
    source, copy = tmp_path / "source", tmp_path / "copy"
    write_images(source, 2, ("a",))
    save(source / "a" / "cut.jpg", size=(200, 200))
    os.truncate(source / "a" / "cut.jpg", 3000)
    (source / "a" / "empty.png").touch()
    done = subprocess.run(
        command(source, copy, "--size", 16), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1 and "error: 2 images cannot be read" in done.stderr
    assert f"{source}/a/cut.jpg cannot be read" in done.stderr and "a/empty.png" in done.stderr
    for _ in range(2):
        assert sorted(content(copy)) == [".shrink.json", "a/0.png", "a/1.png"]
        assert json.loads(content(copy)[".shrink.json"]) == dict(size=16, quality=95)
        with pytest.raises(UserError, match="2 images cannot be read"):
            shrink(source, copy, "--size", 16)


@pytest.mark.parametrize("place", ["source", "source/a", "source/a/copy", "link", "linked", "other"])
def test_nothing_is_written_into_the_source_or_among_other_files(tmp_path, shrink, place):
    source = tmp_path / "source"
    write_images(source, 1, ("a",), size=64)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(source / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    before = content(tmp_path)
    message = "holds files of something else" if place == "other" else "into the images of"
    with pytest.raises(UserError, match=message):
        shrink(source, tmp_path / place, "--size", 16)
    assert content(tmp_path) == before
