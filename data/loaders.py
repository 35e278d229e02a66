"""Datasets, transforms and samplers joined to loaders."""

import logging
import signal

import torch
from torch.utils.data import DataLoader, default_collate

from .datasets import DataError, EvaluationSamples, TrainingSamples, build_dataset
from .samplers import TrainBatchSampler, evaluation_shard
from .transforms import build_transform

LARGEST_FAILED_SHARE = 0.01


class Loader:
    """Batches of images (B, 3, S, S) and class indices (B,), and an account of unreadable files.

    Args:
        loader: a DataLoader over samples (image, target, failed), collated by :func:`collate`.
        paths: the file of every index.
        world_size: processes that share the files.

    Raises:
        DataError: while iterating, when more than 1% of this process's share of the files could not be read.
    """

    def __init__(self, loader, paths, world_size):
        self.loader, self.paths, self.failed = loader, paths, set()
        self.share = max(1, len(paths) // world_size)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        failed_now = set()  # an epoch's: over many epochs, a process sees the files of the others
        for images, targets, failed in self.loader:
            for index in failed:
                self._report(index)
                failed_now.add(index)
                if len(failed_now) > LARGEST_FAILED_SHARE * self.share:
                    raise DataError(
                        f"{len(failed_now)} of {self.share} images cannot be read, more than "
                        f"{LARGEST_FAILED_SHARE:.0%}: the log names them; repair or remove them"
                    )
            yield images, targets

    def _report(self, index):
        if index not in self.failed:
            self.failed.add(index)
            share = len(self.failed) / len(self.paths)
            logging.getLogger("msg_transformer").warning(
                f"skipping {self.paths[index]}, which cannot be read ({len(self.failed)} so far, {share:.2%})"
            )


def collate(samples):
    """Join samples (image, target, failed) to (images, targets, failed), without the images that are None."""
    failed = [index for *_, indices in samples for index in indices]
    read = [(image, target) for image, target, _ in samples if image is not None]
    images, targets = default_collate(read) if read else (torch.empty(0), torch.empty(0, dtype=torch.long))
    return images, targets, failed


def _ignore_signals(worker):
    """The training process alone answers signals; a scheduler sends them to its workers too."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def build_loaders(config, rank=0, world_size=1, pin_memory=False):
    """Loaders over ``DATA.DATA_PATH``.

    Returns:
        The training loader (None with ``EVAL_MODE`` or ``THROUGHPUT_MODE``, which need no training images),
        its sampler, the validation loader over this process's share of the images, and the class names.

    Raises:
        DataError: what is wrong with the folder, and what to do.
    """
    root, skip = config.DATA.DATA_PATH, config.DATA.ON_ERROR == "skip"
    if not root:
        raise DataError(
            "no data: give --data-path, a folder with train/<class>/<image> and val/<class>/<image>"
        )
    options = dict(
        collate_fn=collate,
        worker_init_fn=_ignore_signals,
        num_workers=config.DATA.NUM_WORKERS,
        persistent_workers=config.DATA.NUM_WORKERS > 0,
        pin_memory=pin_memory and config.DATA.PIN_MEMORY,
        # The loaders' own generator: without it every epoch draws from the one that dropout uses.
        generator=torch.Generator(),
    )
    val = build_dataset(root, "val", build_transform(config, is_train=False))
    shard = evaluation_shard(len(val), rank, world_size)
    val_loader = DataLoader(EvaluationSamples(val, skip), config.DATA.BATCH_SIZE, sampler=shard, **options)
    val_loader = Loader(val_loader, [path for path, _ in val.samples], world_size)
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        return None, None, val_loader, val.classes
    train = build_dataset(root, "train", build_transform(config, is_train=True))
    accumulation = max(1, config.TRAIN.ACCUMULATION_STEPS)
    sampler = TrainBatchSampler(
        len(train), config.DATA.BATCH_SIZE, accumulation, rank, world_size, config.SEED
    )
    if not sampler.updates_per_epoch:
        raise DataError(
            f"{root}/train has {len(train)} images, fewer than an update takes: {config.DATA.BATCH_SIZE} per "
            f"process, {world_size} processes, {accumulation} accumulated; lower --batch-size"
        )
    samples = TrainingSamples(train, config.SEED, skip)
    train_loader = Loader(
        DataLoader(samples, batch_sampler=sampler, **options),
        [path for path, _ in train.samples],
        world_size,
    )
    return train_loader, sampler, val_loader, val.classes
