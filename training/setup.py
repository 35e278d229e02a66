"""Reads and checks what a program starts from, before anything that takes long."""

import logging
import os

import checkpoint as ckpt
from config import flat_config
from distributed import build_compute
from models.deploy.runtime import choose_runtime
from models.from_checkpoint import compare_config

from .tracking import require_tracker

logger = logging.getLogger("msg_transformer")


def check_first(config):
    """Refuse, before anything that takes long, a run that could not start: tracker, runtime, checkpoints.

    The files of ``--resume`` and ``--pretrained`` are read once; a run that continues from its own folder
    needs neither.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one to evaluate of another config.
        UserError: a package is missing for ``LOG.TRACKER`` or ``RUNTIME``, or that is not for this device or
            precision.
    """
    trains, resume = not (config.EVAL_MODE or config.THROUGHPUT_MODE), config.MODEL.RESUME
    if trains:
        require_tracker(config.LOG.TRACKER)
    else:
        choose_runtime(config.RUNTIME, build_compute(config))
    if trains and config.TRAIN.AUTO_RESUME and ckpt.in_order(config.OUTPUT):
        return
    if resume and trains:
        ckpt.read_run(resume)
    elif resume:
        checkpoint = ckpt.read_weights(resume, config.TEST.WEIGHTS)
        if not config.TEST.OTHER_CONFIG:
            compare_config(flat_config(config), checkpoint, resume)
    if config.MODEL.PRETRAINED:
        ckpt.read_weights(config.MODEL.PRETRAINED, config.TEST.WEIGHTS)


def choose_for_evaluation(config):
    """Read what to evaluate: (path, weights and classes).

    That is ``--resume``, or else the best checkpoint of the run's folder, or else its latest.

    Raises:
        CheckpointError: there is none, or it is of another config; see ``compare_config``.
    """
    path, best = config.MODEL.RESUME, os.path.join(config.OUTPUT, ckpt.BEST)
    if path or os.path.exists(best):
        path = path or best
        checkpoint = ckpt.read_weights(path, config.TEST.WEIGHTS)
    else:
        path, checkpoint = ckpt.read_latest(config.OUTPUT, logger.warning)
        if path is None:
            raise ckpt.CheckpointError(
                f"nothing to evaluate: give --resume (no checkpoint in {config.OUTPUT})"
            )
        checkpoint = ckpt.weights_and_classes(checkpoint, path, config.TEST.WEIGHTS)
    compare_config(flat_config(config), checkpoint, path)
    return path, checkpoint
