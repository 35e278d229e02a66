"""An epoch of training, the optimizer update, where a run stands, and when and how it is saved and restored.

Where a run stands is counted in images, not in batches: a run can go on with another number of processes or
another batch size, and everything random is a function of (seed, epoch, images seen), so nothing random has
to be saved.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

import torch
from torch import nn

import checkpoint as ckpt
from config import dump_config
from distributed import (
    from_rank_0,
    gather_floats,
    largest_over_processes,
    parallelize,
    rank_and_world_size,
    sum_over_processes,
)
from logger import write_config
from lr_scheduler import build_scheduler
from optimizer import build_optimizer
from utils import UserError, autocast, clock, peak_memory_mb, seed_everything

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, the same command goes on


class NonFiniteError(UserError):
    """Too many updates in a row had a non-finite gradient."""


def build_run(
    config,
    model,
    sampler,
    device,
    amp_dtype,
    base_images,
    logger,
    score="accuracy",
    load_pretrained=None,
    claim=None,
):
    """Set up training of a model, and restore what is there already.

    Args:
        base_images: images per update that ``TRAIN.BASE_LR`` is for.
        score: what the best checkpoint is best in.
        load_pretrained: as for :meth:`Run.restore`.
        claim: the run's :class:`~run.FolderClaim`.

    Returns:
        A :class:`Run` at the epoch to train next, its updater's model parallelised over the processes.
    """
    train = config.TRAIN
    lr_scale = sampler.images_per_update / base_images
    optimizer = build_optimizer(config, model, lr_scale)
    scheduler = build_scheduler(config, optimizer, sampler.updates_per_epoch, lr_scale)
    updater = Updater(
        model, optimizer, device, amp_dtype, sampler.accumulation, train.CLIP_GRAD, train.MAX_NONFINITE
    )
    run = Run(
        model,
        updater,
        scheduler,
        sampler,
        config.OUTPUT,
        dump_config(config),
        train.KEEP_CHECKPOINTS,
        train.ON_SAVE_ERROR == "stop",
        logger,
        score,
        claim,
    )
    run.restore(
        config.MODEL.RESUME, train.AUTO_RESUME, config.MODEL.PRETRAINED, train.START_EPOCH, load_pretrained
    )
    run.write_config()
    run.tell_disk_use(train.EPOCHS, config.SAVE_FREQ)
    if run.progress.epoch < train.EPOCHS and not train.WARMUP_STEPS and train.WARMUP_EPOCHS >= train.EPOCHS:
        logger.warning("TRAIN.WARMUP_EPOCHS covers the whole run: TRAIN.BASE_LR is never reached")
    if rank_and_world_size()[1] > 1:
        updater.model = parallelize(model, device)
    return run


def check_checkpoints(config):
    """Read the files of ``--resume`` and ``--pretrained`` once, before anything that takes long.

    Where the run continues from its own folder, it needs neither.

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    if config.TRAIN.AUTO_RESUME and not config.EVAL_MODE and ckpt.in_order(config.OUTPUT):
        return
    if config.MODEL.RESUME:
        (ckpt.read_weights if config.EVAL_MODE else ckpt.read_run)(config.MODEL.RESUME)
    if config.MODEL.PRETRAINED:
        ckpt.read_weights(config.MODEL.PRETRAINED)


def choose_for_evaluation(config, logger):
    """Read ``--resume``, or else the latest checkpoint of the run's folder: (path, weights and classes)."""
    path = config.MODEL.RESUME
    if path:
        return path, ckpt.read_weights(path)
    path, checkpoint = ckpt.read_latest(config.OUTPUT, logger.warning)
    if path is None:
        raise ckpt.CheckpointError(f"nothing to evaluate: give --resume (no checkpoint in {config.OUTPUT})")
    return path, {name: checkpoint[name] for name in ("model", "classes")}


def train_epochs(
    run, loader, losses_of, evaluate, key, schedule, seed, epochs, print_freq, save_freq, record
):
    """Train up to ``epochs``, evaluating after every epoch and saving as configured.

    Args:
        losses_of, schedule, seed, print_freq, record: see :func:`train_one_epoch`.
        evaluate: called without arguments; returns a dict of figures for the record.
        key: the figure that the best checkpoint is best in, in percent.
        save_freq: epochs between checkpoints.

    Raises:
        CheckpointError: the last checkpoint could not be written.
    """
    start, logger = run.progress.epoch, run.logger
    if start >= epochs:
        logger.info(f"all {epochs} epochs are trained already; max {run.score} {percent(run.best)}")
        return
    schedule.start()
    begin = time.time()
    for epoch in range(start, epochs):
        run.start_epoch(epoch)
        trained = train_one_epoch(run, loader, losses_of, schedule, seed, epochs, print_freq, record)
        loader.check_failures()
        result = evaluate()
        if record is not None:
            update = (epoch + 1) * run.sampler.updates_per_epoch
            record.end_epoch(update, epoch=epoch, **trained, **result)
        due = epoch % save_freq == 0 or epoch + 1 == epochs
        files = run.end_epoch(float(result[key]), due)
    if not files:
        raise ckpt.CheckpointError(f"the last checkpoint could not be written to {run.folder}")
    if record is not None:
        record.close()
        logger.info(
            f"trained epochs {start} to {epochs - 1} in {clock(time.time() - begin)}\n"
            f"  {f'max {run.score}:':16} {percent(run.highest)}\n"
            f"  best checkpoint: {run.best_checkpoint()}\n"
            f"  training curves: {record.picture}"
        )


def train_one_epoch(run, loader, losses_of, schedule, seed, epochs, print_freq, record):
    """Train for the rest of the run's epoch; a step of the log is one optimizer update.

    Nothing waits for the device between updates, but for a log line every ``print_freq`` updates. Whatever
    ``losses_of`` draws depends on (seed, rank, epoch, images seen) only: a resumed run draws what an
    undisturbed one would.

    Args:
        losses_of: called with the images and targets of a micro-batch and its number in the update; returns
            the mean losses by name, whose sum is minimised.
        schedule: a :class:`SaveSchedule`.
        epochs: of the whole run, for the time left.
        record: a RunRecord, None on other ranks.

    Returns:
        Mean train_loss over all processes, ``loss_<name>`` where there are several, last lr, mean grad_norm,
        images_per_second and seconds.

    Raises:
        SystemExit: a signal asked to stop; the run is saved and the exit code is ``REQUEUE_EXIT_CODE``.
        NonFiniteError: too many updates in a row were not finite.
    """
    updater, progress, sampler = run.updater, run.progress, run.sampler
    done, updates = progress.updates, progress.updates + sampler.updates
    run.model.train()
    sums = {}
    begin = printed = time.time()
    printed_update = done
    for step, (images, targets) in enumerate(loader):
        update, part = divmod(step, sampler.accumulation)
        update += done
        if part == 0:
            seed_everything("dropout", seed, sampler.rank, progress.epoch, progress.images)
            sums = {}
        with updater.micro_batch(part):
            losses = losses_of(images, targets, part)
            updater.backward(sum(losses.values()))
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() / sampler.accumulation
        if part + 1 < sampler.accumulation:
            continue
        run.scheduler.step_update(run.position())
        try:
            norm = updater.update()
        except NonFiniteError as error:
            raise explain_nonfinite(
                error, loader.paths, sampler, max(0, update - done - 1), run.folder
            ) from error
        progress.add(sampler.images_per_update, sums, norm)

        if update % print_freq == 0:
            # Reading the loss waits for the device, so that the time is true.
            values = dict(loss=sum(sums.values()).item(), grad_norm=norm.item())
            if len(sums) > 1:
                values.update({f"loss_{name}": loss.item() for name, loss in sums.items()})
            now = time.time()
            mean_time = (now - begin) / (update + 1 - done)
            time_now = (now - printed) / (update + 1 - printed_update)
            printed, printed_update = now, update + 1
            log_update(run, update, updates, epochs, values, time_now, mean_time, record)
        save, stop = schedule.after_update()
        if save:
            files = run.save()
        if stop:
            if record is not None:
                record.close()
            if not files:
                raise ckpt.CheckpointError(f"stopped by signal {stop}, but the run could not be saved")
            name = "the end of its launcher" if stop == signal.SIGHUP else signal.Signals(stop).name
            run.logger.info(f"stopped by {name}: the same command goes on (exit code {REQUEUE_EXIT_CODE})")
            sys.exit(REQUEUE_EXIT_CODE)
    means = progress.means()
    # A run resumed behind the last update of an epoch has not set its learning rate.
    run.scheduler.step_update(run.position() - 1)
    seconds = time.time() - begin
    run.logger.info(f"EPOCH {progress.epoch} training takes {clock(seconds)}")
    return dict(
        train_loss=means.pop("loss"),
        grad_norm=means.pop("norm"),
        **means,
        lr=learning_rate(run),
        images_per_second=(updates - done) * sampler.images_per_update / seconds,
        seconds=seconds,
    )


def log_update(run, update, updates, epochs, values, time_now, mean_time, record):
    """Write the log line of an update, and its TensorBoard scalars.

    Args:
        update, updates: of this epoch, number and count.
        values: loss, its parts where there are several, and grad_norm of the update.
        time_now, mean_time: seconds per update, since the last line and since the epoch's start or resume.
    """
    progress, per_epoch = run.progress, run.sampler.updates_per_epoch
    lr, skipped = learning_rate(run), run.updater.skipped.item()
    left = updates - update - 1
    left_in_run = left + (epochs - progress.epoch - 1) * per_epoch
    parts = [f"{name.removeprefix('loss_')} {value:.4f}" for name, value in values.items() if "loss_" in name]
    run.logger.info(
        f"Train: [{progress.epoch}/{epochs}][{update}/{updates}]\t"
        f"eta {clock(left * mean_time)} (run {clock(left_in_run * mean_time)}) "
        f"lr {lr:.6f}\ttime {time_now:.4f} ({mean_time:.4f})\t"
        f"loss {values['loss']:.4f} ({progress.loss.item() / progress.updates:.4f})\t"
        f"grad_norm {values['grad_norm']:.4f} ({progress.norm.item() / progress.updates:.4f})\t"
        f"mem {peak_memory_mb(run.updater.device):.0f}MB"
        + (f"\tskipped {skipped}" if skipped else "")
        + (f"\t{' '.join(parts)}" if parts else "")
    )
    if record is not None:
        speed = run.sampler.images_per_update / time_now
        record.scalars(progress.epoch * per_epoch + update, lr=lr, images_per_second=speed, **values)


def percent(score):
    """A score as text; one below 0 is none."""
    return f"{score:.2f}%" if score >= 0 else "unknown"


def learning_rate(run):
    """The learning rate that the last update used."""
    return run.updater.optimizer.param_groups[0]["lr"]


class Updater:
    """Optimizer updates: accumulation, gradient scaling, clipping, and no change from bad gradients.

    An update whose gradient norm is not finite is skipped on every process alike and counted. The gradient
    scaler serves for that in every precision; it scales the loss only where it is float16.

    Args:
        model: the module that is called, a DistributedDataParallel one where there are several processes.
        amp_dtype: dtype of autocast, None for float32.
        accumulation: micro-batches of an update.
        clip_grad: largest global gradient norm, 0 for no clipping.
        max_nonfinite: skipped updates in a row after which the run ends.
    """

    def __init__(self, model, optimizer, device, amp_dtype, accumulation, clip_grad, max_nonfinite):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.amp_dtype, self.accumulation = amp_dtype, accumulation
        self.clip_grad, self.max_nonfinite = clip_grad, max_nonfinite
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self._scales() else 1.0)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        cuda = device.type == "cuda"
        self.counted = torch.zeros((), dtype=torch.int64, pin_memory=cuda)
        self.counted_event = torch.cuda.Event() if cuda else None

    def _scales(self):
        return self.amp_dtype == torch.float16

    @contextlib.contextmanager
    def micro_batch(self, part):
        """Context of forward and :meth:`backward` of micro-batch ``part``; the last sends gradients."""
        if part == 0:
            self.optimizer.zero_grad()
        last = part + 1 == self.accumulation
        quiet = not last and isinstance(self.model, nn.parallel.DistributedDataParallel)
        with self.model.no_sync() if quiet else contextlib.nullcontext():
            yield

    def autocast(self):
        """Mixed precision for the forward pass, as configured."""
        return autocast(self.device, self.amp_dtype)

    def backward(self, loss):
        """Accumulate the gradients of a micro-batch's mean loss."""
        self.scaler.scale(loss / self.accumulation).backward()

    def update(self):
        """Clip, then change the parameters unless a gradient is not finite.

        Returns:
            The global gradient norm before clipping, a tensor on the device.

        Raises:
            NonFiniteError: ``max_nonfinite`` updates in a row were skipped, the last but one among them.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        bad = ~torch.isfinite(norm)
        # The scaler looks at single elements: it must see what makes the norm alone overflow, too.
        parameters[0].grad.add_(torch.where(bad, torch.nan, 0.0))
        norm = norm / self.scaler.scale(torch.ones((), device=self.device))
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        # Only float16 has a scale to find; elsewhere a skipped update must not change it.
        self.scaler.update(None if self._scales() else 1.0)
        self.skipped = self.skipped + bad.long()
        self.skipped_in_a_row = bad.long() * (self.skipped_in_a_row + 1)
        self._check_the_update_before()
        return norm

    def _check_the_update_before(self):
        """End the run after too many skips, without waiting for the update that was just queued."""
        if self.counted_event is not None:
            self.counted_event.synchronize()
        in_a_row = int(self.counted)
        self.counted.copy_(self.skipped_in_a_row, non_blocking=True)
        if self.counted_event is not None:
            self.counted_event.record()
        if self.max_nonfinite and in_a_row >= self.max_nonfinite:
            raise NonFiniteError(
                f"loss or gradients were not finite in {self.max_nonfinite} updates in a row"
            )

    def state_dict(self):
        """The gradient scale, the precision it is for, and the counts of skipped updates."""
        counts = dict(skipped=self.skipped.item(), skipped_in_a_row=self.skipped_in_a_row.item())
        return dict(scaler=self.scaler.state_dict(), amp_dtype=str(self.amp_dtype), **counts)

    def load_state_dict(self, state):
        """Continue from :meth:`state_dict`; a scale saved for another precision is left alone."""
        if state["amp_dtype"] == str(self.amp_dtype):
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state["skipped"])
        self.skipped_in_a_row.fill_(state["skipped_in_a_row"])
        self.counted.fill_(state["skipped_in_a_row"])


class Progress:
    """Where a run stands: the epoch, how many of its images were used, the sums behind the epoch's means."""

    def __init__(self, epoch, device):
        self.epoch, self.images, self.updates = epoch, 0, 0
        self.loss, self.norm = torch.zeros((), device=device), torch.zeros((), device=device)
        self.parts = {}  # of a loss that has several, by name

    def add(self, images, losses, norm):
        """Count an update: its images over all processes, its mean losses here, its gradient norm."""
        self.images, self.updates = self.images + images, self.updates + 1
        self.loss = self.loss + torch.nan_to_num(sum(losses.values()), 0.0, 0.0, 0.0)
        self.norm = self.norm + torch.nan_to_num(norm, 0.0, 0.0, 0.0)
        if len(losses) > 1:
            for name, loss in losses.items():
                self.parts[name] = self.parts.get(name, 0) + torch.nan_to_num(loss, 0.0, 0.0, 0.0)

    def means(self):
        """Means over the updates and all processes: loss, norm, and ``loss_<part>``; all must call it."""
        sums = dict(loss=self.loss, norm=self.norm)
        sums.update({f"loss_{name}": self.parts[name] for name in sorted(self.parts)})
        total = sum_over_processes(torch.stack(list(sums.values())))
        return dict(zip(sums, (total / self.updates / rank_and_world_size()[1]).tolist()))

    def state_dict(self):
        """Plain numbers, the same on every process; all processes must call it."""
        sums = [gather_floats(self.loss), gather_floats(self.norm)]
        parts = {name: gather_floats(self.parts[name]) for name in sorted(self.parts)}
        counts = dict(epoch=self.epoch, images=self.images, updates=self.updates)
        return dict(counts, loss=sums[0], norm=sums[1], parts=parts)

    def load_state_dict(self, state, rank, world_size):
        """Continue from :meth:`state_dict`, on the same number of processes or another."""
        self.epoch, self.images, self.updates = state["epoch"], state["images"], state["updates"]
        self.parts = {name: torch.zeros_like(self.loss) for name in state.get("parts", {})}
        totals = [(state["loss"], self.loss), (state["norm"], self.norm)]
        totals += [(state["parts"][name], total) for name, total in self.parts.items()]
        for sums, total in totals:
            total.fill_(sums[rank] if len(sums) == world_size else sum(sums) / len(sums))


class SaveSchedule:
    """Decides after every update, for all processes alike, whether to save and whether to stop.

    SIGTERM, SIGINT and SIGUSR1 of any process ask all of them to save and stop; a second SIGINT interrupts at
    once. Before :meth:`start`, while there is nothing to save, they end the process with
    ``REQUEUE_EXIT_CODE``. The end of torchrun, of which its processes hear nothing, counts as a SIGHUP.

    Args:
        steps: updates between checkpoints, 0 for none within an epoch.
        minutes: minutes between checkpoints by the fastest clock, 0 for none.
    """

    def __init__(self, steps, minutes):
        self.steps, self.seconds = steps, 60 * minutes
        self.updates, self.saved, self.signal = 0, None, 0
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
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
        """Count an update.

        Returns:
            (whether to save now, number of the signal to stop for or 0), the same on every process.
        """
        self.updates += 1
        if self.launcher is not None and os.getppid() != self.launcher:
            self.signal = self.signal or signal.SIGHUP
        late = self.seconds > 0 and time.monotonic() - self.saved >= self.seconds
        late, stop = largest_over_processes(int(late), self.signal)
        due = bool(late or stop) or (self.steps > 0 and self.updates % self.steps == 0)
        if due:
            self.saved = time.monotonic()
        return due, stop


class Run:
    """What a training run consists of, and how it is saved and restored.

    Args:
        model: the plain module whose weights are saved.
        updater, scheduler: the run's :class:`Updater` and timm scheduler.
        sampler: the training sampler; it is told where to start.
        folder: the run's output folder.
        config: YAML text of the effective config, for people who open the checkpoint.
        keep: epoch checkpoints to keep, 0 for all.
        stop_on_save_error: end the run when a checkpoint cannot be written.
        score: what ``best`` is the largest of so far, in percent.
        claim: keeps other runs out of the folder; None where nobody does.

    Attributes:
        best: the score of the weights in ``best.pth``.
        highest: the highest score so far, be it written or not.
    """

    def __init__(
        self,
        model,
        updater,
        scheduler,
        sampler,
        folder,
        config,
        keep,
        stop_on_save_error,
        logger,
        score="accuracy",
        claim=None,
    ):
        self.model, self.updater, self.scheduler, self.sampler = model, updater, scheduler, sampler
        self.folder, self.config, self.keep, self.logger = folder, config, keep, logger
        self.stop_on_save_error, self.score, self.claim = stop_on_save_error, score, claim
        self.progress = Progress(0, updater.device)
        self.best = self.highest = -1.0  # below 0, so that even a first score of 0 is the best so far

    def start_epoch(self, epoch):
        """Set out for the rest of a restored epoch, or for a whole one."""
        if self.progress.epoch != epoch:
            self.progress = Progress(epoch, self.updater.device)
        self.sampler.start(epoch, self.progress.images)

    def position(self):
        """Updates since the start of the run, had all been of today's size: the place in the schedule."""
        per_epoch = self.sampler.updates_per_epoch
        return self.progress.epoch * per_epoch + self.progress.images / self.sampler.images_per_update

    def end_epoch(self, score, due):
        """Save at the end of an epoch, as the best too where the score is higher than any written before.

        Args:
            score: of the epoch's weights, in percent.
            due: write an epoch checkpoint.

        Returns:
            The names of the files written, as :meth:`save` does.
        """
        before, self.best = self.best, max(self.best, score)
        self.highest = max(self.highest, score)
        self.logger.info(f"Max {self.score}: {percent(self.highest)}")
        best = self.best > before
        files = self.save(score, due, best)
        if best and ckpt.BEST not in files:
            self.best = before  # the next epoch may still write a best checkpoint
        return files

    def save(self, score=None, due=True, best=False):
        """Write a checkpoint; all processes must call it, rank 0 writes.

        Args:
            score: of the weights, at the end of an epoch; None within it.
            due: write the run's own checkpoint; otherwise the best only.
            best: the score is the best so far.

        Returns:
            The names of the files written; where writing failed, which the log says, some are missing.

        Raises:
            CheckpointError: writing failed and ``stop_on_save_error`` is set.
        """
        progress, updater = self.progress.state_dict(), self.updater.state_dict()
        epoch, epoch_done = self.progress.epoch, score is not None
        checkpoint = dict(
            model=self.model.state_dict(),
            optimizer=self.updater.optimizer.state_dict(),
            # For the official code, which reads it; here the rate is a function of the place in the run.
            lr_scheduler=self.scheduler.state_dict(),
            updater=updater,
            progress=None if epoch_done else dict(progress, images_per_update=self.sampler.images_per_update),
            max_accuracy=self.best,
            score=score,
            epoch=epoch if epoch_done else epoch - 1,
            config=self.config,
            classes=getattr(self.model, "classes", None),
        )
        name = ckpt.epoch_name(epoch) if epoch_done else ckpt.within_epoch_name(epoch, self.progress.images)

        def write():
            files = []
            try:
                if self.claim is not None:
                    self.claim.keep()
                if not os.path.exists(
                    os.path.join(self.folder, "config.yaml")
                ):  # somebody removed the folder
                    self.write_config()
                if due:
                    files.append(ckpt.save_in_folder(self.folder, checkpoint, name, self.keep))
                if best:
                    files.append(ckpt.save_best(self.folder, checkpoint, *files))
            except OSError as error:
                return files, f"cannot write a checkpoint to {self.folder}: {error.strerror or error}"
            return files, None

        files, problem = from_rank_0(write) if due or best else ([], None)
        if files:
            self.logger.info(f"saved {', '.join(files)}")
        if problem and self.stop_on_save_error:
            raise ckpt.CheckpointError(f"{problem}; stopping (TRAIN.ON_SAVE_ERROR)")
        if problem:
            self.logger.error(f"{problem}; training goes on, earlier checkpoints are untouched")
        return [os.path.basename(path) for path in files]

    def best_checkpoint(self):
        """The path of ``best.pth``, and what to know about it."""
        path = os.path.join(self.folder, ckpt.BEST)
        if self.best < 0:
            return f"none, {path} could not be written"
        if self.best < self.highest:
            return f"{path}, with {percent(self.best)}: the better one could not be written"
        return path

    def tell_disk_use(self, epochs, save_freq):
        """Log what the checkpoints of the epochs that are left will take on the disk, and what is free."""
        left = [e for e in range(self.progress.epoch, epochs) if e % save_freq == 0 or e + 1 == epochs]
        count = min(len(left), self.keep + 1) if self.keep else len(left)  # the best is one of those, or kept
        moments = 2 if "betas" in self.updater.optimizer.defaults else 1
        size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        size += moments * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        if not left or rank_and_world_size()[0]:
            return
        free = shutil.disk_usage(self.folder).free
        tell = self.logger.warning if count * size > free else self.logger.info
        tell(
            f"checkpoints: {count} of {size / 1e6:.0f} MB each will take {count * size / 1e9:.2f} GB of the "
            f"{free / 1e9:.2f} GB that are free (TRAIN.KEEP_CHECKPOINTS and SAVE_FREQ limit them)"
        )

    def write_config(self):
        """Write ``config.yaml`` to the run's folder, on rank 0."""
        if rank_and_world_size()[0] == 0:
            write_config(self.folder, "config.yaml", self.config, self.logger)

    def restore(self, resume, auto_resume, pretrained, start_epoch, load_pretrained=None):
        """Load what the run continues from: its own latest checkpoint, ``resume``, or ``pretrained``.

        Rank 0 alone reads files and decides; the others get what it read.

        Args:
            load_pretrained: called with the model, the content of ``pretrained`` and its path, where that is
                not a checkpoint of the same kind of model.

        Raises:
            CheckpointError: the file does not fit, or the run would overwrite later checkpoints of another.
        """
        path, checkpoint, latest = from_rank_0(lambda: self._choose(resume, auto_resume))
        self.progress = Progress(start_epoch, self.updater.device)
        if checkpoint is not None:
            try:
                self._load(path, checkpoint)
            except ckpt.CheckpointError:
                raise
            # The entries of a stranger's file can be anything.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                raise ckpt.CheckpointError(f"{path} is not the checkpoint of a run ({reason})") from error
            self._agree_with_best(path, checkpoint)
            where = f"epoch {self.progress.epoch}, image {self.progress.images}"
            self.logger.info(f"resuming from {path}: {where}, max {self.score} {percent(self.best)}")
        elif pretrained:
            weights = from_rank_0(lambda: ckpt.read_weights(pretrained))
            if load_pretrained is None:
                ckpt.load_weights(self.model, weights, pretrained, new_head=True)
            else:
                load_pretrained(self.model, weights, pretrained)
            self.logger.info(f"starting from the weights of {pretrained}")
        else:
            self.logger.info(f"starting from scratch: no checkpoint in {self.folder}")
        if latest and ckpt.place_of(latest) > (self.progress.epoch, self.progress.images):
            raise ckpt.CheckpointError(
                f"{latest} would be overwritten: choose another --tag, or set TRAIN.AUTO_RESUME True"
            )

    def _load(self, path, checkpoint):
        ckpt.load_weights(self.model, checkpoint, path)
        ckpt.load_optimizer(self.updater.optimizer, self.model, checkpoint, path)
        self.best = float(checkpoint.get("max_accuracy", self.best))
        self.progress = Progress(checkpoint["epoch"] + 1, self.updater.device)
        if "updater" in checkpoint:
            self.updater.load_state_dict(checkpoint["updater"])
        if checkpoint.get("progress"):
            images, length = checkpoint["progress"]["images"], self.sampler.length
            if images > length:
                raise ckpt.CheckpointError(
                    f"{path} stands at image {images} of an epoch, and the training set has {length}: resume "
                    "with the same data, or start from the weights alone with --pretrained"
                )
            self._continue_epoch(checkpoint["progress"])

    def _agree_with_best(self, path, checkpoint):
        """Make ``best.pth`` and what the run says of it agree, whatever a kill or a full disk left of them.

        An epoch's checkpoint is written before ``best.pth``, and claims to be the best already.
        """

        def agree():
            held = ckpt.score_of_best(self.folder)
            if held < self.best and checkpoint.get("score") == self.best:
                with contextlib.suppress(OSError):
                    best = ckpt.save_best(self.folder, ckpt.read_checkpoint(path), path)
                    self.logger.info(f"saved {best}: {path} is the best so far")
                    held = self.best
            return held

        held = from_rank_0(agree)
        if held < self.best:
            self.logger.warning(
                f"{path} is of a run that reached {percent(self.best)}, but no {ckpt.BEST} in {self.folder} "
                f"has that score: the best so far is {percent(held)}"
            )
        self.best = self.highest = held

    def _choose(self, resume, auto_resume):
        ckpt.remove_unfinished(self.folder)
        latest, checkpoint = ckpt.read_latest(self.folder, self.logger.warning)
        if latest and auto_resume:
            if resume:
                self.logger.warning(f"auto-resume: continuing from {latest} rather than from {resume}")
            return latest, checkpoint, latest
        return (resume, ckpt.read_run(resume), latest) if resume else (None, None, latest)

    def _continue_epoch(self, state):
        rank, world_size = rank_and_world_size()
        self.progress.load_state_dict(state, rank, world_size)
        before, now = state["images_per_update"], self.sampler.images_per_update
        if before != now:
            self.logger.warning(
                f"images per update: {before} before, {now} now. The epoch goes on after its first "
                f"{state['images']} images; the learning rate follows the images seen and the new size"
            )


def explain_nonfinite(error, paths, sampler, update, folder):
    """Add to a NonFiniteError the files of an update's batch; ``nonfinite_rank<rank>.txt`` lists them all.

    Args:
        paths: the file of every image index.
        update: counted from where the sampler's iteration started.
    """
    path = os.path.join(folder, f"nonfinite_rank{sampler.rank}.txt")
    files = [paths[index] for index in sampler.indices_of(update)]
    try:
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in files)
        where = f"all of it in {path}"
    except OSError as problem:
        where = f"{path} cannot be written: {problem.strerror}"
    return NonFiniteError(
        f"{error}; the last batch of this process held {', '.join(files[:3])} ... ({where}). "
        f"The last good checkpoint is in {folder}: lower TRAIN.BASE_LR, look at the files, or use AMP_DTYPE "
        "bfloat16"
    )
