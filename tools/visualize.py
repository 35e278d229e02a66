"""Show what the messengers of a classifier do on images: a sheet (PNG) for each, and figures over many.

python tools/visualize.py <checkpoint> photo.jpg photos/ --output messengers/ --window 2,3
python tools/visualize.py <checkpoint> photo.jpg --html
python tools/visualize.py <checkpoint> --curves <dataset>/val --output messengers/

A sheet has (a) what each messenger attends to, (b) where the content of one window has travelled after each
block, (c) which windows send it which channels, and (d) which messengers the class score depends on.
--curves writes curves.md, curves.json and curves.png: how well ablation, attention and gradients order the
messengers, and how much of the score crosses windows. docs/messengers.md explains all of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import check_environment  # noqa: E402, F401

# isort: split
import argparse
import base64
import contextlib
import io
import json
import logging
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import CHOICES

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#d9d9d9"  # blue and orange of Okabe and Ito
PANEL = 2.5  # inches
ACROSS = 7  # panels in a row, at most
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
    add(
        "--window",
        type=pair,
        metavar="ROW,COLUMN",
        help="of the first stage, from 0,0; default: the one whose messenger the score depends on most",
    )
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
    if args.size and min(args.size) < 1:
        parser.error(f"--size is {args.size[0]},{args.size[1]}: at least 1,1, in pixels")
    if args.most < 1:
        parser.error(f"--most is {args.most}: at least 1")
    return args


def pair(text):
    """Two whole numbers, separated by a comma."""
    first, second = map(int, text.split(","))
    return first, second


if __name__ == "__main__":
    parse_args()  # before what takes seconds to import

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, TwoSlopeNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import distributed
from data.datasets import load_image
from data.sources import find_files, is_video
from data.transforms import build_transform, image_mode
from launch import UserError, printable
from logger import ProgressBar
from models.messenger_curves import markdown, measure, summarize
from models.messengers import check_messengers, examine, grids, influence
from models.ready import build_ready, read_described
from report import drawable, shown
from utils import build_compute, replacing


def main():
    """Look, draw and write."""
    args = parse_args()
    model, transform, names, mode = load(args)
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
    """Measure over a folder and write curves.md, curves.json and curves.png."""
    paths = images_of([args.curves])
    chosen = [
        paths[i] for i in np.linspace(0, len(paths) - 1, min(args.most, len(paths))).round().astype(int)
    ]
    measured = []
    shown = dict(unit="image", disable=None, file=sys.stderr, leave=True)
    with ProgressBar(None, len(chosen), **shown) as bar:
        for number, path in enumerate(bar.over(chosen)):
            image = transform(load_image(path, mode=mode)).to(next(model.parameters()))
            measured.append(measure(model, image, seed=number))
    summary = summarize(measured)
    tables = markdown(summary)
    about = printable(f"`{args.checkpoint}` on {len(chosen):,} of {len(paths):,} images of `{args.curves}`")
    with writing(os.path.join(args.output, "curves.md")) as temporary:
        Path(temporary).write_text(f"# What messengers carry\n\n{about}\n\n{tables}", encoding="utf-8")
    with writing(os.path.join(args.output, "curves.json")) as temporary:
        content = dict(checkpoint=args.checkpoint, folder=args.curves, of=len(paths), **summary)
        Path(temporary).write_text(json.dumps(content, indent=1), encoding="utf-8")
    draw_curves(summary, about, os.path.join(args.output, "curves.png"))
    print(tables)


def load(args):
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
    """The image files that a user names.

    Raises:
        UserError: one does not exist, or there are none.
    """
    paths, missing, _ = find_files(words)
    if missing:
        raise UserError("\n".join(missing.values()))
    paths = [path for path in paths if not is_video(path)]
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
    row, column = found.window
    score = f"score {found.scores[found.target]:.2f} (logit less the mean logit), probability {share:.3f}"
    what = drawable(f"{os.path.basename(path)}: {names[found.target]}")
    return f"{what}, {score}. Chosen window: {row},{column} (black)"


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
        title=head.rpartition(". Chosen")[0],
        size=list(image.shape[1:]),
        windows=[rows, columns],
        side=places[0].side,
        chosen=window,
        blocks=blocks,
        least=LEAST,
        most=float(most),
        influence=base64_of(levels.tobytes()),
        colours=base64_of(bytes(3) + colours.tobytes()),
        picture=f"data:image/png;base64,{base64_of(picture.getvalue())}",
    )


def base64_of(content):
    """Bytes as text."""
    return base64.b64encode(content).decode("ascii")


def build_page(data):
    """A page that needs no other file."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # No name of a file or class can end the script that holds the data.
    return template.replace("@DATA@", json.dumps(data).replace("<", "\\u003c"))


def draw_sheet(found, pixels, head, path):
    """Draw a sheet to a PNG file.

    Args:
        found: the :class:`~models.messengers.Findings`.
        pixels: the image as the model saw it, (height, width, 3), uint8.
        head: the headline.
    """
    stages, blocks = len(found.grids), len(found.influence)
    of_influence = -(-blocks // ACROSS)
    rows = [1, of_influence, 1, 1] if found.routes else [1, of_influence, 1]
    across = max(min(ACROSS, max(blocks, 4)), stages + 2)
    heights = [count * (PANEL + 0.25) + 0.75 for count in rows]
    if found.routes:
        heights[2] += PANEL  # for what is written in it
    figure = Figure(figsize=(across * (PANEL + 0.25) + 0.4, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(head, x=0.01, ha="left", fontsize=13, parse_math=False)
    parts = iter(figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0])
    draw_attention(found, pixels, panels(next(parts), 1, across, ATTENTION))
    draw_influence(found, pixels, panels(next(parts), of_influence, across, INFLUENCE))
    if found.routes:
        draw_routes(found, pixels, panels(next(parts), 1, max(2, across // 2), ROUTES))
    draw_ablation(found, pixels, panels(next(parts), 1, across, ABLATION))
    save(figure, path)


ATTENTION = (
    "(a) What each messenger attends to in its window, in the last block of each stage, as the mean of the "
    "heads.\n1: as much as if it looked at all tokens of the window evenly."
)
INFLUENCE = (
    "(b) Where the content of the chosen window has travelled after each block: relative change of tokens "
    "if the window is blank.\nThe square in the middle of a window is its messenger. Grey: not reached."
)
ROUTES = (
    "(c) Exchange in the first block of a stage: which channels (from 0) each window sends to the chosen one "
    "(blue), and where they arrive.\nWidth of an arrow: how far it is from what a blank image sends."
)
ABLATION = (
    "(d) What the class score loses (orange) or gains (blue) if the messenger of a window is silenced in a "
    "stage.\nRight: maps of attention and of the gradient, which need not agree with it."
)


def panels(part, rows, columns, caption):
    """A list of axes in rows below a caption."""
    part.suptitle(caption, x=0.01, ha="left", fontsize=11)
    axes = part.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    return list(axes)


def frame(ax, found, stage, words, pixels=None):
    """Prepare axes for a stage: its windows, in pixels of the image, and the chosen window."""
    grid, (height, width) = found.grids[stage], found.attention_map.shape
    ax.set_axis_on()
    ax.set(xlim=(0, grid.columns * grid.side), ylim=(grid.rows * grid.side, 0), aspect="equal")
    ax.set(xticks=[], yticks=[])
    ax.set_title(words, fontsize=10)
    if grid.rows * grid.side > height or grid.columns * grid.side > width:
        box = Rectangle((0, 0), grid.columns * grid.side, grid.rows * grid.side)
        box.set(facecolor="white", edgecolor=GREY, hatch="///", linewidth=0, zorder=-2)
        ax.add_patch(box)
        ax.add_patch(Rectangle((0, 0), width, height, facecolor="white", edgecolor="none", zorder=-1))
    if pixels is not None:
        ax.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", zorder=0)
    for i in range(1, grid.rows):
        ax.axhline(i * grid.side, color="white", lw=1.6 if i % grid.region == 0 else 0.5, zorder=3)
    for i in range(1, grid.columns):
        ax.axvline(i * grid.side, color="white", lw=1.6 if i % grid.region == 0 else 0.5, zorder=3)
    outline(ax, found.grids[0], found.window)


def outline(ax, grid, window, colour="black"):
    """Outline a window, so that it shows on any colour."""
    corner = window[1] * grid.side, window[0] * grid.side
    for width, edge in ((4, "white"), (2, colour)):
        box = Rectangle(corner, grid.side, grid.side, fill=False, edgecolor=edge, lw=width, zorder=6)
        ax.add_patch(box)


def array(tensor):
    """A tensor as float64 in numpy."""
    return tensor.detach().cpu().double().numpy()


def blue_to_orange():
    """A colour map: blue, white, orange."""
    return LinearSegmentedColormap.from_list("blue_to_orange", [BLUE, "white", ORANGE])


def dimmed(pixels):
    """A paler image."""
    return (255 - 0.45 * (255 - pixels.astype(float))).astype(np.uint8)


def span(channels):
    """Channels as text: first to last."""
    first, last = channels[0], channels[-1]
    return f"{first}" if first == last else f"{first}–{last}"


def draw_attention(found, pixels, axes):
    """Panels (a)."""
    frame(axes[0], found, 0, "the image, windows of stage 1", pixels)
    for stage, weights in enumerate(found.attention):
        ax = axes[1 + stage]
        frame(ax, found, stage, f"stage {stage + 1}")
        weights = array(weights)
        height, width = weights.shape
        drawn = ax.imshow(weights, "viridis", Normalize(0, None), extent=(0, width, height, 0), zorder=0)
        bar(drawn, ax)


def draw_influence(found, pixels, axes):
    """Panels (b)."""
    height, width = found.attention_map.shape
    most = max(float(kind.max()) for kinds in found.influence.values() for kind in kinds)
    style = dict(cmap="cividis", norm=LogNorm(LEAST, max(most, 10 * LEAST)))
    for ax, ((stage, block), kinds) in zip(axes, found.influence.items()):
        frame(ax, found, stage, f"stage {stage + 1}, block {block + 1}")
        patches, messengers = map(array, kinds)
        grid = found.grids[stage]
        stride = grid.side / grid.window_size
        ax.add_patch(Rectangle((0, 0), width, height, facecolor=GREY, zorder=-0.5))
        values = np.ma.masked_equal(patches, 0).clip(LEAST)
        extent = (0, patches.shape[1] * stride, patches.shape[0] * stride, 0)
        drawn = ax.imshow(values, extent=extent, interpolation="nearest", zorder=0, **style)
        rows, columns = np.indices(messengers.shape).reshape(2, -1)
        size = (0.3 * PANEL * 72 / max(messengers.shape)) ** 2
        values = messengers.ravel()
        colours = np.where((values > 0)[:, None], drawn.to_rgba(values.clip(LEAST)), to_rgba(GREY))
        places = (columns + 0.5) * grid.side, (rows + 0.5) * grid.side
        ax.scatter(*places, size, colours, marker="s", edgecolors="white", linewidths=0.8, zorder=5)
        ax.set(xlim=(0, grid.columns * grid.side), ylim=(grid.rows * grid.side, 0))
    bar(drawn, axes)


def draw_routes(found, pixels, axes):
    """Panels (c)."""
    for ax, ((stage, block), route) in zip(axes, found.routes.items()):
        grid = found.grids[stage]
        mine = tuple(index >> stage for index in found.window)
        region, _ = grid.number_of(*mine)
        letters = max(len(span(part.received)) for part, _ in route) + 1
        size = min(9, 2 * PANEL * 72 / max(grid.rows, grid.columns) / (0.65 * letters))
        frame(ax, found, stage, f"stage {stage + 1}, block {block + 1}", dimmed(pixels))
        outline(ax, grid, mine, BLUE)
        most = max([strength for _, strength in route] + [1e-12])
        end = (mine[1] + 0.5) * grid.side, (mine[0] + 0.5) * grid.side
        for part, strength in route:
            row, column = grid.window_at(region, part.source)
            start = (column + 0.5) * grid.side, (row + 0.5) * grid.side
            if (row, column) != mine:  # a window sends to itself as well
                style = dict(arrowstyle="-|>", mutation_scale=8, lw=0.4 + 2.6 * strength / most)
                style.update(color=BLUE, alpha=0.75, shrinkA=4, shrinkB=2.2 * size)
                ax.annotate("", end, start, arrowprops=style, zorder=5)
            words = f"{span(part.sent)}\n→{span(part.received)}"
            box = dict(facecolor="white", alpha=0.8, pad=0.8, edgecolor="none")
            ax.text(
                *start, words, fontsize=size, ha="center", va="center", bbox=box, zorder=7, linespacing=0.95
            )


def draw_ablation(found, pixels, axes):
    """Panels (d)."""
    most = max(float(drops.abs().max()) for drops in found.drops) or 1.0
    height, width = found.attention_map.shape
    decimals = max(2, 1 - math.floor(math.log10(most)))
    for stage, drops in enumerate(found.drops):
        ax, grid, drops = axes[stage], found.grids[stage], array(drops)
        frame(ax, found, stage, f"stage {stage + 1}: messengers silenced")
        extent = (0, drops.shape[1] * grid.side, drops.shape[0] * grid.side, 0)
        style = dict(cmap=blue_to_orange(), norm=TwoSlopeNorm(0, -most, most), extent=extent)
        drawn = ax.imshow(drops, interpolation="nearest", zorder=0, **style)
        for place, drop in np.ndenumerate(drops):
            where = [(i + 0.5) * grid.side for i in place[::-1]]
            if max(drops.shape) <= 8:
                size = 9 if max(drops.shape) <= 4 else 6
                box = dict(facecolor="white", alpha=0.7, pad=0.6, edgecolor="none")
                ax.text(
                    *where,
                    f"{round(drop, decimals) + 0.0:.{decimals}f}",
                    ha="center",
                    va="center",
                    fontsize=size,
                    bbox=box,
                    zorder=7,
                )
    bar(drawn, axes[: len(found.drops)])
    ax = axes[len(found.drops)]
    frame(ax, found, 0, "attention, last block")
    style = dict(extent=(0, width, height, 0), zorder=0, interpolation="nearest")
    bar(ax.imshow(array(found.attention_map), "viridis", Normalize(0, None), **style), ax)
    ax = axes[len(found.drops) + 1]
    frame(ax, found, 0, "gradient x input, by window")
    means = array(found.grids[0].means(found.gradient_map))
    side, most = found.grids[0].side, float(abs(means).max()) or 1.0
    extent = (0, means.shape[1] * side, means.shape[0] * side, 0)
    style = dict(norm=TwoSlopeNorm(0, -most, most), extent=extent, zorder=0, interpolation="nearest")
    bar(ax.imshow(means, blue_to_orange(), **style), ax)


def bar(drawn, axes):
    """A colour bar."""
    some = axes if isinstance(axes, list) else [axes]
    some[0].figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02, shrink=0.9).ax.tick_params(labelsize=8)


LINES = {  # colours of Okabe and Ito
    "ablation": dict(color=BLUE, marker="o"),
    "attention": dict(color=ORANGE, marker="s"),
    "gradient": dict(color="#009e73", marker="^"),
    "random": dict(color="#7f7f7f", linestyle="--"),
}


def draw_curves(summary, about, path):
    """Draw the curves and the shares of a summary to a PNG file."""
    stages, exchange = summary["curves"], summary["exchange"]
    columns = len(stages) + 1
    figure = Figure(figsize=(4.2 * columns + 1, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(drawable(about.replace("`", "")), fontsize=11, parse_math=False)
    axes = figure.subplots(2, columns, squeeze=False)
    for column, (stage, of_stage) in enumerate(stages.items()):
        for row, kind in enumerate(("deletion", "insertion")):
            ax = axes[row, column]
            for name, kinds in of_stage["orders"].items():
                curve = kinds[kind]["curve"]
                label = f"{name}, area {kinds[kind]['area']:.2f}"
                ax.plot(np.linspace(0, 1, len(curve)), curve, label=label, markersize=4, **LINES[name])
            ax.set_title(f"stage {stage + 1}: {kind}", fontsize=10)
            ax.set_xlabel(f"share of messengers {('silenced', 'left')[row]}", fontsize=9)
            ax.set_ylabel("score of the predicted class", fontsize=9)
            ax.legend(fontsize=8)
    for row, (kind, words) in enumerate(
        dict(off="every window keeps its messenger", withheld="others send a blank image's").items()
    ):
        ax, shares = axes[row, -1], [100 * kinds[kind]["share"] for kinds in exchange.values()]
        ax.barh(range(len(shares)), shares, color=[ORANGE if "block" in name else BLUE for name in exchange])
        ax.set_yticks(range(len(shares)), exchange, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xlabel("share of the score lost (%)", fontsize=9)
        ax.set_title(f"exchange off: {words}", fontsize=10)
    save(figure, path)


def save(figure, path):
    """Write a figure as PNG."""
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


@contextlib.contextmanager
def writing(path):
    """Context that yields the name of a file to write, which becomes ``path`` in the end."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    distributed.run_command(main, "lower --size, or take --device cpu")
