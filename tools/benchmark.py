"""Time models against each other: classifiers or feature maps, inference or training, at any image size.

python tools/benchmark.py                                    MSG-Transformer-T against Swin-T and ConvNeXt-T
python tools/benchmark.py --modes train --batch-sizes 16     training steps
python tools/benchmark.py --sizes 256 384x288                classifiers at other sizes, HEIGHTxWIDTH
python tools/benchmark.py --maps --sizes 800x1280            feature maps, as a detector reads them
python tools/benchmark.py --models msg_small_p4_win7_224 swin_small_patch4_window7_224
python tools/benchmark.py --choices                          what models/fast/choices.py should say here
python tools/benchmark.py --tables                           write the tables of the pages again

Any timm name will do. The second model is the one that ratios compare with, unless --peer names another. Each
candidate has a process of its own and its best number of threads, and they take turns of at least a second
(benchmarking.py). Our models run as main.py runs them. A name may choose another way:

  <name>:sdpa and the like    another way of computing attention (ours)
  <name>:plain                as timm builds it, ours with eager attention
  <name>:onednn               with the linear layers that ours use on the CPU
  <name>:compile              under torch.compile
  <name>:openvino             its ONNX file in OpenVINO, once it gives what PyTorch gives (inference, CPU)

Feature maps are those of timm's features_only; a training step minimises the sum of their mean squares.
Models whose name has "swin" in it, and ours, are built for the size. The rates that a large product and a
large copy reach on the machine are noted too, because machines of one name differ. OMP_NUM_THREADS in the
environment says how many CPU threads a candidate may take.
"""

import argparse
import contextlib
import itertools
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import benchmarking, tables
from utils import check_environment

CLASSES = 1000
TRIAL = 0.3  # seconds of a turn that chooses the number of threads
WAYS = ("plain", "onednn", "compile", "openvino")  # for any model


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    models = ["msg_tiny_p4_win7_224", "swin_tiny_patch4_window7_224", "convnext_tiny"]
    add("--models", nargs="+", default=[*models, f"{models[0]}:plain", f"{models[1]}:onednn"], metavar="NAME")
    add("--peer", help="model that the ratios compare with; default: the second of --models")
    add("--modes", nargs="+", choices=["inference", "train"], default=["inference"])
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2], help="train: of autocast")
    add("--batch-sizes", nargs="+", type=int, default=[1])
    sides = "image sizes, a side or HEIGHTxWIDTH; default: 224"
    add("--sizes", nargs="+", type=benchmarking.image_sides, metavar="PX", help=sides)
    add("--maps", action="store_true", help="feature maps of all stages rather than classifiers")
    add("--memory", action="store_true", help="peak memory too, each candidate in a process of its own")
    add("--rounds", type=int, default=11, help="at least; up to three times as many while ratios are vague")
    add("--choices", action="store_true", help="time the libraries that our models choose among on a CPU")
    add("--tables", action="store_true", help="write the tables of README.md and the other pages, and end")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one, else cpu")
    benchmarking.add_arguments(parser, "models")
    args = parser.parse_args()
    args.peer = args.peer or args.models[min(1, len(args.models) - 1)]
    if args.peer not in args.models:
        parser.error(f"--peer {args.peer} is not among --models")
    return args


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    ARGS = parse_args()

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer

from models import inference, use_onednn
from models.deploy.files import OF_OPENVINO, require_packages
from models.deploy.runtime import hand_over
from models.fast.attention import BACKENDS
from models.fast.attention_triton import triton_missing
from tools import choices
from tools.benchmarking import machine, versions
from utils import UserError, keep_freed_memory


def check(args):
    """Raise a UserError unless every candidate can be timed as the command line asks."""
    if args.memory and args.device == "cpu" and not Path("/proc/self/status").exists():
        raise UserError("--memory on the CPU needs Linux")
    for name in args.models:
        base, _, variant = name.partition(":")
        ways = (*WAYS, *(BACKENDS if is_ours(base) else ()))
        if not timm.is_model(base) or variant not in ("", *ways):
            known = " or ".join(f":{way}" for way in ways)
            raise UserError(f"{name}: a timm model name, or that and {known}")
        if variant == "triton" and triton_missing():
            raise UserError(f"{name}: {triton_missing()}")
        if variant == "openvino":
            require_packages(dict(openvino=OF_OPENVINO))
            usual = args.device == "cpu" and args.modes == ["inference"] and not args.maps
            if not usual or "float16" in args.dtypes:
                raise UserError(f"{name}: for classifiers in inference on the CPU, in float32 or bfloat16")


def variant_of(name):
    """The way that a candidate's name chooses, "" for the usual one."""
    return name.partition(":")[2]


def is_ours(name):
    """Whether a model name is one of this repository's."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("models.")


def build(name, sides=(224, 224), maps=False):
    """The model of a candidate, for images of ``sides``, (height, width).

    Args:
        maps: a model that gives the maps of its stages, rather than a classifier.

    Raises:
        UserError: there is no such model.
    """
    name, _, variant = name.partition(":")
    ours, kwargs = is_ours(name), dict(features_only=True) if maps else dict(num_classes=CLASSES)
    if ours and variant in ("plain", *BACKENDS):
        kwargs["attention"] = "eager" if variant == "plain" else variant
    if ours or "swin" in name:
        kwargs["img_size"] = sides
    fused = variant != "openvino"  # timm's models take PyTorch's fused attention, which ONNX does not know
    set_fused_attn(fused, experimental=fused)
    try:
        model = timm.create_model(name, **kwargs)
    except (AssertionError, RuntimeError, ValueError) as error:
        what = f"{name} for {'maps' if maps else 'classes'} of {sides[0]}x{sides[1]} px"
        raise UserError(f"cannot build {what}: {error}") from error
    if (ours and variant != "plain") or variant == "onednn":
        use_onednn(model)
    return model


@dataclass(frozen=True)
class Setting:
    """What all models are timed at."""

    mode: str  # inference or train
    dtype: torch.dtype  # of weights and images in inference, of autocast in training
    batch: int
    device: str
    sides: tuple = (224, 224)  # (height, width) of the images, in pixels
    maps: bool = False  # feature maps rather than logits


class Candidate:
    """A model that is ready to be timed, in the process in which it is made.

    Args:
        name: as given on the command line.
        setting: a :class:`Setting`.
    """

    def __init__(self, name, setting):
        self.setting, self.idle = setting, benchmarking.peak_resident()
        self.run = self.model = build(name, setting.sides, setting.maps).to(setting.device)
        self.images = torch.randn(setting.batch, 3, *setting.sides, device=setting.device)
        self.autocast = contextlib.nullcontext
        if setting.mode == "train":
            self.model.train()
            self.targets = torch.randint(CLASSES, (setting.batch,), device=setting.device)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
            if setting.dtype != torch.float32:
                self.autocast = lambda: torch.autocast(setting.device, setting.dtype)
        elif variant_of(name) == "openvino":
            self.run = hand_over(self.model, (3, *setting.sides), setting.dtype)
        else:
            self.model.eval().to(setting.dtype)
            self.images = self.images.to(setting.dtype)
        if variant_of(name) == "compile":
            self.model.compile(dynamic=False)

    def step(self):
        """One inference or one training step, until the device has done it."""
        if self.setting.mode == "inference":
            with torch.inference_mode():
                self.run(self.images)
        else:
            with self.autocast():
                outputs = self.model(self.images)
            self._loss(outputs).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.setting.device == "cuda":
            torch.cuda.synchronize()

    def turn(self):
        """A turn of steps, see :func:`benchmarking.turn`."""
        return benchmarking.turn(self.step)

    def choose_threads(self):
        """Take one thread or PyTorch's number, whichever is faster here; returns the number."""
        if self.setting.device == "cuda" or self.run is not self.model:  # a runtime has threads of its own
            return torch.get_num_threads()
        numbers = sorted({1, torch.get_num_threads()})
        seconds = dict.fromkeys(numbers, math.inf)
        for number in numbers * 2:
            torch.set_num_threads(number)
            steps, taken, _ = benchmarking.turn(self.step, TRIAL)
            seconds[number] = min(seconds[number], taken / steps)
        torch.set_num_threads(min(seconds, key=seconds.get))
        return torch.get_num_threads()

    def peak_memory(self):
        """Peak memory in MiB so far, of weights and images too.

        On a GPU it is what PyTorch allocates; on the CPU the resident memory of the process beyond that of an
        idle one. For ONNX files it includes writing them.
        """
        if self.setting.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return benchmarking.peak_resident() - self.idle

    def _loss(self, outputs):
        if self.setting.maps:
            return sum(x.float().square().mean() for x in outputs)
        return cross_entropy(outputs.float(), self.targets)


@contextlib.contextmanager
def ready(name, setting):
    """A :class:`Candidate`, whose weights are fixed for inference."""
    keep_freed_memory()  # as main.py does, for the peers too
    candidate = Candidate(name, setting)
    fixed = setting.mode == "inference" and variant_of(name) not in ("plain", "openvino")
    with inference(candidate.model) if fixed else contextlib.nullcontext():
        yield candidate


def measure(args, setting):
    """Time the candidates in turn, each in a process of its own.

    Returns:
        A row for each: model, batch, threads, turns, and with ``--memory`` memory, in MiB.
    """
    with contextlib.ExitStack() as stack:
        candidates = [benchmarking.Apart(name, ready, name, setting) for name in args.models]
        for candidate in candidates:
            stack.callback(candidate.close)
        for candidate in candidates:  # all are built before anything is timed
            candidate.call("step")
        threads = [candidate.call("choose_threads") for candidate in candidates]
        take_turns = [partial(candidate.call, "turn") for candidate in candidates]
        turns = benchmarking.time_in_turn(take_turns, args.rounds, args.models.index(args.peer))
        rows = [
            dict(model=name, batch=setting.batch, threads=number, turns=taken)
            for name, number, taken in zip(args.models, threads, turns)
        ]
        if args.memory:
            for row, candidate in zip(rows, candidates):
                row.update(memory=candidate.call("peak_memory"))
    return rows


def machine_limits(device, dtype):
    """What a large linear layer and a large copy reach on a device at best: FLOP/s and bytes/s.

    Args:
        device: cpu or cuda.
        dtype: of the linear layer, which runs as those of our models do.
    """
    side, size = (8192, 2**30) if device == "cuda" else (2048, 2**28)
    layer = nn.Sequential(nn.Linear(side, side, bias=False)).to(device, dtype)
    use_onednn(layer)
    x = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    with inference(layer):
        flops = 2 * side**3 / least_seconds(lambda: layer(x))
    return flops, 2 * size / least_seconds(lambda: target.copy_(source))


def least_seconds(function):
    """The seconds of the fastest of the calls of a second."""
    timer = Timer("function()", globals=dict(function=function), num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=1).times)


def plan(args):
    """The settings to measure in, each by its name, which begins with the size unless it is the usual one."""
    settings = {}
    for sides, mode, dtype, batch in itertools.product(
        args.sizes or [Setting.sides], args.modes, args.dtypes, args.batch_sizes
    ):
        size = f"{sides[0]}x{sides[1]} px{' maps' * args.maps}, " if args.sizes or args.maps else ""
        setting = Setting(mode, getattr(torch, dtype), batch, args.device, sides, args.maps)
        settings[f"{size}{mode} {dtype}, batch {batch}"] = setting
    return settings


def run(args):
    """Measure every setting and print the ratios; returns the result."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.choices:
        return dict(machine=machine("cpu"), versions=versions(), **choices.run())
    check(args)
    found = machine(args.device)
    print(*found.values())
    rates = {dtype: machine_limits(args.device, getattr(torch, dtype)) for dtype in args.dtypes}
    result = dict(machine=found, versions=versions(), peer=args.peer, rates=rates, settings={})
    for name, setting in plan(args).items():
        print(name, flush=True)
        result["settings"][name] = measure(args, setting)
        print(tables.in_lines(result, name))
    return result


if __name__ == "__main__":
    if ARGS.tables:
        tables.write()
    else:
        benchmarking.main(ARGS, run)
