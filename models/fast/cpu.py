"""What makes a model fast on x86 CPUs: oneDNN's linear layers, MLPs by blocks, and our own fused blocks."""

from timm.layers import Mlp
from torch import nn

from ..msg_transformer import Block
from .choices import chosen
from .fused_block import use_fused_block
from .linear import use_onednn_layer
from .mlp import use_blocked_mlp


def use_onednn(model):
    """Let all linear layers of a model, and the exact GELU of timm's Mlps, run through oneDNN.

    Blocks of ours may be computed in two passes during inference. On processors for which ``choices.py``
    leaves all of it to PyTorch, nothing changes.

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
        elif type(module) is Block:
            use_fused_block(module)
