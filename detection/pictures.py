"""Pictures of detections next to the ground truth, and curves of a run."""

import functools
import math
import os

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import ImageDraw
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from analysis.report import contact_sheet, enlarged, finish_curves, fitting, font, plot_best, plot_rows
from data.datasets import load_image
from utils import replacing

from .dataset import read_annotated

_COLOURS = [tuple(int(255 * part) for part in to_rgb(f"C{i}")) for i in range(10)]


def draw_detections(samples, names, path, smallest_score=0.5, turn=False):
    """Draw images with their objects, ground truth on the left and detections on the right.

    Args:
        samples: (image path, ground truth, detection), both dicts of boxes (N, 4), labels (N,) and masks
            (N, H, W) in pixels of the image; the detection has scores (N,), too.
        names: of the categories; label 1 is the first.
        path: PNG file to write.
        smallest_score: detections below are not drawn.
        turn: whether evaluation turned images as EXIF says.
    """
    read = functools.partial(load_image, max_pixels=math.inf, turn=turn)
    tiles = []
    for file, truth, detection in samples:
        image = read_annotated(read, file, truth["masks"].shape[1:])
        kept = detection["scores"] >= smallest_score
        found = {name: value[kept] for name, value in detection.items()}
        below = f"detections of score {smallest_score} and more: {kept.sum()}"
        tiles.append((annotate(image, truth, names), [f"{os.path.basename(file)}: ground truth"]))
        tiles.append((annotate(image, found, names), [below]))
    sheet = contact_sheet(tiles, "Ground truth and detections", 4 if len(samples) > 3 else 2, 480)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def annotate(image, detection, names):
    """A PIL image with the masks, boxes, names and scores of its detections, enlarged where it is small.

    A ``detection`` has boxes (N, 4) and masks (N, H, W) in pixels of the image, labels (N,), of which 1 is
    the first of ``names``, and scores (N,), which the ground truth has not.
    """
    image, factor = enlarged(image, 448)
    if not len(detection["labels"]):
        return image
    scores = detection.get("scores", torch.ones(len(detection["labels"]))).tolist()
    colours = [_COLOURS[(label - 1) % len(_COLOURS)] for label in detection["labels"].tolist()]
    masks = detection["masks"].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    picture = draw_segmentation_masks(pil_to_tensor(image), masks.bool(), alpha=0.4, colors=colours)
    picture = to_pil_image(picture)
    draw, size = ImageDraw.Draw(picture), min(32, max(12, max(image.size) // 48))
    letters, line = font(size), max(1, size // 6)
    boxes = (factor * detection["boxes"]).tolist()
    # The surest last, so that it is not covered.
    for i in sorted(range(len(boxes)), key=scores.__getitem__):
        draw.rectangle(boxes[i], outline=colours[i], width=line)
        text = names[detection["labels"][i] - 1] + (f" {scores[i]:.2f}" if "scores" in detection else "")
        text = fitting(text, letters, image.width - 2 * line)
        # Above the box where there is room, and inside the image.
        width, height = letters.getlength(text) + 2 * line, int(1.3 * size)
        x = min(max(0, boxes[i][0]), image.width - width)
        y = boxes[i][1] - height if boxes[i][1] >= height else max(0, boxes[i][1])
        draw.rectangle((x, y, x + width, y + height), fill=colours[i])
        draw.text((x + line, y + size // 10), text, fill="white", font=letters)
    return picture


def group_of_loss(name):
    """The group that a part of the loss is drawn with: proposals, classes, boxes or masks."""
    if name == "objectness" or name.startswith("rpn"):
        return "proposals"
    for word, group in (("mask", "masks"), ("box", "boxes")):
        if word in name:
            return group
    return "classes"


def draw_detection_curves(epochs, path):
    """Draw the losses and the average precision of a run over its epochs to a PNG file.

    Rows have epoch (from 0), train_loss, lr, box_AP, mask_AP (percent) and ``loss_<name>`` for every part of
    the loss, which are drawn in the groups of :func:`group_of_loss`.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    groups = ["proposals", "classes", "boxes", "masks"]
    panels = figure.subplot_mosaic([["total", "precision", "precision", "rate"], groups])
    plot_rows(panels["total"], epochs, train_loss="")
    panels["total"].set(title="Training loss", ylim=(0, None))
    for name in sorted({name for row in epochs for name in row if name.startswith("loss_")}):
        label = name.removeprefix("loss_")
        plot_rows(panels[group_of_loss(label)], epochs, **{name: label})
    for group in groups:
        panels[group].set(title=f"Its parts: {group}", ylim=(0, None))
        if panels[group].lines:
            panels[group].legend(fontsize=8)
    drawn = ("box_AP", "box_AP50", "mask_AP", "mask_AP50", "ema_box_AP", "ema_mask_AP")
    precision = panels["precision"]
    plot_rows(precision, epochs, **{name: name.replace("_", " ") for name in drawn})
    best, best_epoch = plot_best(precision, epochs, "box_AP", "box AP")
    precision.set(title=f"Best box AP {best:.1f}% (epoch {best_epoch})", ylabel="%", ylim=(0, 100))
    precision.legend(fontsize=8)
    finish_curves(figure, panels["rate"], epochs, best_epoch, path)
