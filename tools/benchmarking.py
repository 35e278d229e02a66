"""What the benchmarks share: the machine, processes, timing in turn, and the files that they write.

Candidates take turns. A turn is at least a second of steps in a row, after two steps that do not count, so
that caches and threads are warm, as they are for somebody with many images. The first of these two is timed
apart: it is cold, as the first request after a pause is. A ratio is taken within a round; a figure is the
median over the rounds, with a 95% interval.

A file is ``<machine>/<date>-<what>.json``: a list with a result for each run of the command. A result holds
``machine``, ``versions``, ``commit``, ``date``, ``command`` and ``settings``. A setting is a list of rows,
and a row holds ``model`` and ``turns``, [steps, seconds, seconds of the cold step] of every round. Ratios are
computed when tables are written (``tables.py``).
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from utils import ROOT, UserError, telling_errors

TURN = 1.0  # seconds of a turn, at least
CLAIM = 0.07  # half of an interval's width over its median, up to which a figure is a claim


def machine(device):
    """What is measured on: processor, family and model, instruction sets, threads and, for cuda, device.

    Args:
        device: cpu or cuda.
    """
    import torch

    found = dict(processor=platform.processor() or platform.machine(), family="", model="", flags=[])
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", file.read(), re.MULTILINE))
        known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        flags = [flag for flag in known if flag in lines.get("flags", "").split()]
        numbers = dict(family=lines.get("cpu family", ""), model=lines.get("model", ""))
        found.update(numbers, processor=lines.get("model name", found["processor"]), flags=flags)
    found["threads"] = torch.get_num_threads()
    return dict(found, device=torch.cuda.get_device_name()) if device == "cuda" else found


def versions():
    """The versions of what computes."""
    import torch

    timm = importlib.metadata.version("timm")
    found = dict(python=platform.python_version(), torch=torch.__version__, timm=timm)
    return dict(found, cuda=torch.version.cuda) if torch.cuda.is_available() else found


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
        """Call a method of the object, without arguments, and return what it returns.

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

    def close(self):
        """End the process."""
        self._link.close()
        self._process.join()


def _answer(link, make, arguments):
    """Make an object and call its methods as the other end of ``link`` asks, until that is closed."""
    try:
        with make(*arguments) as made, contextlib.suppress(EOFError):
            while True:
                link.send(getattr(made, link.recv())())
    except UserError as error:
        link.send(error)


def peak_resident():
    """Peak resident memory of this process in MiB. That of getrusage begins with the parent's; Linux only."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) / 2**10 if found else 0.0


def turn(step, seconds=TURN):
    """Take steps in a row for at least ``seconds``, after two that do not count.

    Returns:
        (steps, their seconds, the seconds of the first step, which was cold).
    """
    begin = time.perf_counter()
    step()
    cold = time.perf_counter() - begin
    step()
    begin, steps, taken = time.perf_counter(), 0, 0.0
    while taken < seconds:
        step()
        steps, taken = steps + 1, time.perf_counter() - begin
    return steps, taken, cold


def time_in_turn(turns, rounds, peer):
    """Let candidates take turns, so that a machine that slows down slows down all of them.

    There are up to three times as many rounds while a ratio to the peer is not known to within ``CLAIM``.

    Args:
        turns: a function for each candidate, which takes a turn and returns (steps, seconds, ...).
        peer: the place of the candidate that the others are compared with.

    Returns:
        A list for each candidate, with what it returned in every round.
    """
    taken = [[] for _ in turns]
    for done in range(1, 3 * rounds + 1):
        for take, of_candidate in zip(turns, taken):
            of_candidate.append(list(take()))
        print(f"\r  round {done}/{rounds}", end="", flush=True, file=sys.stderr)
        if done >= rounds and all(is_claim(ratios(own, taken[peer])) for own in taken):
            break
    print(file=sys.stderr)
    return taken


def ratios(turns, peers):
    """The seconds of a step over those of the peer's, in every round."""
    return [
        (seconds / steps) / (peers_seconds / peers_steps)
        for (steps, seconds, *_), (peers_steps, peers_seconds, *_) in zip(turns, peers)
    ]


def cold_ratios(turns, peers):
    """The seconds of the cold step over those of the peer's, in every round that has them."""
    return [own[2] / peer[2] for own, peer in zip(turns, peers) if len(own) == len(peer) == 3]


def interval(values):
    """The median of some values and its 95% interval: (low, median, high).

    The interval lies between two of the ordered values, and assumes nothing of their distribution; of fewer
    than six values it is the whole range, and covers less than 95%.
    """
    ordered, count = sorted(values), len(values)
    outside, place = 0.0, 0
    while (outside := outside + 2 * math.comb(count, place) / 2**count) <= 0.05:
        place += 1
    first = max(place - 1, 0)
    return ordered[first], statistics.median(ordered), ordered[-1 - first]


def is_claim(values):
    """Whether the median of some values is known to within ``CLAIM``."""
    low, median, high = interval(values)
    return (high - low) / 2 <= CLAIM * median


def image_sides(text):
    """(height, width) in pixels from a side or HEIGHTxWIDTH, as flags take them."""
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if 0 in sides:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side in pixels nor HEIGHTxWIDTH")
    return sides


def add_arguments(parser, what):
    """Add the flags that say what to write.

    Args:
        what: the default of ``--name``.
    """
    folder = "to write <machine>/<date>-<name>.json in"
    parser.add_argument("--output", default="output/benchmarks", metavar="DIR", help=folder)
    parser.add_argument("--name", default=what, help="default: %(default)s")


def main(args, run):
    """Measure and write a result; errors end in one line.

    Args:
        run: makes a result of the arguments: ``machine`` (a dict), ``versions`` and ``settings``.
    """
    with telling_errors():
        result = run(args)
    command = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    result.update(date=datetime.date.today().isoformat(), commit=commit(), command=command)
    path = Path(args.output) / folder_of(result["machine"]) / f"{result['date']}-{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*earlier, result], indent=1) + "\n")
    print(f"wrote {path}")


def folder_of(machine):
    """The name of a machine's folder, such as ``amd-epyc-family26-model2``."""
    words = [machine.get("device") or re.sub(r"\(R\)|Processor", "", machine["processor"])]
    if "device" not in machine:
        words += [f"family{machine['family']}", f"model{machine['model']}"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def commit():
    """The commit of the working tree, with ``+`` where something is changed; empty outside a repository."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return ""
