"""The names under which ``timm.create_model`` knows the six models of the paper, and one trained on CIFAR-10.

All take any arguments of MSGTransformer, and timm's ``device``, ``dtype``, ``dynamic_img_size``, and
``norm_layer`` by name. Shuffle regions are those of training, for the six 224 px and windows of 7x7, whatever
``img_size`` and ``window_size``. ``msg_cifar10`` alone has weights, in a file of this repository.

Whatever weights these models load, by ``pretrained``, ``checkpoint_path`` or ``load_state_dict``, may be of
other sizes: see checkpoint/resize.py. With ``pretrained``, timm adapts the first convolution and renews
the head; those of ``msg_cifar10`` are loaded as those of ``--pretrained`` are.
"""

import contextlib
from pathlib import Path

import torch
from timm.layers import get_norm_layer
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import nn

from checkpoint.resize import fit_on_load

from .geometry import fit_regions, known_window, require_size
from .msg_transformer import MSGTransformer, PatchEmbed, PatchMerging, Stage
from .padding import pad_to_patches, resample_positions

# torch.fx runs the model with stand-ins for tensors, which have no sizes. What depends on sizes is a single
# step of its graph.
for module in (PatchEmbed, Stage, PatchMerging):
    register_notrace_module(module)
for function in (pad_to_patches, resample_positions, require_size):
    register_notrace_function(function)

_UNTRAINED = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    fixed_input_size=False,
    pool_size=(7, 7),
    interpolation="bicubic",
    crop_pct=224 / 256,
    first_conv="patch_embed.proj",
    classifier="head",
)
_CIFAR10 = dict(
    _UNTRAINED,
    file=str(Path(__file__).parents[1] / "weights" / "msg_cifar10" / "msg_cifar10.safetensors"),
    custom_load=True,  # by TimmInterface.load_pretrained
    num_classes=10,
    label_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    input_size=(3, 32, 32),
    pool_size=(4, 4),
    crop_pct=1.0,
    crop_mode="squash",
    license="apache-2.0",
    description="trained on CIFAR-10, see weights/msg_cifar10/README.md",
)
_CVPR22 = dict(patch_embed="conv", downsample="conv")
# Arguments where they differ from MSGTransformer's defaults, and the depths of all.
_ARGUMENTS = {
    "msg_tiny_p4_win7_224": dict(depths=(2, 2, 6, 2), drop_path_rate=0.2),
    "msg_small_p4_win7_224": dict(depths=(2, 2, 18, 2), drop_path_rate=0.3),
    "msg_base_p4_win7_224": dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5
    ),
    "msg_cvpr22_tiny_p4_win7_224": dict(
        _CVPR22, embed_dim=64, depths=(2, 4, 12, 4), num_heads=(2, 4, 8, 16), drop_path_rate=0.1
    ),
    "msg_cvpr22_small_p4_win7_224": dict(_CVPR22, depths=(2, 4, 12, 4), drop_path_rate=0.3),
    "msg_cvpr22_base_p4_win7_224": dict(_CVPR22, depths=(2, 4, 28, 4), drop_path_rate=0.5),
    "msg_cifar10": dict(
        img_size=32,
        patch_size=2,
        embed_dim=32,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        window_size=4,
        shuffle_size=(4, 2, 1),
        drop_path_rate=0.0,
    ),
}
default_cfgs = generate_default_cfgs(dict.fromkeys(_ARGUMENTS, _UNTRAINED) | {"msg_cifar10": _CIFAR10})


def _register(name, defaults):
    """The function that creates a model, which timm knows by its name."""

    def create(pretrained=False, **kwargs):
        stages = tuple(range(len(defaults["depths"])))
        features = dict(out_indices=stages, feature_cls="getter") | kwargs.pop("feature_cfg", {})
        feature_cls = kwargs.get("feature_cls", features["feature_cls"])
        if feature_cls != "getter":
            raise ValueError(
                f"feature_cls {feature_cls!r}: stages give pairs of patches and messengers, from which only "
                "the default, getter, makes maps"
            )
        return build_model_with_cfg(_build, name, pretrained, feature_cfg=features, **(defaults | kwargs))

    create.__name__ = name
    return register_model(create)


def _build(
    window_size=7,
    norm_layer=nn.LayerNorm,
    shuffle_size=(4, 4, 2, 1),
    strict_img_size=None,
    dynamic_img_size=None,
    device=None,
    dtype=None,
    **arguments,
):
    """MSGTransformer of timm's arguments; raises a ValueError for what cannot be built.

    Args:
        norm_layer: class, or a name that timm knows, of norms over the last dimension.
        shuffle_size: fitted to the images of training, whatever the size of these.
        dynamic_img_size: the opposite of ``strict_img_size``, or None.
    """
    if dynamic_img_size and strict_img_size:
        raise ValueError("dynamic_img_size and strict_img_size contradict each other: give one of them")
    # Images of training have as many windows as there are at 224 px with windows of 7x7.
    training = dict(img_size=32 * known_window(window_size), window_size=window_size)
    training.update({name: arguments[name] for name in ("patch_size", "embed_dim") if name in arguments})
    exchange = arguments.get("tokens", True) and arguments.get("manip_type") != "none"
    arguments.update(
        window_size=window_size,
        norm_layer=_known_norm(norm_layer),
        shuffle_size=fit_regions(shuffle_size, **training, exchange=exchange),
        strict_img_size=bool(strict_img_size),
    )
    with torch.device(device) if device is not None else contextlib.nullcontext():
        model = MSGTransformer(**arguments)
    model.set_input_size()  # which tells timm of the sizes
    model._traits["fixed_input_size"] = model.strict_img_size
    # timm's checkpoint_path knows no filter.
    model.register_load_state_dict_pre_hook(fit_on_load)
    return model.to(dtype=dtype)


def _known_norm(norm_layer):
    """The class of a norm, tried on tokens (..., C)."""
    try:
        norm = get_norm_layer(norm_layer)
        with torch.device("cpu"), torch.no_grad():
            norm(6)(torch.zeros(1, 2, 3, 6))
    except Exception as error:
        raise ValueError(
            f"norm_layer {norm_layer!r}: give a norm over the last dimension, such as layernorm or rmsnorm"
        ) from error
    return norm


for name, defaults in _ARGUMENTS.items():
    globals()[name] = _register(name, defaults)
