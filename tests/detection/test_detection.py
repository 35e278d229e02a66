"""The detector: backbone, cascade, its losses and its size."""

import math

import pytest
import torch
from helpers import CVPR22, coco_config, fill_weights, micro
from torch import nn
from torch.nn import functional

import checkpoint as ckpt
from detection.backbone import MSGBackbone
from detection.cascade import CascadeHeads, CascadeStage, DetectionLimits, HeadLayers, Samples
from detection.detector import build_detector, count_detector_macs, load_pretrained
from models import build_model
from utils import UserError

LAYERS, LIMITS = HeadLayers(8, 4, 1, [16], 1), DetectionLimits(0.05, 0.5, 100)
STDS = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]


def backbone(**changes):
    return MSGBackbone(micro(**changes)).double().eval()


def scene(sizes, dtype=torch.float64, seed=0):
    """A batch of random images of these sizes, zero outside of each, and two objects in each."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(sides) for sides in zip(*sizes))
    images, targets = torch.zeros(len(sizes), 3, height, width, dtype=dtype), []
    for image, (rows, columns) in zip(images, sizes):
        image[:, :rows, :columns] = torch.randn(3, rows, columns, dtype=dtype, generator=generator)
        boxes = torch.tensor([[3.0, 5.0, 30.0, 34.0], [20.0, 8.0, 44.0, 28.0]], dtype=dtype)
        masks = torch.zeros(2, rows, columns, dtype=torch.uint8)
        masks[0, 5:34, 3:30], masks[1, 8:28, 20:44] = 1, 1
        targets.append(dict(boxes=boxes, labels=torch.tensor([1, 3]), masks=masks))
    return images, list(sizes), targets


@pytest.mark.parametrize("changes", [{}, CVPR22, dict(tokens=False), dict(manip_type="none")])
@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_maps_of_unpadded_images_are_the_classifiers(changes, size):
    classifier = micro(**changes).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = classifier.forward_intermediates(images, intermediates_only=True)
    found = backbone(**changes)(images, [size] * 2)
    for x, y in zip(found, expected):
        y = functional.layer_norm(y.movedim(1, 3), y.shape[1:2]).movedim(3, 1)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, CVPR22, dict(tokens=False), dict(depths=(1, 3, 1)), dict(ape=True)])
def test_features_do_not_depend_on_the_padding_of_the_batch(changes):
    # Regions of the third stage are larger than its map.
    model = backbone(shuffle_size=(4, 4, 4), **changes)
    for size in ((37, 51), (8, 90)):
        images, sizes, _ = scene([size, (130, 101)])
        alone, together = model(images[:1, :, : size[0], : size[1]], [size]), model(images, sizes)
        for x, y in zip(alone, together):
            rows, columns = x.shape[2:]
            torch.testing.assert_close(x[0], y[0, :, :rows, :columns], rtol=0, atol=1e-10)
            assert (x.abs().sum(1) > 0).all()
            assert y[0, :, rows:].abs().sum() + y[0, :, :, columns:].abs().sum() == 0


def test_messengers_of_empty_windows_relay_but_hold_no_padding():
    images, sizes, _ = scene([(40, 24)])
    before = backbone(shuffle_size=(4, 4, 4))(images, sizes)
    after = backbone(shuffle_size=(4, 4, 4))(functional.pad(images, (0, 40, 0, 24), value=9.0), sizes)
    # What lies in the padding is not the image's: only patches that reach over its edge may see it.
    inner = [x[:, :, :4, :2] for x in before], [x[:, :, :4, :2] for x in after]
    for x, y in zip(*inner):
        torch.testing.assert_close(x, y)
    without = backbone(shuffle_size=(4, 4, 4), manip_type="none")(images, sizes)
    assert not torch.allclose(before[0], without[0])


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = backbone(shuffle_size=(4, 4, 4)).train()
        model.model.set_grad_checkpointing(recompute)
        sum(x.square().sum() for x in model(*scene([(40, 51), (64, 33)])[:2])).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 50
    for stored, recomputed in zip(*gradients):
        torch.testing.assert_close(stored, recomputed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "regions, words",
    [
        ([2, 2], "an entry for each stage"),
        ([2, 2, 5], "the 128 channels of stage 3 .* the 25 windows of its 5x5 .* DET.SHUF_SIZE\\[2\\]"),
        ([4, 2, 2], r"make it MODEL.MSG.SHUF_SIZE\[0\]"),
    ],
)
def test_impossible_backbones_name_their_key(regions, words):
    with pytest.raises(UserError, match=words):
        build_detector(coco_config("shapes", "DET.SHUF_SIZE", regions), 3)


def giou(a, b):
    """Generalised IoU of two boxes, by its definition."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union, both / union - (hull - union) / hull


def decode(delta, box, stds):
    """A box moved by deltas, by the definition."""
    dx, dy, dw, dh = (value * std for value, std in zip(delta, stds))
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + width / 2 + dx * width, box[1] + height / 2 + dy * height
    width, height = width * math.exp(dw), height * math.exp(dh)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def random_boxes(generator, count, side=60):
    corners = torch.rand(count, 2, dtype=torch.float64, generator=generator) * side
    sides = 4 + torch.rand(count, 2, dtype=torch.float64, generator=generator) * side / 2
    return torch.cat([corners, corners + sides], dim=1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_targets_and_losses_of_a_stage_are_those_of_the_definition(number):
    generator = torch.Generator().manual_seed(number)
    iou = (0.5, 0.6, 0.7)[number]
    stage = CascadeStage(LAYERS, iou, STDS[number], "giou")
    heads = CascadeHeads([stage], [4], [1.0], 10**6, 1.0, LIMITS)
    targets, proposals = [], []
    for objects in (3, 0, 2):  # the second image has none
        truth = random_boxes(generator, objects)
        near = truth.repeat(20, 1) + torch.randn(20 * objects, 4, dtype=torch.float64, generator=generator)
        proposals.append(torch.cat([random_boxes(generator, 30), near]))
        targets.append(dict(boxes=truth, labels=torch.arange(objects) % 3 + 1))
    samples = [heads.sample(stage, *image) for image in zip(proposals, targets)]
    boxes, labels, indices, are_truth = zip(*samples)
    expected_labels, goals = [], []
    for image, target in enumerate(targets):
        for box in torch.cat([proposals[image], target["boxes"]]).tolist():
            overlaps = [giou(box, truth)[0] for truth in target["boxes"].tolist()]
            best = max(range(len(overlaps)), key=overlaps.__getitem__) if overlaps else None
            matches = best is not None and overlaps[best] >= iou
            expected_labels.append(int(target["labels"][best]) if matches else 0)
            goals.append(target["boxes"][best].tolist() if matches else None)
    # With room for all, sampling keeps every proposal, in its order, and the ground truth.
    assert [flags.sum().item() for flags in are_truth] == [3, 0, 2]
    assert torch.cat(labels).tolist() == expected_labels and 10 < sum(map(bool, expected_labels)) < 150
    count = len(expected_labels)
    logits = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    deltas = torch.randn(count, 4, 4, dtype=torch.float64, generator=generator)
    truths = [t["boxes"][i] if len(t["boxes"]) else b for t, i, b in zip(targets, indices, boxes)]
    found = stage.losses(logits, deltas, torch.cat(boxes), torch.cat(labels), torch.cat(truths))
    class_loss = box_loss = 0
    for i, (label, goal) in enumerate(zip(expected_labels, goals)):
        row = logits[i].tolist()
        class_loss += math.log(sum(map(math.exp, row))) - row[label]
        if label:
            moved = decode(deltas[i, label].tolist(), torch.cat(boxes)[i].tolist(), STDS[number])
            box_loss += 10 * (1 - giou(moved, goal)[1])
    assert found[0].item() == pytest.approx(class_loss / count, rel=1e-9)
    assert found[1].item() == pytest.approx(box_loss / count, rel=1e-6)
    # The next stage sees boxes moved by the deltas of the true class, or of the likeliest one.
    refined = torch.cat(heads.refine(stage, logits, deltas, boxes, [(90, 95)] * 3, labels))
    for i, label in enumerate(expected_labels):
        label = label or max((1, 2, 3), key=lambda c: logits[i, c].item())
        moved = decode(deltas[i, label].tolist(), torch.cat(boxes)[i].tolist(), STDS[number])
        limits = (95, 90, 95, 90)
        expected = [min(max(value, 0), limit) for value, limit in zip(moved, limits)]
        assert refined[i].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_mask_loss_is_that_of_the_matched_objects():
    stage = CascadeStage(LAYERS, 0.5, STDS[0], "giou")
    heads = CascadeHeads([stage], [4], [1.0], 10**6, 1.0, LIMITS)
    maps = [torch.randn(2, 8, 28, 28)]
    targets = []
    for image in range(2):
        masks = torch.zeros(2, 112, 112, dtype=torch.uint8)
        masks[0, :, 28:], masks[1, 70:] = 1, 1  # the right of a box, the lower part of another
        boxes = torch.tensor([[0.0, 0, 56, 56], [56, 56, 112, 84]])
        targets.append(dict(boxes=boxes, labels=torch.tensor([2 - image, 3]), masks=masks))
    # Background first and objects in another order, so that places and indices differ.
    boxes = [torch.cat([torch.tensor([[90.0, 0, 100, 9]]), target["boxes"].flip(0)]) for target in targets]
    labels = [torch.cat([torch.zeros(1, dtype=torch.int64), target["labels"].flip(0)]) for target in targets]
    samples = [Samples(*image, torch.tensor([0, 1, 0]), None) for image in zip(boxes, labels)]
    with torch.no_grad():
        stage.mask_predictor.mask_fcn_logits.weight *= 50  # so that classes and masks differ much
        found = heads._mask_loss(stage, maps, targets, samples)
        logits = stage.predict_masks(heads.mask_pool(maps, [box[1:] for box in boxes]))
    right, lower = torch.zeros(28, 28), torch.zeros(28, 28)
    right[:, 14:], lower[14:] = 1, 1
    expected = [
        functional.binary_cross_entropy_with_logits(logits[i, label], mask)
        for i, (label, mask) in enumerate([(3, lower), (2, right), (3, lower), (1, right)])
    ]
    assert found.item() == pytest.approx(sum(expected).item() / 4, rel=1e-6)


def test_sampling_keeps_the_share_of_positives():
    heads = CascadeHeads([], [], [], 32, 0.25, LIMITS)
    stage = CascadeStage(LAYERS, 0.5, STDS[0], "giou")
    truth = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    proposals = torch.cat([truth + torch.rand(60, 4), torch.rand(100, 4) + torch.tensor([60.0, 60, 70, 70])])
    found = heads.sample(stage, proposals, dict(boxes=truth, labels=torch.tensor([2])))
    assert len(found.boxes) == 32 and (found.labels == 2).sum() == 8


def test_ground_truth_joins_every_stage_once_and_as_it_is():
    """Refined by a stage it is dropped: the next would see it twice, and moved."""
    torch.manual_seed(0)
    stages = [CascadeStage(LAYERS, iou, STDS[0], "giou") for iou in (0.5, 0.6, 0.7)]
    heads = CascadeHeads(stages, [4], [1, 1, 1], 64, 0.5, LIMITS)
    for stage in stages:
        nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.3)
    images, sizes, targets = scene([(64, 80), (60, 61)], torch.float32)
    generator = torch.Generator().manual_seed(0)
    proposals = [
        torch.cat([target["boxes"].repeat(5, 1) + 1, random_boxes(generator, 50, 30).float()])
        for target in targets
    ]
    given, sample = [], heads.sample

    def watched(stage, proposals, target):
        given.append((proposals, sample(stage, proposals, target)))
        return given[-1][1]

    heads.sample = watched
    heads.losses([torch.randn(2, 8, 16, 20)], proposals, sizes, targets)
    for image, target in enumerate(targets):
        for number in range(3):
            proposals, found = given[2 * number + image]
            # The same boxes, once, of their own labels.
            assert torch.equal(found.boxes[found.are_truth], target["boxes"])
            assert torch.equal(found.labels[found.are_truth], target["labels"])
            assert torch.equal(found.indices[found.are_truth], torch.arange(2))
            if number:
                before = given[2 * number - 2 + image][1]
                assert len(proposals) == len(before.boxes) - 2
                distance = (proposals - before.boxes[~before.are_truth]).abs().max()
                assert 0 < distance < 60


def test_objects_of_the_same_box_keep_their_own_classes():
    stage = CascadeStage(LAYERS, 0.5, STDS[0], "giou")
    heads = CascadeHeads([stage], [4], [1.0], 10**6, 1.0, LIMITS)
    boxes = torch.tensor([[10.0, 10, 50, 50]]).repeat(3, 1)
    found = heads.sample(stage, boxes[:1] + 1, dict(boxes=boxes, labels=torch.tensor([1, 3, 2])))
    assert found.labels.tolist() == [1, 1, 3, 2] and found.indices.tolist() == [0, 0, 1, 2]
    alone = heads.sample(stage, boxes[:0], dict(boxes=boxes, labels=torch.tensor([1, 3, 2])))
    assert alone.labels.tolist() == [1, 3, 2]  # without a proposal


@pytest.mark.parametrize("box_loss", ["giou", "smooth_l1"])
def test_a_stage_without_boxes_has_losses_of_zero(box_loss):
    stage = CascadeStage(LAYERS, 0.5, STDS[0], box_loss)
    heads = CascadeHeads([stage], [4], [1.0], 64, 0.5, LIMITS)
    target = dict(
        boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 9, 9)
    )
    losses = heads.losses([torch.randn(1, 8, 3, 3)], [torch.zeros(0, 4)], [(9, 9)], [target])
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(value.isfinite().all() for value in stage.state_dict().values())


def test_a_fresh_detector_is_drawn_as_by_mmdet():
    torch.manual_seed(0)
    one_stage = ["DET.IOU_THRESHOLDS", "[0.5]", "DET.LOSS_WEIGHTS", "[1]", "DET.DELTA_STDS", [STDS[0]]]
    detector = build_detector(coco_config("cascade_mask_rcnn_msg_tiny_3x", *one_stage), 80)
    for stage in detector.heads.stages:
        predictor, conv = stage.box_predictor, stage.mask_predictor.mask_fcn_logits
        assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.02)
        (linear,) = [module for module in stage.box_head if isinstance(module, nn.Linear)]
        bound = math.sqrt(6 / (256 * 49 + 1024))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        of_masks = conv, stage.mask_predictor.conv5_mask
        for module in (predictor.cls_score, predictor.bbox_pred, linear, *of_masks):
            assert not module.bias.any()
    for channels, (block,) in zip((96, 192, 384, 768), detector.fpn.inner_blocks):
        assert block.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (channels + 256)), rel=1e-2)
    for module in (detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred):
        assert module.weight.std().item() == pytest.approx(0.01, rel=0.1) and not module.bias.any()


def test_losses_of_a_stage_are_multiplied_by_its_weight():
    found = []
    for weights in ("[1.0, 1.0, 1.0]", "[1.0, 0.5, 0.25]"):
        torch.manual_seed(0)
        detector = build_detector(coco_config("shapes", "DET.LOSS_WEIGHTS", weights), 3)
        found.append(seeded_losses(detector, scene([(64, 64)]), torch.float64)[0])
    for kind in ("class", "box", "mask"):
        for number, weight in ((1, 1), (2, 0.5), (3, 0.25)):
            name = f"{kind}{number}"
            assert found[0][name] > 0 and found[1][name] == pytest.approx(weight * found[0][name]), name


def test_suppression_is_among_boxes_of_a_class_and_the_best_are_kept():
    heads = CascadeHeads([], [], [], 32, 0.25, LIMITS._replace(per_image=4))
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [40, 0, 90, 10]])
    scores = torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.8, 0.7], [0.0, 0.04, 0.6], [0.0, 0.5, 0.2]])
    boxes, size = boxes[:, None].expand(-1, 3, -1), (20, 60)

    def kept():
        found = heads.keep_best(boxes, scores, size)
        return list(zip(found["boxes"][:, 2].tolist(), found["labels"].tolist(), found["scores"].tolist()))

    # The second box of class 1 and the first of class 2 lie on better ones; the last is cut to the image.
    expected = [(10, 1, 0.9), (10, 2, 0.7), (30, 2, 0.6), (60, 1, 0.5), (60, 2, 0.2)]
    assert kept() == [(x, label, pytest.approx(score)) for x, label, score in expected[:4]]
    heads.limits = LIMITS
    assert kept() == [(x, label, pytest.approx(score)) for x, label, score in expected]


def test_detections_average_logits_and_mask_probabilities_over_the_stages():
    detector = build_detector(coco_config(), 3).eval()
    heads, channels = detector.heads, coco_config().DET.CHANNELS
    maps = [torch.randn(1, channels, 40 // 2**i, 40 // 2**i) for i in range(3)]
    proposals = [torch.tensor([[8.0, 8, 40, 40], [60, 50, 120, 110]])]
    with torch.no_grad():
        for stage in heads.stages:
            stage.box_predictor.cls_score.weight *= 50  # so that the stages differ
            stage.box_predictor.bbox_pred.weight.zero_()
        boxes = heads.box_pool(maps, proposals)
        logits = [stage.predict_boxes(boxes)[0] for stage in heads.stages]
        heads.limits = heads.limits._replace(score_threshold=0.0)
        (found,) = heads.detect(maps, proposals, [(160, 160)])
        assert len(found["boxes"]) == 6  # two boxes of three classes
        scores = (sum(logits) / 3).softmax(1)[:, 1:].flatten().sort(descending=True).values
        torch.testing.assert_close(found["scores"], scores)
        other = (sum(x.softmax(1) for x in logits) / 3)[:, 1:].flatten().sort(descending=True).values
        assert (scores - other).abs().max() > 0.01
        pooled = heads.mask_pool(maps, [found["boxes"]])
        masks = sum(stage.predict_masks(pooled).sigmoid() for stage in heads.stages) / 3
    for i, label in enumerate(found["labels"]):
        torch.testing.assert_close(found["masks"][i, 0], masks[i, label])


def seeded_losses(detector, batch, dtype):
    detector = detector.to(dtype).train()
    detector.zero_grad()
    images, sizes, targets = batch
    targets = [dict(target, boxes=target["boxes"].to(dtype)) for target in targets]
    torch.manual_seed(3)
    losses = detector(images.to(dtype), sizes, targets)
    sum(losses.values()).backward()
    gradients = [p.grad.double() for p in detector.parameters() if p.grad is not None]
    return {name: loss.item() for name, loss in losses.items()}, gradients


def test_a_training_step_is_that_of_float64():
    torch.manual_seed(0)
    # All proposals and anchors are sampled, so that rounding changes no choice.
    opts = ["DET.RPN_SAMPLES", 10**6, "DET.ROI_SAMPLES", 10**6, "DET.PROPOSALS_TRAIN", 40]
    detector = build_detector(coco_config("shapes", *opts), 3)
    batch = scene([(64, 64), (50, 61)])
    exact, exact_gradients = seeded_losses(detector, batch, torch.float64)
    found, gradients = seeded_losses(detector, batch, torch.float32)
    of_stages = {f"{kind}{i}" for kind in ("class", "box", "mask") for i in (1, 2, 3)}
    assert set(found) == {"objectness", "rpn_box_reg", *of_stages}
    for name, loss in found.items():
        assert loss == pytest.approx(exact[name], rel=2e-3, abs=1e-5), name
    norm = math.sqrt(sum(g.square().sum().item() for g in exact_gradients))
    error = math.sqrt(sum((g - e).square().sum().item() for g, e in zip(gradients, exact_gradients)))
    assert error < 0.02 * norm


PAPER = [("tiny", 86, 748, 0.2), ("small", 107, 842, 0.2), ("base", 145, 990, 0.3)]
README = [("tiny", 83, 731, 0.2), ("small", 113, 831, 0.2), ("base", 142, 956, 0.3)]


@pytest.mark.parametrize(
    "folder, size, parameters, macs, drop_path",
    [("", *row) for row in PAPER] + [("cvpr22/", *row) for row in README],
)
def test_parameters_and_macs_are_the_official_ones(folder, size, parameters, macs, drop_path):
    settings = coco_config(f"{folder}cascade_mask_rcnn_msg_{size}_3x")
    assert drop_path == settings.MODEL.DROP_PATH_RATE
    with torch.device("meta"):
        detector = build_detector(settings, 80)
    assert round(sum(p.numel() for p in detector.parameters()) / 1e6) == parameters
    assert count_detector_macs(detector, 800, 1280) / 1e9 == pytest.approx(macs, rel=0.03)


def test_position_tables_messengers_and_norms_are_not_decayed():
    from optimizer import parameter_groups

    detector = build_detector(coco_config(), 3)
    names = {id(p): name for name, p in detector.named_parameters()}
    decayed = {names[id(p)] for p in parameter_groups(detector)[0]["params"]}
    for word in ("norm", "msg_tokens", "rel_pos_msg", "relative_position_bias_table", "bias"):
        assert not any(word in name for name in decayed), word
    assert "heads.stages.2.box_predictor.cls_score.weight" in decayed


def test_a_classifiers_weights_become_the_backbones():
    detector = build_detector(coco_config(), 3)
    classifier = fill_weights(build_model(coco_config()))
    for checkpoint in (dict(model=classifier.state_dict(), epoch=3), classifier.state_dict()):
        load_pretrained(detector, checkpoint, "classifier.pth")
        for name, value in detector.backbone.model.state_dict().items():
            assert torch.equal(value, classifier.state_dict()[name]), name
    with pytest.raises(ckpt.CheckpointError, match="wrong.pth does not fit the model"):
        load_pretrained(detector, micro(depths=(2, 2, 4)).state_dict(), "wrong.pth")


def test_a_detector_of_other_categories_gets_new_predictors():
    torch.manual_seed(0)
    old, new = build_detector(coco_config(), 3), build_detector(coco_config(), 3)
    new.classes, before = ["bus", "car", "dog"], {name: x.clone() for name, x in new.state_dict().items()}
    checkpoint = dict(model=old.state_dict(), classes=["bus", "car", "cat"])
    with pytest.raises(ckpt.CheckpointError, match="only the checkpoint has 'cat'; only the data has 'dog'"):
        ckpt.load_weights(new, checkpoint, "detector.pth")
    load_pretrained(new, checkpoint, "detector.pth")
    for name, value in new.state_dict().items():
        of_class = "box_predictor" in name or "mask_fcn_logits" in name
        assert torch.equal(value, before[name] if of_class else old.state_dict()[name]), name
