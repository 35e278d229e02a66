"""ImageFolder datasets with clear errors and augmentation that depends on (seed, epoch, image) only."""

import contextlib
import os

import numpy as np
import torchvision
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import UserError, seeded

# Formats of the file names that ImageFolder takes, and GIF, which hides behind them. Not all that Pillow
# knows: an EPS file would run Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class DataError(UserError):
    """The data cannot be used; the message says which path and what to do."""


@contextlib.contextmanager
def decoding(path):
    """Context that reports whatever goes wrong in it as a DataError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise DataError(f"{path} cannot be read as an image (unknown format): repair or remove it") from error
    # A damaged file can make a decoder raise nearly anything.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason}): repair or remove it") from error


def load_image(path):
    """Read an image file as PIL RGB; of an animation the first frame, EXIF rotation ignored, as PIL does it.

    Raises:
        DataError: the file cannot be decoded.
    """
    with decoding(path), Image.open(path, formats=FORMATS) as image:
        return image.convert("RGB")


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder that skips hidden folders and names the file that cannot be read."""

    def __init__(self, root, transform=None, loader=load_image):
        super().__init__(root, transform, loader=loader, allow_empty=True)

    def find_classes(self, directory):
        """Class folders of ``directory``, sorted: (names, index of each name)."""
        classes = class_names(directory)
        return classes, {name: index for index, name in enumerate(classes)}


class TrainingSamples(Dataset):
    """Training samples whose random transforms depend on (seed, epoch, index) only.

    Items are asked for by (epoch, index), so neither the number of workers nor the order in which they work
    changes an image. An item is (image, target, failed): with ``skip``, an image that cannot be read is
    replaced by another one, again a function of (seed, epoch, index), and its index is in the list
    ``failed``.
    """

    def __init__(self, dataset, seed, skip):
        self.dataset, self.seed, self.skip = dataset, seed, skip

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        failed = []
        while True:
            try:
                with seeded("augmentation", self.seed, epoch, index, restore=get_worker_info() is None):
                    return *self.dataset[index], failed
            except DataError:
                failed.append(index)
                if not self.skip or len(failed) > 20:
                    raise
                index = int(np.random.default_rng([self.seed, epoch, *failed]).integers(len(self)))


class EvaluationSamples(Dataset):
    """Evaluation samples (image, target, failed); with ``skip``, image None where it cannot be read."""

    def __init__(self, dataset, skip):
        self.dataset, self.skip = dataset, skip

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return *self.dataset[index], []
        except DataError:
            if not self.skip:
                raise
            return None, None, [index]


def class_names(folder):
    """Sorted names of the class folders in ``folder``, hidden ones left out.

    Raises:
        DataError: the folder is missing or holds no class folder.
    """
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is not a folder: --data-path must hold train/<class>/<image> and val/<class>/<image>"
        )
    names = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise DataError(f"{folder} has no class folders: images belong in {folder}/<class>/<image>")
    return names


def build_dataset(root, split, transform, loader=load_image):
    """The images of ``root/split``: what ``transform`` makes of what ``loader`` makes of a path.

    Raises:
        DataError: no images, an empty class in the training set, or classes that differ between train and
            val.
    """
    folder = os.path.join(root, split)
    classes = class_names(folder)
    other = os.path.join(root, "val" if split == "train" else "train")
    other_classes = class_names(other) if os.path.isdir(other) else classes
    if other_classes != classes:
        difference = sorted(set(classes) ^ set(other_classes))
        raise DataError(
            f"{folder} and {other} have different classes ({len(classes)} and {len(other_classes)}): "
            f"only one of them has {', '.join(difference[:5])}{' ...' if len(difference) > 5 else ''}"
        )
    dataset = ImageFolder(folder, transform, loader)
    if not dataset.samples:
        raise DataError(f"{folder} has class folders but no images ({', '.join(IMG_EXTENSIONS)})")
    empty = sorted(set(range(len(classes))) - set(dataset.targets))
    if split == "train" and empty:
        raise DataError(
            f"{os.path.join(folder, classes[empty[0]])} holds no images: add some or remove the class"
        )
    return dataset
