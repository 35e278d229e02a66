"""The model against the reference numbers and against a second implementation from the formulas."""

import itertools

import pytest
import timm
import torch
from helpers import (
    CVPR22,
    CVPR22_TINY,
    MICRO,
    ROOT,
    config_of_file,
    digits_config,
    fill_weights,
    golden_images,
    loop_exchange,
    micro,
    reference,
)
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import build_model
from models.exchange import OTHER_EXCHANGES
from models.geometry import BlockOptions
from models.msg_transformer import (
    Block,
    MSGTransformer,
    shuffle_messengers,
)
from models.tracing import replace_messengers

SIZES = [  # name, parameters, GMACs and drop path of the specification
    ("msg_tiny_p4_win7_224", 28_290_166, 4.589, 0.2),
    ("msg_small_p4_win7_224", 49_608_358, 8.929, 0.3),
    ("msg_base_p4_win7_224", 87_771_024, 15.759, 0.5),
    ("msg_cvpr22_tiny_p4_win7_224", 25_086_116, 3.825, 0.1),
    ("msg_cvpr22_small_p4_win7_224", 55_968_514, 8.465, 0.3),
    ("msg_cvpr22_base_p4_win7_224", 84_392_770, 14.252, 0.5),
]


@pytest.mark.parametrize("name, parameters, gmacs, drop_path", SIZES)
def test_sizes_and_drop_path_are_those_of_the_specification(name, parameters, gmacs, drop_path):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(model.flops() / 1e9, 3) == gmacs
    assert model.layers[-1].blocks[-1].drop_path.drop_prob == drop_path
    path = ROOT / "configs" / ("cvpr22" if "cvpr22" in name else "") / f"{name.replace('cvpr22_', '')}.yaml"
    config = config_of_file(path)
    assert name == config.MODEL.NAME and drop_path == config.MODEL.DROP_PATH_RATE


@pytest.mark.parametrize("name", ["msg_tiny_p4_win7_224", "micro_32"])
def test_golden_numbers_are_reproduced(name):
    golden = reference("golden.json")[name]
    model = MSGTransformer(drop_path_rate=0.0, **golden.get("kwargs", {})).double().eval()
    logits = fill_weights(model)(golden_images(model.img_size[0]))
    expected = torch.tensor(golden["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits[:, :8], expected, rtol=1e-9, atol=1e-10)  # 10 decimals are given
    assert logits.sum().item() == pytest.approx(golden["logits_sum"], rel=1e-9)
    assert logits.square().sum().item() == pytest.approx(golden["logits_sqsum"], rel=1e-9)
    assert model.flops() == golden["gmacs"] * 1e9
    if "grad_norms" in golden:
        loss = cross_entropy(logits, torch.arange(2))
        loss.backward()
        assert loss.item() == pytest.approx(golden["loss"], rel=1e-9)
        norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}
        assert norms == pytest.approx(golden["grad_norms"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("file, kwargs", [("msg_tiny", {}), ("msg_cvpr22_tiny", CVPR22_TINY)])
def test_checkpoint_names_and_shapes_are_the_official_ones(file, kwargs):
    with torch.device("meta"):
        state = MSGTransformer(**kwargs).state_dict()
    assert [(k, list(v.shape)) for k, v in state.items()] == list(
        reference(f"state_dict_keys_{file}.json").items()
    )


def small_block(drop_path=0.0):
    """A block of 8 channels and 2 heads, for windows of 3x3 patches."""
    options = BlockOptions(
        window_size=3,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        proj_drop_rate=0.0,
        attn_drop_rate=0.0,
        norm_layer=torch.nn.LayerNorm,
        tokens=True,
        attention="auto",
        exchange=shuffle_messengers,
    )
    return Block(8, 2, drop_path, options)


@pytest.mark.parametrize("manip_type", ["shuf", "mean", "shift"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("windows, channels", [(1, 6), (4, 4), (4, 8), (9, 9), (16, 48)])
def test_exchanges_equal_a_loop_in_every_memory_order_and_leave_the_patches(
    windows, channels, tokens, manip_type
):
    x = torch.randn(3, windows, tokens, channels, dtype=torch.float64)
    expected = torch.cat([loop_exchange(manip_type, x[:, :, 0])[:, :, None], x[:, :, 1:]], dim=2)
    for order in itertools.permutations(range(4)):
        back = [order.index(i) for i in range(4)]
        same = x.permute(order).contiguous().permute(back)  # the same numbers, in memory in another order
        same = same.clone(memory_format=torch.preserve_format)
        exchange = dict(OTHER_EXCHANGES, shuf=shuffle_messengers)[manip_type]
        found = replace_messengers(same, exchange(same[:, :, 0]))
        tolerance = 1e-15 if manip_type == "mean" else 0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def reaches(model):
    """Whether the lower right corner of an image changes the upper left window's patch map of stage 1."""
    x = golden_images(32)
    y = x.clone()
    y[:, :, -4:, -4:] += 1
    maps = [model.double().forward_intermediates(v, [0], intermediates_only=True)[0] for v in (x, y)]
    return not torch.equal(maps[0][:, :, :4, :4], maps[1][:, :, :4, :4])


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        (dict(manip_type="mean"), True),
        (dict(manip_type="shift"), True),
        (dict(manip_type="none"), False),
        (dict(tokens=False), False),
        (dict(shuffle_size=(2, 2, 1)), False),
    ],
)
def test_information_crosses_windows_by_exchanged_messengers_only(changes, expected):
    assert reaches(micro(**changes)) is expected


@pytest.mark.parametrize("changes", [CVPR22, dict(ape=True, patch_norm=False)])
def test_reduced_precision_and_channels_last_stay_close_to_float32(changes):
    model, x = micro(**changes), golden_images(32).float()
    with torch.no_grad():
        expected = model(x)
        close = dict(rtol=0, atol=0.15)  # logits have a spread of about 1
        torch.testing.assert_close(
            model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-5
        )
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, **close)
        torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, **close)


def test_gradient_checkpointing_runs_blocks_twice_and_changes_nothing():
    grads, runs = [], []
    for enabled in (False, True):
        model = micro(drop_rate=0.1).train()
        model.set_grad_checkpointing(enabled)
        model.layers[0].blocks[0].norm1.register_forward_hook(lambda *_: runs.append(1))
        torch.manual_seed(0)
        model(golden_images(32).float()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert len(runs) == 1 + 2
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_drop_path_grows_linearly_to_its_rate():
    model = MSGTransformer(**MICRO, drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_drop_path_drops_both_branches_of_a_block():
    block = small_block(drop_path=1 - 1e-9).train()
    x = torch.randn(1, 4, 10, 8)
    assert torch.equal(block(x), replace_messengers(x.clone(), shuffle_messengers(x[:, :, 0])))


def test_dropout_follows_the_embedding_the_projections_and_both_layers_of_every_mlp():
    model = build_model(digits_config("MODEL.DROP_RATE", 0.25)).train()
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.25:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(golden_images(32).float())
    of_a_block = ("attn.proj_drop", "mlp.drop1", "mlp.drop2")
    blocks = [
        f"layers.{stage}.blocks.{i}.{name}" for stage in range(3) for i in (0, 1) for name in of_a_block
    ]
    assert calls == ["pos_drop", *blocks]


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averages_with_buffers_keep_the_position_index(decay):
    model = micro(depths=(1, 1, 1))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    kept, own = average.module.state_dict(), model.state_dict()
    assert all(torch.equal(kept[name], index) for name, index in own.items() if name.endswith("index"))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(average(images), model(images), rtol=1e-5, atol=1e-5)


def test_the_position_index_survives_the_meta_device_and_moves_with_the_weights():
    model = micro(depths=(1, 1, 1))
    with torch.device("meta"):
        empty = MSGTransformer(**dict(MICRO, depths=(1, 1, 1))).eval()
    empty = empty.to_empty(device="cpu")
    attention = empty.layers[0].blocks[0].attn
    assert torch.equal(attention.relative_position_index, attention.position_index)
    empty.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(empty(images), model(images))
    assert model.to("meta")(images.to("meta")).shape == (1, 10)


def test_initialisation_is_that_of_the_specification():
    torch.manual_seed(0)
    model = MSGTransformer(**MICRO, ape=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name
        elif name.endswith(".bias") and "patch_embed" not in name:
            assert torch.all(parameter == 0), name
        elif parameter.numel() > 500 and "patch_embed" not in name:
            assert 0.018 < parameter.std() < 0.022, name
            assert parameter.abs().max() < 2, name
    assert model.layers[0].blocks[0].attn.rel_pos_msg.abs().max() > 0


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(embed_dim=50), ["NUM_HEADS[0]", "EMBED_DIM"]),
        (dict(embed_dim=24), ["EMBED_DIM a multiple of 16", "SHUF_SIZE[0]"]),
        (dict(depths=(2, 2)), ["DEPTHS 2", "NUM_HEADS 3"]),
        (dict(shuffle_size=(3, 2, 1)), ["48 channels of stage 1", "9 windows", "SHUF_SIZE[0]"]),
        (dict(shuffle_size=(4, 0, 1)), ["SHUF_SIZE", "positive"]),
        (dict(manip_type="mix"), ["MANIP_TYPE", "shuf or mean or shift or none"]),
        (dict(downsample="pool"), ["DOWNSAMPLE", "linear or conv"]),
        (dict(img_size=1), ["1x1 pixels are smaller than a patch of 2x2", "DATA.IMG_SIZE"]),
        (dict(img_size=(32, 32, 3)), ["DATA.IMG_SIZE", "[height, width]"]),
        (dict(global_pool="max"), ["HEAD", "token or avg"]),
        (dict(global_pool="token", tokens=False), ["use avg", "TOKENS"]),
    ],
)
def test_impossible_combinations_name_the_key_to_change(changes, words):
    with pytest.raises(ValueError) as error:
        MSGTransformer(**dict(MICRO, **changes))
    assert all(word in str(error.value) for word in words), error.value


def test_shuffle_region_is_the_whole_side_where_fewer_windows_are_left():
    model = build_model(digits_config("MODEL.MSG.SHUF_SIZE", [8, 8, 8]))
    assert model.shuffle_size == [stage.shuffle_size for stage in model.layers] == [4, 2, 1]
    assert model.msg_tokens.shape[1] == 16
