"""The machine that is measured on: what it is, and what it can do at best."""

import contextlib
import platform
import re
import time

import timm
import torch
from torch import nn

from models.fast.cpu import use_onednn
from models.fast.fixed_weights import inference


def machine(device):
    """What was measured on: processor, family and model, instruction sets, threads and, for cuda, device.

    Args:
        device: cpu or cuda.
    """
    found = dict(processor=platform.processor() or platform.machine(), family="", model="", flags=[])
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", file.read(), re.MULTILINE))
        known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        flags = [flag for flag in known if flag in lines.get("flags", "").split()]
        numbers = dict(family=lines.get("cpu family", ""), model=lines.get("model", ""))
        found.update(numbers, processor=lines.get("model name", found["processor"]), flags=flags)
    found["threads"] = torch.get_num_threads()
    return dict(found, device=torch.cuda.get_device_name()) if device == "cuda" else found


def versions():
    """The versions of what computes."""
    python = dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__)
    return dict(python, cuda=torch.version.cuda) if torch.cuda.is_available() else python


def machine_limits(device, dtype):
    """What a large linear layer and a large copy reach on a device, the best of 5 times: FLOP/s and bytes/s.

    Args:
        device: cpu or cuda.
        dtype: of the linear layer, which runs as those of our models do.
    """
    side, size, calls = (8192, 2**30, 10) if device == "cuda" else (2048, 2**28, 1)
    layer = nn.Sequential(nn.Linear(side, side, bias=False)).to(device, dtype)
    use_onednn(layer)
    x = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    with inference(layer):
        flops = 2 * side**3 / _best_seconds(lambda: layer(x), calls, device)
    return flops, 2 * size / _best_seconds(lambda: target.copy_(source), calls, device)


def _best_seconds(function, calls, device, rounds=5):
    seconds = []
    for _ in range(1 + rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / calls)
    return min(seconds[1:])
