"""Time the input pipelines against timm's, from JPEG files to normalised batches.

python tools/benchmark_data.py <folder>                      any folder with JPEG images, at any depth

What is timed is a loader with one worker process, in images/s of one core. The ratios compare with timm's
create_transform, which uses Pillow; ours runs with each DATA.BACKEND. What opencv leaves to the device,
normalising and erasing, the main process does meanwhile. A turn reads all of the images once.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import benchmarking, tables
from utils import ROOT, check_environment

CONFIG = ROOT / "configs" / "msg_tiny_p4_win7_224.yaml"
PEER = "timm"
BATCH = 32


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", help="folder with JPEG images, at any depth")
    add("--images", type=int, default=200, help="read the first so many, in the order of paths")
    add("--rounds", type=int, default=9)
    benchmarking.add_arguments(parser, "input")
    return parser.parse_args()


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    ARGS = parse_args()

import cv2
import PIL
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from config import get_config
from data.loaders import ToDevice, build_loader, build_reader, collate
from data.transforms import augment_operations, build_augmentation, posterize_from_0_bits
from tools.benchmarking import machine, versions
from utils import UserError


def find_jpegs(folder, count):
    """The first ``count`` JPEG files below a folder.

    Raises:
        UserError: there are none.
    """
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"{folder} holds no JPEG images (.jpg, .jpeg), at any depth")
    return paths[:count]


def peer_transform(is_train):
    """The recipe of configs/ as timm builds it, but posterizing to 0 bits, which Pillow refuses, works."""
    recipe = dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", color_jitter=0.4)
    transform = create_transform(
        224, is_training=is_train, interpolation="bicubic", crop_pct=224 / 256, **recipe if is_train else {}
    )
    for operation in (op for step in transform.transforms for op in augment_operations(step)):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize_from_0_bits
    return transform


def read_with_pillow(path):
    """A file as an RGB image of Pillow."""
    return Image.open(path).convert("RGB")


class Files(Dataset):
    """Images of files, with class 0: ``transform`` of what ``read`` makes of a path."""

    def __init__(self, paths, read, transform):
        self.paths, self.read, self.transform = paths, read, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(self.read(self.paths[index])), 0


def pipeline(name, is_train, paths):
    """A function that makes batches of all files once, the way of a candidate."""
    if name == PEER:
        files = Files(paths, read_with_pillow, peer_transform(is_train))
        loader = DataLoader(files, BATCH, num_workers=1, persistent_workers=True)
        return lambda: list(map(len, loader))
    options = ["DATA.BACKEND", name, "DATA.NUM_WORKERS", "1", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"]
    config = get_config(argparse.Namespace(cfg=str(CONFIG), opts=options))
    files, to_device = Files(paths, *build_reader(config, is_train)), ToDevice(torch.device("cpu"))
    if not is_train:
        loader = build_loader(config, files, range(len(paths)), to_device, collate, BATCH)
        return lambda: list(map(len, loader))
    keys = [(0, index) for index in range(len(paths))]
    batches = [keys[first : first + BATCH] for first in range(0, len(keys), BATCH)]
    loader = build_loader(config, files, batches, to_device, collate)
    augment = build_augmentation(config, 0, "cpu")

    def read():
        for step, (images, targets) in enumerate(loader):
            augment(images, targets, step)

    return read


def turn(read):
    """The seconds of reading all images once, as a turn of one step."""
    begin = time.perf_counter()
    read()
    return 1, time.perf_counter() - begin


def run(args):
    """Time the pipelines and print the ratios; returns the result."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    of_images = dict(pillow=PIL.__version__, opencv=cv2.__version__)
    result = dict(machine=machine("cpu"), versions=dict(versions(), **of_images), figure="images per second")
    paths = find_jpegs(args.folder, args.images)
    result.update(peer=PEER, images=len(paths), settings={})
    print(*result["machine"].values(), f"\n{len(paths)} images of {args.folder}")
    for setting, is_train in (("training", True), ("evaluation", False)):
        print(setting, flush=True)
        names = (PEER, "pil", "opencv")
        turns = [partial(turn, pipeline(name, is_train, paths)) for name in names]
        for take in turns:  # starts the workers
            take()
        taken = benchmarking.time_in_turn(turns, args.rounds, peer=0)
        result["settings"][setting] = [dict(model=name, turns=of_one) for name, of_one in zip(names, taken)]
        print(tables.in_lines(result, setting))
    return result


if __name__ == "__main__":
    benchmarking.main(ARGS, run)
