"""A run that is killed at any moment and started again ends with the same bits as one that never was."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, run_main, write_images

import checkpoint as ckpt
from data.samplers import TrainBatchSampler

ARGUMENTS = ["--cfg", "configs/digits.yaml", "--batch-size", "4", "--opts", "DATA.NUM_WORKERS", "1"]
ARGUMENTS += ["MODEL.DROP_RATE", "0.1", "MODEL.DROP_PATH_RATE", "0.2", "AUG.MIXUP", "0.8", "PRINT_FREQ", "1"]
ARGUMENTS += ["TRAIN.WARMUP_EPOCHS", "1", "TRAIN.EPOCHS", "2", "SAVE_FREQ", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", 24)
    write_images(folder / "val", 3, seed=1)
    return folder


def losses(folder):
    """The logged loss and gradient norm of every update, and the metrics of every epoch but its times."""
    pattern = r"Train: \[(\d+)/\d+\]\[(\d+)/\d+\].*loss ([\d.]+ \([\d.]+\))\tgrad_norm ([\d.]+ \([\d.]+\))"
    log = (folder / "log_rank0.txt").read_text()
    updates = {(epoch, update): values for epoch, update, *values in re.findall(pattern, log)}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second")
    return updates, [{name: value for name, value in row.items() if name not in times} for row in rows]


def assert_same_run(folder, undisturbed):
    assert losses(folder) == losses(undisturbed)
    last = ckpt.in_order(undisturbed)[-1]
    ours, expected = (ckpt.read_checkpoint(str(f / last)) for f in (folder, undisturbed))
    assert ours["max_accuracy"] == expected["max_accuracy"]
    for name, weight in expected["model"].items():
        assert torch.equal(weight, ours["model"][name]), name
    for index, moments in expected["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, ours["optimizer"]["state"][index][name]), (index, name)


def start(arguments, processes, log):
    """Start main.py on one process or more; returns the Popen."""
    command = [sys.executable, "main.py"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "main.py"]
    command = [*command, *map(str, arguments), "--device", "cpu"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def kill_until_done(arguments, processes, folder, kills, rng, patience=900):
    """Start the run again and again, killing everything at random moments, saves in progress among them.

    Returns:
        Kills that hit the run, and how many of them left a half-written checkpoint behind.
    """
    log_path, hits, torn = folder.parents[2] / "console.txt", 0, 0
    deadline = time.monotonic() + patience
    while True:
        assert time.monotonic() < deadline, log_path.read_text()[-3000:]
        with open(log_path, "ab") as log:
            size = log.tell()
            run = start(arguments, processes, log)
            aim, rest = rng.choice(["start", "update", "save", "save"]), rng.random() * 0.3
            while run.poll() is None and hits < kills:
                with open(log_path, "rb") as text:
                    text.seek(size)
                    trains = b"Train: " in text.read()
                if aim == "start" or (aim == "update" and trains):
                    time.sleep(10 * rest if aim == "start" else rest)
                    break
                if aim == "save" and trains and unfinished(folder):
                    break
                time.sleep(0.0005)
            if run.poll() is None and hits < kills:
                # torchrun starts its workers in sessions of their own: the command line finds them all.
                subprocess.run(["pkill", "-9", "-f", str(folder.parents[1])], check=False)
                hits += 1
                run.wait()
                torn += unfinished(folder)
                continue
            assert run.wait() == 0, log_path.read_text()[-3000:]
            return hits, torn


def unfinished(folder):
    """Whether a checkpoint is half-written."""
    return folder.exists() and any(name.endswith(".pth.tmp") for name in os.listdir(folder))


def disturbed_run(tmp_path, data, count, processes, accumulation, kills, epochs):
    arguments = [*ARGUMENTS, "TRAIN.ACCUMULATION_STEPS", accumulation, "TRAIN.EPOCHS", epochs]
    where = ["--data-path", data, "--output"]
    calm, folder = tmp_path / "calm", tmp_path / "disturbed" / "digits" / "default"
    run_main(*arguments, *where, calm, processes=processes)
    arguments += ["TRAIN.SAVE_STEPS", 1, *where, tmp_path / "disturbed"]
    hits, torn = kill_until_done(arguments, processes, folder, kills, random.Random(accumulation))
    assert_same_run(folder, calm / "digits" / "default")
    count("kills survived bit for bit", hits)
    count("of them in the middle of a save", torn)
    assert hits == kills


def test_resume_is_bit_exact_after_kills(tmp_path, data, count):
    disturbed_run(tmp_path, data, count, processes=1, accumulation=2, kills=3, epochs=2)


@pytest.mark.chaos
@pytest.mark.parametrize("processes, accumulation", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_resume_is_bit_exact_after_20_kills(tmp_path, data, count, processes, accumulation):
    disturbed_run(tmp_path, data, count, processes, accumulation, kills=20, epochs=3 * accumulation)


def test_resuming_asks_for_unseen_images_only():
    sampler = TrainBatchSampler(72, 4, 1, 0, 1, seed=0)
    first = [index for batch in list(sampler)[:3] for _, index in batch]
    sampler.start(0, images=12)
    rest = [index for batch in sampler for _, index in batch]
    assert sorted(first + rest) == list(range(72))


@pytest.mark.parametrize("batch_size, world_size", [(4, 1), (5, 1), (4, 2), (3, 3)])
def test_another_size_goes_on_with_the_unseen_images(batch_size, world_size):
    seen = [index for batch in list(TrainBatchSampler(72, 8, 1, 0, 1, seed=0))[:4] for _, index in batch]
    rest = []
    for rank in range(world_size):
        sampler = TrainBatchSampler(72, batch_size, 1, rank, world_size, seed=0)
        sampler.start(0, images=32)
        rest += [index for batch in sampler for _, index in batch]
    assert not set(seen) & set(rest) and len(set(rest)) == len(rest)
    assert len(seen) + len(rest) > 72 - batch_size * world_size


def test_another_number_of_processes_resumes_and_says_what_changed(tmp_path, data):
    arguments = [*ARGUMENTS, "TRAIN.SAVE_STEPS", 1, "--data-path", data, "--output", tmp_path]
    folder = tmp_path / "digits" / "default"
    log_path = tmp_path / "console.txt"
    with open(log_path, "ab") as log:
        run = start(arguments, 1, log)
        while b"[0/2][5/" not in log_path.read_bytes():
            assert run.poll() is None, log_path.read_text()
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75, log_path.read_text()
    assert "stopped by SIGTERM" in log_path.read_text()
    images = ckpt.place_of(ckpt.in_order(folder)[-1])[1]
    printed = run_main(*arguments, processes=2).stdout
    assert "images per update: 4 before, 8 now" in printed
    assert f"goes on after its first {images} images" in printed
    updates = (72 - images) // 8 + images // 4
    assert f"[0/2][{updates - 1}/{updates}]" in printed and "trained epochs 0 to 1" in printed


def test_a_full_disk_never_damages_a_checkpoint(tmp_path, data):
    """Files may grow to 8 MB, half a checkpoint, as if the disk were full then."""
    where = ["--data-path", data, "--output", tmp_path, "--device", "cpu"]
    run_main(*ARGUMENTS, "TRAIN.EPOCHS", "1", *where[:-2])
    folder = tmp_path / "digits" / "default"
    before = {name: (folder / name).read_bytes() for name in ("ckpt_epoch_0.pth", "best.pth")}

    def limited(*opts):
        command = list(map(str, [sys.executable, "main.py", *ARGUMENTS, *opts, *where]))
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))  # noqa: E731
        return subprocess.run(
            command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=200, check=False
        )

    stopping = limited("TRAIN.ON_SAVE_ERROR", "stop")
    assert stopping.returncode == 1 and "error: cannot write a checkpoint to" in stopping.stderr
    going_on = limited()
    assert "training goes on, earlier checkpoints are untouched" in going_on.stdout
    assert going_on.returncode == 1 and "the last checkpoint could not be written" in going_on.stderr
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not any(name.endswith(".tmp") for name in os.listdir(folder))


def test_a_removed_output_folder_is_made_again(tmp_path, data):
    arguments = [*ARGUMENTS, "--data-path", data, "--output", tmp_path / "out"]
    log_path = tmp_path / "console.txt"
    with open(log_path, "ab") as log:
        run = start(arguments, 1, log)
        while b"[0/2][5/" not in log_path.read_bytes():
            assert run.poll() is None, log_path.read_text()
            time.sleep(0.02)
        (tmp_path / "out").rename(tmp_path / "gone")
        assert run.wait(120) == 0, log_path.read_text()
    assert "was removed; making it again" in log_path.read_text()
    assert "ckpt_epoch_1.pth" in ckpt.in_order(tmp_path / "out" / "digits" / "default")


def test_an_output_folder_that_cannot_be_written_is_one_clear_message(tmp_path, data):
    (tmp_path / "file").write_text("")
    done = run_main(*ARGUMENTS, "--data-path", data, "--output", tmp_path / "file", check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write to the output folder")


def test_deterministic_runs_are_bit_identical(tmp_path, data):
    for name in ("a", "b"):
        run_main(*ARGUMENTS, "DETERMINISTIC", True, "--data-path", data, "--output", tmp_path / name)
    assert_same_run(tmp_path / "a" / "digits" / "default", tmp_path / "b" / "digits" / "default")


def test_every_process_uses_the_checkpoint_that_rank_0_chose(tmp_path, data):
    """Rank 1 is given an output folder without any checkpoint, as if its file system showed it none."""
    arguments = [*ARGUMENTS, "--data-path", data, "--device", "cpu"]
    run_main(*arguments, "--output", tmp_path / "rank0", processes=2)
    folder = tmp_path / "rank0" / "digits" / "default"
    (folder / "ckpt_epoch_1.pth").unlink()
    environment = dict(
        os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29571", OMP_NUM_THREADS="1"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "main.py", *map(str, arguments), "--output", str(tmp_path / f"rank{rank}")],
            cwd=ROOT, env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    log = (tmp_path / "rank1" / "digits" / "default" / "log_rank1.txt").read_text()
    assert f"resuming from {folder}/ckpt_epoch_0.pth: epoch 1" in log
