"""Say what is on images: classes of a classifier's checkpoint, or objects of a detector's.

python tools/predict.py <checkpoint> photo.jpg photos/ "more/*.png"
python tools/predict.py <checkpoint> photos/ --csv classes.csv --json classes.json --pictures annotated/

Nothing but images is needed: model, sizes and class names come from the checkpoint. It computes what --eval
of main.py and detect.py does, in the precision of the checkpoint's config, except that photos with an EXIF
orientation are turned upright. The JSON of a detector is a COCO file: images, categories and annotations with
scores.

Exit code: 0; 3 where files were skipped because they cannot be read, which are listed; 1 with an error.
"""

import argparse
import collections
import csv
import glob
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import CHOICES

SKIPPED_EXIT_CODE = 3


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", help="file or https address")
    add("paths", nargs="+", metavar="PATH", help="files, folders, patterns")
    add("--top", type=int, default=5, metavar="K", help="classes of an image; default: 5")
    add("--score", type=float, default=0.5, help="detections below are neither shown nor drawn; default: 0.5")
    add("--csv", metavar="FILE", help="write a table")
    add("--json", metavar="FILE", help="write all results; of a detector, in COCO's format")
    add("--pictures", metavar="DIR", help="write annotated images here")
    add("--batch-size", type=int, default=32, help="images of a classifier at a time; default: 32")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, help=f"processes that read images; default: {workers}")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: cuda where there is one, else cpu")
    runtime = "what computes a classifier; openvino does so in float32; default: pytorch"
    add("--runtime", choices=CHOICES["RUNTIME"], help=runtime)
    add("--cfg", metavar="FILE", help="config of a checkpoint that holds none")
    add("--weights", choices=CHOICES["TEST.WEIGHTS"], default="auto", help="as TEST.WEIGHTS; default: auto")
    args = parser.parse_args()
    for name, least in (("top", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: at least {least}")
    return args


if __name__ == "__main__":  # before what takes seconds to import
    ARGS = parse_args()

import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset

import distributed
from analysis.report import caption, writing
from data.datasets import DataError, find_images, load_image, without_pillows_limit
from data.loaders import start_worker
from data.transforms import image_mode
from detection.detector import build_ready_detector, to_original_size
from detection.evaluation import to_results
from detection.pictures import annotate
from distributed import build_compute
from logger import ProgressBar
from models import build_runtime, inference
from models.from_checkpoint import build_ready, read_described
from utils import UserError


def main(args):
    """Predict, show and write."""
    paths, skipped, ignored = find_files(args.paths)
    drawn = picture_names(paths, args.pictures) if args.pictures else {}
    config, checkpoint = read_described(args.checkpoint, args.cfg, args.weights)
    build, kind = (build_ready_detector, Objects) if config.DATA.DATASET == "coco" else (build_ready, Classes)
    config.defrost()
    config.DEVICE, config.RUNTIME = args.device or "", args.runtime or config.RUNTIME
    if config.RUNTIME != "pytorch" and kind is Objects:
        raise UserError(f"--runtime is for classifiers, and {args.checkpoint} is of a detector: leave it out")
    if config.RUNTIME == "openvino":
        config.AMP_OPT_LEVEL = "O0"
    compute = build_compute(config)
    compute.prepare()
    model, transform, names = build(config, checkpoint, args.checkpoint)
    if names is None:
        print("the checkpoint does not name its classes: they are shown by number")
        names = list(map(str, range(config.MODEL.NUM_CLASSES)))
    model = build_runtime(config, model.to(compute.device), compute)
    task = kind(model, names, compute, args)
    pictures = Pictures(paths, transform, image_mode(config.MODEL.MSG.IN_CHANS), keep=bool(drawn))
    reading = dict(num_workers=args.workers, worker_init_fn=start_worker, collate_fn=list)
    reading.update(generator=torch.Generator())  # of its own: PyTorch's is left alone
    bar = ProgressBar(None, len(paths), unit="image", disable=None, file=sys.stderr, leave=True)
    results = []
    with inference(model, compute.dtype), bar:
        for batch in DataLoader(pictures, min(args.batch_size, task.most_at_once), **reading):
            skipped.update({picture.path: picture.problem for picture in batch if picture.problem})
            seen = [picture for picture in batch if not picture.problem]
            for picture, found in zip(seen, task.predict(seen) if seen else []):
                if drawn:
                    save_picture(task.draw(picture.image, found), drawn[picture.path])
                results.append((picture._replace(inputs=None, image=None), task.plain(found)))
            bar.update(len(batch))
    write(results, skipped, task, args)
    if ignored:
        print("ignored:", ", ".join(f"{what} {number:,}" for what, number in ignored.most_common()))
    if skipped:
        print(f"skipped {len(skipped)} of {len(results) + len(skipped)} files:")
        print(*(f"  {problem}" for problem in skipped.values()), sep="\n")
        sys.exit(SKIPPED_EXIT_CODE)


def write(results, skipped, task, args):
    """Print the table, and write the files that the command line asks for."""
    width = max((len(picture.path) for picture, _ in results), default=0)
    for picture, found in results:
        print(f"{picture.path:{width}}  {task.words(found)}")
    text = dict(mode="w", encoding="utf-8", errors="backslashreplace", newline="")
    if args.csv:
        with writing(args.csv) as temporary, open(temporary, **text) as file:
            csv.writer(file).writerows(task.rows(results))
        print(f"wrote {args.csv}")
    if args.json:
        with writing(args.json) as temporary, open(temporary, **text) as file:
            json.dump(task.content(results, skipped), file, indent=1)
        print(f"wrote {args.json}")
    if args.pictures:
        print(f"wrote {len(results):,} annotated images below {args.pictures}")


class Picture(NamedTuple):
    """An image, or why there is none."""

    path: str
    size: tuple | None = None  # (height, width) in pixels
    inputs: Any = None  # what the transform made of it
    image: Image.Image | None = None  # RGB, where it is kept
    problem: str | None = None  # why it cannot be read


class Pictures(Dataset):
    """The :class:`Picture` of every file of a list, with a problem where the file cannot be read.

    Args:
        mode: Pillow's, in which files are read.
        keep: keep the images themselves, too.
    """

    def __init__(self, paths, transform, mode="RGB", keep=False):
        self.paths, self.transform, self.mode, self.keep = paths, transform, mode, keep

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, place):
        path = self.paths[place]
        try:
            image = load_image(path, mode=self.mode)
        except DataError as error:
            return Picture(path, problem=str(error))
        with without_pillows_limit():
            inputs = self.transform(image)
        size = (image.height, image.width)
        return Picture(path, size, inputs, image.convert("RGB") if self.keep else None)


def find_files(words):
    """The images that a user names: files, folders with images at any depth, or glob patterns.

    Returns:
        Their paths, each once; a dict of those that lead nowhere to the reason; and a Counter of what else is
        in the folders.

    Raises:
        DataError: a folder cannot be listed.
    """
    found, missing, ignored = {}, {}, collections.Counter()
    for word in words:
        matches = [word] if os.path.exists(word) else sorted(glob.glob(word, recursive=True))
        if not matches:
            missing[word] = f"{word}: no such file or folder, and no pattern that fits one"
        for path in matches:
            files = [path]
            if os.path.isdir(path):
                whole = os.path.abspath(path)
                below = find_images(*os.path.split(whole), ignored)
                files = [os.path.join(path, os.path.relpath(file, whole)) for file in below]
            for file in files:
                found.setdefault(os.path.realpath(file), file)
    return list(found.values()), missing, ignored


class Classes:
    """The most likely classes of images: (class, score) from the best down, the scores of all add up to 1."""

    most_at_once = sys.maxsize

    def __init__(self, model, names, compute, args):
        self.model, self.names, self.compute = model, names, compute
        self.top = min(args.top, len(names))

    def predict(self, pictures):
        """The classes of each picture."""
        with self.compute.autocast():
            logits = self.model(torch.stack([picture.inputs for picture in pictures]).to(self.compute.device))
        scores, classes = logits.float().softmax(1).topk(self.top)
        return [list(zip(*both)) for both in zip(classes.tolist(), scores.tolist())]

    def draw(self, image, found):
        """The image with its classes below."""
        return caption(image, [(self.names[number], score) for number, score in found])

    def plain(self, found):
        """What is kept of a picture's result: dicts of class, index and score."""
        return [dict(index=i, score=score, **{"class": self.names[i]}) for i, score in found]

    def words(self, found):
        """A line of the table."""
        return "  ".join(f"{entry['score']:.3f} {entry['class']}" for entry in found)

    def rows(self, results):
        """Of the CSV file: what its columns are, then one for each image."""
        yield ["file", *(f"{what}_{i + 1}" for i in range(self.top) for what in ("class", "score"))]
        for picture, found in results:
            yield [picture.path, *(entry[key] for entry in found for key in ("class", "score"))]

    def content(self, results, skipped):
        """Of the JSON file."""
        found = [dict(file=picture.path, classes=classes) for picture, classes in results]
        return dict(class_names=self.names, predictions=found, skipped=skipped)


class Objects:
    """The objects of images: boxes, masks and scores, in pixels of the image."""

    most_at_once = 1  # the padding of a batch would change what convolutions see at the borders

    def __init__(self, model, names, compute, args):
        self.model, self.names, self.compute, self.score = model, names, compute, args.score
        self.categories = [dict(id=i, name=name) for i, name in enumerate(names, 1)]

    def predict(self, pictures):
        """The objects of a picture, in a list."""
        (picture,) = pictures
        images, sizes = picture.inputs
        with self.compute.autocast():
            (detection,) = self.model(images.to(self.compute.device), sizes)
        return [to_original_size(detection, sizes[0], picture.size)]

    def draw(self, image, found):
        """The image with its objects."""
        sure = found["scores"] >= self.score
        return annotate(image, {name: value[sure] for name, value in found.items()}, self.names)

    def plain(self, found):
        """What is kept of a picture's result: COCO results without the number of the image."""
        return [
            {name: value for name, value in result.items() if name != "image_id"}
            for result in to_results(0, found, self.categories)
        ]

    def words(self, found):
        """A line of the table."""
        sure = [result for result in found if result["score"] >= self.score]
        names = (f"{result['score']:.2f} {self.names[result['category_id'] - 1]}" for result in sure)
        return "  ".join(names) or f"nothing of score {self.score} and more"

    def rows(self, results):
        """Of the CSV file: what its columns are, then one for each object, whose box is in pixels."""
        yield ["file", "class", "score", "x", "y", "width", "height"]
        for picture, found in results:
            for entry in found:
                yield [picture.path, self.names[entry["category_id"] - 1], entry["score"], *entry["bbox"]]

    def content(self, results, skipped):
        """A COCO file; images and objects are numbered from 1."""
        images, objects = [], []
        for number, (picture, found) in enumerate(results, 1):
            height, width = picture.size
            images.append(dict(id=number, file_name=picture.path, height=height, width=width))
            for entry in found:
                area = int(coco_mask.area(entry["segmentation"]))
                objects.append(dict(entry, id=len(objects) + 1, image_id=number, area=area, iscrowd=0))
        content = dict(images=images, categories=self.categories, annotations=objects)
        return dict(content, skipped=skipped)


def picture_names(paths, folder):
    """Where the annotated image of each file goes, by its path: as below the folder that holds all of them.

    Raises:
        UserError: files would be overwritten.
    """
    whole = list(map(os.path.abspath, paths))
    root = os.path.commonpath(map(os.path.dirname, whole)) if whole else ""
    names = [os.path.join(folder, os.path.relpath(path, root)) for path in whole]
    inputs = set(map(os.path.realpath, paths))
    if any(os.path.realpath(name) in inputs for name in names):
        raise UserError(f"--pictures {folder} would overwrite the images: choose another folder")
    return dict(zip(paths, names))


def save_picture(image, name):
    """Write a picture: as JPEG where the file is one, else as PNG."""
    jpeg = name.lower().endswith((".jpg", ".jpeg"))
    name = name if jpeg or name.lower().endswith(".png") else f"{name}.png"
    with writing(name) as temporary:
        image.save(temporary, format="JPEG" if jpeg else "PNG", quality=92)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("msg_transformer").setLevel(logging.INFO)
    smaller = "lower --batch-size, or take --device cpu"
    distributed.run_command(lambda: main(ARGS), smaller, "--workers")
