"""Datasets, transforms and samplers joined to loaders."""

import torch
from torch.utils.data import DataLoader

from .datasets import DataError, SeededDataset, build_dataset
from .samplers import TrainBatchSampler, evaluation_shard
from .transforms import build_transform


def build_loaders(config, rank=0, world_size=1, pin_memory=False):
    """Loaders over ``DATA.DATA_PATH``.

    Returns:
        The training loader (None with ``EVAL_MODE`` or ``THROUGHPUT_MODE``, which need no training images),
        the validation loader over this process's share of the images, and the class names. Batches are images
        (B, 3, S, S) and class indices (B,).

    Raises:
        DataError: what is wrong with the folder, and what to do.
    """
    root = config.DATA.DATA_PATH
    if not root:
        raise DataError(
            "no data: give --data-path, a folder that holds train/<class>/<image> and val/<class>/<image>"
        )
    workers = dict(
        num_workers=config.DATA.NUM_WORKERS,
        persistent_workers=config.DATA.NUM_WORKERS > 0,
        pin_memory=pin_memory and config.DATA.PIN_MEMORY,
        # The loaders' own generator: without it every epoch draws from the one that dropout uses.
        generator=torch.Generator(),
    )
    val = build_dataset(root, "val", build_transform(config, is_train=False))
    val_loader = DataLoader(
        val,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=evaluation_shard(len(val), rank, world_size),
        **workers,
    )
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        return None, val_loader, val.classes
    train = build_dataset(root, "train", build_transform(config, is_train=True))
    sampler = TrainBatchSampler(
        len(train),
        config.DATA.BATCH_SIZE,
        max(1, config.TRAIN.ACCUMULATION_STEPS),
        rank,
        world_size,
        config.SEED,
    )
    if not sampler.updates:
        raise DataError(
            f"{root}/train has {len(train)} images, fewer than an update takes: {config.DATA.BATCH_SIZE} per "
            f"process, {world_size} processes, {sampler.accumulation} accumulated; lower --batch-size"
        )
    train_loader = DataLoader(SeededDataset(train, config.SEED), batch_sampler=sampler, **workers)
    return train_loader, val_loader, val.classes
