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

import numpy as np
import pytest
import torch
from helpers import digits_config, micro, write_images
from PIL import Image, PngImagePlugin

from data import DataError, build_loaders
from data.datasets import load_image
from data.transforms import build_transform
from main import evaluate

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
        "float.tif": encoded(picture("F"), "TIFF"),
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
        "text_bomb.png": png_file([png_header(40, 28), (b"zTXt", text), (b"IDAT", data[b"IDAT"])]),
    }


def write_files(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)


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
        image = load_image(str(tmp_path / name))
        with Image.open(tmp_path / name) as file:
            expected = file.convert("RGB")
        assert image.mode == "RGB" and image.size == expected.size, name
        assert image.tobytes() == expected.tobytes(), name


def test_rotation_is_left_alone_and_animations_give_their_first_frame(tmp_path):
    write_files(tmp_path, readable_files())
    assert load_image(str(tmp_path / "rotated.jpg")).size == (40, 28)
    for name in ("animated.png", "animated.webp", "animated_gif_named.png"):
        found = np.asarray(load_image(str(tmp_path / name)), dtype=float)
        first, second = (np.asarray(picture(seed=seed), dtype=float) for seed in (0, 1))
        assert abs(found - first).mean() < abs(found - second).mean(), name


RECIPE = ["AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.COLOR_JITTER", 0.4, "AUG.REPROB", 1.0]


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("is_train", [True, False])
def test_odd_images_go_through_the_transforms_in_little_memory(tmp_path, is_train, size):
    write_files(tmp_path, readable_files())
    config = digits_config("DATA.IMG_SIZE", size, *RECIPE)
    transform = build_transform(config, is_train)
    for name in os.listdir(tmp_path):
        image = load_image(str(tmp_path / name))
        with memory_limit(256):
            out = transform(image)
        assert out.shape == (3, size, size) and torch.isfinite(out).all(), name


def test_unreadable_images_are_named(tmp_path):
    write_files(tmp_path, unreadable_files())
    for name in os.listdir(tmp_path):
        with memory_limit(256), pytest.raises(DataError) as error:
            load_image(str(tmp_path / name))
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name} cannot be read as an image"), message
        assert "\n" not in message


def test_decompression_bombs_follow_pillows_limit(tmp_path, monkeypatch):
    path = str(tmp_path / "large.png")
    picture(size=(100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    assert load_image(path).size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100 // 2 - 1)
    with pytest.raises(DataError, match="large.png cannot be read as an image .*decompression bomb"):
        load_image(path)


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


@pytest.fixture
def log():
    """Messages of the run's logger."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("msg_transformer")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def folder_with_broken_images(folder, names):
    """330 images in each of train and val, those of ``names`` broken; returns the broken files."""
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
    logger = logging.getLogger("msg_transformer")
    logger.setLevel(logging.DEBUG)
    model, results = micro(), []
    for folder, skip in (("broken", "skip"), ("clean", "raise")):
        _, _, val = loaders(tmp_path / folder, "DATA.ON_ERROR", skip)
        results += [evaluate(model, val, torch.device("cpu"), None, 100, logger) for _ in range(2)]
        assert "on 327 images" in log[-1]
    assert results[0] == results[1] and results[0] == pytest.approx(results[2], rel=1e-6)
    for path in broken:
        assert sum(f"skipping {path}," in message for message in log) == 1
    assert "(3 so far, 0.91%)" in "\n".join(log)


def test_a_batch_of_broken_images_only_does_not_count(tmp_path, log):
    folder_with_broken_images(tmp_path, ["a/0.png", "a/1.png", "a/10.png"])  # three neighbours
    config = digits_config(
        "DATA.NUM_WORKERS", 0, "DATA.ON_ERROR", "skip", data_path=str(tmp_path), batch_size=1
    )
    _, _, val, _ = build_loaders(config)
    assert [len(targets) for _, targets in val] == [0] * 3 + [1] * 327


def test_more_than_1_percent_of_broken_images_ends_the_run(tmp_path, log):
    folder_with_broken_images(tmp_path, [*THREE, "c/0.png"])
    train, _, val = loaders(tmp_path, "DATA.ON_ERROR", "skip")
    for loader in (train, val):
        with pytest.raises(DataError, match="4 of 330 images cannot be read, more than 1%"):
            list(loader)


def test_1_percent_is_counted_among_the_images_of_a_process(tmp_path, log):
    write_images(tmp_path / "train", 110, size=8)
    write_images(tmp_path / "val", 110, size=8, seed=1)
    config = digits_config("DATA.NUM_WORKERS", 0, "DATA.ON_ERROR", "skip", data_path=str(tmp_path))
    both = [build_loaders(config, rank, world_size=2) for rank in (0, 1)]
    for which in (0, 2):
        for path in both[0][which].paths[:6]:
            with open(path, "wb") as file:
                file.write(b"broken")
        refused = 0
        for loaders_of_rank in both:
            try:
                list(loaders_of_rank[which])
            except DataError as error:
                refused += "more than 1%" in str(error)
        assert refused


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


def resident_mb(process):
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MB


def read_mutated_files(folder, rounds, files, growth_mb):
    """Train-load ``files`` mutated files, others in every round, in one worker process.

    Returns:
        How many were read, and how many of them refused.
    """
    rng = random.Random(7)
    write_images(folder / "val", 1, classes="ab", size=8)
    write_images(folder / "train", files // 2, classes="b", size=8)  # what replaces files that are refused
    os.makedirs(folder / "train" / "a")
    names = [folder / "train" / "a" / f"{i}.{'jpg' if i % 10 < 4 else 'png'}" for i in range(files)]
    for name in names:
        name.touch()
    config = digits_config(
        "DATA.NUM_WORKERS", 1, "DATA.ON_ERROR", "skip", *RECIPE, "AUG.REPROB", 0.25,
        data_path=str(folder), batch_size=10,
    )  # fmt: skip
    others = multiprocessing.active_children()
    train, sampler, _, _ = build_loaders(config)
    train.loader.timeout = 60  # a file that takes a minute hangs
    read = refused = 0
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
        read, refused = read + files, refused + len(failed)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        processes = [os.getpid(), *(child.pid for child in workers)]
        memory = [resident_mb(process) for process in processes]
        if epoch == 0:
            first_processes, first = processes, memory
    assert processes == first_processes and len(processes) == 2  # the same worker survived all of it
    grown = [now - before for now, before in zip(memory, first)]
    print(f"{read} mutated files read, {refused} refused; memory grew by {grown} MB")
    assert max(grown) < growth_mb
    return read, refused


def test_mutated_files_are_read_or_refused(tmp_path, count):
    read, refused = read_mutated_files(tmp_path, 2, 200, growth_mb=64)
    assert read == 400 and read / 5 < refused < read
    count("mutated files read", read)
    count("mutated files refused", refused)


@pytest.mark.chaos
def test_20000_mutated_files_are_read_or_refused(tmp_path, count):
    read, refused = read_mutated_files(tmp_path, 20, 1000, growth_mb=64)
    assert read == 20000 and read / 5 < refused < read
    count("mutated files read", read)
    count("mutated files refused", refused)
