"""Write a small part of a COCO set, each image several times in training and once in validation.

python tools/coco_subset.py <coco> <folder> --images 16 --repeat 12 --objects 1 4

A detector that cannot learn such a set by heart has a fault. Images whose sides are equal, or both multiples
of 32, are left out: such sizes hide the faults that others show.
"""

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("coco", type=Path, help="folder with train2017 and annotations")
    parser.add_argument("folder", type=Path, help="to write, with the names of configs/coco/shapes.yaml")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=12, help="copies of an image in training")
    parser.add_argument("--objects", type=int, nargs=2, default=(1, 4), help="fewest and most of an image")
    parser.add_argument(
        "--small", type=int, default=0, help="take only wide images with an object up to this side"
    )
    parser.add_argument("--one-category", action="store_true", help="call every object the same")
    args = parser.parse_args()
    content = json.loads((args.coco / "annotations" / "instances_train2017.json").read_text())
    by_image = defaultdict(list)
    for item in content["annotations"]:
        if not item.get("iscrowd"):
            by_image[item["image_id"]].append(item)
    chosen = [image for image in content["images"] if is_wanted(image, by_image[image["id"]], args)]
    if args.small:
        chosen.sort(key=lambda image: -sum(is_small(item, args.small) for item in by_image[image["id"]]))
    chosen = chosen[: args.images]
    used = {item["category_id"] for image in chosen for item in by_image[image["id"]]}
    categories = [record for record in content["categories"] if record["id"] in used]
    if args.one_category:
        categories = [dict(id=1, name="object")]
        by_image = {n: [dict(item, category_id=1) for item in items] for n, items in by_image.items()}
    for split, repeat in (("train", args.repeat), ("val", 1)):
        (args.folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for _copy in range(repeat):
            for image in chosen:
                images.append(dict(image, id=len(images)))
                annotations += [dict(item, image_id=images[-1]["id"]) for item in by_image[image["id"]]]
        for image in chosen:
            shutil.copy(args.coco / "train2017" / image["file_name"], args.folder / split)
        path = args.folder / "annotations" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    print(f"{args.folder}: {len(chosen)} images, {len(annotations)} objects in {len(categories)} categories")


def is_wanted(image, items, args):
    """Whether an image record with these objects has the size and the objects that were asked for."""
    height, width = image["height"], image["width"]
    odd = height != width and (height % 32 or width % 32)
    fits = args.objects[0] <= len(items) <= args.objects[1]
    return odd and fits and (not args.small or width > height and any(is_small(x, args.small) for x in items))


def is_small(item, side):
    """Whether the area of a box is below that of a square, and its sides are 8 pixels or more."""
    width, height = item["bbox"][2:]
    return width * height < side**2 and min(width, height) >= 8


if __name__ == "__main__":
    main()
