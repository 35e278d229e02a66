"""Train or evaluate Cascade Mask R-CNN on an MSG-Transformer backbone, over data in COCO format.

python detect.py --cfg <config> --data-path <coco> --pretrained <classification checkpoint>
torchrun --nproc_per_node 8 detect.py --cfg <config> --data-path <coco> --pretrained <checkpoint>
torchrun --nproc_per_node 8 detect.py --cfg <config> --data-path <coco> --eval --resume <checkpoint>
"""

import logging
import math
import os
import time

from config import dump_config, read_command_line, set_classes

if __name__ == "__main__":  # before what takes seconds to import
    CONFIG = read_command_line("Train or evaluate Cascade Mask R-CNN on an MSG-Transformer backbone.", "coco")

import torch
from torch import nn

import checkpoint as ckpt
import distributed
from data.loaders import turns
from detection import evaluation
from detection.detector import build_detector, count_detector_macs, load_pretrained, to_original_size
from detection.loaders import build_detection_loaders
from detection.pictures import detection_batch_sheet, draw_detection_curves, draw_detections
from logger import DETAIL, FILE, ProgressBar, clock, log_progress, start_logging, write_config
from models import choose_layer_norm, inference
from training.engine import train_one_epoch
from training.guard import build_guard
from training.run import Task, build_run
from training.setup import check_first, choose_for_evaluation
from utils import peak_memory_mb

TASK = Task(
    base_images=16,
    score="box_AP",
    score_name="box AP",
    shown=(("box_AP", "box AP"), ("mask_AP", "mask AP")),
    load_pretrained=load_pretrained,
    draw=draw_detection_curves,
    drawn=("epoch", "train_loss", "box_AP", "mask_AP", "lr"),
)

logger = logging.getLogger("msg_transformer")


def main(config):
    """Set up a run and do it."""
    mode = "eval" if config.EVAL_MODE else "train"
    guard = build_guard(config) if mode == "train" else None
    compute = distributed.build_compute(config)
    device = compute.device
    distributed.start_process_group(device, config.DIST.TIMEOUT_SECONDS)
    rank, world_size = distributed.rank_and_world_size()
    if guard is not None:
        distributed.from_rank_0(guard.claim.take)
    distributed.from_rank_0(lambda: check_first(config))
    distributed.seed_everything("model", config.SEED)
    if config.DETERMINISTIC:
        distributed.be_deterministic()
    train_loader, sampler, val_loader, val = build_detection_loaders(config, rank, world_size, device)
    names = [category["name"] for category in val.annotations.categories]
    set_classes(config, len(names))
    model = build_detector(config, len(names)).to(device)
    if device.type == "cuda" and world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.classes = list(map(str, names))

    start_logging(config.OUTPUT, rank, training=mode == "train")
    logger.info(f"{mode} on {world_size} x {device}, PyTorch {torch.__version__}")
    logger.info(dump_config(config), extra=FILE)
    for loader in (train_loader, val_loader):
        if loader is not None:
            loader.report()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = count_detector_macs(model, 800, 1280) / 1e9
    logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {macs:.1f} GMACs per image of 1280x800")
    if config.AMP.FUSED_LAYERNORM:
        logger.info(choose_layer_norm(config)[1])

    if mode == "eval":
        if rank == 0:
            write_config(config.OUTPUT, "config_eval.yaml", dump_config(config))
        path, weights = distributed.from_rank_0(lambda: choose_for_evaluation(config))
        ckpt.load_weights(model, weights, path)
        logger.info(f"evaluating {path}")
        evaluate(model, val_loader, val, compute, config)
        logger.info(f"evaluated {path}; the results are in {config.OUTPUT}")
    else:
        run = build_run(config, model, sampler, compute, TASK, guard)
        losses_of = build_losses(run)
        for _epoch in run.epochs_left():
            means = train_one_epoch(run, train_loader, losses_of)
            run.end_epoch(
                means, run.figures_of(lambda module: evaluate(module, val_loader, val, compute, config))
            )
    distributed.stop_process_group()


def build_losses(run):
    """What :func:`~training.engine.train_one_epoch` minimises: the detector's own losses, by name."""
    updater = run.updater

    def losses_of(images, targets, part):
        images, sizes = images
        run.record.first_batch(lambda: detection_batch_sheet(images, sizes, targets, run.model.classes))
        with updater.compute.autocast():
            return updater.model(images, sizes, targets)

    return losses_of


def evaluate(model, loader, dataset, compute, config):
    """COCO average precision over all images of all processes, each counted once.

    Rank 0 writes the detections to ``detections.json`` and draws ``DET.PICTURES`` of the images to
    ``detections.png``.

    Args:
        dataset: the validation :class:`~detection.dataset.CocoDataset`.

    Returns:
        dict of box_AP, box_AP50 ... mask_APl in percent, the same on every process; those without objects of
        their size are left out.

    Raises:
        DataError: too many images cannot be read.
    """
    distributed.send_buffers(model)
    annotations, rank = dataset.annotations, distributed.rank_and_world_size()[0]
    files = {record["id"]: (path, record) for record, path in zip(dataset.records, dataset.paths)}
    results, seen, drawn = [], [], []
    begin = time.time()
    with inference(model, compute.dtype), ProgressBar("evaluation", len(loader)) as bar:
        for step, ((images, sizes), targets) in enumerate(bar.over(loader)):
            if not targets:
                continue
            with compute.autocast():
                detections = model(images, sizes)
            for detection, size, target in zip(detections, sizes, targets):
                number = target["image_id"]
                detection = to_original_size(detection, size, target["original_size"])
                results += evaluation.to_results(number, detection, annotations.categories)
                seen.append(number)
                if rank == 0 and len(drawn) < config.DET.PICTURES:
                    path, record = files[number]
                    truth = dict(annotations.truth_of(record, most=200), crowd=annotations.crowd_of(record))
                    drawn.append((path, truth, detection))
            if step % config.PRINT_FREQ == 0:
                mean_time = (time.time() - begin) / (step + 1)
                left = clock((len(loader) - step - 1) * mean_time)
                log_progress(
                    f"Test: [{step}/{len(loader)}]\teta {left}\tTime {mean_time:.3f}\t"
                    f"Mem {peak_memory_mb(compute.device):.0f}MB",
                    len(loader) * mean_time,
                )
    loader.check_failures()
    results, seen = distributed.gather_lists(results), distributed.gather_lists(seen)

    def on_rank_0():
        figures, rows = evaluation.average_precision(annotations.as_coco(), results, seen)
        logger.info(f"{len(seen)} images, {len(results)} detections\n{evaluation.table(rows)}", extra=DETAIL)
        try:
            path = os.path.join(config.OUTPUT, "detections.json")
            evaluation.write_results(path, results)
            names = [category["name"] for category in annotations.categories]
            if drawn:
                path_of_picture = os.path.join(config.OUTPUT, "detections.png")
                draw_detections(drawn, names, path_of_picture, turn=turns(config))
            logger.info(f"detections: {path} and detections.png", extra=DETAIL)
        except OSError as error:
            logger.error(f"cannot write the detections: {error}")
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    figures = distributed.from_rank_0(on_rank_0)
    line = "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in figures.items())
    logger.info(f" * {line}", extra=DETAIL)
    return figures


if __name__ == "__main__":
    distributed.run_command(lambda: main(CONFIG), distributed.smaller_run(CONFIG))
