"""Overlay the curves of runs: a colour for each config, a band over its seeds, and a table of what differs.

python tools/compare.py output/*/*
python tools/compare.py output/*/* --watch

Writes a PNG picture, and an HTML page that shows values under the pointer and needs no other file.
"""

import argparse
import html
import json
import os
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

SCRIPT = """
const NS = "http://www.w3.org/2000/svg", W = 460, H = 300, L = 52, R = 12, T = 12, B = 36;
const tip = document.getElementById("tip");
function make(parent, name, attributes, text) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= raw), found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(v);
  return found;
}
for (const panel of DATA) {
  const box = document.createElement("figure"), title = document.createElement("figcaption");
  title.textContent = panel.title;
  box.appendChild(title);
  document.getElementById("panels").appendChild(box);
  const svg = make(box, "svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H});
  const points = panel.curves.flatMap(c => c.points);
  const x0 = 0, x1 = Math.max(1, ...points.map(p => p[0]));
  let y0 = Math.min(...points.map(p => p[2])), y1 = Math.max(...points.map(p => p[3]));
  const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
  y0 -= pad; y1 += pad;
  const X = x => L + (x - x0) / (x1 - x0) * (W - L - R), Y = y => T + (y1 - y) / (y1 - y0) * (H - T - B);
  for (const v of ticks(y0, y1, 5)) {
    make(svg, "line", {x1: L, x2: W - R, y1: Y(v), y2: Y(v), stroke: "#ddd"});
    make(svg, "text", {x: L - 6, y: Y(v) + 4, "text-anchor": "end"}, +v.toPrecision(6));
  }
  for (const v of ticks(x0, x1, 6).filter(Number.isInteger))
    make(svg, "text", {x: X(v), y: H - B + 16, "text-anchor": "middle"}, v);
  make(svg, "text", {x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle"}, "epoch");
  for (const c of panel.curves) {
    const high = c.points.map(p => `${X(p[0])},${Y(p[3])}`), low = c.points.map(p => `${X(p[0])},${Y(p[2])}`);
    make(svg, "polygon", {points: [...high, ...low.reverse()].join(" "), fill: c.colour, opacity: 0.15});
    make(svg, "polyline", {points: c.points.map(p => `${X(p[0])},${Y(p[1])}`).join(" "), fill: "none",
      stroke: c.colour, "stroke-width": 2, "stroke-dasharray": c.dashes});
    if (c.points.length < 40)
      for (const p of c.points) make(svg, "circle", {cx: X(p[0]), cy: Y(p[1]), r: 2.5, fill: c.colour});
  }
  const rule = make(svg, "line", {y1: T, y2: H - B, stroke: "#666", visibility: "hidden"});
  svg.addEventListener("pointermove", event => {
    const area = svg.getBoundingClientRect(), at = (event.clientX - area.left) / area.width * W;
    const x = Math.min(x1, Math.max(x0, Math.round(x0 + (at - L) / (W - L - R) * (x1 - x0))));
    rule.setAttribute("x1", X(x)); rule.setAttribute("x2", X(x)); rule.setAttribute("visibility", "visible");
    tip.replaceChildren(document.createTextNode(`epoch ${x}`));
    for (const c of panel.curves) {
      const p = c.points.find(p => p[0] === x), line = document.createElement("div");
      const dot = document.createElement("span");
      dot.textContent = "\u25cf "; dot.style.color = c.colour;
      const range = p && p[4] > 1 ? ` (${p[2].toPrecision(5)} to ${p[3].toPrecision(5)}, ${p[4]} runs)` : "";
      line.append(dot, `${c.name}: ${p ? p[1].toPrecision(5) + range : "not yet"}`);
      tip.appendChild(line);
    }
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    rule.setAttribute("visibility", "hidden");
  });
}
"""
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px; color: #22262b; }
#panels { display: flex; flex-wrap: wrap; gap: 16px; } figure { margin: 0; } figcaption { font-weight: 600; }
svg text { font-size: 11px; fill: #444; } svg { max-width: 100%; }
#tip { position: fixed; background: #fff; border: 1px solid #999; padding: 6px 9px; pointer-events: none; }
table { border-collapse: collapse; margin: 12px 0 24px; } td, th { padding: 3px 14px 3px 0; text-align: left;
  border-bottom: 1px solid #ddd; vertical-align: top; }
"""


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
    colours = ["", *(style(number)[0] for number in range(len(groups)))]
    # A "</script>" in a name would end the script.
    script = f"const DATA = {json.dumps(data)};".replace("<", "\\u003c") + SCRIPT
    reload = f'<meta http-equiv="refresh" content="{max(1, round(seconds))}">' if seconds else ""
    runs = "".join(
        f"<tr><td>{html.escape(group.name)}</td><td>{html.escape(run.folder)}</td><td>{len(run.rows)} of "
        f"{run.epochs}</td></tr>"
        for group in groups
        for run in group.runs
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{reload}<title>Comparison of runs</title>'
        f'<style>{STYLE}</style><h1>Comparison of runs</h1>{html_table(rows, colours)}<div id="panels"></div>'
        f"<p>Lines are means over the runs of a config, bands go from the lowest to the highest.</p>"
        f"<h2>Keys that differ</h2>{html_table(keys, [''] * len(keys)) if len(keys) > 1 else '<p>None.</p>'}"
        f"<h2>Runs</h2><table><tr><th>config</th><th>folder</th><th>epochs</th></tr>{runs}</table>"
        f'<div id="tip" hidden></div><script>{script}</script></html>\n'
    )


def html_table(rows, colours):
    """Rows as an HTML table; a row's first cell begins with a dot of its colour, where it has one."""
    lines = []
    for number, (row, colour) in enumerate(zip(rows, colours)):
        kind = "td" if number else "th"
        dot = f'<span style="color:{colour}">&#9679;</span> ' if colour else ""
        cells = [f"<{kind}>{dot if i == 0 else ''}{html.escape(cell)}</{kind}>" for i, cell in enumerate(row)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
