"""Devices, precision, seeds, worker processes, memory, files that are whole."""

import contextlib
import logging
import multiprocessing
import os
import platform
import random
import resource
import signal
import sys
import time
import uuid
import zlib
from dataclasses import dataclass

import numpy as np
import timm
import torch
from torch._dynamo.callback import on_compile_end, on_compile_start


class UserError(ValueError):
    """Something that the person who started the run can mend: shown as one message, without a traceback."""


@dataclass(frozen=True)
class Compute:
    """Where a process computes, and the dtype of mixed precision, None for float32."""

    device: torch.device
    dtype: torch.dtype | None = None

    def autocast(self):
        """Context of forward passes in mixed precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


def build_compute(config):
    """The :class:`Compute` of this process: on ``DEVICE``, or else on a GPU where there is one.

    Raises:
        UserError: no such GPU.
    """
    mixed = config.AMP_OPT_LEVEL != "O0"
    if config.DEVICE == "cpu" or (not config.DEVICE and not torch.cuda.is_available()):
        return Compute(torch.device("cpu"), torch.bfloat16 if mixed else None)
    number, count = config.LOCAL_RANK, torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"process {number} of this machine has no GPU, PyTorch sees {count}: use --device "
            "cpu, or launch no more processes than GPUs"
        )
    torch.cuda.set_device(number)
    return Compute(torch.device("cuda", number), getattr(torch, config.AMP_DTYPE) if mixed else None)


def compile_model(model):
    """Compile a model in place, for one batch size at a time; it stays the same module with the same state.

    A graph for each of training and evaluation, and one for a smaller last batch; no part runs uncompiled.
    The log says how long each takes when it happens.
    """
    begin = []

    def started(*_):
        begin.append(time.monotonic())

    def ended(*_):
        logging.getLogger("msg_transformer").info(
            f"torch.compile took {time.monotonic() - begin.pop():.0f} s"
        )

    on_compile_start(started)
    on_compile_end(ended)
    model.compile(fullgraph=True, dynamic=False)


def be_deterministic():
    """Make PyTorch use deterministic kernels only: the same run gives the same bits, on CUDA more slowly."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # The memory-efficient attention adds up the gradient of its bias with atomics.
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def seed_everything(purpose, *numbers):
    """Seed Python's, NumPy's and torch's generators, CUDA included.

    Args:
        purpose: a word, so that the same numbers give other seeds elsewhere.
        numbers: whole numbers, always as many for one purpose.
    """
    seed = _seed_of(purpose, numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(purpose, *numbers, restore=True):
    """Seed the CPU generators as :func:`seed_everything` for the length of a block, then put them back.

    Args:
        restore: False leaves them where the block did, for processes that draw within such blocks only.
    """
    state = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if restore else None
    seed = _seed_of(purpose, numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if restore:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])


def _seed_of(purpose, numbers):
    return int(np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers]).generate_state(1)[0])


@contextlib.contextmanager
def memory_limit(extra):
    """Let this process take no more than ``extra`` bytes beyond those it has; on Linux only."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + extra
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def replacing(path):
    """Context that yields the name of a file to write, which then becomes ``path``: all of it or nothing.

    The name is nobody else's, so that two writers of one file cannot mix their content. What a killed writer
    left is called ``<path>.<8 hexadecimal digits>.tmp``.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def end_workers():
    """Kill data-loading workers that an error left behind: they ignore the signals that a run handles."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def machine(device):
    """One line that names the processor, its threads and the versions, for what was measured.

    Args:
        device: cpu or cuda.
    """
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = file.read().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
        flags = next((line for line in lines if line.startswith("flags")), "")
        name += "".join(f", {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    name += f", {torch.get_num_threads()} threads"
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda} ({name})"
    return f"{name}; Python {platform.python_version()}, PyTorch {torch.__version__}, timm {timm.__version__}"


def peak_memory_mb(device):
    """Peak memory so far: allocated on the GPU, or resident in this process on the CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
