"""NVIDIA's apex, where it is installed: what runs faster with its kernels than with PyTorch's."""

import importlib

import torch
from torch import nn


def find_apex(path, on_gpu):
    """A class of NVIDIA's apex.

    The package of that name on PyPI is another project; docs/training.md says how to build the right one.

    Args:
        path: within apex, such as ``optimizers.FusedAdam``.
        on_gpu: whether it would compute on a CUDA GPU; apex does nothing faster elsewhere.

    Returns:
        The class and "", or None and why not.
    """
    if not on_gpu:
        return None, "apex is for CUDA GPUs"
    module, name = path.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(f"apex.{module}"), name), ""
    # A package of another project, or one built for another PyTorch, can raise anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return None, f"NVIDIA's apex is not installed ({reason})"


def choose_layer_norm(config):
    """The class of the norms, and a line for the log, empty where the config does not ask for apex's.

    apex's FusedLayerNorm has the parameters of PyTorch's, so that checkpoints fit either.
    """
    if not config.AMP.FUSED_LAYERNORM:
        return nn.LayerNorm, ""
    on_gpu = config.DEVICE in ("", "cuda") and torch.cuda.is_available()
    norm, problem = find_apex("normalization.FusedLayerNorm", on_gpu)
    if norm is not None:
        try:
            norm(1)
        except (ImportError, RuntimeError) as error:
            norm, problem = None, f"apex was built without its CUDA kernels ({error})"
    if norm is None:
        return nn.LayerNorm, f"AMP.FUSED_LAYERNORM: PyTorch's LayerNorm, because {problem}"
    return norm, "AMP.FUSED_LAYERNORM: apex's FusedLayerNorm"
