"""Measures what models/fast/choices.py chooses among on this machine (``benchmark.py --choices``).

The shapes are those of T at 224 px and batch 4: four stages, each as often as it has blocks.
"""

import functools
import itertools
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F

from models import use_onednn
from models.fast import choices
from models.fast.attention import windowed_attention
from models.fast.fused_block import FusedBlock, load_library
from models.fast.linear import onednn_linear, onednn_weight_gradient
from tools import benchmarking, tables
from utils import UserError

BATCH, TOKENS = 4, 50
STAGES = (
    (64, 96, 3, 2),
    (16, 192, 6, 2),
    (4, 384, 12, 6),
    (1, 768, 24, 2),
)  # windows, channels, heads, blocks
TURN, ROUNDS = 0.2, 5  # shorter than the turns of models, because an operation takes milliseconds
SLOWER = 1.05  # times the fastest, from which a choice is called wrong


class Operation(NamedTuple):
    """One of the choices at one stage.

    Attributes:
        choice: a field of :class:`~models.fast.choices.Choices`.
        what: the operation in words.
        blocks: how often T has it.
        steps: by the value of the choice, a function that does it once.
    """

    choice: str
    what: str
    blocks: int
    steps: dict


def operations():
    """All operations to measure."""
    for stage, (windows, channels, heads, blocks) in enumerate(STAGES, 1):
        x = torch.randn(BATCH * windows * TOKENS, channels)
        weight, bias = torch.randn(4 * channels, channels), torch.randn(4 * channels)
        grad = torch.randn(len(x), 4 * channels)
        where = f"stage {stage}"
        forward = dict(
            onednn=functools.partial(onednn_linear, x, weight, bias, False, len(weight)),
            pytorch=functools.partial(F.linear, x, weight, bias),
        )
        yield Operation("linear", f"linear layer, {where}", blocks, forward)
        of_gelu = dict(
            onednn=functools.partial(onednn_linear, x, weight, bias, True, len(weight)),
            pytorch=lambda layer=forward["onednn"]: F.gelu(layer()),
        )
        yield Operation("gelu", f"linear layer and GELU, {where}", blocks, of_gelu)
        of_input = dict(
            onednn=functools.partial(onednn_linear, grad, weight.T, None, False, channels),
            pytorch=functools.partial(torch.mm, grad, weight),
        )
        yield Operation("linear", f"gradient of its input, {where}", blocks, of_input)
        of_weight = dict(
            onednn=functools.partial(onednn_weight_gradient, grad, x),
            pytorch=functools.partial(torch.mm, grad.T, x),
        )
        yield Operation("weight_gradient", f"gradient of its weight, {where}", blocks, of_weight)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            qkv = torch.randn(BATCH * windows, TOKENS, 3 * channels, dtype=dtype)
            of_pairs = torch.randn(heads, TOKENS, TOKENS)
            for trains in (False, True):
                steps = {
                    backend: functools.partial(attend, backend, qkv, of_pairs, trains)
                    for backend in ("blocked", "sdpa")
                }
                what = f"attention {name}{' and its gradients' * trains}, {where}"
                yield Operation(f"attention_{'gradients' if trains else name}", what, blocks, steps)


def blocks():
    """Whole blocks of T in inference, where they can be computed in two passes."""
    model = timm.create_model("msg_tiny_p4_win7_224").eval()
    use_onednn(model)
    for stage, (layer, (windows, *_)) in enumerate(zip(model.layers, STAGES), 1):
        block, count = layer.blocks[0], len(layer.blocks)
        x = torch.randn(BATCH, windows, TOKENS, block.attn.qkv.in_features)
        for dtype, functions in load_library().items():
            fused = FusedBlock(block, dtype, functions)
            for part in (block.attn, block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                if hasattr(part, "fix_weights"):
                    part.fix_weights(dtype)
            steps = dict(
                fused=functools.partial(fused_step, fused, x),
                layers=functools.partial(layers_step, block, x, dtype),
            )
            name = str(dtype).removeprefix("torch.")
            yield Operation("block", f"block {name}, stage {stage}", count, steps)


def fused_step(fused, x):
    """A block in two passes, without its exchange."""
    return fused.mlp(fused.attend(x.flatten(0, 1)), x).view(x.shape)


def layers_step(block, x, dtype):
    """A block layer by layer, without its exchange; x is (B, windows, tokens, C)."""
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = x + block.attn(block.norm1(x))
        return y + block.mlp(block.norm2(y))


def attend(backend, qkv, bias, trains):
    """Attention of all windows, with its gradients if wanted."""
    if not trains:
        with torch.inference_mode():
            windowed_attention(qkv, bias, 0.2, backend)
        return
    qkv, bias = qkv.detach().requires_grad_(), bias.detach().requires_grad_()
    windowed_attention(qkv, bias, 0.2, backend).sum().backward()


def run():
    """Measure every operation; returns ``settings`` and ``choices`` of a result, and prints what is wrong."""
    if not choices.has_onednn():
        raise UserError("there is nothing to choose: PyTorch has oneDNN's linear layers on x86 only")
    print(choices.describe())
    result = dict(choices=choices.chosen()._asdict(), settings={})
    for operation in itertools.chain(operations(), blocks()):
        turns = [functools.partial(benchmarking.turn, step, TURN) for step in operation.steps.values()]
        taken = zip(*[[list(take()) for take in turns] for _ in range(ROUNDS)])
        result["settings"][operation.what] = rows = [
            dict(model=name, choice=operation.choice, blocks=operation.blocks, turns=list(of_one))
            for name, of_one in zip(operation.steps, taken)
        ]
        times = [f"{row['model']} {1e3 * tables.seconds_of(row):.2f} ms" for row in rows]
        print(f"{operation.what}: {', '.join(times)}")
    for choice, seconds in tables.seconds_of_choices(result).items():
        print(verdict(choice, result["choices"][choice], seconds))
    return result


def verdict(choice, value, seconds):
    """Whether a choice is right, in words; ``seconds`` are those of all blocks of T, by value."""
    best = min(seconds, key=seconds.get)
    if seconds[value] <= SLOWER * seconds[best]:
        return f"{choice} {value}: right here ({tables.over_least(seconds)})"
    return (
        f"{choice} {value}: WRONG here ({tables.over_least(seconds)}), {best} is faster: change "
        "models/fast/choices.py"
    )
