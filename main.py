"""Train, evaluate or time an MSG-Transformer.

python main.py --cfg configs/digits.yaml --data-path datasets/digits
torchrun --nproc_per_node 8 main.py --cfg configs/msg_tiny_p4_win7_224.yaml --data-path <imagenet>
--batch-size 128 torchrun --nproc_per_node 8 main.py --cfg <config> --data-path <imagenet> --resume
<checkpoint> --eval
"""

import argparse
import contextlib
import datetime
import os
import sys
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import checkpoint as ckpt
import utils
from config import dump_config, get_config
from data import build_loaders
from data.mixup import build_mixup
from logger import RunRecord, create_logger
from lr_scheduler import build_scheduler
from models import build_model
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
    rank, world_size = utils.rank_and_world_size()
    device = utils.pick_device(config.DEVICE, config.LOCAL_RANK)
    utils.seed_everything(config.SEED)
    torch.backends.cudnn.benchmark = True

    train_loader = val_loader = None
    if config.DATA.DATA_PATH or not config.THROUGHPUT_MODE:
        train_loader, val_loader, classes = build_loaders(config, rank, world_size, device.type == "cuda")
        named_classes = config.MODEL.NUM_CLASSES
        config.defrost()
        config.MODEL.NUM_CLASSES = len(classes)
        config.freeze()
    model = build_model(config).to(device)

    utils.start_process_group(device)
    logger = create_logger(config.OUTPUT, rank)
    mode = "eval" if config.EVAL_MODE else "throughput" if config.THROUGHPUT_MODE else "train"
    logger.info(f"{mode} on {world_size} x {device}, PyTorch {torch.__version__}\n{dump_config(config)}")
    if rank == 0:
        with open(
            os.path.join(config.OUTPUT, "config.yaml" if mode == "train" else f"config_{mode}.yaml"), "w"
        ) as f:
            f.write(dump_config(config))
    if val_loader is not None and named_classes != len(classes):
        logger.info(f"MODEL.NUM_CLASSES {named_classes} -> {len(classes)}, the class folders of the data")
    if config.AMP_OPT_LEVEL == "O2":
        logger.warning("AMP level O2 existed only in apex: running as O1")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {model.flops() / 1e9:.3f} GMACs per image")

    amp_dtype = None
    if config.AMP_OPT_LEVEL != "O0":
        amp_dtype = getattr(torch, config.AMP_DTYPE) if device.type == "cuda" else torch.bfloat16
    if config.THROUGHPUT_MODE:
        throughput(model, val_loader, config, device, amp_dtype, logger)
    elif config.EVAL_MODE:
        path = config.MODEL.RESUME or utils.from_rank_0(
            lambda: ckpt.find_latest(config.OUTPUT, logger.warning)
        )
        if not path:
            raise ckpt.CheckpointError(
                f"nothing to evaluate: give --resume (no checkpoint in {config.OUTPUT})"
            )
        ckpt.load_weights(model, ckpt.read_checkpoint(path), path)
        logger.info(f"evaluating {path}")
        evaluate(model, val_loader, device, amp_dtype, config.PRINT_FREQ, logger)
    else:
        fit(model, train_loader, val_loader, config, device, amp_dtype, logger)
    utils.stop_process_group()


def fit(model, train_loader, val_loader, config, device, amp_dtype, logger):
    """Train up to ``TRAIN.EPOCHS``, evaluating and saving after every epoch."""
    rank, world_size = utils.rank_and_world_size()
    sampler = train_loader.batch_sampler
    lr_scale = config.DATA.BATCH_SIZE * world_size * sampler.accumulation / 512
    optimizer = build_optimizer(config, model, lr_scale)
    scheduler = build_scheduler(config, optimizer, sampler.updates, lr_scale)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    mixup = build_mixup(config, rank)
    # Mixup smooths the labels itself.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else config.MODEL.LABEL_SMOOTHING)

    start_epoch, best = restore(model, optimizer, scaler, config, logger)
    if start_epoch >= config.TRAIN.EPOCHS:
        logger.info(f"all {config.TRAIN.EPOCHS} epochs are trained already; max accuracy {best:.2f}%")
        return
    if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
        logger.warning("TRAIN.WARMUP_EPOCHS covers the whole run: TRAIN.BASE_LR is never reached")
    parallel = model
    if world_size > 1:
        ids = [device] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    record = RunRecord(config.OUTPUT, start_epoch, start_epoch * sampler.updates) if rank == 0 else None
    begin = time.time()
    for epoch in range(start_epoch, config.TRAIN.EPOCHS):
        trained = train_one_epoch(
            parallel,
            train_loader,
            criterion,
            mixup,
            optimizer,
            scheduler,
            scaler,
            device,
            amp_dtype,
            epoch,
            config.TRAIN.EPOCHS,
            config.TRAIN.CLIP_GRAD,
            config.PRINT_FREQ,
            (config.SEED, rank),
            record,
            logger,
        )
        result = evaluate(model, val_loader, device, amp_dtype, config.PRINT_FREQ, logger)
        improved = result["acc1"] > best
        best = max(best, result["acc1"])
        logger.info(f"Max accuracy: {best:.2f}%")
        if rank == 0:
            record.end_epoch((epoch + 1) * sampler.updates, epoch=epoch, **trained, **result)
            state = dict(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                lr_scheduler=scheduler.state_dict(),
                scaler=scaler.state_dict(),
                max_accuracy=best,
                epoch=epoch,
                config=dump_config(config),
            )
            due = epoch % config.SAVE_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS
            saved = ckpt.save_epoch(config.OUTPUT, state, due, improved)
            logger.info(f"saved {', '.join(saved)}" if saved else "no checkpoint due (SAVE_FREQ)")
    if rank == 0:
        record.close()
        logger.info(
            f"trained epochs {start_epoch} to {config.TRAIN.EPOCHS - 1} in {clock(time.time() - begin)}\n"
            f"  max accuracy:    {best:.2f}% top-1\n"
            f"  best checkpoint: {ckpt.best_checkpoint(config.OUTPUT)}\n"
            f"  training curves: {record.picture}"
        )


def restore(model, optimizer, scaler, config, logger):
    """Load what the run continues from: the latest checkpoint of its folder, ``--resume``, or
    ``--pretrained``.

    Returns:
        The first epoch to train and the best top-1 so far, in percent.

    Raises:
        CheckpointError: the file does not fit, or the run would overwrite later checkpoints of another.
    """
    latest = utils.from_rank_0(lambda: ckpt.find_latest(config.OUTPUT, logger.warning))
    resume = config.MODEL.RESUME
    if latest and config.TRAIN.AUTO_RESUME:
        if resume:
            logger.warning(f"auto-resume: continuing from {latest} rather than from {resume}")
        resume = latest
    epoch, best = (
        config.TRAIN.START_EPOCH,
        -1.0,
    )  # below 0, so that even a first top-1 of 0 is the best so far
    if resume:
        checkpoint = ckpt.read_checkpoint(resume)
        ckpt.load_weights(model, checkpoint, resume)
        ckpt.load_optimizer(optimizer, model, checkpoint, resume)
        if checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        epoch, best = checkpoint["epoch"] + 1, float(checkpoint.get("max_accuracy", 0.0))
        logger.info(f"resuming from {resume}: epoch {epoch}, max accuracy {best:.2f}%")
    elif config.MODEL.PRETRAINED:
        path = config.MODEL.PRETRAINED
        ckpt.load_weights(model, ckpt.read_checkpoint(path), path, new_head=True)
        logger.info(f"starting from the weights of {path}")
    else:
        logger.info(f"starting from scratch: no checkpoint in {config.OUTPUT}")
    if latest and ckpt.epoch_of(latest) >= epoch:
        raise ckpt.CheckpointError(
            f"{latest} would be overwritten: choose another --tag, or continue it with TRAIN.AUTO_RESUME True"
        )
    return epoch, best


def train_one_epoch(
    model,
    loader,
    criterion,
    mixup,
    optimizer,
    scheduler,
    scaler,
    device,
    amp_dtype,
    epoch,
    epochs,
    clip_grad,
    print_freq,
    seed,
    record,
    logger,
):
    """Train for one epoch; a step of the log is one optimizer update.

    Nothing waits for the device between updates, but for a log line every ``print_freq`` updates. Dropout and
    drop path depend on (``seed``, epoch, update) only: a resumed run draws what an undisturbed one would.

    Returns:
        Mean train_loss over all processes, last lr, mean grad_norm, images_per_second and seconds.
    """
    model.train()
    loader.batch_sampler.set_epoch(epoch)
    updates, accumulation = loader.batch_sampler.updates, loader.batch_sampler.accumulation
    images_per_update = loader.batch_sampler.batch_size * accumulation * loader.batch_sampler.world_size
    loss_sum, norm_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    begin = printed = time.time()
    printed_update = 0
    optimizer.zero_grad()
    for step, (images, targets) in enumerate(loader):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets, epoch, step)
        update, part = divmod(step, accumulation)
        whole = part + 1 == accumulation
        if part == 0:
            utils.seed_everything(*seed, epoch, update)
        with contextlib.nullcontext() if whole or not hasattr(model, "no_sync") else model.no_sync():
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            loss = criterion(logits.float(), targets) / accumulation
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
        if not whole:
            continue
        scheduler.step_update(epoch * updates + update)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or float("inf"))
        norm_sum += torch.nan_to_num(norm, 0.0, 0.0, 0.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if update % print_freq == 0:
            loss_now, loss_mean = loss.item() * accumulation, loss_sum.item() / (update + 1)
            now = time.time()
            mean_time = (now - begin) / (update + 1)
            time_now = (now - printed) / (update + 1 - printed_update)
            printed, printed_update = now, update + 1
            lr = optimizer.param_groups[0]["lr"]
            left, left_in_run = updates - update - 1, (epochs - epoch) * updates - update - 1
            logger.info(
                f"Train: [{epoch}/{epochs}][{update}/{updates}]\t"
                f"eta {clock(left * mean_time)} (run {clock(left_in_run * mean_time)}) lr {lr:.6f}\t"
                f"time {time_now:.4f} ({mean_time:.4f})\t"
                f"loss {loss_now:.4f} ({loss_mean:.4f})\t"
                f"grad_norm {norm.item():.4f} ({norm_sum.item() / (update + 1):.4f})\t"
                f"mem {utils.peak_memory_mb(device):.0f}MB"
            )
            if record is not None:
                speed = images_per_update / time_now
                record.scalars(
                    epoch * updates + update,
                    loss=loss_now,
                    lr=lr,
                    grad_norm=norm.item(),
                    images_per_second=speed,
                )
    means = (
        utils.sum_over_processes(torch.stack([loss_sum, norm_sum]))
        / updates
        / loader.batch_sampler.world_size
    )
    train_loss, grad_norm = means.tolist()
    seconds = time.time() - begin
    logger.info(f"EPOCH {epoch} training takes {clock(seconds)}")
    return dict(
        train_loss=train_loss,
        grad_norm=grad_norm,
        lr=optimizer.param_groups[0]["lr"],
        images_per_second=updates * images_per_update / seconds,
        seconds=seconds,
    )


@torch.inference_mode()
def evaluate(model, loader, device, amp_dtype, print_freq, logger):
    """Top-1, top-5 (percent) and mean cross entropy over all images of all processes, each counted once.

    The processes only meet at the end, so they may have different numbers of batches, or none.

    Returns:
        dict of val_loss, acc1, acc5.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # cross entropy, top-1, top-5, images
    begin = time.time()
    for step, (images, targets) in enumerate(loader):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # B, 5
        loss = cross_entropy(logits.double(), targets, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(targets), device=device)])
        if step % print_freq == 0:
            loss_mean, acc1, acc5 = (sums[:3] / sums[3]).tolist()
            mean_time = (time.time() - begin) / (step + 1)
            logger.info(
                f"Test: [{step}/{len(loader)}]\teta {clock((len(loader) - step - 1) * mean_time)}\t"
                f"Time {mean_time:.3f}\tLoss {loss_mean:.4f}\t"
                f"Acc@1 {100 * acc1:.3f}\tAcc@5 {100 * acc5:.3f}\tMem {utils.peak_memory_mb(device):.0f}MB"
            )
    sums = utils.sum_over_processes(sums).tolist()
    loss, acc1, acc5 = sums[0] / sums[3], 100 * sums[1] / sums[3], 100 * sums[2] / sums[3]
    logger.info(f" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} Loss {loss:.6f} on {sums[3]:.0f} images")
    return dict(val_loss=loss, acc1=acc1, acc5=acc5)


@torch.inference_mode()
def throughput(model, loader, config, device, amp_dtype, logger):
    """Log the inference images/s of this process: 50 warm-up runs, then 30 timed, on one batch."""
    model.eval()
    if loader is not None:
        images = next(iter(loader))[0].to(device)
    else:
        size = config.DATA.IMG_SIZE
        images = torch.randn(config.DATA.BATCH_SIZE, config.MODEL.MSG.IN_CHANS, size, size, device=device)
        logger.info("no --data-path: synthetic images")
    for runs, what in ((50, "warm-up"), (30, "timed")):
        begin = time.time()
        for run in range(runs):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
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
        main(parse_args())
    except utils.UserError as error:
        # Every process meets the same error: the others wait, so that the launcher ends them before they
        # repeat it.
        if utils.rank_and_world_size()[0]:
            time.sleep(3)
        # An error of a data-loading worker comes with the worker's traceback in front of the message.
        message = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
        sys.exit(f"error: {message}")
