"""Time a whole Cascade Mask R-CNN on our backbone and on timm's Swin, with everything else alike.

python tools/benchmark_detector.py                           inference of T at 800x1280, one image
python tools/benchmark_detector.py --draw benchmarks/detector_cpu.json   table and picture again

Weights are random. Every image has 1000 proposals and 100 detections with their masks, as at most in
evaluation; in training two objects.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchmarking

from config import get_config
from detection.detector import build_detector
from models.roofline import machine

OURS, PEER = "MSG-Transformer", "Swin (timm)"


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
    add("--rounds", type=int, default=7)
    benchmarking.add_arguments(parser, "output/benchmark_detector")
    return parser.parse_args()


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


def step(detector, training, images, targets):
    """One inference, or one forward and backward pass."""
    sizes = [images.shape[2:]] * len(images)
    if training:
        detector.zero_grad()
        sum(detector(images, sizes, targets).values()).backward()
        return
    with torch.inference_mode():
        (found,) = detector(images, sizes)
    assert len(found["boxes"]) == detector.heads.limits.per_image


def run(args):
    """Time both detectors in turn."""
    torch.manual_seed(0)
    # Random weights are sure of nothing: without a threshold there are as many detections as there may be.
    config = get_config(argparse.Namespace(cfg=args.cfg, opts=["DET.SCORE_THRESHOLD", "0.0"]))
    ours = build_detector(config, 80)
    theirs = copy.deepcopy(ours)
    theirs.backbone = SwinBackbone(args.peer, args.size)
    images, settings = torch.randn(1, 3, *args.size), {}
    boxes = torch.tensor([[100.0, 100, 400, 300], [500, 200, 700, 600]])
    masks = torch.zeros(2, *args.size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    targets = [dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks)]
    for mode in args.modes:
        steps = [
            functools.partial(step, detector.train(mode == "train"), mode == "train", images, targets)
            for detector in (ours, theirs)
        ]
        times = benchmarking.time_in_turn(steps, args.rounds)
        peer = times[1][1]
        settings[f"{mode}, float32, {args.size[0]}x{args.size[1]}, one image"] = [
            dict(model=name, ratio=median / peer, quartiles=[low / peer, high / peer])
            for name, (low, median, high) in zip((OURS, PEER), times)
        ]
    return dict(machine=machine("cpu"), rounds=args.rounds, peer=args.peer, settings=settings)


def report(result):
    """The table of a result in Markdown, and its figure."""
    rows = [
        [setting, row["model"], f"{row['ratio']:.3f}", "{:.2f} to {:.2f}".format(*row["quartiles"])]
        for setting, rows in result["settings"].items()
        for row in rows
    ]
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
    return benchmarking.markdown(result, notes, ["setting", "backbone", "ratio", "quartiles"], rows), {
        "": figure
    }


if __name__ == "__main__":
    benchmarking.main(parse_args(), run, report)
