"""Time a whole Cascade Mask R-CNN on our backbone and on timm's Swin, with everything else alike.

python tools/benchmark_detector.py                           inference of T at 800x1280, one image
python tools/benchmark_detector.py --modes train --dtypes float32 bfloat16 --memory      training steps

Each detector has a process of its own, and they take turns of at least a second (benchmarking.py). Inference
and training are detect.py's on the CPU: a training step is the forward pass with all losses, the backward
pass, and AdamW's update. Weights are random. Every image has 1000 proposals and 100 detections with their
masks, as at most in evaluation; in training two objects.
"""

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import benchmarking, tables
from utils import check_environment

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
    benchmarking.add_arguments(parser, "detector")
    args = parser.parse_args()
    if args.memory and not Path("/proc/self/status").exists():
        parser.error("--memory needs Linux")
    return args


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    ARGS = parse_args()

import timm
import torch
from torch import nn

from config import get_config
from detection.detector import build_detector
from distributed import build_compute
from models import inference
from tools.roofline import machine, versions


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
        self.compute.prepare()
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

    def turn(self):
        """A turn of steps, see :func:`benchmarking.turn`."""
        return benchmarking.turn(self.step)

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
    """The rows of one :class:`Setting`: model, turns and, if asked, memory in MiB."""
    names = (OURS, PEER)
    with contextlib.ExitStack() as stack:
        candidates = [benchmarking.Apart(name, ready, name, setting) for name in names]
        for candidate in candidates:
            stack.callback(candidate.close)
        take_turns = [partial(candidate.call, "turn") for candidate in candidates]
        turns = benchmarking.time_in_turn(take_turns, args.rounds, names.index(PEER))
        memory = [dict(memory=one.call("peak_memory")) if args.memory else {} for one in candidates]
    return [dict(model=name, turns=own, **more) for name, own, more in zip(names, turns, memory)]


def run(args):
    """Time both detectors in turn, in every setting, and print the ratios; returns the result."""
    result = dict(machine=machine("cpu"), versions=versions(), peer=PEER, backbone=args.peer, settings={})
    print(*result["machine"].values())
    for mode in args.modes:
        for dtype in args.dtypes:
            name = f"{mode}, {dtype}, {args.size[0]}x{args.size[1]}, one image"
            print(name, flush=True)
            setting = Setting(args.cfg, args.peer, tuple(args.size), mode, dtype)
            result["settings"][name] = compare(setting, args)
            print(tables.in_lines(result, name))
    return result


if __name__ == "__main__":
    benchmarking.main(ARGS, run)
