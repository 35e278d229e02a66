"""What the benchmarks share: processes, timing in turn, tables, bars, and the files they write.

A result is what a benchmark writes as JSON. It holds ``machine``, ``command`` and ``rounds`` among others,
and ``settings``, which maps the name of a setting to its rows.
"""

import contextlib
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from launch import UserError


class Apart:
    """An object in a process of its own: thread pools and memory of others do not disturb it.

    Args:
        name: what messages call it.
        make: called in that process with ``arguments``, gives a context manager of the object.
    """

    def __init__(self, name, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name, (self._link, theirs) = name, context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method):
        """Call a method of the object, without arguments.

        Returns:
            The seconds that it took there, and what it returned.

        Raises:
            UserError: the object could not be made, or its process has ended.
        """
        with contextlib.suppress(OSError):  # the process has ended: its last word may tell why
            self._link.send(method)
        try:
            answer = self._link.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            raise UserError(f"{self.name}: its process ended with code {code} (memory?)") from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    def seconds(self, method):
        """The seconds that a method of the object takes; see :meth:`call`."""
        return self.call(method)[0]

    def close(self):
        """End the process."""
        self._link.close()
        self._process.join()


def _answer(link, make, arguments):
    """Make an object and call its methods as the other end of ``link`` asks, until that is closed."""
    try:
        with make(*arguments) as made, contextlib.suppress(EOFError):
            while True:
                method = link.recv()
                begin = time.perf_counter()
                result = getattr(made, method)()
                link.send((time.perf_counter() - begin, result))
    except UserError as error:
        link.send(error)


def peak_resident():
    """Peak resident memory of this process in MiB. That of getrusage begins with the parent's; Linux only."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) / 2**10 if found else 0.0


def seconds_of(function):
    """The seconds that a function takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def time_in_turn(functions, rounds, seconds_of=seconds_of):
    """Time functions in turn, so that a machine that slows down slows down all of them.

    Args:
        seconds_of: runs one of ``functions``, returns its seconds.

    Returns:
        For each function the quartiles (lower, median, upper) of its seconds, after two rounds of warm-up.
    """
    seconds = [[] for _ in functions]
    for done in range(-1, rounds + 1):
        for function, measured in zip(functions, seconds):
            taken = seconds_of(function)
            if done > 0:
                measured.append(taken)
        print(f"\r  round {max(done, 0)}/{rounds}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return [statistics.quantiles(measured, n=4) for measured in seconds]


def markdown(result, notes, columns, rows):
    """A result in Markdown: command, machine, notes, and a table whose first two columns are text."""
    paragraphs = [f"`{result['command']}`", result["machine"], *notes]
    table = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    table.insert(1, "|---|---" + "|---:" * (len(columns) - 2) + "|")
    return "\n\n".join([*paragraphs, "\n".join(table)]) + "\n"


class Bar(NamedTuple):
    """A bar of :func:`draw_bars`."""

    name: str
    is_ours: bool
    median: float
    quartiles: tuple  # (lower, upper)


def draw_bars(panels, label, form="{:.2f}"):
    """Draw medians as bars and quartiles as black lines, values at the right; a dotted line marks 1.

    Args:
        panels: the title of each panel, and its :class:`Bar` tuples.
        label: what the values are.
        form: how to write a value.
    """
    from matplotlib.figure import Figure

    figure = Figure((10, 0.8 + sum(0.5 + 0.3 * len(bars) for bars in panels.values())), layout="constrained")
    heights = [1 + len(bars) for bars in panels.values()]
    columns = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)
    colours = shades({bar.name: bar.is_ours for bars in panels.values() for bar in bars})
    for (axes,), (title, bars) in zip(columns, panels.items()):
        for place, bar in enumerate(bars):
            axes.barh(place, bar.median, color=colours[bar.name])
            axes.plot(bar.quartiles, [place, place], color="black", lw=1)
            beyond = dict(transform=axes.get_yaxis_transform(), va="center")  # x in widths of the panel
            axes.text(1.01, place, form.format(bar.median), **beyond)
        axes.axvline(1, color="black", lw=0.8, ls=":")
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, axes.get_xlim()[1])
    axes.xaxis.set_major_formatter(lambda value, _: form.format(value))
    axes.set_xlabel(f"{label}; lines: quartiles")
    return figure


def shades(is_ours):
    """Colours by name, given for each whether it is ours: blue or grey, the first of either the darkest."""
    from matplotlib.colors import to_rgb

    colours = {}
    for ours, colour in ((True, "tab:blue"), (False, "grey")):
        names = [name for name in is_ours if is_ours[name] == ours]
        for place, name in enumerate(names):
            white = place * min(0.35, 0.7 / len(names))
            colours[name] = tuple(white + (1 - white) * part for part in to_rgb(colour))
    return colours


def add_arguments(parser, default):
    """Add the flags that say what to write."""
    add = parser.add_argument
    add("--output", default=default, metavar="PATH", help="write PATH.json, PATH.md and PATH*.png")
    add(
        "--draw",
        nargs="+",
        metavar="JSON",
        help="write the .md and .png of these again, without measuring",
    )


def main(args, run, report):
    """Measure and write a result, or with ``--draw`` draw earlier ones again; errors end in one line.

    Args:
        run: makes a result, still without its command, of the arguments.
        report: makes of a result its table in Markdown, and its figures by how their file names end.
    """
    try:
        if args.draw:
            draw(args.draw, report)
            return
        result = run(args)
        result["command"] = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.output}.json")
        draw([f"{args.output}.json"], report)
    except UserError as error:
        sys.exit(f"error: {error}")


def draw(paths, report):
    """Write tables and figures beside the JSON files of results.

    Raises:
        UserError: a file cannot be read, or is not of this command.
    """
    for path in paths:
        try:
            result = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        command = Path(sys.argv[0]).name
        if not isinstance(result, dict) or command not in result.get("command", ""):
            raise UserError(f"{path} was not written by {command}")
        stem = path.removesuffix(".json")
        table, figures = report(result)
        Path(f"{stem}.md").write_text(table)
        for suffix, figure in figures.items():
            figure.savefig(f"{stem}{suffix}.png", dpi=120)
        print("wrote", ", ".join([f"{stem}.md", *(f"{stem}{suffix}.png" for suffix in figures)]))
