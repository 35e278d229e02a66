"""Memory of this process: what it may take, what it has taken, what it keeps, and how to need less."""

import contextlib
import ctypes
import math
import os
import re
import sys

import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None

# Parameters of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def keep_freed_memory():
    """Let the C library keep freed memory for what is allocated next; with glibc only.

    By default it gives tensors of some sizes back to the kernel whenever they are freed, and the kernel
    clears the pages of the next ones. So the process stays as large as it once was. Whoever has set glibc's
    own variables is obeyed.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries, macOS, Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25)  # older ones take no more


@contextlib.contextmanager
def memory_limit(extra):
    """Let this process take no more than ``extra`` bytes beyond those it has; on Linux only."""
    if resource is None or not os.path.exists("/proc/self/statm"):
        yield
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + extra
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def peak_memory_mb(device):
    """Peak memory so far, in MiB: allocated by CUDA, or else resident in this process; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def smaller_run(config):
    """What makes a run of a config need less memory, in words."""
    trains, detects = not (config.EVAL_MODE or config.THROUGHPUT_MODE), config.DATA.DATASET == "coco"
    ways = [f"lower DATA.BATCH_SIZE (--batch-size), which is {config.DATA.BATCH_SIZE}"]
    if trains:
        ways[0] += ", and raise TRAIN.ACCUMULATION_STEPS as much"
        ways.append("set TRAIN.USE_CHECKPOINT True (--use-checkpoint)")
    if detects:
        ways.append(f"lower {'DET.MIN_SIZES' if trains else 'DET.TEST_SIZE'} and DET.MAX_SIZE")
    return ", or ".join(ways)


def shortage(error, smaller, workers):
    """What this machine has run out of, and what helps, where ``error`` is of that kind; None elsewhere.

    Args:
        error: an exception of Python, the system or PyTorch, which may have come from a data-loading worker.
        smaller: what makes the program need less memory, in words.
        workers: the key or flag of its data-loading workers.
    """
    text = str(error)

    def says(*phrases):
        return any(phrase in text for phrase in phrases)

    if says("Too many open files", "received 0 items of ancdata"):
        return (
            "no file descriptors are left (too many open files): allow this process more, for example with "
            f"ulimit -n 65536, or lower {workers}"
        )
    if says("is killed by signal: Bus error", "allocate shared memory") or (
        says("No space left on device") and says("</torch_")
    ):
        return (
            "/dev/shm, through which data-loading workers send their batches, is too small: enlarge it "
            f"(docker run --shm-size 8g, or --ipc host), or lower {workers} (0 needs none)"
        )
    killed = says("is killed by signal: Killed")
    allocation = says("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or killed or allocation:
        found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        what = "a data-loading worker was killed" if killed else found and f"tried to allocate {found[1]}"
        keys = f"{smaller}, or lower {workers}" if killed else smaller
        return f"out of memory{f' ({what})' if what else ''}: {keys}"
    return None
