"""What a run leaves for people: log files, TensorBoard scalars, metrics per epoch, and a picture of them."""

import contextlib
import datetime
import errno
import json
import logging
import logging.handlers
import math
import os
import shutil
import sys

from termcolor import colored
from torch.utils.tensorboard import SummaryWriter

from utils import UserError, replacing

DRAWN = ("epoch", "train_loss", "val_loss", "acc1", "acc5", "lr")  # of the metrics of an epoch
LONG = 60  # seconds from which an epoch or an evaluation shows its progress on the console

# ``extra`` of lines that the console leaves out: always, or while training.
FILE, DETAIL = dict(kind="file"), dict(kind="detail")

logger = logging.getLogger("msg_transformer")


class LogFile(logging.handlers.WatchedFileHandler):
    """A log file that is opened again after somebody removed it; if the disk is full, the run goes on."""

    def __init__(self, path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.failed = False

    def emit(self, record):
        """Write a record, in a new file where the old one is gone."""
        folder = os.path.dirname(self.baseFilename)
        try:
            if not os.path.isdir(folder):
                print(f"{folder} was removed; making it again", file=sys.stderr)
                os.makedirs(folder, exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record):  # noqa: N802, a name of logging
        """Say once, rather than for every line, that the file cannot be written."""
        if not self.failed:
            self.failed = True
            print(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}; going on", file=sys.stderr)


def start_logging(folder, rank, training):
    """Have the logger write ``folder/log_rank<rank>.txt``, and on rank 0 print what a person waits for.

    Lines of level DEBUG, such as tracebacks, and those marked :data:`FILE` are not printed; neither are those
    marked :data:`DETAIL` while ``training``.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        file = LogFile(os.path.join(folder, f"log_rank{rank}.txt"))
    except OSError as error:
        raise UserError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    if rank == 0:
        hidden = ("file", "detail") if training else ("file",)
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.INFO)
        console.addFilter(lambda record: getattr(record, "kind", None) not in hidden)
        console.setFormatter(ConsoleFormatter())
        logger.addHandler(console)
    where = "[%(asctime)s] (%(filename)s %(lineno)d)"
    file.setFormatter(logging.Formatter(f"{where}: %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)


class ConsoleFormatter(logging.Formatter):
    """The message alone, after its level where that is a warning or worse; in colour on a terminal."""

    def format(self, record):
        """The text of a record."""
        text, tty = super().format(record), sys.stdout.isatty()
        if record.levelno < logging.WARNING:
            return text
        return colored(record.levelname, "yellow", force_color=tty, no_color=not tty) + f" {text}"


def log_progress(message, seconds):
    """Log a line of progress; the console shows it where the whole takes longer than :data:`LONG`.

    Args:
        seconds: how long the whole is expected to take.
    """
    logger.info(message, extra=None if seconds > LONG else FILE, stacklevel=2)


def write_config(folder, name, text):
    """Write the effective config to the run's folder; on failure say so and go on."""
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        logger.error(f"cannot write {path}: {error.strerror}")


class RunRecord:
    """Metrics of a run: TensorBoard events, ``metrics.jsonl`` with a line per epoch, ``curves.png``.

    Rank 0 writes them, and the log says what cannot be written: a full disk does not end the run here. The
    records of other ranks are silent.

    Args:
        folder: the run's output folder.
        rank: of this process.
        draw: draws the curves of a list of rows to a file.
        drawn: what it needs of every row.
    """

    def __init__(self, folder, rank, draw, drawn):
        self.silent, self.draw, self.drawn = rank > 0, draw, drawn
        self.path = os.path.join(folder, "metrics.jsonl")
        self.picture = os.path.join(folder, "curves.png")
        self.board, self.board_folder = None, os.path.join(folder, "tensorboard")
        self.epochs, self.purge_step = [], 0

    def start(self, epoch, update):
        """Go on from an epoch and an update; what an interrupted run wrote beyond is dropped."""
        if not self.silent:
            self.epochs = [row for row in read_metrics(self.path, self.drawn) if row["epoch"] < epoch]
            self.purge_step = update

    def scalars(self, update, **values):
        """Write TensorBoard scalars ``train/<name>`` of an update."""
        self._write_scalars("train", values, update)

    def end_epoch(self, update, **row):
        """Write the metrics of an epoch, which must include ``epoch``, and draw the curves again."""
        if self.silent:
            return
        self.epochs.append(row)
        with self._told():
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(epoch) + "\n" for epoch in self.epochs)
            self.draw(self.epochs, self.picture)
        self._write_scalars("epoch", row, update)

    def close(self):
        """Finish the TensorBoard file."""
        with self._told():
            if self.board is not None:
                self.board.close()

    def _write_scalars(self, group, values, update):
        if self.silent:
            return
        if not os.path.isdir(self.board_folder):
            self.board = None
        with self._told():
            # The writer's thread would end with a traceback.
            if shutil.disk_usage(os.path.dirname(self.path)).free < 2**20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.board_folder)
            if self.board is None:
                self.board = SummaryWriter(self.board_folder, purge_step=self.purge_step)
                self.purge_step = update
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, update)
            self.board.flush()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except OSError as error:
            logger.error(f"cannot write metrics: {error}; training goes on")


def read_metrics(path, drawn=DRAWN):
    """The rows of a ``metrics.jsonl``, none where there is no file; torn or foreign lines are left out.

    Args:
        drawn: names of the numbers that every row must hold.
    """
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and all(_is_number(row.get(key)) for key in drawn)]


def clock(seconds):
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=int(seconds)))


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def draw_curves(epochs, path):
    """Draw loss, accuracy and learning rate over the epochs to a PNG file.

    Args:
        epochs: rows with epoch (from 0), train_loss, val_loss, acc1, acc5 (percent), lr; of an averaged
            model also ema_acc1.
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
    ema = [row.get("ema_acc1", math.nan) for row in epochs]
    scores = [row["acc1"] if math.isnan(average) else average for row, average in zip(epochs, ema)]
    best, best_epoch = max(scores), epochs[scores.index(max(scores))]["epoch"]
    accuracy.plot(x, [row["acc1"] for row in epochs], marker=marker, ms=3, label="top-1")
    accuracy.plot(x, [row["acc5"] for row in epochs], marker=marker, ms=3, label="top-5")
    if not all(map(math.isnan, ema)):
        accuracy.plot(x, ema, marker=marker, ms=3, label="top-1 of the average (EMA)")
    accuracy.axhline(best, color="grey", lw=0.8, ls=":")
    title = f"Validation: best top-1 {best:.2f}% (epoch {best_epoch + 1})"
    accuracy.set(title=title, ylabel="%")
    accuracy.legend(loc="lower right")
    rate.plot(x, [row["lr"] for row in epochs], marker=marker, ms=3, color="tab:green")
    rate.set(title="Learning rate at the end of the epoch", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epochs trained")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
