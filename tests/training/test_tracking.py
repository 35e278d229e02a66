"""What TensorBoard and the tracker are given: read back, and compared with the metrics of the run."""

import json
import os
import struct
import sys
import types

import pytest
import torch
from helpers import (
    Batches,
    assert_same_weights,
    digits_config,
    logged,
    new_run,
    restore,
    run_folder,
    run_main,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import checkpoint as ckpt
from config import flat_config
from data.samplers import TrainBatchSampler
from logger import DRAWN, read_metrics
from training.engine import train_one_epoch
from training.tracking import RunRecord, Tracker, require_tracker
from utils import UserError

ARGUMENTS = ["--cfg", "configs/digits.yaml", "--batch-size", 8, "--opts", "DATA.NUM_WORKERS", 0]
ARGUMENTS += ["PRINT_FREQ", 2, "SAVE_FREQ", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.EPOCHS"]

# A package that writes down what it is given, and fails where the test says so.
STAND_IN = """
import json, os

class Run:
    def write(self, *words):
        with open(os.environ["TRACKED"], "a") as file:
            file.write(json.dumps(words) + "\\n")

    def define_metric(self, *args, **kwargs):
        self.write("define_metric", args, kwargs)

    def log(self, values):
        self.write("log", values)
        if values.get("epoch/epoch") == int(os.environ.get("FAIL_AT", -1)):
            raise ConnectionError("the line is cut")

    def finish(self):
        self.write("finish")

def init(*args, **kwargs):
    Run().write("init", args, kwargs)
    return Run()
"""


def events(folder):
    """TensorBoard's own reader of a folder of events."""
    accumulator = EventAccumulator(str(folder), size_guidance=dict(images=0, scalars=0))
    return accumulator.Reload()


def scalars(folder):
    """All scalars of a folder of events, as {(tag, update): value}."""
    found = events(folder)
    return {(tag, event.step): event.value for tag in found.Tags()["scalars"] for event in found.Scalars(tag)}


def calls(path):
    """What a stand-in was given, in order, as (function, arguments ...)."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def given(path):
    """The scalars that a stand-in was given, as {(tag, update): value}; none of them twice."""
    found = {}
    for name, *arguments in calls(path):
        if name == "log":
            (values,) = arguments
            step = values.pop("update")
            for tag, value in values.items():
                assert (tag, step) not in found
                found[tag, step] = value
    return found


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a package in place of the real wandb, also for runs of main.py; gives the path of its notes."""
    folder, notes = tmp_path / "packages", tmp_path / "notes"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("TRACKED", str(notes))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield notes
    sys.modules.pop("wandb", None)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The output folder of a run of two epochs without a tracker."""
    output = tmp_path_factory.mktemp("output")
    run_main(*ARGUMENTS, 2, "AUG.MIXUP", 0.8, "--data-path", data, "--output", output)
    return output


def test_tensorboard_has_the_metrics_of_every_epoch(trained):
    rows, found = (
        read_metrics(run_folder(trained) / "metrics.jsonl"),
        scalars(run_folder(trained) / "tensorboard"),
    )
    for row in rows:
        for name, value in row.items():
            assert found[f"epoch/{name}", 9 * row["epoch"] + 8] == pytest.approx(value, rel=1e-6)
    assert sorted(step for tag, step in found if tag == "train/loss") == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17]


def test_a_run_with_a_tracker_gives_it_what_tensorboard_gets_and_changes_no_bit(
    stand_in, trained, data, tmp_path
):
    notes, folder = stand_in, run_folder(tmp_path)
    arguments = [*ARGUMENTS, 2, "AUG.MIXUP", 0.8, "LOG.TRACKER", "wandb"]
    run_main(*arguments, "--data-path", data, "--output", tmp_path)
    found, board = given(notes), scalars(folder / "tensorboard")
    assert found == {place: pytest.approx(value, rel=1e-6) for place, value in board.items()}
    (_, (), of_init), *_, last = calls(notes)
    assert of_init["name"] == of_init["id"] and of_init["name"].startswith("digits-default-")
    assert (of_init["resume"], of_init["mode"], of_init["project"]) == ("allow", "offline", "msg-transformer")
    assert of_init["config"]["AUG.MIXUP"] == 0.8 and of_init["dir"] == str(folder) and last == ["finish"]
    assert_same_weights(tmp_path, trained)


def test_a_tracker_takes_values_that_are_no_utf_8(stand_in, tmp_path):
    """What a folder with a name of other bytes looks like in Python cannot be written as UTF-8."""
    notes, odd = stand_in, os.fsdecode(b"images\xff")
    tracker = Tracker(str(tmp_path), f"digits-{odd}", {"DATA.DATA_PATH": odd, "SEED": 0})
    with logged() as lines:
        tracker.start(0, 3)
        tracker.log("train", {"train/loss": 1.0}, 0)
    (_, _, of_init), *_, (name, *_) = calls(notes)
    assert of_init["config"] == {"DATA.DATA_PATH": "images\\udcff", "SEED": 0} and name == "log"
    assert of_init["name"].isascii() and of_init["name"].startswith("digits-images-")
    assert not any("failed" in line for line in lines)


def test_a_resumed_run_repeats_nothing_and_one_from_scratch_is_another(stand_in, tmp_path, capsys):
    notes = stand_in
    for start, updates in ((0, (0, 2, 4)), (2, (2, 4, 6)), (0, (0,))):
        tracker = Tracker(str(tmp_path), "digits/a b", dict(SEED=0))
        tracker.start(start, 9)
        for update in updates:
            tracker.log("train", {"train/loss": 1.0}, update)
        tracker.log("epoch", {"epoch/acc1": 2.0}, updates[-1])
        tracker.finish()
    names = [arguments[1]["name"] for name, *arguments in calls(notes) if name == "init"]
    assert names[0] == names[1] != names[2] and all(name.startswith("digits-a-b-") for name in names)
    logs = [(next(iter(call[1])), call[1]["update"]) for call in calls(notes) if call[0] == "log"]
    of_first = [("train/loss", 0), ("train/loss", 2), ("train/loss", 4), ("epoch/acc1", 4), ("train/loss", 6)]
    assert logs == [*of_first, ("epoch/acc1", 6), ("train/loss", 0), ("epoch/acc1", 0)]
    assert calls(notes).count(["finish"]) == 3 and capsys.readouterr().out == ""


def train_from_checkpoints(folder, updates_per_epoch, epochs):
    """Train the rest of a run on 8 images, whose epochs have so many updates from here on."""
    model, batch_size = nn.Linear(2, 2), 8 // updates_per_epoch
    sampler = TrainBatchSampler(8, batch_size, 1, 0, 1, seed=0)
    run = new_run(folder, model, sampler, digits_config(), epochs=epochs, print_freq=1)
    run.record = RunRecord(str(folder), 0, lambda *_: None, DRAWN)
    run.record.tracker = Tracker(str(folder), "name", {})
    restore(run)
    loader = Batches([(torch.ones(batch_size, 2), None)] * updates_per_epoch)
    for _ in run.epochs_left():
        means = train_one_epoch(run, loader, lambda images, *_: dict(loss=model(images).sum()))
        run.end_epoch(means, dict(acc1=50.0))


def test_fewer_updates_an_epoch_after_a_resume_drop_nothing_that_was_written(stand_in, tmp_path):
    """Two epochs of 8 updates, then two of 2."""
    notes = stand_in
    train_from_checkpoints(tmp_path, 8, epochs=2)
    train_from_checkpoints(tmp_path, 2, epochs=4)
    found = scalars(tmp_path / "tensorboard")
    assert [step for tag, step in found if tag == "epoch/acc1"] == [7, 15, 17, 19]
    assert [step for tag, step in found if tag == "train/loss"] == list(range(20))
    assert given(notes).keys() == found.keys()


def test_a_tracker_gets_epochs_that_are_repeated_with_fewer_updates_after_those_it_has(stand_in, tmp_path):
    notes = stand_in
    train_from_checkpoints(tmp_path, 8, epochs=2)
    (tmp_path / "ckpt_epoch_1.pth").unlink()
    train_from_checkpoints(tmp_path, 2, epochs=4)
    train_from_checkpoints(tmp_path, 2, epochs=5)
    board = scalars(tmp_path / "tensorboard")
    assert [step for tag, step in board if tag == "epoch/epoch"] == [7, 9, 11, 13, 15]
    assert len({arguments[1]["id"] for name, *arguments in calls(notes) if name == "init"}) == 1
    epochs = {step: epoch for (tag, step), epoch in given(notes).items() if tag == "epoch/epoch"}
    assert epochs == {7: 0, 15: 1, 17: 1, 19: 2, 21: 3, 23: 4}
    assert [step for tag, step in given(notes) if tag == "train/loss"] == list(range(24))


def test_a_tracker_that_fails_is_one_warning_and_training_goes_on(stand_in, tmp_path, monkeypatch):
    notes = stand_in
    monkeypatch.setenv("FAIL_AT", "0")
    with logged() as lines:
        train_from_checkpoints(tmp_path, 8, epochs=2)
    assert "".join(lines).count("wandb failed (ConnectionError: the line is cut)") == 1
    assert [call[0] for call in calls(notes)].count("log") == 9
    assert ckpt.in_order(tmp_path) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth"]


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")])  # a folder that wandb left is a module
def test_a_missing_package_is_told(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(UserError, match="^LOG.TRACKER wandb: the package cannot .* pip install wandb, or"):
        require_tracker("wandb")


def test_other_names_are_refused():
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        digits_config("LOG.TRACKER", "wandv")
    assert flat_config(digits_config())["LOG.TRACKER"] == ""


def records_of(path):
    """The records of a file of wandb, which has the log format of LevelDB below a header of 7 bytes."""
    content, place, parts = path.read_bytes(), 7, []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_holds_what_tensorboard_holds(data, tmp_path, monkeypatch):
    """Read from the files of its offline runs, of which a resume adds one with the same id."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = run_folder(tmp_path)
    arguments = [*ARGUMENTS, 2, "LOG.TRACKER", "wandb", "--data-path", data, "--output", tmp_path]
    run_main(*arguments)
    (folder / "ckpt_epoch_1.pth").unlink()
    run_main(*arguments)
    found, ids = {}, set()
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for content in records_of(path):
            record = internal.Record.FromString(content)
            ids |= {record.run.run_id} - {""}
            items = record.history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            tags = [tag for tag in values if tag.startswith(("train/", "epoch/"))]
            assert not any((tag, values["update"]) in found for tag in tags)
            found.update({(tag, values["update"]): values[tag] for tag in tags})
    board = scalars(folder / "tensorboard")
    assert found.keys() == board.keys() and len(ids) == 1
    for (tag, step), value in board.items():
        assert "second" in tag or found[tag, step] == pytest.approx(value, rel=1e-6)


def test_a_tracker_state_that_cannot_be_read_is_one_warning(stand_in, tmp_path):
    (tmp_path / "tracker.json").write_text("{")
    tracker = Tracker(str(tmp_path), "digits", {})
    with logged() as lines:
        tracker.start(5, 9)
        tracker.log("train", {"train/loss": 1.0}, 6)
        tracker.finish()
    assert len(lines) == 1 and "from here on the run is not tracked" in lines[0]
