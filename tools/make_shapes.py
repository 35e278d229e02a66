"""Write a small detection set in COCO format: circles, boxes and triangles, overlapping, on noisy grounds.

python tools/make_shapes.py datasets/shapes

Masks cover the visible part of a shape: polygons where nothing covers it, run lengths elsewhere. Some images
hold a crowd of dots, annotated as one; a few hold nothing.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import check_environment


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", help="train/, val/ and annotations/ go here")
    add("--train", type=int, default=600, help="training images")
    add("--val", type=int, default=100, help="validation images")
    return parser.parse_args()


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    ARGS = parse_args()

import cv2
import numpy as np

NAMES = ("circle", "box", "triangle")


def outline(kind, rng, centre, radius):
    """The corners of a shape, (N, 2), in pixels."""
    if kind == "circle":
        angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    elif kind == "box":
        slant = rng.uniform(0.5, 1.05)
        angles = np.array([-slant, slant, math.pi - slant, math.pi + slant]) + rng.uniform(-0.4, 0.4)
    else:
        angles = np.array([0, 2, 4]) * math.pi / 3 + rng.uniform(-0.3, 0.3, 3) + rng.uniform(0, 2 * math.pi)
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def ground(rng, height, width):
    """A background (height, width, 3): a smooth colour gradient with noise."""
    coarse = rng.uniform(20, 110, (3, 3, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height)) + rng.normal(0, 8, (height, width, 3))


def fill(corners, height, width):
    """The mask (height, width) of a shape."""
    return cv2.fillPoly(np.zeros((height, width), np.uint8), [np.round(corners).astype(np.int32)], 1)


def annotation_of(mask, category, corners=None, crowd=0):
    """A COCO annotation of a mask, as run lengths or, where its corners are given, as a polygon."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    if corners is None:
        flat = mask.T.flatten().tolist()
        counts = [len(list(run)) for _, run in itertools.groupby(flat)]
        shape = dict(size=list(mask.shape), counts=[0, *counts] if flat[0] else counts)
    else:
        shape = [[round(float(value), 2) for value in corners.flatten()]]
    return dict(
        category_id=category,
        bbox=[int(value) for value in box],
        area=int(mask.sum()),
        iscrowd=crowd,
        segmentation=shape,
    )


def draw_image(rng):
    """A picture (H, W, 3) uint8, and its annotations."""
    height, width = rng.integers(96, 161, 2)
    picture, shapes, annotations = ground(rng, height, width), [], []
    if rng.random() < 0.1:  # a crowd, behind all shapes
        centre, dots = rng.uniform(30, [width - 30, height - 30]), np.zeros((height, width), np.uint8)
        for place in centre + rng.normal(0, 12, (25, 2)):
            dots |= fill(outline("circle", rng, place, 3), height, width)
        picture[dots > 0] = rng.uniform(150, 255, 3)
        annotations.append(annotation_of(dots, 1, crowd=1))
    for _ in range(rng.integers(0, 6) if rng.random() < 0.95 else 0):
        category = int(rng.integers(3)) + 1
        corners = outline(
            NAMES[category - 1], rng, rng.uniform(8, [width - 8, height - 8]), rng.uniform(12, 34)
        )
        mask = fill(corners, height, width)
        colour = rng.permutation([rng.uniform(200, 255), rng.uniform(60, 255), rng.uniform(60, 160)])
        picture[mask > 0] = 0.15 * picture[mask > 0] + 0.85 * colour
        for _, _, seen in shapes:
            seen &= 1 - mask
        shapes.append((category, corners, mask))
    for category, corners, seen in shapes:
        whole = fill(corners, height, width)
        inside = (corners >= 0).all() and (corners < [width, height]).all()
        if seen.sum() >= 60 and seen.sum() > 0.3 * whole.sum():
            uncovered = inside and seen.sum() == whole.sum()
            annotations.append(annotation_of(seen, category, corners if uncovered else None))
    return picture.clip(0, 255).astype(np.uint8), annotations


def main(args):
    """Write the folder; the same arguments write the same bytes."""
    folder = Path(args.folder)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate((("train", args.train), ("val", args.val))):
        rng = np.random.default_rng(seed)
        (folder / split).mkdir(exist_ok=True)
        content = dict(images=[], annotations=[])
        content["categories"] = [dict(id=i + 1, name=name) for i, name in enumerate(NAMES)]
        for number in range(count):
            picture, annotations = draw_image(rng)
            name = f"{number:05d}.png"
            cv2.imwrite(str(folder / split / name), picture[..., ::-1])
            height, width = picture.shape[:2]
            content["images"].append(dict(id=number, file_name=name, height=height, width=width))
            for annotation in annotations:
                content["annotations"].append(
                    dict(annotation, id=len(content["annotations"]) + 1, image_id=number)
                )
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    print(f"{folder}: {args.train} training and {args.val} validation images")


if __name__ == "__main__":
    main(ARGS)
