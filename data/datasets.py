"""ImageFolder datasets with clear errors and augmentation that depends on (seed, epoch, image) only."""

import collections
import contextlib
import errno
import io
import itertools
import logging
import os
import stat
from pathlib import Path

import numpy as np
import torchvision
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from distributed import seeded
from utils import UserError, advice_on_look_alikes

logger = logging.getLogger("msg_transformer")
# Formats of the file names that ImageFolder takes, and GIF, which hides behind them. Not all that Pillow
# knows: an EPS file would run Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # DATA.MAX_PIXELS of those who have no config
# What EXIF's orientations from 2 to 8 ask for, so that an image is upright.
_TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))
_LOOKED_AT = 256  # images of a set whose EXIF orientations are counted
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the machine, which is no fault of a file
SPLITS = ("train", "val", "test")


class DataError(UserError):
    """The data cannot be used; the message says which path and what to do."""


@contextlib.contextmanager
def decoding(path):
    """Context that reports whatever goes wrong in it as a DataError that names the file.

    An OSError stays where the machine has no file descriptors or memory left.
    """
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path} cannot be read as an image (unknown format): repair or remove it") from error
    # A damaged file can make a decoder raise nearly anything.
    except Exception as error:
        if getattr(error, "errno", None) in EXHAUSTED:
            raise
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason}): repair or remove it") from error


def read_file(path):
    """The bytes of an image file; a DataError if it is no regular file."""
    # A pipe would wait forever, a device would never end.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path} cannot be read as an image: it is not a file; remove it")
    return Path(path).read_bytes()


def open_image(path, max_pixels=MAX_PIXELS, content=None):
    """Read an image file, and decode its header.

    Args:
        max_pixels: what an image may have; a side counts as 16 pixels at least, because short rows cost as
            much.
        content: the bytes of the file, where ``path`` is only a name for messages.

    Returns:
        The image, whose pixels Pillow decodes when they are asked for, and the bytes of the file.

    Raises:
        DataError: it is no regular file, or no image within the limit.
    """
    with decoding(path):
        content = read_file(path) if content is None else content
        with without_pillows_limit():
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        if max(16, image.width) * max(16, image.height) > max_pixels:
            raise DataError(
                f"{path} cannot be read as an image: it has {image.width}x{image.height} pixels, and "
                f"DATA.MAX_PIXELS is {max_pixels}: raise that, or remove the file"
            )
    return image, content


@contextlib.contextmanager
def without_pillows_limit():
    """Context in which Pillow takes images of any size: ours are limited by :func:`open_image`."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def orientation_of(image):
    """The EXIF orientation of an image that Pillow opened, from 1 to 8; 1 (upright) where it has none.

    It is 1 for TIFF files, whose own tag Pillow applies by itself.
    """
    try:
        found = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged tag can raise nearly anything
        return 1
    return found if found in _TURNS else 1


def load_image(path, max_pixels=MAX_PIXELS, mode="RGB", content=None, turn=True):
    """Read an image file with PIL; of an animation the first frame.

    Args:
        max_pixels, content: see :func:`open_image`.
        mode: PIL's, of the image returned.
        turn: whether to turn it as its EXIF orientation says, so that it is upright.

    Raises:
        DataError: the file cannot be decoded, or only beyond the limit.
    """
    with decoding(path), open_image(path, max_pixels, content)[0] as image:
        converted = in_8_bits(image, mode, path)
        orientation = orientation_of(image) if turn else 1
        return converted.transpose(_TURNS[orientation]) if orientation > 1 else converted


def in_8_bits(image, mode, path):
    """An image as :func:`open_image` returns it, in a PIL mode of 8 bits.

    Values of 16 bits keep the upper 8 in grey too, as Pillow does it for colours. Floats and values of 32
    bits are refused, because the file does not say which one is white.
    """
    if image.mode[0] not in "IF":
        return image.convert(mode)
    # Pillow opens PGM files of 16 bits as 32, and brings them to the whole range.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        values = "floats" if image.mode == "F" else "signed or 32-bit numbers"
        raise DataError(
            f"{path} cannot be read as an image: its values are {values}, and no value is known to be white: "
            "convert it to 8 or 16 bits, or remove it"
        )
    (bits,) = getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))  # 12 are possible
    values = np.right_shift(image, bits - 8).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder that skips hidden folders and names what cannot be read.

    ``ignored`` is a Counter of what is in the folders beside images, by ending or in words.
    """

    def __init__(self, root, transform=None, loader=load_image):
        self.ignored = collections.Counter()
        super().__init__(root, transform, loader=loader, allow_empty=True)

    def find_classes(self, directory):
        """As torchvision's: (names, index of each name)."""
        classes = class_names(directory, self.ignored)
        return classes, {name: index for index, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, **_):
        """The images as (path, class index), in torchvision's order."""
        return [
            (path, index)
            for name, index in class_to_idx.items()
            for path in find_images(directory, name, self.ignored)
        ]

    @property
    def paths(self):
        """The file of every index."""
        return [path for path, _ in self.samples]

    def __getitem__(self, index):
        with without_pillows_limit():  # transforms crop, which Pillow limits too
            return super().__getitem__(index)

    def report(self):
        """Log what was found and what was ignored."""
        report_found(self, self.ignored)
        for folder in (os.path.join(self.root, name) for name in self.classes if name in SPLITS):
            if list_folder(folder)[0]:
                logger.warning(
                    f"{folder}, which holds folders, is taken for a class: if it is a set of its own, move it"
                )


def report_orientations(paths, stored, turn):
    """Log how many images have an EXIF orientation, of at most 256 evenly over a set, if any has.

    ``paths`` has the name of every index. ``stored`` returns the bytes of an index, or is None where the
    names are files. ``turn`` says whether images are turned.
    """
    looked_at = np.unique(np.linspace(0, len(paths) - 1, min(_LOOKED_AT, len(paths))).astype(int)).tolist()
    found = []
    for path, index in ((paths[index], index) for index in looked_at):
        # What cannot be read is told where it is used. The header says enough: pixels are not decoded.
        with contextlib.suppress(Exception), without_pillows_limit():
            if stored is None and not os.path.isfile(path):  # a pipe would wait forever
                continue
            file = path if stored is None else io.BytesIO(stored(index))
            with Image.open(file, formats=FORMATS) as image:
                if image.info.get("exif") and orientation_of(image) > 1:
                    found.append(path)
    if found:
        action = "apply turns" if turn else "ignore leaves them as stored; apply would turn"
        logger.log(
            logging.INFO if turn else logging.WARNING,
            f"{len(found):,} of {len(looked_at):,} images looked at have an EXIF orientation, such as "
            f"{found[0]}: DATA.EXIF_ORIENTATION {action} them upright",
        )


def report_found(dataset, ignored):
    """Log the images and classes of a dataset, and what a Counter says was ignored."""
    number = len(dataset.classes)
    empty = number - len(np.unique(dataset.targets))
    of_them = f", {empty:,} of them without images" if empty else ""
    found = f"{dataset.root}: {len(dataset):,} images in {number:,} classes{of_them}"
    most = [f"{what} {number:,}" for what, number in ignored.most_common(10)]
    if len(ignored) > 10:
        most.append("...")
    logger.info(found + ("; ignored: " if most else "") + ", ".join(most))


class TrainingSamples(Dataset):
    """Training samples whose random transforms depend on (seed, epoch, index) only, not on workers.

    Items are asked for by (epoch, index). An item is (image, target, failed): with ``skip``, an image that
    cannot be read is replaced by another one, again a function of (seed, epoch, index), and its index is in
    the list ``failed``.
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
                with seeded("augmentation", self.seed, epoch, index, restore=False):
                    return *self.dataset[index], failed
            except DataError:
                failed.append(index)
                if not self.skip or len(failed) > 20:
                    raise
                index = int(np.random.default_rng([self.seed, epoch, *failed]).integers(len(self)))

    def __getitems__(self, keys):
        """The items of a batch, after which the generators of this process are where they were."""
        with seeded("augmentation", self.seed):
            return [self[key] for key in keys]


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


def class_names(folder, ignored=None):
    """Sorted names of the class folders in ``folder``, hidden ones left out.

    All else in the folder is added to ``ignored``, a Counter. It is a DataError if the folder is missing,
    cannot be listed, or holds no class folder.
    """
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is not a folder: --data-path must hold train/<class>/<image> and val/<class>/<image>"
            + _root_nearby(os.path.dirname(folder))
        )
    folders, files = list_folder(folder)
    names = sorted(entry.name for entry in folders if not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders: images belong in {folder}/<class>/<image>")
    if ignored is not None:
        ignored.update(["hidden folders"] * (len(folders) - len(names)))
        ignored.update(
            "images outside the class folders" if is_image(name) else ending(name) for name in files
        )
    return names


def _root_nearby(root):
    """Advice to take the folder above ``root``, or one in it, where that has train and val; else nothing."""
    root = os.path.abspath(root)
    nearby = [os.path.dirname(root)]
    with contextlib.suppress(OSError):
        nearby += sorted(entry.path for entry in os.scandir(root))
    found = (path for path in nearby if all(os.path.isdir(os.path.join(path, s)) for s in ("train", "val")))
    return "".join(f"; {path} does: --data-path {path}" for path in itertools.islice(found, 1))


def require_classes(dataset, number):
    """Refuse a set of one class, whose loss would be 0: mostly its class folders are one level too deep.

    A ``number`` of 1, ``MODEL.NUM_CLASSES``, asks for such a set.
    """
    if len(dataset.classes) > 1 or number == 1:
        return
    root, (name,) = dataset.root, dataset.classes
    folder, advice = os.path.join(root, name), ""
    folders = list_folder(folder)[0] if os.path.isdir(folder) else []
    if below := sorted(entry.name for entry in folders if not entry.name.startswith(".")):
        listed = f"{', '.join(below[:3])}{' ...' if len(below) > 3 else ''}"
        advice = f"; {folder} holds the folders {listed}: if they are the classes, "
        if {"train", "val"} <= {*below}:
            advice += f"take --data-path {folder}"
        else:
            split = os.path.basename(root)
            advice += f"--data-path must hold {split}/{below[0]} and not {split}/{name}/{below[0]}"
    raise DataError(f"{root} has a single class, {name}{advice}; MODEL.NUM_CLASSES 1 asks for a single class")


def is_image(name):
    """Whether a file name ends like that of an image; the notes of a Mac on one (``._1.png``) are none."""
    return name.lower().endswith(IMG_EXTENSIONS) and not os.path.basename(name).startswith("._")


def find_images(folder, name, ignored):
    """Paths of the images of a class, in the order of torchvision's ImageFolder; hidden folders are left out.

    Links are followed, except to a folder that holds them, which would show its images again and again.

    Args:
        folder, name: the class is ``folder/name``.
        ignored: a Counter, to which all else in the folder is added.

    Raises:
        DataError: a folder cannot be listed, or the class is a link to a folder that holds it.
    """
    path = os.path.join(folder, name)
    holders = [os.path.realpath(folder)]
    if _holds(path, holders):
        raise DataError(f"{path} is a link to a folder that holds it: remove it")
    found, waiting = [], [(path, holders)]
    while waiting:
        path, holders = waiting.pop()
        holders = [*holders, os.path.realpath(path)]
        folders, files = list_folder(path)
        found.append((path, sorted(filter(is_image, files))))
        ignored.update(ending(name) for name in files if not is_image(name))
        for entry in folders:
            below = os.path.join(path, entry.name)
            if entry.name.startswith("."):
                ignored["hidden folders"] += 1
            elif entry.is_symlink() and _holds(below, holders):
                ignored["links to folders that hold them"] += 1
            else:
                waiting.append((below, holders))
    return [os.path.join(path, name) for path, names in sorted(found) for name in names]


def _holds(link, folders):
    """Whether a link leads to one of some folders, given by their real paths, or to one that holds them."""
    target = os.path.join(os.path.realpath(link), "")
    return any(os.path.join(folder, "").startswith(target) for folder in folders)


def list_folder(path):
    """What is in a folder: (entries of folders, names of all else).

    It is a DataError if the folder cannot be listed or a link in it leads nowhere: images would be missing in
    silence.
    """
    folders, files = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_folder(entry):
                    folders.append(entry)
                else:
                    files.append(entry.name)
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise
        raise DataError(
            f"cannot follow {error.filename or path} ({error.strerror}): repair or remove it"
        ) from error
    return folders, files


def _is_folder(entry):
    # Whoever reads the image will notice; hidden links are often the locks of editors.
    is_file = is_image(entry.name) or entry.name.startswith(".")
    try:
        if entry.is_dir():
            return True
        if entry.is_symlink() and not is_file:
            entry.stat()
    except OSError:
        if not is_file:
            raise
    return False


def ending(name):
    """The ending of a file name, in lower case, for a count."""
    if os.path.basename(name).startswith("._"):
        return "notes of a Mac (._*)"
    return os.path.splitext(name)[1].lower() or "no ending"


def require_same_classes(here, classes, there, other_classes):
    """Raise a DataError where two sets, named ``here`` and ``there``, have different lists of classes."""
    if other_classes == classes:
        return
    difference = sorted(set(classes) ^ set(other_classes))
    advice = advice_on_look_alikes(difference)
    if advice:
        difference = sorted(map(ascii, difference))
    names = ", ".join(difference[:5])
    listed = f"only one of them has {names}{' ...' if len(difference) > 5 else ''}{advice}"
    raise DataError(
        f"{here} and {there} have different classes ({len(classes)} and {len(other_classes)}): "
        + (listed if difference else "they are in another order")
    )


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
    require_same_classes(folder, classes, other, other_classes)
    dataset = ImageFolder(folder, transform, loader)
    if not dataset.samples:
        raise DataError(f"{folder} has class folders but no images ({', '.join(IMG_EXTENSIONS)})")
    empty = sorted(set(range(len(classes))) - set(dataset.targets))
    if split == "train" and empty:
        raise DataError(
            f"{os.path.join(folder, classes[empty[0]])} holds no images: add some or remove the class"
        )
    return dataset
