"""Evaluation with weights that stay as they are, so that what depends on them alone is computed once."""

import contextlib
import threading
import weakref

import torch
from torch import nn

from ..tracing import exporting

_LOCK = threading.Lock()
_USED = weakref.WeakKeyDictionary()  # modules in use: by how many contexts, and their mode before the first


class Fixed:
    """What a module computed from weights that stay as they are; copies of the module begin with nothing."""

    def __init__(self):
        self.kept = None

    def __reduce__(self):
        return Fixed, ()

    def keep(self, value, *weights):
        """Keep a value, and the weights that it was computed from."""
        self.kept = value, weights, weights[0].device

    def of(self, *weights):
        """The value if it was computed from these very weights, or None for gradients and exports."""
        kept = self.kept  # read once: another thread may end its context
        if kept is None or torch.is_grad_enabled() or kept[2] != weights[0].device or exporting():
            return None
        return kept[0] if all(a is b for a, b in zip(kept[1], weights)) else None


def are_plain(*weights):
    """Whether weights are ordinary parameters or None: not sharded, quantised, computed or kept elsewhere."""
    return all(w is None or type(w) is nn.Parameter and not w.is_meta for w in weights)


@contextlib.contextmanager
def inference(model, dtype=None):
    """Evaluation without gradients, and the promise that the weights stay as they are inside this context.

    So what depends on them alone is computed once rather than in every call: expanded position biases, linear
    layers packed for the CPU. Weights that are sharded or offloaded are used as they come.

    Contexts may be nested, and threads may share a model. When the last one ends, every module is in training
    or evaluation mode as it was before the first.

    Args:
        dtype: in which it will compute, that of autocast; None for that of the weights. Where several
            contexts share a model, layers are packed for the first one's.
    """
    modules = list(model.modules())
    dtype = dtype or next(model.parameters()).dtype
    with _LOCK:
        for module in modules:
            users, training = _USED.get(module, (0, module.training))
            _USED[module] = users + 1, training
        model.eval()
    try:
        with _LOCK:
            for module in modules:
                if hasattr(module, "fix_weights") and module.fixed.kept is None:
                    module.fix_weights(dtype)
        # What gathers or loads weights cannot reuse the tensors that it makes in inference mode.
        with torch.inference_mode() if are_plain(*model.parameters()) else torch.no_grad():
            yield
    finally:
        with _LOCK:
            for module in modules:
                users, training = _USED.pop(module)
                if users > 1:
                    _USED[module] = users - 1, training
                    continue
                module.training = training
                if hasattr(module, "fix_weights"):
                    module.fixed.kept = None
