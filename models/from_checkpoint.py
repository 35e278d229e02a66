"""A trained classifier from its checkpoint, ready for use."""

import argparse
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import checkpoint as ckpt
from config import ConfigError, flat_config, function_difference, get_config, parse_config, set_classes
from data.transforms import build_transform
from distributed import Compute

from .build import build_model
from .deploy.runtime import build_runtime

logger = logging.getLogger("msg_transformer")


class Ready(NamedTuple):
    """What is needed to use a trained model."""

    model: nn.Module  # in evaluation mode, on the CPU, in float32
    transform: Callable  # of a PIL image of any size to what the model takes
    class_names: list | None  # in the order of the outputs; None where the checkpoint does not name them


def load(path, cfg=None, runtime="pytorch", weights="auto"):
    """The classifier of a checkpoint, its evaluation transform, and the names of its classes.

    ``model(transform(image)[None])`` gives the logits (1, classes) that ``main.py --eval`` gives in float32
    with ``DATA.BACKEND pil``.

    Args:
        path: a checkpoint of this code; a file, or an https address. Nothing in it is run.
        cfg: YAML config of the model, for checkpoints that hold none, as those of the official release. It
            must agree with the checkpoint's where there is one, see ``TEST.OTHER_CONFIG`` in config.py.
        runtime: what computes, a value of ``RUNTIME`` in config.py.
        weights: which of the checkpoint, a value of ``TEST.WEIGHTS``: with auto averaged ones (EMA) where it
            holds them, unless they scored lower than the others.

    Returns:
        A :class:`Ready`.

    Raises:
        CheckpointError: no such file, damaged, without a config, or of a detector.
        ConfigError: its config cannot be used.
        UserError: ``runtime`` is not installed, or cannot compute this model.
    """
    config, checkpoint = read_described(path, cfg, weights)
    ready = build_ready(config, checkpoint, path)
    config.defrost()
    config.RUNTIME = runtime
    return ready._replace(model=build_runtime(config, ready.model, Compute(torch.device("cpu"))))


def build_ready(config, checkpoint, path):
    """The :class:`Ready` of what :func:`read_described` returned; ``path`` is for messages."""
    if config.DATA.DATASET == "coco":
        raise ckpt.CheckpointError(f"{path} is of a detector: use detection.load")
    model = build_model(config)
    model.classes = checkpoint["classes"]
    ckpt.load_weights(model, checkpoint, os.fspath(path))
    return Ready(model.eval(), build_transform(config, is_train=False), checkpoint["classes"])


def compare_config(config, checkpoint, path, fine_tuning=False):
    """Refuse weights whose own config makes something else of them than another one, where they have one.

    Args:
        config: the other, from :func:`~config.flat_config` or :func:`~config.flat_text`. Its
            ``TEST.OTHER_CONFIG`` allows any difference, which is then logged.
        checkpoint: what :func:`~checkpoint.read_weights` returned.
        path: its file, for messages.
        fine_tuning: allow any difference.

    Raises:
        CheckpointError: the configs differ, with every key and its values.
    """
    try:
        differences = function_difference(checkpoint["config"], config, f"the config in {path}")
    except ConfigError as error:
        logger.warning(f"{error}; it is not compared with the config of this run")
        return
    if not differences:
        return
    words = f"{path} was trained with another config: {'; '.join(differences)}"
    if fine_tuning or config["TEST.OTHER_CONFIG"]:
        logger.warning(words)
        return
    advice = ckpt.own_config(checkpoint, path) or "use its own config"
    raise ckpt.CheckpointError(
        f"{words}. {advice[0].upper()}{advice[1:]}, or set TEST.OTHER_CONFIG True if this is on purpose"
    )


def read_described(path, cfg=None, weights="auto"):
    """Read a checkpoint and the config that its model is built from; arguments as for :func:`load`.

    Returns:
        The config, frozen, with the checkpoint's number of classes, and what
        :func:`~checkpoint.read_weights` returns.

    Raises:
        CheckpointError: it cannot be used; it holds no config and ``cfg`` is None, or one that ``cfg``
            contradicts.
        ConfigError: its config cannot be used.
    """
    path = os.fspath(path)
    checkpoint = ckpt.read_weights(path, weights)
    classes, text = checkpoint["classes"], checkpoint["config"]
    if cfg is not None:
        config = get_config(argparse.Namespace(cfg=os.fspath(cfg)))
        compare_config(flat_config(config), checkpoint, path)
        if classes:
            set_classes(config, len(classes))
    elif isinstance(text, str):
        config = parse_config(text, f"the config in {path}")
    else:
        raise ckpt.CheckpointError(
            f"{path} does not say how its model is built: give its config as well (cfg)"
        )
    if classes and len(classes) != config.MODEL.NUM_CLASSES:
        raise ckpt.CheckpointError(
            f"{path} is damaged: it names {len(classes)} classes, and its config says "
            f"{config.MODEL.NUM_CLASSES}"
        )
    return config, checkpoint
