"""COCO annotations: read, checked, and turned into boxes, labels and masks."""

import contextlib
import json
import logging
import math
import os

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import Dataset

from data.datasets import DataError, load_image

from .evaluation import COCO_PER_IMAGE

logger = logging.getLogger("msg_transformer")
# In pixels: the side of an image, and the outline of a polygon.
_LONGEST = 1_000_000
# In pixels: images with a shorter side are not trained on.
_SHORTEST = 32
# Shares of a set: crowds above the first are told as a warning; whole sets are refused above the second.
_MANY, _MOST = 0.1, 0.5
_NORMALISED = "with a box between 0 and 1", "with a mask between 0 and 1"
_CROWDS = "crowds"
_TINY = "objects with a box below a pixel on a side, or a mask without a pixel"


class CocoDataset(Dataset):
    """Images and their objects.

    An item is (image, target): a uint8 image (3, H, W), and a dict of boxes (M, 4) as (x1, y1, x2, y2),
    labels (M,) from 1 and masks (M, H, W), all after ``transform``, image_id, and original_size (H, W) before
    it. Crowds do not count as objects. With ``per_image``, only the last two. ``records`` and ``paths``
    are the image record of each item, and its file.

    Args:
        images: folder of the image files.
        annotations: a :class:`Annotations`.
        transform: a :class:`~detection.transforms.Transform`.
        is_train: leave out images without objects or with a side below 32 pixels, as mmdet does.
        read: see :func:`read_annotated`; returns what ``transform`` takes.
        per_image: detections of an image that evaluation looks at, which needs no objects; the log says where
            they are too few.
    """

    def __init__(self, images, annotations, transform, is_train=False, read=load_image, per_image=None):
        self.annotations, self.transform, self.read = annotations, transform, read
        self.per_image = per_image
        self.records = annotations.images
        if is_train:
            self.records = [record for record in self.records if self._has_objects(record)]
        self.paths = [os.path.join(images, record["file_name"]) for record in self.records]

    def _has_objects(self, record):
        small = min(record["height"], record["width"]) < _SHORTEST
        return not small and bool(self.annotations.objects_in[record["id"]])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        record, path = self.records[index], self.paths[index]
        size = (record["height"], record["width"])
        image = read_annotated(self.read, path, size)
        if image.size != size[::-1]:
            raise DataError(
                f"{path} is {image.size[0]}x{image.size[1]}, but {self.annotations.path} says "
                f"{size[1]}x{size[0]}: correct its width and height"
            )
        objects = self.annotations.coded(record) if self.per_image is None else {}
        image, target = self.transform(image, objects)
        return image, dict(target, image_id=record["id"], original_size=size)

    def report(self):
        """Log what was found, what was left out, and which limits differ from COCO's or are too low."""
        objects_in = self.annotations.objects_in
        self.annotations.report()
        kept = {record["id"] for record in self.records}
        left_out = [record for record in self.annotations.images if record["id"] not in kept]
        if left_out:
            small = [record for record in left_out if objects_in[record["id"]]]
            objects = sum(objects_in[record["id"]] for record in small)
            of_them = f", such as {small[0]['file_name'][:100]}" if small else ""
            logger.info(
                f"{self.annotations.path}: not training on {len(left_out):,} images: "
                f"{len(left_out) - len(small):,} without objects, {len(small):,} with {objects:,} objects "
                f"and a side below {_SHORTEST} pixels{of_them}"
            )
        if self.per_image is None:
            return
        if self.per_image > COCO_PER_IMAGE:
            logger.info(
                f"AP counts up to {self.per_image} detections of an image, as DET.PER_IMAGE says; COCO's own "
                f"figures count {COCO_PER_IMAGE}"
            )
        full = [record for record in self.records if objects_in[record["id"]] > self.per_image]
        if full:
            logger.warning(
                f"{self.annotations.path}: {len(full):,} images have more objects than DET.PER_IMAGE "
                f"{self.per_image}, such as {full[0]['file_name'][:100]} with "
                f"{objects_in[full[0]['id']]:,}: raise it, or they cannot all be found"
            )


def read_annotated(read, path, size):
    """An image in the pixels that its annotations are in.

    Where it is as large as annotated only with its sides exchanged, EXIF orientations from 5 to 8 may be why:
    then it is turned as they say, or left as stored, whichever fits, and whatever ``read`` does by itself.

    ``read`` is :func:`~data.datasets.load_image`, or anything that takes a path and ``turn``, and returns
    what has a ``size``, (width, height). ``size`` is (height, width), as annotated.
    """
    image = read(path)
    if image.size == tuple(size) != image.size[::-1]:
        for turn in (True, False):
            other = read(path, turn=turn)
            if other.size != image.size:
                return other
    return image


class Annotations:
    """What a COCO JSON file says, without the annotations that cannot be right.

    Attributes:
        images: records of the images, in the order of the file.
        categories: records of the categories, by id.
        labels: category id to label, from 1.
        problems: what is wrong with the annotations left out, to their ids.
        notes: what else is told of annotations (crowds, parts left out, objects below a pixel), likewise.
        objects_in: image id to the number of its objects, crowds apart.

    Raises:
        DataError: the file is missing, no COCO JSON, its images contradict each other, or most of its boxes
            are not in pixels or not (x, y, width, height).
    """

    def __init__(self, path):
        self.path = path
        content = _read_json(path)
        self.images = content["images"]
        self.categories = sorted(content["categories"], key=lambda category: category["id"])
        self.categories = [dict(record, name=_text(record["name"])) for record in self.categories]
        self.labels = {category["id"]: i + 1 for i, category in enumerate(self.categories)}
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
        if not sizes or not self.labels:
            raise DataError(f"{path} lists {'no categories' if sizes else 'no images'}")
        self.problems, self.notes, self._first = {}, {}, {}
        self._names = {image["id"]: image["file_name"] for image in self.images}
        by_image, self._corners, self._compared = {number: [] for number in sizes}, {}, 0
        for item in content["annotations"]:
            item = _with_numbers(item, sizes, self.labels)
            problem = self._problem(item, sizes)
            if problem:
                self._note(self.problems, problem, item)
            else:
                by_image[item["image_id"]].append(item)
                if item.get("iscrowd"):
                    self._note(self.notes, _CROWDS, item)
        self.objects_in = {
            number: sum(not item.get("iscrowd") for item in items) for number, items in by_image.items()
        }
        self._refuse_other_boxes(len(content["annotations"]))
        del self._names, self._corners  # every worker would have them, too
        # As text: every loading worker would end up with a copy of its own of a million dicts.
        self._by_image = {number: json.dumps(items).encode() for number, items in by_image.items()}

    def _note(self, notes, reason, item):
        """Count an annotation under a reason, and keep the image of the first."""
        notes.setdefault(reason, []).append(item.get("id", "?"))
        image = item.get("image_id")
        self._first.setdefault(reason, self._names[image] if _is_one_of(image, self._names) else image)

    def example(self, reason, ids):
        """The first annotations noted under a reason, in words."""
        some = ", ".join(str(number)[:20] for number in ids[:5]) + (" ..." if len(ids) > 5 else "")
        return f"ids {some}; the first is of {str(self._first[reason])[:100]}"

    def reasons(self):
        """Why annotations are not trained on, in words."""
        found = [*self.problems.items(), *self.notes.items()]
        return [f"{len(ids):,} {reason} ({self.example(reason, ids)})" for reason, ids in found]

    def _refuse_other_boxes(self, total):
        """Raise a DataError where most boxes are shares of the image, or most are (x1, y1, x2, y2)."""
        shares = {problem: ids for problem, ids in self.problems.items() if problem in _NORMALISED}
        for problem, ids in shares.items():
            if sum(map(len, shares.values())) > _MOST * total:
                raise DataError(
                    f"{self.path}: {len(ids):,} of {total:,} annotations come {problem} "
                    f"({self.example(problem, ids)}), but COCO counts in pixels: multiply x by the width of "
                    "the image and y by its height"
                )
        for reason, ids in self._corners.items():
            if len(ids) > _MOST * self._compared:
                raise DataError(
                    f"{self.path}: {len(ids):,} of {total:,} boxes fit their masks as {reason} "
                    f"({self.example(reason, ids)}), but COCO's are [x, y, width, height]: write "
                    "[x1, y1, x2 - x1, y2 - y1]"
                )

    def _problem(self, item, sizes):
        """What is wrong with an annotation, or None."""
        if not _is_one_of(item.get("image_id"), sizes):
            return "of an image that is not listed"
        if not _is_one_of(item.get("category_id"), self.labels):
            return "of an unknown category"
        box, size = item.get("bbox"), sizes[item["image_id"]]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return "without a box of four numbers"
        if box[2] <= 0 or box[3] <= 0:
            return "with a box of no area"
        if max(box) <= 1 and min(box[2:]) < 1:
            return _NORMALISED[0]
        x1, y1, x2, y2 = clipped(box, size)
        if x2 <= x1 or y2 <= y1:
            return "with a box outside the image"
        if item.get("iscrowd", 0) not in (0, 1):
            return "with an iscrowd other than 0 and 1"
        if not _is_number(item.get("area", 0)) or item.get("area", 0) < 0:
            return "with an area that is no number"
        return self._mask_problem(item, size) or self._mismatch(item, size)

    def _mask_problem(self, item, size):
        """What is wrong with a mask, or None; of its polygons, those that are wrong are taken out."""
        shape = item.get("segmentation")
        if isinstance(shape, dict):
            counts = shape.get("counts")
            if not isinstance(counts, (list, str)):
                return "without a mask"
            if not _is_size(shape.get("size")) or tuple(shape["size"]) != size:
                return "with a mask of another size than the image"
            runs = runs_of(counts) if isinstance(counts, str) else counts
            if not all(isinstance(n, int) and n >= 0 for n in runs) or sum(runs) != math.prod(size):
                return "with a mask that does not fill the image"
            return None
        if not isinstance(shape, list) or not shape:
            return "without a mask"
        problems = list(map(_part_problem, shape))
        if all(problems):
            return problems[0]
        for problem in filter(None, problems):
            self._note(self.notes, f"parts of masks: {problem.removeprefix('with ')}", item)
        item["segmentation"] = [part for part, problem in zip(shape, problems) if not problem]
        return None

    def _mismatch(self, item, size):
        """How a mask contradicts its box, or None; notes boxes that fit as corners, and what is tiny."""
        (x, y, width, height), shape = item["bbox"], item["segmentation"]
        bounds = _bounds(item, size)
        if bounds is not None:
            if isinstance(shape, list) and max(bounds) <= 1 and max(width, height) > 2:
                return _NORMALISED[1]
            box = x, y, x + width, y + height
            if any(min(bounds[i + 2], box[i + 2]) < max(bounds[i], box[i]) for i in (0, 1)):
                return "with a mask outside its box"
            as_box, as_corners = (
                sum(abs(there - here) for there, here in zip(bounds, corners))
                for corners in (box, item["bbox"])
            )
            self._compared += as_box != as_corners
            if as_corners < as_box:
                self._note(self._corners, "[x1, y1, x2, y2]", item)
        if not item.get("iscrowd") and (min(width, height) < 1 or _is_without_pixel(item, size, bounds)):
            self._note(self.notes, _TINY, item)
        return None

    def kept(self):
        """All annotations but those left out, in the order of their images."""
        return [item for items in self._by_image.values() for item in json.loads(items)]

    def coded(self, record, most=None):
        """The objects of an image record, or the first ``most``, in its own pixels.

        A dict of boxes (M, 4), labels (M,) and masks, a list of pycocotools' run lengths.
        """
        size = record["height"], record["width"]
        items = json.loads(self._by_image[record["id"]])
        objects = [item for item in items if not item.get("iscrowd")][:most]
        boxes = [clipped(item["bbox"], size) for item in objects]
        return dict(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([self.labels[item["category_id"]] for item in objects], dtype=torch.int64),
            masks=[code_of(item, size) for item in objects],
        )

    def truth_of(self, record, most=None):
        """:meth:`coded` with masks (M, H, W), uint8, 0 and 1."""
        truth = self.coded(record, most)
        masks = torch.zeros(len(truth["masks"]), record["height"], record["width"], dtype=torch.uint8)
        for place, code in zip(masks, truth["masks"]):
            place.copy_(torch.from_numpy(coco_mask.decode(code)))
        return dict(truth, masks=masks)

    def report(self):
        """Log what was found, and what was left out: how much, why, and an example."""
        objects = list(self.objects_in.values())
        logger.info(
            f"{self.path}: {len(self.images):,} images, {objects.count(0):,} of them without objects; "
            f"{sum(objects):,} objects in {len(self.categories):,} categories"
        )
        for problem, ids in self.problems.items():
            logger.warning(
                f"{self.path}: leaving out {len(ids):,} annotations {problem} ({self.example(problem, ids)})"
            )
        for reason, ids in self.notes.items():
            what, level = f"{len(ids):,} {reason} ({self.example(reason, ids)})", logging.WARNING
            if reason == _CROWDS:
                many = len(ids) > _MANY * (len(ids) + sum(objects))
                level = logging.WARNING if many else logging.INFO
                what += ", which are not trained on, and count neither for nor against in evaluation"
                what += ": set iscrowd to 0 where they are single objects" if many else ""
            elif reason == _TINY:
                what += ": evaluation counts them, training leaves out those that resizing does not enlarge"
            else:
                what = f"leaving out {what}"
            logger.log(level, f"{self.path}: {what}")

    def as_coco(self):
        """The content of a COCO file without what was left out."""
        return dict(images=self.images, categories=self.categories, annotations=self.kept())


def code_of(item, size):
    """The mask of an annotation, for an image of (height, width), in pycocotools' run lengths."""
    shape, (height, width) = item["segmentation"], size
    if isinstance(shape, list):
        return coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    return coco_mask.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape


def _bounds(item, size):
    """(x1, y1, x2, y2) of a mask; None where it has no pixel."""
    shape = item["segmentation"]
    if isinstance(shape, list):
        xs, ys = ([value for part in shape for value in part[i::2]] for i in (0, 1))
        return min(xs), min(ys), max(xs), max(ys)
    x, y, width, height = coco_mask.toBbox(code_of(item, size)).tolist()
    return (x, y, x + width, y + height) if width and height else None


def _is_without_pixel(item, size, bounds):
    if bounds is None or min(bounds[2] - bounds[0], bounds[3] - bounds[1]) >= 2:  # spares the drawing
        return bounds is None
    return not coco_mask.area(code_of(item, size))


def clipped(box, size):
    """A box (x, y, width, height) as (x1, y1, x2, y2), cut to an image of size (height, width)."""
    x, y, width, height = box
    x1, x2 = (min(max(value, 0.0), float(size[1])) for value in (x, x + width))
    y1, y2 = (min(max(value, 0.0), float(size[0])) for value in (y, y + height))
    return x1, y1, x2, y2


def runs_of(text):
    """The run lengths in pycocotools' compressed text; one of -1 if the text is none.

    pycocotools itself reads and writes wherever damaged text leads it.
    """
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    goes_on = codes & 32 > 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or goes_on[-1]:
        return [-1]
    # A number is written in 5 bits at a time, the lowest first; the 6th says that it goes on.
    last = np.flatnonzero(~goes_on)
    first = np.append(0, last[:-1] + 1)
    length = last - first + 1
    if length.max() > 6:
        return [-1]
    bits = (codes & 31) << 5 * (np.arange(len(codes)) - np.repeat(first, length))
    runs = np.add.reduceat(bits, first) - ((codes[last] & 16 > 0).astype(np.int64) << 5 * length)
    # From the fourth on, numbers are differences to the run before the last.
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs.tolist()


def _part_problem(part):
    """What is wrong with a polygon of a mask, or None."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2 or not all(map(_is_number, part)):
        return "with a polygon of fewer than three points"
    return None if _is_drawable(part) else "with a polygon far larger than an image"


def _is_drawable(polygon):
    """Whether pycocotools can draw a polygon (x, y, x, y, ...): for others it writes beyond its memory."""
    low, high = min(polygon), max(polygon)
    if low < -_LONGEST or high > _LONGEST:
        return False
    if len(polygon) / 2 * (high - low) <= _LONGEST:  # then its outline is shorter, too
        return True
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return abs(points - np.roll(points, 1, axis=0)).max(1).sum() <= _LONGEST


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 2**53


def _number(value):
    """A number that is written as text as a number; anything else as it is."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _with_numbers(item, *known):
    """An annotation without what is null, and with numbers in place of numbers written as text.

    ``known`` are the ids of images and of categories, which may themselves be text.
    """
    item = {key: value for key, value in item.items() if value is not None}
    for key, ids in zip(("image_id", "category_id"), known):
        value = item.get(key)
        if type(value) in (int, str) and value not in ids:
            item[key] = next((other for other in (_number(value), str(value)) if other in ids), value)
    for key in ("area", "iscrowd"):
        if key in item:
            item[key] = _number(item[key])
    box, shape = item.get("bbox"), item.get("segmentation")
    if isinstance(box, list):
        item["bbox"] = list(map(_number, box))
    if isinstance(shape, list):
        item["segmentation"] = [
            list(map(_number, part)) if isinstance(part, list) and part and type(part[0]) is str else part
            for part in shape
        ]
    return item


def _is_size(value):
    return isinstance(value, list) and all(type(side) is int for side in value)


def _is_one_of(value, known):
    return type(value) in (int, float, str) and value in known


def _text(name):
    """A category's name as text that can be written and drawn."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _read_json(path):
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait forever
        raise DataError(f"cannot read the annotations {path}: it is not a file")
    try:
        with open(path, "rb") as file:  # of bytes, json tells the encoding and a byte order mark
            content = json.load(file)
    except OSError as error:
        raise DataError(f"cannot read the annotations {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    needed = dict(images=("id", "file_name", "height", "width"), categories=("id", "name"), annotations=())
    for section, keys in needed.items():
        records = content.get(section) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise DataError(f"{path} is no COCO file: it has no list {section!r}")
        for record in records:
            missing = [key for key in keys if not isinstance(record, dict) or key not in record]
            if missing or not isinstance(record, dict):
                raise DataError(
                    f"{path}: a record of {section!r} has no {', '.join(missing) or 'keys'}: "
                    f"{str(record)[:200]}"
                )
        if "id" in keys:
            _check_ids(path, section, [record["id"] for record in records])
    for record in content["images"]:
        sides = [record["height"], record["width"]]
        if not _is_size(sides) or min(sides) < 1 or max(sides) > _LONGEST or math.prod(sides) >= 2**29:
            wrong = f"height and width {sides}"
        elif not isinstance(record["file_name"], str):
            wrong = f"file_name {record['file_name']}"
        else:
            continue
        raise DataError(f"{path}: image {record['id']} has the {wrong[:200]}: correct or remove it")
    return content


def _check_ids(path, section, ids):
    kind = str if ids and isinstance(ids[0], str) else int
    known = set()
    for number in ids:
        if type(number) is not kind or kind is int and abs(number) >= 2**63:
            raise DataError(
                f"{path}: a record of {section!r} has the id {str(number)[:200]!r}: use whole numbers"
            )
        if number in known:
            raise DataError(f"{path}: two records of {section!r} have the id {number}: give each its own")
        known.add(number)


def build_detection_dataset(root, images, annotations, transform, skip, **options):
    """The images of ``root/images`` with the annotations ``root/annotations``.

    The other arguments are those of :class:`CocoDataset`. With ``skip``, files may be missing; they are
    reported when they are read.

    Raises:
        DataError: what is wrong with the files, and what to do.
    """
    annotations = Annotations(os.path.join(root, annotations))
    if not any(annotations.objects_in.values()):
        why = "; ".join(annotations.reasons()[:3]) or "its list of annotations is empty"
        raise DataError(
            f"{annotations.path} has no objects: {why}; docs/detection.md says what an object needs"
        )
    dataset = CocoDataset(os.path.join(root, images), annotations, transform, **options)
    if not len(dataset):
        raise DataError(f"{annotations.path}: every image with objects has a side below {_SHORTEST} pixels")
    missing = [path for path in dataset.paths if not os.path.isfile(path)]
    if len(missing) == len(dataset.paths) or (missing and not skip):
        raise DataError(
            f"{len(missing)} of the {len(dataset.paths)} images of {annotations.path} are missing, such as "
            f"{missing[0]}: correct DATA.DATA_PATH or DET.*_IMAGES, or leave them out with DATA.ON_ERROR skip"
        )
    return dataset
