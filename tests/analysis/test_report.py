"""What an evaluation leaves: calibration, classes, confusions, mistakes."""

import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Batches, digits_config, fill_weights, logged, write_images
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import normalize, to_tensor

from analysis import report
from analysis.report import draw_curves
from checkpoint import read_weights, save_checkpoint
from config import ConfigError
from data import build_loaders, loaders
from distributed import Compute, run_command
from main import evaluate
from models import build_model

CPU = Compute(torch.device("cpu"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, not written."""
    figures = []

    def save(figure, path, **_):
        figures.append(figure)
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def outcomes_of(logits, targets, batch=7):
    """What is collected of logits (N, classes) and targets (N,); image i is all of grey i."""
    collector = report.OutcomeCollector()
    for first in range(0, len(targets), batch):
        part = slice(first, first + batch)
        greys = torch.arange(len(targets))[part, None, None, None].expand(-1, 3, 4, 4) / 255
        images = normalize(greys.float(), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        collector.add(images, targets[part], logits[part])
    return collector.gather(range(len(targets)))


def random_outcomes(count, classes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=rng)
    logits = torch.randn(count, classes, generator=rng)
    logits[range(count), targets] += 1
    return outcomes_of(logits, targets), logits, targets


def test_the_calibration_error_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.uniform(0.1, 1, 300), [1.0, 1 / 15, 2 / 15, 0.4, 0.0]])
    right = rng.random(305) < confidence
    expected = 0.0
    for m in range(15):
        inside = [
            i
            for i, value in enumerate(confidence)
            if m / 15 < value <= (m + 1) / 15 or (m == 0 and value == 0)
        ]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            expected += len(inside) / 305 * abs(accuracy - mean)
    error, bins = report.calibration(confidence, right)
    assert error == pytest.approx(expected, rel=1e-12) and sum(row["images"] for row in bins) == 305
    assert report.calibration(np.full(4, 0.75), np.array([1, 1, 1, 0], bool))[0] == 0
    assert report.calibration(np.ones(4), np.zeros(4, bool))[0] == 1


def test_classes_and_confusions_are_those_of_scikit_learn():
    outcomes, logits, targets = random_outcomes(400, 6)
    predicted = logits.argmax(1)
    names = list("abcdefg")  # the last has no images
    rows = report.class_rows(outcomes, names)
    recall = recall_score(targets, predicted, average=None)
    precision = precision_score(targets, predicted, average=None)
    assert [row["accuracy"] for row in rows[:6]] == pytest.approx(recall.tolist())
    assert [row["precision"] for row in rows[:6]] == pytest.approx(precision.tolist())
    assert list(rows[6].values()) == ["g", 0, 0, 0, None, None]
    matrix = confusion_matrix(targets, predicted)
    pairs = report.confusions(outcomes)
    assert {(a, b): n for a, b, n in pairs} == {
        (a, b): matrix[a, b] for a in range(6) for b in range(6) if a != b and matrix[a, b]
    }
    counts = [number for *_, number in pairs]
    assert counts == sorted(counts, reverse=True)


def test_the_worst_mistakes_are_those_of_the_highest_loss_with_their_images():
    outcomes, logits, targets = random_outcomes(200, 5)
    losses = cross_entropy(logits.double(), targets, reduction="none")
    wrong = (logits.argmax(1) != targets).nonzero()[:, 0].tolist()
    expected = sorted(wrong, key=lambda i: -losses[i].item())[:24]
    assert [place for place, _ in outcomes.worst] == expected and len(wrong) > 24
    assert all((pixels == place).all() for place, pixels in outcomes.worst)
    np.testing.assert_allclose(outcomes.loss, losses.numpy(), rtol=1e-12)
    probabilities = logits.double().softmax(1)
    np.testing.assert_allclose(outcomes.confidence, probabilities.max(1).values.numpy(), rtol=1e-12)
    np.testing.assert_allclose(outcomes.truth, probabilities[range(200), targets].numpy(), rtol=1e-12)


def test_images_are_shown_as_they_were_before_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    image = normalize(to_tensor(pixels), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (report.shown(image) == pixels).all()
    for channels in (1, 4):
        grey = report.shown(torch.linspace(-3, 5, 4 * channels).reshape(channels, 2, 2))
        assert grey.shape == (2, 2, 3) and grey.min() == 0


def test_many_classes_are_narrowed_to_those_most_often_confused():
    pairs = [(900, 7, 50), (7, 900, 40), (3, 4, 30), (7, 12, 20), *((100 + i, 200 + i, 5) for i in range(50))]
    chosen = report.chosen_classes(pairs, 1000)
    assert chosen[:5] == [900, 7, 3, 4, 12] and len(chosen) == len(set(chosen)) == 30
    assert report.chosen_classes(pairs, 30) == list(range(30))
    assert len(report.chosen_classes([], 1000)) == 30


@pytest.mark.parametrize("classes, count", [(1, 3), (2, 5), (1000, 3000)])
def test_reports_of_few_and_of_many_classes_are_written(tmp_path, classes, count):
    outcomes, logits, targets = random_outcomes(count, classes)
    names = [f"class $_{i}^ {'long ' * 20}" for i in range(classes)]
    report.write_report(tmp_path, outcomes, names, [f"{i}.png" for i in range(count)], dict(acc1=50.0))
    content = json.loads((tmp_path / "eval.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(report.FILES)
    assert content["images"] == count and content["acc1"] == 50.0 and len(content["classes"]) == classes
    right = (logits.argmax(1) == targets).double()
    assert content["mean_class_accuracy"] == pytest.approx(
        np.mean([right[targets == number].mean() for number in targets.unique()])
    )
    if content["mistakes"]:
        place = outcomes.worst[0][0]
        assert content["mistakes"][0]["file"] == f"{place}.png"
        assert content["mistakes"][0]["target"] == names[targets[place]]
    for name in ("eval_confusions.png", "eval_mistakes.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 800 and len(np.unique(np.asarray(image.convert("L")))) > 2


def test_the_matrix_has_percentages_on_one_labelled_scale_and_grows_with_its_classes(drawn, tmp_path):
    for classes in (2, 10):
        outcomes, _, _ = random_outcomes(300, classes)
        report.draw_confusions(outcomes, [f"class $_{i}^" for i in range(classes)], tmp_path / "matrix.png")
    small, large = drawn
    assert small.get_figheight() < large.get_figheight() / 2
    matrix, scale = large.subfigs[0].axes
    (image,) = matrix.images
    assert image.norm.vmin == 0 and image.norm.vmax == 100 and "%" in scale.get_ylabel()
    rows = image.get_array()
    np.testing.assert_allclose(rows.sum(1), 100)
    texts = {text.get_position()[::-1]: text.get_text() for text in matrix.texts}
    assert texts[3, 3] == f"{rows[3, 3]:.0f}" and len(texts) == np.count_nonzero(rows)


def test_mistakes_say_which_class_was_predicted_and_which_is_the_target(monkeypatch):
    outcomes, logits, targets = random_outcomes(20, 3)
    monkeypatch.setattr(report, "contact_sheet", lambda tiles, *_: tiles)
    place, _ = outcomes.worst[0]
    shares = logits[place].double().softmax(0)
    said, meant = int(logits[place].argmax()), int(targets[place])
    lines = [f"predicted {shares[said]:.2f} {'abc'[said]}", f"target {shares[meant]:.2f} {'abc'[meant]}"]
    assert list(report.mistakes_sheet(outcomes, list("abc"))[0][1]) == lines


NO_UTF8 = os.fsdecode(b"\xc2\xed")


def test_reports_survive_names_that_are_no_utf_8(tmp_path):
    outcomes, _, _ = random_outcomes(40, 3)
    paths = [f"{NO_UTF8}/{i}.png" for i in range(40)]
    report.write_report(tmp_path, outcomes, ["a", NO_UTF8, "\u732b"], paths, dict(data=NO_UTF8))
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content["data"] == content["classes"][1]["class"] == NO_UTF8
    assert content["mistakes"][0]["file"] in paths
    assert all((tmp_path / name).exists() for name in report.FILES)


def test_pictures_have_escapes_for_what_the_font_lacks_and_nobody_is_warned(tmp_path, monkeypatch):
    assert report.drawable("caf\u00e9 e\u0301 \u0416\n\u05d0") == "caf\u00e9 e\u0301 \u0416\n\u05d0"
    escaped = report.drawable(f"a {NO_UTF8} \u732b\U0001f9a9")
    assert escaped == r"a \udcc2\udced \u732b" + r"\U0001f9a9"
    outcomes, _, _ = random_outcomes(40, 2)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in (["\u732b", NO_UTF8], [r"\u732b", r"\udcc2\udced"]):
            report.draw_confusions(outcomes, names, tmp_path / "drawn.png")
            sheets = [report.mistakes_sheet(outcomes, names), Image.open(tmp_path / "drawn.png")]
            sheets.append(report.caption(sheets[0], [(names[0], 0.5)]))
            found.append([np.asarray(sheet).tobytes() for sheet in sheets])
    assert found[0] == found[1]


def test_consoles_take_names_that_are_no_utf_8(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", console)
    run_command(lambda: print(f"{NO_UTF8}: \u732b", flush=True), "nothing")
    assert console.buffer.getvalue().decode() == "\\udcc2\\udced: \u732b\n"
    with pytest.raises(ConfigError, match=r"\\udcc2.* is no UTF-8.* choose another --output or --tag"):
        digits_config(tag=NO_UTF8)


def test_checkpoints_keep_class_names_that_are_no_utf_8(tmp_path):
    checkpoint = dict(model={"head.bias": torch.zeros(2)}, classes=[NO_UTF8, "\u732b"])
    save_checkpoint(str(tmp_path / f"{NO_UTF8}.pth"), checkpoint)
    assert read_weights(str(tmp_path / f"{NO_UTF8}.pth"))["classes"] == checkpoint["classes"]


def test_an_earlier_report_of_something_else_is_kept(tmp_path):
    outcomes, _, _ = random_outcomes(40, 3)
    for checkpoint in ("first.pth", "first.pth", "second.pth"):
        with logged() as lines:
            report.write_report(tmp_path, outcomes, list("abc"), list(range(40)), dict(checkpoint=checkpoint))
        assert any("earlier evaluation is now in" in line for line in lines) == (checkpoint == "second.pth")
    (kept,) = tmp_path.glob("eval_2*")
    assert sorted(path.name for path in kept.iterdir()) == sorted(report.FILES)
    found = [json.loads((folder / "eval.json").read_text())["checkpoint"] for folder in (kept, tmp_path)]
    assert found == ["first.pth", "second.pth"]


def test_images_that_cannot_be_read_are_left_out_and_the_others_keep_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "LARGEST_FAILED_SHARE", 1)
    write_images(tmp_path / "val", 3)
    (tmp_path / "val" / "b" / "0.png").write_text("no image")
    opts = ["DATA.ON_ERROR", "skip", "DATA.NUM_WORKERS", 0, "MODEL.NUM_CLASSES", 3]
    config = digits_config(*opts, data_path=str(tmp_path), eval=True)
    _, _, loader, _ = build_loaders(config)
    model, collector = fill_weights(build_model(config)), report.OutcomeCollector()
    figures = evaluate(model, loader, CPU, 100, collector)
    outcomes = collector.gather(loader.indices_seen())
    assert outcomes.index.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert outcomes.target.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert outcomes.loss.mean() == pytest.approx(figures["val_loss"], rel=1e-9)
    assert 100 * outcomes.right().mean() == pytest.approx(figures["acc1"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_figures_are_those_of_the_report_where_logits_are_equal(dtype):
    """Of equal logits that of the first class counts as the highest, whatever the batch."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 2, (600, 12), generator=rng).to(dtype)
    targets = torch.randint(12, (600,), generator=rng)
    order = [sorted(range(12), key=lambda i: -row[i]) for row in logits.tolist()]  # stable
    ranks = np.array([row.index(target) for row, target in zip(order, targets.tolist())])
    model = torch.nn.Linear(1, 1)
    model.forward = lambda images: images[:, 0, 0]
    for batch in (1, 40):
        collector = report.OutcomeCollector()
        parts = zip(logits.split(batch), targets.split(batch))
        batches = Batches((part[:, None, None].expand(-1, 3, 1, -1), target) for part, target in parts)
        figures = evaluate(model, batches, CPU, 100, collector)
        outcomes = collector.gather(range(600))
        assert (outcomes.right() == (ranks == 0)).all()
        assert figures["acc1"] == pytest.approx(100 * outcomes.right().mean())
        assert figures["acc5"] == pytest.approx(100 * (ranks < 5).mean())


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_curves_count_epochs_as_checkpoints_do(epochs, tmp_path, drawn):
    rows = [
        dict(epoch=i, train_loss=2.0, val_loss=1.0, acc1=50.0 + i, acc5=99.0, lr=1e-5) for i in range(epochs)
    ]
    draw_curves(rows, str(tmp_path / "curves.png"))
    drawn[0].draw_without_rendering()  # places titles
    assert len({axes.title.get_window_extent().y0 for axes in drawn[0].axes}) == 1
    _, accuracy, _ = drawn[0].axes
    (best,) = [line for line in accuracy.lines if line.get_label().startswith("best top-1")]
    assert list(best.get_xydata()[0]) == [epochs - 1, 49.0 + epochs]
    assert [line.get_label() for line in accuracy.lines[:2]] == ["top-1", "top-5"]
    assert list(accuracy.lines[0].get_xdata()) == list(range(epochs))
    assert accuracy.get_title().endswith(f"(epoch {epochs - 1})")
    low, high = accuracy.get_xlim()
    assert [tick for tick in accuracy.get_xticks() if low <= tick <= high] == list(range(epochs))
