"""Time the input pipelines against timm's: images/s of one core, from JPEG files to normalised batches.

python tools/benchmark_data.py <folder>                      any folder with JPEG images, at any depth
python tools/benchmark_data.py --draw benchmarks/data.json   table and picture of an earlier result again

What is timed is a loader with one worker process. The ratios compare with timm's create_transform, which uses
Pillow; ours runs with each DATA.BACKEND. What opencv leaves to the device, normalising and erasing, the main
process does meanwhile; "opencv for a GPU" stops at the batches that a GPU would receive. Decoding alone says what
no pipeline can beat, and decoding to an eighth of the sides what the Huffman code takes of that, which a part of
an image needs as well, down to its last row. In every round each pipeline reads the same images once; a figure is
the median of the rounds.
"""

import argparse
import sys
from pathlib import Path

import cv2
import PIL
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchmarking

from config import get_config
from data.datasets import EvaluationSamples, TrainingSamples
from data.loaders import Loader, ToDevice, build_reader, collate, start_worker
from data.mixup import build_augmentation
from data.opencv import ImageFile
from data.transforms import augment_operations, posterize_from_0_bits
from models.roofline import machine
from utils import UserError

CONFIG = Path(__file__).parents[1] / "configs" / "msg_tiny_p4_win7_224.yaml"
PEER = "timm"


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", nargs="?", help="folder with JPEG images, at any depth")
    add("--images", type=int, default=200, help="read the first so many, in the order of their paths")
    add("--batch-size", type=int, default=32)
    add("--rounds", type=int, default=9)
    benchmarking.add_arguments(parser, "output/benchmark_data")
    args = parser.parse_args()
    if not args.folder and not args.draw:
        parser.error("give a folder with JPEG images")
    return args


def find_images(folder, count):
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


class Files(Dataset):
    """Images of files, with class 0: ``transform`` of what ``read`` makes of a path."""

    def __init__(self, paths, read, transform):
        self.paths, self.read, self.transform = paths, read, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(self.read(self.paths[index])), 0


def pipeline(name, is_train, paths, batch_size):
    """A function that makes batches of all files once, the way of a candidate."""
    workers = dict(num_workers=1, persistent_workers=True)
    if name == PEER:
        files = Files(paths, read_with_pillow, peer_transform(is_train))
        loader = DataLoader(files, batch_size, **workers)
        return lambda: list(map(len, loader))
    backend, _, for_gpu = name.partition(" ")
    options = ["DATA.BACKEND", backend, "AUG.MIXUP", "0", "AUG.CUTMIX", "0"]
    config = get_config(argparse.Namespace(cfg=str(CONFIG), opts=options))
    files = Files(paths, *build_reader(config, is_train))
    samples = TrainingSamples(files, 0, skip=False) if is_train else EvaluationSamples(files, skip=False)
    order = [(0, index) for index in range(len(paths))] if is_train else None
    options = dict(workers, collate_fn=collate, worker_init_fn=start_worker)
    loader = DataLoader(samples, batch_size, sampler=order, **options)
    if for_gpu:
        return lambda: list(map(len, loader))
    loader = Loader(loader, paths, ToDevice(torch.device("cpu")))
    augment = build_augmentation(config, 0, "cpu")

    def run():
        for step, (images, targets) in enumerate(loader):
            if is_train:
                augment(images, targets, step)

    return run


def read_with_pillow(path):
    """A file as an RGB image of Pillow."""
    return Image.open(path).convert("RGB")


def decode_with_opencv(path, scale=1):
    """The pixels of a file, for a result whose sides are ``scale`` times smaller."""
    file = ImageFile(path)
    return file.crop(0, 0, *file.size, scale=scale)


def candidates(paths, batch_size):
    """What to time: setting to name to function."""
    names = (PEER, "pil", "opencv", "opencv for a GPU")
    return {
        "training": {name: pipeline(name, True, paths, batch_size) for name in names},
        "evaluation": {name: pipeline(name, False, paths, batch_size) for name in names},
        "decoding alone": {
            PEER: lambda: [read_with_pillow(path) for path in paths],
            "opencv": lambda: [decode_with_opencv(path) for path in paths],
            "opencv to an eighth": lambda: [decode_with_opencv(path, scale=16) for path in paths],
        },
    }


def compare(functions, rounds):
    """Time functions in turn: rows of name, and median and quartiles of the speed over the peer's median."""
    times = dict(zip(functions, benchmarking.time_in_turn(list(functions.values()), rounds)))
    _, peer, _ = times[PEER]
    return [
        dict(name=name, ratio=peer / median, quartiles=[peer / high, peer / low])
        for name, (low, median, high) in times.items()
    ]


def report(result):
    """The table of a result in Markdown, and its figure."""
    rows, panels = [], {}
    for setting, found in result["settings"].items():
        for row in found:
            low, high = row["quartiles"]
            rows.append([setting, row["name"], f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"])
            bar = benchmarking.Bar(row["name"], row["name"] != PEER, row["ratio"], row["quartiles"])
            panels.setdefault(setting, []).append(bar)
    notes = [f"{result['images']} images, medians of {result['rounds']} alternating rounds."]
    columns = ["setting", "pipeline", "images/s, timm + Pillow = 1", "quartiles"]
    label = "images/s of one worker, timm + Pillow = 1 (more is faster)"
    table = benchmarking.markdown(result, notes, columns, rows)
    return table, {"": benchmarking.draw_bars(panels, label)}


def run(args):
    """Time the pipelines and print the ratios; returns the result."""
    paths = find_images(args.folder, args.images)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    result = dict(machine=f"{machine('cpu')}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}")
    result.update(images=len(paths), rounds=args.rounds, settings={})
    print(f"{result['machine']}\n{len(paths)} images of {args.folder}")
    for setting, functions in candidates(paths, args.batch_size).items():
        print(setting, flush=True)
        rows = result["settings"][setting] = compare(functions, args.rounds)
        for row in rows:
            print(f"  {row['name']:15} {row['ratio']:.2f}")
    return result


if __name__ == "__main__":
    benchmarking.main(parse_args(), run, report)
