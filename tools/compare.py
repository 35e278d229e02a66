"""Overlay the curves of runs: a colour for each config, a band over its seeds, and a table of what differs.

python tools/compare.py output/*/*
python tools/compare.py output/*/* --watch

Writes a PNG picture, and an HTML page that shows values under the pointer and needs no other file.
"""

import argparse
import html
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from comparison import (  # noqa: E402, below the path
    aligned,
    comparison_table,
    draw_comparison,
    group_runs,
    panels,
    read_run,
    style,
)
from utils import UserError, replacing  # noqa: E402


def main():
    args = parse_args()
    while True:
        groups, problems = read_groups(args.folders)
        text = write(groups, args)
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
        print(text, flush=True)
        if not args.watch:
            return
        time.sleep(args.every)


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of runs")
    parser.add_argument(
        "--output",
        default="output/compare",
        metavar="PATH",
        help="PATH.png and PATH.html; default: %(default)s",
    )
    parser.add_argument("--watch", action="store_true", help="go on, and read the runs again and again")
    parser.add_argument("--every", type=float, default=30, metavar="SECONDS", help="default: %(default)s")
    args = parser.parse_args()
    if not 0.1 <= args.every <= 86400:
        parser.error("--every must be between 0.1 and 86400 seconds")
    return args


def read_groups(folders):
    """The groups of the runs in folders, and what is wrong with the other folders.

    Raises:
        UserError: none of them holds a run.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            run = read_run(folder)
            if runs and run.task() != runs[0].task():
                raise UserError(f"{folder} is of {run.task()}, the first run of {runs[0].task()}")
            runs.append(run)
        except UserError as error:
            problems.append(str(error))
    if not runs:
        raise UserError(f"nothing to compare: {'; '.join(problems)}")
    return group_runs(runs), problems


def write(groups, args):
    """Write the picture and the page; returns what the terminal shows."""
    rows, keys = comparison_table(groups)
    try:
        os.makedirs(os.path.dirname(args.output) or os.curdir, exist_ok=True)
        with replacing(f"{args.output}.png") as temporary:
            draw_comparison(groups).savefig(temporary, dpi=120, format="png")
        with replacing(f"{args.output}.html") as temporary:
            Path(temporary).write_text(page(groups, args.every if args.watch else None), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {args.output}.png or .html: {error.strerror or error}") from error
    parts = [aligned(rows), *([aligned(keys)] if len(keys) > 1 else [])]
    return "\n\n".join([*parts, f"written: {args.output}.png and {args.output}.html"])


def page(groups, seconds=None):
    """The comparison as an HTML page.

    Args:
        seconds: after which a browser loads it again; None for never.
    """
    data = []
    for figure, title in panels(groups):
        curves = []
        for number, group in enumerate(groups):
            colour, dashes = style(number)
            curves.append(dict(name=group.name, colour=colour, dashes=dashes, points=group.curve(figure)))
        data.append(dict(title=title, curves=curves))
    rows, keys = comparison_table(groups)
    runs = [("config", "folder", "epochs")]
    runs += [(g.name, run.folder, f"{len(run.rows)} of {run.epochs}") for g in groups for run in g.runs]
    parts = {
        "@REFRESH@": f'<meta http-equiv="refresh" content="{max(1, round(seconds))}">\n' if seconds else "",
        "@RESULTS@": html_table(rows, list(map(style, range(len(groups))))),
        "@KEYS@": html_table(keys) if len(keys) > 1 else "<p>None.</p>",
        "@RUNS@": html_table(runs),
        # A "</script>" in a name would end the script.
        "@DATA@": json.dumps(data).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return re.sub("@[A-Z]+@", lambda place: parts[place[0]], template)


def html_table(rows, styles=()):
    """Rows as an HTML table, the first as its head.

    Args:
        styles: colour and dashes of the line that each row after the head is shown by, if any.
    """
    lines = []
    for number, row in enumerate(rows):
        kind, key = "td" if number else "th", ""
        if number and styles:
            colour, dashes = styles[number - 1]
            line = f'x2="33" y1="5" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"'
            key = f'<svg class="key" viewBox="0 0 33 10"><line {line}/></svg>'
        first, *others = map(html.escape, row)
        first = key + first.replace("_", "_<wbr>")  # where a narrow window may break a name
        cells = "".join(f"<{kind}>{cell}</{kind}>" for cell in (first, *others))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="table" tabindex="0"><table>{"".join(lines)}</table></div>'


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
