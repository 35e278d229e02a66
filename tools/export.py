"""Write a checkpoint for other programs, each file run and compared with PyTorch before it gets its name.

python tools/export.py <checkpoint>
python tools/export.py <checkpoint> --formats onnx --data-path <folder>

Files take any number of images of one size. Next to the checkpoint, or in --output, are written

  <name>.onnx              for ONNX Runtime and OpenVINO
  <name>.torch_export.pt2  for torch.export.load
  <name>.safetensors       the weights, with the config and the class names, for --pretrained and --resume

A file may be 1e-4 off PyTorch (of its largest output, where that is above 1). What differs more is deleted.
Of a detector it is the backbone and the feature pyramid that are written. docs/use.md says what the files
expect.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import CHOICES
from tools import benchmarking

FORMAT_NAMES = ["onnx", "torch_export", "safetensors"]
BATCHES = 1, 2, 5  # numbers of images that files are compared on


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", help="of main.py or detect.py, or a safetensors file of this command")
    add("--formats", nargs="+", choices=FORMAT_NAMES, default=FORMAT_NAMES, help="default: all")
    add("--cfg", metavar="FILE", help="config of a checkpoint that holds none, such as an official one")
    add("--weights", choices=CHOICES["TEST.WEIGHTS"], default="auto", help="as TEST.WEIGHTS; default: auto")
    sides = "a side or HEIGHTxWIDTH, as a file is for one size; default: that of the config"
    add("--size", type=benchmarking.image_sides, metavar="PX", help=sides)
    add("--data-path", metavar="DIR", help="compare top-1 too, over DIR/val/<class>/<image>")
    add("--output", metavar="DIR", help="default: the folder of the checkpoint")
    add("--name", help="what file names begin with; default: that of the checkpoint")
    add("--overwrite", action="store_true", help="replace files that are there already")
    return parser.parse_args()


if __name__ == "__main__":  # before what takes seconds to import
    ARGS = parse_args()

from timm.layers import to_2tuple
from torch.utils.data import DataLoader

import checkpoint as ckpt
import distributed
from config import dump_config
from data.archives import open_dataset
from data.transforms import build_transform, describe_evaluation
from detection.detector import Pyramid, build_ready_detector
from detection.transforms import describe_detection
from models.deploy.files import FORMATS, Exportable, InPyTorch, evaluating, require_packages, write_checked
from models.from_checkpoint import build_ready, read_described
from utils import UserError


def open_checkpoint(path, cfg=None, weights="auto"):
    """The config of a checkpoint, what :func:`~checkpoint.read_weights` returns, and what is exported.

    That is a classifier, or the :class:`~detection.detector.Pyramid` of a detector, in evaluation mode. A
    UserError says why a checkpoint cannot be read. ``cfg`` and ``weights`` are those of the command line.
    """
    config, checkpoint = read_described(path, cfg, weights)
    if config.DATA.DATASET == "coco":
        return config, checkpoint, Pyramid(build_ready_detector(config, checkpoint, path).model).eval()
    return config, checkpoint, build_ready(config, checkpoint, path).model


def build_exportable(args):
    """What there is to export, the config for images of ``--size``, and the class names, None if unknown."""
    config, checkpoint, model = open_checkpoint(args.checkpoint, args.cfg, args.weights)
    classes, text = checkpoint["classes"], dump_config(config) if args.cfg else checkpoint["config"]
    detects = config.DATA.DATASET == "coco"
    if detects and args.data_path:
        raise UserError("a detector has no top-1, its maps are compared: leave out --data-path")
    by_config = (config.DET.TEST_SIZE, config.DET.MAX_SIZE) if detects else config.DATA.IMG_SIZE
    size = to_2tuple(args.size or by_config)
    config.defrost()
    config.DATA.IMG_SIZE = list(size)
    expects = dict(size=size, **(describe_detection(config) if detects else describe_evaluation(config)))
    metadata = dict(config=text, input=json.dumps(expects))
    if classes:
        metadata["classes"] = json.dumps(classes)
    exportable = Exportable(
        model=model,
        weights=checkpoint["model"],
        size=(config.MODEL.MSG.IN_CHANS, *size),
        outputs=tuple(f"map{i}" for i in range(len(config.MODEL.MSG.DEPTHS) + 1)) if detects else ("logits",),
        metadata=metadata,
        rebuild=lambda path: open_checkpoint(path)[2],
    )
    return exportable, config, classes


def build_images(args, config, classes):
    """A loader over the images of ``--data-path``, or None; a UserError if they have other classes."""
    if not args.data_path:
        return None
    transform = build_transform(config, is_train=False)
    dataset = open_dataset(config.DATA.DATASET, args.data_path, "val", transform)
    if classes is None and len(dataset.classes) == config.MODEL.NUM_CLASSES:
        print(f"{args.checkpoint} does not name its classes: they are taken for those of {args.data_path}")
    elif difference := ckpt.class_difference(classes or [""] * config.MODEL.NUM_CLASSES, dataset.classes):
        raise UserError(f"{args.checkpoint} was trained on other classes than {args.data_path}: {difference}")
    return DataLoader(dataset, batch_size=16)


def top1(functions, loader):
    """Top-1 in percent of functions of images, by their names."""
    hits, done = dict.fromkeys(functions, 0), 0
    for images, targets in loader:
        for name, run in functions.items():
            hits[name] += (run(images)[0].argmax(1) == targets).sum().item()
        done += len(targets)
        print(f"\r  top-1: {done}/{len(loader.dataset)} images", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return {name: 100 * count / done for name, count in hits.items()}


def paths_of(args):
    """The path of each format.

    Raises:
        UserError: one is there already, or is what is read.
    """
    folder = args.output or os.path.dirname(args.checkpoint) or os.curdir
    name = args.name or Path(args.checkpoint).stem
    paths = {kind: os.path.join(folder, name + FORMATS[kind].ending) for kind in args.formats}
    there = [path for path in paths.values() if os.path.exists(path)]
    if os.path.realpath(args.checkpoint) in map(os.path.realpath, there):
        raise UserError(f"{args.checkpoint} is what is read: write elsewhere by --output or --name")
    if there and not args.overwrite:
        raise UserError(f"there already: {', '.join(there)}; --overwrite replaces, --name renames")
    return paths


def main(args):
    """Write the files and print the table; ends with code 1 unless all of them agree with PyTorch."""
    require_packages(args.formats)
    paths = paths_of(args)
    exportable, config, classes = build_exportable(args)
    loader = build_images(args, config, classes)
    batches = [exportable.images(count) for count in BATCHES]
    if loader is not None:
        batches.append(next(iter(loader))[0])
    functions, kept = {("PyTorch", ""): InPyTorch(exportable.model)}, {}
    for name, path in paths.items():
        print(f"{name}: writing and comparing ...", flush=True)
        try:
            file = kept[name] = write_checked(exportable, FORMATS[name], path, batches)
        except (UserError, OSError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            continue
        functions.update({(name, runner): run for runner, run in file.runs.items()})
    scores = {}
    if loader is not None:
        with evaluating(functions.values()):
            scores = top1(functions, loader)
    rows = [("format", "run by", "MB", "largest error", "top-1")]
    for name, runner in functions:
        row = [name, runner, "", "", f"{scores[name, runner]:.2f}" if scores else ""]
        if name in kept:
            file = kept[name]
            row[2:4] = f"{os.path.getsize(file.path) / 1e6:.1f}", f"{file.errors[runner]:.1e}"
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for file in kept.values():
        print(f"wrote {file.path}")
    if len(kept) < len(paths):
        sys.exit(1)


if __name__ == "__main__":
    distributed.run_command(lambda: main(ARGS), "lower --size")
