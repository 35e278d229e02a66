"""The processes of a run: where each computes, its seeds, the process group, and one deciding for all."""

import contextlib
import datetime
import errno
import logging
import os
import platform
import random
import re
import sys
import time
import uuid
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, adopt_launcher, end_workers, is_launched, keep_freed_memory, telling_errors


@dataclass(frozen=True)
class Compute:
    """Where a process computes, and the dtype of mixed precision, None for float32."""

    device: torch.device
    dtype: torch.dtype | None = None

    def prepare(self):
        """Make the GPU this process's current one; on the CPU, keep freed memory for the next tensors."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif self.device.type == "cpu":
            keep_freed_memory()

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
        return Compute(torch.device(kind), torch.bfloat16 if mixed and cpu_has_bfloat16() else None)
    number = config.LOCAL_RANK
    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if number >= count:
        raise UserError(
            f"process {number} of this machine has no GPU for --device {kind}, PyTorch sees {count}: use "
            "--device cpu, or launch no more processes than GPUs"
        )
    return Compute(torch.device(kind, number), getattr(torch, config.AMP_DTYPE) if mixed else None)


def cpu_has_bfloat16():
    """Whether this CPU computes in bfloat16; on x86 without AVX-512, PyTorch emulates it, much slower."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def be_deterministic():
    """Make PyTorch use deterministic kernels only: the same run gives the same bits, on CUDA more slowly."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # The memory-efficient attention adds up the gradient of its bias with atomics.
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def seed_everything(purpose, *numbers):
    """Seed Python's, NumPy's and torch's generators, CUDA included.

    ``purpose`` is a word, so that the same numbers give other seeds elsewhere.
    """
    torch.manual_seed(_seed_cpu(purpose, numbers))


@contextlib.contextmanager
def seeded(purpose, *numbers, restore=True):
    """Seed the CPU generators as :func:`seed_everything` for the length of a block, then put them back.

    Args:
        restore: False leaves them where the block did, for callers that put them back.
    """
    state = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if restore else None
    torch.default_generator.manual_seed(_seed_cpu(purpose, numbers))
    try:
        yield
    finally:
        if restore:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])


def _seed_cpu(purpose, numbers):
    """Seed Python's and NumPy's generators; returns the seed, for torch's."""
    seed = int(np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    return seed


def rank_and_world_size():
    """This process's rank in the process group and the number of processes; (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_process_group(device, timeout_seconds):
    """Join the launcher's process group, if there is a launcher: gloo on the CPU, and NCCL for CUDA tensors.

    Args:
        timeout_seconds: how long a collective waits for the other processes before it fails.

    Raises:
        UserError: the launcher's variables do not fit together, or its port is taken.
    """
    adopt_launcher()
    if not is_launched():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"port {port} of this machine, where the processes are to meet, is taken by another program: "
            "choose another MASTER_PORT (torchrun --master_port), or use torchrun --standalone"
        ) from error
    name = _agree_on_a_name(store, rank, world_size, timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world_size, timeout=timeout
    )


def _agree_on_a_name(store, rank, world_size, timeout):
    """A name that these processes share and no earlier ones knew.

    torchrun's store outlives a restart of the processes. Under the old names they would find the addresses of
    those that died. So each tells rank 0 a name of its own, and waits for an answer that only rank 0 of this
    start can give.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", own)
        store.wait([f"answer/{own}"], timeout)
        name = store.get(f"answer/{own}").decode()
        store.set(f"met/{name}/{rank}", "")
        return name
    end, missing = time.monotonic() + timeout.total_seconds(), set(range(1, world_size))
    while missing:
        if time.monotonic() > end:
            raise UserError(
                f"processes {sorted(missing)} did not join within DIST.TIMEOUT_SECONDS ({timeout})"
            )
        for other in sorted(missing):
            if store.check([f"met/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(0.02)
    return own


def parallelize(model, device):
    """The model as DistributedDataParallel.

    Without the search for unused parameters, DDP would order its gradient buckets anew after the first
    update of every start, and a resumed run would add up the gradients of three or more processes in another
    order.
    """
    ids = [device] if device.type == "cuda" else None
    model = DistributedDataParallel(model, ids, gradient_as_bucket_view=True, find_unused_parameters=True)
    # The classifier's only buffers are constant indices; those of BatchNorm are sent when they are needed.
    # The constructor's option for this has another name since PyTorch 2.13, the attribute has not.
    model.broadcast_buffers = False
    return model


def stop_process_group():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(tensor):
    """Sum a tensor over all processes, in place; all of them must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest_over_processes(*numbers):
    """The largest of each whole number over all processes, as a list; all of them must call it."""
    if not dist.is_initialized():
        return list(numbers)
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather_lists(items):
    """The lists of all processes joined, on rank 0; None elsewhere. All of them must call it."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(items, parts)
    return None if parts is None else [item for part in parts for item in part]


def send_buffers(model):
    """Give every process the buffers of rank 0's model, such as the statistics of BatchNorm."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def from_rank_0(make):
    """Call ``make`` on rank 0 and give every process what it returned, or raise its UserError there.

    So one process alone decides, whatever the others would see in their file systems.
    """
    if not dist.is_initialized():
        return make()
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def run_command(command, smaller, workers="DATA.NUM_WORKERS"):
    """Call ``command`` as the whole of a program: an expected error is one message, and no worker stays.

    ``smaller`` and ``workers`` are those of :func:`shortage`.
    """
    try:
        with telling_errors():
            adopt_launcher()
            command()
    except (RuntimeError, MemoryError, OSError) as error:
        message = shortage(error, smaller, workers)
        if message is None and lost_contact(error):
            reason = str(error).split("\n")[0][:160]
            message = (
                f"lost contact with another process ({reason}); look for the first error of any. The same "
                "command resumes from the latest checkpoint"
            )
        if message is None:
            raise
        logging.getLogger("msg_transformer").debug(message, exc_info=error)
        sys.exit(f"error: {message}")
    finally:
        end_workers()


def lost_contact(error):
    """Whether an error of PyTorch means that another process of the group is gone or does not answer."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    phrases = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting")
    phrases += ("remote process exit", "watchdog caught collective operation timeout")
    return "RANK" in os.environ and any(phrase in str(error).lower() for phrase in phrases)


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
    text = f"{error} {error.__cause__ or ''}"  # PyTorch may say more in the cause

    def says(*phrases):
        return any(phrase in text for phrase in phrases)

    # Exit codes are those of utils.end_on_lost_batches.
    if says("Too many open files", "received 0 items of ancdata", f"with exit code {errno.EMFILE}."):
        return (
            "no file descriptors are left (too many open files): allow this process more, for example with "
            f"ulimit -n 65536, or lower {workers}"
        )
    if says("signal: Bus error", "allocate shared memory", f"with exit code {errno.ENOSPC}.") or (
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
