"""One epoch of training, and its log lines."""

import contextlib
import itertools
import logging
import time

from distributed import seed_everything
from logger import DETAIL, ProgressBar, clock, log_progress
from optimizer import NonFiniteError
from utils import peak_memory_mb

logger = logging.getLogger("msg_transformer")


def train_one_epoch(run, loader, losses_of):
    """Train for the rest of the run's epoch; a step of the log is one optimizer update.

    Nothing waits for the device between updates, except for a log line every ``print_freq`` updates. Whatever
    ``losses_of`` draws depends on (seed, rank, epoch, images seen) only: a resumed run draws what an
    undisturbed one would.

    Args:
        losses_of: called with the images and targets of a micro-batch and its number in the update; returns
            the mean losses by name, whose sum is minimised.

    Returns:
        Mean train_loss over all processes, ``loss_<name>`` where there are several, last lr, mean grad_norm,
        images_per_second and seconds.

    Raises:
        SystemExit: a signal asked to stop; the run is saved.
        NonFiniteError: too many updates in a row were not finite.
        DataError: too many images cannot be read.
    """
    settings, updater, progress, sampler = run.settings, run.updater, run.progress, run.sampler
    log = EpochLog(run)
    run.model.train()
    with log.bar as bar:
        for update, micro_batches in enumerate(bar.over(by_update(loader, sampler.accumulation)), log.first):
            seed_everything("dropout", settings.seed, sampler.rank, progress.epoch, progress.images)
            means = {}
            for part, (images, targets) in enumerate(micro_batches):
                with updater.micro_batch(part):
                    losses = losses_of(images, targets, part)
                    updater.backward(sum(losses.values()))
                for name, loss in losses.items():
                    means[name] = means.get(name, 0) + loss.detach() / sampler.accumulation
            run.scheduler.step_update(run.position())
            try:
                norm = updater.update()
            except NonFiniteError as error:  # of the update before
                raise run.explain(error, loader.paths, max(0, update - log.first - 1)) from error
            progress.add(sampler.images_per_update, means, norm)
            if update % settings.print_freq == 0:
                log.write(update, means, norm)
            run.after_update()
    result = log.end()
    loader.check_failures()
    return result


def by_update(loader, accumulation):
    """Yield, for each update, an iterator over its micro-batches, each fetched when it is asked for."""
    # Closed even where the caller still holds the iterator of an update that an error broke off.
    with contextlib.closing(batch for batch in loader) as batches:
        for first in batches:
            # An iterator, unlike a list, lets go of what it gave: the first must not outlast its turn.
            micro_batches = itertools.chain(iter([first]), itertools.islice(batches, accumulation - 1))
            del first
            yield micro_batches


class EpochLog:
    """What the log says of the run's epoch, and how long its updates take.

    Attributes:
        first: the number of the first update, which is not 0 after a resume.
        bar: a :class:`~logger.ProgressBar` of the updates.
    """

    def __init__(self, run):
        self.run, self.first = run, run.progress.updates
        self.updates = self.first + run.sampler.updates
        self.begin = self.printed = time.time()
        self.printed_update = self.first
        epoch, epochs = run.progress.epoch, run.settings.epochs
        what = f"epoch {epoch} ({epoch + 1} of {epochs})"
        self.bar = ProgressBar(what, self.updates, initial=self.first, unit="update")

    def write(self, update, losses, norm):
        """Write the log line of an update, and its scalars; ``losses`` by name and ``norm`` are tensors."""
        run, progress, epochs = self.run, self.run.progress, self.run.settings.epochs
        skipped = run.updater.skipped.item()
        # Reading the loss waits for the device, so that the time is true.
        loss, norm = sum(losses.values()).item(), norm.item()
        parts = {name: part.item() for name, part in losses.items()} if len(losses) > 1 else {}
        mean_loss, mean_norm = (progress.sums[name].item() / progress.updates for name in ("loss", "norm"))
        now, done = time.time(), update + 1
        seconds = (now - self.printed) / (done - self.printed_update)  # of an update, since the last line
        mean_seconds = (now - self.begin) / (done - self.first)
        self.printed, self.printed_update = now, done
        left = self.updates - done
        left_in_run = left + (epochs - progress.epoch - 1) * run.sampler.updates_per_epoch
        lr = learning_rate(run)
        log_progress(
            f"Train: [{progress.epoch}/{epochs}][{update}/{self.updates}]\t"
            f"eta {clock(left * mean_seconds)} (run {clock(left_in_run * mean_seconds)}) "
            f"lr {lr:.3g}\ttime {seconds:.4f} ({mean_seconds:.4f})\t"
            f"loss {loss:.4f} ({mean_loss:.4f})\t"
            f"grad_norm {norm:.4f} ({mean_norm:.4f})\t"
            f"mem {peak_memory_mb(run.device):.0f}MB"
            + (f"\tskipped {skipped}" if skipped else "")
            + ("\t" + " ".join(f"{name} {part:.4f}" for name, part in parts.items()) if parts else ""),
            mean_seconds * (self.updates - self.first),
        )
        self.bar.set_postfix_str(f"loss {loss:.4f}")
        values = dict(lr=lr, images_per_second=run.sampler.images_per_update / seconds, loss=loss)
        values.update(grad_norm=norm, **{f"loss_{name}": part for name, part in parts.items()})
        run.record.scalars(run.before + update, **values)

    def end(self):
        """Write the last line of the epoch; returns its means, as :func:`train_one_epoch` does."""
        run = self.run
        means = run.progress.means()
        # A run resumed after the last update of an epoch has not set its learning rate.
        run.scheduler.step_update(run.position() - 1)
        seconds = time.time() - self.begin
        logger.info(f"EPOCH {run.progress.epoch} training takes {clock(seconds)}", extra=DETAIL)
        return dict(
            train_loss=means.pop("loss"),
            grad_norm=means.pop("norm"),
            **means,
            lr=learning_rate(run),
            images_per_second=(self.updates - self.first) * run.sampler.images_per_update / seconds,
            seconds=seconds,
        )


def learning_rate(run):
    """The learning rate that the last update used; with ``TRAIN.LAYER_DECAY`` that of the last layer."""
    return max(group["lr"] for group in run.updater.optimizer.param_groups)
