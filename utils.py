"""Process group and reductions, devices, seeds, memory."""

import contextlib
import datetime
import multiprocessing
import os
import random
import resource
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist


class UserError(ValueError):
    """Something that the person who started the run can mend: shown as one message, without a traceback."""


def adopt_slurm():
    """Under ``srun`` with several tasks, take rank and world size from Slurm's variables."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "srun with several tasks needs MASTER_ADDR and MASTER_PORT set, see scripts/slurm.sh"
            )
        for name, slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "STEP_NUM_TASKS"), ("LOCAL_RANK", "LOCALID")):
            os.environ[name] = os.environ[f"SLURM_{slurm}"]
        os.environ.setdefault("MASTER_PORT", "29500")


def rank_and_world_size():
    """This process's rank and the number of processes, as the launcher set them; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name, local_rank):
    """The device of this process.

    Args:
        name: ``cuda``, ``cpu``, or empty for cuda where there is one.
        local_rank: which GPU of this machine.

    Raises:
        UserError: no such GPU.
    """
    if name == "cpu" or (not name and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this machine has no GPU, PyTorch sees {count}: use --device cpu, or "
            "launch no more processes than GPUs"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start_process_group(device, timeout_seconds):
    """Join the launcher's process group, if there is a launcher: gloo on the CPU, and NCCL for CUDA tensors.

    Args:
        timeout_seconds: how long a collective waits for the other processes before it fails.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))


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


def gather_floats(tensor):
    """The value of a scalar tensor on every process, as a list by rank; all of them must call it."""
    if not dist.is_initialized():
        return [tensor.item()]
    values = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(values, tensor.detach().float().cpu())
    return [value.item() for value in values]


def from_rank_0(make):
    """Call ``make`` on rank 0 and give every process what it returned, or raise its UserError on every
    process.

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


def be_deterministic():
    """Make PyTorch use deterministic kernels only: the same run gives the same bits, on CUDA more slowly."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # The memory-efficient attention adds up the gradient of its bias with atomics.
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def seed_everything(*numbers):
    """Seed Python's, NumPy's and torch's generators, CUDA included, from whole numbers."""
    seed = _seed_of(numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(*numbers):
    """Seed the CPU generators from whole numbers for the length of a block, then put them back."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = _seed_of(numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def _seed_of(numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def lost_contact(error):
    """Whether an error of PyTorch means that another process of the group is gone or does not answer."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "timed out")
    return isinstance(error, dist.DistError) or (
        dist.is_initialized() and any(word in str(error).lower() for word in words)
    )


def end_workers():
    """Kill data-loading workers that an error left behind: they ignore the signals that a run handles."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def peak_memory_mb(device):
    """Peak memory so far: allocated on the GPU, or resident in this process on the CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
