"""Linear layers through oneDNN on the CPU, where PyTorch takes another library for float32.

PyTorch computes float32 linear layers with MKL, which uses half of what AVX-512 cores of AMD can do
(``benchmarks/``). oneDNN is part of PyTorch, knows all of them, and can apply the bias and a GELU on the way.
"""

import platform

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn


def has_onednn():
    """Whether this PyTorch has oneDNN's linear layer for x86 and may use it."""
    known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(model):
    """Let all linear layers of a model, and the exact GELU behind an Mlp's first one, run through oneDNN.

    Parameters, their names and the results stay as they are, but for rounding. Outside the CPU nothing
    changes. Counters of operations that watch ``nn.Linear`` do not see the layers any more.

    Args:
        model: a module, changed in place.
    """
    if not has_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
    for module in model.modules():
        if isinstance(module, Mlp) and isinstance(module.act, nn.GELU) and module.act.approximate == "none":
            module.fc1.gelu, module.act = True, nn.Identity()


class OneDnnLinear(nn.Linear):
    """A linear layer, with a GELU behind it where ``gelu`` is set; made from others by :func:`use_onednn`."""

    gelu = False
    packed = None  # packed weights by dtype, where the weights are promised to be fixed

    def fix_weights(self, fixed):
        """Keep packed weights while ``fixed``; see :func:`models.build.inference`."""
        self.packed = {} if fixed else None

    def forward(self, x):
        """(..., in_features) to (..., out_features)."""
        if x.device.type == "cpu" and torch.backends.mkldnn.enabled:
            autocast = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
            differentiated = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
            if not differentiated and dtype in self._fixed_dtypes():
                return self._fixed(x.to(dtype), dtype)
            if dtype == torch.float32 and differentiated:
                x = _Differentiated.apply(x.float(), self.weight, self.bias)
                return F.gelu(x) if self.gelu else x
            if dtype == torch.float32:
                return _linear(x.float(), self.weight, self.bias, self.gelu)
        x = super().forward(x)
        return F.gelu(x) if self.gelu else x

    def _fixed_dtypes(self):
        if self.packed is None or torch.compiler.is_compiling():
            return ()
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)

    def _fixed(self, x, dtype):
        if dtype not in self.packed:
            weight = self.weight.detach().to(dtype)
            bias = None if self.bias is None else self.bias.detach().to(dtype)
            rows = x.numel() // x.shape[-1]
            self.packed[dtype] = torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias
        return _linear(x, *self.packed[dtype], self.gelu)


def _linear(x, weight, bias, gelu=False):
    if torch.compiler.is_compiling():
        return _opaque_linear(x, weight, bias, gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


# The compiler has ideas of its own about oneDNN's operator, and fails at some of them.
@torch.library.custom_op("msg_transformer::linear", mutates_args=())
def _opaque_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    return _linear(x, weight, bias, gelu)


@_opaque_linear.register_fake
def _(x, weight, bias, gelu):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Differentiated(torch.autograd.Function):
    """The linear layer of float32 with its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which oneDNN has not
            grads = grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2), grad.flatten(0, -2).sum(0)
            return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad))
        grad_x = _linear(grad, weight.T, None) if needs_x else None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_weight = None
        if needs_weight and grad.shape[1] > x.shape[1]:  # the wider one is read row by row: faster
            grad_weight = _linear(x.T, grad.T, None).T
        elif needs_weight:
            grad_weight = _linear(grad.T, x.T, None)
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None
