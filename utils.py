"""Devices, precision, seeds, worker processes, files that are whole.

Whatever differs between Linux, macOS and Windows is here.
"""

import check_environment  # noqa: F401

# isort: split
import collections
import contextlib
import multiprocessing
import os
import random
import signal
import unicodedata
import uuid
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from launch import UserError
from memory import keep_freed_memory

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

    fcntl = None

# What asks a run to stop: schedulers, Ctrl-C. Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


@dataclass(frozen=True)
class Compute:
    """Where a process computes, and the dtype of mixed precision, None for float32."""

    device: torch.device
    dtype: torch.dtype | None = None

    def autocast(self):
        """Context of forward passes in mixed precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def float64_device(self):
        """Where to add up in float64: on the device, but on the CPU for MPS, which has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device


def build_compute(config):
    """The :class:`Compute` of this process: on ``DEVICE``, or else on a CUDA GPU where there is one.

    Raises:
        UserError: no such GPU.
    """
    kind = config.DEVICE or ("cuda" if torch.cuda.is_available() else "cpu")
    mixed = config.AMP_OPT_LEVEL != "O0"
    if kind == "cpu":
        keep_freed_memory()
        return Compute(torch.device(kind), torch.bfloat16 if mixed else None)
    number = config.LOCAL_RANK
    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if number >= count:
        raise UserError(
            f"process {number} of this machine has no GPU for --device {kind}, PyTorch sees {count}: use "
            "--device cpu, or launch no more processes than GPUs"
        )
    if kind == "cuda":
        torch.cuda.set_device(number)
    return Compute(torch.device(kind, number), getattr(torch, config.AMP_DTYPE) if mixed else None)


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


def advice_on_look_alikes(names):
    """What to do about names that differ in Unicode's form only and look alike; empty where none do.

    Accents may be part of a letter (NFC) or follow it (NFD, as some systems of Apple write file names).
    """
    forms = collections.defaultdict(list)
    for name in sorted(names):
        forms[unicodedata.normalize("NFC", name)].append(name)
    alike = next((found for found in forms.values() if len(found) > 1), None)
    if alike is None:
        return ""
    pair = " and ".join(map(ascii, alike[:2]))
    return (
        f"; {pair} are both {alike[0]!r}, in two Unicode forms (NFC and NFD): rename the folders of one "
        "set, for example with convmv -r -f utf8 -t utf8 --nfc --notest <folder>"
    )


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


def sync_folder(path):
    """Make the new name of a file last through a power cut; Windows has no call for that."""
    if fcntl:
        folder = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def lock_file(file):
    """Lock an open file until this process closes it or ends; its children do not inherit the lock.

    Returns:
        False where another process holds the lock.

    Raises:
        OSError: there are no locks here.
    """
    try:
        if fcntl:
            # Not flock: forked workers would share it, and keep it for a while after the run was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # Nobody else could read what is locked on Windows: so it is a byte beyond the content.
            os.lseek(file.fileno(), 2**30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


def end_workers():
    """Kill data-loading workers that an error left behind: they ignore the signals that a run handles."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
