"""Say what is on images: classes of a classifier's checkpoint, or objects of a detector's.

python tools/predict.py <checkpoint> photo.jpg photos/ "more/*.png" clip.mp4
python tools/predict.py <checkpoint> photos/ --csv classes.csv --json classes.json --pictures annotated/

Nothing but images is needed: model, sizes and class names come from the checkpoint. It computes what --eval
of main.py and detect.py does, in the precision of the checkpoint's config, except that photos with an EXIF
orientation are turned upright. The JSON of a detector is a COCO file: images, categories and annotations with
scores. With --pictures, a video becomes an annotated video (MPEG-4, without sound).

Exit code: 0; 3 where files were skipped because they cannot be read, which are listed; 1 with an error.
"""

import argparse
import csv
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import CHOICES

SKIPPED_EXIT_CODE = 3
SHOWN = 20  # lines of the table, where all of it goes to a file


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", help="file or https address")
    add("paths", nargs="+", metavar="PATH", help="files, folders, patterns, videos")
    add("--top", type=int, default=5, metavar="K", help="classes of an image; default: 5")
    add("--score", type=float, default=0.5, help="detections below are neither shown nor drawn; default: 0.5")
    add("--csv", metavar="FILE", help="write a table")
    add("--json", metavar="FILE", help="write all results; of a detector, in COCO's format")
    add("--pictures", metavar="DIR", help="write annotated images and videos here")
    add("--every", type=int, default=1, metavar="N", help="take every N-th frame of videos; default: 1")
    add("--batch-size", type=int, default=32, help="images of a classifier at a time; default: 32")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, help=f"processes that read images; default: {workers}")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: cuda where there is one, else cpu")
    runtime = "what computes a classifier; onnxruntime and openvino do so in float32; default: pytorch"
    add("--runtime", choices=CHOICES["RUNTIME"], help=runtime)
    add("--cfg", metavar="FILE", help="config of a checkpoint that holds none")
    add("--weights", choices=CHOICES["TEST.WEIGHTS"], default="auto", help="as TEST.WEIGHTS; default: auto")
    add("--class-names", metavar="FILE", help="a name per line, for a checkpoint that names no classes")
    args = parser.parse_args()
    for name, least in (("top", 1), ("every", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: at least {least}")
    return args


if __name__ == "__main__":  # before what takes seconds to import
    ARGS = parse_args()

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

import distributed
from analysis.report import caption, writing
from data.loaders import start_worker
from data.transforms import image_mode
from detection.detector import build_ready_detector, to_original_size
from detection.evaluation import to_results
from detection.pictures import annotate
from distributed import build_compute
from logger import ProgressBar
from models import build_runtime, inference
from models.deploy.files import RUNTIMES
from models.from_checkpoint import build_ready, read_described
from tools.sources import Pictures, find_files, frame_rate
from utils import UserError


def main(args):
    """Predict, show and write."""
    paths, skipped, ignored = find_files(args.paths)
    drawn = picture_names(paths, args.pictures) if args.pictures else None
    config, checkpoint = read_described(args.checkpoint, args.cfg, args.weights)
    build, kind = (build_ready_detector, Objects) if config.DATA.DATASET == "coco" else (build_ready, Classes)
    config.defrost()
    config.DEVICE, config.RUNTIME = args.device or "", args.runtime or config.RUNTIME
    if config.RUNTIME != "pytorch" and kind is Objects:
        raise UserError(f"--runtime is for classifiers, and {args.checkpoint} is of a detector: leave it out")
    if config.RUNTIME in RUNTIMES:
        config.AMP_OPT_LEVEL = "O0"
    compute = build_compute(config)
    compute.prepare()
    model, transform, names = build(config, checkpoint, args.checkpoint)
    names = names_to_show(names, args.class_names, config.MODEL.NUM_CLASSES)
    model = build_runtime(config, model.to(compute.device), compute)
    task = kind(model, names, compute, args)
    mode = image_mode(config.MODEL.MSG.IN_CHANS)
    pictures = Pictures(paths, transform, args.every, keep=drawn is not None, mode=mode)
    results = []
    shown = dict(unit="image", disable=None, file=sys.stderr, leave=True)
    reading = dict(num_workers=args.workers, worker_init_fn=start_worker, collate_fn=list)
    reading.update(generator=torch.Generator())  # of its own: PyTorch's is left alone
    bar = ProgressBar(None, pictures.count(), **shown)
    with inference(model, compute.dtype), bar, Drawings(paths, drawn, args) as drawings:
        for batch in DataLoader(pictures, min(args.batch_size, task.most_at_once), **reading):
            skipped.update({paths[picture.place]: picture.problem for picture in batch if picture.problem})
            seen = [picture for picture in batch if not picture.problem]
            for picture, found in zip(seen, task.predict(seen) if seen else []):
                if drawn:
                    drawings.add(picture, task.draw(picture.image, found))
                results.append((picture._replace(inputs=None, image=None), task.plain(found)))
            bar.update(len(batch))
    results.sort(key=lambda result: (result[0].place, result[0].frame or 0))
    results = [(paths[picture.place], picture, found) for picture, found in results]
    show(results, task, SHOWN if args.csv or args.json else len(results))
    text = dict(mode="w", encoding="utf-8", errors="backslashreplace", newline="")
    if args.csv:
        with writing(args.csv) as temporary, open(temporary, **text) as file:
            csv.writer(file).writerows([["file", "frame", *task.columns()], *task.rows(results)])
    if args.json:
        with writing(args.json) as temporary, open(temporary, **text) as file:
            json.dump(task.content(results, skipped), file, indent=1)
    for path in filter(None, (args.csv, args.json)):
        print(f"wrote {path}")
    drawings.report()
    if ignored:
        print("ignored:", ", ".join(f"{what} {number:,}" for what, number in ignored.most_common()))
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths) + len(skipped.keys() - set(paths))} files:")
        print(*(f"  {problem}" for problem in skipped.values()), sep="\n")
        sys.exit(SKIPPED_EXIT_CODE)


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

    def columns(self):
        """Of the CSV file, after those of the file and frame."""
        return [f"{what}_{i + 1}" for i in range(self.top) for what in ("class", "score")]

    def rows(self, results):
        """Of the CSV file."""
        for path, picture, found in results:
            cells = [entry[key] for entry in found for key in ("class", "score")]
            yield [path, picture.frame, *cells]

    def content(self, results, skipped):
        """Of the JSON file."""
        found = [dict(file=path, frame=picture.frame, classes=classes) for path, picture, classes in results]
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

    def columns(self):
        """Of the CSV file, after those of the file and frame; a box in pixels of the image."""
        return ["class", "score", "x", "y", "width", "height"]

    def rows(self, results):
        """Of the CSV file, one for each object."""
        for path, picture, found in results:
            for entry in found:
                kind = self.names[entry["category_id"] - 1]
                yield [path, picture.frame, kind, entry["score"], *entry["bbox"]]

    def content(self, results, skipped):
        """A COCO file; images and objects are numbered from 1."""
        images, objects = [], []
        for number, (path, picture, found) in enumerate(results, 1):
            size = dict(zip(("height", "width"), picture.size))
            frame = {} if picture.frame is None else dict(frame=picture.frame)
            images.append(dict(id=number, file_name=named(path, picture.frame), **size, **frame))
            for entry in found:
                area = int(coco_mask.area(entry["segmentation"]))
                objects.append(dict(entry, id=len(objects) + 1, image_id=number, area=area, iscrowd=0))
        content = dict(images=images, categories=self.categories, annotations=objects)
        return dict(content, skipped=skipped)


def names_to_show(names, path, count):
    """The names of a checkpoint, or else those in a file, or else numbers from 0.

    Raises:
        UserError: the file cannot be read, or has another number of names.
    """
    if names is not None:
        if path is not None:
            print(f"the checkpoint names its classes: {path} is not needed")
        return names
    if path is None:
        print("the checkpoint does not name its classes: they are shown by number (--class-names FILE)")
        return list(map(str, range(count)))
    try:
        names = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names {path}: {error}") from error
    if len(names) != count:
        raise UserError(f"{path} has {len(names)} lines, and the checkpoint {count} classes")
    return names


def named(path, frame):
    """The name of an image or of a frame."""
    return path if frame is None else f"{path}/{frame:06d}.png"


def show(results, task, most):
    """Print the table."""
    lines = [(named(path, picture.frame), task.words(found)) for path, picture, found in results[:most]]
    width = max([len(name) for name, _ in lines], default=0)
    for name, words in lines:
        print(f"{name:{width}}  {words}")
    if len(results) > most:
        print(f"... and {len(results) - most:,} more")


def picture_names(paths, folder):
    """Where the annotated picture of each file goes, or the pictures of its frames: as below their root.

    Raises:
        UserError: files would be overwritten.
    """
    whole = list(map(os.path.abspath, paths))
    try:
        root = os.path.commonpath(map(os.path.dirname, whole)) if whole else ""
        relative = [os.path.relpath(path, root) for path in whole]
    except ValueError as error:  # two drives
        raise UserError(f"--pictures: {error}; draw them one after another") from error
    names = [os.path.join(folder, name) for name in relative]
    inputs = set(map(os.path.realpath, paths))
    if any(os.path.realpath(name) in inputs for name in names):
        raise UserError(f"--pictures {folder} would overwrite the images: choose another folder")
    return names


class Drawings:
    """Writes annotated images and, frame by frame, annotated videos: context that closes the videos.

    Args:
        paths: of the images and videos.
        names: of what is written for each, see :func:`picture_names`.
        args: of the command line.
    """

    def __init__(self, paths, names, args):
        self.paths, self.names, self.args = paths, names, args
        self.videos, self.images, self.written = {}, 0, []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for video in self.videos.values():
            self._close(*video, whole=kind is None)

    def add(self, picture, image):
        """Write the annotated image of a :class:`~tools.sources.Picture`; frames of a video come in order."""
        name = self.names[picture.place]
        if picture.frame is None:
            save_picture(image, name)
            self.images += 1
            return
        # Each worker reads one file after the other: where one begins another, it is done with the last.
        worker = picture.place % max(1, self.args.workers)
        if worker in self.videos and self.videos[worker][0] != picture.place:
            self._close(*self.videos.pop(worker))
        if worker not in self.videos:
            self.videos[worker] = picture.place, *self._open(picture.place, image.size)
        _, _, writer, size = self.videos[worker]
        frame = cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR)
        writer.write(frame if image.size == size else cv2.resize(frame, size))

    def _open(self, place, size):
        name = self.names[place]
        name = name if name.lower().endswith(".mp4") else f"{name}.mp4"
        try:
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {name}: {error.strerror or error}") from error
        size = tuple(side + side % 2 for side in size)  # the format has no odd sides
        rate = frame_rate(self.paths[place]) / self.args.every
        writer = cv2.VideoWriter(os.fsencode(partly(name)), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        if not writer.isOpened():
            raise UserError(f"cannot write {name}: OpenCV opens no video there for writing")
        return name, writer, size

    def _close(self, place, name, writer, size, whole=True):
        writer.release()
        if whole:
            os.replace(partly(name), name)
            self.written.append((place, name))
        else:
            os.remove(partly(name))

    def report(self):
        """Say where the pictures are."""
        if self.images:
            print(f"wrote {self.images:,} annotated images below {self.args.pictures}")
        for place, name in sorted(self.written):
            print(f"wrote {name}, the annotated {self.paths[place]}")


def partly(name):
    """Where a video is until it is whole, beside its place."""
    return f"{name}.part.mp4"


def save_picture(image, name):
    """Write a picture: as JPEG where the file is one, else as PNG."""
    jpeg = name.lower().endswith((".jpg", ".jpeg"))
    name = name if jpeg or name.lower().endswith(".png") else f"{name}.png"
    with writing(name) as temporary:
        image.save(temporary, format="JPEG" if jpeg else "PNG", **(dict(quality=92) if jpeg else {}))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("msg_transformer").setLevel(logging.INFO)
    smaller = "lower --batch-size, or take --device cpu"
    distributed.run_command(lambda: main(ARGS), smaller, "--workers")
