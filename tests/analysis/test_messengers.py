"""What models/messengers.py computes, against loops, plain runs and autograd."""

import base64
import io
import itertools
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from helpers import digits_config, fill_weights, micro, write_images
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image
from torch.nn import functional

from analysis import messengers
from analysis.messenger_curves import ORDERS, curve, measure_curves, summarize, switch_off
from analysis.messengers import (
    ablate,
    ablate_each,
    attention_map,
    blocks_of,
    class_scores,
    examine,
    exchange_route,
    gradient_map,
    grids,
    influence,
    layouts,
    messenger_attention,
    patch_weights,
    sent_messengers,
    trace,
    without_exchange,
)
from config import CHOICES, dump_config
from models import build_model
from models.exchange import OTHER_EXCHANGES
from models.fast.attention import BACKENDS
from models.msg_transformer import MSGTransformer, partition_windows, shuffle_messengers
from tools import tables, visualize
from utils import UserError

SIZES = {"whole regions": (32, 32), "padded windows": (27, 44), "windows without patches": (40, 12)}


def image_of(size, seed=0):
    return torch.randn(3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(**changes):
    """A model of two stages, with regions of 2x2 windows in the first."""
    sizes = dict(img_size=16, patch_size=2, num_classes=3, embed_dim=8, depths=(2, 1), num_heads=(1, 2))
    sizes.update(window_size=2, shuffle_size=(2, 1), drop_path_rate=0.0)
    return fill_weights(MSGTransformer(**dict(sizes, **changes))).double().eval()


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "triton"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_weights_times_values_are_what_the_block_adds(size, backend):
    model, outputs = micro(attention=backend).double(), {}

    def keep(place):
        def look(attention, arguments, out):
            outputs[place] = attention, arguments[0], rows[place[0]], out

        return look

    for place, block in blocks_of(model):
        block.attn.register_forward_hook(keep(place))
    images = torch.stack([image_of(size), image_of(size, 1)])
    rows = layouts(model, images)
    found = messenger_attention(model, images)
    assert found.keys() == outputs.keys() == {(i, j) for i in range(3) for j in range(2)}
    for place, weights in found.items():
        attention, x, layout, out = outputs[place]
        grid, side = grids(model, size)[place[0]], model.layers[place[0]].window_size
        assert weights.shape[1:3] == (grid.rows, grid.columns)
        torch.testing.assert_close(weights.sum(4), torch.ones_like(weights[..., 0]), atol=1e-12, rtol=0)
        values = attention.qkv(x).chunk(3, dim=-1)[2]
        if layout is None:
            wanted = out[:, :, 0]
        else:
            patches, _ = layout.restore(values)
            height, width = grid.rows * side, grid.columns * side
            patches = functional.pad(
                patches, (0, 0, 0, width - patches.shape[2], 0, height - patches.shape[1])
            )
            first = layout.read_messengers(values)
            values = torch.cat([first, partition_windows(patches, side, grid.region)], dim=2)
            wanted = layout.read_messengers(out)[:, :, 0]
        weights = grid.split(weights.flatten(3)).unflatten(2, weights.shape[3:])
        heads = values.unflatten(3, (weights.shape[2], -1))  # B*regions, windows, tokens, heads, D
        result = torch.einsum("nght,ngthd->nghd", weights, heads).flatten(2)
        torch.testing.assert_close(attention.proj(result), wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("manip_type", CHOICES["MODEL.MSG.MANIP_TYPE"])
@pytest.mark.parametrize("size", [(16, 16), (13, 20)], ids=str)
def test_influence_reaches_what_has_a_gradient(manip_type, size):
    model, chosen = tiny(manip_type=manip_type), (1, 2)
    image, entered = image_of(size), []
    found = influence(model, image, [chosen])

    def enter(module, arguments, tokens):
        entered.append(tokens.detach().requires_grad_())
        return entered[0]

    outputs = {}
    model.pos_drop.register_forward_hook(enter)
    for place, block in blocks_of(model):
        block.register_forward_hook(lambda _, given, x, place=place: outputs.update({place: x}))
    model(image[None])
    rows, columns = (slice(2 * i, 2 * i + 2) for i in chosen)
    for place, x in outputs.items():
        grid, layout = grids(model, size)[place[0]], layouts(model, image[None])[place[0]]
        if place == (1, 0):
            continue  # read for its messengers alone
        tokens = x[:, :, 0] if layout is None else layout.read_messengers(x)[:, :, 0]
        messengers = grid.join(tokens)[0]
        for row, column in itertools.product(range(grid.rows), range(grid.columns)):
            (gradient,) = torch.autograd.grad(
                messengers[row, column].sum(), entered[0], retain_graph=True, materialize_grads=True
            )
            reached = bool(gradient[0, rows, columns].abs().max() > 0)
            assert reached == bool(found[place][1][0, row, column] > 0), (place, row, column)


def test_influence_is_the_change_of_a_run_with_other_patches(monkeypatch):
    model, image, seen = micro().double(), image_of((32, 32)), {}
    blank = trace(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64))

    def swap(tokens):
        tokens = tokens.clone()
        tokens[0, 4:8, 12:16] = blank[0, 4:8, 12:16]
        return tokens

    for replaced in (None, swap):
        trace(model, image[None], replaced, lambda place, *kinds: seen.setdefault(place, []).append(kinds))
    for place, found in influence(model, image, [(0, 0), (1, 3)]).items():
        for kind in range(2):
            before, after = (kinds[kind][0] for kinds in seen[place])
            wanted = (after - before).norm(dim=2) / before.norm(dim=2)
            torch.testing.assert_close(found[kind][1], wanted, atol=1e-9, rtol=1e-9)
    monkeypatch.setattr(messengers, "NOTHING", 0.1)
    changes = influence(model, image, [(1, 3)])[0, 1][0]
    assert ((changes == 0) | (changes > 0.1)).all() and (changes == 0).any()


@pytest.mark.parametrize("manip_type", CHOICES["MODEL.MSG.MANIP_TYPE"])
def test_route_is_what_the_exchange_does(manip_type):
    exchange = dict(OTHER_EXCHANGES, shuf=shuffle_messengers)[manip_type]
    messengers = torch.randn(1, 4, 12, dtype=torch.float64)
    wanted = exchange(messengers) if exchange else messengers
    for window in range(4):
        made = torch.zeros(12, dtype=torch.float64)
        for source, sent, received, weight in exchange_route(exchange, 4, 12, window):
            made[received] += weight * messengers[0, source, sent]
        torch.testing.assert_close(made, wanted[0, window], atol=1e-12, rtol=0)


@pytest.mark.parametrize("manip_type", ["shuf", "none"])
@pytest.mark.parametrize("size", [(32, 32), (27, 44)], ids=str)
@pytest.mark.parametrize("stage", range(3))
def test_ablation_is_a_run_with_the_messenger_replaced(stage, size, manip_type):
    model, image = micro(manip_type=manip_type).double(), image_of(size)
    grid, region = grids(model, size)[stage], model.layers[stage].shuffle_size
    row, column = grid.shown[0] - 1, grid.shown[1] - 1
    found = ablate_each(model, image, stage)
    assert found.shape == (*grid.shown, 10)
    regions = grid.columns // region
    number = row // region * regions + column // region  # of the region, and of the window in it
    window = row % region * region + column % region
    blank = sent_messengers(model, torch.zeros_like(image[None]))

    def replace(place):
        # What the attention adds to the messenger makes it the blank one.
        def look(attention, arguments, out):
            layout, x = layouts(model, image[None])[stage], before[0]
            at = (
                (number, window, 0) if layout is None else (0, layout.messengers[number * region**2 + window])
            )
            out = out.clone()
            out[at] = blank[place][number, window] - x[at]
            return out

        return look

    before = [None]
    for place, block in blocks_of(model):
        if place[0] == stage:
            block.register_forward_pre_hook(lambda _, given: before.__setitem__(0, given[0]))
            block.attn.register_forward_hook(replace(place))
    with torch.no_grad():
        logits = model.forward_head(model.forward_features(image[None]))[0]
    torch.testing.assert_close(found[row, column], logits - logits.mean(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (27, 44)], ids=str)
def test_exchange_switched_off_everywhere_is_a_model_without_exchange(size):
    images = torch.stack([image_of(size), image_of(size, 1)])
    model, wanted = micro().double(), micro(manip_type="none").double()
    exchange = [block.exchange for _, block in blocks_of(model)]
    places = [place for place, _ in blocks_of(model)]
    with torch.no_grad():
        scores = class_scores(wanted, images)
    torch.testing.assert_close(without_exchange(model, images, places), scores, atol=1e-10, rtol=0)
    assert [block.exchange for _, block in blocks_of(model)] == exchange


@pytest.mark.parametrize("manip_type", ["shuf", "shift", "mean"])
def test_withheld_exchange_lets_no_window_know_of_another(manip_type):
    model, image = tiny(manip_type=manip_type, depths=(1, 1)), image_of((16, 16))
    changed = image.clone()
    changed[:, 4:8, 0:4] += 1  # window (1, 0)
    found = []
    for images in (image[None], changed[None]):
        tokens = {}

        def see(module, given, x, tokens=tokens):
            tokens.update(after=x[:, :, 0])

        handle = model.layers[0].blocks[0].register_forward_hook(see)
        without_exchange(model, images, [(0, 0)], withheld=True)
        handle.remove()
        found.append(grids(model, (16, 16))[0].join(tokens["after"])[0])
    assert (found[0] - found[1]).abs().sum(2).nonzero().tolist() == [[1, 0]]
    blank = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(
        without_exchange(model, blank, [(0, 0)], True), class_scores(model, blank), atol=1e-10, rtol=0
    )


def test_maps_of_attention_and_gradient():
    model, image = micro().double(), image_of((32, 32))
    weights = messenger_attention(model, image[None])[0, 0][0].mean(2)
    found = patch_weights(model, image, weights, 0)
    for y, x in ((0, 0), (9, 30), (31, 17)):  # patches of 2 px, windows of 8
        token = 1 + y % 8 // 2 * 4 + x % 8 // 2
        assert found[y, x] == 17 * weights[y // 8, x // 8, token]
    assert attention_map(model, image).shape == (32, 32)
    step = 1e-6
    more = class_scores(model, (image * (1 + step))[None])[0, 3]
    less = class_scores(model, (image * (1 - step))[None])[0, 3]
    torch.testing.assert_close(
        gradient_map(model, image, 3).sum(), ((more - less) / (2 * step)).detach(), atol=1e-6, rtol=1e-6
    )


def test_means_over_windows_count_pixels_of_the_image_only():
    grid = grids(micro(), (10, 32))[0]
    pixels = torch.rand(10, 32, dtype=torch.float64)
    means = grid.means(pixels)
    assert means.shape == grid.shown == (2, 4)
    torch.testing.assert_close(means[1, 3], pixels[8:, 24:].mean())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that writes a checkpoint of a changed digits config, and returns its path."""

    def write(*changes):
        config = digits_config("MODEL.NUM_CLASSES", 3, *changes)
        content = dict(model=fill_weights(build_model(config)).state_dict(), config=dump_config(config))
        path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
        torch.save(dict(content, classes=["a", "b", "c"]), path)
        return path

    return write


@pytest.fixture
def show(monkeypatch):
    """A function that does what the command does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, arguments), "--device", "cpu"])
        visualize.main(visualize.parse_args())

    return run


def test_a_sheet_for_every_image(tmp_path, checkpoint, show, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "draw_sheet", lambda found, pixels, head, path: drawn.append(head))
    drawn = []
    write_images(tmp_path / "images", 1, ("a", "b"))
    path = checkpoint()
    show(path, tmp_path / "images", "--output", tmp_path / "out", "--size", "30,40")
    assert len(drawn) == 2 and all(head.startswith("0.png: ") for head in drawn)
    assert f"{tmp_path}/images/b/0.png: {tmp_path}/out/0-2.png" in capsys.readouterr().out


def test_findings_are_what_the_functions_give():
    model, image = micro().double(), image_of((32, 32))
    found = examine(model, image)
    drops = found.scores[found.target] - ablate_each(model, image, 0)[..., found.target]
    torch.testing.assert_close(found.drops[0], drops, atol=1e-12, rtol=0)
    assert drops[found.window] == drops.max()
    place = examine(model, image, (2, 1))
    assert place.window == (2, 1)
    torch.testing.assert_close(place.influence[2, 1][0], influence(model, image, [(2, 1)])[2, 1][0][0])
    assert [len(route) for route in place.routes.values()] == [16, 4]  # of the regions of both stages
    (part, _) = place.routes[1, 0][0]
    assert part.sent == list(range(48, 72))  # window (2, 1) is in window (1, 0) of stage 2, its third of four


def test_a_sheet_is_readable_at_the_width_of_a_page(monkeypatch):
    """830 px wide, its letters have 10 px; every colour bar says what it shows, and no box hides anything."""
    figures = []
    monkeypatch.setattr(visualize, "save", lambda figure, path: figures.append(figure))
    found = examine(micro().double(), image_of((27, 44)))
    visualize.draw_sheet(found, np.zeros((27, 44, 3), np.uint8), "long_$name_^" * 20, "sheet.png")
    (figure,) = figures
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) / 72 * 830 / figure.get_figwidth() > 10
    assert not any(text.get_bbox_patch() for text in texts)
    assert max(text.get_window_extent().x1 for text in texts if text.figure is figure) < figure.bbox.width
    axes = [ax for ax in figure.findobj(Axes) if ax.axison]
    bars = [ax for ax in axes if getattr(ax, "_colorbar", None)]
    assert len(bars) == 6 and all(ax.get_ylabel() for ax in bars)  # (a), (b), two of (c), two of (d)


@pytest.mark.parametrize(
    "changes, words, message",
    [
        ([], ["missing.png"], "missing.png: no such file"),
        ([], ["IMAGE", "--window", "4,0"], "has 4x4 windows, from 0,0 to 3,3"),
        ([], ["TEXT"], "cannot be read"),
        (["MODEL.MSG.TOKENS", False], ["IMAGE"], "no messengers .MODEL.MSG.TOKENS False"),
    ],
)
def test_what_cannot_be_shown_is_one_message(tmp_path, checkpoint, show, changes, words, message):
    write_images(tmp_path / "images", 1, ("a",))
    (tmp_path / "text.png").write_text("no image")
    places = dict(IMAGE=tmp_path / "images" / "a" / "0.png", TEXT=tmp_path / "text.png")
    with pytest.raises(UserError, match=message):
        show(checkpoint(*changes), *(places.get(word, word) for word in words), "--output", tmp_path / "out")


@pytest.mark.parametrize("size", [(32, 32), (27, 44)], ids=str)
def test_curves_silence_messengers_in_order(size):
    model, image = micro().double(), image_of(size)
    grid = grids(model, size)[1]
    count = grid.shown[0] * grid.shown[1]
    order = list(range(count))[::-1]
    deletion, insertion = curve(model, image, 1, 4, order)
    assert len(deletion) == len(insertion) == count + 1
    for number in range(count + 1):
        masks = torch.zeros(2, grid.rows, grid.columns, dtype=torch.bool)
        for rank, window in enumerate(order):
            masks[int(rank >= number), window // grid.shown[1], window % grid.shown[1]] = True
        wanted = ablate(model, image, 1, masks)[:, 4]
        assert [deletion[number], insertion[number]] == pytest.approx(wanted.tolist(), abs=1e-10)
    score = class_scores(model, image[None])[0, 4].item()
    assert [deletion[0], insertion[-1]] == pytest.approx([score, score], abs=1e-10)


def test_measured_orders_are_those_of_the_maps():
    model, image = micro().double(), image_of((32, 32))
    measured = measure_curves(model, image)
    assert measured["curves"].keys() == {0, 1}  # the last stage has one window
    with torch.no_grad():
        scores = class_scores(model, image[None])[0]
    target = int(scores.argmax())
    drops = (scores[target] - ablate_each(model, image, 1)[..., target]).flatten()
    means = {
        "ablation": drops,
        "attention": grids(model, (32, 32))[1].means(attention_map(model, image)).flatten(),
        "gradient": grids(model, (32, 32))[1].means(gradient_map(model, image, target)).flatten(),
    }
    for name, values in means.items():
        order = sorted(range(4), key=lambda window: -values[window])  # noqa: B023
        wanted = curve(model, image, 1, target, order)
        for found, of_order in zip(measured["curves"][1][name], wanted):
            assert found == pytest.approx(of_order, abs=1e-10)
    found = switch_off(model, image, target)
    assert list(found)[-3:] == ["stage 1", "stage 2", "all"] and len(found) == 7
    off = without_exchange(model, image[None], [(1, 0), (1, 1)], True)[0]
    score, kept = found["stage 2"]["withheld"]
    assert score == pytest.approx(off[target].item()) and kept == (off.argmax() == target)


def test_summary_of_two_images():
    def row(score, deletion, insertion, left, kept):
        curves = {
            0: {name: (torch.tensor(deletion).numpy(), torch.tensor(insertion).numpy()) for name in ORDERS}
        }
        curves[0]["random"] = curves[0]["random"][0] * 0 + torch.tensor([4.0, 2.0, 0.0]).numpy(), insertion
        exchange = {"all": dict(off=(left, kept), withheld=(score, True))}
        return dict(score=score, blank=1.0, curves=curves, exchange=exchange)

    rows = [
        row(4.0, [4.0, 0.0, 0.0], [0.0, 2.0, 4.0], 2.0, True),
        row(4.0, [4.0, 1.0, 0.0], [0.0, 2.0, 4.0], 1.0, False),
    ]
    summary = summarize(rows)
    entry = summary["curves"][0]["orders"]["attention"]
    assert entry["deletion"]["curve"] == [4, 0.5, 0]
    assert entry["deletion"]["area"] == pytest.approx((1 + 1.5) / 2 / 4)
    assert entry["deletion"]["gain"] == pytest.approx(0.75)  # 2 - 1 and 2 - 1.5
    assert entry["deletion"]["error"] == pytest.approx(0.25)
    assert entry["insertion"]["area"] == pytest.approx(0.5) and entry["insertion"]["gain"] == 0
    off = summary["exchange"]["all"]["off"]
    assert off["share"] == pytest.approx(5 / 6) and off["kept"] == 0.5
    assert off["drop"] == pytest.approx(2.5) and off["error"] == pytest.approx(0.5)
    assert summary["exchange"]["all"]["withheld"]["share"] == 0
    assert "| stage 1 | attention | 0.31 | 0.75 ± 0.25 | 0.50 | 0.00 ± 0.00 |" in tables.orders(summary)
    assert tables.exchange(summary)[2:] == ["| all | 83%, 50% | 0%, 100% |"]


def test_curves_of_a_folder(tmp_path, checkpoint, show, capsys):
    write_images(tmp_path / "images", 4, ("a", "b"))
    show(checkpoint(), "--curves", tmp_path / "images", "--most", 2, "--output", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["curves.json", "curves.png"]
    content = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert (content["images"], content["of"]) == (2, 8)
    told = capsys.readouterr().out
    assert all(line in told for line in (*tables.orders(content), *tables.exchange(content)))


def test_page_is_complete_and_has_the_influence_of_every_window():
    model, image = micro().double(), image_of((40, 27))  # reaches into a second row of regions
    text = visualize.build_page(visualize.page_data(model, image, (4, 2), '</script>\'s "<name>"'))
    assert not re.findall(r"(?:src|href)=|https?:|@import|url\(", text)
    assert text.count("<script") == text.count("</script>") == 2
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["title"] == '</script>\'s "<name>"' and data["windows"] == [5, 4]
    levels = np.frombuffer(base64.b64decode(data["influence"]), np.uint8).reshape(20, -1)
    windows = [(row, column) for row in range(5) for column in range(4)]
    start, most, least = 0, data["most"], data["least"]
    for block, kinds in zip(data["blocks"], influence(model, image, windows).values()):
        for shape, kind in zip((block["tokens"], block["grid"]), kinds):
            kind = kind.flatten(1).numpy()
            found = levels[:, start : start + shape[0] * shape[1]]
            start += shape[0] * shape[1]
            assert found.shape == kind.shape and ((found > 0) == (kind > 0)).all()
            known = least * (most / least) ** ((found.astype(float) - 1) / 254)
            near = (most / least) ** (1 / 254)  # a level more or less
            assert ((known / kind.clip(least) < near) & (kind.clip(least) / known < near))[kind > 0].all()
    assert start == levels.shape[1]
    with Image.open(io.BytesIO(base64.b64decode(data["picture"].split(",")[1]))) as picture:
        assert picture.size == (27, 40)
