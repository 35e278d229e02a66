"""Learning rates, parameter groups, accumulation."""

import pytest
import torch
from helpers import digits_config, micro, reference
from torch import nn

from lr_scheduler import build_scheduler
from main import evaluate, train_one_epoch
from optimizer import build_optimizer, parameter_groups


def rates(name, updates, *opts):
    config = digits_config(
        "TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.EPOCHS", 300, "TRAIN.WARMUP_EPOCHS", 20,
        "TRAIN.BASE_LR", 5e-4, "TRAIN.WARMUP_LR", 5e-7, "TRAIN.MIN_LR", 5e-6, *opts,
    )  # fmt: skip
    optimizer = build_optimizer(config, nn_model(), lr_scale=2.0)
    scheduler = build_scheduler(config, optimizer, 1251, lr_scale=2.0)
    found = {}
    for update in updates:
        scheduler.step_update(update)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found[update] = optimizer.param_groups[0]["lr"]
    return found


def nn_model():
    model = nn.Linear(2, 2)
    model.no_weight_decay = set
    return model


def test_cosine_schedule_has_the_reference_values():
    schedule = reference("lr_schedule.json")
    expected = {int(update): lr for update, lr in schedule["lr_at_update"].items()}
    assert rates("cosine", expected) == pytest.approx(expected, rel=1e-12)


def test_linear_schedule_falls_from_the_base_to_the_minimum_rate():
    first, last = 20 * 1251, 300 * 1251
    middle = (first + last) // 2
    expected = {
        0: 1e-6,
        first // 2: 1e-6 + (1e-3 - 1e-6) / 2,
        first: 1e-3,
        middle: (1e-3 + 1e-5) / 2,
        last: 1e-5,
    }
    assert rates("linear", expected) == pytest.approx(expected, rel=1e-12)


def test_step_schedule_decays_every_given_number_of_epochs():
    expected = {10 * 1251: 5.005e-4, 29 * 1251: 1e-3, 30 * 1251: 1e-4, 89 * 1251: 1e-5, 90 * 1251: 1e-6}
    assert rates("step", expected) == pytest.approx(expected, rel=1e-12)


def test_weight_decay_spares_norms_biases_positions_and_messengers():
    model = micro(ape=True)
    names = {id(p): n for n, p in model.named_parameters()}
    decay, spared = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model))
    assert len(decay) + len(spared) == len(names)
    assert all(name.endswith(".weight") and "norm" not in name for name in decay)
    expected = (
        "bias",
        "norm.weight",
        "norm1.weight",
        "norm2.weight",
        "relative_position_bias_table",
        "rel_pos_msg",
    )
    assert all(name.endswith((*expected, "msg_tokens", "absolute_pos_embed")) for name in spared)
    assert parameter_groups(model)[1]["weight_decay"] == 0.0


class Fixed(list):
    """A list of batches that passes for a training loader."""

    class batch_sampler:  # noqa: N801
        world_size = 1

        @staticmethod
        def set_epoch(epoch):
            pass


class Quiet:
    """A logger that keeps its lines."""

    def __init__(self):
        self.lines = []

    def info(self, line):
        self.lines.append(line)


def train(batches, accumulation, clip_grad=0.5, optimizer="sgd"):
    model = micro().double()
    config = digits_config("TRAIN.OPTIMIZER.NAME", optimizer)
    loader = Fixed(batches)
    loader.batch_sampler.accumulation = accumulation
    loader.batch_sampler.batch_size = len(batches[0][0])
    loader.batch_sampler.updates = len(batches) // accumulation
    optimizer = build_optimizer(config, model, 1.0)
    scheduler = build_scheduler(config, optimizer, loader.batch_sampler.updates, 1.0)
    logger = Quiet()
    result = train_one_epoch(
        model, loader, nn.CrossEntropyLoss(), None, optimizer, scheduler, torch.amp.GradScaler(enabled=False),
        torch.device("cpu"), None, 3, 20, clip_grad, 1, (0, 0), None, logger,
    )  # fmt: skip
    return model, result, logger


def test_accumulation_equals_the_large_batch_and_clips_once():
    torch.manual_seed(0)
    images, targets = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(10, (16,))
    whole, result, _ = train(list(zip(images.split(8), targets.split(8))), 1)
    parts, accumulated, _ = train(list(zip(images.split(2), targets.split(2))), 4)
    assert result["grad_norm"] > 0.5  # the clipping did something
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # the loss is taken in float32
    assert accumulated["train_loss"] == pytest.approx(result["train_loss"], rel=1e-6)
    assert accumulated["grad_norm"] == pytest.approx(result["grad_norm"], rel=1e-6)


def test_log_lines_have_the_fields_of_swin():
    batches = [(torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 2]))] * 2
    _, _, logger = train(batches, 1)
    for update, line in enumerate(logger.lines[:2]):
        assert line.startswith(f"Train: [3/20][{update}/2]\teta ")
        for field in (" lr ", "\ttime ", "\tloss ", "\tgrad_norm ", "\tmem "):
            assert field in line
    assert logger.lines[2].startswith("EPOCH 3 training takes")


def test_evaluation_figures_are_means_over_images_not_batches():
    model = micro()
    images, targets = torch.randn(7, 3, 32, 32), torch.arange(7)
    with torch.no_grad():
        logits = model(images).double()
    order = logits.argsort(1, descending=True)
    expected = dict(
        val_loss=nn.functional.cross_entropy(logits, targets).item(),
        acc1=100 * (order[:, 0] == targets).double().mean().item(),
        acc5=100 * (order[:, :5] == targets[:, None]).any(1).double().mean().item(),
    )
    for size in (1, 3, 7):
        batches = list(zip(images.split(size), targets.split(size)))
        assert evaluate(model, batches, torch.device("cpu"), None, 1, Quiet()) == pytest.approx(
            expected, rel=1e-6
        )
