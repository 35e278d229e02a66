"""Images of any size against a plain implementation that leaves out the tokens that are not there."""

import copy
import itertools
import pickle
import random

import pytest
import torch
from helpers import CVPR22, loop_exchange, micro
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn import functional

from models import inference, use_onednn
from models.exchange import OTHER_EXCHANGES
from models.geometry import fit_regions
from models.msg_transformer import shuffle_messengers
from models.padding import Extent, Layout, _layout

VARIANTS = dict(
    v1={},
    cvpr22=CVPR22,
    positions=dict(ape=True),
    no_messengers=dict(tokens=False),
    no_shuffle=dict(manip_type="none"),
    mean=dict(manip_type="mean"),
    shift=dict(manip_type="shift"),
    patches_read=dict(global_pool="avg"),
    wide_regions=dict(img_size=64, shuffle_size=(4, 4, 4)),
)


def attend(attention, tokens, places):
    """Attention of one window over tokens (n, C) that are at these places of its 1+w*w."""
    bias = attention.bias()[:, places][:, :, places]
    q, k, v = (
        x.unflatten(1, (bias.shape[0], -1)).transpose(0, 1) for x in attention.qkv(tokens).chunk(3, dim=1)
    )
    weights = (attention.scale * q @ k.transpose(1, 2) + bias).softmax(2)
    return attention.proj((weights @ v).transpose(0, 1).flatten(1))


def loop_block(block, patches, messengers, window, region):
    """A block on a map (H, W, C) and messengers (rows, columns, C) of whole regions, window by window."""
    height, width, _ = patches.shape
    rows, columns, channels = messengers.shape
    after, moved = patches.clone(), messengers.clone()
    for row, column in itertools.product(range(rows), range(columns)):
        cells = [
            (y, x)
            for y in range(row * window, min((row + 1) * window, height))
            for x in range(column * window, min((column + 1) * window, width))
        ]
        places = [1 + (y % window) * window + x % window for y, x in cells]
        tokens = [patches[y, x] for y, x in cells]
        if block.attn.rel_pos_msg is None:
            places = [place - 1 for place in places]
        else:
            tokens, places = [messengers[row, column], *tokens], [0, *places]
        if not tokens:
            continue
        out = torch.stack(tokens)
        out = out + attend(block.attn, block.norm1(out), places)
        if block.attn.rel_pos_msg is not None:
            moved[row, column], out = out[0], out[1:]
        for (y, x), token in zip(cells, out):
            after[y, x] = token
    if block.exchange:
        exchanges = dict(OTHER_EXCHANGES, shuf=shuffle_messengers)
        manip_type = next(word for word, exchange in exchanges.items() if exchange is block.exchange)
        for top, left in itertools.product(range(0, rows, region), range(0, columns, region)):
            of_region = moved[top : top + region, left : left + region]
            exchanged = loop_exchange(manip_type, of_region.flatten(0, 1)[None])
            moved[top : top + region, left : left + region] = exchanged[0].unflatten(0, (region, region))
    return after + block.mlp(block.norm2(after)), moved + block.mlp(block.norm2(moved))


def loop_stages(model, image):
    """The patch map (H, W, C) and the messengers (rows, columns, C) of every stage for one image."""
    patch, found = model.patch_size, []
    image = functional.pad(image, (0, -image.shape[2] % patch, 0, -image.shape[1] % patch))
    patches = model.patch_embed(image[None])[0]
    if model.absolute_pos_embed is not None:
        size = list(patches.shape[:2])
        positions = resample_abs_pos_embed(model.absolute_pos_embed, size, num_prefix_tokens=0)
        patches = patches + positions[0].unflatten(0, size)
    messengers = None
    for i, stage in enumerate(model.layers):
        window, region = stage.window_size, stage.shuffle_size
        rows, columns = (-(-side // window) for side in patches.shape[:2])
        grid = patches.new_zeros(*(-(-side // region) * region for side in (rows, columns)), patches.shape[2])
        for row, column in itertools.product(range(rows), range(columns)):
            if not model.tokens:
                continue
            first = row % region * region + column % region
            grid[row, column] = model.msg_tokens[0, first, 0] if i == 0 else messengers[row, column]
        for block in stage.blocks:
            patches, grid = loop_block(block, patches, grid, window, region)
        messengers = grid[:rows, :columns]
        found.append((patches, messengers))
        if stage.downsample is not None:
            patches, messengers = (
                stage.downsample(functional.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))[None])[0]
                for x in (patches, messengers)
            )
    return found


def loop_logits(model, image):
    """The logits of one image."""
    patches, messengers = loop_stages(model, image)[-1]
    read = messengers if model.global_pool == "token" else patches
    return model.head(torch.stack([model.norm(x) for x in read.flatten(0, 1)]).mean(0))


def random_sizes():
    """Pairs of a variant and a size, each variant with several sizes, some smaller than a window."""
    draw = random.Random(0)
    names = itertools.cycle(VARIANTS)
    sizes = [(draw.randint(1, 52), draw.randint(1, 52)) for _ in range(40)]
    return [(next(names), size) for size in [(64, 64), *sizes]]  # the first has several windows at the end


@pytest.mark.parametrize("name, size", random_sizes())
def test_logits_are_those_of_a_loop_over_the_windows(name, size):
    model = micro(**VARIANTS[name]).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.stack([loop_logits(model, image) for image in images])
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_maps_and_gradients_are_those_of_the_loop(name):
    model = micro(**VARIANTS[name]).double()
    image = torch.randn(3, 37, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for maps in (loop_stages(model, image), [(p[0], m) for p, m in model.forward_stages(image[None])]):
        model.zero_grad()
        sum((i + 1) * patches.square().sum() for i, (patches, _) in enumerate(maps)).backward()
        gradients.append([(n, p.grad) for n, p in model.named_parameters() if p.grad is not None])
    scale = max(grad.abs().max() for _, grad in gradients[0])
    for (name, expected), (_, found) in zip(*gradients, strict=True):
        assert (found - expected).abs().max() < 1e-11 * scale, name


def test_rows_hold_what_images_show_and_a_token_for_each_empty_window():
    """Three by two windows of 4x4 in regions of four by four: ten windows are empty, three are padded."""
    layout = Layout.build(1, Extent(12, 7), 4, 4, True)
    assert (layout.full, layout.padded, layout.empty) == (3, 3, 10)
    assert len(layout.rows.index) == 12 * 7 + 6 + 10
    without = Layout.build(1, Extent(12, 7), 4, 4, False)
    assert len(without.rows.index) == 12 * 7


SLOW = [CVPR22, dict(tokens=False), dict(manip_type="none"), dict(ape=True)]


@pytest.mark.parametrize(
    "size, changes",
    [((32, 32), {}), ((37, 26), {})]
    + [pytest.param((32, 32), changes, marks=pytest.mark.slow) for changes in SLOW],
)
def test_a_model_compiles_without_graph_breaks(size, changes):
    torch._dynamo.reset()
    model = micro(depths=(1, 1, 1), **changes).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()


def test_a_model_trains_after_it_was_evaluated_with_fixed_weights():
    """What was made without gradients serves with them."""
    model, x = micro(), torch.randn(1, 3, 37, 26)
    _layout.cache_clear()
    with inference(model):
        expected = model(x)
    logits = model(x)
    logits.sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_layouts_of_a_size_are_made_once_and_copies_of_a_model_share_them():
    model, x = micro(depths=(1, 1, 1)), torch.zeros(1, 3, 20, 38)
    model(x)
    made = _layout.cache_info().misses
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x)
    assert _layout.cache_info().misses == made


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (37, 26)])
@pytest.mark.parametrize("name", ["v1", "positions", "no_messengers", "mean"])
def test_a_batch_of_no_images_gives_no_logits_and_no_gradients(name, size, is_fast):
    model = micro(**VARIANTS[name], depths=(1, 1, 1)).train()
    if is_fast:
        use_onednn(model)
    images = torch.zeros(0, 3, *size, requires_grad=True)
    logits = model(images)
    logits.sum().backward()
    assert logits.shape == (0, 10) and images.grad.shape == images.shape
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    with inference(model):
        assert model(images).shape == (0, 10)


def test_drop_path_drops_whole_regions():
    """In each of two images, five by five windows of 4x4 tokens make two by two regions."""
    layout, drop_path = Layout.build(2, Extent(20, 20), 4, 4, True), nn.Module()
    drop_path.drop_prob, drop_path.forward = 0.5, lambda x: x * torch.arange(8.0)[:, None]
    x = torch.zeros(1, len(layout.rows.index), 1)
    patches, _ = layout.restore(layout.add(x, x + 1, drop_path))
    side = torch.arange(20) // 16
    of_image = 2 * side[:, None] + side
    assert torch.equal(patches[..., 0], torch.stack([of_image, 4 + of_image]).float())


def test_a_region_is_the_whole_side_only_where_the_channels_allow_it():
    """Three windows are left on a side of stage 2, and 96 channels have no ninth part."""
    sizes = dict(patch_size=2, window_size=4, embed_dim=48)
    assert fit_regions((4, 4, 4), 48, **sizes) == [4, 4, 2]
    assert fit_regions((4, 4, 4), 48, **sizes, exchange=False) == [4, 3, 2]
    assert fit_regions((4, 4, 4), (48, 96), **sizes, exchange=False) == [4, 4, 3]  # the longer side counts


@pytest.mark.parametrize("kind", [{}, CVPR22])
@pytest.mark.parametrize("size", [(72, 16), (80, 8), (128, 2)])
def test_narrow_images_and_their_gradients_are_right_in_bfloat16(size, kind):
    """With AMX, PyTorch's own convolution gives garbage for maps that end as one column."""
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    found = []
    for amp in (True, False):
        model = micro(**kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = model(images).float()
        logits.square().sum().backward()
        found.append(
            [logits, *(weight.grad for name, weight in model.named_parameters() if "weight" in name)]
        )
    for ours, expected in zip(*found):
        assert (ours - expected).norm() < 0.2 * expected.norm()
    assert (found[0][0] - found[1][0]).norm() < 0.05 * found[1][0].norm()
