"""What leaves the project as a trace, an exported program, an ONNX file or a quantised model computes the
same.

It may have been made from two images, and takes any number of them.
"""

import copy
import io
import itertools
import warnings
from contextlib import nullcontext

import onnxruntime
import pytest
import timm
import torch
from helpers import CVPR22, MICRO, digits_config, fill_weights, micro
from timm.layers import Mlp
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from models import build_model, inference, use_onednn
from models.fast.attention import BACKENDS

# A shuffle region of four windows, then one window.
SMALL = dict(img_size=16, depths=(2, 1), num_heads=(2, 4), shuffle_size=(2, 1))
SIZES = {**MICRO, **SMALL}
FAMILIES = dict(v1={}, cvpr22=CVPR22)


def small(attention="auto", **changes):
    """A small model with the layers of build_model, on any attention setting: some need a GPU to be built."""
    model = micro(**dict(SMALL, **changes))
    use_onednn(model)
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.backend = attention
    return model


def images(count, size=16):
    """Some images."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def save_trace(model, x):
    """A saved trace and how to load it; where PyTorch warns that a number is baked in, that is an error."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.save(torch.jit.trace(model, x, strict=False, check_trace=False), file)
    return file, torch.jit.load


def save_program(model, x, strict=False):
    """A saved exported program and how to load it."""
    file, count = io.BytesIO(), torch.export.Dim("count")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: count},), strict=strict)
    torch.export.save(program, file)
    return file, lambda file: torch.export.load(file).module()


def save_strict_program(model, x):
    """The same through TorchDynamo."""
    return save_program(model, x, strict=True)


def load_onnx(file):
    """ONNX Runtime's session of a file, as a function of tensors."""
    session = onnxruntime.InferenceSession(file.getvalue())
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def save_onnx(model, x):
    """An ONNX file by the exporter that is built on torch.export, and how to load it."""
    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamic_shapes=({0: "count"},), dynamo=True, verbose=False).save(file)
    return file, load_onnx


def save_legacy_onnx(model, x):
    """An ONNX file by the exporter that is built on traces, and how to load it."""
    file = io.BytesIO()
    names = dict(input_names=["x"], dynamic_axes={"x": {0: "count"}})
    torch.onnx.export(model, (x,), file, dynamo=False, **names)
    return file, load_onnx


SAVES = [save_trace, save_program, save_onnx, save_legacy_onnx]


def assert_saved_model_is_right(save, model, plain, when="fresh", size=16):
    """What ``save`` makes of a model, from two images, equals the plain model for other numbers of images."""
    if when == "after":
        with inference(model):
            pass
    with inference(model) if when == "inside" else nullcontext():
        before = plain(images(2, size))  # keeps layouts, which belong to this call alone
        file, load = save(model, images(2, size))
        torch.testing.assert_close(plain(images(2, size)), before, rtol=0, atol=0)
    file.seek(0)
    loaded = load(file)
    for count in (1, 2, 5):
        with torch.no_grad():
            found, expected = loaded(images(count, size)), plain(images(count, size))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize(
    "save, family, attention, when, size",
    [
        (save_trace, "v1", "auto", "fresh", 16),
        (save_trace, "v1", "auto", "fresh", 18),  # windows reach over the edge
        (save_trace, "cvpr22", "blocked", "inside", 16),
        (save_trace, "v1", "triton", "after", 16),
        (save_program, "cvpr22", "triton", "inside", 16),
        pytest.param(save_program, "v1", "auto", "fresh", 18, marks=pytest.mark.slow),
        pytest.param(save_strict_program, "cvpr22", "auto", "inside", 16, marks=pytest.mark.slow),
        (save_legacy_onnx, "v1", "auto", "fresh", 16),
        (save_legacy_onnx, "v1", "auto", "fresh", 18),
        (save_legacy_onnx, "cvpr22", "sdpa", "inside", 16),
    ],
)
def test_saved_models_compute_the_same_for_any_number_of_images(save, family, attention, when, size):
    changes = FAMILIES[family]
    assert_saved_model_is_right(save, small(attention, **changes), micro(**SMALL, **changes), when, size)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["fresh", "inside", "after"])
@pytest.mark.parametrize("save", SAVES)
def test_saved_models_compute_the_same_in_every_combination(save, when):
    others = [dict(ape=True), dict(tokens=False), *(dict(manip_type=t) for t in ("mean", "shift", "none"))]
    others = [("auto", changes) for changes in others]
    for attention, changes in [*itertools.product(BACKENDS, FAMILIES.values()), *others]:
        assert_saved_model_is_right(save, small(attention, **changes), micro(**SMALL, **changes), when)


@pytest.mark.parametrize("save", [save_trace, pytest.param(save_program, marks=pytest.mark.slow)])
def test_feature_maps_are_saved_as_they_are_computed(save):
    model = timm.create_model("msg_cvpr22_tiny_p4_win7_224", features_only=True, out_indices=(0, 1), **SIZES)
    assert_saved_model_is_right(save, model.eval(), copy.deepcopy(model))


def test_a_trace_refuses_images_of_another_size():
    """Regions of a larger image would pass for more images."""
    trace = torch.jit.trace(small(), images(2))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        trace(images(1, 32))


def test_a_trace_of_fixed_weights_follows_new_weights():
    with inference(model := small()):
        trace = torch.jit.trace(model, images(2))
    changed = {
        name: -1.5 * value if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    for each in (model, trace):
        each.load_state_dict(changed)
    torch.testing.assert_close(trace(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)


def test_scripting_is_refused_in_one_sentence():
    with pytest.raises(NotImplementedError, match="^the model cannot be scripted: use torch.jit.trace"):
        torch.jit.script(nn.Sequential(small()))


@pytest.mark.parametrize("training", [False, True])
def test_counters_of_operations_see_all_of_them(training):
    counts = []
    for model in (micro(**SMALL), small()):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            logits = model(images(2))
            if training:
                logits.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def build_digits():
    """A model of build_model with weights of the usual size."""
    return fill_weights(build_model(digits_config())).eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation_reaches_every_linear_layer():
    model = build_digits()
    x = images(16, model.img_size[0])
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    count = sum(isinstance(layer, torch.ao.nn.quantized.dynamic.Linear) for layer in quantised.modules())
    assert count == sum(isinstance(layer, nn.Linear) for layer in model.modules()) > 0
    with torch.no_grad():
        expected = model(x)
        found = quantised(x)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.1, error
    with inference(quantised):
        assert torch.equal(quantised(x), found)


@pytest.mark.filterwarnings("ignore")
def test_torchao_quantises_every_linear_layer():
    quantization = pytest.importorskip("torchao.quantization")
    model = build_digits()
    x = images(16, model.img_size[0])
    with inference(model):
        expected = model(x)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert not any(type(layer.weight) is nn.Parameter for layer in layers)
    with inference(model):
        found = model(x)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.1, error
    torch.testing.assert_close(model(x), found, rtol=1e-4, atol=1e-4)


def quantise_fc1(mlp):
    """Only the layer before the GELU."""
    torch.ao.quantization.quantize_dynamic(
        mlp, {"fc1": torch.ao.quantization.default_dynamic_qconfig}, inplace=True
    )


def hook(name):
    """A hook on one part of an Mlp, which doubles its result."""
    return lambda mlp: mlp.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)


def replace(name, module):
    """Another module in the place of a part."""
    return lambda mlp: mlp.set_submodule(name, module())


def patch_fc1(mlp):
    """Another forward for one layer."""
    forward = mlp.fc1.forward
    mlp.fc1.forward = lambda x: 3 * forward(x)


CHANGES = dict(
    quantised=quantise_fc1,
    pruned=lambda mlp: prune.random_unstructured(mlp.fc2, "weight", 0.5),
    normed=lambda mlp: nn.utils.parametrizations.spectral_norm(mlp.fc1.eval()),
    hooked_fc1=hook("fc1"),
    hooked_act=hook("act"),
    hooked_norm=hook("norm"),
    other_act=replace("act", nn.ReLU),
    tanh_act=replace("act", lambda: nn.GELU("tanh")),
    other_drop=replace("drop1", nn.Tanh),
    patched=patch_fc1,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_to_a_part_of_an_mlp_is_gone_past(change):
    plain = fill_weights(Mlp(8, 24))
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    for mlp in (plain, fast):
        torch.manual_seed(0)
        CHANGES[change](mlp.eval())
    use_onednn(fast)  # tools call it for any model, whoever built it
    x = images(4, 8)
    expected = plain(x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    with inference(fast):
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


def test_hooks_for_all_modules_see_every_part():
    fast, seen = fill_weights(Mlp(8, 24)), []
    use_onednn(fast)
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        fast(images(4, 8))
        handle.remove()
    assert seen == [fast.fc1, fast.act, fast.drop1, fast.norm, fast.fc2, fast.drop2, fast]
