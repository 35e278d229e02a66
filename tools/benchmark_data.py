"""Time the input pipelines against timm's: images/s of one core, from JPEG files to normalised batches.

python tools/benchmark_data.py <folder>      any folder with JPEG images in it, at any depth

What is timed is a loader with one worker process. Candidates are timm's create_transform with Pillow, which
is the peer of the ratios, and ours with each DATA.BACKEND. What opencv leaves to the device, normalising and
erasing, is done by the main process meanwhile; "opencv for a GPU" ends with the batches that a GPU gets. In
every round each candidate reads the same images once, so that a machine that slows down slows down all; a
figure is the median of the rounds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import cv2
import PIL
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

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
    add("folder", help="folder with JPEG images, at any depth")
    add("--images", type=int, default=200, help="read the first so many, in the order of their paths")
    add("--batch-size", type=int, default=32)
    add("--rounds", type=int, default=9)
    add("--output", default="output/benchmark_data", metavar="PATH", help="PATH.json, PATH.md and PATH.png")
    return parser.parse_args()


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


def decode_with_opencv(path):
    """The pixels of a file."""
    file = ImageFile(path)
    return file.crop(0, 0, *file.size, scale=1)


def candidates(paths, batch_size):
    """What to time: setting to name to function. Decoding alone says what no pipeline can beat."""
    names = (PEER, "pil", "opencv", "opencv for a GPU")
    return {
        "training": {name: pipeline(name, True, paths, batch_size) for name in names},
        "evaluation": {name: pipeline(name, False, paths, batch_size) for name in names},
        "decoding alone": {
            PEER: lambda: [read_with_pillow(path) for path in paths],
            "opencv": lambda: [decode_with_opencv(path) for path in paths],
        },
    }


def compare(functions, rounds):
    """Time functions in turn: rows of name, and median and quartiles of the speed over the peer's median."""
    seconds = {name: [] for name in functions}
    for done in range(-1, rounds):  # the first is a warm-up
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if done >= 0:
                seconds[name].append(time.perf_counter() - begin)
        print(f"\r  round {done + 1}/{rounds}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    peer = statistics.median(seconds[PEER])
    rows = []
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows.append(dict(name=name, ratio=peer / median, quartiles=[peer / high, peer / low]))
    return rows


def table(result):
    """The rows as a markdown table."""
    lines = [f"`{result['command']}`", "", result["machine"], ""]
    lines += [f"{result['images']} images, medians of {result['rounds']} alternating rounds.", ""]
    lines += ["| setting | pipeline | images/s, timm + Pillow = 1 | quartiles |", "|---|---|---:|---:|"]
    for setting, rows in result["settings"].items():
        for row in rows:
            low, high = row["quartiles"]
            lines.append(f"| {setting} | {row['name']} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines) + "\n"


def draw_bars(result, path):
    """Draw the speed of every pipeline, a panel for each setting."""
    settings = result["settings"]
    figure = Figure(figsize=(9, 0.8 + sum(0.5 + 0.3 * len(rows) for rows in settings.values())))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    heights = [1 + len(rows) for rows in settings.values()]
    panels = figure.subplots(len(settings), 1, sharex=True, height_ratios=heights)
    for axes, (setting, rows) in zip(panels, settings.items()):
        colours = ["tab:grey" if row["name"] == PEER else "tab:blue" for row in rows]
        bars = axes.barh([row["name"] for row in rows], [row["ratio"] for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(1, color="black", lw=0.8, ls=":")
        axes.invert_yaxis()
        axes.set_title(setting, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("images per second of one core, timm + Pillow = 1 (more is faster)")
    panels[-1].set_xlim(0, 1.12 * max(row["ratio"] for rows in settings.values() for row in rows))
    figure.savefig(path, dpi=120)


def main():
    """Time the pipelines, print the ratios, write the files."""
    args = parse_args()
    paths = find_images(args.folder, args.images)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    result = dict(machine=f"{machine('cpu')}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}")
    result["command"] = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    result.update(images=len(paths), rounds=args.rounds, settings={})
    print(f"{result['machine']}\n{len(paths)} images of {args.folder}")
    for setting, functions in candidates(paths, args.batch_size).items():
        print(setting, flush=True)
        rows = result["settings"][setting] = compare(functions, args.rounds)
        for row in rows:
            print(f"  {row['name']:15} {row['ratio']:.2f}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.output}.md").write_text(table(result))
    draw_bars(result, f"{args.output}.png")
    print(f"wrote {args.output}.json, .md and .png")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
