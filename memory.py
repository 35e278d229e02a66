"""Memory of this process: what it may take, what it has taken, and what it keeps."""

import contextlib
import ctypes
import math
import os
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
