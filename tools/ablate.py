"""Train configs with several seeds each and compare them, with error bars.

python tools/ablate.py configs/ablations/cues/*.yaml --baseline shuffled --seeds 3 --data-path datasets/cues

Differences are to the baseline, the first config unless ``--baseline`` names another. Finished runs are used
again, and interrupted ones go on where they were: the same command continues.
"""

import argparse
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import ROOT, check_environment

CORES = os.cpu_count() or 1


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("configs", nargs="+", metavar="CONFIG", help="YAML files")
    add("--baseline", metavar="NAME", help="a config's file without .yaml; default: the first")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... of each config; default: 3")
    add("--data-path", required=True, metavar="DIR", help="folder of the data")
    add("--output", default="output/ablations", metavar="DIR", help="default: %(default)s")
    devices = "cpu, mps, cuda:0 cuda:1 ..., each for one run at a time; default: cpu once for each core"
    add("--devices", nargs="+", default=["cpu"] * CORES, metavar="DEVICE", help=devices)
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="as those of main.py")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be 1 or more")
    names = [Path(config).stem for config in args.configs]
    if len(set(names)) < len(names):
        parser.error(f"these configs have the same name: {', '.join(names)}")
    args.baseline = args.baseline or names[0]
    if args.baseline not in names:
        parser.error(f"--baseline {args.baseline} is none of {', '.join(names)}")
    args.configs.sort(key=lambda config: Path(config).stem != args.baseline)
    return args


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    ARGS = parse_args()

from matplotlib.figure import Figure
from tqdm import tqdm

from config import APART, flat_config, get_config, image_shape
from logger import read_metrics
from models import build_model, count_macs
from tools import tables
from tools.tables import mean_and_interval
from training.guard import REQUEUE_EXIT_CODE
from utils import UserError, telling_errors


@dataclass(frozen=True, eq=False)
class Planned:
    """A run to be done: its config's file, its seed, its effective config and its command's words."""

    file: str
    seed: int
    config: object
    words: tuple

    @property
    def name(self):
        """Name of the config: that of its file."""
        return Path(self.file).stem

    @property
    def title(self):
        """What people call it."""
        return f"{self.name}, seed {self.seed}"

    @property
    def epochs(self):
        """How many the run has."""
        return self.config.TRAIN.EPOCHS

    @property
    def console(self):
        """The file of what it prints."""
        return os.path.join(self.config.OUTPUT, "console.txt")

    def rows(self):
        """The metrics of the epochs that are done."""
        rows = read_metrics(os.path.join(self.config.OUTPUT, "metrics.jsonl"))
        return [row for row in rows if row["epoch"] < self.epochs]


def main(args):
    """Train what is not finished, then compare and draw."""
    runs = plan_runs(args)
    for run in runs:
        require_same_config(run)
    left = [run for run in runs if len(run.rows()) < run.epochs]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished; output below {args.output}")
    failed = train(left, args) if left else []
    result = summarise(runs, args)
    folder = Path(args.output)
    (folder / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "ablation.md").write_text(ablation_table(result))
    draw(result).savefig(folder / "ablation.png", dpi=150)
    draw_minutes(runs).savefig(folder / "minutes.png", dpi=150)
    print(ablation_table(result))
    print(f"written: {folder / 'ablation.md'}, ablation.json, ablation.png and minutes.png")
    if failed:
        raise UserError("these runs failed: " + "; ".join(failed) + ". The same command tries them again")


def plan_runs(args):
    """The :class:`Planned` runs, those of the first seed first.

    Raises:
        UserError: a config that cannot be used, or two whose runs would share a folder.
    """
    runs, folders = [], {}
    for seed in range(args.seeds):
        for file in args.configs:
            opts = [*args.opts, "SEED", str(seed)]
            flags = dict(data_path=args.data_path, output=args.output, tag=f"seed{seed}")
            config = get_config(argparse.Namespace(cfg=file, opts=opts, **flags), "imagenet")
            other = folders.setdefault(config.OUTPUT, file)
            if other != file:
                name = config.MODEL.NAME
                raise UserError(f"{other} and {file} have the same MODEL.NAME, {name}: change one")
            words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]
            runs.append(Planned(file, seed, config, ("--cfg", file, *words, "--opts", *opts)))
    return runs


def require_same_config(run):
    """Refuse a run whose folder holds one of another config.

    Raises:
        UserError: it does; the message names the first key that differs.
    """
    path = os.path.join(run.config.OUTPUT, "config.yaml")
    if not os.path.exists(path):
        return
    found, wanted = (flat(config) for config in (get_config(argparse.Namespace(cfg=path)), run.config))
    for key in sorted(wanted.keys() | found.keys()):
        if key not in APART and wanted.get(key) != found.get(key):
            raise UserError(
                f"{run.config.OUTPUT} holds a run of another config: {key} is {found.get(key)!r} there and "
                f"{wanted.get(key)!r} in {run.file}; choose another --output, or remove that folder"
            )


def flat(config):
    """Keys of a config with their dots, and their values; the folder of the data as an absolute path."""
    values = flat_config(config)
    values["DATA.DATA_PATH"] = os.path.abspath(values["DATA.DATA_PATH"])
    return values


def train(runs, args):
    """Do runs, several at once; returns what failed, in words.

    A signal to this process stops the runs, which save, and ends it.
    """
    free, threads = list(args.devices), max(1, CORES // len(args.devices))
    waiting, working, failed, signals, told = list(runs), {}, [], [], False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    done, total = sum(len(run.rows()) for run in runs), sum(run.epochs for run in runs)
    with tqdm(total=total, initial=done, unit="epoch", disable=None) as bar:
        while working or (waiting and not signals):
            while free and waiting and not signals:
                run, device = waiting.pop(0), free.pop(0)
                working[start(run, device, threads)] = run, device
            time.sleep(1)
            if signals and not told:
                told = True
                for process in working:
                    process.terminate()
            for process in [process for process in working if process.poll() is not None]:
                run, device = working.pop(process)
                free.append(device)
                print(f"{run.title}: {len(run.rows())} of {run.epochs} epochs", file=sys.stderr)
                if process.returncode and not signals:
                    why = f"exit code {process.returncode}, see {run.console}: {last_line(run.console)}"
                    failed.append(f"{run.title} ({why})")
            bar.set_postfix_str("; ".join(run.title for run, _ in working.values()))
            bar.update(sum(len(run.rows()) for run in runs) - bar.n)
    if signals:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(REQUEUE_EXIT_CODE)
    return failed


def start(run, device, threads):
    """Start a run in a session of its own; returns its process."""
    os.makedirs(run.config.OUTPUT, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    kind, _, number = device.partition(":")
    if number:
        environment["CUDA_VISIBLE_DEVICES"] = number
    command = [sys.executable, str(ROOT / "main.py"), "--device", kind, *run.words]
    with open(run.console, "a", encoding="utf-8") as file:
        kept = dict(stdout=file, stderr=subprocess.STDOUT, env=environment)
        return subprocess.Popen(command, start_new_session=True, **kept)


def last_line(path):
    """The last line of a text file that is not empty."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


def summarise(runs, args):
    """What the runs have reached: a dict for ``ablation.json``, with a row for each config."""
    rows, baseline = [], {}
    for file in args.configs:
        of_file = [run for run in runs if run.file == file]
        done = {run.seed: run.rows() for run in of_file if len(run.rows()) == run.epochs}
        scores = {seed: scores_of(epochs) for seed, epochs in done.items()}
        best = {seed: max(values) for seed, values in scores.items()}
        last = {seed: values[-1] for seed, values in scores.items()}
        baseline = baseline or dict(best=best, last=last)
        config = of_file[0].config
        model = build_model(config)
        speeds = [row["images_per_second"] for epochs in done.values() for row in epochs]
        row = dict(
            name=of_file[0].name,
            file=file,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            macs=count_macs(model, image_shape(config)),
            images_per_second=statistics.median(speeds) if speeds else None,
        )
        for what, values in (("best", best), ("last", last)):
            row[what] = mean_and_interval(values)
            row[f"{what}_difference"] = mean_and_interval(differences(values, baseline[what]))
        rows.append(row)
    command = shlex.join(["python", "tools/ablate.py", *sys.argv[1:]])
    epochs = sorted({run.epochs for run in runs})
    return dict(command=command, seeds=args.seeds, epochs=epochs, rows=rows)


def scores_of(rows):
    """Top-1 after each epoch, of the averaged weights where there are some."""
    return [row.get("ema_acc1", row["acc1"]) for row in rows]


def differences(values, baseline):
    """The differences by seed, of the seeds that both have."""
    return {seed: value - baseline[seed] for seed, value in values.items() if seed in baseline}


def ablation_table(result):
    """A result in Markdown."""
    first, epochs = result["rows"][0]["name"], " or ".join(map(str, result["epochs"]))
    about = (
        f"Best top-1 in percent, {epochs} epochs, mean of {result['seeds']} seeds ± half of the 95% "
        f"interval of the mean (Student's t). Each difference to {first} pairs runs of the same seed. "
        "It is evidence only if its interval leaves out 0."
    )
    return "\n".join([f"`{result['command']}`", "", about, "", *tables.ablation(result), ""])


def draw(result):
    """A figure of the best top-1: a dot for each seed, the mean and its 95% interval, and differences."""
    rows = [row for row in result["rows"] if row["best"]["mean"] is not None]
    figure = Figure((10, 1.4 + 0.45 * len(rows)), layout="constrained")
    scores, gaps = figure.subplots(1, 2, sharey=True)
    for axes, key in ((scores, "best"), (gaps, "best_difference")):
        for place, row in enumerate(rows):
            colour = "#0072b2" if place == 0 else "#666666"
            numbers = row[key]["by_seed"]
            if axes is gaps and place == 0:
                continue
            axes.plot(list(numbers.values()), [place] * len(numbers), "o", color=colour, alpha=0.45, ms=5)
            mean, half = row[key]["mean"], row[key]["half"]
            axes.errorbar(mean, place, xerr=half, fmt="D", color=colour, capsize=4, ms=5)
        axes.spines[["top", "right"]].set_visible(False)
    gaps.axvline(0, color="black", lw=0.8, ls=":")
    scores.set_yticks(range(len(rows)), [row["name"] for row in rows])
    scores.invert_yaxis()
    scores.margins(y=0.15)
    scores.set_xlabel("best top-1, percent: seeds, mean, 95% interval")
    gaps.set_xlabel(f"difference to {result['rows'][0]['name']}, same seeds")
    return figure


def draw_minutes(runs):
    """A figure of top-1 against minutes of training: a line for each run, a colour for each config.

    Of an epoch that was interrupted, only the time after the resume is known.
    """
    figure = Figure((8, 4.5), layout="constrained")
    axes, names = figure.subplots(), list(dict.fromkeys(run.name for run in runs))
    for run in runs:
        rows, place = run.rows(), names.index(run.name)
        minutes = [seconds / 60 for seconds in itertools.accumulate(row["seconds"] for row in rows)]
        label = run.name if run.seed == 0 else None
        axes.plot(minutes, scores_of(rows), color=f"C{place}", lw=1.2, label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("minutes of training, without evaluation")
    axes.set_ylabel("top-1, percent")
    return figure


if __name__ == "__main__":
    with telling_errors():
        main(ARGS)
