"""Train, evaluate or time an MSG-Transformer.

python main.py --cfg <config> --data-path <folder>
torchrun --nproc_per_node 8 main.py --cfg <config> --data-path <folder> --batch-size 128
torchrun --nproc_per_node 8 main.py --cfg <config> --data-path <folder> --eval --resume <checkpoint>
"""

import logging
import time

from config import dump_config, read_command_line, set_classes

if __name__ == "__main__":  # before what takes seconds to import
    CONFIG = read_command_line("Train, evaluate or time an MSG-Transformer.", "imagenet", throughput=True)

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.nn.functional import cross_entropy

import checkpoint as ckpt
import distributed
from analysis.report import OutcomeCollector, batch_sheet, show_mistakes, write_report
from data import build_loaders
from data.mixup import build_augmentation
from logger import DETAIL, FILE, ProgressBar, clock, log_progress, start_logging, write_config
from models import build_model, build_runtime, choose_layer_norm, compile_model, count_macs, inference
from training.distillation import build_distillation
from training.engine import train_one_epoch
from training.guard import build_guard
from training.run import Task, build_run
from training.setup import check_first, choose_for_evaluation
from utils import peak_memory_mb

TASK = Task(base_images=512, score="acc1", score_name="accuracy")

logger = logging.getLogger("msg_transformer")


def main(config):
    """Set up a run and do it."""
    mode = "eval" if config.EVAL_MODE else "throughput" if config.THROUGHPUT_MODE else "train"
    guard = build_guard(config) if mode == "train" else None
    compute = distributed.build_compute(config)
    device = compute.device
    distributed.start_process_group(device, config.DIST.TIMEOUT_SECONDS)
    rank, world_size = distributed.rank_and_world_size()
    if guard is not None:
        distributed.from_rank_0(guard.claim.take)
    distributed.from_rank_0(lambda: check_first(config))
    distributed.seed_everything("model", config.SEED)
    torch.backends.cudnn.benchmark = True
    if config.DETERMINISTIC:
        distributed.be_deterministic()

    train_loader = sampler = val_loader = classes = None
    if config.DATA.DATA_PATH or not config.THROUGHPUT_MODE:
        train_loader, sampler, val_loader, classes = build_loaders(config, rank, world_size, device)
        named_classes = config.MODEL.NUM_CLASSES
        set_classes(config, len(classes))
    model = build_model(config).to(device)
    model.classes = classes

    start_logging(config.OUTPUT, rank, training=mode == "train")
    logger.info(f"{mode} on {world_size} x {device}, PyTorch {torch.__version__}")
    logger.info(dump_config(config), extra=FILE)
    if val_loader is not None and named_classes != len(classes):
        what = f"MODEL.NUM_CLASSES {named_classes} -> {len(classes)}, the class folders of the data"
        logger.info(what, extra=FILE)
    for loader in (train_loader, val_loader):
        if loader is not None:
            loader.report()
    if config.AMP_OPT_LEVEL == "O2":
        logger.warning("AMP level O2 existed only in apex: running as O1")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = (config.MODEL.MSG.IN_CHANS, *to_2tuple(config.DATA.IMG_SIZE))
    gmacs = count_macs(model, shape) / 1e9
    logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {gmacs:.3f} GMACs per image")

    if config.AMP.FUSED_LAYERNORM:
        logger.info(choose_layer_norm(config)[1])
    if config.COMPILE:
        compile_model(model)
    if mode != "train" and rank == 0:
        write_config(config.OUTPUT, f"config_{mode}.yaml", dump_config(config))
    collector = OutcomeCollector()
    if mode == "throughput":
        if val_loader is not None:
            images = next(iter(val_loader))[0]
        else:
            logger.info("no --data-path: synthetic images")
            images = torch.randn(config.DATA.BATCH_SIZE, *shape, device=device)
        throughput(build_runtime(config, model, compute), images, compute)
    elif mode == "eval":
        path, weights = distributed.from_rank_0(lambda: choose_for_evaluation(config))
        ckpt.load_weights(model, weights, path)
        logger.info(f"evaluating {path}")
        model = build_runtime(config, model, compute)
        figures = evaluate(model, val_loader, compute, config.PRINT_FREQ, collector)
        if (outcomes := collector.gather(val_loader.indices_seen())) is not None:
            about = dict(checkpoint=path, data=config.DATA.DATA_PATH, **figures)
            write_report(config.OUTPUT, outcomes, classes, val_loader.paths, about)
        logger.info(f"evaluated {path}; the results are in {config.OUTPUT}")
    else:
        run = build_run(config, model, sampler, compute, TASK, guard)
        losses_of = build_losses(config, run)
        for _epoch in run.epochs_left():
            means = train_one_epoch(run, train_loader, losses_of)
            figures = run.figures_of(
                lambda module: evaluate(module, val_loader, compute, config.PRINT_FREQ, collector.start())
            )
            run.end_epoch(means, figures)
        show_mistakes(run.record, collector, val_loader, classes)
    distributed.stop_process_group()


def build_losses(config, run):
    """What :func:`~training.engine.train_one_epoch` minimises, of augmented micro-batches."""
    updater, compute = run.updater, run.updater.compute
    augment = build_augmentation(config, run.sampler.rank, compute.device)
    # Mixup smooths the labels itself.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if augment.mixup else config.MODEL.LABEL_SMOOTHING)
    distil = build_distillation(config, run.model.classes, compute)

    def losses_of(images, targets, part):
        images, targets = augment(images, targets, run.progress.epoch, run.progress.images, part)
        run.record.first_batch(lambda: batch_sheet(images, targets, run.model.classes))
        with compute.autocast():
            logits = updater.model(images)
        loss = criterion(logits.float(), targets)
        return dict(loss=loss) if distil is None else distil(images, logits, loss)

    return losses_of


def evaluate(model, loader, compute, print_freq, collector=None):
    """Top-1, top-5 (percent) and mean cross entropy over all images of all processes, each counted once.

    All processes evaluate with the buffers of rank 0, such as the statistics of BatchNorm, which are those of
    checkpoints. They only meet before and after, so they may have different numbers of batches, or none.

    Args:
        collector: is given every batch, an :class:`~analysis.report.OutcomeCollector` or None.

    Returns:
        dict of val_loss, acc1, acc5.

    Raises:
        DataError: too many images cannot be read.
    """
    device = compute.float64_device()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # cross entropy, top-1, top-5, images
    begin = time.time()
    distributed.send_buffers(model)
    with inference(model, compute.dtype), ProgressBar("evaluation", len(loader)) as bar:
        for step, (images, targets) in enumerate(bar.over(loader)):
            if not len(targets):
                continue
            with compute.autocast():
                logits = model(images)
            logits, targets = logits.to(device), targets.to(device)
            # Equal logits, which are common in bfloat16, rank by class, as in the report.
            ranked = logits.sort(descending=True, stable=True).indices[:, :5]
            hits = ranked == targets[:, None]  # B, 5
            loss = cross_entropy(logits.double(), targets, reduction="sum")
            if collector is not None:
                collector.add(images, targets, logits)
            sums += torch.stack(
                [loss, hits[:, 0].sum(), hits.sum(), torch.full((), len(targets), device=device)]
            )
            if step % print_freq == 0:
                loss_mean, acc1, acc5 = (sums[:3] / sums[3]).tolist()
                mean_time = (time.time() - begin) / (step + 1)
                bar.set_postfix_str(f"top-1 {100 * acc1:.2f}%")
                log_progress(
                    f"Test: [{step}/{len(loader)}]\teta {clock((len(loader) - step - 1) * mean_time)}\t"
                    f"Time {mean_time:.3f}\tLoss {loss_mean:.4f}\t"
                    f"Acc@1 {100 * acc1:.3f}\tAcc@5 {100 * acc5:.3f}\t"
                    f"Mem {peak_memory_mb(compute.device):.0f}MB",
                    len(loader) * mean_time,
                )
    loader.check_failures()
    sums = distributed.sum_over_processes(sums).tolist()
    loss, acc1, acc5 = sums[0] / sums[3], 100 * sums[1] / sums[3], 100 * sums[2] / sums[3]
    logger.info(f" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} Loss {loss:.6f} on {sums[3]:.0f} images", extra=DETAIL)
    return dict(val_loss=loss, acc1=acc1, acc5=acc5)


def throughput(model, images, compute):
    """Log the inference images/s of this process on one batch: 50 warm-up runs, then 30 timed."""
    device = compute.device
    with inference(model, compute.dtype):
        for runs, what in ((50, "warm-up"), (30, "timed")):
            begin = time.time()
            for run in range(runs):
                with compute.autocast():
                    model(images)
                if device.type == "cpu" and run == 4:
                    logger.info(f"{runs} {what} runs, about {clock((time.time() - begin) / 5 * runs)}")
            if device.type != "cpu":
                torch.accelerator.synchronize()
            speed = runs * len(images) / (time.time() - begin)
    precision = str(compute.dtype or torch.float32).removeprefix("torch.")
    logger.info(f"batch_size {len(images)} throughput {speed:.2f} images/s in {precision}")


if __name__ == "__main__":
    distributed.run_command(lambda: main(CONFIG), distributed.smaller_run(CONFIG))
