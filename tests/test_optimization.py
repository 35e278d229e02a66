"""Learning rates, parameter groups, accumulation."""

import signal

import pytest
import torch
from helpers import digits_config, micro, reference
from torch import nn

from data.samplers import TrainBatchSampler
from engine import NonFiniteError, Run, SaveSchedule, Updater, train_one_epoch
from lr_scheduler import build_scheduler
from main import evaluate
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


class Quiet:
    """A logger that keeps its lines."""

    def __init__(self):
        self.lines = []

    def info(self, line):
        self.lines.append(line)

    warning = error = info


class Batches(list):
    """A list of batches that passes for a training loader."""

    paths = [f"{index}.png" for index in range(64)]


@pytest.fixture(autouse=True)
def signal_handlers():
    """Give pytest back the signals that a SaveSchedule takes."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def train(batches, accumulation=1, clip_grad=0.5, max_nonfinite=3):
    """Train the micro model on given micro-batches as epoch 3 of 20: (model, metrics, log, updater)."""
    torch.manual_seed(0)
    model, size = micro().to(batches[0][0].dtype), len(batches[0][0])
    config = digits_config("TRAIN.OPTIMIZER.NAME", "sgd")
    sampler = TrainBatchSampler(size * len(batches), size, accumulation, 0, 1, seed=0)
    optimizer = build_optimizer(config, model, 1.0)
    scheduler = build_scheduler(config, optimizer, sampler.updates_per_epoch, 1.0)
    updater = Updater(model, optimizer, torch.device("cpu"), None, accumulation, clip_grad, max_nonfinite)
    run = Run(model, updater, scheduler, sampler, "", "", 0, False, Quiet())
    run.start_epoch(3)
    criterion = nn.CrossEntropyLoss()

    def losses_of(images, targets, part):
        return dict(loss=criterion(model(images), targets))

    metrics = train_one_epoch(run, Batches(batches), losses_of, SaveSchedule(0, 0), 0, 20, 1, None)
    return model, metrics, run.logger.lines, updater


def test_accumulation_equals_the_large_batch_and_clips_once():
    torch.manual_seed(0)
    images, targets = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(10, (16,))
    whole, result, *_ = train(list(zip(images.split(8), targets.split(8))), 1)
    parts, accumulated, *_ = train(list(zip(images.split(2), targets.split(2))), 4)
    assert result["grad_norm"] > 0.5  # the clipping did something
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # the loss is taken in float32
    assert accumulated["train_loss"] == pytest.approx(result["train_loss"], rel=1e-6)
    assert accumulated["grad_norm"] == pytest.approx(result["grad_norm"], rel=1e-6)


def test_log_lines_have_the_fields_of_swin():
    _, _, lines, _ = train([(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))] * 2)
    for update, line in enumerate(lines[:2]):
        assert line.startswith(f"Train: [3/20][{update}/2]\teta ")
        for field in (" lr ", "\ttime ", "\tloss ", "\tgrad_norm ", "\tmem "):
            assert field in line
    assert lines[2].startswith("EPOCH 3 training takes")


def test_updates_with_bad_gradients_are_skipped_and_counted():
    good, bad = torch.randn(2, 3, 32, 32), torch.full((2, 3, 32, 32), float("nan"))
    targets = torch.tensor([1, 2])
    with_bad, _, lines, updater = train(
        [(x, targets) for x in [bad, good, *[bad, bad, good] * 80]], max_nonfinite=3
    )
    assert updater.skipped == 161 and updater.skipped_in_a_row == 0
    assert lines[-2].endswith("skipped 161")
    assert updater.scaler.get_scale() == 1.0
    assert all(torch.isfinite(parameter).all() for parameter in with_bad.parameters())
    untouched, *_ = train([(bad, targets)] * 3)
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), micro().parameters()))


def test_too_many_bad_updates_in_a_row_end_the_run_with_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = (torch.full((2, 3, 32, 32), float("nan")), torch.tensor([1, 2]))
    with pytest.raises(NonFiniteError, match=r"3 updates in a row; .* held \d+.png, \d+.png") as error:
        train([bad] * 8)
    files = (tmp_path / "nonfinite_rank0.txt").read_text().split()
    assert len(files) == 2 and files[0] in str(error.value)


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


def test_the_loss_scale_of_float16_goes_on_after_a_resume():
    def updater():
        model = micro()
        optimizer = build_optimizer(digits_config(), model, 1.0)
        return Updater(model, optimizer, torch.device("cpu"), torch.float16, 1, 5.0, 20)

    first, second = updater(), updater()
    with first.micro_batch(0):
        first.backward(first.model(torch.randn(2, 3, 32, 32)).sum() * float("inf"))
    first.update()
    assert first.scaler.get_scale() == 2**15  # halved from 2**16
    second.load_state_dict(first.state_dict())
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.skipped == second.skipped_in_a_row == 1


@pytest.mark.parametrize("clip_grad", [0.0, 5.0])
def test_finite_gradients_whose_norm_overflows_change_nothing(clip_grad):
    model = micro()
    updater = Updater(
        model, build_optimizer(digits_config(), model, 1.0), torch.device("cpu"), None, 1, clip_grad, 20
    )
    before = [parameter.clone() for parameter in model.parameters()]
    with updater.micro_batch(0):
        updater.backward(model(torch.randn(2, 3, 32, 32)).sum() * 1e30)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert not torch.isfinite(updater.update())
    assert updater.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
