"""The kinds of ``DATA.DATASET``: folders, tars, WebDataset shards, Hugging Face's and torchvision's datasets.

timm's reader of WebDataset is a stream, which cannot go back to a place. Shards are plain tars, though: an
index of their members, made at the start, gives every image a number, so that shards keep all that folders
of images promise. timm's reader of tars reads every byte at the start and holds an object for each image; the
same index replaces it, with the same classes.
"""

import collections
import concurrent.futures
import functools
import io
import os
import posixpath
import re
import tarfile
from typing import NamedTuple

import numpy as np
from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from distributed import from_rank_0

from .datasets import (
    DataError,
    build_dataset,
    decoding,
    ending,
    is_image,
    load_image,
    read_file,
    report_found,
    without_pillows_limit,
)

# What files of a split may be called; the test set only where there is no other.
NAMES = dict(train=("train", "training"), val=("val", "valid", "validation", "eval", "evaluation", "test"))
MOST_CLASSES = 10**6  # as MODEL.NUM_CLASSES may have
HIDDEN_FOLDER = re.compile(r"(?:[^/]*/)*?\.[^/]*/")  # the first one of a path in a tar


def open_dataset(kind, root, split, transform, loader=load_image):
    """The images of a split: what ``transform`` makes of what ``loader`` makes of them.

    In a process group, all processes must call it. ``kind`` is ``DATA.DATASET``, ``split`` train or val.

    Returns:
        A dataset of (image, class index) that has ``root``, ``classes``, ``paths`` and ``report``.

    Raises:
        DataError: there are no images, or what is there cannot be used.
    """
    if kind == "imagenet":
        return build_dataset(root, split, transform, loader)
    if not os.path.isdir(root):
        remote = "; images are read from local files only: copy them first" if "://" in root else ""
        raise DataError(
            f"{root} is not a folder: --data-path must hold what DATA.DATASET {kind} reads{remote}"
        )
    if kind in ("tar", "wds"):
        archives = find_archives(root, split)
        source = Archives(*from_rank_0(lambda: index_archives(kind, root, archives)))
    elif kind == "hfds":
        source = SavedDataset(root, split)
    else:
        source = TorchvisionDataset(kind, root, split)
    return StoredImages(source, transform, loader)


class StoredImages(Dataset):
    """Images that are not files of their own, used as an ImageFolder is.

    A ``source`` has ``root``, ``classes``, ``targets``, ``paths`` and ``ignored`` as an ImageFolder has them,
    and ``stored``, which returns the bytes of an image file.
    """

    def __init__(self, source, transform, loader):
        self.source, self.transform, self.loader = source, transform, loader
        self.root, self.classes, self.paths = source.root, source.classes, source.paths
        self.targets = np.asarray(source.targets)
        if not len(self.targets):
            raise DataError(f"{self.root} holds no images ({', '.join(IMG_EXTENSIONS)})")
        wrong = np.flatnonzero((self.targets < 0) | (self.targets >= len(self.classes)))
        if len(wrong):
            raise DataError(
                f"{self.paths[wrong[0]]} is of class {self.targets[wrong[0]]}, but there are "
                f"{len(self.classes)} classes, from 0 ({len(wrong):,} images are of none): relabel or remove "
                "it"
            )

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        path = self.paths[index]
        with decoding(path):
            content = self.source.stored(index)
        with without_pillows_limit():  # transforms crop, which Pillow limits too
            return self.transform(self.loader(path, content=content)), int(self.targets[index])

    def report(self):
        """Log what was found and what was ignored."""
        report_found(self, self.source.ignored)


class Archives(NamedTuple):
    """Where the images are in some tars; see :class:`StoredImages`."""

    root: str
    classes: list
    targets: np.ndarray
    paths: list
    ignored: collections.Counter
    archives: list  # paths of the tars
    places: np.ndarray  # (images, 3): number of the tar, first byte, bytes

    def stored(self, index):
        """The bytes of an image."""
        archive, start, size = self.places[index].tolist()
        with open(path := self.archives[archive], "rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise DataError(f"{path} ends before byte {start + size}: it has changed since the start")
        return content


def find_archives(root, split):
    """Paths of the tars of a split: ``train.tar``, ``train/*.tar`` or ``*-train-*.tar``; at least one."""

    def tars_in(folder):
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
        return sorted(os.path.join(folder, name) for name in names if name.lower().endswith(".tar"))

    for name in NAMES[split]:
        whole, folder = os.path.join(root, f"{name}.tar"), os.path.join(root, name)
        if os.path.isfile(whole):
            return [whole]
        if os.path.isdir(folder) and (found := tars_in(folder)):
            return found
    for name in NAMES[split]:
        words = {path: re.findall("[a-z]+", os.path.basename(path).lower()) for path in tars_in(root)}
        if found := [path for path in words if name in words[path]]:
            return found
    raise DataError(f"{root} holds no tars of {split}: {split}.tar, {split}/*.tar or *-{split}-*.tar")


def files_in(path):
    """The files that an unpacked tar would have: ({name: (first byte, bytes)}, Counter).

    The Counter has what is ignored already: all but the last member of a name, and what is no file.

    Raises:
        DataError: the tar is damaged or compressed, or has an image that is a link or sparse.
    """
    files, links, ignored = {}, set(), collections.Counter()
    for member in members_of(path):
        # Below the current folder, as tar unpacks it.
        name = re.sub(r"^/*(\.\./)*", "", posixpath.normpath(member.name))
        if member.isdir():
            continue
        if files.pop(name, None) or name in links:
            ignored["members that a later one replaces"] += 1
            links.discard(name)
        if member.isfile() and not member.issparse():
            files[name] = member.offset_data, member.size
        elif is_image(name) and not HIDDEN_FOLDER.match(name):
            links.add(name)
        else:
            ignored[ending(name)] += 1
    if links:
        raise DataError(
            f"{path} has {min(links)} as a link or a sparse file: make the tar with --dereference and "
            "--hard-dereference, and without --sparse"
        )
    return files, ignored


def members_of(path):
    """Yield the members of a tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            last = -1
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep all of them
                if member.offset <= last:  # of a false size, tarfile might go round in circles
                    raise tarfile.ReadError("a member begins before the one that precedes it")
                last = member.offset
                yield member
    # A damaged file can raise nearly anything.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} cannot be read as an uncompressed tar ({reason}): repair or remove it"
        ) from error


def index_archives(kind, root, archives):
    """The values of an :class:`Archives` of tars or, with the kind ``wds``, of WebDataset shards.

    Images of tars have the order of an ImageFolder of the same images, those of shards their own. Without
    ``classnames.txt`` in ``root``, which names one a line, the classes of shards are called by their numbers.

    Raises:
        DataError: a tar cannot be read, the only tar has no class folders, or an image of a shard no class.
    """
    is_only = len(archives) == 1
    index = functools.partial(index_folders, is_only=is_only) if kind == "tar" else index_samples
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # network drives take their time to answer
        indices = list(pool.map(index, archives))
    images, ignored = [], collections.Counter()
    for number, (found, others) in enumerate(indices):
        ignored.update(others)
        images += [(label, name, number, *place) for label, name, place in found]
    if kind == "tar":
        if not images and ignored["images outside the class folders"]:
            raise DataError(f"{archives[0]} has no class folders: images belong in <class>/<image>")
        images.sort(key=lambda image: (image[0], *posixpath.split(image[1]), image[2]))
    labels, names, numbers, starts, sizes = zip(*images) if images else [()] * 5
    if kind == "tar":
        classes, labels = np.unique(np.array(labels, dtype=object), return_inverse=True)
    else:
        classes = _names_of_classes(root) or map(str, range(max(labels, default=-1) + 1))
    paths = [os.path.join(archives[number], name) for number, name in zip(numbers, names)]
    places = np.array([numbers, starts, sizes], dtype=np.int64).T
    where = archives[0]
    if not is_only:
        where += f" to {os.path.basename(archives[-1])} ({len(archives):,} tars)"
    return where, list(classes), np.array(labels), paths, ignored, archives, places


def index_folders(path, is_only):
    """The images of a tar that has class folders: ([(class, name in the tar, (first byte, bytes))], Counter).

    As in timm, the class of an image is the folder that holds it, or its tar where it is in no folder, unless
    that is the only one. Hidden folders are left out. The Counter has what is ignored.
    """
    found, hidden = [], set()
    files, ignored = files_in(path)
    for name, place in files.items():
        folder = posixpath.dirname(name)
        if inside := HIDDEN_FOLDER.match(name):
            hidden.add(inside[0])
        elif ending(name) == ".tar":
            raise DataError(
                f"{path} has the tar {name}: unpack {os.path.basename(path)} into a folder of tars"
            )
        elif not is_image(name):
            ignored[ending(name)] += 1
        elif not folder and is_only:
            ignored["images outside the class folders"] += 1
        else:
            of_tar = os.path.splitext(os.path.basename(path))[0]
            found.append((posixpath.basename(folder) or of_tar, name, place))
    ignored.update(["hidden folders"] * len(hidden))
    return found, ignored


def index_samples(path):
    """The images of a WebDataset shard, as :func:`index_folders` returns them, with an index for the class.

    Files of the same name up to its first dot are a sample: an image, and its class index in ``.cls``.
    """
    images, labels = {}, {}
    files, ignored = files_in(path)
    with open(path, "rb") as tar:
        for name, (start, size) in files.items():
            match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name, re.DOTALL)
            key, kind = match.groups() if match and not HIDDEN_FOLDER.match(name) else (name, "")
            if f".{kind.lower()}" in IMG_EXTENSIONS:
                if key in images:
                    raise DataError(f"{path} has two images of the name {key}: keep one")
                images[key] = name, (start, size)
            elif kind == "cls":
                tar.seek(start)
                labels[key] = _label(tar.read(min(size, 20)), f"{path}/{key}.cls")
            else:
                ignored[ending(name)] += 1
    if missing := next((key for key in images if key not in labels), None):
        raise DataError(f"{path} has no {missing}.cls, which would hold the class index of its image")
    return [(labels[key], *image) for key, image in images.items()], ignored


def _label(content, where):
    text = content.decode("latin-1").strip()
    if not (text.isascii() and text.isdigit()) or int(text) >= MOST_CLASSES:
        raise DataError(
            f"{where} holds {text!r}, but must hold a class index, from 0 and below {MOST_CLASSES}"
        )
    return int(text)


def _names_of_classes(root):
    path = os.path.join(root, "classnames.txt")
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file.read().splitlines()]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): it must name the classes, one a line") from error
    if "" in names or len(set(names)) < len(names):
        raise DataError(f"{path} has an empty line or a name twice: it must name the classes, one a line")
    return names


class SavedDataset:
    """A split of a Hugging Face dataset that ``save_to_disk`` wrote; see :class:`StoredImages`."""

    def __init__(self, root, split):
        try:
            from datasets import ClassLabel, Image, disable_progress_bars, load_from_disk
        except ImportError as error:
            raise DataError(
                f"DATA.DATASET hfds needs Hugging Face's package ({error}): pip install datasets"
            ) from error
        folders = [os.path.join(root, name) for name in NAMES[split]]
        self.root = next((path for path in folders if os.path.isfile(os.path.join(path, "state.json"))), None)
        if self.root is None:
            raise DataError(f"{root} holds no {split} that save_to_disk of Hugging Face's datasets wrote")
        disable_progress_bars()
        try:
            saved = load_from_disk(self.root).with_format(None)
            image, label = _column(saved, Image, "image"), _column(saved, ClassLabel, "label")
            targets = saved.select_columns([label])[:][label]
            self.data = saved.select_columns([image]).cast_column(image, Image(decode=False))
        except DataError:
            raise
        # A damaged dataset can raise nearly anything.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise DataError(f"{self.root} cannot be read as a Hugging Face dataset ({reason})") from error
        self.image, self.classes = image, list(saved.features[label].names)
        self.targets = [-1 if target is None else target for target in targets]
        self.paths, self.ignored = _numbered(self.root, len(self.targets)), collections.Counter()

    def stored(self, index):
        """The bytes of an image."""
        image = self.data[index][self.image]
        return read_file(image["path"]) if image["bytes"] is None else image["bytes"]


def _numbered(root, count):
    """Names of images that have none: what holds them, and their place in it."""
    return [f"{root}, image {index}" for index in range(count)]


def _column(saved, kind, name):
    """The column of a kind, the one of that name where there are several."""
    found = [column for column, feature in saved.features.items() if isinstance(feature, kind)]
    if len(found) != 1 and name not in found:
        listed = ", ".join(found) or f"only {', '.join(saved.features)}"
        raise DataError(
            f"a Hugging Face dataset must have one column of {kind.__name__}, or one that is called {name}, "
            f"but it has {listed}: cast_column, rename_column and save_to_disk make one that has"
        )
    return name if name in found else found[0]


class TorchvisionDataset:
    """A split of a dataset that torchvision holds in memory, read by timm; see :class:`StoredImages`."""

    def __init__(self, kind, root, split):
        try:
            self.data = create_dataset(kind, root, split, download=False)
        # A damaged file can raise nearly anything.
        except Exception as error:
            reason = (str(error) or type(error).__name__).split(". You can use")[0]
            name = kind.removeprefix("torch/")
            make = "FashionMNIST" if name == "fashion_mnist" else name.upper()
            raise DataError(
                f'{root} does not hold the files of {kind} ({reason}): python -c "from torchvision import '
                f'datasets; datasets.{make}({root!r}, download=True)" fetches them'
            ) from error
        self.root, self.classes = f"{root}, {split} of {kind}", list(self.data.classes)
        targets = np.asarray(self.data.targets)
        self.targets = targets.reshape(len(targets), -1)[:, 0]  # of QMNIST, the class and how it came about
        if len(self.targets) != len(self.data):
            raise DataError(f"{self.root} has {len(self.data)} images, but labels of {len(self.targets)}")
        self.paths, self.ignored = _numbered(self.root, len(self.targets)), collections.Counter()

    def stored(self, index):
        """An image as the bytes of a file, which Pillow reads without a change."""
        file = io.BytesIO()
        self.data[index][0].save(file, "PPM")
        return file.getvalue()
