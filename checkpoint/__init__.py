"""Checkpoint files: writing and reading them, what may stand in them, loading them into a model."""

# ruff: noqa: F401, these are the names of ``import checkpoint as ckpt``
from .contents import NEW_RUN, CheckpointError, better_of, own_config, weights_and_classes, weights_of
from .files import (
    BEST,
    epoch_name,
    in_order,
    place_of,
    read_checkpoint,
    read_latest,
    read_run,
    read_weights,
    remove_unfinished,
    save_best,
    save_checkpoint,
    save_in_folder,
    save_weights,
    score_of_best,
    within_epoch_name,
)
from .loading import class_difference, load_optimizer, load_weights, without_prefix
