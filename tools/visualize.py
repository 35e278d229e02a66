"""Show what the messengers of a classifier do on images: a sheet (PNG) for each, and figures over many.

python tools/visualize.py <checkpoint> photo.jpg photos/ --output messengers/ --window 2,3
python tools/visualize.py <checkpoint> photo.jpg --html
python tools/visualize.py <checkpoint> --curves <dataset>/val --output messengers/

A sheet has (a) what each messenger attends to, (b) where the content of one window has travelled after each
block, (c) which windows send it which channels, and (d) which messengers the class score depends on.
--curves prints tables and writes curves.json and curves.png: how well ablation, attention and gradients order
the messengers, and how much of the score crosses windows. docs/messengers.md explains all of them.
"""

import argparse
import base64
import io
import json
import logging
import math
import os
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import CHOICES

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#d9d9d9"  # blue and orange of Okabe and Ito
ACROSS = 6  # panels of (b) in a row
LEAST = 1e-4  # influence of the darkest colour


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", help="of a classifier; file or https address")
    add("images", nargs="*", metavar="IMAGE", help="files, folders, patterns")
    add("--output", default="messengers", metavar="DIR", help="sheets go here; default: messengers")
    window = "of the first stage, from 0,0; default: the one whose messenger the score depends on most"
    add("--window", type=pair, metavar="ROW,COLUMN", help=window)
    add("--size", type=pair, metavar="HEIGHT,WIDTH", help="pixels; default: DATA.IMG_SIZE of the config")
    add("--html", action="store_true", help="also write a page: point at a window, and see its reach")
    add("--curves", metavar="FOLDER", help="measure over the images of this folder, and those below")
    add("--most", type=int, default=200, metavar="N", help="images to measure, evenly chosen; default: 200")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one, else cpu")
    add("--cfg", metavar="FILE", help="config of a checkpoint that holds none")
    add("--weights", choices=CHOICES["TEST.WEIGHTS"], default="auto", help="as TEST.WEIGHTS; default: auto")
    args = parser.parse_args()
    if not args.images and not args.curves:
        parser.error("name images, or a folder with --curves")
    if args.most < 1 or (args.size and min(args.size) < 1):
        parser.error("--most and --size must be 1 or more")
    return args


def pair(text):
    """Two whole numbers, separated by a comma."""
    first, second = map(int, text.split(","))
    return first, second


if __name__ == "__main__":  # before what takes seconds to import
    ARGS = parse_args()

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import distributed
from analysis.messenger_curves import measure_curves, summarize
from analysis.messengers import check_messengers, examine, grids, influence
from analysis.report import drawable, shown, writing
from data.datasets import load_image
from data.transforms import build_transform, image_mode
from distributed import build_compute
from logger import ProgressBar
from models.from_checkpoint import build_ready, read_described
from tools import tables
from tools.predict import find_files
from utils import UserError, printable


def main(args):
    """Look, draw and write."""
    model, transform, names, mode = load_model(args)
    for path, name in sheet_names(images_of(args.images)) if args.images else ():
        image = transform(load_image(path, mode=mode)).to(next(model.parameters()))
        found = examine(model, image, args.window)
        target = os.path.join(args.output, name)
        draw_sheet(found, shown(image), title(found, path, names), target)
        print(f"{path}: {target}")
        if args.html:
            target = str(Path(target).with_suffix(".html"))
            page = page_data(model, image, found.window, title(found, path, names))
            with writing(target) as temporary:
                Path(temporary).write_text(build_page(page), encoding="utf-8")
            print(f"{path}: {target}")
    if args.curves:
        write_curves(model.float(), transform, mode, args)


def write_curves(model, transform, mode, args):
    """Measure over a folder, print tables, and write curves.json and curves.png."""
    paths, measured = images_of([args.curves]), []
    places = np.linspace(0, len(paths) - 1, min(args.most, len(paths))).round().astype(int)
    chosen = [paths[place] for place in places]
    shown = dict(unit="image", disable=None, file=sys.stderr, leave=True)
    with ProgressBar(None, len(chosen), **shown) as bar:
        for number, path in enumerate(bar.over(chosen)):
            image = transform(load_image(path, mode=mode)).to(next(model.parameters()))
            measured.append(measure_curves(model, image, seed=number))
    summary = summarize(measured)
    about = printable(f"`{args.checkpoint}` on {len(chosen):,} of {len(paths):,} images of `{args.curves}`")
    with writing(os.path.join(args.output, "curves.json")) as temporary:
        content = dict(checkpoint=args.checkpoint, folder=args.curves, of=len(paths), **summary)
        Path(temporary).write_text(json.dumps(content, indent=1), encoding="utf-8")
    draw_messenger_curves(summary, about, os.path.join(args.output, "curves.png"))
    print(f"{about}\n", *tables.orders(summary), "", *tables.exchange(summary), sep="\n")


def load_model(args):
    """The model of a checkpoint in float64, its transform, its class names, and Pillow's mode of images."""
    config, checkpoint = read_described(args.checkpoint, args.cfg, args.weights)
    config.defrost()
    config.DEVICE = args.device or ""
    device = build_compute(config).device
    model, transform, names = build_ready(config, checkpoint, args.checkpoint)
    check_messengers(model)
    if args.size:
        config.DATA.IMG_SIZE = list(args.size)
        transform = build_transform(config, is_train=False)
    names = names or list(map(str, range(config.MODEL.NUM_CLASSES)))
    return model.double().to(device), transform, names, image_mode(config.MODEL.MSG.IN_CHANS)


def images_of(words):
    """The image files that a user names; a UserError where one does not exist, or there are none."""
    paths, missing, _ = find_files(words)
    if missing:
        raise UserError("\n".join(missing.values()))
    if not paths:
        raise UserError(f"{', '.join(words)}: no images there")
    return paths


def sheet_names(paths):
    """Each path with the name of its sheet, no two alike."""
    taken = set()
    for path in paths:
        stem, number = Path(path).stem, 1
        while (name := f"{stem}{f'-{number}' if number > 1 else ''}.png") in taken:
            number += 1
        taken.add(name)
        yield path, name


def title(found, path, names):
    """What an image is, in a line."""
    share = found.scores.softmax(0)[found.target]
    score = f"score {found.scores[found.target]:.2f} (logit less the mean logit), probability {share:.3f}"
    what = drawable(f"{os.path.basename(path)}: {names[found.target]}")
    return f"{what}, {score}"


def page_data(model, image, window, head):
    """What a page of an image shows: the influence of each window, see visualize.html.

    Influence is kept in a byte: 0 for none, else 1 to 255, its logarithm from :data:`LEAST` to the largest.
    """
    places = grids(model, image.shape[1:])
    rows, columns = places[0].shown
    found = influence(model, image, [(i, j) for i in range(rows) for j in range(columns)])
    values = np.concatenate(
        [array(kind).reshape(rows * columns, -1) for kinds in found.values() for kind in kinds], 1
    )
    most = max(values.max(), 10 * LEAST)
    steps = np.log(values.clip(LEAST) / LEAST) / np.log(most / LEAST)
    levels = np.where(values > 0, 1 + np.round(254 * steps), 0).astype(np.uint8)
    colours = (255 * colormaps["cividis"](np.linspace(0, 1, 255))[:, :3]).round().astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(shown(image)).save(picture, format="PNG")
    blocks = [
        dict(
            name=f"stage {stage + 1}, block {block + 1}",
            tokens=places[stage].tokens,
            grid=[places[stage].rows, places[stage].columns],
            side=places[stage].side,
            stride=places[stage].side // places[stage].window_size,
            region=places[stage].region,
        )
        for stage, block in found
    ]
    return dict(
        title=head,
        size=list(image.shape[1:]),
        windows=[rows, columns],
        side=places[0].side,
        chosen=window,
        blocks=blocks,
        least=LEAST,
        most=float(most),
        influence=base64.b64encode(levels.tobytes()).decode(),
        colours=base64.b64encode(bytes(3) + colours.tobytes()).decode(),
        picture=f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}",
    )


def build_page(data):
    """A page that needs no other file."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # No name of a file or class can end the script that holds the data.
    return template.replace("@DATA@", json.dumps(data).replace("<", "\\u003c"))


WIDTH = 8.3  # inches of a picture, which at a README's width of 830 px makes a point 1.4 px

ATTENTION = (
    "(a) What each messenger attends to in its window, in the last block of each stage (mean of the heads)."
)
INFLUENCE = (
    "(b) Where the content of the chosen window has travelled after each block: change of tokens if it is\n"
    "blank. The square in the middle of a window is its messenger. Grey: not reached."
)
ROUTES = (
    "(c) Exchange in the first block of a stage, in the shuffle region of the chosen window: channels\n"
    "(from 0) that each window sends to the chosen one → channels that they become there. Colour: how\n"
    "far what is sent is from what a blank image sends (norm)."
)
ABLATION = (
    "(d) What the class score loses if the messenger of a window is silenced, in each stage. Right:\n"
    "gradient times input. It need not agree, and neither need the attention of the last stage in (a)."
)


def draw_sheet(found, pixels, head, path):
    """Draw the :class:`~analysis.messengers.Findings` of an image to a PNG file below a headline.

    ``pixels`` are the image as the model saw it, (height, width, 3), uint8.
    """
    stages, (height, width) = len(found.grids), found.gradient_map.shape
    lines = [*textwrap.wrap(head, 80), f"Chosen window: {found.window[0]},{found.window[1]} (outlined)"]
    tall = min(2, max(0.5, height / width))
    parts = [
        (draw_attention_maps, ATTENTION, 1, stages + 1, tall),
        (draw_influence, INFLUENCE, -(-len(found.influence) // ACROSS), ACROSS, tall),
        (draw_routes, ROUTES, 1, max(3, len(found.routes)), 1),
        (draw_ablation, ABLATION, 1, stages + 1, tall),
    ]
    if not found.routes:
        del parts[2]
    heights = [rows * (0.82 * shape * WIDTH / columns + 0.25) + 0.65 for *_, rows, columns, shape in parts]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, parse_math=False)
    for place, (draw, caption, rows, columns, _) in zip(
        figure.subfigures(len(parts), 1, height_ratios=heights), parts
    ):
        place.suptitle(caption, x=0.01, ha="left", fontsize=9.5)
        axes = place.subplots(rows, columns, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        draw(found, pixels, axes)
    save(figure, path)


def frame(ax, found, stage, words, whole=True):
    """Prepare axes for a stage: its windows, in pixels of the image, and the one of the chosen window.

    Args:
        whole: outline the stage's window that holds the chosen one, not the chosen one itself.
    """
    grid, (height, width) = found.grids[stage], found.gradient_map.shape
    ax.set_axis_on()
    ax.set(xlim=(0, grid.columns * grid.side), ylim=(grid.rows * grid.side, 0), aspect="equal")
    ax.set(xticks=[], yticks=[])
    ax.set_title(words, fontsize=8.5)
    if grid.rows * grid.side > height or grid.columns * grid.side > width:
        ax.set_facecolor("white")
        ax.patch.set(hatch="///", edgecolor=GREY)
        ax.add_patch(Rectangle((0, 0), width, height, facecolor="white", edgecolor="none", zorder=-1))
    for line, count in ((ax.axhline, grid.rows), (ax.axvline, grid.columns)):
        for i in range(1, count):
            line(i * grid.side, color="white", lw=1.6 if i % grid.region == 0 else 0.5, zorder=3)
    row, column = window_of(found, stage) if whole else found.window
    side = grid.side if whole else found.grids[0].side
    for line, colour in ((4, "white"), (2, "black")):  # shows on any colour
        style = dict(fill=False, edgecolor=colour, lw=line, zorder=4)
        ax.add_patch(Rectangle((column * side, row * side), side, side, **style))


def window_of(found, stage):
    """The window (row, column) of a stage that holds the chosen one."""
    return tuple(index >> stage for index in found.window)


def by_window(ax, values, grid, words=None, **style):
    """Draw an array (rows, columns) of values of windows, and in each its words."""
    rows, columns = values.shape
    extent = (0, columns * grid.side, rows * grid.side, 0)
    drawn = ax.imshow(values, extent=extent, zorder=0, **style)
    for (row, column), text in np.ndenumerate([] if words is None else words):
        place = (column + 0.5) * grid.side, (row + 0.5) * grid.side
        dark = np.dot(drawn.to_rgba(values[row, column])[:3], (0.3, 0.6, 0.1)) < 0.45
        style = dict(fontsize=7.5, color="white" if dark else "black", zorder=5, clip_on=True)
        ax.text(*place, text, ha="center", va="center", **style)
    return drawn


def array(tensor):
    """A tensor as float64 in numpy."""
    return tensor.detach().cpu().double().numpy()


def span_of(channels):
    """Channels as text: first to last."""
    first, last = channels[0], channels[-1]
    return f"{first}" if first == last else f"{first}–{last}"


def draw_attention_maps(found, pixels, axes):
    """Panels (a)."""
    height, width = found.gradient_map.shape
    extent = (0, width, height, 0)
    frame(axes[0], found, 0, "image, stage 1")
    axes[0].imshow(pixels, extent=extent, interpolation="nearest", zorder=0)
    norm = Normalize(0, max(float(weights.max()) for weights in found.attention))
    for stage, (ax, weights) in enumerate(zip(axes[1:], found.attention)):
        frame(ax, found, stage, f"stage {stage + 1}")
        drawn = ax.imshow(array(weights), "viridis", norm, extent=extent, zorder=0)
    bar(drawn, axes, "attention (even: 1)")


def draw_influence(found, pixels, axes):
    """Panels (b)."""
    height, width = found.gradient_map.shape
    most = max(float(kind.max()) for kinds in found.influence.values() for kind in kinds)
    style = dict(cmap="cividis", norm=LogNorm(LEAST, max(most, 10 * LEAST)))
    for ax, ((stage, block), kinds) in zip(axes, found.influence.items()):
        frame(ax, found, stage, f"stage {stage + 1}, block {block + 1}", whole=False)
        patches, messengers = map(array, kinds)
        grid = found.grids[stage]
        stride = grid.side / grid.window_size
        ax.add_patch(Rectangle((0, 0), width, height, facecolor=GREY, zorder=-0.5))
        values = np.ma.masked_equal(patches, 0).clip(LEAST)
        extent = (0, patches.shape[1] * stride, patches.shape[0] * stride, 0)
        drawn = ax.imshow(values, extent=extent, interpolation="nearest", zorder=0, **style)
        for (row, column), value in np.ndenumerate(messengers):
            colour = drawn.to_rgba(max(value, LEAST)) if value > 0 else GREY
            corner = (column + 0.35) * grid.side, (row + 0.35) * grid.side
            side = 0.3 * grid.side
            ax.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor="white", lw=0.8, zorder=5))
        ax.set(xlim=(0, grid.columns * grid.side), ylim=(grid.rows * grid.side, 0))
    bar(drawn, axes, "relative change")


def draw_routes(found, pixels, axes):
    """Panels (c)."""
    for ax, ((stage, block), route) in zip(axes, found.routes.items()):
        grid, mine = found.grids[stage], window_of(found, stage)
        frame(ax, found, stage, f"stage {stage + 1}, block {block + 1}")
        values = np.full((grid.rows, grid.columns), np.nan)
        words = np.full(values.shape, "", object)
        top, left = (index // grid.region * grid.region for index in mine)
        for part, strength in route:
            place = top + part.source // grid.region, left + part.source % grid.region
            values[place], words[place] = strength, f"{span_of(part.sent)}\n→ {span_of(part.received)}"
        norm = Normalize(0, np.nanmax(values) or 1)
        bar(by_window(ax, values, grid, words, cmap="Blues", norm=norm), ax, "difference from blank")
        sides = (np.array([left, left + grid.region, top + grid.region, top]) * grid.side).tolist()
        ax.set(xlim=sides[:2], ylim=sides[2:])


def draw_ablation(found, pixels, axes):
    """Panels (d)."""
    most = max(float(drops.abs().max()) for drops in found.drops) or 1.0
    colours = LinearSegmentedColormap.from_list("blue_to_orange", [BLUE, "white", ORANGE])
    decimals = max(2, 1 - math.floor(math.log10(most)))
    for stage, (ax, drops) in enumerate(zip(axes, map(array, found.drops))):
        frame(ax, found, stage, f"stage {stage + 1}")
        words = None
        if max(drops.shape) <= 5:
            words = np.vectorize(lambda drop: f"{round(drop, decimals) + 0.0:.{decimals}f}")(drops)
        drawn = by_window(ax, drops, found.grids[stage], words, cmap=colours, norm=Normalize(-most, most))
    bar(drawn, axes[:-1], "score lost")
    frame(axes[-1], found, 0, "gradient x input, by window")
    means = array(found.grids[0].means(found.gradient_map))
    most = float(abs(means).max()) or 1.0
    drawn = by_window(axes[-1], means, found.grids[0], cmap=colours, norm=Normalize(-most, most))
    bar(drawn, axes[-1], "score, per pixel")


def bar(drawn, axes, words):
    """A colour bar that says what its numbers are."""
    scale = drawn.figure.colorbar(drawn, ax=axes, fraction=0.06, pad=0.01, aspect=15, format="%.3g")
    scale.ax.tick_params(labelsize=7.5)
    scale.set_label(words, fontsize=8)


LINES = {  # colours of Okabe and Ito
    "ablation": dict(color=BLUE, marker="o"),
    "attention": dict(color=ORANGE, marker="s"),
    "gradient": dict(color="#009e73", marker="^"),
    "random": dict(color="#7f7f7f", linestyle="--"),
}


def draw_messenger_curves(summary, about, path):
    """Draw the curves and the shares of a summary to a PNG file."""
    stages, exchange = summary["curves"], summary["exchange"]
    heights = [2.6] * len(stages) + [0.17 * len(exchange) + 0.9]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    lines = textwrap.wrap(about.replace("`", ""), 80)
    figure.suptitle(drawable("\n".join(lines)), fontsize=11, parse_math=False)
    axes = figure.subplots(len(heights), 2, height_ratios=heights, sharey="row", squeeze=False)
    for row, (stage, of_stage) in zip(axes, stages.items()):
        row[0].set_ylabel("score of the predicted class")
        for ax, kind, left in zip(row, ("deletion", "insertion"), ("silenced", "left")):
            for name, kinds in of_stage["orders"].items():
                curve = kinds[kind]["curve"]
                label = f"{name}, area {kinds[kind]['area']:.2f}"
                ax.plot(np.linspace(0, 1, len(curve)), curve, label=label, markersize=4, **LINES[name])
            ax.set_title(f"stage {stage + 1}: {kind}", fontsize=10)
            ax.set_xlabel(f"share of messengers {left}")
            ax.legend(fontsize=8.5)
    kinds = dict(off="every window keeps its messenger", withheld="others send a blank image's")
    for ax, (kind, words) in zip(axes[-1], kinds.items()):
        shares = [100 * entry[kind]["share"] for entry in exchange.values()]
        ax.barh(list(exchange), shares, color=[ORANGE if "block" in name else BLUE for name in exchange])
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xlabel("share of the score lost (%)")
        ax.set_title(f"exchange off: {words}", fontsize=10)
        ax.tick_params(axis="y", labelsize=8.5)
    axes[-1, 0].invert_yaxis()  # shared
    save(figure, path)


def save(figure, path):
    """Write a figure as PNG."""
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=200, format="png")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    distributed.run_command(lambda: main(ARGS), "lower --size, or take --device cpu")
