"""Time models against each other: inference, training steps, memory, and growth with the image size.

python tools/benchmark.py                                    MSG-Transformer-T against Swin-T and ConvNeXt-T
python tools/benchmark.py --modes train --batch-sizes 16     training steps
python tools/benchmark.py --sizes 224 448 672 896            feature maps at growing sizes
python tools/benchmark.py --roofline                         and the share of what the machine can do
python tools/benchmark.py --models msg_small_p4_win7_224 swin_small_patch4_window7_224 --compile

Any timm name will do; the second model is the peer of the ratios unless --peer names another. In every round
each candidate runs once, so that a machine that slows down slows down all; a figure is the median of the
rounds. Our models run as main.py runs them; ``<name>:sdpa`` and the like choose another way of computing
attention. ``<name>:plain`` is a model as timm builds it, ours with eager attention; ``<name>:onednn`` gives
any model the linear layers that ours use on the CPU.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timm.layers import set_fused_attn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import inference, use_onednn
from models.attention import BACKENDS
from models.attention_triton import triton_missing
from models.msg_transformer import MSGTransformer
from models.roofline import count_work, least_seconds, machine, machine_limits

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
CLASSES = 1000


def parse_args():
    """The command line, with the peer filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    models = ["msg_tiny_p4_win7_224", "swin_tiny_patch4_window7_224", "convnext_tiny"]
    add("--models", nargs="+", default=[*models, f"{models[0]}:plain", f"{models[1]}:onednn"], metavar="NAME")
    add("--peer", help="model that the ratios compare with; default: the second of --models")
    add("--modes", nargs="+", choices=["inference", "train"], default=["inference"])
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="train: of autocast")
    add("--batch-sizes", nargs="+", type=int, default=[1])
    add("--compile", action="store_true", help="time them under torch.compile too")
    add("--sizes", nargs="+", type=int, metavar="PX", help="instead: feature maps at these image sizes")
    add("--memory", action="store_true", help="peak memory too, each candidate in a process of its own")
    add(
        "--roofline",
        action="store_true",
        help="operations and bytes too, and how near to the machine's own limits",
    )
    add("--rounds", type=int, default=15)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    add(
        "--output",
        default="output/benchmark",
        metavar="PATH",
        help="PATH.json, PATH.md, PATH.png, PATH_roofline.png",
    )
    args = parser.parse_args()
    args.peer = args.peer or args.models[min(1, len(args.models) - 1)]
    if args.memory and args.device == "cpu" and not Path("/proc/self/status").exists():
        parser.error("--memory on the CPU needs Linux")
    if args.roofline and args.sizes:
        parser.error("--roofline is for whole models: leave out --sizes")
    if args.peer not in args.models:
        parser.error(f"--peer {args.peer} is not among --models")
    for name in args.models:
        base, _, variant = name.partition(":")
        ways = BACKENDS if is_ours(base) else ()
        if not timm.is_model(base) or variant not in ("", "plain", "onednn", *ways):
            known = " or ".join(f":{way}" for way in ("plain", "onednn", *ways))
            parser.error(f"{name}: a timm model name, or that and {known}")
        if variant == "triton" and triton_missing():
            parser.error(f"{name}: {triton_missing()}")
    return args


def is_ours(name):
    """Whether a model name is one of this repository's."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("models.")


def build(name, size=None):
    """The model of a candidate; with ``size`` for feature maps of images of that size."""
    name, _, variant = name.partition(":")
    ours, kwargs = is_ours(name), {}
    if ours and variant not in ("", "onednn"):
        kwargs["attention"] = "eager" if variant == "plain" else variant
    if size and not ours and "swin" in name:
        kwargs["img_size"] = size
    set_fused_attn(True, experimental=True)
    model = timm.create_model(name, num_classes=0 if size else CLASSES, **kwargs)
    if (ours and variant != "plain") or variant == "onednn":
        use_onednn(model)
    return model


class Candidate:
    """A model that is ready to be timed.

    Args:
        name: as given on the command line.
        mode: inference or train.
        dtype: of weights and images in inference, of autocast in training.
        batch, size: images (batch, 3, size, size).
        compiled: under torch.compile.
        features: feature maps rather than logits.
    """

    def __init__(self, name, mode, dtype, batch, device, compiled=False, size=224, features=False):
        self.name, self.mode, self.compiled, self.device = name, mode, compiled, device
        self.model = build(name, size if features else None).to(device)
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.autocast = contextlib.nullcontext
        self.forward = self.model
        if features and isinstance(self.model, MSGTransformer):
            self.forward = lambda x: self.model.forward_intermediates(x, [-1], intermediates_only=True)
        elif features:
            self.forward = self.model.forward_features
        if mode == "train":
            self.model.train()
            self.targets = torch.randint(CLASSES, (batch,), device=device)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=device == "cuda")
            if dtype != torch.float32:
                self.autocast = lambda: torch.autocast(device, dtype)
        else:
            self.model.eval().to(dtype)
            self.images = self.images.to(dtype)
        self.seconds = []
        if compiled:
            self.model.compile(dynamic=False)

    def step(self):
        """One inference, or one training step."""
        if self.mode == "inference":
            with torch.inference_mode():
                self.forward(self.images)
            return
        with self.autocast():
            logits = self.model(self.images)
        cross_entropy(logits.float(), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self):
        """Seconds of one step, until the device has done it."""
        begin = time.perf_counter()
        self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def measure(self):
        """Time one step and keep the figure."""
        self.seconds.append(self.time())


def compare(candidates, rounds, peer):
    """Time candidates in turn.

    Returns:
        A row for each: model, compiled, ms_per_image (the median), and the median and quartiles over the
        median of the peer, compiled like the candidate.
    """
    with contextlib.ExitStack() as stack:
        for candidate in candidates:
            if candidate.mode == "inference" and ":plain" not in candidate.name:
                stack.enter_context(inference(candidate.model))
            for _ in range(2):
                candidate.step()
        for done in range(rounds):
            for candidate in candidates:
                candidate.measure()
            print(f"\r  round {done + 1}/{rounds}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    quartiles = [statistics.quantiles(candidate.seconds, n=4) for candidate in candidates]
    peers = {c.compiled: median for c, (_, median, _) in zip(candidates, quartiles) if c.name == peer}
    return [
        dict(
            model=candidate.name,
            compiled=candidate.compiled,
            ms_per_image=1e3 * median / len(candidate.images),
            ratio=median / peers[candidate.compiled],
            quartiles=[low / peers[candidate.compiled], high / peers[candidate.compiled]],
        )
        for candidate, (low, median, high) in zip(candidates, quartiles)
    ]


def peak_memory(**options):
    """Peak memory in MiB of two steps of a :class:`Candidate`, beyond that of an idle process.

    It is measured in a process of its own: on the CPU it is the resident memory of the whole process.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (), options)


def _peak_memory(**options):
    idle = _peak_resident()
    candidate = Candidate(**options)
    for _ in range(2):
        candidate.time()
    if candidate.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _peak_resident() - idle


def _peak_resident():
    """Peak resident memory of this process in MiB. That of getrusage begins with the parent's; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10


def add_roofline(rows, options, flops_limit, bytes_limit):
    """Add to each row what the model computes and moves, and which share of the limits it reaches."""
    for row in rows:
        model = build(row["model"].split(":")[0]).to("meta", options["dtype"])
        images = torch.empty(options["batch"], 3, 224, 224, device="meta", dtype=options["dtype"])
        work = count_work(model, images, options["mode"] == "train")
        seconds = row["ms_per_image"] * options["batch"] / 1e3
        flops, size = (sum(parts) for parts in zip(*work))
        row["gflops"] = flops / options["batch"] / 1e9
        row["megabytes"] = size / options["batch"] / 1e6
        row["of_flops"] = flops / seconds / flops_limit
        row["of_bandwidth"] = size / seconds / bytes_limit
        row["of_roofline"] = least_seconds(work, flops_limit, bytes_limit) / seconds


def table(result):
    """The rows as a markdown table."""
    columns = dict(ratio="ratio", quartiles="quartiles", memory_ratio="memory ratio")
    columns.update(growth="time, first size = 1", memory_growth="memory, first size = 1")
    columns.update(gflops="GFLOPs per image", megabytes="MB per image", of_flops="of the FLOP/s")
    columns.update(of_bandwidth="of the bandwidth", of_roofline="of the roofline")
    columns.update(ms_per_image="ms per image", memory="memory, MiB")
    rows = [(setting, row) for setting, rows in result["settings"].items() for row in rows]
    columns = {key: name for key, name in columns.items() if any(key in row for _, row in rows)}
    lines = [f"`{result['command']}`", "", result["machine"], ""]
    lines += [f"Medians of {result['rounds']} alternating rounds; ratios to `{result['peer']}`.", ""]
    if result["limits"]:
        lines += [
            "Shares are of the FLOP/s of a large linear layer, of the bandwidth of a large copy, and of the",
            "roofline: the least time that the operations can take at these limits, over the time measured.",
            "",
        ]
    for setting, limits in result["limits"].items():
        if "teraflops_per_second" in limits:
            rates = "{teraflops_per_second:.4g} TFLOP/s, {gigabytes_per_second:.4g} GB/s".format(**limits)
            lines += [f"Limits of {setting}: {rates}.", ""]
    lines += [
        "| setting | model | " + " | ".join(columns.values()) + " |",
        "|---|---" + "|---:" * len(columns) + "|",
    ]
    for setting, row in rows:
        values = dict(row, quartiles="{:.2f} to {:.2f}".format(*row["quartiles"]))
        cells = [
            value if isinstance(value := values.get(key, "-"), str) else f"{value:.3g}" for key in columns
        ]
        model = f"`{row['model']}`" + (" compiled" if row["compiled"] else "")
        lines.append("| " + " | ".join([setting, model, *cells]) + " |")
    return "\n".join(lines) + "\n"


def draw_bars(result, path):
    """Draw the ratio to the peer of every candidate, a panel for each setting."""
    settings = result["settings"]
    figure = Figure(figsize=(10, 0.6 + sum(0.5 + 0.3 * len(rows) for rows in settings.values())))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    heights = [1 + len(rows) for rows in settings.values()]
    panels = figure.subplots(len(settings), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (setting, rows) in zip(panels, settings.items()):
        names = [row["model"] + (" compiled" if row["compiled"] else "") for row in rows]
        ours = [row["model"].startswith("msg_") for row in rows]
        colours = ["tab:blue" if mine else "tab:grey" for mine in ours]
        bars = axes.barh(names, [row["ratio"] for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(1, color="black", lw=0.8, ls=":")
        axes.invert_yaxis()
        axes.set_title(setting, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"time per image, {result['peer']} = 1 (less is faster)")
    panels[-1].set_xlim(0, 1.12 * max(row["ratio"] for rows in settings.values() for row in rows))
    figure.savefig(path, dpi=120)


def draw_roofline(result, path):
    """Draw every candidate below the limits of the machine, a panel for each setting."""
    settings = result["settings"]
    figure = Figure(figsize=(3 + 3.4 * len(settings), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, (setting, rows) in zip(panels, settings.items()):
        ridge = result["limits"][setting]["flops_per_byte"]
        intensities = [1e3 * row["gflops"] / row["megabytes"] for row in rows]
        ends = [min(ridge, *intensities) / 4, max(ridge, *intensities) * 4]
        roof = numpy.geomspace(*ends, 500)
        axes.plot(roof, numpy.minimum(roof / ridge, 1), color="black", label="the machine")
        for row, intensity in zip(rows, intensities):
            name, marker = row["model"] + " compiled" * row["compiled"], "s" if row["compiled"] else "o"
            axes.plot(intensity, row["of_flops"], marker, label=name)
        axes.set(xscale="log", ylim=(0, 1.05), title=setting, xlabel="FLOPs per byte")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of the FLOP/s of a large linear layer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def add_growth(settings):
    """Add to each row its time and memory over those of the same model in the first setting."""
    first = {(row["model"], row["compiled"]): row for row in next(iter(settings.values()))}
    for row in (row for rows in settings.values() for row in rows):
        start = first[row["model"], row["compiled"]]
        row["growth"] = row["ms_per_image"] / start["ms_per_image"]
        if "memory" in row:
            row["memory_growth"] = row["memory"] / start["memory"]


def draw_sizes(result, path):
    """Draw how time and memory grow with the side of an image, beside the growth of its pixels."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    sizes = [int(setting.split()[0]) for setting in result["settings"]]
    by_model = {}
    for row in (row for rows in result["settings"].values() for row in rows):
        by_model.setdefault(row["model"] + " compiled" * row["compiled"], []).append(row)
    panels = dict(growth="time per image", memory_growth="peak memory beyond an idle process")
    for axes, (key, what) in zip(figure.subplots(1, 2), panels.items()):
        for model, rows in by_model.items():
            if key in rows[0]:
                axes.plot(sizes, [row[key] for row in rows], marker="o", label=model)
        axes.plot(sizes, [(size / sizes[0]) ** 2 for size in sizes], "k:", label="the pixels")
        axes.set(title=f"{what}, {sizes[0]} px = 1", xlabel="image side, px", xticks=sizes, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def plan(args):
    """The settings to measure in: name to what a :class:`Candidate` takes."""
    if args.sizes:
        common = dict(
            mode="inference", dtype=DTYPES[args.dtypes[0]], batch=args.batch_sizes[0], features=True
        )
        return {f"{size} px features, {args.dtypes[0]}": dict(common, size=size) for size in args.sizes}
    return {
        f"{mode} {dtype}, batch {batch}": dict(mode=mode, dtype=DTYPES[dtype], batch=batch)
        for mode in args.modes
        for dtype in args.dtypes
        for batch in args.batch_sizes
    }


def measure(args, options):
    """The rows of one setting, with memory if asked for."""
    choices = [
        dict(name=name, compiled=compiled, device=args.device, **options)
        for compiled in ([False, True] if args.compile else [False])
        for name in args.models
    ]
    rows = compare([Candidate(**choice) for choice in choices], args.rounds, args.peer)
    if args.memory:
        for row, choice in zip(rows, choices):
            row["memory"] = peak_memory(**choice)
        peers = {row["compiled"]: row["memory"] for row in rows if row["model"] == args.peer}
        for row in rows:
            row["memory_ratio"] = row["memory"] / peers[row["compiled"]]
    return rows


def main():
    """Measure every setting, print the ratios, write the files."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine(args.device))
    result = dict(machine=machine(args.device), peer=args.peer, rounds=args.rounds, settings={}, limits={})
    result["command"] = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    for setting, options in plan(args).items():
        print(setting, flush=True)
        result["settings"][setting] = measure(args, options)
        for row in result["settings"][setting]:
            print(f"  {row['model'] + ' compiled' * row['compiled']:45} ratio {row['ratio']:.3f}")
        if args.roofline:
            flops, size = machine_limits(args.device, options["dtype"])
            add_roofline(result["settings"][setting], options, flops, size)
            result["limits"][setting] = dict(
                teraflops_per_second=flops / 1e12,
                gigabytes_per_second=size / 1e9,
                flops_per_byte=flops / size,
            )
    if args.sizes:
        add_growth(result["settings"])
    if args.device == "cpu":  # whose load nobody knows: only ratios of the same run mean something
        for limits in result["limits"].values():
            del limits["teraflops_per_second"], limits["gigabytes_per_second"]
        for row in (row for rows in result["settings"].values() for row in rows):
            row.pop("ms_per_image")
            row.pop("memory", None)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.output}.md").write_text(table(result))
    (draw_sizes if args.sizes else draw_bars)(result, f"{args.output}.png")
    if args.roofline:
        draw_roofline(result, f"{args.output}_roofline.png")
    print(f"wrote {args.output}.json, .md and .png" + " and _roofline.png" * args.roofline)


if __name__ == "__main__":
    main()
