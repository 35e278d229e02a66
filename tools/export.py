"""Write a checkpoint for other programs, each file run and compared with PyTorch before it gets its name.

python tools/export.py <checkpoint>
python tools/export.py <checkpoint> --formats onnx --size 384

Files take any number of images of one size. Next to the checkpoint, or in --output, are written

  <name>.onnx         for ONNX Runtime and OpenVINO
  <name>.safetensors  the weights, with the config and the class names, for --pretrained and --resume

A file may be 1e-4 off PyTorch (of its largest output, where that is above 1). What differs more is deleted.
docs/use.md says what the files expect.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import CHOICES
from tools import benchmarking

FORMAT_NAMES = ["onnx", "safetensors"]
BATCHES = 1, 2, 5  # numbers of images that files are compared on


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", help="of main.py, or a safetensors file of this command")
    add("--formats", nargs="+", choices=FORMAT_NAMES, default=FORMAT_NAMES, help="default: all")
    add("--cfg", metavar="FILE", help="config of a checkpoint that holds none, such as an official one")
    add("--weights", choices=CHOICES["TEST.WEIGHTS"], default="auto", help="as TEST.WEIGHTS; default: auto")
    sides = "a side or HEIGHTxWIDTH, as a file is for one size; default: that of the config"
    add("--size", type=benchmarking.image_sides, metavar="PX", help=sides)
    add("--output", metavar="DIR", help="default: the folder of the checkpoint")
    add("--name", help="what file names begin with; default: that of the checkpoint")
    add("--overwrite", action="store_true", help="replace files that are there already")
    return parser.parse_args()


if __name__ == "__main__":  # before what takes seconds to import
    ARGS = parse_args()

from timm.layers import to_2tuple

import distributed
from config import dump_config
from data.transforms import describe_evaluation
from models.deploy.files import FORMATS, Exportable, require_packages, write_checked
from models.from_checkpoint import build_ready, read_described
from utils import UserError


def build_exportable(args):
    """The :class:`~models.deploy.files.Exportable` of a checkpoint, for images of ``--size``."""
    config, checkpoint = read_described(args.checkpoint, args.cfg, args.weights)
    ready = build_ready(config, checkpoint, args.checkpoint)
    text = dump_config(config) if args.cfg else checkpoint["config"]
    size = to_2tuple(args.size or config.DATA.IMG_SIZE)
    config.defrost()
    config.DATA.IMG_SIZE = list(size)
    metadata = dict(config=text, input=json.dumps(dict(size=size, **describe_evaluation(config))))
    if ready.class_names:
        metadata["classes"] = json.dumps(ready.class_names)
    return Exportable(
        model=ready.model,
        weights=checkpoint["model"],
        size=(config.MODEL.MSG.IN_CHANS, *size),
        metadata=metadata,
        rebuild=lambda path: build_ready(*read_described(path), path).model,
    )


def paths_of(args):
    """The path of each format.

    Raises:
        UserError: one is there already, or is what is read.
    """
    folder = args.output or os.path.dirname(args.checkpoint) or os.curdir
    name = args.name or Path(args.checkpoint).stem
    paths = {kind: os.path.join(folder, f"{name}.{kind}") for kind in args.formats}
    there = [path for path in paths.values() if os.path.exists(path)]
    if os.path.realpath(args.checkpoint) in map(os.path.realpath, there):
        raise UserError(f"{args.checkpoint} is what is read: write elsewhere by --output or --name")
    if there and not args.overwrite:
        raise UserError(f"there already: {', '.join(there)}; --overwrite replaces, --name renames")
    return paths


def main(args):
    """Write the files and print the table; ends with code 1 unless all of them agree with PyTorch."""
    require_packages({name: FORMATS[name].packages for name in args.formats})
    paths = paths_of(args)
    exportable, kept = build_exportable(args), []
    batches = [exportable.images(count) for count in BATCHES]
    rows = [("format", "run by", "MB", "largest error")]
    for name, path in paths.items():
        print(f"{name}: writing and comparing ...", flush=True)
        try:
            file = write_checked(exportable, FORMATS[name], path, batches)
        except (UserError, OSError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            continue
        kept.append(file)
        size = f"{os.path.getsize(path) / 1e6:.1f}"
        rows += [(name, runner, size, f"{error:.1e}") for runner, error in file.errors.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for file in kept:
        print(f"wrote {file.path}")
    if len(kept) < len(paths):
        sys.exit(1)


if __name__ == "__main__":
    distributed.run_command(lambda: main(ARGS), "lower --size")
