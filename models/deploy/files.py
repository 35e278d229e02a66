"""Files for other programs: how each format is written, run again, and compared before it is kept.

A file takes any number of images of one size, because windows and padding are laid out for a size.
"""

import contextlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import checkpoint as ckpt
from utils import UserError, sync_folder

from ..fast.fixed_weights import inference

# Largest error of a float32 file: times the largest output, where that is above 1.
CLOSE = 1e-4


@dataclass(frozen=True)
class Exportable:
    """What a file is made from."""

    model: nn.Module  # takes images (B, C, H, W), gives logits (B, classes)
    weights: dict  # tensors by name, for formats that hold weights alone
    size: tuple  # (C, H, W) of an image
    metadata: dict  # text by name, that formats carry along
    rebuild: Callable  # makes the model again from the path of a file of weights

    def images(self, count):
        """Normalised noise images (count, C, H, W), the same ones for the same count."""
        return torch.randn(count, *self.size, generator=torch.Generator().manual_seed(count))


@dataclass(frozen=True)
class Format:
    """How a kind of file is written and run."""

    write: Callable  # takes an Exportable and a path
    runners: dict  # by name, what makes a function of images from a path and the Exportable
    optional: tuple = ()  # runners that are left out where their package is missing
    packages: tuple = ()  # for pip install; the module names are the same


@dataclass
class Kept:
    """A file that agrees with PyTorch."""

    path: str
    errors: dict = field(default_factory=dict)  # the largest error of each runner
    runs: dict = field(default_factory=dict)  # functions of images by runner


def require_packages(wanted):
    """Refuse what needs packages that are missing, with the command that installs them.

    Args:
        wanted: packages by the name of what needs them.
    """
    needs = {package: name for name, packages in wanted.items() for package in packages}
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        needy = dict.fromkeys(needs[package] for package in missing)
        raise UserError(f"{', '.join(needy)}: missing packages: pip install {' '.join(missing)}")


def write_checked(exportable, kind, path, batches):
    """Write a file, and give it its name once each of its runners computes what the model computes.

    Args:
        exportable: an :class:`Exportable`, whose model is in evaluation mode.
        kind: a :class:`Format`.
        path: of the file; an older one stays as it is unless the new one agrees.
        batches: tensors of images (B, C, H, W) to compare on.

    Returns:
        A :class:`Kept`.

    Raises:
        UserError: it cannot be written or run, or computes something else.
    """
    expected = logits_of(exportable.model, batches)
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    kept = Kept(path)
    # In the same folder, so that it can be renamed; by its name, because readers look at the ending.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as unchecked:
        file = os.path.join(unchecked, name)
        attempt("be written", kind.write, exportable, file)
        for runner, load in kind.runners.items():
            if runner in kind.optional and importlib.util.find_spec(runner) is None:
                continue
            run = attempt(f"be loaded by {runner}", load, file, exportable)
            found = attempt(f"be run by {runner}", logits_of, run, batches)
            try:
                kept.errors[runner] = largest_error(runner, found, expected, CLOSE)
            except UserError as error:
                raise UserError(f"{error}: the file is not kept") from error
            kept.runs[runner] = run
        os.replace(file, path)
        sync_folder(path)
    return kept


def logits_of(run, batches):
    """The logits of each batch, by a function of images or a model in PyTorch."""
    with inference(run) if isinstance(run, nn.Module) else contextlib.nullcontext():
        return [run(images) for images in batches]


def attempt(what, function, *arguments):
    """Call what compilers and runtimes are behind, which raise nearly anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of exporters, about themselves
            return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        reason = next(filter(None, map(str.strip, str(error).split("\n"))), "")
        raise UserError(f"it cannot {what}: {type(error).__name__}: {reason[:300]}") from error


def _pairs(runner, found, expected):
    """Logits to compare, as float64; a UserError if their shapes differ or numbers are not finite."""
    for x, y in zip(found, expected):
        if x.shape != y.shape:
            raise UserError(f"{runner} gives the shape {tuple(x.shape)} and PyTorch {tuple(y.shape)}")
        if not (x.isfinite().all() and y.isfinite().all()):
            raise UserError(f"{runner} or PyTorch gives numbers that are not finite")
        yield x.double(), y.double()


def largest_error(runner, found, expected, limit):
    """The largest error of logits, as :func:`logits_of` gives them.

    Args:
        runner: what messages call it.
        found, expected: its logits, and those of PyTorch.
        limit: of the error, times the largest logit where that is above 1.

    Raises:
        UserError: it is larger, or the logits cannot be compared.
    """
    errors = []
    for x, y in _pairs(runner, found, expected):
        errors.append((x - y).abs().max().item())
        allowed = limit * max(1.0, y.abs().max().item())
        if errors[-1] > allowed:
            raise UserError(f"{runner} is up to {errors[-1]:.2g} off PyTorch, more than {allowed:.2g}")
    return max(errors, default=0.0)


def require_near(runner, found, expected, limit):
    """The same for one batch, and the root mean square error as a share of the spread of its logits."""
    ((x, y),) = _pairs(runner, found, expected)
    error = ((x - y).square().mean().sqrt() / y.std(correction=0).clamp(min=1e-12)).item()
    if error > limit:
        share = f"{error:.1%} of the spread of the logits"
        raise UserError(f"{runner} differs from PyTorch by {share}, more than {limit:.0%}")
    return error


def _write_onnx(exportable, path):
    program = torch.onnx.export(
        exportable.model,
        (exportable.images(2),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
    )
    program.model.metadata_props.update(exportable.metadata)
    program.save(path, external_data=False)


def run_onnxruntime(path):
    """A function of images float32 that ONNX Runtime computes on the CPU in float32 from an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait in a loop would take the time of whatever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino_has_bfloat16():
    """Whether OpenVINO computes in bfloat16 on this processor: elsewhere it takes float32 without a word."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def run_openvino(path, dtype=torch.float32):
    """A function of images float32 that OpenVINO computes on the CPU from an ONNX file.

    Args:
        dtype: float32 or bfloat16; its own choice is bfloat16 where the processor has that.

    Raises:
        UserError: the processor has no bfloat16.
    """
    import openvino

    if dtype == torch.bfloat16 and not openvino_has_bfloat16():
        raise UserError("OpenVINO does not compute in bfloat16 on this processor")
    settings = dict(
        INFERENCE_PRECISION_HINT="bf16" if dtype == torch.bfloat16 else "f32",
        INFERENCE_NUM_THREADS=torch.get_num_threads(),
        # Several processes would all tie themselves to the first cores.
        ENABLE_CPU_PINNING=False,
    )
    model = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: torch.from_numpy(model(images.numpy())[0].copy())


# For pip install, to write a file and run it; the module names are the same.
OF_OPENVINO = ("onnx", "onnxscript", "openvino")
# By the ending of their files.
FORMATS = dict(
    onnx=Format(
        _write_onnx,
        dict(onnxruntime=lambda path, _: run_onnxruntime(path), openvino=lambda path, _: run_openvino(path)),
        optional=("openvino",),
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
    safetensors=Format(
        lambda exportable, path: ckpt.save_weights(path, exportable.weights, exportable.metadata),
        {"this code": lambda path, exportable: exportable.rebuild(path)},
    ),
)
