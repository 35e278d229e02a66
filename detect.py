"""Train or evaluate Cascade Mask R-CNN on an MSG-Transformer backbone, over data in COCO format.

python detect.py --cfg <config> --data-path <coco> --pretrained <classification checkpoint>
torchrun --nproc_per_node 8 detect.py --cfg <config> --data-path <coco> --pretrained <checkpoint>
torchrun --nproc_per_node 8 detect.py --cfg <config> --data-path <coco> --eval --resume <checkpoint>
"""

import json
import logging
import math
import os
import time

from config import read_command_line, set_classes

if __name__ == "__main__":  # before what takes seconds to import
    CONFIG = read_command_line("Train or evaluate Cascade Mask R-CNN on an MSG-Transformer backbone.", "coco")

from torch import nn

import distributed
from data.loaders import turns
from detection import evaluation
from detection.detector import build_detector, count_detector_macs, load_pretrained, to_original_size
from detection.loaders import build_detection_loaders
from detection.pictures import draw_detection_curves, draw_detections
from logger import DETAIL, ProgressBar, clock, log_progress
from models import inference
from training.engine import train_one_epoch
from training.run import Task, build_run
from training.setup import set_up
from utils import peak_memory_mb, replacing

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
    """Train or evaluate the detector of a config."""
    setup = set_up(config)
    dict(train=train, eval=evaluate_checkpoint)[setup.mode](config, setup)
    distributed.stop_process_group()


def train(config, setup):
    """Train for the epochs that are left, and evaluate after each."""
    train_loader, sampler, val_loader, val = read_data(config, setup)
    model = make_model(config, setup, val, train_loader, val_loader)
    run = build_run(config, model, sampler, setup, TASK)
    losses_of = build_losses(run)
    for _epoch in run.epochs_left():
        means = train_one_epoch(run, train_loader, losses_of)
        figures = run.figures_of(lambda module: evaluate(module, val_loader, val, setup.compute, config))
        run.end_epoch(means, figures)


def evaluate_checkpoint(config, setup):
    """Evaluate a checkpoint, and write and draw its detections."""
    _, _, loader, val = read_data(config, setup)
    model = make_model(config, setup, val, loader)
    path = setup.load_weights(model)
    evaluate(model, loader, val, setup.compute, config)
    logger.info(f"evaluated {path}; the results are in {config.OUTPUT}")


def read_data(config, setup):
    """The training loader and its sampler (None in evaluation), the validation loader and its dataset."""
    loaders = build_detection_loaders(config, setup.rank, setup.world_size, setup.compute.device)
    set_classes(config, len(loaders[-1].annotations.categories))
    return loaders


def make_model(config, setup, dataset, *loaders):
    """Build the detector on its device, and log what it and the ``loaders`` are."""
    names = [str(category["name"]) for category in dataset.annotations.categories]
    model = build_detector(config, len(names)).to(setup.compute.device)
    if setup.compute.device.type == "cuda" and setup.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.classes = names
    gmacs = count_detector_macs(model, 800, 1280) / 1e9
    setup.describe(config, model, f"{gmacs:.1f} GMACs per image of 1280x800", loaders)
    return model


def build_losses(run):
    """What :func:`~training.engine.train_one_epoch` minimises: the detector's own losses, by name."""
    updater = run.updater

    def losses_of(images, targets, part):
        images, sizes = images
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
                    drawn.append((path, annotations.truth_of(record, most=200), detection))
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
            with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                json.dump(results, file)
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
