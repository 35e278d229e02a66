"""Sets up a program before it reads its data: its process, and the checkpoint that it starts from."""

import logging
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

import checkpoint as ckpt
import distributed
from config import dump_config, flat_config
from logger import FILE, start_logging, write_config
from models import choose_layer_norm
from models.deploy.runtime import choose_runtime
from models.fast import choices
from models.from_checkpoint import compare_config

from .guard import Guard, build_guard
from .tracking import require_tracker

logger = logging.getLogger("msg_transformer")


class Start(NamedTuple):
    """What a program starts from.

    Attributes:
        path: of the checkpoint, "" for none.
        checkpoint: what :func:`~checkpoint.read_run` made of it if ``resumes``, or else what
            :func:`~checkpoint.read_weights` did.
        resumes: whether the run in the checkpoint continues. Otherwise its weights alone are taken.
        latest: the furthest checkpoint in the run's folder, which must not be overwritten; "" for none.
    """

    path: str = ""
    checkpoint: dict | None = None
    resumes: bool = False
    latest: str = ""


@dataclass
class Setup:
    """A process that is ready to read its data.

    Attributes:
        mode: train, eval or throughput.
        compute: a :class:`~distributed.Compute`.
        rank, world_size: of this process.
        guard: a :class:`~training.guard.Guard` in mode train, otherwise None.
        start: a :class:`Start`; None once it is taken.
    """

    mode: str
    compute: distributed.Compute
    rank: int
    world_size: int
    guard: Guard | None
    start: Start | None

    def take_start(self):
        """The :class:`Start`, only once, so that its memory is free as soon as it is loaded."""
        start, self.start = self.start, None
        return start

    def load_weights(self, model):
        """Load the checkpoint to evaluate or to time into its model; returns its path."""
        start = self.take_start()
        ckpt.load_weights(model, start.checkpoint, start.path)
        logger.info(f"{'evaluating' if self.mode == 'eval' else 'timing'} {start.path}")
        return start.path

    def describe(self, config, model, size, loaders):
        """Log the config, the data and the model. Modes other than train also write the config to the folder.

        Args:
            size: the cost of the model in words.
            loaders: those of the run, or None in their place.
        """
        logger.info(dump_config(config), extra=FILE)
        if self.compute.device.type == "cpu":
            logger.info(f"CPU: {choices.describe()}", extra=FILE)
        for loader in loaders:
            if loader is not None:
                loader.report()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {size}")
        if config.AMP_OPT_LEVEL == "O2":
            logger.warning("AMP level O2 existed only in apex: running as O1")
        if config.AMP_OPT_LEVEL != "O0" and self.compute.dtype is None:
            logger.info("mixed precision is float32 here, because this CPU does not compute in bfloat16")
        if config.AMP.FUSED_LAYERNORM:
            logger.info(choose_layer_norm(config)[1])
        if self.mode != "train" and self.rank == 0:
            write_config(config.OUTPUT, f"config_{self.mode}.yaml", dump_config(config))


def set_up(config):
    """Do everything that comes before the data; whatever can be refused is refused here.

    Returns:
        A :class:`Setup`.

    Raises:
        CheckpointError: see :func:`read_start`.
        UserError: the process group cannot be formed, the output folder belongs to another run or cannot be
            written to, or the device, ``LOG.TRACKER`` or ``RUNTIME`` cannot be used.
    """
    mode = "eval" if config.EVAL_MODE else "throughput" if config.THROUGHPUT_MODE else "train"
    guard = build_guard(config) if mode == "train" else None
    compute = distributed.build_compute(config)
    compute.prepare()
    distributed.start_process_group(compute.device, config.DIST.TIMEOUT_SECONDS)
    rank, world_size = distributed.rank_and_world_size()
    if mode == "train":
        distributed.from_rank_0(guard.claim.take)
        distributed.from_rank_0(lambda: require_tracker(config.LOG.TRACKER))
    else:
        distributed.from_rank_0(lambda: choose_runtime(config.RUNTIME, compute))
    start_logging(config.OUTPUT, rank, training=mode == "train")
    logger.info(f"{mode} on {world_size} x {compute.device}, PyTorch {torch.__version__}")
    start = distributed.from_rank_0(lambda: read_start(config))
    distributed.seed_everything("model", config.SEED)
    if config.DETERMINISTIC:
        distributed.be_deterministic()
    return Setup(mode, compute, rank, world_size, guard, start)


def read_start(config):
    """Read, once, the checkpoint that a program starts from.

    A training run continues from the latest checkpoint of its folder, or from ``--resume``, or starts with
    the weights of ``--pretrained``. An evaluation takes ``--resume``, or else the best of the folder, or else
    its latest. Throughput takes ``--resume`` if it is given.

    Returns:
        A :class:`Start`.

    Raises:
        CheckpointError: there is no such file, it cannot be used, or it belongs to another config.
    """
    if config.EVAL_MODE:
        return _start_of_evaluation(config)
    if not config.THROUGHPUT_MODE:
        return _start_of_training(config)
    return _start_of_evaluation(config) if config.MODEL.RESUME else Start()


def _start_of_training(config):
    folder, resume, pretrained = config.OUTPUT, config.MODEL.RESUME, config.MODEL.PRETRAINED
    ckpt.remove_unfinished(folder)
    latest, run = ckpt.read_latest(folder, logger.warning)
    if latest and config.TRAIN.AUTO_RESUME:
        if resume:
            logger.warning(f"auto-resume: continuing from {latest} rather than from {resume}")
        return Start(latest, run, resumes=True, latest=latest)
    if resume:
        return Start(resume, ckpt.read_run(resume), resumes=True, latest=latest)
    if pretrained:
        weights = ckpt.read_weights(pretrained, config.TEST.WEIGHTS)
        compare_config(flat_config(config), weights, pretrained, fine_tuning=True)
        return Start(pretrained, weights, latest=latest)
    return Start(latest=latest)


def _start_of_evaluation(config):
    best = os.path.join(config.OUTPUT, ckpt.BEST)
    path = config.MODEL.RESUME or (best if os.path.exists(best) else "")
    if path:
        weights = ckpt.read_weights(path, config.TEST.WEIGHTS)
    else:
        path, run = ckpt.read_latest(config.OUTPUT, logger.warning)
        if path is None:
            raise ckpt.CheckpointError(
                f"nothing to evaluate: give --resume (no checkpoint in {config.OUTPUT})"
            )
        weights = ckpt.weights_and_classes(run, path, config.TEST.WEIGHTS)
    compare_config(flat_config(config), weights, path)
    return Start(path, weights)
