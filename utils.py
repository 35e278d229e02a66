"""Process group and reductions, devices, seeds, memory."""

import contextlib
import os
import random
import resource
import sys

import numpy as np
import torch
import torch.distributed as dist


class UserError(ValueError):
    """Something that the person who started the run can mend: shown as one message, without a traceback."""


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


def start_process_group(device):
    """Join the launcher's process group, if there is a launcher: NCCL on CUDA, gloo on the CPU."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")


def stop_process_group():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(tensor):
    """Sum a tensor over all processes, in place; all of them must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(make):
    """Call ``make`` on rank 0 and give every process what it returned."""
    if not dist.is_initialized():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


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


def peak_memory_mb(device):
    """Peak memory so far: allocated on the GPU, or resident in this process on the CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
