"""Batches of images of different sizes."""

import torch

from data.datasets import DataError
from data.loaders import ToDevice, build_loader, build_opener, build_sampler
from data.samplers import evaluation_shard

from .dataset import build_detection_dataset
from .transforms import build_detection_transform


def collate_detection(samples):
    """Join samples (image, target, failed) to ((images, sizes), targets, failed), except for images of None.

    Images (3, H, W) become one tensor (B, 3, H, W), each at the top left; sizes are their (H, W).
    """
    failed = [index for *_, indices in samples for index in indices]
    read = [(image, target) for image, target, _ in samples if image is not None]
    sizes = [tuple(image.shape[-2:]) for image, _ in read]
    height, width = (max(sides) for sides in zip(*sizes)) if read else (0, 0)
    images = torch.zeros(len(read), 3, height, width, dtype=torch.uint8)
    for place, (image, _), size in zip(images, read, sizes):
        place[:, : size[0], : size[1]] = image
    return (images, sizes), [target for _, target in read], failed


class BatchToDevice(ToDevice):
    """Brings detection batches to a device, normalised and zero outside of each image."""

    def move(self, batch):
        """((images, sizes), targets) on the device."""
        (images, sizes), targets = batch
        images = self.normalize(self.copy(images))
        for image, (height, width) in zip(images, sizes):
            image[:, height:] = 0
            image[:, :, width:] = 0
        targets = [
            {name: self.copy(value) if torch.is_tensor(value) else value for name, value in target.items()}
            for target in targets
        ]
        return (images, sizes), targets


def build_detection_loaders(config, rank=0, world_size=1, device="cpu"):
    """Loaders over the COCO data of ``DATA.DATA_PATH``, whose batches are on ``device``.

    Returns:
        The training loader and its sampler (None with ``EVAL_MODE``), the validation loader over this
        process's share of the images, and the validation :class:`~detection.dataset.CocoDataset`.

    Raises:
        DataError: what is wrong with the data, and what to do.
    """
    det, to_device = config.DET, BatchToDevice(torch.device(device))
    root, skip = config.DATA.DATA_PATH, config.DATA.ON_ERROR == "skip"
    if not root:
        raise DataError("no data: give --data-path, a folder with images and annotations in COCO format")
    read, transform = build_opener(config), build_detection_transform(config, is_train=False)
    options = dict(read=read, per_image=det.PER_IMAGE)
    val = build_detection_dataset(root, det.VAL_IMAGES, det.VAL_JSON, transform, skip, **options)
    shard = evaluation_shard(len(val), rank, world_size)
    # One image at a time: the padding of a batch would change what convolutions see at the borders.
    val_loader = build_loader(config, val, shard, to_device, collate_detection, batch_size=1)
    if config.EVAL_MODE:
        return None, None, val_loader, val
    transform = build_detection_transform(config, is_train=True)
    train = build_detection_dataset(
        root, det.TRAIN_IMAGES, det.TRAIN_JSON, transform, skip, is_train=True, read=read
    )
    named = [{(c["id"], c["name"]) for c in part.annotations.categories} for part in (train, val)]
    if named[0] != named[1]:
        number, name = min(named[0] ^ named[1], key=str)
        raise DataError(
            f"{train.annotations.path} and {val.annotations.path} have different categories: only one of "
            f"them has {name!r} with the id {number}"
        )
    without = len(train.annotations.images) - len(train)
    why = "; ".join(["no objects or small", *train.annotations.reasons()[:3]])
    where = train.annotations.path + (f", without {without:,} images ({why})," if without else "")
    sampler = build_sampler(config, len(train), rank, world_size, where)
    sampler.groups = [record["height"] > record["width"] for record in train.records]  # less padding
    return build_loader(config, train, sampler, to_device, collate_detection), sampler, val_loader, val
