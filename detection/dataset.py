"""COCO annotations: read, checked, and turned into boxes, labels and masks."""

import json
import logging
import math
import os

import torch
from pycocotools import mask as coco_mask
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from data.datasets import DataError, load_image


class CocoDataset(Dataset):
    """Images and their objects.

    An item is (image, target): a uint8 image (3, H, W), and a dict of boxes (M, 4) as (x1, y1, x2, y2),
    labels (M,) from 1 and masks (M, H, W), all after ``transform``, image_id, and original_size (H, W) before
    it. Crowds are no objects.

    Args:
        images: folder of the image files.
        annotations: a :class:`Annotations`.
        transform: takes and returns image and target.
    """

    def __init__(self, images, annotations, transform):
        self.annotations, self.transform = annotations, transform
        self.paths = [os.path.join(images, image["file_name"]) for image in annotations.images]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        record, path = self.annotations.images[index], self.paths[index]
        size = (record["height"], record["width"])
        image = load_image(path)
        if image.size != size[::-1]:
            raise DataError(
                f"{path} is {image.width}x{image.height}, but {self.annotations.path} says "
                f"{size[1]}x{size[0]}: correct its width and height"
            )
        truth = self.annotations.truth_of(record)
        target = dict(
            boxes=tv_tensors.BoundingBoxes(truth["boxes"], format="XYXY", canvas_size=size),
            labels=truth["labels"],
            masks=tv_tensors.Mask(truth["masks"]),
        )
        image, target = self.transform(tv_tensors.Image(functional.pil_to_tensor(image)), target)
        return image, dict(target, image_id=record["id"], original_size=size)


class Annotations:
    """What a COCO JSON file says, without the annotations that cannot be right.

    Attributes:
        images: records of the images, in the order of the file.
        categories: records of the categories, by id.
        labels: category id to label, from 1.
        problems: what is wrong with the annotations left out, to their ids.

    Raises:
        DataError: the file is missing, no COCO JSON, or its images contradict each other.
    """

    def __init__(self, path):
        self.path = path
        content = _read_json(path)
        self.images = content["images"]
        self.categories = sorted(content["categories"], key=lambda category: category["id"])
        self.labels = {category["id"]: i + 1 for i, category in enumerate(self.categories)}
        sizes = {}
        for image in self.images:
            if image["id"] in sizes:
                raise DataError(f"{path}: two images have the id {image['id']}: give each its own")
            sizes[image["id"]] = (image["height"], image["width"])
        if not sizes or not self.labels:
            raise DataError(f"{path} lists {'no categories' if sizes else 'no images'}")
        self.problems, by_image = {}, {number: [] for number in sizes}
        for item in content["annotations"]:
            problem = self._problem(item, sizes)
            if problem:
                self.problems.setdefault(problem, []).append(item.get("id", "?"))
            else:
                by_image[item["image_id"]].append(item)
        # As text: every loading worker would end up with a copy of its own of a million dicts.
        self._by_image = {number: json.dumps(items).encode() for number, items in by_image.items()}

    def _problem(self, item, sizes):
        """What is wrong with an annotation, or None."""
        if item.get("image_id") not in sizes:
            return "of an image that is not listed"
        if item.get("category_id") not in self.labels:
            return "of an unknown category"
        box, size = item.get("bbox"), sizes[item["image_id"]]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            return "without a box of four numbers"
        if box[2] <= 0 or box[3] <= 0:
            return "with a box of no area"
        x1, y1, x2, y2 = clipped(box, size)
        if x2 <= x1 or y2 <= y1:
            return "with a box outside the image"
        return self._mask_problem(item.get("segmentation"), size)

    @staticmethod
    def _mask_problem(shape, size):
        if isinstance(shape, dict):
            counts = shape.get("counts")
            if list(shape.get("size", ())) != list(size):
                return "with a mask of another size than the image"
            if isinstance(counts, list) and (
                not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != math.prod(size)
            ):
                return "with a mask that does not fill the image"
            return None if isinstance(counts, (list, str)) else "without a mask"
        if not isinstance(shape, list) or not shape:
            return "without a mask"
        good = all(
            isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and all(map(_is_finite, part))
            for part in shape
        )
        return None if good else "with a polygon of fewer than three points"

    def kept(self):
        """All annotations but those left out, in the order of their images."""
        return [item for items in self._by_image.values() for item in json.loads(items)]

    def objects_of(self, image_id):
        """The annotations of an image that are single objects."""
        return [item for item in json.loads(self._by_image[image_id]) if not item.get("iscrowd")]

    def mask_of(self, item, size):
        """The mask of an annotation: (height, width), 0 and 1, uint8."""
        shape, (height, width) = item["segmentation"], size
        try:
            if isinstance(shape, list):
                shape = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                shape = coco_mask.frPyObjects(shape, height, width)
            return coco_mask.decode(shape)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.path}: annotation {item.get('id')} has no valid mask ({error})"
            ) from error

    def truth_of(self, record):
        """The objects of an image record in its own pixels: boxes (M, 4), labels (M,), masks (M, H, W)."""
        size, objects = (record["height"], record["width"]), self.objects_of(record["id"])
        masks = [torch.from_numpy(self.mask_of(item, size)) for item in objects]
        return dict(
            boxes=torch.tensor(
                [clipped(item["bbox"], size) for item in objects], dtype=torch.float32
            ).reshape(-1, 4),
            labels=torch.tensor([self.labels[item["category_id"]] for item in objects], dtype=torch.int64),
            masks=torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8),
        )

    def report(self):
        """Log what was left out, and how much."""
        logger = logging.getLogger("msg_transformer")
        for problem, ids in self.problems.items():
            some = ", ".join(map(str, ids[:5])) + (" ..." if len(ids) > 5 else "")
            logger.warning(f"{self.path}: leaving out {len(ids)} annotations {problem} (ids {some})")

    def as_coco(self):
        """The content of a COCO file without what was left out."""
        return dict(images=self.images, categories=self.categories, annotations=self.kept())


def clipped(box, size):
    """A box (x, y, width, height) as (x1, y1, x2, y2), cut to an image of size (height, width)."""
    x, y, width, height = box
    x1, x2 = (min(max(value, 0.0), float(size[1])) for value in (x, x + width))
    y1, y2 = (min(max(value, 0.0), float(size[0])) for value in (y, y + height))
    return x1, y1, x2, y2


def _is_finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
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
                    f"{path}: a record of {section!r} has no {', '.join(missing) or 'keys'}: {record}"
                )
    return content


def build_dataset(root, images, annotations, transform, skip):
    """The images of ``root/images`` with the annotations ``root/annotations``.

    Args:
        skip: files may be missing; they are reported when they are read.

    Raises:
        DataError: what is wrong with the files, and what to do.
    """
    annotations = Annotations(os.path.join(root, annotations))
    if all(item.get("iscrowd") for item in annotations.kept()):
        raise DataError(f"{annotations.path} has no objects: its annotations are missing or all left out")
    dataset = CocoDataset(os.path.join(root, images), annotations, transform)
    missing = [path for path in dataset.paths if not os.path.isfile(path)]
    if len(missing) == len(dataset.paths) or (missing and not skip):
        raise DataError(
            f"{len(missing)} of the {len(dataset.paths)} images of {annotations.path} are missing, such as "
            f"{missing[0]}: correct DATA.DATA_PATH or DET.*_IMAGES, or leave them out with DATA.ON_ERROR skip"
        )
    return dataset
