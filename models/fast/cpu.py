"""What makes a model fast on x86 CPUs, whoever built it: oneDNN's linear layers, and MLPs by blocks."""

from timm.layers import Mlp
from torch import nn

from .choices import chosen
from .linear import use_onednn_layer
from .mlp import use_blocked_mlp


def use_onednn(model):
    """Let all linear layers of a model, and the exact GELU of timm's Mlps, run through oneDNN.

    On processors for which ``choices.py`` leaves them to PyTorch, nothing changes.

    Classes, parameters, their names and the results stay as they are, except for rounding. A module only gets
    a ``forward`` of its own, which leaves everything to PyTorch outside the CPU, in exports, and where a
    weight is quantised or computed from other parameters.
    """
    if chosen().linear == "pytorch":
        return
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear:
            use_onednn_layer(module)
        elif type(module) is Mlp:
            use_blocked_mlp(module)
