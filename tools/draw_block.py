"""Draw the MSG-Transformer block: local attention, messenger shuffle and MLP, as the README shows it.

python tools/draw_block.py docs/msg_block.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import check_environment


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="PNG file to write")
    return parser.parse_args()


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    parse_args()

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import BoxStyle, FancyBboxPatch, Polygon
from PIL import Image

INK, GREY, PALE = "#22262b", "#7a828c", "#dfe9f7"
SOURCES = ("#3274c8", "#e0782f", "#2e9b62", "#9a55b8")  # one colour for each window
ROWS = (25.5, 21.0, 16.5, 12.0)  # heights of the messengers in (b) and of the tokens in (c)


def main():
    """Write the figure."""
    file = parse_args().file
    canvas = FigureCanvasAgg(Figure(figsize=(9, 4.5), dpi=200))
    axes = canvas.figure.add_axes((0, 0, 1, 1), xlim=(0, 90), ylim=(0, 45), frame_on=False)  # in 0.1 inch
    for draw in (draw_flow, draw_attention, draw_shuffle, draw_mlp):
        draw(axes)
    pixels, size = canvas.print_to_buffer()  # 128 of its colours make the file a third of the size
    Image.frombytes("RGBA", size, pixels).convert("RGB").quantize(128).save(file, optimize=True)


def text(axes, x, y, words, size=9.5, **style):
    """Write centred text."""
    axes.text(x, y, words, **dict(dict(size=size, color=INK, ha="center", va="center"), **style))


def arrow(axes, *points, color=INK, lw=1.2):
    """Draw an arrow along a line of points."""
    axes.plot(*zip(*points[:-1]), color=color, lw=lw, solid_capstyle="butt", zorder=0)
    style = dict(arrowstyle="-|>", mutation_scale=9, color=color, lw=lw, shrinkA=0, shrinkB=0)
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def box(axes, x, y, w, h, **style):
    """Draw a rectangle, given its lower left corner, width and height."""
    style = dict(dict(fc="none", ec=INK, lw=1.0, boxstyle=BoxStyle.Round(0, 0)), **style)
    axes.add_patch(FancyBboxPatch((x, y), w, h, **style))


def messenger(axes, x, y, colors, radius=1.35):
    """Draw a messenger token: a disc with as many sectors as colours."""
    style = dict(startangle=90, counterclock=False, wedgeprops=dict(ec=INK, lw=0.8, zorder=3))
    axes.pie([1] * len(colors), colors=colors, radius=radius, center=(x, y), frame=True, **style)


def patch_tokens(axes, places, color, points=13.5):
    """Draw patch tokens: squares in a tint of their window's colour."""
    style = dict(s=points**2, marker="s", edgecolors=color, linewidths=0.8, zorder=3)
    for face in ("white", color + "50"):
        axes.scatter(*zip(*places), c=face, **style)


def draw_flow(axes, y=38.5, top=43.3):
    """The block as a line of steps with its two residual connections; every step stands over its panel."""
    arrow(axes, (1, y), (88, y), (89.2, y))
    steps = ((7.5, 5, "LN"), (17.5, 12.5, "local attention"), (27.4, 2.4, "+"), (70, 5, "LN"))
    for x, width, words in (*steps, (47.5, 15, "messenger shuffle"), (78.5, 8, "MLP"), (86, 2.4, "+")):
        height, face = min(width, 3.4), {"+": "white", "messenger shuffle": "#ffe9b8"}.get(words, PALE)
        box(axes, x - width / 2, y - height / 2, width, height, fc=face, boxstyle=BoxStyle.Round(0, 1.2))
        arrow(axes, (x - width / 2 - 1, y), (x - width / 2, y))
        text(axes, x, y, words)
    for start, end in ((2.8, 27.4), (65.2, 86)):
        arrow(axes, (start, y), (start, top), (end, top), (end, y + 1.2), color=GREY)
        text(axes, (start + end) / 2, top - 1.2, "residual", 8.5, color=GREY)


def draw_attention(axes):
    """(a) Four windows of a shuffle region, in each of which every token sees every other."""
    text(axes, 15, 33.5, "(a) inside each window", 10.5, weight="bold")
    box(axes, 2.6, 6.8, 24.8, 24.8, ec=GREY, ls=(0, (4, 3)))
    for window, color in enumerate(SOURCES):
        x, y = 9.15 + 11.7 * (window % 2), 19.5 - 11.7 * (window // 2)
        box(axes, x - 5.55, y, 11.1, 11.1, fc=color + "12", ec=color, lw=1.4)
        text(axes, x - 4.15, y + 9.6, window + 1, color=color, weight="bold")
        tokens = [(x, y + 9.2), *((x + dx, y + dy) for dy in (6.5, 4, 1.5) for dx in (-3, 0, 3))]
        for query in tokens:
            axes.plot(*zip(*(t for key in tokens for t in (query, key))), color=color, lw=0.5, alpha=0.25)
        messenger(axes, *tokens[0], (color,))
        patch_tokens(axes, tokens[1:], color)
    messenger(axes, 3.6, 4.6, (GREY,), 0.9)
    patch_tokens(axes, [(3.6, 2)], GREY, 11.5)
    box(axes, 14.4, 1.2, 2.4, 1.6, ec=GREY, ls=(0, (2.5, 1.5)))
    text(axes, 5.2, 3.2, "messenger (MSG) token\npatch token", 8.5, ha="left", linespacing=2.2)
    text(axes, 17.4, 1.9, "shuffle region", 8.5, ha="left")


def draw_shuffle(axes):
    """(b) The messengers of the region before and after: rows and columns of channel groups change places."""
    text(axes, 47.5, 33.5, "(b) between the windows of a region", 10.5, weight="bold")
    for left, after in ((34.3, False), (53.4, True)):
        text(axes, left + 4.5, 29.6, f"messengers {'after' if after else 'before'}", 9)
        for window, y in enumerate(ROWS):
            messenger(axes, left - 2, y, SOURCES if after else SOURCES[window : window + 1])
            for cell in range(4):
                source, group = (cell, window) if after else (window, cell)
                box(axes, left + 2.8 * cell, y - 1.5, 2.8, 3, fc=SOURCES[source], ec="white", lw=1.2)
                text(axes, left + 2.8 * cell + 1.4, y - 0.1, group + 1, 9, color="white", weight="bold")
    box(axes, 36.9, 10.1, 3.2, 17.3, lw=1.5, zorder=3)
    box(axes, 53.2, 19.1, 11.6, 3.8, lw=1.5, zorder=3)
    arrow(axes, (38.5, 10.1), (38.5, 8.4), (47.6, 8.4), (47.6, 21), (49.9, 21), lw=1.5)
    text(axes, 47.5, 4.5, "colour: source window; number: channel group", 8.5)
    text(axes, 47.5, 1.9, "group j of every window goes to messenger j", 8.5)


def draw_mlp(axes):
    """(c) One MLP, applied to every token by itself."""
    text(axes, 78.5, 33.5, "(c) each token alone", 10.5, weight="bold")
    text(axes, 78.5, 29.6, "channels C, 4C, C", 9)
    for y in ROWS:
        sides = [(x, y + h) for x, h in ((73.3, 0.7), (76.6, 1.7), (80.4, 1.7), (83.7, 0.7))]
        axes.add_patch(Polygon([*sides, *((x, 2 * y - top) for x, top in sides[::-1])], fc=PALE, ec=INK))
        text(axes, 78.5, y - 0.1, "MLP", 9)
        for x, start in ((69.7, 71.4), (87.3, 83.7)):
            arrow(axes, (start, y), (start + 1.9, y))
            messenger(axes, x, y, SOURCES) if y == ROWS[0] else patch_tokens(axes, [(x, y)], SOURCES[0])
    text(axes, 78.5, 3.2, "the same weights\nfor every token", 8.5, linespacing=2.2)


if __name__ == "__main__":
    main()
