"""What a run leaves for people: log files, TensorBoard scalars, metrics per epoch, and a picture of them."""

import contextlib
import json
import logging
import os
import sys

from termcolor import colored
from torch.utils.tensorboard import SummaryWriter

from utils import UserError


def create_logger(folder, rank):
    """A logger that writes ``folder/log_rank<rank>.txt``, and on rank 0 to the console, in colour.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"log_rank{rank}.txt")
        file = logging.FileHandler(path, mode="a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    logger = logging.getLogger("msg_transformer")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    where = "(%(filename)s %(lineno)d)"
    date = "%Y-%m-%d %H:%M:%S"
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        tty = sys.stdout.isatty()
        prefix = colored("[%(asctime)s]", "green", force_color=tty, no_color=not tty)
        prefix += " " + colored(where, "yellow", force_color=tty, no_color=not tty)
        console.setFormatter(logging.Formatter(f"{prefix}: %(levelname)s %(message)s", date))
        logger.addHandler(console)
    file.setFormatter(logging.Formatter(f"[%(asctime)s] {where}: %(levelname)s %(message)s", date))
    logger.addHandler(file)
    return logger


def make_folder(folder, logger):
    """Make the run's folder again where somebody removed it, and say so."""
    if not os.path.isdir(folder):
        logger.warning(f"{folder} was removed; making it again")
        os.makedirs(folder)


class RunRecord:
    """Metrics of a run, on rank 0: TensorBoard events, ``metrics.jsonl`` with a line per epoch,
    ``curves.png``.

    Args:
        folder: the run's output folder.
        start_epoch, start_update: where this process starts; what an interrupted run wrote beyond is dropped.
        logger: is told what cannot be written; a full disk does not end the run here.
    """

    def __init__(self, folder, start_epoch, start_update, logger):
        self.logger = logger
        self.path = os.path.join(folder, "metrics.jsonl")
        self.picture = os.path.join(folder, "curves.png")
        self.epochs = [row for row in read_metrics(self.path) if row["epoch"] < start_epoch]
        self.board = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=start_update)

    def scalars(self, update, **values):
        """Write TensorBoard scalars ``train/<name>`` of an update."""
        with self._told():
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, update)

    def end_epoch(self, update, **row):
        """Write the metrics of an epoch, which must include ``epoch``, and draw the curves again."""
        self.epochs.append(row)
        with self._told():
            make_folder(os.path.dirname(self.path), self.logger)
            temporary = f"{self.path}.tmp"
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(epoch) + "\n" for epoch in self.epochs)
            os.replace(temporary, self.path)
            draw_curves(self.epochs, self.picture)
        with self._told():
            for name, value in row.items():
                self.board.add_scalar(f"epoch/{name}", value, update)
            self.board.flush()

    def close(self):
        """Finish the TensorBoard file."""
        with self._told():
            self.board.close()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except OSError as error:
            self.logger.error(f"cannot write metrics: {error}; training goes on")


def read_metrics(path):
    """The rows of a ``metrics.jsonl``, none where there is no file; a torn line is left out."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
    return rows


def draw_curves(epochs, path):
    """Draw loss, accuracy and learning rate over the epochs to a PNG file.

    Args:
        epochs: rows with epoch (from 0), train_loss, val_loss, acc1, acc5 (percent), lr.
    """
    # pyplot is not used: it keeps global state and a figure for every call.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x = [row["epoch"] + 1 for row in epochs]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "o" if len(x) < 40 else ""
    loss.plot(x, [row["train_loss"] for row in epochs], marker=marker, ms=3, label="training (augmented)")
    loss.plot(x, [row["val_loss"] for row in epochs], marker=marker, ms=3, label="validation")
    loss.set(title="Cross entropy", ylim=(0, None))
    loss.legend()
    best = max(epochs, key=lambda row: row["acc1"])
    accuracy.plot(x, [row["acc1"] for row in epochs], marker=marker, ms=3, label="top-1")
    accuracy.plot(x, [row["acc5"] for row in epochs], marker=marker, ms=3, label="top-5")
    accuracy.axhline(best["acc1"], color="grey", lw=0.8, ls=":")
    title = f"Validation: best top-1 {best['acc1']:.2f}% (epoch {best['epoch'] + 1})"
    accuracy.set(title=title, ylabel="%")
    accuracy.legend(loc="lower right")
    rate.plot(x, [row["lr"] for row in epochs], marker=marker, ms=3, color="tab:green")
    rate.set(title="Learning rate at the end of the epoch", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epochs trained")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    temporary = f"{path}.tmp"
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
