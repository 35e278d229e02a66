"""Masks: from run lengths to the pixels of an image, and between these and the cells of a box."""

import math

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.nn.functional import grid_sample
from torchvision.ops import roi_align


def take_masks(codes, rows, columns):
    """The masks of these rows and columns of an image, each of them ascending or descending.

    Only the rectangle of an object is worked on: most are far smaller than the image.

    Args:
        codes: pycocotools' run lengths, a list.
        rows, columns: arrays of the rows and columns of the image to take, in order; some more than once.

    Returns:
        The masks that are not empty, uint8 (M, rows, columns), and bool (len(codes),), which these are.
    """
    parts, seen = [], torch.zeros(len(codes), dtype=torch.bool)
    for place, code in enumerate(codes):
        left, top, width, height = map(int, coco_mask.toBbox(code))
        of_rows, of_columns = _within(rows, top, height), _within(columns, left, width)
        # The columns are what lies in a row in memory.
        mask = coco_mask.decode(code).T[left : left + width, top : top + height]
        part = np.ascontiguousarray(mask[columns[of_columns] - left].T)[rows[of_rows] - top]
        seen[place] = bool(part.size and part.max())
        if seen[place]:
            parts.append((part, of_rows, of_columns))
    masks = torch.zeros(len(parts), len(rows), len(columns), dtype=torch.uint8)
    for mask, (part, of_rows, of_columns) in zip(masks, parts):
        mask[of_rows, of_columns] = torch.from_numpy(part)
    return masks, seen


def _within(places, first, length):
    """The slice of an array, ascending or descending, that holds ``first`` and the ``length`` from there."""
    found = np.flatnonzero((places >= first) & (places < first + length))
    return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def mask_targets(masks, boxes, indices, side):
    """What the mask head learns for boxes: whether at least half of a cell belongs to the object.

    Takes the masks (M, H, W) of the objects of an image, boxes (N, 4) in their pixels, and the index (N,) of
    the mask of each box. Returns (N, side, side): 1 where the mask's mean over the cell, by aligned RoIAlign,
    is 0.5 or more, else 0.
    """
    rois = torch.cat([indices[:, None].to(boxes), boxes], dim=1)
    share = roi_align(masks[:, None].to(boxes), rois, side, sampling_ratio=0, aligned=True)[:, 0]
    return (share >= 0.5).to(boxes)


def paste_masks(masks, boxes, size):
    """Masks of boxes as masks of the image.

    A pixel takes the probability at its centre, bilinear between the centres of the cells and falling to 0
    beyond them, and belongs to the object from 0.5.

    Args:
        masks: probabilities (N, side, side) of the cells of each box.
        boxes: (N, 4) in pixels of the image, exact: not rounded.

    Returns:
        bool (N, height, width), where ``size`` is (height, width).
    """
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for place, mask, box in zip(pasted, masks, boxes):
        x1, y1, x2, y2 = box.tolist()
        left, right = max(0, math.floor(x1)), min(size[1], math.ceil(x2))
        top, bottom = max(0, math.floor(y1)), min(size[0], math.ceil(y2))
        if left >= right or top >= bottom:
            continue
        x = (torch.arange(left, right).to(mask) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom).to(mask) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        values = grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        place[top:bottom, left:right] = values >= 0.5
    return pasted
