"""What a trace, an export, a counter of operations or ``torch.func`` sees: the plain formulas and layers."""

import contextlib
import functools
import warnings

import torch
from torch.autograd import forward_ad


def exporting():
    """Whether the operations of this call are recorded, watched or transformed rather than just computed.

    That is so in ``torch.jit.trace``, ``torch.export``, both ONNX exporters and ``make_fx``, inside counters
    such as ``FlopCounterMode``, in the transforms of ``torch.func`` and in forward-mode differentiation. They
    know PyTorch's own operators only, and some record writes into parts of a tensor wrongly: what is faster
    than the plain formula stands aside. ``torch.compile`` is not among them.
    """
    if torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        # What is_exporting() reads: in PyTorch 2.10 and 2.11 it says yes in torch.compile as well.
        return torch.compiler._is_exporting_flag
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch._C._len_torch_dispatch_stack() > 0


def plain_backward(grad):
    """Whether a backward needs PyTorch's own operators: it is differentiated again, or maps over gradients.

    Grad mode is on inside a backward that was called with ``create_graph=True``.

    Args:
        grad: of the output. Where ``is_grads_batched=True`` stacks several, it has no storage.
    """
    if torch.is_grad_enabled() or exporting():
        return True
    if not torch.compiler.is_compiling():
        try:
            grad.untyped_storage()
        except NotImplementedError:
            return True
    return False


def replaceable(forward):
    """Decorate the ``forward(x)`` of a module, so that another function can run in its place.

    ``module(x, function)`` computes ``function(module, x)`` between the hooks of the module. For example,
    FSDP gathers sharded weights in such a hook, which a plain call of the function would leave out.
    """

    @functools.wraps(forward)
    def choose(self, x, instead=None):
        return forward(self, x) if instead is None else instead(self, x)

    return choose


def replace_messengers(x, messengers):
    """Windowed tokens with the messengers that an exchange among their windows gave.

    In place, so that the patch tokens are not copied, except where operations are recorded, and under
    torch.compile, which would fuse the assignment into all that reads x.

    Args:
        x: (B*regions, windows, 1+w*w, C); not read after this.
        messengers: (B*regions, windows, C), possibly a view of x.

    Returns:
        The shape of x.
    """
    if not exporting():
        if x.shape[1] == 1:  # a single window exchanges nothing
            return x
        if not torch.compiler.is_compiling():
            x[:, :, 0] = messengers.clone()  # or the assignment could overwrite what it has yet to read
            return x
    return torch.cat([messengers[:, :, None], x[:, :, 1:]], dim=2)


def count_squares(x, side):
    """The squares of ``side`` tokens in all maps x (B, H, W, C).

    Call it before the maps are cut: afterwards the older ONNX exporter would treat the number as a constant.
    """
    height, width = plain_sizes(*x.shape[1:3])
    return x.shape[0] * (height // side) * (width // side)


def split_sides(x, side):
    """Maps (B, H, W, C) to (B, H/side, side, W/side, side, C).

    This is no unflatten, after which the older ONNX exporter would treat B as a constant.
    """
    height, width, channels = plain_sizes(*x.shape[1:])
    return x.reshape(-1, height // side, side, width // side, side, channels)


def image_size(x):
    """Images (B, channels, height, width), their height and their width.

    In ``torch.jit.trace`` shapes are tensors. There the sizes become plain numbers, and the images pass
    through a reshape that refuses images of another size, because the trace does not hold for them.
    """
    height, width = plain_sizes(*x.shape[2:])
    if torch.jit.is_tracing():
        x = x.reshape(x.shape[0], x.shape[1], height, width)
    return x, height, width


def plain_sizes(*sizes):
    """Sizes of a tensor as plain numbers, also in ``torch.jit.trace``, which then holds for them alone."""
    if not torch.jit.is_tracing():
        return sizes
    with unwarned_trace():
        return tuple(map(int, sizes))


@contextlib.contextmanager
def unwarned_trace():
    """Context in which ``torch.jit.trace`` does not warn of what becomes a constant, because it shall."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield
