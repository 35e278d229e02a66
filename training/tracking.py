"""Follows a run in figures: TensorBoard, ``metrics.jsonl`` with its picture, and Weights & Biases."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import uuid

from torch.utils.tensorboard import SummaryWriter

from config import flat_config
from logger import read_metrics
from utils import UserError, printable, replacing

PROJECT = "msg-transformer"  # of tracked runs

logger = logging.getLogger("msg_transformer")


class RunRecord:
    """Metrics of a run: TensorBoard events, ``metrics.jsonl`` with a line per epoch, ``curves.png``.

    Rank 0 writes them, and the log says what cannot be written: a full disk does not end the run here. The
    records of other ranks are silent.

    Args:
        draw: draws the curves of a list of rows to a file, called with both.
        drawn: what it needs of every row.

    Attributes:
        tracker: a :class:`Tracker`, or None.
    """

    def __init__(self, folder, rank, draw, drawn):
        self.silent, self.draw, self.drawn = rank > 0, draw, drawn
        self.path = os.path.join(folder, "metrics.jsonl")
        self.picture = os.path.join(folder, "curves.png")
        self.board, self.board_folder = None, os.path.join(folder, "tensorboard")
        self.tracker = None
        self.epochs, self.purge_step = [], 0

    def start(self, epoch, update, updates_per_epoch):
        """Go on from an epoch and an update of the run; what an interrupted run wrote beyond is dropped."""
        if self.silent:
            return
        self.epochs = [row for row in read_metrics(self.path, self.drawn) if row["epoch"] < epoch]
        self.purge_step = update
        if self.tracker is not None:
            self.tracker.start(update, updates_per_epoch)

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
        """Finish the TensorBoard file and the tracked run."""
        with self._told():
            if self.board is not None:
                self.board.close()
        if self.tracker is not None:
            self.tracker.finish()

    def _write_scalars(self, group, values, update):
        tags = {f"{group}/{name}": value for name, value in values.items()}
        self._write(lambda board: [board.add_scalar(tag, value, update) for tag, value in tags.items()])
        if self.tracker is not None:
            self.tracker.log(group, tags, update)

    def _write(self, write):
        """Have ``write`` write to the TensorBoard file."""
        if self.silent:
            return
        with self._told():
            # The writer's thread would end with a traceback.
            if shutil.disk_usage(os.path.dirname(self.path)).free < 2**20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.board_folder)
            if self.board is None:
                self.board = SummaryWriter(self.board_folder, purge_step=self.purge_step)
            write(self.board)
            self.board.flush()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except OSError as error:
            logger.error(f"cannot write metrics: {error}; training goes on")


def require_tracker(name):
    """Raise a UserError where the package of ``LOG.TRACKER`` cannot be imported."""
    if not name:
        return
    try:
        from wandb import init  # noqa: F401, a folder of that name, which earlier runs may have left, has none
    except ImportError as error:
        raise UserError(
            f"LOG.TRACKER {name}: the package cannot be imported ({error}): pip install {name}, or leave "
            "LOG.TRACKER empty"
        ) from error


def build_tracker(config, rank):
    """The :class:`Tracker` that ``LOG.TRACKER`` asks for; None for none, and on other ranks than 0."""
    if rank or not config.LOG.TRACKER:
        return None
    return Tracker(config.OUTPUT, f"{config.MODEL.NAME}-{config.TAG}", flat_config(config))


class Tracker:
    """Gives the scalars of a run to Weights & Biases too, under their names in TensorBoard.

    ``tracker.json`` in the run's folder keeps the name of the tracked run and the last updates that it was
    given. A resumed run goes on with it and leaves out what it repeats; where its epochs have another number
    of updates now, it gives that again, after the last of those updates. A run from scratch has one of its
    own. The first failure ends the tracking with a warning.

    Args:
        name: what the name of the tracked run begins with.
        options: of the run, a flat dict.
    """

    def __init__(self, folder, name, options):
        self.folder, self.options = folder, options
        self.path = os.path.join(folder, "tracker.json")
        self.name = re.sub(r"[^\w.-]", "-", name)[:80]  # wandb refuses some characters
        self.run, self.state = None, {}

    def start(self, update, updates_per_epoch):
        """Go on with the tracked run, or at update 0 start another."""
        with self._told():
            if update and os.path.exists(self.path):
                with open(self.path, encoding="utf-8") as file:
                    self.state = json.load(file)
            if self.state.get("package") != "wandb":
                name = f"{self.name}-{uuid.uuid4().hex[:8]}"
                self.state = dict(package="wandb", run=name, train=-1, epoch=-1)
            shift = self.state.get("shift", 0)
            if self.state.get("updates_per_epoch", updates_per_epoch) != updates_per_epoch:
                shift = max(shift, self.state["train"] + 1 - update, self.state["epoch"] + 1 - update)
            self.state.update(updates_per_epoch=updates_per_epoch, shift=shift)
            logger.info(f"tracked by wandb as {self.state['run']}: {self._start_wandb()}")

    def _start_wandb(self):
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        settings = dict(console="off", silent=True)
        if mode == "online":
            settings.update(finish_timeout=20)  # seconds; a run that is to stop has little time
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=self.state["run"],
            id=self.state["run"],
            resume="allow",
            # wandb writes JSON in UTF-8, which a path of other bytes would break.
            config={k: printable(x) if isinstance(x, str) else x for k, x in self.options.items()},
            dir=self.folder,
            mode=mode,
            settings=settings,
        )
        # wandb's own steps may never go back, not even from an epoch's figures to the next update's.
        self.run.define_metric("*", step_metric="update")
        where = f"wandb sync {os.path.join(self.folder, 'wandb', 'offline-run-*')} uploads it"
        return where if mode == "offline" else mode

    def log(self, group, tags, update):
        """Give it scalars by tag, unless it has some of this group (train or epoch) and update, or later."""
        if self.run is None or update + self.state["shift"] <= self.state[group]:
            return
        update += self.state["shift"]
        with self._told():
            self.run.log(dict(tags, update=update))
            self.state[group] = update
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                json.dump(self.state, file)

    def finish(self):
        """Finish the tracked run here; a resumed run goes on with it."""
        if self.run is not None:
            with self._told():
                self.run.finish()
        self.run = None

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        # Whatever happens in another's package, training goes on.
        except Exception as error:
            self.run = None
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.warning(f"wandb failed ({reason}): from here on the run is not tracked")
