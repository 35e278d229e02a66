"""Stops a run by signals with all of it saved, and keeps its folder to it."""

import contextlib
import logging
import os
import signal
import socket
import sys
import time

from distributed import largest_over_processes
from utils import STOP_SIGNALS, UserError, lock_file

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, the same command goes on
LAUNCHER_GONE = 1  # in place of a signal: the number of SIGHUP, which Windows has not

logger = logging.getLogger("msg_transformer")


def build_guard(config):
    """The :class:`Guard` of a run; its folder is not claimed yet."""
    return Guard(config.TRAIN.SAVE_STEPS, config.TRAIN.SAVE_MINUTES, FolderClaim(config.OUTPUT))


class Guard:
    """Keeps a run's folder to it, and decides when it is saved and whether it is to stop.

    SIGTERM, SIGINT and SIGUSR1 of any process ask all of them to save and stop; a second SIGINT interrupts at
    once. Before :meth:`start`, while there is nothing to save, they end the process with
    ``REQUEUE_EXIT_CODE``. The end of torchrun, of which its processes hear nothing, counts as a signal too;
    on Windows, where a process keeps the number of its parent, it stays unnoticed.

    Args:
        steps: updates between checkpoints, 0 for none within an epoch.
        minutes: minutes between checkpoints by the fastest clock, 0 for none.
        claim: the run's :class:`FolderClaim`; None where nobody else could write to the folder.
    """

    def __init__(self, steps, minutes, claim=None):
        self.steps, self.seconds, self.claim = steps, 60 * minutes, claim
        self.updates, self.saved, self.signal = 0, None, 0
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def start(self):
        """From now on a signal waits for the update that is running."""
        self.saved = time.monotonic()

    def _remember(self, number, frame):
        if self.saved is None:
            name = signal.Signals(number).name
            print(f"stopped by {name} before training: the same command starts again", file=sys.stderr)
            sys.exit(REQUEUE_EXIT_CODE)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.signal = number

    def after_update(self):
        """Count an update; all processes must call it.

        Returns:
            (whether to save now, number of the signal to stop for or 0), the same on every process.
        """
        self.updates += 1
        if self.launcher is not None and os.getppid() != self.launcher:
            self.signal = self.signal or LAUNCHER_GONE
        late = self.seconds > 0 and time.monotonic() - self.saved >= self.seconds
        late, stop = largest_over_processes(int(late), self.signal)
        due = bool(late or stop) or (self.steps > 0 and self.updates % self.steps == 0)
        if due:
            self.saved = time.monotonic()
        return due, stop


class FolderClaim:
    """The claim of a training run on its output folder: a lock on ``run.lock`` in it.

    The operating system gives the lock to one process and takes it back when that ends, however it ends. The
    file itself stays, and says who had it last. Data-loading workers do not inherit the lock.
    """

    def __init__(self, folder):
        self.folder, self.path = folder, os.path.join(folder, "run.lock")
        self.file = None

    def take(self):
        """Claim the folder at the start of a run; it is made where there is none.

        Raises:
            UserError: the folder belongs to another run, or cannot be written to.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115, open as long as the run
        except OSError as error:
            raise UserError(f"cannot write to the output folder {self.folder}: {error.strerror}") from error
        end = time.monotonic() + 3  # a run that was just killed may take some time to vanish
        while not self._lock(file):
            if time.monotonic() > end:
                file.seek(0)
                other = file.read().strip() or "which just starts"
                raise UserError(
                    f"{self.folder} belongs to another run, {other}: wait for its end or choose another --tag"
                )
            time.sleep(0.1)
        self.file = file
        # Do not fail if the disk is full; the note is optional.
        with contextlib.suppress(OSError):
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            file.flush()

    def _lock(self, file):
        try:
            return lock_file(file)
        except OSError as error:
            logger.warning(
                f"no lock for {self.path} ({error.strerror}): nothing keeps a second run out of its folder"
            )
            return True
