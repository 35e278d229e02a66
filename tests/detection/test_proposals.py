"""Anchors, proposals, pooling and masks of the detector against closed forms and loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import coco_config
from test_detection import decode, giou, random_boxes, scene

from detection.cascade import CascadeStage, HeadLayers, PyramidRoIAlign, mask_targets, pyramid_levels
from detection.detector import build_detector, paste_masks, to_original_size
from detection.proposals import ProposalNetwork, anchors_of_map, match_anchors
from detection.transforms import resized

RATIOS = [0.5, 1.0, 2.0]
# Height and width; their maps have sides that are rounded up, at one level or more.
ODD_SIZES = [(37, 51), (61, 107), (50, 66), (97, 131), (33, 64), (130, 101), (57, 200), (1, 1), (5, 190)]
ODD_SIZES += [(128, 99), (75, 75), (119, 43)]


def anchor(row, column, stride, scale, ratio):
    """The anchor of a cell by its definition."""
    width, height = scale * stride / math.sqrt(ratio), scale * stride * math.sqrt(ratio)
    x, y = column * stride, row * stride
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def clipped(box, size):
    return [min(max(value, 0.0), float(side)) for value, side in zip(box, (size[1], size[0]) * 2)]


def test_anchors_have_equal_areas_and_their_ratios_unrounded():
    found = anchors_of_map((3, 5), 16, 7, RATIOS).unflatten(0, (3, 5, 3))
    for i, j, a in itertools.product(range(3), range(5), range(3)):
        assert found[i, j, a].tolist() == pytest.approx(anchor(i, j, 16, 7, RATIOS[a]), abs=1e-9)


def test_deltas_shrink_and_enlarge_by_the_same_factor_at_most():
    """By 62.5, whatever the deltas are divided by; in mmdet abs(log(16 / 1000)) limits both ends."""
    box = torch.tensor([[10.0, 20, 135, 270]], dtype=torch.float64)
    stds = (0.1, 0.1, 0.2, 0.5)
    stage = CascadeStage(HeadLayers(4, 2, 0, [8], 1), 0.5, stds, "giou")
    proposals = ProposalNetwork(4, [4], 8, RATIOS, 1, (1, 1)).coder.decode_single
    for scales, coder in ((stds, stage.decode), ((1, 1, 1, 1), proposals)):
        for factors in ((1000, 0.001), (0.001, 1000), (62, 1 / 62), (0.5, 2)):
            deltas = [0, 0, *(math.log(factor) / std for factor, std in zip(factors, scales[2:]))]
            x1, y1, x2, y2 = coder(torch.tensor([deltas], dtype=torch.float64), box)[0].tolist()
            sides = [side * min(max(factor, 1 / 62.5), 62.5) for side, factor in zip((125, 250), factors)]
            assert [x2 - x1, y2 - y1] == pytest.approx(sides)
            assert (x1 + x2, y1 + y2) == pytest.approx((145, 290))


def test_the_anchor_of_a_cell_sits_on_its_pixels_whatever_the_sizes():
    """A cell of each level gets the best scores, and deltas of zero: their anchors come out first."""
    detector = build_detector(coco_config("shapes", "DET.ANCHOR_SCALE", 4), 3).eval()
    detector.heads.losses = detector.heads.detect = lambda maps, proposals, sizes, *targets: {}
    rng, wanted, found = np.random.default_rng(0), {}, []

    def head(module, inputs, output):
        logits, deltas = ([torch.zeros_like(x) - 9 for x in output[0]], [x * 0 for x in output[1]])
        for (image, level), (row, column, a) in wanted.items():
            logits[level][image, a, row, column] = 9 - level
        return logits, deltas

    detector.rpn.head.register_forward_hook(head)
    detector.rpn.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    for sizes in [*zip(ODD_SIZES[::2], ODD_SIZES[1::2]), ODD_SIZES[:1], ODD_SIZES[-1:]]:
        images, sizes, targets = scene(sizes, torch.float32)
        for image, size in enumerate(sizes):
            for level, stride in enumerate((4, 8, 16, 32)):
                rows, columns = (math.ceil(side / stride) for side in size)
                # The last row or the last column, where a wrong stride is farthest off.
                place = (rows - 1, rng.integers(columns)), (rng.integers(rows), columns - 1)
                wanted[image, level] = *map(int, place[rng.integers(2)]), int(rng.integers(3))
        with torch.no_grad():
            detector(images, sizes, targets)
        for (image, level), (row, column, a) in wanted.items():
            expected = clipped(anchor(row, column, 4 * 2**level, 4, RATIOS[a]), sizes[image])
            assert found[-1][image][level].tolist() == pytest.approx(expected, abs=1e-4)
        wanted.clear()


def test_proposals_are_not_rounded_to_half_precision():
    """In mixed precision the head computes in bfloat16, whose numbers around 1000 are 4 apart."""
    rpn = ProposalNetwork(8, [4], 8, [1.0], 256, (2000, 5000)).eval()
    rpn.head.register_forward_hook(lambda module, inputs, output: (output[0], [x * 0 for x in output[1]]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ((boxes,), _) = rpn([torch.randn(1, 8, 10, 260)], [(40, 1037)])
    x = (boxes[:, 0] + boxes[:, 2]) / 2
    whole = (boxes[:, 0] > 0) & (boxes[:, 2] < 1037)
    assert whole.sum() > 20 and boxes.dtype == torch.float32 and x[whole].max() > 900
    assert torch.equal(x[whole], (x[whole] / 4).round() * 4)


def reference_match(anchors, boxes, size):
    """The rules of matching one after the other."""
    found = []
    inside = [a[0] >= 0 and a[1] >= 0 and a[2] < size[1] and a[3] < size[0] for a in anchors]
    ious = [[giou(a, box)[0] for box in boxes] for a in anchors]
    for a, row in enumerate(ious):
        if not inside[a]:
            found.append(-2)
        elif not boxes or max(row) < 0.3:
            found.append(-1)
        else:
            found.append(row.index(max(row)) if max(row) >= 0.7 else -2)
    for b in range(len(boxes)):
        best = max((ious[a][b] for a in range(len(anchors)) if inside[a]), default=0)
        for a in range(len(anchors)):
            if inside[a] and best >= 0.3 and ious[a][b] == best:
                found[a] = b
    return found


@pytest.mark.parametrize("objects", [0, 1, 6])
def test_anchors_are_matched_by_the_rules(objects):
    seen = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        size = (90, 70 + 9 * seed)
        # Small objects, which no anchor reaches at 0.7 and some at no 0.3, and objects on anchors.
        boxes = random_boxes(generator, objects)
        if objects > 3:
            boxes[0, 2:] = boxes[0, :2] + 5
            boxes[1] = torch.tensor([24.0, 24, 40, 40])
            boxes[2] = boxes[1]
        levels = [(23, 18 + 2 * seed, 4), (12, 9 + seed, 8)]
        anchors = torch.cat([anchors_of_map(shape, stride, 4, RATIOS) for *shape, stride in levels])
        found = match_anchors(anchors, boxes, size).tolist()
        assert found == reference_match(anchors.tolist(), boxes.tolist(), size)
        seen.update(found)
    assert seen >= {-2, -1} and max(seen) == objects - 1


def test_the_losses_of_proposals_are_those_of_the_definition():
    torch.manual_seed(0)
    rpn = ProposalNetwork(8, [4, 8], 4, RATIOS, 10**6, (50, 20)).double().train()
    sizes = [(64, 80), (50, 61)]
    maps = [torch.randn(2, 8, 16, 20).double(), torch.randn(2, 8, 8, 10).double()]
    # The sampler takes as many negative anchors as there are: nothing is left to chance.
    generator = torch.Generator().manual_seed(1)
    targets = [dict(boxes=random_boxes(generator, count, 30)) for count in (3, 0)]
    _, losses = rpn(maps, sizes, targets)
    logits, deltas = rpn.head(maps)
    total, objectness, box_loss = 0, 0, 0
    for image, (size, target) in enumerate(zip(sizes, targets)):
        cells = [
            (level, i, j, a)
            for level, x in enumerate(maps)
            for i, j, a in itertools.product(range(x.shape[2]), range(x.shape[3]), range(3))
        ]
        anchors = [anchor(i, j, (4, 8)[level], 4, RATIOS[a]) for level, i, j, a in cells]
        counts = [0, 0]
        for cell, box, match in zip(cells, anchors, reference_match(anchors, target["boxes"].tolist(), size)):
            level, i, j, a = cell
            if match == -2:
                continue
            counts[match >= 0] += 1
            logit = logits[level][image, a, i, j].item()
            objectness += math.log1p(math.exp(-logit if match >= 0 else logit))
            if match >= 0:
                moves = deltas[level][image, 4 * a : 4 * a + 4, i, j].tolist()
                goal = target["boxes"][match].tolist()
                width, height = box[2] - box[0], box[3] - box[1]
                ends = [
                    (goal[0] + goal[2] - box[0] - box[2]) / 2 / width,
                    (goal[1] + goal[3] - box[1] - box[3]) / 2 / height,
                    math.log((goal[2] - goal[0]) / width),
                    math.log((goal[3] - goal[1]) / height),
                ]
                gaps = [abs(move - end) for move, end in zip(moves, ends)]
                box_loss += sum(4.5 * gap**2 if gap < 1 / 9 else gap - 1 / 18 for gap in gaps)
        total += max(1, counts[0]) + max(1, counts[1])
        assert counts[0] > 20 and (counts[1] > 2 or image == 1)
    assert losses["objectness"].item() == pytest.approx(objectness / total, rel=1e-9)
    assert losses["rpn_box_reg"].item() == pytest.approx(box_loss / total, rel=1e-9)


def test_proposals_are_the_best_of_each_level_without_duplicates():
    """Those of a loop; padding of the batch makes no proposals and takes no place among the best."""
    torch.manual_seed(0)
    rpn = ProposalNetwork(8, [4, 8], 4, RATIOS, 256, (120, 25)).double()
    torch.nn.init.normal_(rpn.head.bbox_pred.weight, std=0.1)
    maps = [torch.randn(2, 8, 16, 20).double(), torch.randn(2, 8, 8, 10).double()]
    sizes = [(64, 80), (40, 52)]
    logits, deltas = rpn.head(maps)
    # The padding has the best scores of all.
    hook = rpn.head.register_forward_hook(lambda module, inputs, output: (logits, deltas))
    for level, rows, columns in ((0, 10, 13), (1, 5, 7)):
        logits[level][1, :, rows:] = logits[level][1, :, :, columns:] = 30
    # Boxes of no width, here beyond the left border, are none, whatever their score.
    deltas[0][:, 0, 3, 4], logits[0][:, 0, 3, 4] = -40, 25
    for most, is_train in ((120, True), (25, False)):
        targets = [dict(boxes=torch.zeros(0, 4))] * 2
        found, _ = rpn.train(is_train)(maps, sizes, targets)
        for image, size in enumerate(sizes):
            kept = []
            for level, stride in enumerate((4, 8)):
                rows, columns = (math.ceil(side / stride) for side in size)
                scored = [
                    (logits[level][image, a, i, j].item(), i, j, a)
                    for i, j, a in itertools.product(range(rows), range(columns), range(3))
                ]
                chosen = []
                for score, i, j, a in sorted(scored, reverse=True)[:most]:
                    moves = deltas[level][image, 4 * a : 4 * a + 4, i, j].tolist()
                    box = clipped(decode(moves, anchor(i, j, stride, 4, RATIOS[a]), [1] * 4), size)
                    if box[2] - box[0] < 1e-3 or box[3] - box[1] < 1e-3:
                        continue
                    if all(giou(box, other)[0] <= 0.7 for _, other in chosen):
                        chosen.append((score, box))
                kept += chosen
            expected = [box for _, box in sorted(kept, reverse=True)[:most]]
            assert len(expected) > 10
            torch.testing.assert_close(
                found[image], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
            )
    hook.remove()


def test_an_image_smaller_than_every_anchor_trains_and_is_searched():
    detector = build_detector(coco_config(), 3)
    images, sizes, _ = scene([(9, 7)], torch.float32)
    target = dict(boxes=torch.tensor([[1.0, 1, 6, 8]]), labels=torch.tensor([2]), masks=torch.ones(1, 9, 7))
    for targets in ([target], [{name: value[:0] for name, value in target.items()}]):
        losses = detector.train()(images, sizes, targets)
        assert all(math.isfinite(loss.item()) for loss in losses.values())
    found = detector.eval()(images, sizes)[0]
    assert (found["boxes"] <= torch.tensor([7, 9, 7, 9])).all()


def bilinear(x, row, column):
    """The value of a map (H, W) between its cells; 0 from a cell beyond its border on."""
    height, width = x.shape
    if not (-1 <= row <= height and -1 <= column <= width):
        return 0.0
    row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    i, j = min(int(row), max(height - 2, 0)), min(int(column), max(width - 2, 0))
    down, right = row - i, column - j
    values = [x[min(i + di, height - 1), min(j + dj, width - 1)] for di in (0, 1) for dj in (0, 1)]
    shares = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    return sum(float(value) * share for value, share in zip(values, shares))


def aligned(x, box, stride, side):
    """RoIAlign of a map (H, W): the mean of as many samples of each bin as it has cells."""
    x1, y1, x2, y2 = (value / stride - 0.5 for value in box)
    across, down = math.ceil((x2 - x1) / side), math.ceil((y2 - y1) / side)
    pooled = torch.zeros(side, side, dtype=torch.float64)
    for i, j in itertools.product(range(side), range(side)):
        samples = [
            bilinear(
                x,
                y1 + (i + (m + 0.5) / down) * (y2 - y1) / side,
                x1 + (j + (n + 0.5) / across) * (x2 - x1) / side,
            )
            for m, n in itertools.product(range(down), range(across))
        ]
        pooled[i, j] = sum(samples) / len(samples)
    return pooled


def test_boxes_are_pooled_from_the_map_of_their_size():
    """By loops, from images of several sizes whose maps' sides are rounded up."""
    generator = torch.Generator().manual_seed(0)
    pool = PyramidRoIAlign([4, 8, 16, 32], 7)
    for height, width in ((427, 640), (333, 701)):
        maps = [
            torch.randn(
                2, 1, math.ceil(height / s), math.ceil(width / s), generator=generator, dtype=torch.float64
            )
            for s in (4, 8, 16, 32)
        ]
        boxes = [
            torch.tensor([[3.3, 5.1, 40.2, 30.9], [width - 150.0, 10, width, 180]]).double(),
            torch.tensor([[0.0, 0, width, height], [100, 90.5, 330, height - 0.3]]).double(),
        ]
        levels = [0, 1, 3, 2]
        found = pool(maps, boxes)
        for n, (image, box) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            level = levels[n]
            expected = aligned(maps[level][image, 0], boxes[image][box].tolist(), 4 * 2**level, 7)
            torch.testing.assert_close(found[n, 0], expected, rtol=0, atol=1e-9)


def test_the_level_of_a_box_grows_with_every_doubling_from_112_pixels():
    sides = torch.tensor([1.0, 55, 56, 111, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), sides / 2, sides * 2], 1)
    assert pyramid_levels(boxes, 4).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert pyramid_levels(boxes, 3).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_mask_targets_are_cells_of_which_half_belongs_to_the_object():
    rng = np.random.default_rng(0)
    masks = torch.from_numpy((rng.random((2, 41, 57)) < 0.5).astype(np.uint8))
    masks[0, 10:30, 20:50], masks[1, :20] = 1, 0
    boxes = torch.tensor([[18.4, 8.2, 52.7, 33.1], [0, 0, 57, 41], [30.5, 10, 45, 38.75]]).double()
    indices = torch.tensor([0, 1, 1])
    found = mask_targets(masks, boxes, indices, 14)
    for target, box, index in zip(found, boxes.tolist(), indices):
        share = aligned(masks[index].double(), box, 1, 14)
        sure = (share - 0.5).abs() > 1e-9
        assert torch.equal(target[sure], (share >= 0.5).double()[sure])
        assert 0.1 < target.mean() < 0.95
    assert found.unique().tolist() == [0, 1]
    # Every cell of a box of 28 pixels has two of its four pixels: half is enough.
    stripes = (torch.arange(28) % 2).repeat(1, 28, 1)
    assert mask_targets(stripes, torch.tensor([[0.0, 0, 28, 28]]), torch.tensor([0]), 14).all()


@pytest.mark.parametrize("size", ODD_SIZES)
def test_masks_are_pasted_by_bilinear_sampling_at_exact_boxes(size):
    generator = torch.Generator().manual_seed(sum(size))
    height, width = size
    corners = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    corners *= torch.tensor([width, height, width, height]) * 1.1
    low, high = corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])
    boxes = torch.cat([low, high + 0.2], dim=1)
    boxes[0] = torch.tensor([0, 0, width, height])
    masks = torch.rand(4, 28, 28, generator=generator, dtype=torch.float64)
    found = paste_masks(masks, boxes, size)
    assert found.shape == (4, height, width)
    for mask, box, pasted in zip(masks, boxes.tolist(), found):
        x1, y1, x2, y2 = box
        around = torch.zeros(30, 30, dtype=torch.float64)  # beyond the outer cells the mask falls to 0
        around[1:29, 1:29] = mask
        for place in torch.randint(height * width, (200,), generator=generator).tolist():
            row, column = divmod(place, width)
            i = (row + 0.5 - y1) / (y2 - y1) * 28 - 0.5
            j = (column + 0.5 - x1) / (x2 - x1) * 28 - 0.5
            value = bilinear(around, i + 1, j + 1) if -1 < i < 28 and -1 < j < 28 else 0
            assert pasted[row, column] == (value >= 0.5) or abs(value - 0.5) < 1e-9


@pytest.mark.parametrize("shortest, longest", [(64, 90), (33, 1000), (200, 210)])
def test_a_detection_returns_to_the_pixels_that_it_was_resized_from(shortest, longest):
    """The whole image, and the exact place of a quarter of it, whatever rounding made of the sides."""
    for original in ODD_SIZES:
        height, width = resized(original, shortest, longest)
        boxes = torch.tensor([[0.0, 0, width, height], [width / 2, height / 4, width, height * 0.75]])
        scores, labels = torch.ones(2), torch.ones(2, dtype=torch.long)
        detection = dict(boxes=boxes, scores=scores, labels=labels, masks=torch.ones(2, 1, 28, 28))
        found = to_original_size(detection, (height, width), original)
        rows, columns = original
        expected = [[0, 0, columns, rows], [columns / 2, rows / 4, columns, rows * 0.75]]
        torch.testing.assert_close(found["boxes"], torch.tensor(expected), rtol=1e-5, atol=0)
        assert found["masks"].shape == (2, *original)
        # The corners of a mask are round: look at the rows and columns that it reaches.
        for mask, (x1, y1, x2, y2) in zip(found["masks"], expected):
            for reached, low, high in ((mask.any(1), y1, y2), (mask.any(0), x1, x2)):
                centres = torch.arange(len(reached)) + 0.5
                sure = (centres != low) & (centres != high)
                assert torch.equal(reached[sure], ((low < centres) & (centres < high))[sure])
