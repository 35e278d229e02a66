"""Linear layers through oneDNN on the CPU, where PyTorch takes another library for float32.

PyTorch computes float32 linear layers with MKL, which does not use all of every CPU. oneDNN, a part of
PyTorch too, can also apply bias and GELU on the way. ``benchmarks/`` has the same model with both.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..tracing import exporting, plain_backward
from .choices import chosen
from .fixed_weights import Fixed, are_plain


def use_onednn_layer(layer):
    """Give an ``nn.Linear`` the forward of this file, and weights that can be fixed."""
    layer.fixed = Fixed()  # weight and bias as oneDNN likes them
    layer.forward, layer.fix_weights = partial(layer_forward, layer), partial(_pack, layer)


def is_onednn_layer(layer):
    """Whether a module has the forward of this file, and nobody has replaced it since."""
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is layer_forward


def _pack(layer, dtype):
    """Keep packed weights of a dtype; see :func:`models.inference`."""
    packable = dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if packable and are_plain(layer.weight, layer.bias) and layer.weight.device.type == "cpu":
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        layer.fixed.keep((weight, bias), layer.weight, layer.bias)


def layer_forward(layer, x, gelu=False):
    """The forward of an ``nn.Linear``, then GELU if wanted: (..., in_features) to (..., out_features)."""
    weight, bias = layer.weight, layer.bias
    compiled = torch.compiler.is_compiling() and chosen().compiled == "pytorch"
    if x.device.type == "cpu" and _is_plain(weight) and not exporting() and not compiled:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        packed = layer.fixed.of(weight, bias)
        if packed is not None and packed[0].dtype == dtype:
            return _linear(x.to(dtype), *packed, gelu, layer.out_features)
        if dtype == torch.float32 and torch.is_grad_enabled():
            x = _Differentiated.apply(x.float(), weight, bias)
            return F.gelu(x) if gelu else x
        if dtype == torch.float32:
            return _linear(x.float(), weight, bias, gelu, layer.out_features)
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _is_plain(weight):
    """Whether oneDNN may take a weight: it is neither quantised nor computed from other parameters."""
    return type(weight) is nn.Parameter and torch.backends.mkldnn.enabled


def _linear(x, weight, bias, gelu, out_features):
    linear = _opaque_linear if torch.compiler.is_compiling() else onednn_linear
    if gelu and chosen().gelu == "pytorch":
        return F.gelu(linear(x, weight, bias, False, out_features))
    return linear(x, weight, bias, gelu, out_features)


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool, out_features: int
) -> torch.Tensor:
    """x weight^T + bias by oneDNN, then GELU if wanted: (..., in_features) to (..., out_features)."""
    if not x.numel():  # a batch of no images, which oneDNN refuses
        return x.new_zeros(*x.shape[:-1], out_features)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


# Opaque to torch.compile: Inductor's own lowering of this operator fails in some cases.
_opaque_linear = torch.library.custom_op("msg_transformer::linear", onednn_linear, mutates_args=())


@_opaque_linear.register_fake
def _(x, weight, bias, gelu, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


def plain_linear(x, weight, bias):
    """x weight^T + bias for the CPU: (rows, in) to (rows, out)."""
    if x.dtype == torch.float32:
        return _linear(x, weight, bias, False, len(weight))
    return F.linear(x, weight, bias)


def linear_into(out, x, weight, bias=None):
    """Write what :func:`plain_linear` gives into ``out``, (rows, out)."""
    if x.dtype == torch.float32:
        out.copy_(plain_linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def weight_gradient(grad, x):
    """grad^T x for the CPU: (rows, out) and (rows, in) to (out, in)."""
    if x.dtype != torch.float32 or chosen().weight_gradient == "pytorch":
        return grad.T @ x
    return onednn_weight_gradient(grad, x)


def onednn_weight_gradient(grad, x):
    """The same in float32 by oneDNN."""
    if grad.shape[1] > x.shape[1]:  # the wider one is read row by row: faster
        return _linear(x.T, grad.T, None, False, grad.shape[1]).T
    return _linear(grad.T, x.T, None, False, x.shape[1])


class _Differentiated(torch.autograd.Function):
    """The linear layer of float32 with its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return plain_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        if plain_backward(grad):
            given = [tensor for tensor in ctx.saved_tensors if tensor is not None]
            return (*torch.func.vjp(F.linear, *given)[1](grad), None)[:3]
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = plain_linear(grad, weight.T, None) if needs_x else None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            grad_x,
            weight_gradient(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )
