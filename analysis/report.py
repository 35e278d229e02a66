"""What training and evaluation leave for people, and how predictions are drawn."""

import contextlib
import functools
import json
import logging
import math
import os
import time
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.functional import cross_entropy

from distributed import gather_lists
from logger import DETAIL
from utils import UserError, replacing

BAR, INK, PAPER = "#9dc3ea", "#22262b", "#ffffff"
FILES = ("eval.json", "eval_confusions.png", "eval_mistakes.png")
BINS = 15  # of the expected calibration error
MOST_DRAWN, MOST_LISTED, MOST_MISTAKES = 30, 20, 24  # classes, confusions, images

logger = logging.getLogger("msg_transformer")


@dataclass(frozen=True)
class Outcomes:
    """What came of the images of an evaluation, in the order of the dataset.

    Attributes:
        index: (N,) of each image in the dataset.
        target, predicted: (N,) classes.
        confidence: (N,) probability of the predicted class.
        truth: (N,) probability of the target.
        loss: (N,) cross entropy.
        worst: the mistakes of the highest loss, as (position in these arrays, image (H, W, 3) uint8).
    """

    index: np.ndarray
    target: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    truth: np.ndarray
    loss: np.ndarray
    worst: list

    def right(self):
        """(N,) whether the predicted class is the target."""
        return self.target == self.predicted


class OutcomeCollector:
    """Collects the :class:`Outcomes` of an evaluation while it runs, on every process those of its images."""

    def __init__(self):
        self.rows, self.worst, self.count = [], [], 0

    def add(self, images, targets, logits):
        """Take a batch: images (B, C, H, W) as the model saw them, targets (B,), logits (B, classes)."""
        probabilities = logits.double().softmax(1)
        predicted = logits.argmax(1)  # the first of equal ones
        confidence = probabilities.gather(1, predicted[:, None])[:, 0]
        truth = probabilities.gather(1, targets[:, None])[:, 0]
        losses = cross_entropy(logits.double(), targets, reduction="none")
        columns = targets.double(), predicted.double(), confidence, truth, losses
        self.rows.append(torch.stack(columns, 1).cpu().numpy())
        wrong = losses.masked_fill(predicted == targets, -1)
        highest, places = wrong.topk(min(MOST_MISTAKES, len(targets)))
        enough = self.worst[-1][0] if len(self.worst) == MOST_MISTAKES else -1
        for loss, i in zip(highest.tolist(), places.tolist()):
            if loss > enough:
                self.worst.append((loss, self.count + i, shown(images[i])))
        self.worst = sorted(self.worst, key=lambda entry: -entry[0])[:MOST_MISTAKES]
        self.count += len(targets)

    def gather(self, indices):
        """The :class:`Outcomes` of all processes on rank 0, None elsewhere; all of them must call it.

        Args:
            indices: of the images of this process in the dataset, in the order in which they were added.
        """
        rows = np.concatenate(self.rows) if self.rows else np.zeros((0, 5))
        own = [(indices[place], image) for _, place, image in self.worst]
        # Each a list, so that the parts of processes can be told apart.
        parts = gather_lists([np.column_stack([np.array(indices, dtype=np.float64).reshape(-1), rows])])
        worst = gather_lists(own)
        if parts is None:
            return None
        rows = np.concatenate(parts)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        index, target, predicted = rows[:, :3].T.astype(np.int64)
        confidence, truth, loss = rows[:, 3:].T
        place_of = {number: place for place, number in enumerate(index.tolist())}
        found = sorted(((place_of[number], image) for number, image in worst), key=lambda x: -loss[x[0]])
        return Outcomes(index, target, predicted, confidence, truth, loss, found[:MOST_MISTAKES])


def shown(image):
    """A normalised image (C, H, W) as people see it: (H, W, 3) uint8.

    Images of other than three channels are stretched to 0 to 255; of more, the first three are shown.
    """
    image = image.detach().float().cpu()
    if len(image) == 3:
        mean, std = (
            torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        image = image * std + mean
    else:
        image = image[:3] if len(image) > 3 else image[:1].expand(3, -1, -1)
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    return (255 * image).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def calibration(confidence, right, bins=BINS):
    """How far confidence is from accuracy: the expected calibration error (Guo et al., 2017), and its bins.

    Images are put into ``bins`` bins B_m of equal width by the probability of their predicted class, the
    upper end included. With n images in all, the error is sum_m |B_m| / n * |acc(B_m) - conf(B_m)|, where acc
    is the share of a bin that is predicted right and conf the mean of its probabilities.

    Args:
        confidence: (N,) probabilities of the predicted classes.
        right: (N,) whether these are the targets.

    Returns:
        The error, and for each bin that holds images a dict of ``above``, ``up_to``, ``images``,
        ``confidence`` and ``accuracy``.
    """
    edges = np.linspace(0, 1, bins + 1)
    numbers = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows, error = [], 0.0
    for number in np.unique(numbers):
        inside = numbers == number
        mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        error += inside.mean() * abs(accuracy - mean)
        ends = dict(above=round(float(edges[number]), 6), up_to=round(float(edges[number + 1]), 6))
        rows.append(dict(ends, images=int(inside.sum()), confidence=mean, accuracy=accuracy))
    return float(error), rows


def class_rows(outcomes, names):
    """What came of every class: name, images, those predicted right, times predicted, accuracy and precision.

    Accuracy is the share of its images that are predicted right, precision the share of its predictions that
    are; None where there are none.
    """
    count = len(names)
    images, predicted, right = (
        np.bincount(classes, minlength=count).tolist()
        for classes in (outcomes.target, outcomes.predicted, outcomes.target[outcomes.right()])
    )
    return [
        {
            "class": name,
            "images": there,
            "right": hits,
            "predicted": said,
            "accuracy": hits / there if there else None,
            "precision": hits / said if said else None,
        }
        for name, there, hits, said in zip(names, images, right, predicted)
    ]


def confusions(outcomes):
    """How often a class was taken for another: (target, predicted, images), the most frequent first."""
    wrong = ~outcomes.right()
    pairs = np.stack([outcomes.target[wrong], outcomes.predicted[wrong]], 1).reshape(-1, 2)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(*map(int, found[i]), int(counts[i])) for i in order]


def write_report(folder, outcomes, names, paths, about):
    """Write what an evaluation found to the files :data:`FILES` of a folder; on failure say so and go on.

    An earlier report that says something else is moved to ``eval_<its time>/`` first.

    Args:
        outcomes: the :class:`Outcomes` of all processes.
        names: of the classes.
        paths: the file of every index of the dataset.
        about: dict of what was evaluated and its figures, which ``eval.json`` begins with.
    """
    error, bins = calibration(outcomes.confidence, outcomes.right())
    rows, pairs = class_rows(outcomes, names), confusions(outcomes)
    content = dict(
        about,
        images=len(outcomes.index),
        mean_class_accuracy=float(np.mean([row["accuracy"] for row in rows if row["images"]])),
        ece=error,
        calibration=bins,
        classes=rows,
        confusions=[
            dict(target=names[target], predicted=names[predicted], images=number)
            for target, predicted, number in pairs[:100]
        ],
        mistakes=[_mistake(outcomes, place, names, paths) for place, _ in outcomes.worst],
    )
    target = os.path.join(folder, FILES[0])
    try:
        _keep_earlier(folder, content)
        with replacing(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        draw_confusions(outcomes, names, os.path.join(folder, FILES[1]))
        sheet = mistakes_sheet(outcomes, names)
        with replacing(os.path.join(folder, FILES[2])) as temporary:
            sheet.save(temporary, format="PNG")
    except OSError as problem:
        logger.error(f"cannot write the report of the evaluation to {folder}: {problem.strerror or problem}")
        return
    logger.info(f"calibration error (ECE) {error:.4f}", extra=DETAIL)
    logger.info(f"report: {target}, {', '.join(FILES[1:])}", extra=DETAIL)


@contextlib.contextmanager
def writing(path):
    """Context that yields the name of a file to write, which becomes ``path``, in a folder that is made.

    Raises:
        UserError: it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(path) or os.curdir, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _mistake(outcomes, place, names, paths):
    numbers = dict(confidence=outcomes.confidence, truth=outcomes.truth, loss=outcomes.loss)
    return dict(
        file=str(paths[outcomes.index[place]]),
        target=names[outcomes.target[place]],
        predicted=names[outcomes.predicted[place]],
        **{name: float(values[place]) for name, values in numbers.items()},
    )


def _keep_earlier(folder, content):
    """Move an earlier report of something else out of the way, and say so."""
    path = os.path.join(folder, FILES[0])
    if not os.path.exists(path):
        return
    with contextlib.suppress(ValueError), open(path, encoding="utf-8") as file:
        if json.load(file) == json.loads(json.dumps(content)):
            return
    made = time.strftime("%Y%m%d-%H%M%S", time.localtime(os.path.getmtime(path)))
    kept, number = os.path.join(folder, f"eval_{made}"), 1
    while os.path.exists(kept):
        kept, number = os.path.join(folder, f"eval_{made}-{number}"), number + 1
    os.mkdir(kept)
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(folder, name), os.path.join(kept, name))
    logger.info(f"the report of an earlier evaluation is now in {kept}")


def chosen_classes(pairs, count, most=MOST_DRAWN):
    """The classes that a picture of confusions shows: all, or those of the most frequent confusions.

    Args:
        pairs: what :func:`confusions` returns.
        count: of all classes.
    """
    if count <= most:
        return list(range(count))
    chosen = dict.fromkeys(number for target, predicted, _ in pairs for number in (target, predicted))
    return list(chosen)[:most] or list(range(most))


def draw_confusions(outcomes, names, path):
    """Draw which classes are taken for which to a PNG file, above the most frequent confusions.

    Rows of the matrix are percentages of the images of a class; beyond :data:`MOST_DRAWN` classes it shows
    those of the most frequent confusions, and the rest in a last column. It is as large as its classes need.
    """
    pairs = confusions(outcomes)
    classes = chosen_classes(pairs, len(names))
    all_shown, side = len(classes) == len(names), len(classes)
    place_of = np.full(len(names), side)
    place_of[classes] = np.arange(side)
    counts = np.zeros((side + 1, side + 1), np.int64)
    np.add.at(counts, (place_of[outcomes.target], place_of[outcomes.predicted]), 1)
    counts = counts[:side] if not all_shown else counts[:side, :side]
    shares = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    listed = pairs[:MOST_LISTED]

    cell = min(1.2, 5.8 / counts.shape[1])  # inches
    size = min(9, 35 * cell)  # points
    heights = cell * side + 2, 0.2 * len(listed) + 0.9
    figure = Figure(figsize=(8.3, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    # Each with margins of its own, which leaves the matrix more room.
    matrix, bars = (part.subplots() for part in figure.subfigures(2, 1, height_ratios=heights))
    # The root shows mistakes of a few percent, on the scale of the diagonal.
    drawn = matrix.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    for row, column in zip(*counts.nonzero()):
        value = shares[row, column]
        colour = "white" if value > 40 else "black"
        text = f"{value:.0f}" if value >= 0.5 else "<1"
        matrix.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    scale = matrix.figure.colorbar(drawn, ax=matrix, ticks=[0, 5, 25, 50, 100])
    scale.set_label("% of the target's images")
    labels = [_short(names[number]) for number in classes]
    matrix.set_yticks(range(side), labels, fontsize=size, parse_math=False)
    columns = labels if all_shown else [*labels, "other classes"]
    matrix.set_xticks(range(len(columns)), columns, fontsize=size, rotation=90, parse_math=False)
    matrix.set(xlabel="predicted", ylabel="target")
    accuracy = f"top-1 {100 * outcomes.right().mean():.2f}% of {len(outcomes.index):,} images"
    what = "all classes" if all_shown else f"{side} of {len(names):,} classes, the most confused"
    matrix.figure.suptitle(f"{accuracy}; {what}", fontsize=11)

    drawn = bars.barh(range(len(listed)), [number for *_, number in listed], color="#6baed6")
    bars.bar_label(drawn, padding=2, fontsize=9)
    texts = [f"{_short(names[target])} → {_short(names[said])}" for target, said, _ in listed]
    bars.set_yticks(range(len(listed)), texts, fontsize=9, parse_math=False)
    bars.invert_yaxis()
    bars.xaxis.get_major_locator().set_params(integer=True)
    title = "most frequent confusions (target → predicted)" if listed else "no mistakes"
    bars.figure.suptitle(title, fontsize=11)
    bars.margins(x=0.08)
    bars.set_xlabel("images")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png")


def _short(name, most=26):
    name = drawable(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def mistakes_sheet(outcomes, names):
    """The mistakes of the highest loss as a PIL image, each as the model saw it, above both classes."""
    wrong = int((~outcomes.right()).sum())
    title = f"{len(outcomes.worst)} of {wrong:,} mistakes, by loss, with the probabilities of both classes"
    tiles = []
    for place, pixels in outcomes.worst:
        said, meant = names[outcomes.predicted[place]], names[outcomes.target[place]]
        below = (
            f"predicted {outcomes.confidence[place]:.2f} {said}",
            f"target {outcomes.truth[place]:.2f} {meant}",
        )
        tiles.append((Image.fromarray(pixels), below))
    return contact_sheet(tiles, title if wrong else "no mistakes", 4)


def contact_sheet(tiles, title, columns, side=208):
    """PIL images in rows below a title, as one.

    Args:
        tiles: (PIL image, lines of text below it) each, two lines at most.
        side: of a tile, in pixels; images are made to fit.
    """
    size = 14
    letters, line = font(size), int(1.4 * size)
    rows = -(-len(tiles) // columns)
    height = side + 2 * line + 10
    sheet = Image.new("RGB", (columns * (side + 8) + 8, 2 * line + rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, line // 2), title, fill=INK, font=letters)
    for i, (image, lines) in enumerate(tiles):
        x, y = 8 + i % columns * (side + 8), 2 * line + i // columns * height
        image, _ = enlarged(image, side)
        image.thumbnail((side, side))
        sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
        for number, text in enumerate(lines):
            place = (x, y + side + 2 + number * line)
            draw.text(place, fitting(text, letters, side), fill=INK, font=letters)
    return sheet


def font(size):
    """The font of all text on images, which comes with matplotlib; ``size`` in pixels."""
    return ImageFont.truetype(_font_file(), size)


def _font_file():
    return os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@functools.cache
def _characters():
    return FT2Font(_font_file()).get_charmap().keys()


def drawable(text):
    """The text of a picture, with an escape (``\\u732b``) for each character that the font does not have."""
    known = (ord(letter) in _characters() or letter.isspace() for letter in text)
    return "".join(c if k else c.encode("ascii", "backslashreplace").decode() for c, k in zip(text, known))


def enlarged(image, side=224):
    """A PIL image by a whole factor larger, so that its long side has about ``side`` pixels; (image, factor).

    Pixels stay squares. Larger images, and those of extreme shapes, return as they are.
    """
    factor = max(1, round(side / max(image.size)))
    if factor == 1 or min(image.size) * factor < 16:
        return image, 1
    return image.resize([factor * n for n in image.size], Image.Resampling.NEAREST), factor


def caption(image, scores):
    """A PIL image, enlarged where it is small, above the classes that were predicted.

    Args:
        scores: (name, score) from the best down; the score, 0 to 1, is also the length of a bar.
    """
    image, _ = enlarged(image)
    width = max(224, image.width)
    size = min(40, max(13, width // 32))
    height, letters = int(1.5 * size), font(size)
    sheet = Image.new("RGB", (width, image.height + height * len(scores) + size // 2), PAPER)
    sheet.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    numbers = max([letters.getlength(f"{score:.3f}") for _, score in scores], default=0)
    for i, (name, score) in enumerate(scores):
        top = image.height + size // 4 + i * height
        draw.rectangle((0, top + 1, score * width, top + height - 1), fill=BAR)
        draw.text((size // 3, top + size // 5), f"{score:.3f}", fill=INK, font=letters)
        room = width - numbers - size
        draw.text((numbers + size, top + size // 5), fitting(name, letters, room), fill=INK, font=letters)
    return sheet


def fitting(text, letters, width):
    """The text, or as much of its beginning as fits into ``width`` pixels of the font ``letters``."""
    text = drawable(" ".join(text.split()))
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def draw_curves(epochs, path):
    """Draw loss, accuracy and learning rate over the epochs to a PNG file.

    Rows have epoch (from 0), train_loss, val_loss, acc1, acc5 (percent), lr; of an averaged model also
    ema_acc1.
    """
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    plot_rows(loss, epochs, train_loss="training (augmented)", val_loss="validation")
    loss.set(title="Cross entropy", ylim=(0, None))
    plot_rows(accuracy, epochs, acc1="top-1", acc5="top-5", ema_acc1="top-1 of the average (EMA)")
    best, best_epoch = plot_best(accuracy, epochs, "acc1", "top-1")
    accuracy.set(title=f"Validation: best top-1 {best:.2f}% (epoch {best_epoch})", ylabel="%")
    for axes in (loss, accuracy):
        axes.legend(fontsize=8.5)
    finish_curves(figure, rate, epochs, best_epoch, path)


def plot_rows(axes, epochs, **labels):
    """Plot figures of epochs by name, each with its label, except those that no epoch has."""
    x, marker = [row["epoch"] for row in epochs], "o" if len(epochs) < 40 else ""
    for name, label in labels.items():
        if any(name in row for row in epochs):
            axes.plot(x, [row.get(name, math.nan) for row in epochs], marker=marker, ms=3, label=label)


def plot_best(axes, epochs, name, words):
    """Mark the best figure of a name, of the weights or of their average; returns it and its epoch."""
    scores = [max(row[name], row.get(f"ema_{name}", 0)) for row in epochs]
    best, epoch = max(scores), epochs[scores.index(max(scores))]["epoch"]
    axes.plot(epoch, best, "*", ms=11, color="black", label=f"best {words}, epoch {epoch}")
    return best, epoch


def finish_curves(figure, rate, epochs, best_epoch, path):
    """Draw the learning rate in the axes ``rate``, finish all axes of a figure of curves, and write a PNG."""
    x = [row["epoch"] for row in epochs]
    rate.plot(x, [row["lr"] for row in epochs], marker="o" if len(x) < 40 else "", ms=3, color="black")
    rate.set(title="Learning rate, epoch's end", ylim=(0, None))
    rate.yaxis.set_major_formatter("{x:.3g}")  # not 0.2 and a factor above the axis, which moves the title
    for axes in figure.axes:
        axes.set_title(axes.get_title(), fontsize=10)
        axes.set_xlabel("epoch, as in checkpoint names", fontsize=9)
        axes.axvline(best_epoch, color="black", lw=0.8, ls=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(x) < 3:  # no ticks between epochs, and none for epochs to come
            axes.set(xticks=x, xlim=(x[0] - 0.5, x[-1] + 0.5))
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
