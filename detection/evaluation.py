"""COCO average precision, through pycocotools."""

import collections
import contextlib
import io

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six figures of COCOeval
COCO_PER_IMAGE = 100  # detections of an image and category that COCO's own figures count, the surest


def to_results(image_id, detection, categories):
    """Detections of an image as COCO results.

    Args:
        detection: boxes (N, 4) as (x1, y1, x2, y2), labels (N,), scores (N,) and masks (N, H, W), on the CPU.
        categories: records of the categories; label 1 is the first.
    """
    results, values = [], (detection[name].tolist() for name in ("boxes", "labels", "scores"))
    for box, label, score, mask in zip(*values, detection["masks"]):
        code = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        results.append(
            dict(
                image_id=image_id,
                category_id=categories[label - 1]["id"],
                bbox=[round(value, 3) for value in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
                score=round(score, 5),
                segmentation=dict(size=code["size"], counts=code["counts"].decode()),
            )
        )
    return results


def average_precision(truth, results, image_ids):
    """COCO's figures, in percent.

    All detections count: where an image has more than the 100 that COCO's own figures take, so do these.

    Args:
        truth: content of a COCO annotation file.
        results: of all images that were evaluated, ``image_ids``; see :func:`to_results`.

    Returns:
        dict of ``box_AP``, ``box_AP50`` ... ``mask_APl``, and rows of (category name, box AP, mask AP).
        A figure without objects of its kind is NaN.
    """
    figures, per_class = {}, []
    of_images = collections.Counter(result["image_id"] for result in results)
    most = max([COCO_PER_IMAGE, *of_images.values()])
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = _coco(truth, truth["annotations"])
        for kind, prefix in (("bbox", "box"), ("segm", "mask")):
            # With boxes in the results, areas would be those of the boxes.
            shown = [
                {name: value for name, value in result.items() if kind == "bbox" or name != "bbox"}
                for result in results
            ]
            detected = ground_truth.loadRes(shown) if shown else _coco(truth, [])
            evaluation = COCOeval(ground_truth, detected, kind)
            evaluation.params.imgIds, evaluation.params.maxDets = sorted(image_ids), [most]
            evaluation.evaluate()
            evaluation.accumulate()
            precision = evaluation.eval["precision"][..., 0]  # IoU from 0.5 by 0.05, recall, category, size
            parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
            parts += [precision[..., size] for size in (1, 2, 3)]
            figures.update({f"{prefix}_{name}": 100 * _mean(part) for name, part in zip(METRICS, parts)})
            per_class.append([100 * _mean(precision[:, :, i, 0]) for i in range(precision.shape[2])])
    names = {category["id"]: category["name"] for category in truth["categories"]}
    rows = [(names[number], *values) for number, *values in zip(evaluation.params.catIds, *per_class)]
    return figures, rows


def _mean(precision):
    found = precision[precision > -1]
    return float(found.mean()) if len(found) else float("nan")


def _coco(truth, annotations):
    coco = COCO()
    # pycocotools takes two objects with the same id for one, and id 0 for none.
    items = [dict(item, id=i) for i, item in enumerate(annotations, 1)]
    for item in items:
        item.setdefault("iscrowd", 0)
        item.setdefault("area", item["bbox"][2] * item["bbox"][3])
    coco.dataset = dict(truth, annotations=items)
    coco.createIndex()
    return coco


def table(rows):
    """Average precision per category as aligned text."""
    width = max(len("category"), *(len(name) for name, *_ in rows))
    lines = [f"{'category':{width}}  box AP  mask AP"]
    lines += [f"{name:{width}}  {box:6.2f}  {mask:7.2f}" for name, box, mask in rows]
    return "\n".join(lines)
