"""Copy an image folder with smaller images, which decode faster: their short side is at most --size pixels.

python tools/shrink.py <folder> <copy> --size 256
python main.py --cfg <config> --data-path <copy>

Names and class folders stay. Images whose short side is no longer than that are copied as they are, and so is
the EXIF orientation, which the loader ignores. The same command goes on after an interruption. Files that
cannot be read are named and left out, and then the exit code is 1.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import distributed
from data.datasets import (
    MAX_PIXELS,
    DataError,
    decoding,
    find_images,
    list_folder,
    open_image,
    without_pillows_limit,
)
from data.loaders import start_worker
from utils import UserError, lock_file, replacing

SETTINGS = ".shrink.json"
ORIENTATION = 0x0112  # of EXIF


@dataclass(frozen=True)
class Settings:
    """What a copy is made with: the longest short side in pixels, and the quality of JPEG and WebP files."""

    size: int
    quality: int


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", help="images, at any depth, such as <dataset-path>")
    add("copy", help="a new folder, or that of an interrupted run of the same command")
    add("--size", type=int, default=256, help="longest short side, in pixels")
    add("--quality", type=int, default=95, help="of the JPEG and WebP files, 1 to 100; others are lossless")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="larger images count as unreadable")
    add("--workers", type=int, default=_cores(), help="processes; default: one for each core")
    args = parser.parse_args()
    if min(args.size, args.max_pixels, args.workers) < 1 or not 1 <= args.quality <= 100:
        parser.error("--size, --max-pixels and --workers must be at least 1, --quality from 1 to 100")
    return args


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def shrink(image, size):
    """An image with its short side at most ``size``, resized as the loader resizes it: bicubic.

    Each band on its own: Pillow would blacken what is transparent, where the loader shows what is below.

    Args:
        image: of Pillow, its short side longer than that.

    Returns:
        The image, of mode L, LA, RGB or RGBA.
    """
    if "transparency" in image.info:
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")  # as the loader does
    shortest = min(image.size)
    sides = [round(side * size / shortest) for side in image.size]
    bands = [band.resize(sides, Image.Resampling.BICUBIC) for band in image.split()]
    return Image.merge(image.mode, bands)


def encode(image, original, quality):
    """The bytes of a file with the orientation and colour profile of the original image.

    JPEG and WebP stay what they are; others become PNG data, whatever their name ends in: readers of images
    look at the content.
    """
    options = dict(icc_profile=original.info.get("icc_profile"))
    with contextlib.suppress(Exception):  # damaged EXIF data does not disturb the loader
        orientation = original.getexif().get(ORIENTATION)
        if orientation is not None:
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            options.update(exif=exif.tobytes())
    kind = original.format if original.format in ("JPEG", "WEBP") else "PNG"
    file = io.BytesIO()
    image.save(file, kind, **options, **({} if kind == "PNG" else dict(quality=quality)))
    return file.getvalue()


class Copies(Dataset):
    """Asking for an item writes the copy of an image; it is the reason why it could not be read, or None."""

    def __init__(self, pairs, settings, max_pixels):
        self.pairs, self.settings, self.max_pixels = pairs, settings, max_pixels

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, target = self.pairs[index]
        try:
            content = self._content(path)
        except DataError as error:
            return str(error)
        try:
            with replacing(target) as temporary, open(temporary, "wb") as file:
                file.write(content)
        except OSError as error:
            raise UserError(
                f"cannot write {target} ({error.strerror}); the same command goes on from here"
            ) from None
        return None

    def _content(self, path):
        with decoding(path), without_pillows_limit():
            image, content = open_image(path, self.max_pixels)
            image.load()
            if min(image.size) <= self.settings.size:
                return content
            return encode(shrink(image, self.settings.size), image, self.settings.quality)


def plan(source, target):
    """The images below ``source``, and the folders that their copies need.

    Returns:
        Pairs of (path, path of the copy), folders to make, a Counter of files that are no images.

    Raises:
        UserError: there are no images, or copies would be written into the folders of the images.
    """
    ignored = collections.Counter()
    images = find_images(os.path.dirname(source), os.path.basename(source), ignored)
    if not images:
        raise UserError(f"{source} holds no images")
    # Classes without images too: they count as classes.
    tops = [entry.name for entry in list_folder(source)[0]]
    nested = [os.path.join(top, entry.name) for top in tops for entry in list_folder(f"{source}/{top}")[0]]
    pairs = [(path, os.path.join(target, os.path.relpath(path, source))) for path in images]
    folders = {os.path.join(target, name) for name in tops + nested if "/." not in f"/{name}"}
    folders |= {os.path.dirname(copy) for _, copy in pairs}
    sources = {os.path.realpath(source), *(os.path.realpath(os.path.dirname(path)) for path in images)}
    for folder in {target, *folders}:
        real = Path(os.path.realpath(folder))
        if inside := sources & {str(path) for path in (real, *real.parents)}:
            raise UserError(f"{folder} would be written into the images of {inside.pop()}: give another copy")
    return pairs, sorted(folders), ignored


@contextlib.contextmanager
def claim(target, settings):
    """Context that keeps other runs out of the folder of a copy, which is made where there is none.

    Raises:
        UserError: the folder cannot be written, is in use, or holds something else.
    """
    path, text = os.path.join(target, SETTINGS), json.dumps(asdict(settings))
    try:
        os.makedirs(target, exist_ok=True)
        if not os.path.exists(path):
            if os.listdir(target):
                raise UserError(f"{target} holds files of something else: give a new folder")
            with replacing(path) as temporary, open(temporary, "w") as file:
                file.write(text)
        with open(path, "r+") as file:
            if not lock_file(file):
                raise UserError(f"another run is writing {target}: wait for it")
            found = file.read()
            if found != text:
                raise UserError(f"{target} was begun with {found}: go on with that, or give a new folder")
            yield
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error}") from error


def run(args):
    """Write the copy and tell what was done.

    Raises:
        UserError: at the end, images could not be read; see also :func:`plan` and :func:`claim`.
    """
    source, target = os.path.abspath(args.folder), os.path.abspath(args.copy)
    settings = Settings(args.size, args.quality)
    pairs, folders, ignored = plan(source, target)
    with claim(target, settings):
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
            for name in os.listdir(folder):
                if re.search(r"\.[0-9a-f]{8}\.tmp$", name):  # of a killed run
                    os.remove(os.path.join(folder, name))
        missing = [pair for pair in pairs if not os.path.exists(pair[1])]
        others = f"; not copied: {sum(ignored.values()):,} other files" if ignored else ""
        print(f"{source}: {len(pairs):,} images, {len(pairs) - len(missing):,} of them copied before{others}")
        broken = write(Copies(missing, settings, args.max_pixels), args.workers)
    whole = [pair for pair in pairs if os.path.exists(pair[1])]
    before, after = (sum(os.path.getsize(pair[side]) for pair in whole) / 1e6 for side in (0, 1))
    print(f"{target}: {len(whole):,} images, {after:,.1f} MB, which were {before:,.1f} MB")
    if broken:
        raise UserError(f"{broken:,} images cannot be read and are not in {target}; they are named above")


def write(copies, workers):
    """Write all copies, with a progress bar; returns how many images could not be read."""
    options = dict(num_workers=min(workers, len(copies)), worker_init_fn=start_worker)
    broken = 0
    with tqdm(total=len(copies), unit=" images") as bar:
        for reasons in DataLoader(copies, 16, collate_fn=list, **options):
            for reason in filter(None, reasons):
                broken += 1
                bar.write(f"left out: {reason}", file=sys.stderr)
            bar.update(len(reasons))
    return broken


if __name__ == "__main__":
    arguments = parse_args()
    distributed.run_command(lambda: run(arguments))
