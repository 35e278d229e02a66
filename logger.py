"""What a run tells people: log files, the console, progress bars, and the rows of ``metrics.jsonl``."""

import contextlib
import datetime
import json
import logging
import os
import sys
import threading

from termcolor import colored
from tqdm import tqdm

from utils import UserError, replacing

DRAWN = ("epoch", "train_loss", "val_loss", "acc1", "acc5", "lr")  # of the metrics of an epoch
LONG = 60  # seconds from which an epoch or an evaluation shows its progress on the console

# ``extra`` of lines that the console leaves out: always, or while training.
FILE, DETAIL = dict(kind="file"), dict(kind="detail")

logger = logging.getLogger("msg_transformer")


class LogFile(logging.FileHandler):
    """A log file; if the disk is full, the run goes on."""

    failed = False

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
        file = LogFile(
            os.path.join(folder, f"log_rank{rank}.txt"), encoding="utf-8", errors="backslashreplace"
        )
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
    """Log a line of progress; a console without a bar shows it too if the whole takes longer than LONG.

    Args:
        seconds: how long the whole is expected to take.
    """
    shown = seconds > LONG and not on_terminal()
    logger.info(message, extra=None if shown else FILE, stacklevel=2)


class ProgressBar(tqdm):
    """tqdm's bar on a terminal, redrawn every second; elsewhere it shows nothing.

    Its rate, and so the time left, do not count what comes before the first step is done: workers that start,
    kernels that are compiled. ``options`` are tqdm's, such as ``initial``, the steps that are done already.
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
