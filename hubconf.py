"""The six models of the paper, and one trained on CIFAR-10, for torch.hub, from a clone of this repository.

model = torch.hub.load("<folder>", "msg_tiny_p4_win7_224", source="local", checkpoint="<file>")
model = torch.hub.load("<folder>", "msg_cifar10", source="local", pretrained=True)
"""

import timm

import checkpoint as ckpt
import models  # noqa: F401  (registers the names)

dependencies = ["torch", "timm", "safetensors", "numpy"]


def _create(name, checkpoint, arguments):
    model = timm.create_model(name, **arguments)
    if checkpoint is not None:
        ckpt.load_weights(model, ckpt.read_weights(checkpoint), checkpoint, new_head=True)
    return model


def msg_tiny_p4_win7_224(checkpoint=None, **arguments):
    """MSG-Transformer-T of arXiv v1.

    Args:
        checkpoint: file or https address of its weights, which are fitted as those of ``--pretrained``.
        arguments: those of ``timm.create_model``, such as ``num_classes``, ``img_size`` and ``in_chans``.
    """
    return _create("msg_tiny_p4_win7_224", checkpoint, arguments)


def msg_small_p4_win7_224(checkpoint=None, **arguments):
    """MSG-Transformer-S of arXiv v1; arguments as for T."""
    return _create("msg_small_p4_win7_224", checkpoint, arguments)


def msg_base_p4_win7_224(checkpoint=None, **arguments):
    """MSG-Transformer-B of arXiv v1; arguments as for T."""
    return _create("msg_base_p4_win7_224", checkpoint, arguments)


def msg_cvpr22_tiny_p4_win7_224(checkpoint=None, **arguments):
    """MSG-Transformer-T of CVPR 2022; arguments as for T of v1."""
    return _create("msg_cvpr22_tiny_p4_win7_224", checkpoint, arguments)


def msg_cvpr22_small_p4_win7_224(checkpoint=None, **arguments):
    """MSG-Transformer-S of CVPR 2022; arguments as for T of v1."""
    return _create("msg_cvpr22_small_p4_win7_224", checkpoint, arguments)


def msg_cvpr22_base_p4_win7_224(checkpoint=None, **arguments):
    """MSG-Transformer-B of CVPR 2022; arguments as for T of v1."""
    return _create("msg_cvpr22_base_p4_win7_224", checkpoint, arguments)


def msg_cifar10(checkpoint=None, **arguments):
    """The small model of configs/cifar10_small.yaml; arguments as for T of v1, and ``pretrained``."""
    return _create("msg_cifar10", checkpoint, arguments)
