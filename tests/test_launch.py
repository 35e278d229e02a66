"""Launchers, signals, and processes that die."""

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_main, write_images

import checkpoint as ckpt

OPTS = ["--opts", "DATA.NUM_WORKERS", "1", "MODEL.DROP_RATE", "0.1", "PRINT_FREQ", "1", "SAVE_FREQ", "1"]
OPTS += ["TRAIN.WARMUP_EPOCHS", "0", "TRAIN.EPOCHS", "1", "TRAIN.SAVE_STEPS", "1"]
OPTS += ["DIST.TIMEOUT_SECONDS", "20"]
ARGUMENTS = ["--cfg", "configs/digits.yaml", "--batch-size", "4", "--device", "cpu", *OPTS]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", 24)
    write_images(folder / "val", 2, seed=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Final weights of runs that nothing disturbed, by number of processes."""
    weights = {}

    def of(processes):
        if processes not in weights:
            output = tmp_path_factory.mktemp("calm")
            run_main(*ARGUMENTS, "--data-path", data, "--output", output, processes=processes)
            weights[processes] = final_weights(output)
        return weights[processes]

    return of


def final_weights(output):
    path = output / "digits" / "default" / "ckpt_epoch_0.pth"
    return ckpt.read_checkpoint(str(path))["model"]


def assert_equal(ours, expected):
    assert all(torch.equal(weight, ours[name]) for name, weight in expected.items())


class Started:
    """A command that runs with its output in a file."""

    def __init__(self, folder, *command, **environment):
        self.path = folder / f"console{len(list(folder.glob('console*')))}.txt"
        environment = dict(os.environ, OMP_NUM_THREADS="1", **environment)
        with open(self.path, "wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def text(self):
        return self.path.read_text()

    def wait_for(self, words, seconds=60):
        """Wait until the output holds ``words``."""
        end = time.monotonic() + seconds
        while words not in self.text():
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.02)

    def wait(self, seconds=120):
        """Wait for the end; returns the exit code."""
        return self.process.wait(seconds)


def training_processes(output):
    """Process ids of the training processes (not their data workers or launcher) that write to ``output``."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text().split("\0")
            parent = re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())
            if str(output) in words and "main.py" in words[:3]:
                found[int(folder.name)] = int(parent[1])
    return [pid for pid, parent in found.items() if parent not in found]


@pytest.mark.parametrize("name, to_all", [("SIGTERM", False), ("SIGUSR1", True), ("SIGINT", True)])
def test_a_signal_saves_and_the_same_command_goes_on(name, to_all, data, tmp_path, undisturbed):
    """Nothing but the signal saves within the epoch."""
    arguments = [*ARGUMENTS, "TRAIN.SAVE_STEPS", "0", "--data-path", data, "--output", tmp_path]
    command = [sys.executable, "main.py", *arguments]
    run = Started(tmp_path, *command)
    run.wait_for("[0/1][3/")
    number = getattr(signal, name)
    (os.killpg if to_all else os.kill)(run.process.pid, number)
    assert run.wait() == 75, run.text()
    assert f"stopped by {name}: the same command goes on (exit code 75)" in run.text()
    assert "Traceback" not in run.text()
    (saved,) = ckpt.in_order(tmp_path / "digits" / "default")
    again = Started(tmp_path, *command)
    assert again.wait() == 0, again.text()
    assert ckpt.place_of(saved) >= (0, 16) and f"{saved}: epoch 0, image" in again.text()
    assert_equal(final_weights(tmp_path), undisturbed(1))


def test_torchrun_restarts_a_killed_worker_and_resumes(data, tmp_path, undisturbed):
    command = [
        *TORCHRUN,
        "--max-restarts=2",
        "main.py",
        *ARGUMENTS,
        "--data-path",
        data,
        "--output",
        tmp_path,
    ]
    run = Started(tmp_path, *command)
    run.wait_for("[0/1][3/")
    os.kill(training_processes(tmp_path)[0], signal.SIGKILL)
    assert run.wait() == 0, run.text()
    assert re.search(r"resuming from \S+ckpt_epoch_0_images_\d+.pth", run.text())
    assert_equal(final_weights(tmp_path), undisturbed(2))


def test_a_killed_process_ends_the_others(data, tmp_path):
    run = Started(tmp_path, *TORCHRUN, "main.py", *ARGUMENTS, "--data-path", data, "--output", tmp_path)
    run.wait_for("[0/1][3/")
    os.kill(training_processes(tmp_path)[0], signal.SIGKILL)
    begin = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - begin < 20, run.text()
    assert "Signal 9 (SIGKILL) received" in run.text() and "lost contact" in run.text()
    assert not training_processes(tmp_path)


def ranks(folder, arguments, **environment):
    """Two processes without a launcher, one per rank."""
    return [
        Started(
            folder,
            sys.executable,
            "main.py",
            *arguments,
            **{k: v.format(rank=rank) for k, v in environment.items()},
        )
        for rank in range(2)
    ]


def test_a_process_that_raises_ends_the_others_and_is_shown_first(data, tmp_path):
    """Rank 1 alone sees a broken image; no launcher is there to end rank 0."""
    broken = tmp_path / "data"
    subprocess.run(["cp", "-r", data, broken], check=True)
    environment = dict(
        RANK="{rank}", LOCAL_RANK="{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29583"
    )
    arguments = [*ARGUMENTS, "--output", tmp_path]
    good = Started(tmp_path, sys.executable, "main.py", *arguments, "--data-path", data,
                   **{k: v.format(rank=0) for k, v in environment.items()})  # fmt: skip
    for path in broken.glob("train/*/*.png"):
        path.write_bytes(b"broken")
    bad = Started(tmp_path, sys.executable, "main.py", *arguments, "--data-path", broken,
                  **{k: v.format(rank=1) for k, v in environment.items()})  # fmt: skip
    assert bad.wait() == 1 and "cannot be read as an image" in bad.text(), bad.text()
    begin = time.monotonic()
    assert good.wait() == 1, good.text()
    assert time.monotonic() - begin < 25
    assert "error: lost contact with another process" in good.text()


def test_a_process_that_hangs_ends_the_others_after_the_timeout(data, tmp_path):
    """A stopped process keeps its connections open: only the timeout can tell."""
    group = dict(RANK="{rank}", LOCAL_RANK="{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    arguments = [*ARGUMENTS, "DIST.TIMEOUT_SECONDS", "8", "--data-path", data, "--output", tmp_path]
    first, hung = ranks(tmp_path, arguments, **group, MASTER_PORT="29585")
    try:
        first.wait_for("[0/1][3/")
        os.kill(hung.process.pid, signal.SIGSTOP)
        begin = time.monotonic()
        assert first.wait(60) == 1
        assert 4 < time.monotonic() - begin < 13, first.text()
        assert "error: lost contact with another process" in first.text()
    finally:
        for run in (first, hung):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.wait()


def test_under_torchrun_the_first_failure_is_shown_first(data, tmp_path):
    """The data folders of the two processes differ; in that of rank 1 no image can be read."""
    (tmp_path / "data0").symlink_to(data)
    subprocess.run(["cp", "-r", data, tmp_path / "data1"], check=True)
    for path in (tmp_path / "data1").glob("train/*/*.png"):
        path.write_bytes(b"broken")
    script = f'exec {sys.executable} main.py "$@" --data-path {tmp_path}/data$RANK'
    arguments = [*ARGUMENTS, "--output", tmp_path]
    run = Started(tmp_path, *TORCHRUN, "--no-python", "bash", "-c", script, "bash", *arguments)
    assert run.wait() != 0
    errors = re.findall("^error: .*", run.text(), re.MULTILINE)
    assert "cannot be read as an image" in errors[0], run.text()
    assert all("lost contact" in error for error in errors[1:])


def test_slurm_tasks_form_one_group(data, tmp_path):
    slurm = dict(SLURM_PROCID="{rank}", SLURM_LOCALID="{rank}", SLURM_STEP_NUM_TASKS="2")
    arguments = [*ARGUMENTS, "--data-path", data, "--output", tmp_path]
    both = ranks(tmp_path, arguments, **slurm, MASTER_ADDR="127.0.0.1", MASTER_PORT="29584")
    assert [run.wait() for run in both] == [0, 0], both[0].text() + both[1].text()
    assert "train on 2 x cpu" in both[0].text()
    for rank in range(2):
        log = (tmp_path / "digits" / "default" / f"log_rank{rank}.txt").read_text()
        assert "train on 2 x cpu" in log
    lost = ranks(tmp_path, arguments, **slurm)
    assert [run.wait() for run in lost] == [1, 1]
    for run in lost:
        assert re.fullmatch("error: srun with several tasks needs MASTER_ADDR .*\n", run.text())


def test_the_slurm_script_requeues_on_exit_code_75(tmp_path):
    commands = dict(scontrol='echo "scontrol $*" >> calls; [ "$1" = show ] && echo node1 && echo node2; true')
    commands["srun"] = (
        'echo "srun $* at $MASTER_ADDR:$MASTER_PORT cpus $SRUN_CPUS_PER_TASK" >> calls; exit $(cat code)'
    )
    for name, body in commands.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = dict(
        os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n"
    )
    environment.update(SLURM_CPUS_PER_TASK="5", MASTER_PORT="29500")
    for code, requeued in ((75, True), (1, False), (0, False)):
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "code").write_text(str(code))
        script = ["bash", ROOT / "scripts" / "slurm.sh", "--cfg", "a.yaml"]
        assert subprocess.run(script, cwd=tmp_path, env=environment).returncode == code
        calls = (tmp_path / "calls").read_text()
        assert "main.py --cfg a.yaml at node1:29500 cpus 5" in calls
        assert ("scontrol requeue 7" in calls) is requeued
