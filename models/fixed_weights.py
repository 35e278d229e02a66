"""Evaluation with weights that stay as they are, so that what depends on them alone is computed once."""

import contextlib

import torch


@contextlib.contextmanager
def inference(model, dtype=None):
    """Evaluation without gradients, and the promise that the weights stay as they are inside this context.

    So what depends on them alone is computed once rather than in every call: expanded position biases, linear
    layers packed for the CPU.

    Args:
        dtype: in which it will compute, that of autocast; None for that of the weights.
    """
    modules = [module for module in model.modules() if hasattr(module, "fix_weights")]
    dtype = dtype or next(model.parameters()).dtype
    model.eval()
    try:
        for module in modules:
            module.fix_weights(dtype)
        with torch.inference_mode():
            yield
    finally:
        for module in modules:
            module.fix_weights(None)
