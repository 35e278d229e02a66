"""Which images a process sees, and when."""

import numpy as np
from torch.utils.data import Sampler


class TrainBatchSampler(Sampler):
    """Micro-batches of one process, cut from one permutation of the training set for each epoch.

    The permutation depends on (seed, epoch) only. An update takes the next ``batch_size * accumulation *
    world_size`` images of it, so that what an update sees does not depend on how it is spread over processes
    and micro-batches. Images that do not fill an update are left out of the epoch.

    Args:
        length: images in the training set.
        batch_size: images of a micro-batch of one process.
        accumulation: micro-batches of an update.

    Attributes:
        groups: None, or set afterwards to a number for each image: images of a batch are mostly of one group.
    """

    def __init__(self, length, batch_size, accumulation, rank, world_size, seed):
        self.groups = None
        self.length, self.batch_size, self.accumulation = length, batch_size, accumulation
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.images_per_update = batch_size * accumulation * world_size
        self.updates_per_epoch = length // self.images_per_update
        self.start(0)

    def start(self, epoch, images=0):
        """Choose the epoch of the next iteration, and how many images of it were used already."""
        self.epoch, self.images = epoch, images
        self.updates = (self.length - images) // self.images_per_update

    def parts(self):
        """What an update consists of, in words."""
        return f"{self.batch_size} per process, {self.world_size} processes, {self.accumulation} accumulated"

    def __len__(self):
        return self.updates * self.accumulation

    def _micro_batches(self):
        """Image indices of what is left of the epoch: (micro-batches, processes, batch_size)."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        if self.groups is not None:
            order = group(order, self.groups)
        left = order[self.images : self.images + self.updates * self.images_per_update]
        return left.reshape(-1, self.world_size, self.batch_size)

    def __iter__(self):
        for micro_batch in self._micro_batches()[:, self.rank].tolist():
            yield [(self.epoch, index) for index in micro_batch]

    def indices_of(self, update):
        """Image indices that this process sees in an update, counted from where the iteration started."""
        first = update * self.accumulation
        return self._micro_batches()[first : first + self.accumulation, self.rank].flatten().tolist()


def group(order, groups, run=16):
    """Reorder image indices so that runs of 16 are of one group, each where its last image was.

    ``groups`` has a number for each image. What fills no run comes at the end. The runs have a fixed length,
    so that the order does not depend on how many processes share it.
    """
    waiting, result = {}, []
    for index in order.tolist():
        members = waiting.setdefault(groups[index], [])
        members.append(index)
        if len(members) == run:
            result += members
            members.clear()
    rest = [index for members in waiting.values() for index in members]
    return np.array(result + rest, dtype=np.int64)


def evaluation_shard(length, rank, world_size):
    """Indices of the images that this process evaluates: every image belongs to exactly one process."""
    return range(rank, length, world_size)
