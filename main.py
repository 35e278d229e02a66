"""Train, evaluate or time an MSG-Transformer.

python main.py --cfg <config> --data-path <folder>
torchrun --nproc_per_node 8 main.py --cfg <config> --data-path <folder> --batch-size 128
torchrun --nproc_per_node 8 main.py --cfg <config> --data-path <folder> --eval --resume <checkpoint>
"""

import logging
import time

from config import image_shape, read_command_line, set_classes

if __name__ == "__main__":  # before what takes seconds to import
    CONFIG = read_command_line("Train, evaluate or time an MSG-Transformer.", "imagenet", throughput=True)

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import distributed
from analysis.report import OutcomeCollector, write_report
from data import build_loaders
from data.transforms import build_augmentation
from logger import DETAIL, ProgressBar, clock, log_progress
from models import build_model, build_runtime, compile_model, count_macs, inference
from training.distillation import build_distillation
from training.engine import train_one_epoch
from training.run import Task, build_run
from training.setup import set_up
from utils import peak_memory_mb

TASK = Task(base_images=512, score="acc1", score_name="accuracy")

logger = logging.getLogger("msg_transformer")


def main(config):
    """Train, evaluate or time the model of a config."""
    setup = set_up(config)
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC
    dict(train=train, eval=evaluate_checkpoint, throughput=time_inference)[setup.mode](config, setup)
    distributed.stop_process_group()


def train(config, setup):
    """Train for the epochs that are left, and evaluate after each."""
    train_loader, sampler, val_loader, classes = read_data(config, setup)
    model = make_model(config, setup, classes, train_loader, val_loader)
    run = build_run(config, model, sampler, setup, TASK)
    losses_of = build_losses(config, run)
    for _epoch in run.epochs_left():
        means = train_one_epoch(run, train_loader, losses_of)
        figures = run.figures_of(
            lambda module: evaluate(module, val_loader, setup.compute, config.PRINT_FREQ)
        )
        run.end_epoch(means, figures)


def evaluate_checkpoint(config, setup):
    """Evaluate a checkpoint and write the report."""
    _, _, loader, classes = read_data(config, setup)
    model = make_model(config, setup, classes, loader)
    path = setup.load_weights(model)
    collector, compute = OutcomeCollector(), setup.compute
    figures = evaluate(build_runtime(config, model, compute), loader, compute, config.PRINT_FREQ, collector)
    if (outcomes := collector.gather(loader.indices_seen())) is not None:
        about = dict(checkpoint=path, data=config.DATA.DATA_PATH, **figures)
        write_report(config.OUTPUT, outcomes, classes, loader.paths, about)
    logger.info(f"evaluated {path}; the results are in {config.OUTPUT}")


def time_inference(config, setup):
    """Log the speed of inference on a batch of the validation images, or without data on a synthetic one."""
    loader = classes = None
    if config.DATA.DATA_PATH:
        _, _, loader, classes = read_data(config, setup)
    elif config.MODEL.RESUME and (classes := setup.start.checkpoint["classes"]):
        set_classes(config, len(classes))
    model = make_model(config, setup, classes, loader)
    if config.MODEL.RESUME:
        setup.load_weights(model)
    if loader is not None:
        images = next(iter(loader))[0]
    else:
        logger.info("no --data-path: synthetic images")
        images = torch.randn(config.DATA.BATCH_SIZE, *image_shape(config), device=setup.compute.device)
    throughput(build_runtime(config, model, setup.compute), images, setup.compute)


def read_data(config, setup):
    """The training loader and its sampler (None in other modes), the validation loader, and the classes."""
    loaders = build_loaders(config, setup.rank, setup.world_size, setup.compute.device)
    set_classes(config, len(loaders[-1]))
    return loaders


def make_model(config, setup, classes, *loaders):
    """Build the model on its device, and log what it and the ``loaders`` are."""
    model = build_model(config).to(setup.compute.device)
    model.classes = classes
    gmacs = count_macs(model, image_shape(config)) / 1e9
    setup.describe(config, model, f"{gmacs:.3f} GMACs per image", loaders)
    if config.COMPILE:
        compile_model(model)
    return model


def build_losses(config, run):
    """What :func:`~training.engine.train_one_epoch` minimises, of augmented micro-batches."""
    updater, compute = run.updater, run.updater.compute
    augment = build_augmentation(config, run.sampler.rank, compute.device)
    # Mixup smooths the labels itself.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if augment.mixup else config.MODEL.LABEL_SMOOTHING)
    distil = build_distillation(config, run.model.classes, compute)

    def losses_of(images, targets, part):
        images, targets = augment(images, targets, run.progress.epoch, run.progress.images, part)
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
            counts = hits[:, 0].sum(), hits.sum(), torch.full((), len(targets), device=device)
            sums += torch.stack([loss, *counts])
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
