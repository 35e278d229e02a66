"""Launchers, signals, and processes that die."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    Started,
    assert_same_weights,
    group_of_two,
    main_command,
    run_folder,
    run_main,
    start_ranks,
)

import checkpoint as ckpt

ARGUMENTS = shlex.split(
    "--cfg configs/digits.yaml --batch-size 4 --opts DATA.NUM_WORKERS 1 MODEL.DROP_RATE 0.1"
)
ARGUMENTS += shlex.split("PRINT_FREQ 1 SAVE_FREQ 1 TRAIN.WARMUP_EPOCHS 0 TRAIN.EPOCHS 1 TRAIN.SAVE_STEPS 1")
ARGUMENTS += shlex.split("DIST.TIMEOUT_SECONDS 20")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """``--output`` of runs that nothing disturbed, by number of processes."""
    outputs = {}

    def of(processes):
        if processes not in outputs:
            outputs[processes] = tmp_path_factory.mktemp("calm")
            where = ["--data-path", data, "--output", outputs[processes]]
            run_main(*ARGUMENTS, *where, processes=processes)
        return outputs[processes]

    return of


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


@pytest.mark.parametrize(
    "name, to_all",
    [("SIGTERM", False), pytest.param("SIGUSR1", True, marks=pytest.mark.slow), ("SIGINT", True)],
)
def test_a_signal_saves_and_the_same_command_goes_on(name, to_all, data, tmp_path, undisturbed):
    """Nothing but the signal saves within the epoch."""
    arguments = [*ARGUMENTS, "TRAIN.SAVE_STEPS", "0", "--data-path", data, "--output", tmp_path]
    command = main_command(*arguments)
    run = Started(tmp_path, command)
    run.wait_for("[0/1][3/")
    number = getattr(signal, name)
    (os.killpg if to_all else os.kill)(run.process.pid, number)
    assert run.wait() == 75, run.text()
    assert f"stopped by {name}: the same command goes on (exit code 75)" in run.text()
    assert "Traceback" not in run.text()
    (saved,) = ckpt.in_order(run_folder(tmp_path))
    again = Started(tmp_path, command)
    assert again.wait() == 0, again.text()
    assert ckpt.place_of(saved) >= (0, 16) and f"{saved}: epoch 0, image" in again.text()
    assert_same_weights(tmp_path, undisturbed(1))


def catches(pid, number):
    """Whether a process has a handler of its own for a signal."""
    mask = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_before_training_asks_to_start_again(name, data, tmp_path):
    run = Started(tmp_path, main_command(*ARGUMENTS, "--data-path", data, "--output", tmp_path))
    while not catches(run.process.pid, signal.SIGTERM):
        assert run.runs(), run.text()
    run.process.send_signal(getattr(signal, name))
    assert run.wait() == 75, run.text()
    assert run.text() == f"stopped by {name} before training: the same command starts again\n"


def test_torchrun_restarts_a_killed_worker_and_resumes(data, tmp_path, undisturbed):
    where = ["--data-path", data, "--output", tmp_path]
    command = main_command(*ARGUMENTS, *where, processes=2, torchrun=["--max-restarts=2"])
    run = Started(tmp_path, command)
    run.wait_for("[0/1][3/")
    os.kill(training_processes(tmp_path)[0], signal.SIGKILL)
    assert run.wait() == 0, run.text()
    assert re.search(r"resuming from \S+ckpt_epoch_0_images_\d+.pth", run.text())
    assert_same_weights(tmp_path, undisturbed(2))


def test_processes_stop_saved_when_their_launcher_is_gone(data, tmp_path, undisturbed):
    arguments = [*ARGUMENTS, "TRAIN.SAVE_STEPS", "0", "--data-path", data, "--output", tmp_path]
    run = Started(tmp_path, main_command(*arguments, processes=2))
    run.wait_for("[0/1][1/")
    run.process.kill()
    run.wait()
    end = time.monotonic() + 60
    while training_processes(tmp_path):
        assert time.monotonic() < end, run.text()
        time.sleep(0.1)
    assert "stopped by the end of its launcher: the same command goes on (exit code 75)" in run.text()
    (saved,) = ckpt.in_order(run_folder(tmp_path))
    assert f"{saved}: epoch 0, image" in run_main(*arguments, processes=2).stdout
    assert_same_weights(tmp_path, undisturbed(2))


def test_torchrun_ends_all_when_a_process_is_killed(data, tmp_path):
    where = ["--data-path", data, "--output", tmp_path]
    run = Started(tmp_path, main_command(*ARGUMENTS, *where, processes=2))
    run.wait_for("[0/1][3/")
    os.kill(training_processes(tmp_path)[0], signal.SIGKILL)
    begin = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - begin < 20, run.text()
    assert "Signal 9 (SIGKILL) received" in run.text() and "lost contact" in run.text()
    assert not training_processes(tmp_path)


def test_a_process_that_raises_ends_the_others(data, tmp_path, port):
    """Rank 1 alone sees broken images; no launcher is there to end rank 0."""
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    for path in broken.glob("train/*/*.png"):
        path.write_bytes(b"broken")
    arguments = [*ARGUMENTS, "--output", tmp_path, "--data-path"]
    good, bad = start_ranks(tmp_path, [*arguments, data], [*arguments, broken], **group_of_two(port))
    assert bad.wait() == 1 and "cannot be read as an image" in bad.text(), bad.text()
    begin = time.monotonic()
    assert good.wait() == 1, good.text()
    assert time.monotonic() - begin < 25
    assert "error: lost contact with another process" in good.text()


def test_a_killed_process_ends_the_others_without_a_launcher(data, tmp_path, port):
    arguments = [*ARGUMENTS, "--output", tmp_path, "--data-path", data]
    first, second = start_ranks(tmp_path, arguments, arguments, **group_of_two(port))
    first.wait_for("[0/1][3/")
    second.process.kill()
    begin = time.monotonic()
    assert first.wait() == 1, first.text()
    assert time.monotonic() - begin < 25
    assert "error: lost contact with another process" in first.text()


def test_a_process_that_hangs_ends_the_others_after_the_timeout(data, tmp_path, port):
    """A stopped process keeps its connections open: only the timeout can tell."""
    arguments = [*ARGUMENTS, "DIST.TIMEOUT_SECONDS", "8", "--data-path", data, "--output", tmp_path]
    first, hung = start_ranks(tmp_path, arguments, arguments, **group_of_two(port))
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
    shutil.copytree(data, tmp_path / "data1")
    for path in (tmp_path / "data1").glob("train/*/*.png"):
        path.write_bytes(b"broken")
    script = f'exec {sys.executable} main.py "$@" --data-path {tmp_path}/data$RANK'
    command = main_command(*ARGUMENTS, "--output", tmp_path, processes=2, torchrun=["--no-python"])
    at = command.index("main.py")
    command[at : at + 1] = ["bash", "-c", script, "bash"]
    run = Started(tmp_path, command)
    assert run.wait() != 0
    errors = re.findall("^error: .*", run.text(), re.MULTILINE)
    assert "cannot be read as an image" in errors[0], run.text()
    assert all("lost contact" in error for error in errors[1:])


def test_an_unexpected_error_is_shown_whole_and_before_its_consequences(data, tmp_path, port):
    """Rank 1 meets a bug in its third update, which a script plants; no launcher is there to end rank 0."""
    script = tmp_path / "planted.py"
    script.write_text(
        "import os, runpy, sys, optimizer\n"
        "update, updates = optimizer.Updater.update, []\n"
        "def planted(self):\n"
        "    updates.append(1)\n"
        "    return update(self) if len(updates) < 3 or os.environ['RANK'] == '0' else 1 / 0\n"
        "optimizer.Updater.update = planted\n"
        "sys.argv[0] = 'main.py'\n"
        "runpy.run_path('main.py', run_name='__main__')\n"
    )
    command = main_command(*ARGUMENTS, "--data-path", data, "--output", tmp_path)
    command[1] = script
    group = dict(group_of_two(port), PYTHONPATH=str(ROOT))
    runs = [
        Started(tmp_path, command, **{k: v.format(rank=rank) for k, v in group.items()}) for rank in (0, 1)
    ]
    assert [run.wait() for run in runs] == [1, 1]
    good, bad = runs
    assert bad.text().rstrip().endswith("ZeroDivisionError: division by zero"), bad.text()
    assert "error: lost contact with another process" in good.text() and "Traceback" not in good.text()
    assert bad.path.stat().st_mtime_ns < good.path.stat().st_mtime_ns
    log = (run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert "Traceback (most recent call last)" in log  # where the others got to, for a report


def test_slurm_tasks_form_one_group(data, tmp_path, port):
    slurm = dict(SLURM_PROCID="{rank}", SLURM_LOCALID="{rank}", SLURM_STEP_NUM_TASKS="2")
    arguments = [*ARGUMENTS, "--data-path", data, "--output", tmp_path]
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    both = start_ranks(tmp_path, arguments, arguments, **slurm, **address)
    assert [run.wait() for run in both] == [0, 0], both[0].text() + both[1].text()
    assert "train on 2 x cpu" in both[0].text()
    for rank in range(2):
        log = (run_folder(tmp_path) / f"log_rank{rank}.txt").read_text()
        assert "train on 2 x cpu" in log
    lost = start_ranks(tmp_path, arguments, arguments, **slurm)
    assert [run.wait() for run in lost] == [1, 1]
    for run in lost:
        assert re.fullmatch("error: srun with several tasks needs MASTER_ADDR .*\n", run.text())


def test_the_slurm_script_requeues_on_exit_code_75(tmp_path):
    commands = dict(
        scontrol='echo "scontrol $*" >> calls; case "$2" in hostnames) printf "node1\\nnode2\\n" ;;'
        ' job) echo "JobId=7 JobState=$(cat state) Reason=None" ;; esac'
    )
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
    environment.update(SLURM_CPUS_PER_TASK="5")
    environment.pop("MASTER_PORT", None)
    ended = [
        (75, "RUNNING", True),
        (143, "PREEMPTED", True),
        (75, "CANCELLED", False),
        (143, "CANCELLED", False),
    ]
    for code, state, requeued in [*ended, (1, "RUNNING", False), (0, "RUNNING", False)]:
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "state").write_text(state)
        script = ["bash", ROOT / "scripts" / "slurm.sh", "--cfg", "a.yaml"]
        assert subprocess.run(script, cwd=tmp_path, env=environment).returncode == code
        calls = (tmp_path / "calls").read_text()
        assert "main.py --cfg a.yaml at node1:20007 cpus 5" in calls
        assert ("scontrol requeue 7" in calls) is requeued
