"""Time a whole Cascade Mask R-CNN on our backbone and on timm's Swin, with everything else alike.

python tools/benchmark_detector.py                           inference of T at 800x1280, one image
python tools/benchmark_detector.py --modes train --dtypes float32 bfloat16 --memory      training steps
python tools/benchmark_detector.py --draw benchmarks/detector_cpu.json   table and picture again

Each detector has a process of its own; in every round each takes one step, and a figure is the median of the
rounds. Inference and training are detect.py's on the CPU: a training step is the forward pass with all
losses, the backward pass, and AdamW's update. Weights are random. Every image has 1000 proposals and 100
detections with their masks, as at most in evaluation; in training two objects.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import check_environment  # noqa: E402, F401

# isort: split
import argparse
import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchmarking

from config import get_config
from detection.detector import build_detector
from models import inference
from models.roofline import machine
from utils import build_compute

OURS, PEER = "MSG-Transformer", "Swin (timm)"
LEVELS = dict(float32="O0", bfloat16="O1")  # AMP_OPT_LEVEL of a dtype


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--cfg", default="configs/coco/cascade_mask_rcnn_msg_tiny_3x.yaml", metavar="FILE")
    add("--peer", default="swin_tiny_patch4_window7_224", help="timm name of a Swin with the same channels")
    add("--size", type=int, nargs=2, default=(800, 1280), metavar=("HEIGHT", "WIDTH"))
    add("--modes", nargs="+", choices=["inference", "train"], default=["inference"])
    add("--dtypes", nargs="+", choices=LEVELS, default=["float32"], help="of autocast")
    add("--memory", action="store_true", help="peak memory too; needs Linux")
    add("--rounds", type=int, default=7)
    benchmarking.add_arguments(parser, "output/benchmark_detector")
    args = parser.parse_args()
    if args.memory and not Path("/proc/self/status").exists():
        parser.error("--memory needs Linux")
    return args


class SwinBackbone(nn.Module):
    """timm's Swin in the place of detection.backbone.MSGBackbone: patch maps, a LayerNorm for each."""

    def __init__(self, name, size):
        super().__init__()
        self.model = timm.create_model(name, features_only=True, img_size=tuple(size))
        self.channels = self.model.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images, sizes):
        """Images (B, 3, H, W) to a map (B, C, H / stride, W / stride) for each stage."""
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, self.model(images))]


class Setting(NamedTuple):
    """What both detectors are timed at."""

    cfg: str
    peer: str  # timm name of the peer's backbone
    size: tuple  # (height, width) of the image, in pixels
    mode: str  # inference or train
    dtype: str  # a key of LEVELS


class Candidate:
    """A detector that is ready to be timed, in the process in which it is made."""

    def __init__(self, name, setting):
        self.idle, self.training = benchmarking.peak_resident(), setting.mode == "train"
        torch.manual_seed(0)
        # Random weights are sure of nothing: without a threshold there are as many detections as may be.
        opts = ["DET.SCORE_THRESHOLD", "0.0", "DEVICE", "cpu", "AMP_OPT_LEVEL", LEVELS[setting.dtype]]
        config = get_config(argparse.Namespace(cfg=setting.cfg, opts=opts))
        self.compute = build_compute(config)
        self.detector = build_detector(config, 80)
        if name == PEER:
            self.detector.backbone = SwinBackbone(setting.peer, setting.size)
        self.images, self.sizes = torch.randn(1, 3, *setting.size), [tuple(setting.size)]
        corners = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.5, 0.2, 0.7, 0.7]])
        boxes = (corners * torch.tensor([*setting.size[::-1]] * 2)).round()
        masks = torch.zeros(2, *setting.size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        self.targets = [dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks)]
        self.detector.train(self.training)
        # The rate is so small that every step does the work of the first.
        self.optimizer = torch.optim.AdamW(self.detector.parameters(), lr=1e-9)

    def step(self):
        """One inference or one training step; returns the losses or the number of detections."""
        if self.training:
            with self.compute.autocast():
                losses = self.detector(self.images, self.sizes, self.targets)
            self.optimizer.zero_grad()
            sum(losses.values()).backward()
            self.optimizer.step()
            return {name: loss.item() for name, loss in losses.items()}
        with self.compute.autocast():
            (found,) = self.detector(self.images, self.sizes)
        assert len(found["boxes"]) == self.detector.heads.limits.per_image
        return len(found["boxes"])

    def peak_memory(self):
        """Peak resident memory so far beyond that of an idle process, in MiB."""
        return benchmarking.peak_resident() - self.idle


@contextlib.contextmanager
def ready(name, setting):
    """A :class:`Candidate`, whose weights are fixed for inference."""
    candidate = Candidate(name, setting)
    if candidate.training:
        yield candidate
        return
    with inference(candidate.detector, candidate.compute.dtype):
        yield candidate


def compare(setting, args):
    """The rows of one :class:`Setting`: model, and ratios to the peer of time and, if asked, of memory."""
    names = (OURS, PEER)
    with contextlib.ExitStack() as stack:
        candidates = [benchmarking.Apart(name, ready, name, setting) for name in names]
        for candidate in candidates:
            stack.callback(candidate.close)
        times = benchmarking.time_in_turn(candidates, args.rounds, lambda one: one.seconds("step"))
        memory = [one.call("peak_memory")[1] for one in candidates] if args.memory else []
    peer, rows = times[1][1], []
    for place, (name, (low, median, high)) in enumerate(zip(names, times)):
        rows.append(dict(model=name, ratio=median / peer, quartiles=[low / peer, high / peer]))
        if args.memory:
            rows[-1]["memory_ratio"] = memory[place] / memory[1]
    return rows


def run(args):
    """Time both detectors in turn, in every setting, and print the ratios; returns the result."""
    result = dict(machine=machine("cpu"), rounds=args.rounds, peer=args.peer, settings={})
    print(result["machine"])
    for mode in args.modes:
        for dtype in args.dtypes:
            name = f"{mode}, {dtype}, {args.size[0]}x{args.size[1]}, one image"
            print(name, flush=True)
            setting = Setting(args.cfg, args.peer, tuple(args.size), mode, dtype)
            rows = result["settings"][name] = compare(setting, args)
            print("  ratio {ratio:.3f}".format(**rows[0]), rows[0].get("memory_ratio", ""))
    return result


def report(result):
    """The table of a result in Markdown, and its figure."""
    columns = dict(ratio="ratio", quartiles="quartiles", memory_ratio="memory ratio")
    found = [(setting, row) for setting, rows in result["settings"].items() for row in rows]
    columns = {key: name for key, name in columns.items() if key in found[0][1]}
    rows = []
    for setting, row in found:
        cells = {key: f"{row[key]:.3f}" for key in columns if key != "quartiles"}
        cells["quartiles"] = "{:.2f} to {:.2f}".format(*row["quartiles"])
        rows.append([setting, row["model"], *(cells[key] for key in columns)])
    panels = {
        setting: [
            benchmarking.Bar(row["model"], row["model"] == OURS, row["ratio"], row["quartiles"])
            for row in rows
        ]
        for setting, rows in result["settings"].items()
    }
    notes = [
        f"Medians of {result['rounds']} alternating rounds; ratios to the same Cascade Mask R-CNN on "
        f"`{result['peer']}`. Random weights; 1000 proposals and 100 detections with masks."
    ]
    figure = benchmarking.draw_bars(panels, f"time, {PEER} = 1 (less is faster)")
    return benchmarking.markdown(result, notes, ["setting", "backbone", *columns.values()], rows), {
        "": figure
    }


if __name__ == "__main__":
    benchmarking.main(parse_args(), run, report)
