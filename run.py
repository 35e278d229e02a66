"""A run's output folder is its own while it lasts."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time

from utils import UserError


class FolderClaim:
    """The claim of a training run on its output folder: a lock on ``run.lock`` in it.

    The operating system gives the lock to one process and takes it back when that ends, however it ends. The
    file itself stays, and says who had it last. Data-loading workers do not inherit the lock.

    Args:
        folder: the run's output folder; nothing is claimed yet.
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
            self.keep()
        except OSError as error:
            raise UserError(f"cannot write to the output folder {self.folder}: {error.strerror}") from error

    def keep(self):
        """Claim the folder again where somebody removed it since.

        Raises:
            UserError: the folder belongs to another run now.
            OSError: the folder cannot be made again.
        """
        if self._is_held():
            return
        os.makedirs(self.folder, exist_ok=True)
        self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115, open as long as the run
        end = time.monotonic() + 3  # a run that was just killed may take some time to vanish
        while not self._lock():
            if time.monotonic() > end:
                self.file.seek(0)
                other = self.file.read().strip() or "which just starts"
                raise UserError(
                    f"{self.folder} belongs to another run, {other}: wait for its end or choose another --tag"
                )
            time.sleep(0.1)
        # A full disk keeps nobody from training.
        with contextlib.suppress(OSError):
            self.file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            self.file.flush()

    def _is_held(self):
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self.path)
            return self.file is not None and os.path.samestat(there, os.fstat(self.file.fileno()))
        return False

    def _lock(self):
        try:
            # Not flock: forked workers would share it, and keep it for a while after the run was killed.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            logging.getLogger("msg_transformer").warning(
                f"no lock for {self.path} ({error.strerror}): nothing keeps a second run out of its folder"
            )
        return True
