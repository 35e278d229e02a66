"""Learning rates, parameter groups, accumulation."""

import itertools
import os
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import Batches, digits_config, logged, micro, new_run, reference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint as ckpt
from data.samplers import TrainBatchSampler
from distributed import Compute
from lr_scheduler import build_scheduler
from models import build_model, inference
from optimizer import NonFiniteError, Updater, WeightAverage, build_average, build_optimizer, parameter_groups
from training import engine
from training.engine import train_one_epoch
from training.guard import Guard
from training.run import Progress, Task, build_run
from training.setup import Setup, Start

CPU = Compute(torch.device("cpu"))


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


COSINE = {int(update): lr for update, lr in reference("lr_schedule.json")["lr_at_update"].items()}
FIRST, LAST = 20 * 1251, 300 * 1251  # updates of the warm-up, and of the run


@pytest.mark.parametrize(
    "name, opts, expected",
    [
        ("cosine", [], COSINE),
        (
            "linear",
            [],
            {0: 1e-6, FIRST // 2: 5.005e-4, FIRST: 1e-3, (FIRST + LAST) // 2: 5.05e-4, LAST: 1e-5},
        ),
        (
            "step",
            [],
            {FIRST // 2: 5.005e-4, 29 * 1251: 1e-3, 30 * 1251: 1e-4, 89 * 1251: 1e-5, 90 * 1251: 1e-6},
        ),
        (
            "multistep",
            ["TRAIN.LR_SCHEDULER.MILESTONES", "[27, 33]"],
            {0: 1e-6, 27 * 1251 - 1: 1e-3, 27 * 1251: 1e-4, 33 * 1251 - 1: 1e-4, 33 * 1251: 1e-5},
        ),
        ("step", ["TRAIN.WARMUP_STEPS", 500], {0: 1e-6, 250: 1e-6 + (1e-3 - 1e-6) / 2, 500: 1e-3}),
    ],
)
def test_schedules_have_the_rates_of_the_reference_or_of_their_formulas(name, opts, expected):
    assert rates(name, expected, *opts) == pytest.approx(expected, rel=1e-12)


def test_weight_decay_spares_norms_biases_positions_and_messengers():
    model = micro(ape=True)
    names = {id(p): n for n, p in model.named_parameters()}
    decay, spared = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model))
    assert len(decay) + len(spared) == len(names)
    assert all(name.endswith(".weight") and "norm" not in name for name in decay)
    norms = ("norm.weight", "norm1.weight", "norm2.weight")
    tables = ("relative_position_bias_table", "rel_pos_msg", "msg_tokens", "absolute_pos_embed")
    assert all(name.endswith(("bias", *norms, *tables)) for name in spared)
    assert parameter_groups(model)[1]["weight_decay"] == 0.0


def sgd_run(model, sampler, folder="", max_nonfinite=3, **settings):
    """A run of 20 epochs with SGD that has not begun."""
    opts = ["TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.CLIP_GRAD", 0.5, "TRAIN.MAX_NONFINITE", max_nonfinite]
    return new_run(folder, model, sampler, digits_config(*opts), **dict(epochs=20, print_freq=1) | settings)


def train(batches, accumulation=1, max_nonfinite=3):
    """Train the micro model on given micro-batches as epoch 3 of 20: (model, metrics, log, updater)."""
    torch.manual_seed(0)
    model, size = micro().to(batches[0][0].dtype), len(batches[0][0])
    sampler = TrainBatchSampler(size * len(batches), size, accumulation, 0, 1, seed=0)
    run = sgd_run(model, sampler, max_nonfinite=max_nonfinite)
    run.start_epoch(3)
    criterion = nn.CrossEntropyLoss()

    def losses_of(images, targets, part):
        return dict(loss=criterion(model(images), targets))

    with logged() as lines:
        metrics = train_one_epoch(run, Batches(batches), losses_of)
    return model, metrics, lines, run.updater


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


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
@pytest.mark.parametrize("clip_grad, moved", [(0.0, 5.0), (4.9, 4.9), (5.1, 5.0)])
def test_gradients_are_cut_to_the_threshold_and_left_alone_below_it(clip_grad, moved, amp_dtype):
    """The gradient is (3, 4) and the rate 1, so that the weights move as far as the gradient is long."""
    model = nn.Linear(2, 1, bias=False)
    before, direction = model.weight.detach().clone(), torch.tensor([[3.0, 4.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(model, optimizer, Compute(torch.device("cpu"), amp_dtype), 1, clip_grad, 3)
    with updater.micro_batch(0):
        updater.backward((model.weight * direction).sum())
    assert updater.update().item() == pytest.approx(5)  # without the scale of the loss
    torch.testing.assert_close(before - model.weight, direction * moved / 5)


def drawn(rank, seed, epoch):
    """What each of two updates of an epoch draws at random on a rank."""
    model, sampler, found = nn_model(), TrainBatchSampler(8, 2, 1, rank, 2, seed), []

    def losses_of(images, targets, part):
        found.append(torch.rand(1).item())
        return dict(loss=model(images).sum())

    run = sgd_run(model, sampler)
    run.start_epoch(epoch)
    train_one_epoch(run, Batches([(torch.ones(2, 2), None)] * 2), losses_of)
    return found


def test_ranks_seeds_epochs_and_updates_draw_different_dropout():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = [number for place in places for number in drawn(*place)]
    assert len(found) == len(set(found)) == 8
    assert drawn(1, 0, 0) == found[2:4]


def test_micro_batches_leave_memory_in_turn_and_a_broken_epoch_closes_its_loader():
    model, events, images = nn_model(), [], []

    class Loader:
        paths = ()

        def __iter__(self):
            try:
                for number in range(6):
                    events.append((number, sum(image() is not None for image in images)))
                    image = torch.ones(2, 2)
                    images.append(weakref.ref(image))
                    yield image, number
                    del image
            finally:
                events.append("closed")

    def losses_of(images, number, part):
        assert part == number % 3
        if number == 4:
            raise ZeroDivisionError
        return dict(loss=model(images).sum())

    run = sgd_run(model, TrainBatchSampler(12, 2, 3, 0, 1, seed=0))
    run.start_epoch(0)
    with pytest.raises(ZeroDivisionError) as error:
        train_one_epoch(run, Loader(), losses_of)
    assert error.tb  # which still holds the frames of the epoch
    assert events == [(0, 0), *((number, 1) for number in range(1, 5)), "closed"]


def test_a_run_of_another_size_goes_on_between_two_updates_of_the_schedule():
    """A run of smaller updates left an epoch after 2.5 of today's."""
    run = sgd_run(nn_model(), TrainBatchSampler(100, 8, 1, 0, 1, seed=0))  # 12 updates of an epoch
    run.progress.epoch, run.progress.images = 2, 20
    assert run.position() == 2 * 12 + 2.5


def test_means_of_an_epoch_go_on_with_the_sums_of_each_rank():
    saved = dict(epoch=3, images=64, updates=8, loss=[1.0, 3.0], norm=[5.0, 5.0], parts=dict(box=[0.5, 1.5]))

    def restored(rank, world_size):
        progress = Progress(0, torch.device("cpu"))
        progress.load_state_dict(saved, rank, world_size)
        return tuple(progress.sums[name].item() for name in ("loss", "norm", "loss_box"))

    assert restored(0, 2) == (1, 5, 0.5) and restored(1, 2) == (3, 5, 1.5)
    # The mean stays the same where their number changes.
    assert restored(0, 1) == restored(0, 3) == restored(2, 3) == (2, 5, 1)


def test_the_first_of_the_best_epochs_and_the_last_epoch_are_kept(tmp_path):
    model, sampler, scores = nn_model(), TrainBatchSampler(4, 2, 1, 0, 1, seed=0), [0, 50, 50, 40]
    run, batches = sgd_run(model, sampler, tmp_path, epochs=4, save_freq=2), [(torch.ones(2, 2), None)] * 2
    for epoch in run.epochs_left():
        means = train_one_epoch(run, Batches(batches), lambda images, *_: dict(loss=model(images).sum()))
        run.end_epoch(means, dict(acc1=scores[epoch]))
    best = ckpt.read_checkpoint(os.path.join(tmp_path, ckpt.BEST))
    assert (best["epoch"], best["max_accuracy"]) == (1, 50)
    assert ckpt.in_order(tmp_path) == [f"ckpt_epoch_{epoch}.pth" for epoch in (0, 2, 3)]


def test_checkpoints_are_due_after_so_many_updates_or_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def due(steps, minutes, seconds):
        now[0], guard, found = 0.0, Guard(steps, minutes), []
        guard.start()
        for now[0] in seconds:
            found.append(guard.after_update()[0])
        return [second for second, save in zip(seconds, found) if save]

    assert due(3, 0, range(1, 8)) == [3, 6]
    assert due(0, 2, range(10, 400, 10)) == [120, 240, 360]
    assert due(0, 0, range(10, 400, 10)) == []


def test_log_lines_have_the_fields_of_swin_and_say_how_long_the_epoch_and_the_run_still_take(monkeypatch):
    """A clock that goes on by 10 s whenever the epoch looks at it; 16 epochs of 2 updates follow."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(engine, "time", SimpleNamespace(time=lambda: next(clock)))
    _, metrics, lines, _ = train([(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))] * 2)
    for update, left in enumerate(("eta 0:00:10 (run 0:05:30)", "eta 0:00:00 (run 0:05:20)")):
        assert lines[update].startswith(f"Train: [3/20][{update}/2]\t{left} lr ")
        for field in ("\ttime 10.0000 (10.0000)", "\tloss ", "\tgrad_norm ", "\tmem "):
            assert field in lines[update]
    assert lines[2].startswith("EPOCH 3 training takes")
    assert metrics["seconds"] == 30 and metrics["images_per_second"] == pytest.approx(4 / 30)


def test_updates_with_bad_gradients_are_skipped_and_counted():
    good, bad = torch.randn(2, 3, 32, 32), torch.full((2, 3, 32, 32), float("nan"))
    targets = torch.tensor([1, 2])
    with_bad, _, lines, updater = train(
        [(x, targets) for x in [bad, good, *[bad, bad, good] * 3]], max_nonfinite=3
    )
    assert updater.skipped == 7 and updater.skipped_in_a_row == 0
    assert lines[-2].endswith("skipped 7")
    assert updater.scaler.get_scale() == 1.0
    assert all(torch.isfinite(parameter).all() for parameter in with_bad.parameters())
    untouched, *_ = train([(bad, targets)] * 3)
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), micro().parameters()))


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_moves_once_for_every_update_that_is_not_skipped(warmup):
    """The rate is 1 and the gradient -1, so that the weight counts the updates; the third is skipped."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    updater = Updater(model, torch.optim.SGD(model.parameters(), lr=1.0), CPU, 2, 0.0, 0)
    updater.average = WeightAverage(model, 0.7, warmup)
    average, done, expected = updater.average.model.weight, 0, 0.0
    for update in range(8):
        for part in range(2):
            with updater.micro_batch(part):
                updater.backward(-model.weight.sum() * (float("nan") if update == 2 else 1))
        updater.update()
        if update != 2:
            done += 1
            decay = min(0.7, 1 - done ** (-2 / 3)) if warmup else 0.7 * (done > 1)
            expected = decay * expected + (1 - decay) * done
        assert average.item() == pytest.approx(expected, rel=1e-12) and model.weight.item() == done
    assert updater.average.updates == 7 and updater.average.model.training is False


class CountReads(TorchDispatchMode):
    """Counts how often Python reads the value of a tensor, for which it would wait for a GPU."""

    reads = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.reads += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("averages, reads", [(False, 1), (True, 2)])
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_an_update_reads_the_count_of_the_update_before_and_for_an_average_whether_it_was_skipped(
    averages, reads, amp_dtype
):
    model, images = micro().train(), torch.randn(2, 3, 32, 32)
    optimizer = build_optimizer(digits_config(), model, 1.0)
    updater = Updater(model, optimizer, Compute(torch.device("cpu"), amp_dtype), 1, 5.0, 20)
    updater.average = WeightAverage(model, 0.9, False) if averages else None
    for _ in range(2):
        with CountReads() as count:
            with updater.micro_batch(0), updater.compute.autocast():
                loss = model(images).float().square().mean()
            updater.backward(loss)
            updater.update()
    assert count.reads == reads


def test_an_average_follows_the_weights_of_a_short_run_by_default():
    """Weights that step from 0 to 1 after the first of 90 updates, as many as a small fine-tuning has."""
    model = nn.Linear(1, 1, bias=False)
    average = build_average(digits_config("TRAIN.EMA.ENABLED", True), model)
    for update in range(90):
        nn.init.constant_(model.weight, min(update, 1))
        average.update(model)
    assert average.model.weight.item() > 0.99


@pytest.mark.parametrize(
    "opts, words",
    [
        ({"EMA.WARMUP": False}, "TRAIN.EMA.DECAY 0.9999 is too high for an average over 90 updates: 99%"),
        ({"EMA.WARMUP": False, "EMA.DECAY": 0.98}, "or DECAY to 0.966667 or less"),
        ({"EMA.WARMUP": False, "EMA.DECAY": 0.966667}, ""),
        ({"WARMUP_STEPS": 90}, "TRAIN.WARMUP_STEPS covers the whole run: TRAIN.BASE_LR is never reached"),
        ({"WARMUP_STEPS": 89}, ""),
        ({"WARMUP_EPOCHS": 10}, "TRAIN.WARMUP_EPOCHS covers the whole run: TRAIN.BASE_LR is never reached"),
    ],
)
def test_a_run_that_is_too_short_for_its_settings_says_so_before_it_starts(tmp_path, opts, words):
    """10 epochs of 9 updates."""
    opts = {"EPOCHS": 10, "WARMUP_EPOCHS": 0, "EMA.ENABLED": True, **opts}
    words_of = [word for key, value in opts.items() for word in (f"TRAIN.{key}", value)]
    config = digits_config(*words_of, output=str(tmp_path))
    os.makedirs(config.OUTPUT)
    sampler = TrainBatchSampler(18, 2, 1, 0, 1, seed=0)
    with logged() as lines:
        build_run(config, nn_model(), sampler, Setup("train", CPU, 0, 1, Guard(0, 0), Start()), Task())
    found = [line for line in lines if "covers the whole" in line or "too high" in line]
    assert len(found) == bool(words) and words in "".join(found)


def test_the_average_computes_with_its_own_weights():
    """The copy's fast linear layers must not be those of the model that trains on."""
    model = build_model(digits_config())
    average = WeightAverage(model, 0.5, warmup=False)
    images = torch.randn(2, 3, 32, 32)
    with inference(model):
        before = model(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for found in (average.model(images), average.model.eval()(images)):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)
    with inference(average.model):
        torch.testing.assert_close(average.model(images), before, rtol=1e-4, atol=1e-5)


def test_too_many_bad_updates_in_a_row_end_the_run_with_their_files():
    good, bad = ((torch.full((2, 3, 32, 32), x), torch.tensor([1, 2])) for x in (1.0, float("nan")))
    with logged() as lines, pytest.raises(NonFiniteError, match=r"3 updates in a row; .* held ") as error:
        train([good, bad, bad, bad, good, good])
    title, *files = lines[-1].split("\n")
    sampler = TrainBatchSampler(12, 2, 1, 0, 1, seed=0)
    sampler.start(3)
    assert files == [Batches.paths[index] for index in sampler.indices_of(3)] and title.startswith("the last")
    assert ", ".join(files) in str(error.value)


def test_the_loss_scale_of_float16_goes_on_after_a_resume():
    def updater():
        model = micro()
        optimizer = build_optimizer(digits_config(), model, 1.0)
        return Updater(model, optimizer, Compute(torch.device("cpu"), torch.float16), 1, 5.0, 20)

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
    updater = Updater(model, build_optimizer(digits_config(), model, 1.0), CPU, 1, clip_grad, 20)
    before = [parameter.clone() for parameter in model.parameters()]
    with updater.micro_batch(0):
        updater.backward(model(torch.randn(2, 3, 32, 32)).sum() * 1e30)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert not torch.isfinite(updater.update())
    assert updater.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
