"""Time the input pipelines against timm's or torchvision's, from JPEG files to normalised batches.

python tools/benchmark_data.py <folder>                      any folder with JPEG images, at any depth
python tools/benchmark_data.py --coco <folder>               detection, a folder as detect.py takes it

What is timed is a loader with one worker process, in images/s of one core. The ratios compare with timm's
create_transform, which uses Pillow; ours runs with each DATA.BACKEND. What opencv leaves to the device,
normalising and erasing, the main process does meanwhile; "opencv for a GPU" stops at the batches that a GPU
would receive. Decoding alone says what no pipeline can beat, and decoding to an eighth of the sides what the
Huffman code takes of that, which a part of an image needs as well, down to its last row. A turn
reads all of the images once.

Detection compares with the transforms of torchvision's references/detection (multiscale, --use-v2) on its
CocoDetection, with images of Pillow, as by default, or tensors; its model's normalising and padding are done
by the main process, as ours are. Ours leaves out the crops, DET.CROP_SIZES, which torchvision does not make.
"""

import argparse
import contextlib
import io
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchmarking
import tables

from utils import check_environment

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = CONFIGS / "msg_tiny_p4_win7_224.yaml"
COCO_CONFIG = CONFIGS / "coco" / "cascade_mask_rcnn_msg_tiny_3x.yaml"
PEER, COCO_PEER, COCO_PEER_OF_TENSORS = "timm", "torchvision", "torchvision, tensors"


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", nargs="?", help="folder with JPEG images, at any depth")
    add("--coco", metavar="FOLDER", help="detection, on data in COCO format")
    add("--images", type=int, default=200, help="read the first so many, in the order of paths or records")
    add("--batch-size", type=int, help="default: 32, and 2 for detection")
    add("--rounds", type=int, default=9)
    benchmarking.add_arguments(parser, "input")
    args = parser.parse_args()
    if bool(args.folder) == bool(args.coco):
        parser.error("give a folder with JPEG images, or --coco and a folder with data in COCO format")
    args.batch_size = args.batch_size or (2 if args.coco else 32)
    return args


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    parse_args()

import cv2
import PIL
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from config import get_config
from data.datasets import EvaluationSamples, TrainingSamples
from data.loaders import Loader, ToDevice, build_reader, collate, start_worker
from data.mixup import build_augmentation
from data.opencv.transforms import ImageFile
from data.transforms import augment_operations, posterize_from_0_bits
from detection.loaders import build_detection_loaders, collate_detection
from tools.roofline import machine, versions
from utils import UserError


def find_jpegs(folder, count):
    """The first ``count`` JPEG files below a folder.

    Raises:
        UserError: there are none.
    """
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"{folder} holds no JPEG images (.jpg, .jpeg), at any depth")
    return paths[:count]


def peer_transform(is_train):
    """The recipe of configs/ as timm builds it, but posterizing to 0 bits, which Pillow refuses, works."""
    recipe = dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", color_jitter=0.4)
    transform = create_transform(
        224, is_training=is_train, interpolation="bicubic", crop_pct=224 / 256, **recipe if is_train else {}
    )
    for operation in (op for step in transform.transforms for op in augment_operations(step)):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize_from_0_bits
    return transform


class Files(Dataset):
    """Images of files, with class 0: ``transform`` of what ``read`` makes of a path."""

    def __init__(self, paths, read, transform):
        self.paths, self.read, self.transform = paths, read, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(self.read(self.paths[index])), 0


def pipeline(name, is_train, paths, batch_size):
    """A function that makes batches of all files once, the way of a candidate."""
    workers = dict(num_workers=1, persistent_workers=True)
    if name == PEER:
        files = Files(paths, read_with_pillow, peer_transform(is_train))
        loader = DataLoader(files, batch_size, **workers)
        return lambda: list(map(len, loader))
    backend, _, for_gpu = name.partition(" ")
    options = ["DATA.BACKEND", backend, "AUG.MIXUP", "0", "AUG.CUTMIX", "0"]
    config = get_config(argparse.Namespace(cfg=str(CONFIG), opts=options))
    files = Files(paths, *build_reader(config, is_train))
    samples = TrainingSamples(files, 0, skip=False) if is_train else EvaluationSamples(files, skip=False)
    order = [(0, index) for index in range(len(paths))] if is_train else None
    options = dict(workers, collate_fn=collate, worker_init_fn=start_worker)
    loader = DataLoader(samples, batch_size, sampler=order, **options)
    if for_gpu:
        return lambda: list(map(len, loader))
    loader = Loader(loader, paths, ToDevice(torch.device("cpu")))
    augment = build_augmentation(config, 0, "cpu")

    def run():
        for step, (images, targets) in enumerate(loader):
            if is_train:
                augment(images, targets, step)

    return run


def read_with_pillow(path):
    """A file as an RGB image of Pillow."""
    return Image.open(path).convert("RGB")


def decode_with_opencv(path, scale=1):
    """The pixels of a file, for a result whose sides are ``scale`` times smaller."""
    file = ImageFile(path)
    return file.crop(0, 0, *file.size, scale=scale)


def candidates(paths, batch_size):
    """What to time: setting to name to function."""
    names = (PEER, "pil", "opencv", "opencv for a GPU")
    return {
        "training": {name: pipeline(name, True, paths, batch_size) for name in names},
        "evaluation": {name: pipeline(name, False, paths, batch_size) for name in names},
        "decoding alone": {
            PEER: lambda: [read_with_pillow(path) for path in paths],
            "opencv": lambda: [decode_with_opencv(path) for path in paths],
            "opencv to an eighth": lambda: [decode_with_opencv(path, scale=16) for path in paths],
        },
    }


def coco_config(folder, backend):
    """The config of detection without crops, which torchvision does not make."""
    options = ["DATA.DATA_PATH", folder, "DATA.BACKEND", backend, "DET.CROP_MIN_SIZES", "[]"]
    return get_config(argparse.Namespace(cfg=str(COCO_CONFIG), opts=[*options, "DATA.NUM_WORKERS", "1"]))


def coco_pipeline(backend, is_train, folder, images, batch_size):
    """A function that makes our batches of the first ``images`` once."""
    train, _, val, _ = build_detection_loaders(coco_config(folder, backend))
    samples = (train if is_train else val).loader.dataset
    count = min(images, len(samples))
    order = [(0, index) for index in range(count)] if is_train else range(count)
    options = dict(collate_fn=collate_detection, worker_init_fn=start_worker, persistent_workers=True)
    loader = DataLoader(samples, batch_size, sampler=order, num_workers=1, **options)
    loader = Loader(loader, samples.dataset.paths, train.to_device)
    return lambda: [len(sizes) for (_, sizes), _ in loader]


def coco_peer(name, is_train, folder, images, batch_size):
    """The same of torchvision's reference, which draws its transforms from v2."""
    config = coco_config(folder, "pil")
    det, root, split = config.DET, Path(folder), "TRAIN" if is_train else "VAL"
    sides = det.MIN_SIZES if is_train else [det.TEST_SIZE]
    steps = [v2.RandomShortestSize(sides, det.MAX_SIZE)]
    if is_train:
        steps.append(v2.RandomHorizontalFlip(config.AUG.HFLIP))
    steps.insert(0 if name == COCO_PEER_OF_TENSORS else len(steps), v2.ToImage())
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if is_train:
        steps += [v2.ConvertBoundingBoxFormat("XYXY"), v2.SanitizeBoundingBoxes()]
    steps.append(v2.ToPureTensor())
    with contextlib.redirect_stdout(io.StringIO()):
        files = CocoDetection(
            root / det[f"{split}_IMAGES"], root / det[f"{split}_JSON"], transforms=v2.Compose(steps)
        )
    train, _, val, _ = build_detection_loaders(config)  # the same images, in the same order
    files.ids = [record["id"] for record in (train if is_train else val).loader.dataset.dataset.records]
    keys = ["boxes", "labels", "masks", "image_id"] if is_train else ["image_id"]
    files = wrap_dataset_for_transforms_v2(files, target_keys=keys)
    files = Subset(files, range(min(images, len(files))))
    loader = DataLoader(files, batch_size, collate_fn=as_lists, num_workers=1, persistent_workers=True)
    model = GeneralizedRCNNTransform(det.TEST_SIZE, det.MAX_SIZE, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return lambda: [len(model.batch_images([*map(model.normalize, batch)])) for batch, _ in loader]


def as_lists(samples):
    """Samples (image, target) as (images, targets)."""
    return tuple(zip(*samples))


def coco_candidates(folder, images, batch_size):
    """What to time of detection: setting to name to function."""
    makers = {COCO_PEER: coco_peer, COCO_PEER_OF_TENSORS: coco_peer}
    makers.update(pil=coco_pipeline, opencv=coco_pipeline)
    return {
        f"detection, {setting}": {
            name: make(name, is_train, folder, images, batch_size) for name, make in makers.items()
        }
        for setting, is_train in (("training", True), ("evaluation", False))
    }


def compare(functions, rounds):
    """Let pipelines take turns: rows of model, which is the pipeline's name, and turns."""

    def turn(read):
        begin = time.perf_counter()
        read()
        return 1, time.perf_counter() - begin

    for read in functions.values():
        read()
    turns = benchmarking.time_in_turn([partial(turn, read) for read in functions.values()], rounds, peer=0)
    return [dict(model=name, turns=of_pipeline) for name, of_pipeline in zip(functions, turns)]


def run(args):
    """Time the pipelines and print the ratios; returns the result."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    of_images = dict(pillow=PIL.__version__, opencv=cv2.__version__)
    result = dict(machine=machine("cpu"), versions=dict(versions(), **of_images), figure="images per second")
    if args.coco:
        settings = coco_candidates(args.coco, args.images, args.batch_size)
        train, *_ = build_detection_loaders(coco_config(args.coco, "pil"))
        result.update(peer=COCO_PEER, images=min(args.images, len(train.paths)))
    else:
        paths = find_jpegs(args.folder, args.images)
        settings = candidates(paths, args.batch_size)
        result.update(peer=PEER, images=len(paths))
    result["settings"] = {}
    print(*result["machine"].values(), f"\n{result['images']} images of {args.folder or args.coco}")
    for setting, functions in settings.items():
        print(setting, flush=True)
        result["settings"][setting] = compare(functions, args.rounds)
        print(tables.in_lines(result, setting))
    return result


if __name__ == "__main__":
    benchmarking.main(parse_args(), run)
