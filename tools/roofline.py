"""What a model has to compute and to move, whoever implements it, and what a machine can do at best.

One operation is a matrix product, a convolution or a whole attention. What stands between them (norms,
activations, additions, windows that move) is taken as fused into them: it costs no traffic, and its little
arithmetic is not counted.
"""

import contextlib
import platform
import re
import time
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.fast.cpu import use_onednn
from models.fast.fixed_weights import inference

ADAMW = 7 * 4  # bytes for a float32 parameter: read with its gradient and two moments, written with these


class Work(NamedTuple):
    """One operation: floating-point operations (a multiply-add is two), and bytes read and written once."""

    flops: int
    bytes: int


def count_work(model, images, training=False):
    """The operations of one forward pass, or of one training step with AdamW.

    A backward pass reads what the forward pass read and the gradient of the result, and writes the gradients
    of what it read. Nothing is computed: model and images belong on the meta device, in the dtype in which
    matrix products are taken.

    Args:
        model: any module whose parameters are on the meta device.
        images: (B, C, H, W), likewise.
        training: count the gradients and the update too.

    Returns:
        A list of :class:`Work`.
    """
    with torch.set_grad_enabled(training), _Counter() as counter:
        model.train(training)(images)
    update = [Work(0, ADAMW * sum(parameter.numel() for parameter in model.parameters()))]
    return counter.forward + (counter.backward + update if training else [])


def least_seconds(work, flops_per_second, bytes_per_second):
    """The time that operations take where each one is limited by arithmetic or by memory traffic alone."""
    return sum(max(flops / flops_per_second, size / bytes_per_second) for flops, size in work)


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


class _Counter(TorchFunctionMode):
    """Records every call of a torch function in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        flops = counter.get_total_flops()
        if flops:
            inputs = _tensors((args, kwargs))
            learning = [x for x in inputs if x.requires_grad]
            moved = _bytes(inputs + _tensors(result))
            self.forward.append(Work(flops, moved))
            # A product per operand; images need no gradient.
            products = 1 + inputs[0].requires_grad
            self.backward.append(Work(products * flops, moved + _bytes(learning)))
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensors):
    """Bytes of tensors, once where they overlap."""
    sizes = {}
    for x in tensors:
        storage = x.untyped_storage()
        size = sizes.get(storage._cdata, 0) + x.numel() * x.element_size()
        sizes[storage._cdata] = min(size, storage.nbytes())
    return sum(sizes.values())
