"""Linear layers through oneDNN on the CPU, where PyTorch takes another library for float32.

PyTorch computes float32 linear layers with MKL, which does not use all of every CPU. oneDNN, a part of
PyTorch too, can also apply bias and GELU on the way. ``benchmarks/`` has the same model with both.
"""

import platform

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn
from torch.autograd.function import once_differentiable

ROWS = 4096  # tokens whose hidden channels stay in the cache


def has_onednn():
    """Whether this PyTorch has oneDNN's linear layer for x86 and may use it."""
    known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(model):
    """Let all linear layers of a model, and the exact GELU behind an Mlp's first one, run through oneDNN.

    Parameters, their names and the results stay as they are, but for rounding. Outside the CPU nothing
    changes. Counters of operations that watch ``nn.Linear`` do not see the layers any more. In training an
    Mlp works on blocks of tokens, whose hidden channels stay in the cache.

    Args:
        model: a module, changed in place.
    """
    if not has_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
            module.gelu, module.packed = False, None
    for module in model.modules():
        if isinstance(module, Mlp) and isinstance(module.act, nn.GELU) and module.act.approximate == "none":
            module.fc1.gelu, module.act = True, nn.Identity()
            biased = module.fc1.bias is not None and module.fc2.bias is not None
            if type(module) is Mlp and isinstance(module.norm, nn.Identity) and biased:
                module.__class__ = BlockedMlp


class OneDnnLinear(nn.Linear):
    """A linear layer made from another by :func:`use_onednn`.

    Attributes:
        gelu: apply the exact GELU to the result.
        packed: weight and bias in a dtype and an order that suit oneDNN while weights are fixed, or None.
    """

    def fix_weights(self, dtype):
        """Keep packed weights of a dtype, or none for None; see :func:`models.build.inference`."""
        self.packed = None
        packable = dtype == torch.float32 or (
            dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if packable and self.weight.device.type == "cpu":
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(dtype))
            self.packed = weight, None if self.bias is None else self.bias.detach().to(dtype)

    def forward(self, x):
        """(..., in_features) to (..., out_features)."""
        if x.device.type == "cpu" and torch.backends.mkldnn.enabled:
            autocast = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
            if self.packed is not None and self.packed[0].dtype == dtype:
                return _linear(x.to(dtype), *self.packed, self.gelu, self.out_features)
            if dtype == torch.float32 and torch.is_grad_enabled():
                x = _Differentiated.apply(x.float(), self.weight, self.bias)
                return F.gelu(x) if self.gelu else x
            if dtype == torch.float32:
                return _linear(x.float(), self.weight, self.bias, self.gelu, self.out_features)
        x = super().forward(x)
        return F.gelu(x) if self.gelu else x


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


class BlockedMlp(Mlp):
    """An Mlp with exact GELU made from timm's by :func:`use_onednn`: on the CPU it trains block by block."""

    def forward(self, x):
        """(..., in) to (..., out)."""
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        blocks = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        drops = self.training and max(self.drop1.p, self.drop2.p) > 0
        if not blocks or drops or dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x)
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return _Mlp.apply(x.to(dtype).flatten(0, -2), *weights).unflatten(0, x.shape[:-1])


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
