"""What timm's own tests ask of a hierarchical transformer: of T, S and B in `make test-slow`.

Each ``check_`` takes a name that ``timm.create_model`` knows. Exports have tests of their own.
"""

import math

import pytest
import timm
import torch
from timm.layers import get_channel_dim, get_spatial_dim
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import models  # noqa: F401  (registers the names)

SIDE = 96  # pixels; only what timm checks at the default size is checked at that


def images(count=1, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def create(name, **arguments):
    return timm.create_model(name, **arguments).eval()


def classes_and_side(name):
    """Number of classes, and side in pixels of the images that the model is for."""
    return (10, 32) if name == "msg_cifar10" else (1000, 224)


def check_config(name):
    """The default config names a first convolution and a classifier that exist, and the sizes that are."""
    model, (classes, side) = create(name), classes_and_side(name)
    config, weights = model.default_cfg, model.state_dict()
    assert weights[config["first_conv"] + ".weight"].shape[1] == config["input_size"][0]
    assert weights[config["classifier"] + ".weight"].shape == (config["num_classes"], model.num_features)
    assert config["fixed_input_size"] is False and config["input_size"] == (3, side, side)
    assert model.img_size == (side, side)
    assert model.num_classes == classes and model.in_chans == 3


def check_hierarchical(name):
    """With patches averaged, features are a map of ``pool_size``, pooled or not as timm asks."""
    model = create(name, global_pool="avg")
    rows, columns = get_spatial_dim(model.output_fmt)
    channels, pool_size = get_channel_dim(model.output_fmt), model.default_cfg["pool_size"]
    x = images(side=classes_and_side(name)[1])
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert (features.shape[rows], features.shape[columns]) == pool_size
        assert features.shape[channels] == model.num_features
        assert pooled.shape == (1, model.head_hidden_size)
        torch.testing.assert_close(pooled, features.mean((rows, columns)))
        model.reset_classifier(0)
        assert model.num_classes == 0
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), features)
        unpooled = create(name, num_classes=0, global_pool="")
        assert unpooled(x).shape == features.shape


def check_messengers(name):
    """With messengers read, features are tokens, the first of which the head reads."""
    model = create(name)
    x, reduction = images(), model.feature_info[-1]["reduction"]
    with torch.no_grad():
        features = model.forward_features(x)
        tokens = 1 + (SIDE // reduction) ** 2
        assert model.output_fmt == "NLC" and features.shape == (1, tokens, model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(pooled, features[:, 0])
        torch.testing.assert_close(model.forward_head(features), model(x), rtol=1e-4, atol=1e-5)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled, rtol=1e-4, atol=1e-5)
        assert create(name, num_classes=0)(x).shape == pooled.shape


def assert_maps(maps, info, output_fmt="NCHW"):
    """Maps have the channels and reductions that the model promises."""
    rows, columns = get_spatial_dim(output_fmt)
    assert len(maps) == len(info.channels()) >= 3
    for x, channels, reduction in zip(maps, info.channels(), info.reduction()):
        assert x.shape[get_channel_dim(output_fmt)] == channels and x.isfinite().all()
        assert x.shape[rows] == x.shape[columns] == math.ceil(SIDE / reduction)


def check_features(name):
    """``features_only`` gives a map of each stage, in either format, named or by default."""
    for arguments in ({}, dict(feature_cls="getter", feature_cfg=dict(output_fmt="NHWC"))):
        model = create(name, features_only=True, **arguments)
        maps, output_fmt = model(images()), model.output_fmt.value
        assert_maps(maps, model.feature_info, output_fmt)
        own = model.model.forward_intermediates(images(), output_fmt=output_fmt, intermediates_only=True)
        torch.testing.assert_close(maps, own)


def check_intermediates(name):
    """``forward_intermediates`` gives these maps in all formats, and what ``forward_features`` gives."""
    model = create(name)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    found, maps = model.forward_intermediates(images())
    assert_maps(maps, info)
    torch.testing.assert_close(found, model.forward_features(images()))
    for output_fmt in ("NHWC", "NLC"):
        for x, y in zip(maps, model.forward_intermediates(images(), output_fmt=output_fmt)[1]):
            y = y.movedim(-1, 1).reshape(x.shape)
            torch.testing.assert_close(x, y)
    as_dict = model.forward_intermediates(images(), output_dict=True, return_prefix_tokens=True)
    torch.testing.assert_close(as_dict["image_intermediates"], maps)
    torch.testing.assert_close(as_dict["image_features"], found)
    for found_messengers, (_, y) in zip(
        as_dict["image_intermediates_prefix"], model.forward_stages(images()), strict=True
    ):
        torch.testing.assert_close(found_messengers, y.flatten(1, 2))
    *others, last = model.forward_intermediates(images(), norm=True, intermediates_only=True)
    torch.testing.assert_close(found[:, 1:], last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(others, maps[:-1], rtol=0, atol=0)
    for indices, chosen in (
        (1, maps[-1:]),
        (2, maps[-2:]),
        ([0, -1], [maps[0], maps[-1]]),
        ([-2], [maps[-2]]),
    ):
        some = model.forward_intermediates(images(), indices, intermediates_only=True)
        torch.testing.assert_close(some, chosen, rtol=0, atol=0)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(images())[0], found, rtol=1e-4, atol=1e-5)


def graph_of(model):
    """The model as a graph of torch.fx up to its logits, as timm's tests make it, for training and not."""
    trace = dict(
        leaf_modules=get_notrace_modules(),
        autowrap_functions=get_notrace_functions(),
        param_shapes_constant=True,
    )
    training, evaluation = get_graph_node_names(model, tracer_kwargs=trace)
    return create_feature_extractor(
        model,
        train_return_nodes=[training[-1]],
        eval_return_nodes=[evaluation[-1]],
        tracer_kwargs=trace,
    )


def check_fx_forward(name):
    """The graph of torch.fx gives the same bits, at sizes that it has not seen."""
    for global_pool in ("token", "avg"):
        model = create(name, global_pool=global_pool)
        graph = graph_of(model).eval()
        with torch.inference_mode():
            for side in (SIDE, 60):
                (found,) = graph(images(side=side)).values()
                assert torch.equal(found, model(images(side=side)))


NAMES = [
    pytest.param(name, marks=[] if name == "msg_cifar10" else pytest.mark.slow)
    for name in timm.list_models("msg_*")
]
CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_timm_suite(check, name):
    check(name)
