"""Region proposals: anchors on every cell of the feature pyramid, scored, moved, and the best of them kept.

The proposal network of arXiv 1506.01497, with the choices of mmdet. Boxes are (x1, y1, x2, y2) in pixels of
the resized image.
"""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from models.attention import at_least_float32

_POSITIVE_IOU, _NEGATIVE_IOU, _NMS_IOU = 0.7, 0.3, 0.7


class ProposalNetwork(nn.Module):
    """Proposals for a batch of feature pyramids, and the losses of the network.

    Args:
        channels, strides: of the feature maps; strides are in pixels.
        scale: side of a square anchor, in strides.
        ratios: height over width of the anchors of a cell; their areas are equal.
        samples: anchors of each image that are trained on, at most half of them positive.
        most: proposals that are kept of each map, and in all: (in training, in evaluation).
    """

    def __init__(self, channels, strides, scale, ratios, samples, most):
        super().__init__()
        self.strides, self.scale, self.ratios, self.most = strides, scale, ratios, most
        self.head = RPNHead(channels, len(ratios))
        self.sampler = BalancedPositiveNegativeSampler(samples, 0.5)
        self.coder = LimitedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(self, maps, sizes, targets=None):
        """Proposals of each image, the best first, and in training the losses.

        Takes a feature map (B, C, H, W) for each stride, the (height, width) of each image and its target
        with boxes (M, 4). Returns boxes (N, 4) of each image, within it, and a dict of ``objectness`` and
        ``rpn_box_reg``, empty in evaluation. What lies outside of an image, because others of the batch are
        larger, is never proposed.
        """
        logits, deltas = [], []
        for level_logits, level_deltas in zip(*self.head(maps)):  # (B, A, H, W) and (B, A*4, H, W)
            logits.append(at_least_float32(level_logits).permute(0, 2, 3, 1).flatten(1))
            level_deltas = at_least_float32(level_deltas).unflatten(1, (-1, 4))
            deltas.append(level_deltas.permute(0, 3, 4, 1, 2).flatten(1, 3))  # B, H*W*A, 4
        anchors = [
            anchors_of_map(x.shape[2:], stride, self.scale, self.ratios).to(like)
            for x, stride, like in zip(maps, self.strides, deltas)
        ]
        with torch.no_grad():
            proposals = [
                self._propose([x[i] for x in logits], [x[i] for x in deltas], anchors, size)
                for i, size in enumerate(sizes)
            ]
        if not self.training:
            return proposals, {}
        return proposals, self._losses(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, sizes, targets)

    def _propose(self, logits, deltas, anchors, size):
        boxes, scores, levels = [], [], []
        for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors)):
            columns, rows = level_anchors.unflatten(1, (2, 2)).mean(1).unbind(1)
            outside = (rows >= size[0]) | (columns >= size[1])
            level_logits = level_logits.masked_fill(outside, -torch.inf)
            best, index = level_logits.topk(min(self._most(), len(level_logits)))
            boxes.append(self.coder.decode_single(level_deltas[index], level_anchors[index]))
            scores.append(best)
            levels.append(torch.full_like(index, level))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        kept = scores > -torch.inf
        boxes, scores, levels = clip_boxes_to_image(boxes[kept], size), scores[kept], levels[kept]
        kept = remove_small_boxes(boxes, 1e-3)
        boxes, scores, levels = boxes[kept], scores[kept], levels[kept]
        return boxes[batched_nms(boxes, scores, levels, _NMS_IOU)[: self._most()]]

    def _most(self):
        return self.most[0 if self.training else 1]

    def _losses(self, logits, deltas, anchors, sizes, targets):
        anchors = torch.cat(anchors)
        matches = [match_anchors(anchors, target["boxes"], size) for target, size in zip(targets, sizes)]
        # For the sampler, -1 is left out, 0 is the background, and from 1 on come objects.
        chosen = self.sampler([matched + 1 for matched in matches])
        count = sum(max(1, int(image.sum())) for images in chosen for image in images)
        objectness = box_loss = 0
        for i, (matched, positive, negative) in enumerate(zip(matches, *chosen)):
            positive, negative = positive.bool(), negative.bool()
            used = positive | negative
            objectness = objectness + binary_cross_entropy_with_logits(
                logits[i, used], positive[used].to(logits), reduction="sum"
            )
            goals = self.coder.encode_single(targets[i]["boxes"][matched[positive]], anchors[positive])
            box_loss = box_loss + smooth_l1_loss(deltas[i, positive], goals, reduction="sum", beta=1 / 9)
        return dict(objectness=objectness / count, rpn_box_reg=box_loss / count)


class LimitedBoxCoder(BoxCoder):
    """torchvision's coder, which also shrinks a box by no more than it enlarges one, a factor of 62.5."""

    def decode_single(self, rel_codes, boxes):
        """The boxes that deltas (N, 4) make of boxes (N, 4)."""
        x, y, width, height = rel_codes.unbind(1)
        width, height = (
            value.clamp(min=-self.bbox_xform_clip * weight)
            for value, weight in zip((width, height), self.weights[2:])
        )
        return super().decode_single(torch.stack([x, y, width, height], dim=1), boxes)


def anchors_of_map(shape, stride, scale, ratios):
    """The anchors of a map: those of cell (i, j) are centred at (j, i) times the stride, whatever the image.

    ``shape`` is (rows, columns) of the map. Returns boxes (rows * columns * ratios, 4), cells row by row, in
    float64.
    """
    ratios = torch.tensor(ratios, dtype=torch.float64)
    half = stride * scale / 2 * torch.stack([ratios.rsqrt(), ratios.sqrt()], dim=1)  # A, 2: in x and y
    rows, columns = (stride * torch.arange(side, dtype=torch.float64) for side in shape)
    centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[:, :, None]  # H, W, 1, 2
    return torch.cat([centres - half, centres + half], dim=-1).flatten(0, 2)


def match_anchors(anchors, boxes, size):
    """The objects that anchors are trained to find.

    An anchor belongs to the object with which it has the highest IoU, if that is 0.7 or more, and to the
    background if it is below 0.3. Each object also gets the anchors nearest to it, at any IoU from 0.3.
    Anchors that cross the border of the image are left out, before anything else.

    Takes anchors (N, 4), the boxes (M, 4) of the objects, and the (height, width) of the image. Returns the
    index of the object for each anchor (N,), -1 for the background, and -2 for anchors to leave out.
    """
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < size[1]) & (anchors[:, 3] < size[0])
    matched = torch.full((len(anchors),), -2, device=anchors.device)
    matched[inside] = -1
    if not len(boxes) or not inside.any():
        return matched
    ious = box_iou(boxes, anchors[inside])  # M, N
    best, index = ious.max(0)
    found = torch.where(best >= _POSITIVE_IOU, index, torch.where(best < _NEGATIVE_IOU, -1, -2))
    nearest = ious.max(1, keepdim=True).values
    is_nearest = (ious == nearest) & (nearest >= _NEGATIVE_IOU)
    # Where it is the nearest of several objects, the last one gets it.
    last = (is_nearest * torch.arange(1, len(boxes) + 1, device=ious.device)[:, None]).max(0).values
    matched[inside] = torch.where(last > 0, last - 1, found)
    return matched
