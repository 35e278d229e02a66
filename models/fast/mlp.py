"""The MLP of timm on the CPU: GELU fused into the first linear layer, and training block by block."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..tracing import exporting, plain_backward
from .linear import is_onednn_layer, layer_forward, linear_into, plain_linear, weight_gradient

ROWS = 4096  # tokens whose hidden channels stay in the cache


def use_blocked_mlp(mlp):
    """Give timm's Mlp the forward of this file."""
    mlp.forward = partial(mlp_forward, mlp)


def mlp_forward(mlp, x):
    """The forward of timm's Mlp: (..., in) to (..., out). On the CPU it trains block by block.

    Both shortcuts need an Mlp that is as :func:`models.use_onednn` found it.
    """
    if x.device.type != "cpu" or exporting() or not is_fusible(mlp):
        return Mlp.forward(mlp, x)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    blocks = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    drops = mlp.training and max(mlp.drop1.p, mlp.drop2.p) > 0
    biased = mlp.fc1.bias is not None and mlp.fc2.bias is not None
    if blocks and biased and not drops and dtype in (torch.float32, torch.bfloat16):
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        return _BlockedMlp.apply(x.to(dtype).flatten(0, -2), *weights).unflatten(0, x.shape[:-1])
    return mlp.drop2(mlp.fc2(mlp.drop1(layer_forward(mlp.fc1, x, gelu=True))))


def is_fusible(mlp):
    """Whether an Mlp is two linear layers of onednn.py and an exact GELU, which nobody watches."""
    parts = (mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2)
    kinds = [nn.Linear, nn.GELU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout]
    return (
        [type(part) for part in parts] == kinds
        and mlp.act.approximate == "none"
        and all(is_onednn_layer(layer) and type(layer.weight) is nn.Parameter for layer in (mlp.fc1, mlp.fc2))
        and not are_watched(parts)
    )


def are_watched(modules):
    """Whether any of some modules has hooks, or there are hooks for all modules."""
    return any(map(_is_hooked, modules)) or _has_any_global_hook()


def _is_hooked(module):
    forward, backward = module._forward_hooks, module._backward_hooks
    return bool(forward or module._forward_pre_hooks or backward or module._backward_pre_hooks)


def _plain_mlp(x, *weights):
    weight1, bias1, weight2, bias2 = (tensor.to(x.dtype) for tensor in weights)
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


class _BlockedMlp(torch.autograd.Function):
    """Linear, GELU, linear on (rows, C) with their gradients; only the channels before the GELU are stored.

    The gradients of the weights are added up in float32 at least. Gradients of these gradients are those of
    the plain layers.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2):
        cast = [tensor.to(x.dtype) for tensor in (weight1, bias1, weight2, bias2)]
        hidden, out = x.new_empty(len(x), len(weight1)), x.new_empty(len(x), len(weight2))
        for rows, before, result in zip(x.split(ROWS), hidden.split(ROWS), out.split(ROWS)):
            linear_into(before, rows, *cast[:2])
            linear_into(result, F.gelu(before), *cast[2:])
        ctx.save_for_backward(x, hidden, cast[0], cast[2], weight1, bias1, weight2, bias2)
        ctx.dtype = weight1.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        x, hidden, weight1, weight2, *given = ctx.saved_tensors
        if plain_backward(grad):
            return torch.func.vjp(_plain_mlp, x, *given)[1](grad)
        grad_x = torch.empty_like(x)
        shapes = weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1]
        sums = [torch.zeros(shape, dtype=ctx.dtype) for shape in shapes]
        blocks = (tensor.split(ROWS) for tensor in (x, hidden, grad, grad_x))
        for rows, before, grad_out, grad_rows in zip(*blocks):
            sums[2] += weight_gradient(grad_out, F.gelu(before))
            sums[3] += grad_out.sum(0)
            grad_hidden = torch.ops.aten.gelu_backward(plain_linear(grad_out, weight2.T, None), before)
            sums[0] += weight_gradient(grad_hidden, rows)
            sums[1] += grad_hidden.sum(0)
            linear_into(grad_rows, grad_hidden, weight1.T)
        return grad_x, *sums
