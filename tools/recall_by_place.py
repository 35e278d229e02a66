"""Which objects a detector finds in each part of the width of an image: recall at IoU 0.5.

python tools/recall_by_place.py <annotations.json> <detections.json> --parts 4 --small 48

A detector must find objects on the right as well as on the left.
"""

import argparse
import json
from collections import defaultdict

import torch
from torchvision.ops import box_convert, box_iou


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("annotations", help="COCO annotations")
    parser.add_argument("detections", help="the detections.json of a run")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--small", type=int, default=48, help="side of a small object, in pixels")
    args = parser.parse_args()
    with open(args.annotations, encoding="utf-8") as file:
        content = json.load(file)
    with open(args.detections, encoding="utf-8") as file:
        detections = json.load(file)
    for name, side in (("small objects", args.small), ("all objects", float("inf"))):
        counts = recall_by_place(content, detections, args.parts, side)
        text = "  ".join(f"{found / max(1, there):.2f} ({found}/{there})" for found, there in counts)
        print(f"{name + ',':14} from left to right: {text}")


def recall_by_place(content, detections, parts, side):
    """(found, there) of the objects in each part of the width whose boxes are below ``side`` squared."""
    width = {image["id"]: image["width"] for image in content["images"]}
    boxes, counts = defaultdict(list), [[0, 0] for _ in range(parts)]
    for detection in detections:
        boxes[detection["image_id"]].append(detection["bbox"])
    for item in content["annotations"]:
        x, _, w, h = item["bbox"]
        if item.get("iscrowd") or w * h >= side**2:
            continue
        count = counts[min(parts - 1, int(parts * (x + w / 2) / width[item["image_id"]]))]
        near = torch.tensor(boxes[item["image_id"]], dtype=torch.float64).reshape(-1, 4)
        near = torch.cat([near, torch.zeros(1, 4, dtype=torch.float64)])
        goal = torch.tensor([item["bbox"]], dtype=torch.float64)
        overlaps = box_iou(box_convert(goal, "xywh", "xyxy"), box_convert(near, "xywh", "xyxy"))
        count[0] += bool(overlaps.max() >= 0.5)
        count[1] += 1
    return counts


if __name__ == "__main__":
    main()
