"""Train or evaluate Cascade Mask R-CNN on an MSG-Transformer backbone, over data in COCO format.

python detect.py --cfg <config> --data-path <coco> --pretrained <classification checkpoint>
torchrun --nproc_per_node 8 detect.py --cfg <config> --data-path <coco> --pretrained <checkpoint>
torchrun --nproc_per_node 8 detect.py --cfg <config> --data-path <coco> --eval --resume <checkpoint>
"""

import math
import os
import time

import torch
from torch import nn

import checkpoint as ckpt
import distributed
import utils
from config import dump_config, get_config, parse_args
from detection import evaluation
from detection.detector import build_detector, count_macs, load_pretrained, to_original_size
from detection.loaders import build_loaders
from detection.pictures import draw_curves, draw_detections
from engine import SaveSchedule, build_run, check_checkpoints, choose_for_evaluation, train_epochs
from logger import RunRecord, create_logger, write_config
from models import inference
from run import FolderClaim


def main(args):
    """Set up a run and do it."""
    config = get_config(args, "coco")
    schedule = None
    if not config.EVAL_MODE:
        schedule = SaveSchedule(config.TRAIN.SAVE_STEPS, config.TRAIN.SAVE_MINUTES)
    rank, world_size = distributed.rank_and_world_size()
    device = utils.pick_device(config.DEVICE, config.LOCAL_RANK)
    distributed.start_process_group(device, config.DIST.TIMEOUT_SECONDS)
    claim = FolderClaim(config.OUTPUT)
    if schedule is not None:
        distributed.from_rank_0(claim.take)
    distributed.from_rank_0(lambda: check_checkpoints(config))
    utils.seed_everything("model", config.SEED)
    if config.DETERMINISTIC:
        utils.be_deterministic()
    loader, sampler, val_loader, val = build_loaders(config, rank, world_size, device)
    names = [category["name"] for category in val.annotations.categories]
    config.defrost()
    config.MODEL.NUM_CLASSES = len(names)
    config.freeze()
    model = build_detector(config, len(names)).to(device)
    if device.type == "cuda" and world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.classes = list(map(str, names))

    logger = create_logger(config.OUTPUT, rank)
    mode = "eval" if config.EVAL_MODE else "train"
    logger.info(f"{mode} on {world_size} x {device}, PyTorch {torch.__version__}\n{dump_config(config)}")
    for part in (loader, val_loader):
        if part is not None:
            part.report()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = count_macs(model, 800, 1280) / 1e9
    logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {macs:.1f} GMACs per image of 1280x800")
    if config.COMPILE or config.DATA.BACKEND != "pil":
        logger.warning("COMPILE and DATA.BACKEND are for classification: detection does without")
    amp_dtype = None
    if config.AMP_OPT_LEVEL != "O0":
        amp_dtype = getattr(torch, config.AMP_DTYPE) if device.type == "cuda" else torch.bfloat16

    def evaluate_now():
        return evaluate(
            model,
            val_loader,
            val,
            device,
            amp_dtype,
            config.PRINT_FREQ,
            config.DET.PICTURES,
            config.OUTPUT,
            logger,
        )

    if config.EVAL_MODE:
        if rank == 0:
            write_config(config.OUTPUT, "config_eval.yaml", dump_config(config), logger)
        path, weights = distributed.from_rank_0(lambda: choose_for_evaluation(config, logger))
        ckpt.load_weights(model, weights, path)
        logger.info(f"evaluating {path}")
        evaluate_now()
    else:
        fit(model, loader, sampler, evaluate_now, config, device, amp_dtype, schedule, logger, claim)
    distributed.stop_process_group()


def fit(model, loader, sampler, evaluate_now, config, device, amp_dtype, schedule, logger, claim):
    """Train up to ``TRAIN.EPOCHS``, evaluating after every epoch and saving as configured."""
    run = build_run(config, model, sampler, device, amp_dtype, 16, logger, "box AP", load_pretrained, claim)
    updater = run.updater

    def losses_of(images, targets, part):
        images, sizes = images
        with updater.autocast():
            return updater.model(images, sizes, targets)

    record = None
    if sampler.rank == 0:
        drawn = ("epoch", "train_loss", "box_AP", "mask_AP", "lr")
        place = run.progress.epoch, int(run.position())
        record = RunRecord(config.OUTPUT, *place, logger, draw_curves, drawn)
    train_epochs(
        run,
        loader,
        losses_of,
        evaluate_now,
        "box_AP",
        schedule,
        config.SEED,
        config.TRAIN.EPOCHS,
        config.PRINT_FREQ,
        config.SAVE_FREQ,
        record,
    )


def evaluate(model, loader, dataset, device, amp_dtype, print_freq, pictures, folder, logger):
    """COCO average precision over all images of all processes, each counted once.

    Rank 0 writes the detections to ``detections.json`` and draws some of them to ``detections.png``.

    Args:
        dataset: the validation :class:`~detection.dataset.CocoDataset`.
        pictures: how many images to draw.

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
    with inference(model, amp_dtype):
        for step, ((images, sizes), targets) in enumerate(loader):
            if not targets:
                continue
            with utils.autocast(device, amp_dtype):
                detections = model(images, sizes)
            for detection, size, target in zip(detections, sizes, targets):
                number = target["image_id"]
                detection = to_original_size(detection, size, target["original_size"])
                results += evaluation.to_results(number, detection, annotations.categories)
                seen.append(number)
                if rank == 0 and len(drawn) < pictures:
                    path, record = files[number]
                    drawn.append((path, annotations.truth_of(record, most=200), detection))
            if step % print_freq == 0:
                mean_time = (time.time() - begin) / (step + 1)
                left = utils.clock((len(loader) - step - 1) * mean_time)
                logger.info(
                    f"Test: [{step}/{len(loader)}]\teta {left}\tTime {mean_time:.3f}\t"
                    f"Mem {utils.peak_memory_mb(device):.0f}MB"
                )
    loader.check_failures()
    results, seen = distributed.gather_lists(results), distributed.gather_lists(seen)

    def on_rank_0():
        figures, rows = evaluation.average_precision(annotations.as_coco(), results, seen)
        logger.info(f"{len(seen)} images, {len(results)} detections\n{evaluation.table(rows)}")
        try:
            path = os.path.join(folder, "detections.json")
            evaluation.write_results(path, results)
            names = [category["name"] for category in annotations.categories]
            if drawn:
                draw_detections(drawn, names, os.path.join(folder, "detections.png"))
            logger.info(f"detections: {path} and detections.png")
        except OSError as error:
            logger.error(f"cannot write the detections: {error}")
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    figures = distributed.from_rank_0(on_rank_0)
    logger.info(" * " + "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in figures.items()))
    return figures


if __name__ == "__main__":
    description = "Train or evaluate Cascade Mask R-CNN on an MSG-Transformer backbone."
    distributed.run_command(lambda: main(parse_args(description)))
