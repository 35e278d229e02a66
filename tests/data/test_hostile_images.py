"""Images from strangers: what Pillow decodes is used as RGB, what it does not is named, nothing else
happens."""

import contextlib
import io
import logging
import multiprocessing
import os
import random
import resource
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digits_config, micro, run_main, write_images
from PIL import Image, PngImagePlugin
from timm.layers import to_2tuple

from data import DataError, build_loaders
from data.datasets import EvaluationSamples, build_dataset, load_image
from data.loaders import build_reader
from data.opencv.transforms import ImageFile
from data.samplers import TrainBatchSampler, evaluation_shard
from data.transforms import build_transform
from distributed import Compute
from main import evaluate
from models import build_model

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")

ROTATED = 6  # EXIF orientation: turn by 90 degrees to see it upright
MB = 2**20


def picture(mode="RGB", size=(40, 28), seed=0):
    """A gradient with some noise, so that every decoder has something to get wrong."""
    width, height = size
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
    pixels += rng.integers(0, 55, pixels.shape)
    image = Image.fromarray(pixels.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode == "P":
        image = image.quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image
    return image.convert(mode)


def encoded(image, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunks(content):
    """The chunks of a PNG file as (type, data)."""
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def png_file(chunks):
    """A PNG file of chunks (type, data), with valid checksums."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def tiff_of_one_strip(width, height, rows=50):
    """A TIFF file of 8-bit RGB of which every strip is the same few compressed bytes."""
    strips, strip = height // rows, zlib.compress(bytes(3 * width * rows), 9)
    arrays = [[8] * 3, [8] * strips, [len(strip)] * strips]
    contents = [struct.pack(f"<{len(a)}{kind}", *a) for a, kind in zip(arrays, "HII")]
    places = [8 + len(strip) + sum(map(len, contents[:i])) for i in range(4)]
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, places[0]), (259, 3, 1, 8)]
    tags += [(262, 3, 1, 2), (273, 4, strips, places[1]), (277, 3, 1, 3), (278, 4, 1, rows)]
    tags += [(279, 4, strips, places[2])]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", places[3])
    return head + strip + b"".join(contents) + struct.pack("<H", len(tags)) + entries + bytes(4)


def readable_files():
    """Name to bytes of files that Pillow decodes, some of them only just."""
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    frames = dict(save_all=True, append_images=[picture(seed=1), picture(seed=2)], duration=50)
    high, wide = picture(size=(1, 20000)), picture(size=(20000, 1))
    return {
        "png_named.jpg": encoded(picture(), "PNG"),
        "jpeg_named.png": encoded(picture(), "JPEG"),
        "webp_named.jpeg": encoded(picture(), "WEBP"),
        "cmyk.jpg": encoded(picture("CMYK"), "JPEG"),
        "grey.jpg": encoded(picture("L"), "JPEG"),
        "progressive.jpg": encoded(picture(), "JPEG", progressive=True),
        "rotated.jpg": encoded(picture(), "JPEG", exif=exif),
        "palette_alpha.png": encoded(picture("P"), "PNG"),
        "rgba.png": encoded(picture("RGBA"), "PNG"),
        "grey_alpha.png": encoded(picture("LA"), "PNG"),
        "16_bit.png": encoded(picture("I;16"), "PNG"),
        "1_bit.png": encoded(picture("1"), "PNG"),
        "grey.png": encoded(picture("L"), "PNG"),
        "animated_gif_named.png": encoded(picture("L"), "GIF", **frames),
        "animated.png": encoded(picture(), "PNG", **frames),
        "animated.webp": encoded(picture(), "WEBP", **frames),
        "cmyk.tiff": encoded(picture("CMYK"), "TIFF"),
        "1x1.png": encoded(picture(size=(1, 1)), "PNG"),
        "1x1.jpg": encoded(picture(size=(1, 1)), "JPEG"),
        "1x20000.png": encoded(high, "PNG"),
        "20000x1.jpg": encoded(wide, "JPEG"),
        "junk_behind_the_end.jpg": encoded(picture(), "JPEG") + b"junk" * 100,
    }


def unreadable_files():
    """Name to bytes of files that cannot be decoded."""
    jpeg, png = (encoded(picture(), kind) for kind in ("JPEG", "PNG"))
    data = dict(png_chunks(png))
    text = b"comment\0\0" + zlib.compress(bytes(4 * PngImagePlugin.MAX_TEXT_CHUNK))
    gif = encoded(picture("L"), "GIF")
    rows = zlib.compress(bytes(4 * 10**7))
    huge_jpeg = jpeg.replace(struct.pack(">HH", 28, 40), struct.pack(">HH", 65500, 65500))
    assert huge_jpeg != jpeg
    return {
        "empty.jpg": b"",
        "zeros.jpg": bytes(2000),
        "text.png": b"<html>404 Not Found</html>",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated_in_the_header.jpg": jpeg[:30],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": encoded(picture(), "WEBP")[:60],
        "header_only.png": png_file([png_header(40, 28)]),
        "no_pixels.png": png_file([png_header(0, 0), (b"IDAT", data[b"IDAT"]), (b"IEND", b"")]),
        "bomb.png": png_file([png_header(100000, 100000), (b"IDAT", data[b"IDAT"]), (b"IEND", b"")]),
        "bomb.jpg": huge_jpeg,
        "bomb_named.png": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        "bomb.tif": tiff_of_one_strip(13000, 13000),
        "tall.png": png_file([png_header(1, 10**7), (b"IDAT", rows), (b"IEND", b"")]),
        "float.tif": encoded(picture("F"), "TIFF"),
        "32_bit.tif": encoded(picture("I"), "TIFF"),
        "text_bomb.png": png_file([png_header(40, 28), (b"zTXt", text), (b"IDAT", data[b"IDAT"])]),
    }


def write_files(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)


def whole(path, turn=True):
    """The pixels that OpenCV reads of a file."""
    file = ImageFile(path, turn=turn)
    return file.crop(0, 0, *file.size, scale=1)


@contextlib.contextmanager
def memory_limit(extra_mb):
    """Let this process reserve no more than so many MB beyond what it has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_mb * MB, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_odd_images_are_used_as_pillow_converts_them(tmp_path):
    write_files(tmp_path, readable_files())
    for name in os.listdir(tmp_path):
        image = load_image(str(tmp_path / name), turn=False)
        with Image.open(tmp_path / name) as file:
            grey_16 = file.mode == "I;16"
            first_frame = Image.fromarray((np.asarray(file) // 256).astype("u1")) if grey_16 else file
            expected = first_frame.convert("RGB")
        assert image.mode == "RGB" and image.size == expected.size, name
        assert image.tobytes() == expected.tobytes(), name
        np.testing.assert_array_equal(whole(str(tmp_path / name), turn=False), np.asarray(expected))


def tiff_of_12_bits(values):
    """A TIFF file of one row of 12-bit grey."""
    data = sum(value << 12 * place for place, value in enumerate(reversed(values)))
    tags = [(256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1)]
    tags += [(278, 1), (279, len(values) * 12 // 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head + data.to_bytes(len(values) * 12 // 8, "big")


def files_of_more_than_8_bits():
    """Name to bytes of files whose upper 8 bits count from 0 to 255 in a row."""
    ramp = np.arange(0, 2**16, 256, dtype=np.uint16)[None] + 200
    colours = png_file(
        [
            (b"IHDR", struct.pack(">IIBBBBB", 256, 1, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"\0" + ramp.repeat(3, 1).astype(">u2").tobytes())),
            (b"IEND", b""),
        ]
    )
    return {
        "grey.png": encoded(Image.fromarray(ramp), "PNG"),
        "colours.png": colours,
        "grey.tif": encoded(Image.fromarray(ramp), "TIFF"),
        "big_endian.tif": encoded(Image.fromarray(ramp.astype(">u2")), "TIFF"),
        "12_bits.tif": tiff_of_12_bits([int(value) >> 4 for value in ramp[0]]),
        "grey.pgm": b"P5 256 1 65535\n" + ramp.astype(">u2").tobytes(),
    }


@pytest.mark.parametrize("name", files_of_more_than_8_bits())
def test_of_more_than_8_bits_the_upper_8_are_kept(tmp_path, name):
    write_files(tmp_path, files_of_more_than_8_bits())
    path, expected = str(tmp_path / name), np.arange(256)
    for mode in ("L", "RGB", "RGBA"):
        image = load_image(path, mode=mode)
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[0], expected[:, None].repeat(3, 1))
    np.testing.assert_array_equal(ImageFile(path).crop(0, 0, 256, 1, 1)[0], expected[:, None].repeat(3, 1))


@pytest.mark.parametrize("mode, what", [("F", "floats"), ("I", "signed or 32-bit numbers")])
def test_values_without_a_known_white_are_refused(tmp_path, mode, what):
    path = str(tmp_path / "depth.tif")
    picture(mode).save(path)
    for read in (load_image, lambda path: ImageFile(path).crop(0, 0, 9, 9, 1)):
        with pytest.raises(DataError, match=f"values are {what}, and no value is .* convert it to 8 or 16"):
            read(path)


RECIPE = ["AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.COLOR_JITTER", 0.4, "AUG.REPROB", 1.0]


@pytest.mark.parametrize("size", [32, 224, [48, 480]])
@pytest.mark.parametrize("is_train", [True, False])
def test_odd_images_go_through_the_transforms_in_little_memory(tmp_path, is_train, size):
    write_files(tmp_path, readable_files())
    config = digits_config("DATA.IMG_SIZE", size, *RECIPE)
    transform = build_transform(config, is_train)
    for name in os.listdir(tmp_path):
        image = load_image(str(tmp_path / name))
        with memory_limit(256):
            out = transform(image)
        assert out.shape == (3, *to_2tuple(size)) and torch.isfinite(out).all(), name


def test_unreadable_images_are_named(tmp_path):
    write_files(tmp_path, unreadable_files())
    for name in os.listdir(tmp_path):
        messages = []
        for read in (load_image, whole):
            with memory_limit(256), pytest.raises(DataError) as error:
                read(str(tmp_path / name))
            messages.append(str(error.value))
        assert messages[0].startswith(f"{tmp_path / name} cannot be read as an image"), messages
        assert "\n" not in messages[0] and messages[0].split("0x")[0] == messages[1].split("0x")[0], messages


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_the_limit_of_a_file_is_a_key(tmp_path, backend):
    path = str(tmp_path / "large.png")
    picture(size=(100, 100)).save(path)
    for limit, passes in ((10**4, True), (10**4 - 1, False)):
        opts = ["DATA.MAX_PIXELS", limit, "DATA.BACKEND", backend]
        read, transform = build_reader(digits_config(*opts), False)
        if passes:
            assert transform(read(path)).shape == (3, 32, 32)
        else:
            with pytest.raises(
                DataError, match=f"{path} cannot be read .* DATA.MAX_PIXELS is {limit}: raise"
            ):
                read(path)


def test_the_key_alone_limits_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow would refuse twice as many
    write_images(tmp_path / "train", 1, size=100)
    config = digits_config("DATA.IMG_SIZE", 64, "DATA.MAX_PIXELS", 10**4)
    read, transform = build_reader(config, is_train=True)
    dataset = build_dataset(str(tmp_path), "train", transform, read)
    assert load_image(dataset.samples[0][0]).size == (100, 100)
    assert dataset[0][0].shape == (3, 64, 64) and Image.MAX_IMAGE_PIXELS == 10


def test_pipes_and_devices_are_no_images(tmp_path):
    write_images(tmp_path / "val", 1, classes="a")
    os.mkfifo(tmp_path / "val" / "a" / "pipe.jpg")
    for name in ("zero", "tty"):
        os.symlink(f"/dev/{name}", tmp_path / "val" / "a" / f"{name}.jpg")
    os.symlink("/proc/kcore", tmp_path / "val" / "a" / "huge.jpg")
    os.symlink("self.jpg", tmp_path / "val" / "a" / "self.jpg")
    samples = EvaluationSamples(build_dataset(str(tmp_path), "val", None), skip=True)
    assert [bool(failed) for *_, failed in map(samples.__getitem__, range(6))] == [False] + [True] * 5
    for read in (load_image, ImageFile):
        with pytest.raises(DataError, match="pipe.jpg cannot be read as an image: it is not a file"):
            read(str(tmp_path / "val" / "a" / "pipe.jpg"))


def test_no_image_runs_ghostscript(tmp_path, monkeypatch):
    for name in ("gs", "gswin32c"):
        (tmp_path / name).write_text(f"#!/bin/sh\nmkdir -p {tmp_path}/trap\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    write_files(tmp_path, {"postscript.jpg": encoded(picture(), "EPS")})
    with pytest.raises(DataError, match="postscript.jpg"):
        load_image(str(tmp_path / "postscript.jpg"))
    assert not (tmp_path / "trap").exists()


NAMES = [f"{name}/{file}" for name in "abc" for file in sorted(f"{i}.png" for i in range(110))]


def folder_with_broken_images(folder, names):
    """The images :data:`NAMES` in each of train and val, some of them broken; returns the broken files."""
    write_images(folder / "train", 110, size=8)
    write_images(folder / "val", 110, size=8, seed=1)
    broken = list(unreadable_files().values())
    for split in ("train", "val"):
        for i, name in enumerate(names):
            (folder / split / name).write_bytes(broken[i % len(broken)])
    return [[str(folder / split / name) for name in names] for split in ("train", "val")]


def loaders(folder, *opts, workers=0):
    config = digits_config(
        "DATA.NUM_WORKERS", workers, "AUG.HFLIP", 0.5, *opts, data_path=str(folder), batch_size=10
    )
    train, sampler, val, _ = build_loaders(config)
    return train, sampler, val


THREE = ["a/5.png", "b/17.png", "c/109.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_ends_the_run_and_is_named(tmp_path, workers):
    (broken,), (broken_val,) = folder_with_broken_images(tmp_path, THREE[:1])
    train, _, val = loaders(tmp_path, workers=workers)
    for loader, path in ((train, broken), (val, broken_val)):
        with pytest.raises(DataError) as error:
            list(loader)
        assert f"{path} cannot be read as an image" in str(error.value)


def test_training_replaces_broken_images_alike_for_any_number_of_workers(tmp_path, log):
    broken, _ = folder_with_broken_images(tmp_path, THREE)
    found = []
    for workers in (0, 2):
        train, sampler, _ = loaders(tmp_path, "DATA.ON_ERROR", "skip", workers=workers)
        epochs = []
        for epoch in (0, 1):
            sampler.start(epoch)
            epochs += list(train)
        found.append(epochs)
        assert len(epochs) == 66 and all(len(images) == 10 for images, _ in epochs)
        assert {train.paths[index] for index in train.failed} == set(broken)
    for (images, targets), (images_2, targets_2) in zip(*found):
        assert torch.equal(images, images_2) and torch.equal(targets, targets_2)
    for path in broken:  # two loaders, of two epochs each
        assert sum(f"skipping {path}," in message for message in log) == 2


def test_evaluation_leaves_out_broken_images_and_nothing_else(tmp_path, log):
    _, broken = folder_with_broken_images(tmp_path / "broken", THREE)
    shutil.copytree(tmp_path / "broken", tmp_path / "clean")
    for name in THREE:
        (tmp_path / "clean" / "val" / name).unlink()
    logging.getLogger("msg_transformer").setLevel(logging.DEBUG)
    model, results = micro(), []
    for folder, skip in (("broken", "skip"), ("clean", "raise")):
        _, _, val = loaders(tmp_path / folder, "DATA.ON_ERROR", skip)
        results += [evaluate(model, val, Compute(torch.device("cpu")), 100) for _ in range(2)]
        assert "on 327 images" in log[-1]
    assert results[0] == results[1] and results[0] == pytest.approx(results[2], rel=1e-6)
    for path in broken:
        assert sum(f"skipping {path}," in message for message in log) == 1
    assert "(3 so far, 0.91%)" in "\n".join(log)


def test_more_than_1_percent_of_broken_images_ends_the_run(tmp_path, log):
    """Of fewer than 100 images it is one."""
    folder_with_broken_images(tmp_path / "330", [*THREE, "c/0.png"])
    train, _, val = loaders(tmp_path / "330", "DATA.ON_ERROR", "skip")
    write_images(tmp_path / "99" / "val", 33, size=8)
    (tmp_path / "99" / "val" / "a" / "0.png").write_bytes(b"broken")
    opts = ["DATA.NUM_WORKERS", 0, "DATA.ON_ERROR", "skip"]
    few = build_loaders(digits_config(*opts, data_path=str(tmp_path / "99"), eval=True))[2]
    for loader, share in ((train, "4 of 330"), (val, "4 of 330"), (few, "1 of 99")):
        with pytest.raises(DataError, match=f"{share} images cannot be read, more than 1%"):
            list(loader)


def test_1_of_330_broken_images_passes_with_4_processes(tmp_path):
    """Of the 83 images of its process it is more than 1%, and its batch is empty."""
    folder_with_broken_images(tmp_path, NAMES[8:9])
    opts = ["DATA.NUM_WORKERS", 0, "DATA.ON_ERROR", "skip"]
    config = digits_config(*opts, data_path=str(tmp_path), batch_size=1, eval=True)
    val = build_loaders(config, rank=0, world_size=4)[2]
    assert [len(targets) for _, targets in val] == [1, 1, 0, *[1] * 80] and val.failed == {8}
    val.check_failures()


@pytest.mark.parametrize("split", ["train", "val"])
def test_6_of_330_broken_images_end_a_run_of_2_processes(tmp_path, split):
    # Three for each process, which are no more than 1% of the set.
    shards = [evaluation_shard(330, rank, 2) for rank in (0, 1)]
    arguments = ["--eval", "--resume", tmp_path / "weights.pth"]
    torch.save(build_model(digits_config("MODEL.NUM_CLASSES", 3)).state_dict(), arguments[-1])
    if split == "train":
        samplers = [TrainBatchSampler(330, 40, 1, rank, 2, seed=0) for rank in (0, 1)]
        shards = [[index for batch in sampler for _, index in batch] for sampler in samplers]
        arguments = []
    folder_with_broken_images(tmp_path, [NAMES[index] for shard in shards for index in shard[:3]])
    words = ["--cfg", "configs/digits.yaml", "--data-path", tmp_path, "--output", tmp_path / "output"]
    opts = ["DATA.NUM_WORKERS", 0, "DATA.ON_ERROR", "skip", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0]
    words += ["--batch-size", 40, *arguments, "--opts", *opts]
    done = run_main(*words, processes=2, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: 6 of 330 images cannot be read, more than 1%" in done.stderr, done.stderr


def originals(rng):
    """Small JPEG and PNG files of all kinds."""
    side = rng.randrange(32, 65)
    image = picture(size=(side, rng.randrange(32, 65)), seed=rng.randrange(100))
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    return [
        encoded(image, "JPEG"),
        encoded(image, "JPEG", progressive=True, exif=exif),
        encoded(image.convert("CMYK"), "JPEG", subsampling=0),
        encoded(image.convert("L"), "JPEG", optimize=True),
        encoded(image, "PNG", compress_level=1),
        encoded(image.quantize(16), "PNG", transparency=bytes(range(16))),
        encoded(image.convert("RGBA"), "PNG", compress_level=1),
        encoded(image.convert("1"), "PNG"),
        encoded(picture("I;16", (side, 40)), "PNG"),
        encoded(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
    ]


def flip_bytes(content, rng):
    """Change one to eight bytes to random ones."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 9)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def mutate_chunks(content, rng):
    """Swap, double, drop or change segments of a file; a PNG's checksums stay right, so that the data is
    decoded."""
    png = content.startswith(b"\x89PNG")
    parts = png_chunks(content) if png else content.split(b"\xff")
    i, j = (rng.randrange(len(parts)) for _ in range(2))
    action = rng.randrange(4)
    if action == 0:
        parts[i], parts[j] = parts[j], parts[i]
    elif action == 1:
        parts.insert(i, parts[j])
    elif action == 2:
        del parts[i]
    elif png:
        kind, data = parts[i]
        parts[i] = (kind, flip_bytes(data, rng) if data else rng.randbytes(8))
    else:
        parts[i] = flip_bytes(parts[i], rng) if parts[i] else rng.randbytes(8)
    return png_file(parts) if png else b"\xff".join(parts)


def mutated(content, rng):
    """A damaged copy of a file."""
    action, place = rng.randrange(5), rng.randrange(len(content))
    if action == 0:
        return content[:place]
    if action == 1:
        return content[:place] + rng.randbytes(rng.randrange(1, 64)) + content[place:]
    if action == 2:
        return flip_bytes(content, rng)
    return mutate_chunks(content, rng)


@pytest.mark.parametrize("rounds, files", [(2, 100), pytest.param(20, 1000, marks=pytest.mark.chaos)])
def test_mutated_files_are_read_or_refused(tmp_path, rounds, files):
    """Others in every round, by one worker that survives all of them and does not grow."""
    rng = random.Random(7)
    write_images(tmp_path / "val", 1, classes="ab", size=8)
    write_images(tmp_path / "train", files // 2, classes="b", size=8)  # what replaces files that are refused
    os.makedirs(tmp_path / "train" / "a")
    names = [tmp_path / "train" / "a" / f"{i}.{'jpg' if i % 10 < 4 else 'png'}" for i in range(files)]
    for name in names:
        name.touch()
    others = multiprocessing.active_children()
    train, sampler, _ = loaders(tmp_path, "DATA.ON_ERROR", "skip", *RECIPE, "AUG.REPROB", 0.25, workers=1)
    train.loader.timeout = 60  # a file that takes a minute hangs
    refused, memory = 0, []
    for epoch in range(rounds):
        kinds = [kind for _ in range(10) for kind in originals(rng)]
        for i, name in enumerate(names):
            name.write_bytes(mutated(kinds[i % len(kinds)], rng))
        sampler.start(epoch)
        failed = set()
        # The inner loader: the outer one would stop at 1% of broken files.
        for images, targets, indices in train.loader:
            assert images.shape == (10, 3, 32, 32) and torch.isfinite(images).all() and len(targets) == 10
            failed.update(indices)
        refused += len(failed)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        processes = [os.getpid(), *(child.pid for child in workers)]
        pages = [int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes]
        memory.append({process: n * resource.getpagesize() / MB for process, n in zip(processes, pages)})
    assert memory[0].keys() == memory[-1].keys() and len(memory[0]) == 2
    assert max(memory[-1][process] - before for process, before in memory[0].items()) < 64
    assert rounds * files / 5 < refused < rounds * files
