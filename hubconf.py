"""The six models of the paper, and one trained on CIFAR-10, for torch.hub, from a clone of this repository.

model = torch.hub.load("<folder>", "msg_tiny_p4_win7_224", source="local", checkpoint="<file>")
model = torch.hub.load("<folder>", "msg_cifar10", source="local", pretrained=True)
"""

import timm

import checkpoint as ckpt
import models  # noqa: F401  (registers the names)

dependencies = ["torch", "timm", "safetensors", "numpy"]


def _entry(name):
    def create(checkpoint=None, **arguments):
        """A model that ``timm.create_model`` knows by the same name, see models/timm_names.py.

        Args:
            checkpoint: file or https address of its weights, which are fitted as those of ``--pretrained``.
            arguments: those of ``timm.create_model``, such as ``num_classes``, ``img_size`` and ``in_chans``.
        """
        model = timm.create_model(name, **arguments)
        if checkpoint is not None:
            ckpt.load_weights(model, ckpt.read_weights(checkpoint), checkpoint, new_head=True)
        return model

    return create


globals().update({name: _entry(name) for name in timm.list_models("msg_*")})
