"""Weights that start models of other sizes, against the library's functions, in every way of loading them."""

import argparse

import pytest
import timm
import torch
from helpers import CVPR22, MICRO, ROOT, coco_config, micro
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import nn
from torch.nn.functional import interpolate
from torch.optim.swa_utils import AveragedModel

import checkpoint as ckpt
import hubconf
from checkpoint.resize import fit_weights, resize_table
from detection.backbone import MSGBackbone
from detection.detector import build_detector, load_pretrained
from models.msg_transformer import MSGTransformer
from training.run import Task

NAME = "msg_tiny_p4_win7_224"
SMALL = dict(embed_dim=48, depths=(1, 2, 1, 1))


def create(seed=0, **arguments):
    """A small model under a timm name, with random weights of this seed."""
    torch.manual_seed(seed)
    return timm.create_model(NAME, **{**SMALL, "num_classes": 5, **arguments}).eval()


def rest(weights, *kinds):
    return {name: x for name, x in weights.items() if not any(kind in name for kind in kinds)}


def assert_same(found, expected, *kinds):
    """Tensors by name are equal, apart from those of some kinds."""
    found, expected = rest(found, *kinds), rest(expected, *kinds)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_weights_of_the_same_sizes_return_as_the_same_tensors():
    weights = micro(ape=True).state_dict()
    fitted, changes = fit_weights(weights, MSGTransformer(**MICRO, ape=True))
    assert changes == [] and fitted.keys() == weights.keys()
    assert all(x is weights[name] for name, x in fitted.items())


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_tables_for_other_windows_are_resized_as_timm_does(window):
    weights = micro().state_dict()
    model = MSGTransformer(**dict(MICRO, window_size=window, shuffle_size=(4, 2, 1), img_size=8 * window))
    fitted, changes = fit_weights(weights, model)
    model.load_state_dict(fitted)
    for name, table in weights.items():
        if name.endswith("bias_table"):
            rows = (2 * window - 1) ** 2
            expected = resize_rel_pos_bias_table(table, (window, window), (rows, table.shape[1]))
            assert torch.equal(fitted[name], expected)
    assert_same(fitted, weights, "relative_position")
    size = f"{window}x{window}"
    assert changes == [f"the position biases of 6 blocks are resized from windows of 4x4 to {size}"]


@pytest.mark.parametrize("old, new", [(1, 3), (3, 1), (4, 7), (7, 4), (7, 12)])
def test_resized_biases_keep_their_centre_their_range_and_what_is_constant(old, new):
    table = torch.randn((2 * old - 1) ** 2, 3)
    resized = resize_table(table, new)
    assert torch.equal(resized[len(resized) // 2], table[len(table) // 2])
    assert resized.min() > table.min() - 1e-6 and resized.max() < table.max() + 1e-6  # up to rounding
    torch.testing.assert_close(resize_table(torch.ones_like(table), new), torch.ones_like(resized))


def test_messengers_for_other_regions_are_resampled_bicubically():
    weights = micro().state_dict()
    model = MSGTransformer(**dict(MICRO, shuffle_size=(2, 2, 1)))
    fitted, changes = fit_weights(weights, model)
    grid = weights["msg_tokens"].reshape(1, 4, 4, 48).movedim(3, 1)
    expected = interpolate(grid, (2, 2), mode="bicubic", antialias=True).movedim(1, 3).reshape(1, 4, 1, 48)
    torch.testing.assert_close(fitted["msg_tokens"], expected)
    assert_same(fitted, weights, "msg_tokens")
    assert changes == ["msg_tokens is resampled from regions of 4x4 windows to 2x2"]
    model.load_state_dict(fitted)
    back, _ = fit_weights(model.state_dict(), micro())
    assert back["msg_tokens"].shape == (1, 16, 1, 48)


def test_absolute_positions_for_another_map_are_resampled_as_timm_does():
    weights = micro(ape=True).state_dict()
    model = MSGTransformer(**dict(MICRO, img_size=(48, 20)), ape=True)
    fitted, changes = fit_weights(weights, model)
    name = "absolute_pos_embed"
    expected = resample_abs_pos_embed(weights[name], [24, 10], [16, 16], num_prefix_tokens=0)
    assert torch.equal(fitted[name], expected)
    assert_same(fitted, weights, name)
    assert changes == [f"{name} is resampled from 16x16 patches to 24x10"]


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_the_first_convolution_is_adapted_as_timm_does(channels):
    weights = micro().state_dict()
    fitted, changes = fit_weights(weights, MSGTransformer(**MICRO, in_chans=channels))
    name = "patch_embed.proj.weight"
    assert torch.equal(fitted[name], adapt_input_conv(channels, weights[name]))
    repeated = weights[name][:, [i % 3 for i in range(channels)]] * 3 / channels
    expected = weights[name].sum(1, keepdim=True) if channels == 1 else repeated
    torch.testing.assert_close(fitted[name], expected)
    assert_same(fitted, weights, name)
    assert changes == [f"{name} is adapted from 3 channels to {channels}"]


def test_a_head_for_other_classes_is_the_models_own_and_none_is_left_out():
    weights, model = micro().state_dict(), MSGTransformer(**dict(MICRO, num_classes=7))
    fitted, changes = fit_weights(weights, model)
    assert fitted["head.weight"].equal(model.head.weight) and fitted["head.bias"].equal(model.head.bias)
    assert_same(fitted, weights, "head.")
    assert changes == ["the head is new: the weights have 10 classes, the model 7"]
    fitted, changes = fit_weights(weights, MSGTransformer(**dict(MICRO, num_classes=0)))
    assert_same(fitted, rest(weights, "head."))
    assert changes == ["the head is left out: the model has none"]


def test_relative_positions_that_a_file_lacks_are_computed():
    weights = micro().state_dict()
    fitted, changes = fit_weights(rest(weights, "relative_position_index"), micro())
    assert_same(fitted, weights)
    assert changes == ["the relative positions of 6 blocks are computed, the weights have none"]


DIFFERENT = dict(img_size=(80, 48), window_size=4, in_chans=1, shuffle_size=(2, 2, 2, 1), ape=True)
LINES = [
    "the position biases of 5 blocks are resized from windows of 7x7 to 4x4",
    "absolute_pos_embed is resampled from 56x56 patches to 20x12",
    "msg_tokens is resampled from regions of 4x4 windows to 2x2",
    "patch_embed.proj.weight is adapted from 3 channels to 1",
]


def build(**arguments):
    """The model of :func:`create` with :data:`DIFFERENT`, as configs build it."""
    return MSGTransformer(**dict(SMALL, drop_path_rate=0.0, num_classes=5, **DIFFERENT, **arguments))


def detector_for(model):
    """A detector on a model."""
    detector = build_detector(coco_config(), 3)
    detector.backbone = MSGBackbone(model)
    return detector


def test_every_way_of_loading_gives_the_same_weights(tmp_path, log):
    source = create(ape=True)
    path, bare = str(tmp_path / "source.pth"), str(tmp_path / "bare.safetensors")
    torch.save(dict(model=source.state_dict()), path)
    save_file(rest(source.state_dict(), "relative_position_index"), bare)
    expected, lines = fit_weights(source.state_dict(), create(1, **DIFFERENT))
    assert lines == LINES

    with_config, arguments = build(), dict(SMALL, num_classes=5, **DIFFERENT)
    Task().load_pretrained(with_config, ckpt.read_weights(path), path)
    overlay = dict(file=path, num_classes=5)
    found = [
        with_config,
        create(2, **DIFFERENT, pretrained=True, pretrained_cfg_overlay=overlay),
        create(3, **DIFFERENT, checkpoint_path=path),
        create(4, **DIFFERENT, checkpoint_path=bare),
        torch.hub.load(str(ROOT), NAME, source="local", checkpoint=path, **arguments),
    ]
    detector = detector_for(build())
    load_pretrained(detector, ckpt.read_checkpoint(path), path)
    for model in found:
        assert_same(model.state_dict(), expected)
    found_there = detector.backbone.model.state_dict()
    own = [name for name in expected if name.startswith(("head.", "norm."))]
    assert_same(found_there, {name: x for name, x in expected.items() if name not in own})
    for line in LINES:
        # With pretrained, timm adapts the convolution and says so itself.
        times = len(found) + 1 - ("proj" in line)
        assert sum(message.endswith(line) for message in log) == times, (line, log)


def test_a_detectors_weights_start_one_of_other_windows(log):
    old, new = (detector_for(micro(window_size=window)) for window in (4, 3))
    load_pretrained(new, dict(model=old.state_dict()), "detector.pth")
    expected, _ = fit_weights(old.backbone.model.state_dict(), new.backbone.model)
    assert_same(new.backbone.model.state_dict(), expected)
    assert_same(new.state_dict(), old.state_dict(), "relative_position")
    assert "6 blocks are resized from windows of 4x4 to 3x3" in " ".join(log)


def test_timm_gives_a_model_without_a_head_the_rest_of_a_file_and_no_file_of_other_widths(tmp_path):
    source, path = create(), str(tmp_path / "source.pth")
    torch.save(dict(state_dict=source.state_dict()), path)
    headless = create(1, num_classes=0, checkpoint_path=path)
    assert_same(headless.state_dict(), rest(source.state_dict(), "head."))
    with pytest.raises(RuntimeError, match="size mismatch for layers.0.blocks.0.norm1.weight"):
        timm.create_model(NAME, **dict(SMALL, embed_dim=96), checkpoint_path=path)


def test_files_of_timms_training_give_the_averaged_weights(tmp_path):
    plain, averaged, path = create(), create(1), str(tmp_path / "last.pth.tar")
    wrapped = {f"module.{name}": x for name, x in averaged.state_dict().items()}
    args = argparse.Namespace(model=NAME, lr=0.1)
    torch.save(dict(epoch=3, args=args, state_dict=plain.state_dict(), state_dict_ema=wrapped), path)
    model = create(2)
    ckpt.load_weights(model, ckpt.read_weights(path), path, new_head=True)
    assert_same(model.state_dict(), averaged.state_dict())
    assert_same(create(3, checkpoint_path=path).state_dict(), averaged.state_dict())
    torch.save(dict(plain.state_dict(), **wrapped), path)
    with pytest.raises(ckpt.CheckpointError, match="weights twice"):
        ckpt.read_weights(path)


def in_training_script(model):
    return dict(epoch=3, model_state_dict=model.state_dict(), optimizer_state_dict={})


def in_lightning(model):
    of_module = {f"model.{name}": x for name, x in model.state_dict().items()}
    return dict(state_dict=dict(of_module, **{"criterion.weight": torch.ones(3)}), global_step=5)


def in_average(model):
    return AveragedModel(model).state_dict()


def in_average_of_lightning(model):
    return dict(state_dict=AveragedModel(nn.ModuleDict(dict(net=model))).state_dict())


@pytest.mark.parametrize(
    "wrap, words",
    [
        (in_training_script, "taking its weights from model_state_dict"),
        (in_lightning, "tensors, those of model."),
        (in_average, "its weights are an average of torch's AveragedModel"),
        (in_average_of_lightning, "tensors, those of net."),
    ],
)
def test_weights_in_the_files_of_other_programs_are_read_and_the_log_says_what_was_taken(
    tmp_path, log, wrap, words
):
    source, path = create(), str(tmp_path / "other.pth")
    torch.save(wrap(source), path)
    for new_head in (False, True):
        model = create(1)
        ckpt.load_weights(model, ckpt.read_weights(path), path, new_head)
        assert_same(model.state_dict(), source.state_dict())
    assert words in " ".join(log)


def test_a_backbone_of_mmdet_starts_a_classifier_and_a_detector(tmp_path, log):
    source, path = micro(), str(tmp_path / "mmdet.pth")
    body = rest(source.state_dict(), "head.")
    body = {f"backbone.{name}": x for name, x in body.items() if not name.startswith("norm.")}
    others = {"neck.conv.weight": torch.ones(2), "backbone.norm2.weight": torch.ones(192)}
    torch.save(dict(meta=dict(epoch=12), state_dict=dict(body, **others)), path)
    classifier, detector = MSGTransformer(**MICRO), detector_for(MSGTransformer(**MICRO))
    ckpt.load_weights(classifier, ckpt.read_weights(path), path, new_head=True)
    assert_same(classifier.state_dict(), source.state_dict(), "head.", "norm.bias", "norm.weight")
    assert "the norm is new" in " ".join(log) and "the head is new" in " ".join(log)
    load_pretrained(detector, ckpt.read_weights(path), path)
    for name, x in body.items():
        assert torch.equal(detector.state_dict()[name.replace("backbone.", "backbone.model.")], x), name
    with pytest.raises(ckpt.CheckpointError, match="head.weight is missing"):
        ckpt.load_weights(MSGTransformer(**MICRO), ckpt.read_weights(path), path)


def test_a_file_with_two_models_is_not_chosen_from():
    twins = {
        f"{part}.{name}": x for part in ("student", "teacher") for name, x in micro().state_dict().items()
    }
    with pytest.raises(ckpt.CheckpointError, match="holds two models, student. and teacher."):
        ckpt.load_weights(micro(), twins, "twins.pth")


def test_a_few_names_with_a_prefix_are_no_model():
    few = {f"model.{name}": x for name, x in micro().state_dict().items() if name.startswith("patch_embed.")}
    with pytest.raises(
        ckpt.CheckpointError, match="model.patch_embed.proj.weight is not in the model|missing"
    ):
        ckpt.load_weights(micro(), few, "few.pth")
    assert ckpt.without_prefix(few, micro().state_dict(), "few.pth") is few


@pytest.mark.parametrize("content", [b"", b"x" * 100, (2**40).to_bytes(8, "little") + b"{}"])
def test_damaged_safetensors_files_are_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ckpt.CheckpointError, match="bad.safetensors is damaged or not a checkpoint") as error:
        ckpt.read_weights(str(path))
    assert "\n" not in str(error.value)


def uneven(weights):
    weights["msg_tokens"] = weights["msg_tokens"][:, :15]


def other_index(weights):
    name = "layers.0.blocks.0.attn.relative_position_index"
    weights[name] = weights[name].flip(0)


def headless(weights):
    del weights["head.weight"], weights["head.bias"]


def lost(weights):
    del weights["layers.1.blocks.1.attn.relative_position_bias_table"]


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize(
    "old, new, damage, words",
    [
        (CVPR22, {}, None, "the CVPR 2022 architecture and the config asks for v1"),
        (dict(embed_dim=96), {}, None, "patch_embed.proj.weight is (96, 3, 2, 2), the model's (48, 3, 2, 2)"),
        (dict(ape=True, img_size=(32, 24)), dict(ape=True), None, "absolute_pos_embed is (1, 192, 48)"),
        (dict(in_chans=4), {}, None, "patch_embed.proj.weight is (48, 4, 2, 2), the model's (48, 3, 2, 2)"),
        (dict(patch_size=4), {}, None, "patch_embed.proj.weight is (48, 3, 4, 4)"),
        (dict(num_heads=(6, 6, 12)), {}, None, "bias_table is (49, 6), the model's (49, 3)"),
        (dict(depths=(2, 4, 2)), {}, None, "layers.1.blocks.2"),
        (dict(tokens=False), {}, None, "msg_tokens is missing"),
        (dict(ape=True), {}, None, "absolute_pos_embed is not in the model"),
        ({}, {}, uneven, "msg_tokens is (1, 15, 1, 48), the model's (1, 16, 1, 48)"),
        ({}, dict(window_size=3), other_index, "relative_position_index is (16, 16), the model's (9, 9)"),
        ({}, {}, other_index, "relative_position_index is another table"),
        ({}, {}, headless, "head.weight is missing; head.bias is missing"),
        ({}, {}, lost, "layers.1.blocks.1.attn.relative_position_bias_table is missing"),
    ],
)
def test_other_architectures_are_refused_with_what_differs(old, new, damage, words, new_head):
    weights = MSGTransformer(**{**MICRO, **old}).state_dict()
    if damage:
        damage(weights)
    with pytest.raises(ckpt.CheckpointError) as error:
        ckpt.load_weights(MSGTransformer(**{**MICRO, **new}), weights, "other.pth", new_head)
    assert words in str(error.value) and "other.pth" in str(error.value), error.value


@pytest.mark.parametrize(
    "new, words",
    [
        (dict(window_size=3), ""),
        (dict(shuffle_size=(2, 2, 1)), ""),
        (dict(in_chans=1), ""),
        (dict(num_classes=7), ".*10 classes, the model 7.*--pretrained.*head.weight"),
    ],
)
def test_resuming_and_evaluation_fit_nothing(new, words):
    with pytest.raises(ckpt.CheckpointError, match=f"does not fit the model{words}"):
        ckpt.load_weights(MSGTransformer(**{**MICRO, **new}), dict(model=micro().state_dict()), "other.pth")


def test_resuming_takes_the_runs_own_weights(tmp_path):
    path, weights = str(tmp_path / "run.pth"), micro().state_dict()
    other = {name: x + 1 for name, x in weights.items()}
    torch.save(dict(model=weights, state_dict_ema=other, epoch=0, score=1.0), path)
    assert_same(ckpt.read_run(path)["model"], weights)


def test_the_hub_offers_every_name_and_reads_no_file_by_default():
    offered = {name for name, entry in vars(hubconf).items() if callable(entry) and name[0] != "_"}
    assert offered == set(timm.list_models("msg_*")) and len(offered) == 7
    assert all(getattr(hubconf, name).__doc__ for name in offered)
    torch.manual_seed(0)
    model = torch.hub.load(str(ROOT), NAME, source="local", num_classes=5, **SMALL)
    assert_same(model.state_dict(), create().state_dict())


@pytest.mark.parametrize("name", timm.list_models("msg_*"))
def test_every_name_of_the_hub_is_that_model(name):
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), name, source="local", img_size=96)
    assert model.pretrained_cfg["architecture"] == name and model.img_size == (96, 96)
