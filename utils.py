"""What needs no PyTorch: the environment, launchers, errors, whole files, locks, memory, operating systems.

Whatever differs between Linux, macOS and Windows is here. We import nothing but Python's own library, so that
programs can say within a moment what is missing or wrong.
"""

import collections
import contextlib
import ctypes
import errno
import importlib.util
import math
import multiprocessing.queues
import os
import signal
import sys
import time
import traceback
import unicodedata
import uuid
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None

ROOT = Path(__file__).resolve().parent
# What models/ needs besides itself: of this repository, and of requirements.txt.
OURS = "checkpoint", "config", "config_rules", "data", "distributed", "utils"
REQUIRED = "torch", "torchvision", "timm", "yacs", "yaml", "safetensors", "numpy"
# What a launcher such as torchrun sets: which process this is, and where the first one waits for the others.
PROCESS, MEETING_POINT = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")
# What asks a run to stop: schedulers, Ctrl-C. Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# Parameters of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


class UserError(ValueError):
    """Something that the person who started the run can mend: shown as one message, without a traceback."""


def check_environment():
    """End the program, or raise an ImportError, where this Python lacks what everything here imports."""
    if not (found := _missing_or_hidden()):
        return
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program and Path(program).resolve().is_relative_to(ROOT):
        sys.exit(f"error: {found}")  # of a program of ours: without a traceback
    raise ImportError(found)


def _missing_or_hidden():
    """What is missing or hidden, and what to do; "" if all is there."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} has no {', '.join(missing)}: activate the environment (source "
            f".venv/bin/activate), or run {sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
        )
    for name in OURS:
        found = _file_of(name)
        if found is None or not found.is_relative_to(ROOT):
            where = f"is hidden by {found}: rename that, or" if found else "is not found:"
            return f"{name!r} of {ROOT} {where} put {ROOT} first into PYTHONPATH or sys.path"
    return ""


def _file_of(name):
    if name in sys.modules:
        path = getattr(sys.modules[name], "__file__", None)
    else:
        spec = importlib.util.find_spec(name)
        path = spec and spec.origin
    return path and Path(path).resolve()


@contextlib.contextmanager
def telling_errors():
    """Context that ends the program with one message and exit code 1 where a UserError is raised in it."""
    with contextlib.suppress(AttributeError):  # the output of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no UTF-8
    try:
        yield
    except UserError as error:
        # Every process meets the same error: the others wait, so that the launcher ends them before they
        # repeat it.
        if is_launched() and os.environ["RANK"] != "0":
            time.sleep(3)
        # An error of a data-loading worker comes with the worker's traceback in front of the message.
        message = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
        sys.exit(f"error: {message}")


def printable(text):
    """Text that every file and console takes: what is no UTF-8, in a file name, becomes escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


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


def is_launched():
    """Whether a launcher has set all its variables."""
    return all(os.environ.get(name) for name in (*PROCESS, *MEETING_POINT))


def adopt_launcher():
    """Under ``srun`` with several tasks take Slurm's variables; refuse a launcher's that do not fit together.

    MASTER_ADDR and MASTER_PORT alone start nothing and are left alone.

    Raises:
        UserError: which variables are set, which are missing or wrong, and what to do.
    """
    _adopt_slurm()
    found = {name: os.environ[name] for name in (*PROCESS, *MEETING_POINT) if os.environ.get(name)}
    if not any(name in found for name in PROCESS):
        return
    missing = [name for name in (*PROCESS, *MEETING_POINT) if name not in found]
    numbers = [name for name in found if name != "MASTER_ADDR" and not found[name].isdecimal()]
    if missing:
        problem = f"without {', '.join(missing)}"
    elif numbers:
        problem = f"and {', '.join(numbers)} must be a whole number"
    elif max(int(found["RANK"]), int(found["LOCAL_RANK"])) >= int(found["WORLD_SIZE"]):
        problem = "and a rank must be below WORLD_SIZE"
    else:
        return
    listed = ", ".join(f"{name}={value}" for name, value in found.items())
    raise UserError(
        f"the environment has {listed}, {problem}: for one process, unset {' '.join(found)}; for several, "
        "start them with torchrun, which sets all of these"
    )


def _adopt_slurm():
    if os.environ.get("RANK") or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    for name, slurm in zip(PROCESS, ("PROCID", "STEP_NUM_TASKS", "LOCALID")):
        os.environ[name] = os.environ.get(f"SLURM_{slurm}", "")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("srun with several tasks needs MASTER_ADDR and MASTER_PORT set, see scripts/slurm.sh")
    os.environ.setdefault("MASTER_PORT", "29500")


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
    if not fcntl:
        raise OSError(errno.ENOSYS, "this system has none that we know")
    try:
        # Not flock: forked workers would share it, and keep it for a while after the run was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def end_workers():
    """Kill data-loading workers that an error left behind: they ignore the signals that a run handles."""
    number = getattr(signal, "SIGCHLD", None)
    handler = number and signal.signal(number, signal.SIG_DFL)  # PyTorch's would raise an error for each
    for child in multiprocessing.active_children():
        child.kill()
        child.join(5)
    if handler is not None:
        signal.signal(number, handler)


def end_on_lost_batches():
    """Let a data-loading worker end where it cannot send a batch; call it in the worker.

    Python would print the error and drop the batch, and the run would wait for it for ever. PyTorch tells
    the run the exit code, from which :func:`distributed.shortage` knows the reason.
    """

    def end(error):
        text = str(error)
        if "Too many open files" in text:
            os._exit(errno.EMFILE)
        if "</torch_" in text:
            os._exit(errno.ENOSPC)
        traceback.print_exception(error)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, _: end(error))
    sys.excepthook = lambda _, error, __: end(error)  # of the thread that hands over open files


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


def peak_memory_mb(device):
    """Peak memory so far, in MiB: allocated by CUDA, or else resident in this process; nan on Windows."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
