"""What a run leaves for people: log files, TensorBoard, metrics per epoch and their picture, trackers."""

import contextlib
import datetime
import errno
import importlib
import io
import json
import logging
import logging.handlers
import math
import os
import re
import shutil
import sys
import threading
import uuid

import numpy as np
from termcolor import colored
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from utils import UserError, printable, replacing

DRAWN = ("epoch", "train_loss", "val_loss", "acc1", "acc5", "lr")  # of the metrics of an epoch
PROJECT = "msg-transformer"  # of tracked runs
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
        console = Console(sys.stdout)
        console.setLevel(logging.INFO)
        console.addFilter(lambda record: getattr(record, "kind", None) not in hidden)
        console.setFormatter(ConsoleFormatter())
        logger.addHandler(console)
    where = "[%(asctime)s] (%(filename)s %(lineno)d)"
    file.setFormatter(logging.Formatter(f"{where}: %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)


class Console(logging.StreamHandler):
    """Writes lines above a :class:`ProgressBar`, rather than into it."""

    def emit(self, record):
        """Write a record."""
        with tqdm.external_write_mode(self.stream) if self.stream.isatty() else contextlib.nullcontext():
            super().emit(record)


class ConsoleFormatter(logging.Formatter):
    """The message alone, after its level where that is a warning or worse; in colour on a terminal."""

    def format(self, record):
        """The text of a record."""
        text, tty = super().format(record), sys.stdout.isatty()
        if record.levelno < logging.WARNING:
            return text
        return colored(record.levelname, "yellow", force_color=tty, no_color=not tty) + f" {text}"


def on_terminal():
    """Whether this process prints what a person waits for, and to a terminal."""
    return any(isinstance(handler, Console) and handler.stream.isatty() for handler in logger.handlers)


def log_progress(message, seconds):
    """Log a line of progress; a console that is no terminal, which has a :class:`ProgressBar`, shows it too
    where the whole takes longer than :data:`LONG`.

    Args:
        seconds: how long the whole is expected to take.
    """
    shown = seconds > LONG and not on_terminal()
    logger.info(message, extra=None if shown else FILE, stacklevel=2)


class ProgressBar(tqdm):
    """tqdm's bar on a terminal, redrawn every second; elsewhere it shows nothing.

    Its rate, and so the time left, do not count what comes before the first step is done: workers that start,
    kernels that are compiled.

    Args:
        what: is in progress.
        total: steps in all.
        options: of tqdm, such as ``initial``, the steps that are done already.
    """

    monitor_interval = 0  # no thread of tqdm's own

    def __init__(self, what, total, **options):
        options = dict(dict(disable=not on_terminal(), file=sys.stdout, unit="batch", leave=False), **options)
        super().__init__(desc=what, total=total, miniters=1, dynamic_ncols=True, **options)
        self.started, self.closing = False, threading.Event()
        if not self.disable:
            self.clock = threading.Thread(target=self._tick, daemon=True)
            self.clock.start()

    def _tick(self):
        while not self.closing.wait(1):
            self.refresh()

    def over(self, items):
        """Yield ``items``, each of which is a step, done when the next one is asked for."""
        for item in items:
            yield item
            self.update()

    def update(self, n=1):
        """Count ``n`` steps."""
        if not self.started and not self.disable:
            self.started, self.n = True, self.n + n
            self.initial = self.last_print_n = self.n
            self.start_t = self.last_print_t = self._time()
            self.refresh()
        else:
            super().update(n)

    def close(self):
        """Remove the bar; nothing redraws it afterwards."""
        if not self.disable:
            self.closing.set()
            self.clock.join(2)
        super().close()


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
        draw: draws the curves of a list of rows to a file, called with both and the hyper-parameters.
        drawn: what it needs of every row.

    Attributes:
        hyperparameters: of the run, a flat dict, for TensorBoard and the tracker.
        tracker: a :class:`Tracker`, or None.
    """

    def __init__(self, folder, rank, draw, drawn):
        self.silent, self.draw, self.drawn = rank > 0, draw, drawn
        self.path = os.path.join(folder, "metrics.jsonl")
        self.picture = os.path.join(folder, "curves.png")
        self.board, self.board_folder = None, os.path.join(folder, "tensorboard")
        self.hyperparameters, self.tracker = {}, None
        self.epochs, self.update, self.purge_step, self.batch_due = [], 0, 0, False

    def start(self, epoch, update, updates_per_epoch):
        """Go on from an epoch and an update of the run; what an interrupted run wrote beyond is dropped."""
        if self.silent:
            return
        self.epochs = [row for row in read_metrics(self.path, self.drawn) if row["epoch"] < epoch]
        self.update = self.purge_step = update
        self.batch_due = not update
        if self.tracker is not None:
            self.tracker.start(update, updates_per_epoch, self.hyperparameters)

    def scalars(self, update, **values):
        """Write TensorBoard scalars ``train/<name>`` of an update."""
        self._write_scalars("train", values, update)

    def first_batch(self, draw):
        """Write the first batch of a run from scratch as the TensorBoard image ``train/first_batch``.

        Args:
            draw: returns it as a PIL image; is called for the first batch only.
        """
        if self.batch_due:
            self.batch_due = False
            self.image("train/first_batch", draw())

    def image(self, tag, picture):
        """Write a PIL image for TensorBoard, at the last update that was written."""
        pixels = np.asarray(picture)
        self._write(lambda board: board.add_image(tag, pixels, self.update, dataformats="HWC"), pixels.nbytes)

    def end_epoch(self, update, **row):
        """Write the metrics of an epoch, which must include ``epoch``, and draw the curves again."""
        if self.silent:
            return
        self.epochs.append(row)
        with self._told():
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(epoch) + "\n" for epoch in self.epochs)
            self.draw(self.epochs, self.picture, self.hyperparameters)
        self._write_scalars("epoch", row, update)

    def close(self):
        """Finish the TensorBoard file and the tracked run."""
        with self._told():
            if self.board is not None:
                self.board.close()
        if self.tracker is not None:
            self.tracker.finish()

    def _write_scalars(self, group, values, update):
        self.update = update
        tags = {f"{group}/{name}": value for name, value in values.items()}

        def write(board):
            for tag, value in tags.items():
                board.add_scalar(tag, value, update)

        self._write(write)
        if self.tracker is not None:
            self.tracker.log(group, tags, update)

    def _write(self, write, size=0):
        """Have ``write`` write to the TensorBoard file, ``size`` bytes beside a few of its own."""
        if self.silent:
            return
        if not os.path.isdir(self.board_folder):
            self.board = None
        with self._told():
            # The writer's thread would end with a traceback.
            if shutil.disk_usage(os.path.dirname(self.path)).free < 2**20 + size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.board_folder)
            if self.board is None:
                self.board = SummaryWriter(self.board_folder, purge_step=self.purge_step)
                self.purge_step = self.update
                write_hyperparameters(self.board, self.hyperparameters, self.drawn)
            write(self.board)
            self.board.flush()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except OSError as error:
            logger.error(f"cannot write metrics: {error}; training goes on")


def write_image(folder, tag, picture):
    """Write a PIL image to a TensorBoard file of its own in ``folder``.

    A second file beside that of a run would keep TensorBoard from reading on in the first.
    """
    with contextlib.closing(SummaryWriter(folder)) as board:
        board.add_image(tag, np.asarray(picture), dataformats="HWC")


def write_hyperparameters(board, values, drawn):
    """Write hyper-parameters for TensorBoard, which sets them beside the last of the scalars ``drawn``."""
    # Truth values would become 0 and 1.
    plain = {
        key: value if type(value) in (int, float) else printable(str(value)) for key, value in values.items()
    }
    scores = dict.fromkeys((f"epoch/{name}" for name in drawn if name not in ("epoch", "lr")), 0)
    for summary in hparams(plain, scores):
        board.file_writer.add_summary(summary)


def require_tracker(name):
    """Refuse a ``LOG.TRACKER`` whose package cannot be imported.

    Raises:
        UserError: which package to install.
    """
    if not name:
        return
    try:
        # A folder of that name, which earlier runs may have left, can be imported too.
        importlib.import_module(name).init  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"LOG.TRACKER {name}: the package cannot be imported ({error}): pip install {name}, or leave "
            "LOG.TRACKER empty"
        ) from error


def build_tracker(config, rank):
    """The :class:`Tracker` that ``LOG.TRACKER`` asks for; None for none, and on other ranks than 0."""
    if rank or not config.LOG.TRACKER:
        return None
    return Tracker(config.LOG.TRACKER, config.OUTPUT, f"{config.MODEL.NAME}-{config.TAG}")


class Tracker:
    """Gives the scalars of a run to Weights & Biases or to trackio too, under their names in TensorBoard.

    ``tracker.json`` in the run's folder keeps the name of the tracked run and the last updates that it was
    given. A resumed run goes on with it and leaves out what it repeats; where its epochs have another number
    of updates now, it gives that again, after the last of those updates. A run from scratch has one of its
    own. The first failure ends the tracking with a warning.

    Args:
        package: wandb or trackio.
        folder: the run's output folder.
        name: what the name of the tracked run begins with.
    """

    def __init__(self, package, folder, name):
        self.package, self.folder = package, folder
        self.path = os.path.join(folder, "tracker.json")
        self.name = re.sub(r"[^\w.-]", "-", name)[:80]  # wandb refuses some characters
        self.run, self.state = None, {}

    def start(self, update, updates_per_epoch, hyperparameters):
        """Go on with the tracked run, or at update 0 start another.

        Args:
            hyperparameters: a flat dict.
        """
        with self._told():
            if update and os.path.exists(self.path):
                with open(self.path, encoding="utf-8") as file:
                    self.state = json.load(file)
            if self.state.get("package") != self.package:
                name = f"{self.name}-{uuid.uuid4().hex[:8]}"
                self.state = dict(package=self.package, run=name, train=-1, epoch=-1)
            shift = self.state.get("shift", 0)
            if self.state.get("updates_per_epoch", updates_per_epoch) != updates_per_epoch:
                shift = max(shift, self.state["train"] + 1 - update, self.state["epoch"] + 1 - update)
            self.state.update(updates_per_epoch=updates_per_epoch, shift=shift)
            arguments = dict(name=self.state["run"], config=hyperparameters, resume="allow")
            self.run, where = getattr(self, f"_start_{self.package}")(arguments)
            logger.info(f"tracked by {self.package} as {self.state['run']}: {where}")

    def _start_wandb(self, arguments):
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        settings = dict(console="off", silent=True)
        if mode == "online":
            settings.update(finish_timeout=20)  # seconds; a run that is to stop has little time
        arguments.update(id=arguments["name"], dir=self.folder, mode=mode, settings=settings)
        run = wandb.init(project=os.environ.get("WANDB_PROJECT") or PROJECT, **arguments)
        # wandb's own steps may never go back, not even from an epoch's figures to the next update's.
        run.define_metric("*", step_metric="update")
        where = f"wandb sync {os.path.join(self.folder, 'wandb', 'offline-run-*')} uploads it"
        return run, where if mode == "offline" else mode

    def _start_trackio(self, arguments):
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            run = trackio.init(PROJECT, **arguments)
        return run, f"trackio show --project {PROJECT}"

    def log(self, group, tags, update):
        """Give it scalars of an update, unless it has some of this group and update, or of a later one.

        Args:
            group: train or epoch.
            tags: a dict of the scalars by their tags.
        """
        if self.run is None or update + self.state["shift"] <= self.state[group]:
            return
        update += self.state["shift"]
        with self._told():
            if self.package == "wandb":
                self.run.log(dict(tags, update=update))
            else:
                self.run.log(tags, step=update)
            self.state[group] = update
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                json.dump(self.state, file)

    def finish(self):
        """Finish the tracked run here; a resumed run goes on with it."""
        if self.run is not None:
            with self._told(), contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(self.package).finish()
        self.run = None

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        # Whatever happens in another's package, training goes on.
        except Exception as error:
            self.run = None
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.warning(f"{self.package} failed ({reason}): from here on the run is not tracked")


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


def smoothing_floor(smoothing, classes):
    """The least training loss under label smoothing, the entropy of its targets; 0 for none.

    A target has 1 - smoothing + smoothing / classes for its class, and smoothing / classes for the others.
    """
    shares = [1 - smoothing + smoothing / classes, *[smoothing / classes] * (classes - 1)]
    return -sum(share * math.log(share) for share in shares if share > 0)


def draw_curves(epochs, path, hyperparameters):
    """Draw loss, accuracy and learning rate over the epochs to a PNG file.

    The training loss cannot fall below the floor of label smoothing, which is drawn. With five classes or
    fewer top-5 is always 100%, and left out.

    Args:
        epochs: rows with epoch (from 0), train_loss, val_loss, acc1, acc5 (percent), lr; of an averaged
            model also ema_acc1.
        hyperparameters: a flat dict; ``MODEL.NUM_CLASSES`` and ``MODEL.LABEL_SMOOTHING`` are used.
    """
    # pyplot is not used: it keeps global state and a figure for every call.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x = [row["epoch"] for row in epochs]
    classes = hyperparameters.get("MODEL.NUM_CLASSES", math.inf)
    smoothing = hyperparameters.get("MODEL.LABEL_SMOOTHING", 0)
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "o" if len(x) < 40 else ""
    loss.plot(x, [row["train_loss"] for row in epochs], marker=marker, ms=3, label="training (augmented)")
    loss.plot(x, [row["val_loss"] for row in epochs], marker=marker, ms=3, label="validation")
    # A teacher's targets have another entropy.
    if smoothing and math.isfinite(classes) and not hyperparameters.get("DISTILL.TEACHER"):
        label = f"floor of label smoothing {smoothing:g}"
        loss.axhline(smoothing_floor(smoothing, classes), color="C0", lw=0.9, ls="--", label=label)
    loss.set(title="Cross entropy", ylim=(0, None))
    ema = [row.get("ema_acc1", math.nan) for row in epochs]
    scores = [max(row["acc1"], row.get("ema_acc1", 0)) for row in epochs]
    best, best_epoch = max(scores), epochs[scores.index(max(scores))]["epoch"]
    accuracy.plot(x, [row["acc1"] for row in epochs], marker=marker, ms=3, label="top-1")
    if classes > 5:
        accuracy.plot(x, [row["acc5"] for row in epochs], marker=marker, ms=3, label="top-5")
    if not all(map(math.isnan, ema)):
        accuracy.plot(x, ema, marker=marker, ms=3, label="top-1 of the average (EMA)")
    accuracy.plot(best_epoch, best, "*", ms=11, color="black", label=f"best top-1, epoch {best_epoch}")
    accuracy.set(title=f"Validation: best top-1 {best:.2f}% (epoch {best_epoch})", ylabel="%")
    rate.plot(x, [row["lr"] for row in epochs], marker=marker, ms=3, color="black")
    rate.set(title="Learning rate at the end of the epoch", ylim=(0, None))
    rate.yaxis.set_major_formatter("{x:.3g}")  # not 0.2 and a factor above the axis, which moves the title
    for axes in (loss, accuracy, rate):
        axes.set_title(axes.get_title(), fontsize=10)
        axes.set_xlabel("epoch, as in the names of checkpoints")
        axes.axvline(best_epoch, color="black", lw=0.8, ls=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(x) < 3:  # no ticks between epochs, and none for epochs to come
            axes.set(xticks=x, xlim=(x[0] - 0.5, x[-1] + 0.5))
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy):
        axes.legend(fontsize=8.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=166, format="png")
