"""Loaders: datasets, transforms and samplers put together."""

import functools
import logging
import os
import signal
import sys

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, default_collate

from config import ConfigError
from distributed import from_rank_0, gather_lists, rank_and_world_size
from utils import STOP_SIGNALS, end_on_lost_batches

from .archives import open_dataset
from .datasets import (
    DataError,
    EvaluationSamples,
    TrainingSamples,
    load_image,
    report_orientations,
    require_classes,
    require_same_classes,
)
from .samplers import TrainBatchSampler, evaluation_shard
from .transforms import build_transform, image_mode

logger = logging.getLogger("msg_transformer")
LARGEST_FAILED_SHARE = 0.01
LARGEST_SHARE_LEFT_OUT = 0.1  # of the images of an epoch, without a warning


class Loader:
    """Batches on the device, images (B, C, S, S) and class indices (B,); keeps count of unreadable files.

    While iterating it raises a DataError once this process alone has failed to read more than 1% of all
    files; :meth:`check_failures` counts the failures of all processes.

    Args:
        loader: a DataLoader over samples (image, target, failed), collated by :func:`collate`.
        paths: the file of every index.
        to_device: moves an iterable of batches to the device, as :class:`ToDevice` does.
        turn, workers: for the log, whether images are turned as EXIF says, and ``DATA.NUM_WORKERS``.
    """

    def __init__(self, loader, paths, to_device, turn=False, workers=0):
        self.loader, self.paths, self.to_device = loader, paths, to_device
        self.turn, self.workers = turn, workers
        self.failed, self.failed_now = set(), set()

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.to_device(self._read()))

    def _read(self):
        self.failed_now = set()  # in this epoch: over many epochs, every process sees all files
        for images, targets, failed in self.loader:
            for index in failed:
                self._report(index)
                self.failed_now.add(index)
                self._limit(len(self.failed_now))
            yield images, targets

    def indices_seen(self):
        """Of an evaluation, the indices of the images that the last iteration gave this process, in order."""
        return [index for index in self.loader.sampler if index not in self.failed_now]

    def check_failures(self):
        """Raise a DataError if all processes together failed to read more than 1% of the files this epoch.

        All processes must call it.
        """
        failed = gather_lists(sorted(self.failed_now))
        from_rank_0(lambda: self._limit(len(set(failed))))

    def _limit(self, failed):
        if failed > LARGEST_FAILED_SHARE * len(self.paths):
            raise DataError(
                f"{failed} of {len(self.paths)} images cannot be read, more than "
                f"{LARGEST_FAILED_SHARE:.0%}: the logs name them; repair or remove them"
            )

    def report(self):
        """Log what the dataset found, and how many images an epoch leaves out."""
        dataset = self.loader.dataset.dataset
        dataset.report()
        if rank_and_world_size()[0] == 0:
            source = getattr(dataset, "source", None)
            report_orientations(self.paths, source and source.stored, self.turn)
        if isinstance(self.loader.batch_sampler, TrainBatchSampler):
            self._report_epoch(self.loader.batch_sampler)
        if self.workers > self.loader.num_workers:
            logger.info(
                f"DATA.NUM_WORKERS {self.workers} -> {self.loader.num_workers}, the cores of each process"
            )

    def _report_epoch(self, sampler):
        if left := sampler.length % sampler.images_per_update:
            level, advice = logging.INFO, ""
            if left > (most := LARGEST_SHARE_LEFT_OUT * sampler.length):
                per_image = sampler.images_per_update // sampler.batch_size
                sizes = range(1, sampler.length // per_image + 1)
                enough = [size for size in sizes if sampler.length % (size * per_image) <= most]
                better = min(enough, key=lambda size: abs(size - sampler.batch_size), default=None)
                advice = f"--batch-size {better}" if better else "a lower TRAIN.ACCUMULATION_STEPS"
                level, advice = logging.WARNING, f": {advice} leaves out fewer"
            logger.log(
                level,
                f"{left:,} of these images, others each time, are left out of an epoch: they do not fill an "
                f"update of {sampler.parts()}{advice}",
            )

    def _report(self, index):
        if index not in self.failed:
            self.failed.add(index)
            share = len(self.failed) / len(self.paths)
            logger.warning(
                f"skipping {self.paths[index]}, which cannot be read ({len(self.failed)} so far, {share:.2%})"
            )


class ToDevice:
    """Moves batches to a device, where 8-bit images are normalised."""

    def __init__(self, device):
        self.device = device
        statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.mean, self.std = (torch.tensor(value, device=device)[:, None, None] for value in statistics)

    def __call__(self, batches):
        """Yield each (images, targets) of ``batches`` on the device."""
        return map(self.move, batches)

    def move(self, batch):
        """A batch on the device, its images normalised."""
        images, targets = map(self.copy, batch)
        return self.normalize(images), targets

    def copy(self, tensor):
        """A tensor on the device, which CUDA alone may copy later: MPS would read memory given back since."""
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def normalize(self, images):
        """What torchvision's ToTensor and Normalize make of uint8 images (B, 3, S, S); floats stay."""
        if images.dtype != torch.uint8:
            return images
        result = torch.empty(images.shape, device=images.device)
        # On a CPU, image by image: one fits into its caches.
        parts = zip(result, images) if self.device.type == "cpu" else [(result, images)]
        for part, image in parts:
            part.copy_(image).div_(255).sub_(self.mean).div_(self.std)
        return result


def collate(samples):
    """Join samples (image, target, failed) to (images, targets, failed), leaving out images that are None."""
    failed = [index for *_, indices in samples for index in indices]
    read = [(image, target) for image, target, _ in samples if image is not None]
    images, targets = default_collate(read) if read else (torch.empty(0), torch.empty(0, dtype=torch.long))
    return images, targets, failed


def start_worker(worker):
    """Let a worker ignore signals: schedulers send them to workers too, but only the run answers them."""
    end_on_lost_batches()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if "cv2" in sys.modules:  # imported where it reads the images
        sys.modules["cv2"].setNumThreads(0)


def cores_of_process():
    """The cores that the system gives this process, shared with the others of a launcher on this machine."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def turns(config):
    """Whether training and evaluation turn images as their EXIF orientation says."""
    return config.DATA.EXIF_ORIENTATION == "apply"


def build_opener(config):
    """The function that opens an image file with Pillow."""
    mode, limit = image_mode(config.MODEL.MSG.IN_CHANS), config.DATA.MAX_PIXELS
    return functools.partial(load_image, mode=mode, max_pixels=limit, turn=turns(config))


def build_reader(config, is_train):
    """The function that opens an image file as ``DATA.BACKEND`` does, and the transform of what it returns.

    The transform makes a tensor (C, H, W).

    Raises:
        ConfigError: OpenCV cannot be imported.
    """
    if config.DATA.BACKEND == "pil":
        return build_opener(config), build_transform(config, is_train)
    try:
        from .opencv.transforms import ImageFile, build_opencv_transform
    except ImportError as error:
        raise ConfigError(
            f"DATA.BACKEND opencv: OpenCV cannot be imported ({error}): pip install opencv-python, or "
            "opencv-python-headless where there is no display"
        ) from error
    opener = functools.partial(ImageFile, max_pixels=config.DATA.MAX_PIXELS, turn=turns(config))
    return opener, build_opencv_transform(config, is_train)


def build_sampler(config, length, rank, world_size, where):
    """The sampler of a training set of ``length`` images, which ``where`` names.

    Raises:
        DataError: they are fewer than an update takes.
    """
    accumulation = max(1, config.TRAIN.ACCUMULATION_STEPS)
    sampler = TrainBatchSampler(length, config.DATA.BATCH_SIZE, accumulation, rank, world_size, config.SEED)
    if not sampler.updates_per_epoch:
        raise DataError(
            f"{where} has {length} images, fewer than an update takes: {sampler.parts()}; lower --batch-size"
        )
    return sampler


def build_loader(config, dataset, sampler, to_device, collate, batch_size=None):
    """The :class:`Loader` of a dataset, whose batches ``to_device`` moves.

    Training has a TrainBatchSampler as its ``sampler``; evaluation has indices of images and a batch size.
    """
    device, skip = to_device.device, config.DATA.ON_ERROR == "skip"
    options = dict(
        collate_fn=collate,
        worker_init_fn=start_worker,
        num_workers=min(config.DATA.NUM_WORKERS, cores_of_process()),
        persistent_workers=config.DATA.NUM_WORKERS > 0,
        pin_memory=device.type == "cuda" and config.DATA.PIN_MEMORY,
        # Without a generator of its own, a loader draws from the one that dropout uses, in every epoch.
        generator=torch.Generator(),
    )
    if batch_size is None:
        loader = DataLoader(TrainingSamples(dataset, config.SEED, skip), batch_sampler=sampler, **options)
        return Loader(loader, dataset.paths, to_device, turns(config))
    loader = DataLoader(EvaluationSamples(dataset, skip), batch_size, sampler=sampler, **options)
    return Loader(loader, dataset.paths, to_device, turns(config), config.DATA.NUM_WORKERS)


def build_loaders(config, rank=0, world_size=1, device="cpu"):
    """Loaders over ``DATA.DATA_PATH``, whose batches are on ``device``.

    Returns:
        The training loader and its sampler (None with ``EVAL_MODE`` or ``THROUGHPUT_MODE``, which need no
        training images), the validation loader over this process's share of the images, and the class names.

    Raises:
        DataError: what is wrong with the folder, and what to do.
    """
    kind, root, to_device = config.DATA.DATASET, config.DATA.DATA_PATH, ToDevice(torch.device(device))
    if not root:
        raise DataError(
            "no data: give --data-path, a folder with train/<class>/<image> and val/<class>/<image>"
        )
    read, transform = build_reader(config, is_train=False)
    val = open_dataset(kind, root, "val", transform, read)
    require_classes(val, config.MODEL.NUM_CLASSES)
    shard = evaluation_shard(len(val), rank, world_size)
    val_loader = build_loader(config, val, shard, to_device, collate, config.DATA.BATCH_SIZE)
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        return None, None, val_loader, val.classes
    read, transform = build_reader(config, is_train=True)
    train = open_dataset(kind, root, "train", transform, read)
    require_same_classes(train.root, train.classes, val.root, val.classes)
    sampler = build_sampler(config, len(train), rank, world_size, train.root)
    train_loader = build_loader(config, train, sampler, to_device, collate)
    return train_loader, sampler, val_loader, val.classes
