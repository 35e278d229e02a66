"""Runs side by side: their folders, groups of one config, what these reached and how they differ."""

import math
import os
import statistics
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from config import APART, flat_text
from logger import read_metrics
from utils import UserError

# Of Okabe and Ito, told apart by colour-blind people too; the dashes tell more groups apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("", "6 3", "2 2", "8 2 2 2")
# Of the figures of an epoch, the one that counts is the first that is there; then its name.
SCORES = (
    ("ema_acc1", "top-1 (EMA)"),
    ("acc1", "top-1"),
    ("ema_box_AP", "box AP (EMA)"),
    ("box_AP", "box AP"),
)
PANELS = (("score", "Score, %"), ("train_loss", "Training loss"), ("val_loss", "Validation loss"))


@dataclass(frozen=True, eq=False)
class RunOfFolder:
    """What a run has left in its folder so far.

    Attributes:
        config: the keys with their dots, and their values.
        rows: the metrics of its epochs, in order; each has ``score`` too.
    """

    folder: str
    config: dict
    rows: list

    @property
    def epochs(self):
        """How many it is to train."""
        return self.config["TRAIN.EPOCHS"]

    def task(self):
        """What it trains, in a word."""
        return "detection" if self.config["DATA.DATASET"] == "coco" else "classification"

    def identity(self):
        """What runs of one config share: all keys but the seed and those that change no number."""
        return {
            key: value for key, value in self.config.items() if key not in (*APART, "SEED", "MODEL.RESUME")
        }


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one config, and the name by which pictures and tables call it."""

    name: str
    runs: list

    def best(self):
        """The highest score of each run."""
        return [max(row["score"] for row in run.rows) for run in self.runs]

    def last(self):
        """The latest score of each run."""
        return [run.rows[-1]["score"] for run in self.runs]

    def state(self):
        """How far its runs are, in words: 3 epochs, or 1 to 2 of 3 epochs."""
        done = sorted({len(run.rows) for run in self.runs})
        epochs = self.runs[0].epochs
        if done == [epochs]:
            return f"{epochs}"
        return f"{' to '.join(map(str, sorted({done[0], done[-1]})))} of {epochs}"

    def curve(self, figure):
        """A figure over the epochs, counted from 0: (epoch, mean, lowest, highest, runs).

        The mean is of the runs that have come so far.
        """
        values = {}
        for run in self.runs:
            for row in run.rows:
                value = row.get(figure, math.nan)
                if isinstance(value, (int, float)) and math.isfinite(value):
                    values.setdefault(row["epoch"], []).append(value)
        return [(x, statistics.fmean(y), min(y), max(y), len(y)) for x, y in sorted(values.items())]


def read_run(folder):
    """The :class:`RunOfFolder` of a folder.

    Raises:
        UserError: it holds no run, or one that has not finished an epoch.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder")
    path = os.path.join(folder, "config.yaml")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            config = flat_text(file.read(), path)
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: config.yaml: {error.strerror}") from error
    rows = {}
    for row in read_metrics(os.path.join(folder, "metrics.jsonl"), ("epoch", "train_loss")):
        names = [name for name, _ in SCORES if isinstance(row.get(name), (int, float))]
        if names:
            rows[row["epoch"]] = dict(row, score=row[names[0]])
    if not rows:
        raise UserError(f"{folder} has no finished epoch yet: its metrics.jsonl has no figures")
    return RunOfFolder(str(folder), config, [rows[epoch] for epoch in sorted(rows)])


def group_runs(runs):
    """The runs by config, in the order given: :class:`Group` objects with names that differ.

    A group is called as its ``MODEL.NAME``; those of the same name also by the keys in which they differ.
    """
    parts = []
    for run in runs:
        found = next((part for part in parts if part[0].identity() == run.identity()), None)
        if found is None:
            parts.append([run])
        else:
            found.append(run)
    groups = []
    for part in parts:
        name = part[0].config["MODEL.NAME"]
        alike = [other[0] for other in parts if other[0].config["MODEL.NAME"] == name]
        keys = differing(run.identity() for run in alike)
        values = [f"{key.split('.')[-1]} {part[0].config.get(key)}" for key in keys]
        more = f" and {len(values) - 2} more" if len(values) > 2 else ""
        groups.append(Group(", ".join([name, *values[:2]]) + more, part))
    return groups


def differing(configs):
    """The keys, in order, whose values are not the same in all of the flat configs."""
    configs = list(configs)
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


def differences(groups):
    """The keys in which groups differ: (key, value of each group as text)."""
    configs = [group.runs[0].identity() for group in groups]
    return [(key, [str(config.get(key, "-")) for config in configs]) for key in differing(configs)]


def score_name(groups):
    """What the score is called, of the first run."""
    row = groups[0].runs[0].rows[-1]
    return next(label for name, label in SCORES if name in row)


def style(number):
    """Colour and dashes, as SVG has them, of the group of a number."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def panels(groups):
    """The figures that are drawn, and their titles: those that any run has."""
    first = [(figure, f"{score_name(groups)}, %" if figure == "score" else title) for figure, title in PANELS]
    return [(figure, title) for figure, title in first if any(group.curve(figure) for group in groups)]


def draw_comparison(groups):
    """A figure of the curves: the mean of a group's runs, and the band from the lowest to the highest."""
    shown = panels(groups)
    lines = -(-len(groups) // 2)
    figure = Figure(figsize=(5 * len(shown), 4 + 0.25 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(len(group.curve("score")) for group in groups)
    for axes, (name, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for number, group in enumerate(groups):
            colour, dashes = style(number)
            x, mean, low, high, _ = zip(*group.curve(name)) if group.curve(name) else [()] * 5
            line = (0, tuple(map(float, dashes.split()))) if dashes else "-"
            marker = "o" if longest < 40 else ""
            runs = f"{len(group.runs)} run{'s' * (len(group.runs) > 1)}"
            label = f"{group.name} ({runs}, {group.state()} epochs)"
            axes.plot(x, mean, color=colour, ls=line, marker=marker, ms=3, label=label)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(groups)), fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def comparison_table(groups):
    """What the groups reached, as aligned text, and below it the keys in which they differ."""

    def spread(values):
        text = f"{statistics.fmean(values):.2f}"
        return text if len(values) < 2 else f"{text} ({min(values):.2f} to {max(values):.2f})"

    name = score_name(groups)
    rows = [("config", "runs", "epochs", f"best {name}", f"last {name}")]
    rows += [(g.name, f"{len(g.runs)}", g.state(), spread(g.best()), spread(g.last())) for g in groups]
    keys = [
        ("key", *(group.name for group in groups)),
        *((key, *values) for key, values in differences(groups)),
    ]
    return rows, keys


def aligned(rows):
    """Rows of texts as lines with columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows)
