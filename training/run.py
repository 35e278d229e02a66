"""Where a training run stands, what it was asked for, and how it is saved and restored.

Where a run stands is counted in images, not in batches: a run can go on with another number of processes or
another batch size, and everything random is a function of (seed, epoch, images seen), so nothing random has
to be saved.
"""

import contextlib
import functools
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import checkpoint as ckpt
from analysis.report import draw_curves
from config import APART, ConfigError, dump_config, flat_text
from distributed import (
    from_rank_0,
    gather_lists,
    parallelize,
    rank_and_world_size,
    sum_over_processes,
)
from logger import DETAIL, DRAWN, FILE, clock, write_config
from lr_scheduler import build_scheduler
from models.fast import choices
from optimizer import NonFiniteError, Updater, build_average, build_optimizer

from .guard import LAUNCHER_GONE, REQUEUE_EXIT_CODE
from .tracking import RunRecord, build_tracker

logger = logging.getLogger("msg_transformer")


@dataclass(frozen=True)
class Task:
    """What the runs of a program have in common."""

    base_images: int = 512  # images per update that TRAIN.BASE_LR is for
    # The figure of an evaluation, in percent, that best.pth is best in, and its name in the log. With
    # TRAIN.EMA it is the higher one of the weights and of their average.
    score: str = "acc1"
    score_name: str = "accuracy"
    shown: tuple = (("acc1", "top-1"),)  # figures on the console after each epoch, and their names there
    # Called with the model, the content of --pretrained and its path.
    load_pretrained: Callable = functools.partial(ckpt.load_weights, new_head=True)
    draw: Callable = draw_curves  # the curves of a run, see training.tracking.RunRecord
    drawn: tuple = DRAWN


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    folder: str  # its output folder
    task: Task = Task()
    epochs: int = 300  # to train, counted from the start of the run
    seed: int = 0
    config: str = ""  # YAML text of the effective config, for people who open the folder or a checkpoint
    print_freq: int = 10  # updates between log lines
    save_freq: int = 1  # epochs between checkpoints; there is one after the last epoch too
    keep: int = 0  # epoch checkpoints to keep, 0 for all
    stop_on_save_error: bool = False  # end the run when a checkpoint cannot be written
    start_epoch: int = 0  # the first one of a run that continues from no checkpoint

    def is_due(self, epoch):
        """Whether a checkpoint is written at the end of ``epoch``."""
        return epoch % self.save_freq == 0 or epoch + 1 == self.epochs


def build_run(config, model, sampler, setup, task):
    """Set up training of a model, and restore what is already there.

    Args:
        sampler: the training sampler.
        setup: the :class:`~training.setup.Setup` of this process, whose start is taken.

    Returns:
        A :class:`Run` at the epoch to train next, its updater's model parallelised over the processes.
    """
    train, rank = config.TRAIN, sampler.rank
    settings = Settings(
        folder=config.OUTPUT,
        task=task,
        epochs=train.EPOCHS,
        seed=config.SEED,
        config=dump_config(config),
        print_freq=config.PRINT_FREQ,
        save_freq=config.SAVE_FREQ,
        keep=train.KEEP_CHECKPOINTS,
        stop_on_save_error=train.ON_SAVE_ERROR == "stop",
        start_epoch=train.START_EPOCH,
    )
    lr_scale = sampler.images_per_update / task.base_images
    optimizer = build_optimizer(config, model, lr_scale)
    scheduler = build_scheduler(config, optimizer, sampler.updates_per_epoch, lr_scale)
    updater = Updater(
        model, optimizer, setup.compute, sampler.accumulation, train.CLIP_GRAD, train.MAX_NONFINITE
    )
    updater.average = build_average(config, model)
    record = RunRecord(config.OUTPUT, rank, task.draw, task.drawn)
    record.tracker = build_tracker(config, rank)
    run = Run(settings, updater, scheduler, sampler, record, setup.guard)
    run.restore(setup.take_start())
    if rank == 0:
        write_config(config.OUTPUT, "config.yaml", settings.config)
    run.warn_of_a_small_disk()
    run.warn_of_a_short_run(train)
    if sampler.world_size > 1:
        updater.model = parallelize(model, setup.compute.device)
    return run


def percent(score):
    """A score as text; one below 0 is none."""
    return f"{score:.2f}%" if score >= 0 else "unknown"


class Progress:
    """Where a run stands: the epoch, how many of its images were used, the sums behind the epoch's means.

    Attributes:
        sums: by name, over the updates of this process: loss, norm, and ``loss_<part>`` of a loss that has
            several parts.
    """

    def __init__(self, epoch, device):
        self.epoch, self.images, self.updates = epoch, 0, 0
        self.sums = dict(loss=torch.zeros((), device=device), norm=torch.zeros((), device=device))

    def add(self, images, losses, norm):
        """Count an update: its images over all processes, its mean losses here, its gradient norm."""
        self.images, self.updates = self.images + images, self.updates + 1
        values = dict(loss=sum(losses.values()), norm=norm)
        if len(losses) > 1:
            values.update({f"loss_{part}": loss for part, loss in losses.items()})
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.nan_to_num(value, 0.0, 0.0, 0.0)

    def means(self):
        """Means over the updates and all processes: loss, norm, and ``loss_<part>``; all must call it."""
        names = sorted(self.sums, key=lambda name: (name.startswith("loss_"), name))
        total = sum_over_processes(torch.stack([self.sums[name] for name in names]))
        return dict(zip(names, (total / self.updates / rank_and_world_size()[1]).tolist()))

    def state_dict(self):
        """Plain numbers, on rank 0 the sums of all processes; all of them must call it."""
        sums = {name: gather_lists([self.sums[name].item()]) for name in sorted(self.sums)}
        counts = dict(epoch=self.epoch, images=self.images, updates=self.updates)
        state = dict(counts, loss=sums.pop("loss"), norm=sums.pop("norm"))
        return dict(state, parts={name.removeprefix("loss_"): values for name, values in sums.items()})

    def load_state_dict(self, state, rank, world_size):
        """Continue from :meth:`state_dict`, on the same number of processes or another."""
        self.epoch, self.images, self.updates = state["epoch"], state["images"], state["updates"]
        found = {f"loss_{part}": sums for part, sums in state.get("parts", {}).items()}
        for name, sums in dict(found, loss=state["loss"], norm=state["norm"]).items():
            value = sums[rank] if len(sums) == world_size else sum(sums) / len(sums)
            self.sums[name] = torch.full_like(self.sums["loss"], value)


class Run:
    """What a training run consists of, and how it is saved, restored and stopped.

    Args:
        updater: an :class:`~optimizer.Updater` whose model is still the plain module.
        scheduler: timm's, of the learning rate.

    Attributes:
        model: the plain module whose weights are saved.
        best, best_of: the score in ``best.pth``, below 0 without one, and of which weights: model or ema.
        better: of which weights the last score is.
        before: updates of the epochs before this one, however many each had.
        first, begin: the epoch that it starts with here, and when.
    """

    def __init__(self, settings, updater, scheduler, sampler, record, guard):
        self.settings, self.updater, self.scheduler = settings, updater, scheduler
        self.sampler, self.record, self.guard = sampler, record, guard
        self.model, self.device = updater.model, updater.compute.device
        self.progress = Progress(settings.start_epoch, self.device)
        self.best = -1.0  # below 0, so that even a first score of 0 is the best so far
        self.best_of = self.better = None
        self.saved = []  # names of the files that the last epoch left
        self.before = settings.start_epoch * sampler.updates_per_epoch
        self.first, self.begin = settings.start_epoch, time.time()

    def figures_of(self, evaluate):
        """Evaluate the weights and, where there is one, their average, whose figures are named ``ema_...``.

        Args:
            evaluate: called with a module; returns its figures by name, as :meth:`end_epoch` takes them.
        """
        figures, average = evaluate(self.model), self.updater.average
        if average is not None:
            logger.info("evaluating the averaged weights (EMA)", extra=DETAIL)
            figures |= {f"ema_{name}": value for name, value in evaluate(average.model).items()}
        return figures

    def best_in_words(self):
        """The best score as text, and of which weights it is where there is an average."""
        whose = dict(model=" of the weights themselves", ema=" of their average")
        averages = self.updater.average is not None
        return percent(self.best) + (whose.get(self.best_of, "") if averages else "")

    def epochs_left(self):
        """Yield the epochs to train, having started each, and sum up after the last.

        Each must be trained and then ended by :meth:`end_epoch`.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        settings, task = self.settings, self.settings.task
        first, epochs, per_epoch = self.progress.epoch, settings.epochs, self.sampler.updates_per_epoch
        if first >= epochs:
            logger.info(
                f"all {epochs} epochs are trained already; max {task.score_name} {self.best_in_words()}"
            )
            return
        self.guard.start()
        self.first, self.begin = first, time.time()
        logger.info(
            f"{epochs} epochs of {per_epoch} updates with {self.sampler.images_per_update} images each, at a "
            f"learning rate of up to {max(self.scheduler.base_values):.3g} (TRAIN.BASE_LR for "
            f"{task.base_images} images), to {settings.folder}"
        )
        for epoch in range(first, epochs):
            self.start_epoch(epoch)
            yield epoch
        if not self.saved:
            raise ckpt.CheckpointError(f"the last checkpoint could not be written to {settings.folder}")
        self.record.close()
        if self.sampler.rank == 0:
            path = os.path.join(settings.folder, ckpt.BEST)
            logger.info(
                f"trained epochs {first} to {epochs - 1} in {clock(time.time() - self.begin)}\n"
                f"  {f'max {task.score_name}:':16} {self.best_in_words()}\n"
                f"  best checkpoint: {path if self.best >= 0 else f'none, {path} could not be written'}\n"
                f"  training curves: {self.record.picture}"
            )

    def start_epoch(self, epoch):
        """Start the rest of a restored epoch, or a whole one."""
        if self.progress.epoch != epoch:
            self.before += self.progress.updates
            self.progress = Progress(epoch, self.device)
        self.sampler.start(epoch, self.progress.images)

    def position(self):
        """Updates since the start of the run, had all been of the present size: the place in the schedule."""
        per_epoch = self.sampler.updates_per_epoch
        return self.progress.epoch * per_epoch + self.progress.images / self.sampler.images_per_update

    def after_update(self):
        """Save where that is due, and stop where a signal asked for it; all processes must call it.

        Raises:
            SystemExit: with ``REQUEUE_EXIT_CODE``, the run is saved.
            CheckpointError: a run that is to stop could not be saved.
        """
        due, stop = self.guard.after_update()
        files = self.save() if due else []
        if not stop:
            return
        self.record.close()
        if not files:
            raise ckpt.CheckpointError(f"stopped by signal {stop}, but the run could not be saved")
        name = "the end of its launcher" if stop == LAUNCHER_GONE else signal.Signals(stop).name
        logger.info(f"stopped by {name}: the same command goes on (exit code {REQUEUE_EXIT_CODE})")
        sys.exit(REQUEUE_EXIT_CODE)

    def end_epoch(self, means, figures):
        """Record an epoch and save it where that is due, or where it is better than any written before.

        Args:
            means: of its training.
            figures: what :meth:`figures_of` returned; the one that counts is in percent.

        Returns:
            The names of the files written.
        """
        epoch, task, average = self.progress.epoch, self.settings.task, self.updater.average
        # The epoch's own last update: a run that goes on after it drops TensorBoard's events from there on.
        last = self.before + self.progress.updates - 1
        self.record.end_epoch(last, epoch=epoch, **means, **figures)
        scores = dict(ema=figures[f"ema_{task.score}"]) if average is not None else {}
        scores["model"] = figures[task.score]
        self.better = max(scores, key=scores.get)  # the average where both are as good
        score, before = float(scores[self.better]), (self.best, self.best_of)
        best = score > self.best
        if best:
            self.best, self.best_of = score, self.better
        logger.info(f"Max {task.score_name}: {self.best_in_words()}", extra=DETAIL)
        self.saved = self.save(score, self.settings.is_due(epoch), best)
        if best and ckpt.BEST not in self.saved:
            self.best, self.best_of = before  # the next epoch may still write a best checkpoint
        self._tell_epoch(means["train_loss"], figures)
        return self.saved

    def _tell_epoch(self, loss, figures):
        done, epochs, task = self.progress.epoch + 1, self.settings.epochs, self.settings.task
        shown = [*task.shown, *((f"ema_{key}", f"EMA {name}") for key, name in task.shown)]
        scores = [f"{name} {percent(figures[key])}" for key, name in shown if key in figures]
        left = (time.time() - self.begin) / (done - self.first) * (epochs - done)
        logger.info(
            f"epoch {done - 1:{len(str(epochs))}} ({done} of {epochs}): loss {loss:.4f}, {', '.join(scores)} "
            f"(best {self.best_in_words()}), {clock(left)} left"
        )

    def save(self, score=None, due=True, best=False):
        """Write a checkpoint; all processes must call it, rank 0 writes.

        Args:
            score: of the better weights, at the end of an epoch; None within it.
            due: write the run's own checkpoint; otherwise the best only.
            best: the score is the best so far.

        Returns:
            The names of the files written; where writing failed, which the log says, some are missing.

        Raises:
            CheckpointError: writing failed and ``stop_on_save_error`` is set.
        """
        settings, updater, average = self.settings, self.updater, self.updater.average
        epoch, epoch_done, progress = self.progress.epoch, score is not None, self.progress.state_dict()
        checkpoint = dict(
            model=self.model.state_dict(),
            optimizer=updater.optimizer.state_dict(),
            # For the official code, which reads it; here the rate is a function of the place in the run.
            lr_scheduler=self.scheduler.state_dict(),
            updater=updater.state_dict(),
            progress=None if epoch_done else dict(progress, images_per_update=self.sampler.images_per_update),
            max_accuracy=self.best,
            score=score,
            epoch=epoch if epoch_done else epoch - 1,
            updates=self.before + self.progress.updates,
            config=settings.config,
            classes=getattr(self.model, "classes", None),
        )
        if average is not None:
            ema = dict(updates=average.updates)
            checkpoint.update(model_ema=average.model.state_dict(), ema=ema, better=self.better)
        if hasattr(updater.optimizer, "name"):
            checkpoint.update(optimizer_name=updater.optimizer.name)
        if self.device.type == "cpu":
            checkpoint.update(cpu=choices.describe())
        name = ckpt.epoch_name(epoch) if epoch_done else ckpt.within_epoch_name(epoch, self.progress.images)

        def write():
            files, folder = [], settings.folder
            try:
                if due:
                    files.append(ckpt.save_in_folder(folder, checkpoint, name, settings.keep))
                if best:
                    files.append(ckpt.save_best(folder, checkpoint, *files))
            except OSError as error:
                return files, f"cannot write a checkpoint to {folder}: {error.strerror or error}"
            return files, None

        files, problem = from_rank_0(write) if due or best else ([], None)
        if files:
            logger.info(f"saved {', '.join(files)}", extra=DETAIL)
        if problem and settings.stop_on_save_error:
            raise ckpt.CheckpointError(f"{problem}; stopping (TRAIN.ON_SAVE_ERROR)")
        if problem:
            logger.error(f"{problem}; training goes on, earlier checkpoints are untouched")
        return [os.path.basename(path) for path in files]

    def warn_of_a_small_disk(self):
        """Warn where the checkpoints of the epochs that are left will not find room on the disk."""
        settings = self.settings
        if self.sampler.rank:
            return
        left = sum(map(settings.is_due, range(self.progress.epoch, settings.epochs)))
        count = min(left, settings.keep + 1) if settings.keep else left  # the best is one of those, or kept
        moments = 2 if "betas" in self.updater.optimizer.defaults else 1
        size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        size *= 1 if self.updater.average is None else 2
        size += moments * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        free = shutil.disk_usage(settings.folder).free
        if count * size > free:
            logger.warning(
                f"checkpoints: {count} of {size / 1e6:.0f} MB each will take {count * size / 1e9:.2f} GB, "
                f"and {free / 1e9:.2f} GB are free (TRAIN.KEEP_CHECKPOINTS and SAVE_FREQ limit them)"
            )

    def warn_of_a_short_run(self, train):
        """Warn of a warm-up, or of an average without one, that needs more updates than the run has."""
        per_epoch, average = self.sampler.updates_per_epoch, self.updater.average
        updates = train.EPOCHS * per_epoch
        if self.progress.epoch >= train.EPOCHS:
            return
        if (train.WARMUP_STEPS or train.WARMUP_EPOCHS * per_epoch) >= updates:
            key = "TRAIN.WARMUP_STEPS" if train.WARMUP_STEPS else "TRAIN.WARMUP_EPOCHS"
            logger.warning(f"{key} covers the whole run: TRAIN.BASE_LR is never reached")
        if average is not None and not train.EMA.WARMUP:
            updates = average.updates + updates - int(self.position())
            stays = train.EMA.DECAY**updates
            if stays > 0.1:
                logger.warning(
                    f"TRAIN.EMA.DECAY {train.EMA.DECAY} is too high for an average over {updates} updates: "
                    f"{100 * stays:.0f}% of it will be the weights that it begins with; set TRAIN.EMA.WARMUP "
                    f"True, or DECAY to {max(0, 1 - 3 / updates):.6g} or less"
                )

    def restore(self, start):
        """Load what the run starts from.

        Args:
            start: a :class:`~training.setup.Start`.

        Raises:
            CheckpointError: the file does not fit, or the run would overwrite later checkpoints of another.
        """
        path, average = start.path, self.updater.average
        if start.resumes:
            try:
                self._load(path, start.checkpoint)
            except ckpt.CheckpointError:
                raise
            # The entries of a stranger's file can be anything.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                raise ckpt.CheckpointError(f"{path} is not the checkpoint of a run ({reason})") from error
            self._agree_with_best(path, start.checkpoint)
            where = f"epoch {self.progress.epoch}, image {self.progress.images}"
            score = f"max {self.settings.task.score_name} {self.best_in_words()}"
            logger.info(f"resuming from {path}: {where}, {score}")
            before, now = start.checkpoint.get("cpu"), choices.describe()
            if before not in (None, now) and self.device.type == "cpu":
                logger.warning(
                    f"{path} was written on another processor ({before}; here {now}): this run will end with "
                    "other bits than one that stays there"
                )
            if isinstance(start.checkpoint["config"], str):
                self._tell_changed_options(start.checkpoint["config"], path)
        elif path:
            self.settings.task.load_pretrained(self.model, start.checkpoint, path)
            logger.info(f"starting from the weights of {path}")
        else:
            logger.info(f"starting from scratch: no checkpoint in {self.settings.folder}")
        if average is not None and not average.updates:
            average.restart(self.model)
        if start.latest and ckpt.place_of(start.latest) > (self.progress.epoch, self.progress.images):
            raise ckpt.CheckpointError(
                f"{start.latest} would be overwritten: choose another --tag, or set TRAIN.AUTO_RESUME True"
            )
        per_epoch = self.sampler.updates_per_epoch
        self.record.start(self.progress.epoch, self.before + self.progress.updates, per_epoch)

    def _load(self, path, checkpoint):
        sampler, place = self.sampler, checkpoint.get("progress")
        weights = {name: checkpoint[name] for name in ("model", "classes", "config")}
        ckpt.load_weights(self.model, weights, path)
        self._load_average(path, checkpoint)
        ckpt.load_optimizer(self.updater.optimizer, self.model, checkpoint, path)
        self.best = float(checkpoint.get("max_accuracy", self.best))
        self.better = checkpoint.get("better")
        self.progress = Progress(checkpoint["epoch"] + 1, self.device)
        if "updater" in checkpoint:
            self.updater.load_state_dict(checkpoint["updater"])
        if place:
            if place["images"] > sampler.length:
                raise ckpt.CheckpointError(
                    f"{path} stands at image {place['images']} of an epoch, and the training set has "
                    f"{sampler.length}: resume with the same data, or start from the weights alone with "
                    f"{ckpt.NEW_RUN}"
                )
            self.progress.load_state_dict(place, sampler.rank, sampler.world_size)
            if place["images_per_update"] != sampler.images_per_update:
                logger.warning(
                    f"images per update: {place['images_per_update']} before, {sampler.images_per_update} "
                    f"now. The epoch goes on after its first {place['images']} images; the learning rate "
                    "follows the images seen and the new size"
                )
        # Without a count, as in earlier releases, the epochs are taken to have been as long as now.
        self.before = self.progress.epoch * sampler.updates_per_epoch
        if "updates" in checkpoint:
            self.before = checkpoint["updates"] - self.progress.updates

    def _load_average(self, path, checkpoint):
        average, saved = self.updater.average, "ema" in checkpoint
        if average is not None and saved:
            weights = dict(model=checkpoint["model_ema"], classes=checkpoint["classes"])
            ckpt.load_weights(average.model, weights, path)
            average.updates = checkpoint["ema"]["updates"]
        elif average is not None:
            logger.warning(f"{path} has no averaged weights: the average (TRAIN.EMA) starts from its weights")
        elif saved:
            logger.warning(
                f"{path} has averaged weights, which are dropped, because TRAIN.EMA.ENABLED is False: the "
                "weights themselves are now evaluated, and compared with the best so far"
            )

    def _agree_with_best(self, path, checkpoint):
        """Make ``best.pth`` and what the run says of it agree, whatever a kill or a full disk left of them.

        An epoch's checkpoint is written before ``best.pth``, and claims to be the best already.
        """
        folder = self.settings.folder

        def agree():
            held, whose = ckpt.score_of_best(folder)
            if held < self.best and checkpoint.get("score") == self.best:
                with contextlib.suppress(OSError):
                    best = ckpt.save_best(folder, ckpt.read_checkpoint(path), path)
                    logger.info(f"saved {best}: {path} is the best so far")
                    held, whose = self.best, ckpt.better_of(checkpoint)
            return held, whose

        held, self.best_of = from_rank_0(agree)
        if held < self.best:
            logger.warning(
                f"{path} is of a run that reached {percent(self.best)}, but no {ckpt.BEST} in {folder} "
                f"has that score: the best so far is {percent(held)}"
            )
        self.best = held

    def _tell_changed_options(self, before, path):
        """Log which options of the run differ from those in a checkpoint, given as YAML text."""
        with contextlib.suppress(ConfigError):  # options of a stranger's, or of another release
            before, now = flat_text(before, path), flat_text(self.settings.config, "the config")
            keys = [key for key in now if before.get(key) != now[key] and key not in (*APART, "MODEL.RESUME")]
            changed = [f"{key} {before.get(key)!r:.60} -> {now[key]!r:.60}" for key in keys]
            if changed:
                logger.warning(f"options that the checkpoint was not trained with: {', '.join(changed)}")

    def explain(self, error, paths, update):
        """A NonFiniteError that names files of an update; the log file lists them all.

        Args:
            paths: the file of every image index.
            update: counted from where the sampler's iteration started.
        """
        files = [paths[index] for index in self.sampler.indices_of(update)]
        logger.info("\n".join(["the last batch of this process:", *files]), extra=FILE)
        return NonFiniteError(
            f"{error}; the last batch of this process held {', '.join(files[:3])} ... (all of it is in "
            f"log_rank{self.sampler.rank}.txt). The last good checkpoint is in {self.settings.folder}: lower "
            "TRAIN.BASE_LR, look at the files, or use AMP_DTYPE bfloat16"
        )
