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
OPTS += [
    "TRAIN.WARMUP_EPOCHS",
    "1",
    "TRAIN.EPOCHS",
    "2",
    "TRAIN.SAVE_STEPS",
    "1",
    "DIST.TIMEOUT_SECONDS",
    "20",
]
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
    path = output / "digits" / "default" / "ckpt_epoch_1.pth"
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
    command = [sys.executable, "main.py", *ARGUMENTS, "--data-path", data, "--output", tmp_path]
    run = Started(tmp_path, *command)
    run.wait_for("[0/2][3/")
    number = getattr(signal, name)
    (os.killpg if to_all else os.kill)(run.process.pid, number)
    assert run.wait() == 75, run.text()
    assert f"stopped by {name}: the same command goes on (exit code 75)" in run.text()
    assert "Traceback" not in run.text()
    again = Started(tmp_path, *command)
    assert again.wait() == 0, again.text()
    assert re.search(r"resuming from \S+ckpt_epoch_0_images_\d+.pth", again.text())
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
    run.wait_for("[0/2][3/")
    os.kill(training_processes(tmp_path)[0], signal.SIGKILL)
    assert run.wait() == 0, run.text()
    assert "resuming from" in run.text()
    assert_equal(final_weights(tmp_path), undisturbed(2))


def test_a_killed_process_ends_the_others(data, tmp_path):
    run = Started(tmp_path, *TORCHRUN, "main.py", *ARGUMENTS, "--data-path", data, "--output", tmp_path)
    run.wait_for("[0/2][3/")
    os.kill(training_processes(tmp_path)[0], signal.SIGKILL)
    begin = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - begin < 35, run.text()
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


def test_slurm_tasks_form_one_group(data, tmp_path):
    slurm = dict(SLURM_PROCID="{rank}", SLURM_LOCALID="{rank}", SLURM_STEP_NUM_TASKS="2")
    arguments = [*ARGUMENTS, "--data-path", data, "--output", tmp_path]
    both = ranks(tmp_path, arguments, **slurm, MASTER_ADDR="127.0.0.1", MASTER_PORT="29584")
    assert [run.wait() for run in both] == [0, 0], both[0].text() + both[1].text()
    assert "train on 2 x cpu" in both[0].text()
    assert (tmp_path / "digits" / "default" / "log_rank1.txt").exists()
    lost = ranks(tmp_path, arguments, **slurm)
    assert [run.wait() for run in lost] == [1, 1]
    assert lost[0].text().startswith("error: srun with several tasks needs MASTER_ADDR")


def test_the_slurm_script_requeues_on_exit_code_75(tmp_path):
    commands = dict(scontrol='echo "scontrol $*" >> calls; [ "$1" = show ] && echo node1 && echo node2; true')
    commands["srun"] = 'echo "srun $* at $MASTER_ADDR:$MASTER_PORT" >> calls; exit $(cat code)'
    for name, body in commands.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = dict(
        os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n"
    )
    for code, requeued in ((75, True), (1, False), (0, False)):
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "code").write_text(str(code))
        script = ["bash", ROOT / "scripts" / "slurm.sh", "--cfg", "a.yaml"]
        assert subprocess.run(script, cwd=tmp_path, env=environment).returncode == code
        calls = (tmp_path / "calls").read_text()
        assert "main.py --cfg a.yaml at node1:29500" in calls
        assert ("scontrol requeue 7" in calls) is requeued
