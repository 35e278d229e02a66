"""The HTML page of tools/visualize.py in headless Chromium, as readers use it."""

import io
import math

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from helpers import micro
from matplotlib import colormaps
from PIL import Image

from analysis.messengers import influence
from tools import visualize

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium")
GREY = (0xD9, 0xD9, 0xD9)
WIDE, NARROW, PHONE = 1280, 480, 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def reach(tmp_path_factory):
    """Model, image, page and largest influence: 5x4 windows, the last row in regions of its own."""
    model = micro().double()
    image = torch.randn(3, 40, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = tmp_path_factory.mktemp("reach") / "page.html"
    data = visualize.page_data(model, image, (4, 2), "a <b>. Chosen window: 4,2")
    path.write_text(visualize.build_page(data), encoding="utf-8")
    return model, image, path, data["most"]


def pixels(browser):
    """What the page looks like, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB")).astype(int)


def centre(browser, window):
    """Where on the screen a window of the image of the page is."""
    left, top, width, height = browser.box("#image")
    return left + width * (window[1] + 0.5) * 8 / 28, top + height * (window[0] + 0.5) * 8 / 40


def check_quiet(browser, path):
    """Nothing was complained of, and the page asked for nothing but itself."""
    assert browser.complaints == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [path.as_uri()]


def expected(found, most):
    """The colours of influences, (..., 3)."""
    least = visualize.LEAST
    steps = np.log(found.clip(least) / least) / math.log(most / least)
    return np.where((found > 0)[..., None], 255 * colormaps["cividis"](steps)[..., :3], GREY)


def sample(kinds):
    """Influences on tokens of a block, and where its map shows them: (row, column) from 0 to 1."""
    patches, messengers = kinds
    y, x = np.indices(patches.shape).reshape(2, -1)
    of_patches = np.stack([(y + 0.4) / 4, (x + 0.4) / 4], 1)  # in windows of 4x4 tokens; the last may be cut
    seen = (abs(of_patches % 1 - 0.5) > 0.2).any(1)  # beside the square of the messenger
    of_messengers = np.indices(messengers.shape).reshape(2, -1).T + 0.58  # beside the corner of an outline
    values = np.concatenate([patches.ravel()[seen], messengers.ravel()])
    return values, np.concatenate([of_patches[seen], of_messengers]) / messengers.shape


def test_clicking_a_window_draws_the_numbers_that_the_model_gives(browser, reach):
    model, image, path, most = reach
    before, after = (influence(model, image, [window]) for window in ((4, 2), (0, 1)))
    browser.open(path, WIDE, 1200)
    shots = [pixels(browser)]
    browser.mouse(*centre(browser, (0, 1)), click=True)
    assert browser.js("document.getElementById('window').textContent").startswith("Window 0,1 ")
    shots.append(pixels(browser))
    changed = 0
    for number, (stage, block) in enumerate(after):
        left, top, width, height = browser.box("#blocks canvas", number)
        reached, drawn = [], []
        for shot, found in zip(shots, (before, after)):
            kinds = [kind[0].numpy() for kind in found[stage, block]]
            values, places = sample(kinds)
            y, x = (places * (height, width) + (top, left)).astype(int).T
            assert abs(shot[y, x] - expected(values, most)).max() <= 4, (stage, block)
            reached.append(values > 0)
            drawn.append(shot[y, x])
        differ = reached[0] != reached[1]
        changed += differ.sum()
        assert (abs(drawn[0] - drawn[1])[differ].max(1) > 10).all()
        patches, messengers = (f"{(kind > 0).sum()} of {kind.size}" for kind in kinds)
        words = browser.js(f"document.querySelectorAll('figcaption')[{number}].textContent")
        wanted = f"stage {stage + 1}, block {block + 1}\n{messengers} messengers, {patches} patches"
        assert words == wanted
    assert changed > 100
    check_quiet(browser, path)


def test_windows_are_chosen_by_mouse_keys_and_finger(browser, reach):
    *_, path, _ = reach
    browser.open(path, WIDE)

    def chosen():
        return browser.js("document.getElementById('window').textContent").split()[1]

    assert chosen() == "4,2"
    browser.mouse(*centre(browser, (1, 2)))
    assert chosen() == "1,2"
    browser.mouse(*centre(browser, (3, 0)), click=True)
    for key, code, wanted in (
        ("ArrowLeft", 37, "3,0"), ("ArrowUp", 38, "2,0"), ("ArrowRight", 39, "2,1"), ("ArrowDown", 40, "3,1"),
        ("ArrowDown", 40, "4,1"), ("ArrowDown", 40, "4,1"),
    ):  # fmt: skip
        browser.key(key, code)
        assert chosen() == wanted
    assert browser.js("scrollY") == 0
    browser.open(path, PHONE, 640, touch=True)
    browser.tap(*centre(browser, (2, 3)))
    assert chosen() == "2,3"
    check_quiet(browser, path)


@pytest.mark.parametrize("width", [WIDE, NARROW, PHONE])
def test_the_image_stays_in_sight_while_the_maps_scroll(browser, reach, width):
    *_, path, _ = reach
    browser.open(path, width, 600, touch=width < WIDE)
    assert browser.js("document.documentElement.scrollWidth") == width
    browser.box("figure:last-child figcaption")
    assert browser.js("scrollY") > 0
    top, bottom = browser.js("(({top, bottom}) => [top, bottom])(image.getBoundingClientRect())")
    assert 0 <= top < bottom < 600
    check_quiet(browser, path)
