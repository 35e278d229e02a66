"""The HTML page of tools/visualize.py in headless Chromium, where a script does what readers do."""

import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import micro
from matplotlib import colormaps

from analysis.messengers import influence
from tools import visualize

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium")
GREY = (0xD9, 0xD9, 0xD9)
COMPLAINTS = """<script>
const complaints = [];
addEventListener("error", (event) => complaints.push(event.message));
console.error = console.warn = (...words) => complaints.push(words.join(" "));
</script>"""
# Waits for the picture, calls act() and leaves what that returns in place of the page.
READER = """<script>{
const words = () => document.getElementById("window").textContent;
const captions = () => [...document.querySelectorAll("figcaption")].map((one) => one.textContent);
const colours = () => [...document.querySelectorAll("#blocks canvas")].map((canvas, block) => {
  const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return @PLACES@[block].map(([y, x]) => {
    const first = 4 * (Math.floor(y * height) * width + Math.floor(x * width));
    return [...data.slice(first, first + 3)];
  });
});
function pointer(kind, [row, column]) {
  const box = image.getBoundingClientRect();
  const at = { clientX: box.left + box.width * (column + 0.5) * 8 / 28,
               clientY: box.top + box.height * (row + 0.5) * 8 / 40 };
  image.dispatchEvent(new PointerEvent(kind, at));
}
function act() { @ACT@ }
const press = (key) => image.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
const timer = setInterval(() => {
  if (!words()) return;
  clearInterval(timer);
  const found = act();
  const asked = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.asked = asked.filter((address) => !address.startsWith("data:"));
  document.body.textContent = JSON.stringify(Object.assign(found, { complaints }));
}, 10);
}</script>"""


@pytest.fixture(scope="module")
def reach():
    """Model, image and data of a page: 5x4 windows, the last row in regions of its own."""
    model = micro().double()
    image = torch.randn(3, 40, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, image, visualize.page_data(model, image, (4, 2), "a <b>. Chosen window: 4,2")


@pytest.fixture
def read(reach, tmp_path):
    """A function that opens the page, and returns what the body of the function act() of a script finds."""

    def run(act, places=(), width=1280):
        page = visualize.build_page(reach[2]).replace("<title>", f"{COMPLAINTS}<title>")
        script = READER.replace("@ACT@", act).replace("@PLACES@", json.dumps(places))
        (tmp_path / "page.html").write_text(page.replace("</html>", f"{script}</html>"), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        flags += ["--hide-scrollbars", f"--window-size={width},600"]
        flags += ["--virtual-time-budget=20000", "--dump-dom"]
        command = [CHROMIUM, *flags, (tmp_path / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        (text,) = re.findall("<body>(.*)</body>", done.stdout, re.DOTALL)
        found = json.loads(html.unescape(text))
        assert found["complaints"] == [] and found["asked"] == []
        return found

    return run


def expected(found, most):
    """The colours of influences, (..., 3)."""
    least = visualize.LEAST
    steps = np.log(found.clip(least) / least) / math.log(most / least)
    return np.where((found > 0)[..., None], 255 * colormaps["cividis"](steps)[..., :3], GREY)


def sample(kinds):
    """Influences on tokens of a block, and where its map shows them: (row, column) from 0 to 1."""
    patches, messengers = (kind[0].numpy() for kind in kinds)
    y, x = np.indices(patches.shape).reshape(2, -1)
    of_patches = np.stack([(y + 0.4) / 4, (x + 0.4) / 4], 1)  # in windows of 4x4 tokens; the last may be cut
    seen = (abs(of_patches % 1 - 0.5) > 0.2).any(1)  # beside the square of the messenger
    of_messengers = np.indices(messengers.shape).reshape(2, -1).T + 0.58  # beside the corner of an outline
    values = np.concatenate([patches.ravel()[seen], messengers.ravel()])
    return values, np.concatenate([of_patches[seen], of_messengers]) / messengers.shape


def test_clicking_a_window_draws_the_numbers_that_the_model_gives(read, reach):
    model, image, data = reach
    before, after = (influence(model, image, [window]) for window in ((4, 2), (0, 1)))
    places = [sample(kinds)[1].tolist() for kinds in after.values()]
    act = "const first = colours(); pointer('pointerdown', [0, 1]);"
    found = read(f"{act} return {{ first, second: colours(), said: words(), captions: captions() }};", places)
    assert found["said"].startswith("Window 0,1 ")
    changed = 0
    for number, (stage, block) in enumerate(after):
        reached, drawn = [], []
        for colours, kinds in ((found["first"], before), (found["second"], after)):
            values, _ = sample(kinds[stage, block])
            drawn.append(np.array(colours[number]))
            assert abs(drawn[-1] - expected(values, data["most"])).max() <= 4, (stage, block)
            reached.append(values > 0)
        differ = reached[0] != reached[1]
        changed += differ.sum()
        assert (abs(drawn[0] - drawn[1])[differ].max(1) > 10).all()
        patches, messengers = (f"{(kind > 0).sum()} of {kind.numel()}" for kind in after[stage, block])
        words = f"stage {stage + 1}, block {block + 1}\n{messengers} messengers, {patches} patches"
        assert found["captions"][number] == words
    assert changed > 100


def test_windows_are_chosen_by_pointer_and_keys(read):
    keys = ["ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown"]
    found = read(
        "const told = [words()]; pointer('pointermove', [1, 2]); told.push(words());"
        "pointer('pointerdown', [3, 0]); let scrolls = false;"
        f"for (const key of {keys}) {{ scrolls ||= press(key); told.push(words()); }}"
        "return { told, scrolls: scrolls || press('ArrowUp'), others: press('Tab') };"
    )
    windows = [words.split()[1] for words in found["told"]]
    assert windows == ["4,2", "1,2", "3,0", "2,0", "2,1", "3,1", "4,1", "4,1"]
    assert not found["scrolls"] and found["others"]  # arrow keys choose and do not scroll


@pytest.mark.parametrize("width", [1280, 500])
def test_the_image_stays_in_sight_while_the_maps_scroll(read, width):
    found = read(
        "document.querySelector('figure:last-child figcaption').scrollIntoView({ block: 'nearest' });"
        "const { top, bottom } = image.getBoundingClientRect(), whole = document.documentElement;"
        "return { top, bottom, scrollY, innerHeight, wide: whole.scrollWidth, innerWidth };",
        width=width,
    )
    assert found["wide"] == found["innerWidth"] == width
    assert found["scrollY"] > 0 and 0 <= found["top"] < found["bottom"] < found["innerHeight"]
