"""Train, evaluate or time an MSG-Transformer.

python main.py --cfg <config> --data-path <folder>
torchrun --nproc_per_node 8 main.py --cfg <config> --data-path <folder> --batch-size 128
torchrun --nproc_per_node 8 main.py --cfg <config> --data-path <folder> --eval --resume <checkpoint>
"""

import argparse
import datetime
import logging
import os
import signal
import sys
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import checkpoint as ckpt
import distributed
import utils
from config import dump_config, get_config
from data import build_loaders
from data.mixup import build_augmentation
from engine import REQUEUE_EXIT_CODE, NonFiniteError, Run, SaveSchedule, Updater, explain_nonfinite
from logger import RunRecord, create_logger, write_config
from lr_scheduler import build_scheduler
from models import build_model, inference
from optimizer import build_optimizer


def parse_args(argv=None):
    """Parse the official release's command line, and --pretrained, --use-checkpoint and --device."""
    parser = argparse.ArgumentParser(
        description="Train, evaluate or time an MSG-Transformer.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML config")
    add("--opts", nargs="+", metavar="KEY VALUE", help="change config keys, e.g. TRAIN.EPOCHS 100")
    add("--batch-size", type=int, help="images per process and micro-batch")
    add("--data-path", metavar="DIR", help="folder with train/<class>/<image> and val/<class>/<image>")
    add("--resume", metavar="FILE", help="checkpoint to continue from, or to evaluate with --eval")
    add("--pretrained", metavar="FILE", help="checkpoint whose weights start a new run (fine-tuning)")
    add("--accumulation-steps", type=int, help="micro-batches per optimizer update")
    add("--use-checkpoint", action="store_true", help="gradient checkpointing, to save memory")
    add("--amp-opt-level", choices=["O0", "O1", "O2"], help="O0: float32; O1: mixed precision; O2: as O1")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    add("--output", metavar="DIR", help="results go to <output>/<model name>/<tag>; default: output")
    add("--tag", help="name of this run; default: default")
    add("--eval", action="store_true", help="evaluate only")
    add("--throughput", action="store_true", help="time inference only")
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    args = parser.parse_args(argv)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank or 0))
    return args


def main(args):
    """Set up a run and do it."""
    config = get_config(args)
    mode = "eval" if config.EVAL_MODE else "throughput" if config.THROUGHPUT_MODE else "train"
    schedule = SaveSchedule(config.TRAIN.SAVE_STEPS, config.TRAIN.SAVE_MINUTES) if mode == "train" else None
    rank, world_size = distributed.rank_and_world_size()
    device = utils.pick_device(config.DEVICE, config.LOCAL_RANK)
    utils.seed_everything("model", config.SEED)
    torch.backends.cudnn.benchmark = True
    if config.DETERMINISTIC:
        utils.be_deterministic()

    train_loader = sampler = val_loader = None
    if config.DATA.DATA_PATH or not config.THROUGHPUT_MODE:
        loaders = build_loaders(config, rank, world_size, device)
        train_loader, sampler, val_loader, classes = loaders
        named_classes = config.MODEL.NUM_CLASSES
        config.defrost()
        config.MODEL.NUM_CLASSES = len(classes)
        config.freeze()
    model = build_model(config).to(device)

    logger = create_logger(config.OUTPUT, rank)
    distributed.start_process_group(device, config.DIST.TIMEOUT_SECONDS)
    logger.info(f"{mode} on {world_size} x {device}, PyTorch {torch.__version__}\n{dump_config(config)}")
    if val_loader is not None and named_classes != len(classes):
        logger.info(f"MODEL.NUM_CLASSES {named_classes} -> {len(classes)}, the class folders of the data")
    if config.AMP_OPT_LEVEL == "O2":
        logger.warning("AMP level O2 existed only in apex: running as O1")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {model.flops() / 1e9:.3f} GMACs per image")

    if config.COMPILE:
        utils.compile_model(model, logger)
    amp_dtype = None
    if config.AMP_OPT_LEVEL != "O0":
        amp_dtype = getattr(torch, config.AMP_DTYPE) if device.type == "cuda" else torch.bfloat16
    if mode != "train" and rank == 0:
        write_config(config.OUTPUT, f"config_{mode}.yaml", dump_config(config), logger)
    if mode == "throughput":
        if val_loader is not None:
            images = next(iter(val_loader))[0]
        else:
            logger.info("no --data-path: synthetic images")
            shape = (config.DATA.BATCH_SIZE, config.MODEL.MSG.IN_CHANS, *[config.DATA.IMG_SIZE] * 2)
            images = torch.randn(shape, device=device)
        throughput(model, images, amp_dtype, logger)
    elif mode == "eval":
        path, weights = distributed.from_rank_0(lambda: choose_for_evaluation(config, logger))
        ckpt.load_weights(model, weights, path)
        logger.info(f"evaluating {path}")
        evaluate(model, val_loader, device, amp_dtype, config.PRINT_FREQ, logger)
    else:
        fit(model, train_loader, sampler, val_loader, config, device, amp_dtype, schedule, logger)
    distributed.stop_process_group()


def choose_for_evaluation(config, logger):
    """Read ``--resume``, or else the latest checkpoint of the run's folder: (path, its weights alone)."""
    path = config.MODEL.RESUME
    if path:
        checkpoint = ckpt.read_checkpoint(path)
    else:
        path, checkpoint = ckpt.read_latest(config.OUTPUT, logger.warning)
    if path is None:
        raise ckpt.CheckpointError(f"nothing to evaluate: give --resume (no checkpoint in {config.OUTPUT})")
    return path, dict(model=checkpoint.get("model", checkpoint))


def fit(model, loader, sampler, val_loader, config, device, amp_dtype, schedule, logger):
    """Train up to ``TRAIN.EPOCHS``, evaluating after every epoch and saving as configured."""
    rank, world_size = distributed.rank_and_world_size()
    lr_scale = sampler.images_per_update / 512
    optimizer = build_optimizer(config, model, lr_scale)
    scheduler = build_scheduler(config, optimizer, sampler.updates_per_epoch, lr_scale)
    augment = build_augmentation(config, rank, device)
    # Mixup smooths the labels itself.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if augment.mixup else config.MODEL.LABEL_SMOOTHING)
    train = config.TRAIN
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
    )
    start = run.restore(config.MODEL.RESUME, train.AUTO_RESUME, config.MODEL.PRETRAINED, train.START_EPOCH)
    run.write_config()
    if start >= train.EPOCHS:
        logger.info(f"all {train.EPOCHS} epochs are trained already; max accuracy {run.best:.2f}%")
        return
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        logger.warning("TRAIN.WARMUP_EPOCHS covers the whole run: TRAIN.BASE_LR is never reached")
    if world_size > 1:
        updater.model = distributed.parallelize(model, device)
    schedule.start()
    record = RunRecord(config.OUTPUT, start, int(run.position()), logger) if rank == 0 else None
    begin = time.time()
    for epoch in range(start, train.EPOCHS):
        run.start_epoch(epoch)
        trained = train_one_epoch(
            run,
            loader,
            criterion,
            augment,
            schedule,
            config.SEED,
            train.EPOCHS,
            config.PRINT_FREQ,
            record,
            logger,
        )
        result = evaluate(model, val_loader, device, amp_dtype, config.PRINT_FREQ, logger)
        before, run.best = run.best, max(run.best, result["acc1"])
        improved = run.best > before
        logger.info(f"Max accuracy: {run.best:.2f}%")
        if record is not None:
            record.end_epoch((epoch + 1) * sampler.updates_per_epoch, epoch=epoch, **trained, **result)
        due = epoch % config.SAVE_FREQ == 0 or epoch + 1 == train.EPOCHS
        files = run.save(epoch_done=True, due=due, best=improved)
        if improved and ckpt.BEST not in files:
            run.best = before  # the next epoch may still write a best checkpoint
    if not files:
        raise ckpt.CheckpointError(f"the last checkpoint could not be written to {config.OUTPUT}")
    if record is not None:
        record.close()
        logger.info(
            f"trained epochs {start} to {train.EPOCHS - 1} in {clock(time.time() - begin)}\n"
            f"  max accuracy:    {run.best:.2f}% top-1\n"
            f"  best checkpoint: {os.path.join(config.OUTPUT, ckpt.BEST)}\n"
            f"  training curves: {record.picture}"
        )


def train_one_epoch(run, loader, criterion, augment, schedule, seed, epochs, print_freq, record, logger):
    """Train for the rest of the run's epoch; a step of the log is one optimizer update.

    Nothing waits for the device between updates, but for a log line every ``print_freq`` updates. Dropout,
    drop path, erasing and mixup depend on (seed, rank, epoch, images seen) only: a resumed run draws what an
    undisturbed one would.

    Returns:
        Mean train_loss over all processes, last lr, mean grad_norm, images_per_second and seconds.

    Raises:
        SystemExit: a signal asked to stop; the run is saved and the exit code is ``REQUEUE_EXIT_CODE``.
        NonFiniteError: too many updates in a row were not finite.
    """
    updater, progress, sampler = run.updater, run.progress, run.sampler
    device, rank, epoch = updater.device, sampler.rank, progress.epoch
    done, updates = progress.updates, progress.updates + sampler.updates
    run.model.train()
    loss_sum = torch.zeros((), device=device)
    begin = printed = time.time()
    printed_update = done
    for step, (images, targets) in enumerate(loader):
        update, part = divmod(step, sampler.accumulation)
        update += done
        if part == 0:
            utils.seed_everything("dropout", seed, rank, epoch, progress.images)
            loss_sum = torch.zeros((), device=device)
        images, targets = augment(images, targets, epoch, progress.images, part)
        with updater.micro_batch(part):
            with updater.autocast():
                logits = updater.model(images)
            loss = criterion(logits.float(), targets)
            updater.backward(loss)
        loss_sum += loss.detach()
        if part + 1 < sampler.accumulation:
            continue
        run.scheduler.step_update(run.position())
        try:
            norm = updater.update()
        except NonFiniteError as error:
            raise explain_nonfinite(
                error, loader.paths, sampler, max(0, update - done - 1), run.folder
            ) from error
        progress.add(sampler.images_per_update, loss_sum / sampler.accumulation, norm)

        if update % print_freq == 0:
            # Reading the loss waits for the device, so that the time is true.
            values = dict(loss=loss_sum.item() / sampler.accumulation, grad_norm=norm.item())
            now = time.time()
            mean_time = (now - begin) / (update + 1 - done)
            time_now = (now - printed) / (update + 1 - printed_update)
            printed, printed_update = now, update + 1
            log_update(run, update, updates, epochs, values, time_now, mean_time, record, logger)
        save, stop = schedule.after_update()
        if save:
            files = run.save(epoch_done=False)
        if stop:
            if record is not None:
                record.close()
            if not files:
                raise ckpt.CheckpointError(f"stopped by signal {stop}, but the run could not be saved")
            name = signal.Signals(stop).name
            logger.info(f"stopped by {name}: the same command goes on (exit code {REQUEUE_EXIT_CODE})")
            sys.exit(REQUEUE_EXIT_CODE)
    sums = distributed.sum_over_processes(torch.stack([progress.loss, progress.norm]))
    train_loss, grad_norm = (sums / progress.updates / sampler.world_size).tolist()
    # A run resumed behind the last update of an epoch has not set its learning rate.
    run.scheduler.step_update(run.position() - 1)
    seconds = time.time() - begin
    logger.info(f"EPOCH {epoch} training takes {clock(seconds)}")
    return dict(
        train_loss=train_loss,
        grad_norm=grad_norm,
        lr=learning_rate(run),
        images_per_second=(updates - done) * sampler.images_per_update / seconds,
        seconds=seconds,
    )


def log_update(run, update, updates, epochs, values, time_now, mean_time, record, logger):
    """Write the log line of an update, and its TensorBoard scalars.

    Args:
        update, updates: of this epoch, number and count.
        values: loss and grad_norm of the update.
        time_now, mean_time: seconds per update, since the last line and since the epoch's start or resume.
    """
    progress, per_epoch = run.progress, run.sampler.updates_per_epoch
    lr, skipped = learning_rate(run), run.updater.skipped.item()
    left = updates - update - 1
    left_in_run = left + (epochs - progress.epoch - 1) * per_epoch
    logger.info(
        f"Train: [{progress.epoch}/{epochs}][{update}/{updates}]\t"
        f"eta {clock(left * mean_time)} (run {clock(left_in_run * mean_time)}) "
        f"lr {lr:.6f}\ttime {time_now:.4f} ({mean_time:.4f})\t"
        f"loss {values['loss']:.4f} ({progress.loss.item() / progress.updates:.4f})\t"
        f"grad_norm {values['grad_norm']:.4f} ({progress.norm.item() / progress.updates:.4f})\t"
        f"mem {utils.peak_memory_mb(run.updater.device):.0f}MB" + (f"\tskipped {skipped}" if skipped else "")
    )
    if record is not None:
        speed = run.sampler.images_per_update / time_now
        record.scalars(progress.epoch * per_epoch + update, lr=lr, images_per_second=speed, **values)


def learning_rate(run):
    """The learning rate that the last update used."""
    return run.updater.optimizer.param_groups[0]["lr"]


def evaluate(model, loader, device, amp_dtype, print_freq, logger):
    """Top-1, top-5 (percent) and mean cross entropy over all images of all processes, each counted once.

    The processes only meet at the end, so they may have different numbers of batches, or none.

    Returns:
        dict of val_loss, acc1, acc5.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # cross entropy, top-1, top-5, images
    begin = time.time()
    with inference(model, amp_dtype):
        for step, (images, targets) in enumerate(loader):
            if not len(targets):
                continue
            with utils.autocast(device, amp_dtype):
                logits = model(images)
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # B, 5
            loss = cross_entropy(logits.double(), targets, reduction="sum")
            sums += torch.stack(
                [loss, hits[:, 0].sum(), hits.sum(), torch.full((), len(targets), device=device)]
            )
            if step % print_freq == 0:
                loss_mean, acc1, acc5 = (sums[:3] / sums[3]).tolist()
                mean_time = (time.time() - begin) / (step + 1)
                logger.info(
                    f"Test: [{step}/{len(loader)}]\teta {clock((len(loader) - step - 1) * mean_time)}\t"
                    f"Time {mean_time:.3f}\tLoss {loss_mean:.4f}\t"
                    f"Acc@1 {100 * acc1:.3f}\tAcc@5 {100 * acc5:.3f}\t"
                    f"Mem {utils.peak_memory_mb(device):.0f}MB"
                )
    sums = distributed.sum_over_processes(sums).tolist()
    loss, acc1, acc5 = sums[0] / sums[3], 100 * sums[1] / sums[3], 100 * sums[2] / sums[3]
    logger.info(f" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} Loss {loss:.6f} on {sums[3]:.0f} images")
    return dict(val_loss=loss, acc1=acc1, acc5=acc5)


def throughput(model, images, amp_dtype, logger):
    """Log the inference images/s of this process on one batch: 50 warm-up runs, then 30 timed."""
    device = images.device
    with inference(model, amp_dtype):
        for runs, what in ((50, "warm-up"), (30, "timed")):
            begin = time.time()
            for run in range(runs):
                with utils.autocast(device, amp_dtype):
                    model(images)
                if device.type == "cpu" and run == 4:
                    logger.info(f"{runs} {what} runs, about {clock((time.time() - begin) / 5 * runs)}")
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.time() - begin
    logger.info(f"batch_size {len(images)} throughput {30 * len(images) / seconds:.2f} images/s")


def clock(seconds):
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=int(seconds)))


if __name__ == "__main__":
    try:
        distributed.adopt_slurm()
        main(parse_args())
    except utils.UserError as error:
        # Every process meets the same error: the others wait, so that the launcher ends them before they
        # repeat it.
        if distributed.rank_and_world_size()[0]:
            time.sleep(3)
        # An error of a data-loading worker comes with the worker's traceback in front of the message.
        message = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
        sys.exit(f"error: {message}")
    except RuntimeError as error:
        if not distributed.lost_contact(error):
            raise
        logging.getLogger("msg_transformer").debug("lost contact", exc_info=error)
        reason = str(error).split("\n")[0][:160]
        sys.exit(
            f"error: lost contact with another process ({reason}); look for the first error of any. The "
            "same command resumes from the latest checkpoint"
        )
    finally:
        utils.end_workers()
