"""Time models against each other: inference, training steps, memory, and growth with the image size.

python tools/benchmark.py                                    MSG-Transformer-T against Swin-T and ConvNeXt-T
python tools/benchmark.py --modes train --batch-sizes 16     training steps
python tools/benchmark.py --sizes 224 448 672 896            feature maps at growing sizes
python tools/benchmark.py --models msg_small_p4_win7_224 swin_small_patch4_window7_224 --compile

Any timm name will do; the second model is the peer of the ratios unless --peer names another. In every round
each candidate runs once, so that a machine that slows down slows down all; a figure is the median of the
rounds. Our models run as main.py runs them. ``<name>:plain`` is a model as timm builds it, ours with eager
attention; ``<name>:onednn`` gives any model the linear layers that ours use on the CPU.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timm.layers import set_fused_attn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import inference, use_onednn
from models.msg_transformer import MSGTransformer

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
CLASSES = 1000


def parse_args():
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
    add("--rounds", type=int, default=15)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    add("--output", default="output/benchmark", metavar="PATH", help="PATH.json, PATH.md and PATH.png")
    args = parser.parse_args()
    args.peer = args.peer or args.models[min(1, len(args.models) - 1)]
    if args.peer not in args.models:
        parser.error(f"--peer {args.peer} is not among --models")
    for name in args.models:
        base, _, variant = name.partition(":")
        if not timm.is_model(base) or variant not in ("", "plain", "onednn"):
            parser.error(f"{name}: a timm model name, or that and :plain or :onednn")
    return args


def build(name, size=None):
    """The model of a candidate; with ``size`` for feature maps of images of that size."""
    name, _, variant = name.partition(":")
    ours = timm.model_entrypoint(name).__module__.startswith("models.")
    kwargs = dict(attention="eager") if ours and variant == "plain" else {}
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
    """Time candidates in turn; rows of name, compiled, ms, quartiles, and the ratio to the peer."""
    with contextlib.ExitStack() as stack:
        for candidate in candidates:
            if candidate.mode == "inference" and ":plain" not in candidate.name:
                stack.enter_context(inference(candidate.model))
            begin = time.perf_counter()
            candidate.step()
            candidate.first = time.perf_counter() - begin
            candidate.step()
        for done in range(rounds):
            for candidate in candidates:
                candidate.measure()
            print(f"\r  round {done + 1}/{rounds}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    median = {(c.name, c.compiled): statistics.median(c.seconds) for c in candidates}
    rows = []
    for candidate in candidates:
        images = len(candidate.images)
        low, middle, high = statistics.quantiles(candidate.seconds, n=4)
        row = dict(model=candidate.name, compiled=candidate.compiled)
        row.update(ms_per_image=1e3 * middle / images, low=1e3 * low / images, high=1e3 * high / images)
        row["ratio"] = middle / median[peer, candidate.compiled]
        if candidate.compiled:
            row["compile_seconds"] = candidate.first
        rows.append(row)
    return rows


def peak_memory(*arguments, **options):
    """Peak memory in MiB of two steps of a candidate, beyond that of an idle process, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, arguments, options)


def _peak_memory(*arguments, **options):
    if arguments[4] == "cuda":
        candidate = Candidate(*arguments, **options)
        for _ in range(2):
            candidate.time()
        return torch.cuda.max_memory_allocated() / 2**20
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    candidate = Candidate(*arguments, **options)
    for _ in range(2):
        candidate.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 2**10


def machine(device):
    """One line that names the processor, its threads and the versions."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
        flags = next((line for line in lines if line.startswith("flags")), "")
        name += "".join(f", {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    name += f", {torch.get_num_threads()} threads"
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda} ({name})"
    return f"{name}; Python {platform.python_version()}, PyTorch {torch.__version__}, timm {timm.__version__}"


def table(result):
    """The rows as a markdown table, a section for each setting."""
    unit = "ms per image" if result["absolute"] else "time per image, peer = 1"
    lines = [f"`{result['command']}`", "", result["machine"], ""]
    lines += [f"Medians of {result['rounds']} alternating rounds; ratios to `{result['peer']}`.", ""]
    columns = ["setting", "model", unit, "quartiles", "ratio", "memory MiB", "memory ratio", "compile s"]
    lines += ["| " + " | ".join(columns) + " |", "|---" * 2 + "|---:" * (len(columns) - 2) + "|"]
    for setting, rows in result["settings"].items():
        for row in rows:
            scale = 1 if result["absolute"] else row["ratio"] / row["ms_per_image"]
            cells = [setting, f"`{row['model']}`" + (" compiled" if row["compiled"] else "")]
            cells += [
                f"{row['ms_per_image'] * scale:.3g}",
                f"{row['low'] * scale:.3g} to {row['high'] * scale:.3g}",
            ]
            cells.append(f"{row['ratio']:.3f}")
            memory = row.get("memory") if result["absolute"] else None
            cells.append("-" if memory is None else f"{memory:.0f}")
            cells.append(f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "-")
            cells.append(f"{row['compile_seconds']:.0f}" if "compile_seconds" in row else "-")
            lines.append("| " + " | ".join(cells) + " |")
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


def draw_sizes(result, path):
    """Draw time and memory over the pixels of an image, each model relative to its smallest size."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_model = {}
    for setting, rows in result["settings"].items():
        for row in rows:
            by_model.setdefault(row["model"], []).append((int(setting.split()[0]), row))
    keys = dict(ms_per_image="time per image", memory="peak memory beyond the idle process")
    for axes, (key, what) in zip(figure.subplots(1, 2), keys.items()):
        for model, points in by_model.items():
            if all(row.get(key) for _, row in points):
                values = [row[key] / points[0][1][key] for _, row in points]
                axes.plot([size for size, _ in points], values, marker="o", label=model)
        sizes = [size for size, _ in points]
        axes.plot(sizes, [(size / sizes[0]) ** 2 for size in sizes], "k:", label="the pixels")
        axes.set(title=f"{what}, {sizes[0]} px = 1", xlabel="image side, px", xticks=sizes, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine(args.device))
    result = dict(machine=machine(args.device), peer=args.peer, rounds=args.rounds, settings={})
    result["command"] = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    result["absolute"] = args.device == "cuda"
    plans = [
        (f"{mode} {dtype}, batch {batch}", dict(mode=mode, dtype=DTYPES[dtype], batch=batch))
        for mode in args.modes
        for dtype in args.dtypes
        for batch in args.batch_sizes
    ]
    if args.sizes:
        plan = dict(mode="inference", dtype=DTYPES[args.dtypes[0]], batch=args.batch_sizes[0], features=True)
        plans = [(f"{size} px features, {args.dtypes[0]}", dict(plan, size=size)) for size in args.sizes]
    for setting, plan in plans:
        print(setting, flush=True)
        choices = [
            (name, compiled)
            for compiled in ([False, True] if args.compile else [False])
            for name in args.models
        ]
        candidates = [Candidate(name, device=args.device, compiled=c, **plan) for name, c in choices]
        rows = compare(candidates, args.rounds, args.peer)
        if args.memory:
            for row, (name, compiled) in zip(rows, choices):
                memory = dict(plan)
                first = [memory.pop(key) for key in ("mode", "dtype", "batch")]
                row["memory"] = peak_memory(name, *first, args.device, compiled, **memory)
            peers = {row["compiled"]: row["memory"] for row in rows if row["model"] == args.peer}
            for row in rows:
                row["memory_ratio"] = row["memory"] / peers[row["compiled"]]
        result["settings"][setting] = rows
        for row in rows:
            print(f"  {row['model'] + ' compiled' * row['compiled']:45} ratio {row['ratio']:.3f}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.output}.md").write_text(table(result))
    (draw_sizes if args.sizes else draw_bars)(result, f"{args.output}.png")
    print(f"wrote {args.output}.json, .md and .png")


if __name__ == "__main__":
    main()
