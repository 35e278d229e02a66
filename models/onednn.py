"""Linear layers through oneDNN on the CPU, where PyTorch takes another library for float32.

PyTorch computes float32 linear layers with MKL, which does not use all of every CPU. oneDNN, a part of
PyTorch too, can also apply bias and GELU on the way. ``benchmarks/`` has the same model with both.
"""

import platform
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from .export import exporting

ROWS = 4096  # tokens whose hidden channels stay in the cache


def has_onednn():
    """Whether this PyTorch has oneDNN's linear layer for x86 and may use it."""
    known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(model):
    """Let all linear layers of a model, and the exact GELU of timm's Mlps, run through oneDNN.

    Classes, parameters, their names and the results stay as they are, except for rounding: a module only gets
    a ``forward`` of its own, which leaves everything to PyTorch outside the CPU, in exports, and where a
    weight is quantised or computed from other parameters. In training an Mlp works on blocks of tokens, whose
    hidden channels stay in the cache.

    Args:
        model: a module, changed in place.
    """
    if not has_onednn():
        return
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear:
            module.packed = None  # weight and bias as oneDNN likes them, while weights are fixed
            module.forward, module.fix_weights = partial(_layer, module), partial(_pack, module)
        elif type(module) is Mlp:
            module.forward = partial(_mlp, module)


def _pack(layer, dtype):
    """Keep packed weights of a dtype, or none for None; see :func:`models.build.inference`."""
    layer.packed = None
    packable = dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if packable and type(layer.weight) is nn.Parameter and layer.weight.device.type == "cpu":
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        layer.packed = weight, None if layer.bias is None else layer.bias.detach().to(dtype)


def _layer(layer, x, gelu=False):
    """The forward of an ``nn.Linear``, then GELU if wanted: (..., in_features) to (..., out_features)."""
    weight, bias = layer.weight, layer.bias
    plain = type(weight) is not nn.Parameter or not torch.backends.mkldnn.enabled or exporting()
    if x.device.type == "cpu" and not plain:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if layer.packed is not None and layer.packed[0].dtype == dtype:
            return _linear(x.to(dtype), *layer.packed, gelu, layer.out_features)
        if dtype == torch.float32 and torch.is_grad_enabled():
            x = _Differentiated.apply(x.float(), weight, bias)
            return F.gelu(x) if gelu else x
        if dtype == torch.float32:
            return _linear(x.float(), weight, bias, gelu, layer.out_features)
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _linear(x, weight, bias, gelu, out_features):
    linear = _opaque_linear if torch.compiler.is_compiling() else _onednn_linear
    return linear(x, weight, bias, gelu, out_features)


def _onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool, out_features: int
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


# The compiler has ideas of its own about oneDNN's operator, and fails at some of them.
_opaque_linear = torch.library.custom_op("msg_transformer::linear", _onednn_linear, mutates_args=())


@_opaque_linear.register_fake
def _(x, weight, bias, gelu, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


def _plain_linear(x, weight, bias):
    """x weight^T + bias for the CPU: (rows, in) to (rows, out)."""
    if x.dtype == torch.float32:
        return _linear(x, weight, bias, False, len(weight))
    return F.linear(x, weight, bias)


def _weight_gradient(grad, x):
    """grad^T x for the CPU: (rows, out) and (rows, in) to (out, in)."""
    if x.dtype != torch.float32:
        return grad.T @ x
    if grad.shape[1] > x.shape[1]:  # the wider one is read row by row: faster
        return _linear(x.T, grad.T, None, False, grad.shape[1]).T
    return _linear(grad.T, x.T, None, False, x.shape[1])


class _Differentiated(torch.autograd.Function):
    """The linear layer of float32 with its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _plain_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which oneDNN has not
            grads = grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2), grad.flatten(0, -2).sum(0)
            return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad))
        grad_x = _plain_linear(grad, weight.T, None) if needs_x else None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            grad_x,
            _weight_gradient(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def _mlp(mlp, x):
    """The forward of timm's Mlp: (..., in) to (..., out). On the CPU it trains block by block.

    Both ways of going past a part of the Mlp need that it is as :func:`use_onednn` found it.
    """
    if exporting() or not _fusible(mlp):
        return Mlp.forward(mlp, x)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    blocks = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    drops = mlp.training and max(mlp.drop1.p, mlp.drop2.p) > 0
    biased = mlp.fc1.bias is not None and mlp.fc2.bias is not None
    if blocks and biased and not drops and dtype in (torch.float32, torch.bfloat16):
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        return _Mlp.apply(x.to(dtype).flatten(0, -2), *weights).unflatten(0, x.shape[:-1])
    return mlp.drop2(mlp.fc2(mlp.drop1(_layer(mlp.fc1, x, gelu=True))))


def _fusible(mlp):
    """Whether an Mlp is two linear layers of :func:`use_onednn` and an exact GELU, which nobody watches."""
    parts = (mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2)
    kinds = [nn.Linear, nn.GELU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout]
    return (
        [type(part) for part in parts] == kinds
        and mlp.act.approximate == "none"
        and all(_own_forward(layer) and type(layer.weight) is nn.Parameter for layer in (mlp.fc1, mlp.fc2))
        and not any(map(_hooked, parts))
        and not _has_any_global_hook()
    )


def _own_forward(layer):
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _layer


def _hooked(module):
    forward, backward = module._forward_hooks, module._backward_hooks
    return bool(forward or module._forward_pre_hooks or backward or module._backward_pre_hooks)


class _Mlp(torch.autograd.Function):
    """Linear, GELU, linear on (rows, C) with their gradients; only the channels before the GELU are stored.

    The gradients of the weights are added up in float32 at least.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2):
        cast = [tensor.to(x.dtype) for tensor in (weight1, bias1, weight2, bias2)]
        hidden, out = x.new_empty(len(x), len(weight1)), x.new_empty(len(x), len(weight2))
        for rows, before, result in zip(x.split(ROWS), hidden.split(ROWS), out.split(ROWS)):
            before.copy_(_plain_linear(rows, *cast[:2]))
            result.copy_(_plain_linear(F.gelu(before), *cast[2:]))
        ctx.save_for_backward(x, hidden, cast[0], cast[2])
        ctx.dtype = weight1.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, weight1, weight2 = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        shapes = weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1]
        sums = [torch.zeros(shape, dtype=ctx.dtype) for shape in shapes]
        blocks = (tensor.split(ROWS) for tensor in (x, hidden, grad, grad_x))
        for rows, before, grad_out, grad_rows in zip(*blocks):
            sums[2] += _weight_gradient(grad_out, F.gelu(before))
            sums[3] += grad_out.sum(0)
            grad_hidden = torch.ops.aten.gelu_backward(_plain_linear(grad_out, weight2.T, None), before)
            sums[0] += _weight_gradient(grad_hidden, rows)
            sums[1] += grad_hidden.sum(0)
            grad_rows.copy_(_plain_linear(grad_hidden, weight1.T, None))
        return grad_x, *sums
