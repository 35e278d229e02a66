"""timm.create_model of the six names: every argument does what it says, or is refused."""

import copy

import pytest
import timm
import timm.optim
import torch
from helpers import micro
from test_sizes import loop_logits
from timm.layers import (
    RmsNorm,
    gen_relative_position_index,
    resample_abs_pos_embed,
    resize_rel_pos_bias_table,
)
from torch import nn

import models  # noqa: F401  (registers the names)
from models.macs import classifier_macs

NAME = "msg_tiny_p4_win7_224"
SMALL = dict(embed_dim=48, depths=(1, 1, 1, 1))


def create(name=NAME, **arguments):
    return timm.create_model(name, **dict(SMALL, num_classes=5, **arguments)).eval()


@pytest.mark.parametrize(
    "size, window", [(96, 7), ((64, 224), 7), (256, 8), (384, 12), (448, 14), (224, 14), (28, 7), (96, 3)]
)
def test_shuffle_regions_are_those_of_training_whatever_the_size(size, window):
    model = create(img_size=size, window_size=window)
    assert [stage.shuffle_size for stage in model.layers] == model.shuffle_size == [4, 4, 2, 1]
    assert [stage.window_size for stage in model.layers] == [window] * 4
    assert model.img_size == (size if isinstance(size, tuple) else (size, size))
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == (2 * window - 1) ** 2


def test_a_model_for_another_size_computes_what_the_model_for_224_computes():
    whole, small = create(), create(img_size=(96, 120))
    small.load_state_dict(whole.state_dict())
    x = torch.randn(2, 3, 96, 120)
    with torch.no_grad():
        assert torch.equal(small(x), whole(x))
    assert small.flops() == classifier_macs(small) < whole.flops()


def test_set_input_size_resamples_positions_and_biases_as_timm_does():
    model = micro(img_size=(32, 24), ape=True)
    before, regions = copy.deepcopy(model), list(model.shuffle_size)
    model.layers[0].blocks[0].attn.relative_position_bias_table.requires_grad_(False)
    model.set_input_size((48, 20), window_size=3)
    positions = resample_abs_pos_embed(before.absolute_pos_embed, [24, 10], [16, 12], num_prefix_tokens=0)
    assert torch.equal(model.absolute_pos_embed, positions)
    assert (model.img_size, model.grid_size, model.shuffle_size) == ((48, 20), (24, 10), regions)
    for stage, old in zip(model.layers, before.layers):
        assert (stage.window_size, stage.shuffle_size) == (3, old.shuffle_size)
        for block, old_block in zip(stage.blocks, old.blocks):
            table = old_block.attn.relative_position_bias_table
            resized = resize_rel_pos_bias_table(table, (3, 3), (25, table.shape[1]))
            assert torch.equal(block.attn.relative_position_bias_table, resized)
            index = gen_relative_position_index((3, 3))
            assert torch.equal(block.attn.relative_position_index, index)
            assert "relative_position_index" in dict(block.attn.named_buffers())
    trains = [p.requires_grad for p in model.parameters()]
    assert trains.count(False) == 1 and len(trains) == len(list(before.parameters()))


def test_a_model_with_other_windows_computes_what_a_loop_over_them_computes():
    model = micro(ape=True).double()
    x = torch.randn(2, 3, 37, 26, dtype=torch.float64)
    with torch.no_grad():
        model(x)  # keeps layouts of the old windows
        model.set_input_size(40, window_size=3)
        expected = torch.stack([loop_logits(model, image) for image in x])
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_set_input_size_without_a_difference_changes_nothing():
    model = create(ape=True)
    parameters = list(model.parameters())
    model.set_input_size()
    model.set_input_size(224, window_size=7)
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(img_size=3, window_size=5), "3x3 pixels are smaller than a patch of 4x4"),
        (dict(img_size=(64, 64, 3), window_size=5), "give one side or"),
        (dict(img_size=64, window_size=(7, 7)), "windows are square"),
        (dict(img_size=64, window_size=0), "windows are square"),
    ],
)
def test_an_impossible_size_is_refused_and_nothing_has_changed(arguments, words):
    model = create(ape=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        model.set_input_size(**arguments)
    assert (model.img_size, model.grid_size) == ((224, 224), (56, 56))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match=words):
        create(**arguments)


def test_timm_builds_a_resized_model_again_from_what_it_records():
    pytest.importorskip("timm.models._input", reason="this version of timm records nothing")
    model = create(in_chans=1)
    model.set_input_size((96, 64), window_size=4)
    again = timm.create_model(NAME, **model._model_args)
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 1, 96, 64)
    assert torch.equal(again.eval()(x), model(x))
    assert again.img_size == (96, 64) and again.in_chans == 1


def test_rates_go_where_timm_says():
    model = create(
        drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4, depths=(1, 1, 1, 2)
    )
    block = model.layers[3].blocks[1]
    assert model.pos_drop.p == 0.1
    assert (block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.2, 0.2, 0.2)
    assert block.attn.attn_drop_rate == 0.3 and block.drop_path.drop_prob == 0.4
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert not torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("norm_layer", ["rmsnorm", RmsNorm])
def test_norms_are_chosen_by_timms_name_or_class(norm_layer):
    model = create(norm_layer=norm_layer)
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, RmsNorm))]
    assert len(norms) == 1 + 4 * 2 + 3 + 1 and all(type(norm) is RmsNorm for norm in norms)
    assert model(torch.randn(1, 3, 96, 96)).isfinite().all()


@pytest.mark.parametrize("norm_layer", ["batchnorm2d", "layernorm2d", "groupnorm1", "none_such"])
def test_norms_over_other_dimensions_are_refused(norm_layer):
    with pytest.raises(ValueError, match=f"norm_layer '{norm_layer}': give a norm over the last dimension"):
        create(norm_layer=norm_layer)


def test_device_and_dtype_are_those_of_every_parameter():
    model = create(dtype=torch.bfloat16, img_size=96, ape=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(1, 3, 96, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.device.type for p in create(device="meta", img_size=96, ape=True).parameters()} == {"meta"}


@pytest.mark.parametrize(
    "arguments, strict",
    [
        ({}, False),
        (dict(strict_img_size=True), True),
        (dict(dynamic_img_size=True), False),
        (dict(dynamic_img_size=False, strict_img_size=True), True),
        (dict(dynamic_img_size=True, strict_img_size=False), False),
    ],
)
def test_other_sizes_are_taken_unless_that_is_refused(arguments, strict):
    model = create(img_size=(64, 96), **arguments)
    assert model._traits["fixed_input_size"] is strict
    assert model.pretrained_cfg["fixed_input_size"] is False and model.pretrained_cfg["pool_size"] == (7, 7)
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 5)
    if strict:
        with pytest.raises(ValueError, match="takes 64x96 images, these are 64x64"):
            model(torch.zeros(1, 3, 64, 64))
        model.set_input_size(64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_strict_and_dynamic_sizes_contradict_each_other():
    with pytest.raises(ValueError, match="contradict each other"):
        create(strict_img_size=True, dynamic_img_size=True)


@pytest.mark.parametrize("arguments", [dict(feature_cls="hook"), dict(feature_cfg=dict(feature_cls="fx"))])
def test_ways_of_taking_features_that_would_give_pairs_are_refused(arguments):
    with pytest.raises(ValueError, match="feature_cls '(hook|fx)': stages give pairs"):
        create(features_only=True, **arguments)
