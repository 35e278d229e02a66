"""Launchers, signals, and processes that die."""

import contextlib
import errno
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    Started,
    assert_same_weights,
    coco_config,
    digits_config,
    main_command,
    run_folder,
    run_main,
    start_two,
)

import checkpoint as ckpt
import distributed
import utils
from data.loaders import start_worker
from training.guard import Guard
from utils import UserError

ARGUMENTS = shlex.split(
    "--cfg configs/digits.yaml --batch-size 4 --opts DATA.NUM_WORKERS 1 MODEL.DROP_RATE 0.1"
)
ARGUMENTS += shlex.split("PRINT_FREQ 1 SAVE_FREQ 1 TRAIN.WARMUP_EPOCHS 0 TRAIN.EPOCHS 1 TRAIN.SAVE_STEPS 1")
# Longer than any test waits: what ends a group here is not the timeout.
ARGUMENTS += shlex.split("DIST.TIMEOUT_SECONDS 3000")
HELD = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
import optimizer

def held(self, update=optimizer.Updater.update, updates=[]):
    updates.append(1)
    if len(updates) == 5:
        print("the fifth update waits", flush=True)
    while len(updates) == 5 and not os.path.exists({go!r}):
        time.sleep(0.01)
    return update(self)

optimizer.Updater.update = held
runpy.run_path({root!r} + "/main.py", run_name="__main__")
"""


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
            if str(output) in words and any(word.endswith("main.py") for word in words[:3]):
                found[int(folder.name)] = int(parent[1])
    return [pid for pid, parent in found.items() if parent not in found]


@pytest.fixture
def hold(tmp_path):
    """Functions: one makes a command wait in its fifth update, the other lets such commands go on."""
    (tmp_path / "held").mkdir()
    script, go = tmp_path / "held" / "main.py", tmp_path / "held" / "go"
    script.write_text(HELD.format(root=str(ROOT), go=str(go)))
    return lambda command: [script if word == "main.py" else word for word in command], go.touch


@pytest.mark.parametrize(
    "name, to_all",
    [
        ("SIGTERM", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("SIGUSR1", "SIGINT")),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(name, to_all, data, tmp_path, hold, undisturbed):
    """Nothing but the signal saves within the epoch."""
    arguments = [*ARGUMENTS, "TRAIN.SAVE_STEPS", "0", "--data-path", data, "--output", tmp_path]
    command = main_command(*arguments)
    held, release = hold
    run = Started(tmp_path, held(command))
    run.wait_for("the fifth update waits")
    number = getattr(signal, name)
    (os.killpg if to_all else os.kill)(run.process.pid, number)
    release()
    assert run.wait() == 75, run.text()
    assert f"stopped by {name}: the same command goes on (exit code 75)" in run.text()
    assert "Traceback" not in run.text()
    (saved,) = ckpt.in_order(run_folder(tmp_path))
    again = Started(tmp_path, command)
    assert again.wait() == 0, again.text()
    assert ckpt.place_of(saved) == (0, 20) and f"{saved}: epoch 0, image 20," in again.text()
    assert_same_weights(tmp_path, undisturbed(1))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_before_training_asks_to_start_again(name, capsys):
    Guard(0, 0)
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(getattr(signal, name))
    assert end.value.code == 75
    assert capsys.readouterr().err == f"stopped by {name} before training: the same command starts again\n"


def test_a_signal_during_training_is_remembered_and_a_second_ctrl_c_ends_at_once():
    guard = Guard(0, 0)
    guard.start()
    signal.raise_signal(signal.SIGINT)
    assert guard.after_update() == (True, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_torchrun_restarts_a_killed_worker_and_resumes(data, tmp_path, hold, undisturbed):
    where = ["--data-path", data, "--output", tmp_path]
    command = main_command(*ARGUMENTS, *where, processes=2, torchrun=["--max-restarts=2"])
    held, release = hold
    run = Started(tmp_path, held(command))
    run.wait_for("the fifth update waits")
    os.kill(training_processes(tmp_path)[0], signal.SIGKILL)
    release()
    assert run.wait() == 0, run.text()
    assert re.search(r"resuming from \S+ckpt_epoch_0_images_\d+.pth", run.text())
    assert_same_weights(tmp_path, undisturbed(2))


def test_processes_stop_saved_when_their_launcher_is_gone(data, tmp_path, hold, undisturbed):
    arguments = [*ARGUMENTS, "TRAIN.SAVE_STEPS", "0", "--data-path", data, "--output", tmp_path]
    held, release = hold
    run = Started(tmp_path, held(main_command(*arguments, processes=2)))
    run.wait_for("the fifth update waits")
    run.process.kill()
    run.wait()
    release()
    end = time.monotonic() + 300
    while training_processes(tmp_path):
        assert time.monotonic() < end, run.text()
        time.sleep(0.1)
    assert "stopped by the end of its launcher: the same command goes on (exit code 75)" in run.text()
    (saved,) = ckpt.in_order(run_folder(tmp_path))
    assert f"{saved}: epoch 0, image" in run_main(*arguments, processes=2).stdout
    assert_same_weights(tmp_path, undisturbed(2))


def test_a_process_that_hangs_ends_the_others_after_the_timeout(data, tmp_path, hold, port):
    """A stopped process keeps its connections open: only the timeout can tell."""
    arguments = [*ARGUMENTS, "DIST.TIMEOUT_SECONDS", "8", "--data-path", data, "--output", tmp_path]
    held, release = hold
    first, hung = start_two(tmp_path, [held(main_command(*arguments))] * 2, port)
    try:
        first.wait_for("the fifth update waits")
        os.kill(hung.process.pid, signal.SIGSTOP)
        begin = time.monotonic()
        release()
        assert first.wait() == 1
        assert time.monotonic() - begin > 7, first.text()
        assert "error: lost contact with another process" in first.text()
    finally:
        for run in (first, hung):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.wait()


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
    runs = start_two(tmp_path, [command] * 2, port, PYTHONPATH=str(ROOT))
    assert [run.wait() for run in runs] == [1, 1]
    good, bad = runs
    assert bad.text().rstrip().endswith("ZeroDivisionError: division by zero"), bad.text()
    assert "error: lost contact with another process" in good.text() and "Traceback" not in good.text()
    assert bad.path.stat().st_mtime_ns < good.path.stat().st_mtime_ns
    log = (run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert "Traceback (most recent call last)" in log  # where the others got to, for a report


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
    again, not_again = [(75, "RUNNING"), (143, "PREEMPTED")], [(75, "CANCELLED"), (143, "CANCELLED")]
    for code, state in [*again, *not_again, (1, "RUNNING"), (0, "RUNNING")]:
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "state").write_text(state)
        script = ["bash", ROOT / "scripts" / "slurm.sh", "--cfg", "a.yaml"]
        assert subprocess.run(script, cwd=tmp_path, env=environment).returncode == code
        calls = (tmp_path / "calls").read_text()
        assert "main.py --cfg a.yaml at node1:20007 cpus 5" in calls
        assert ("scontrol requeue 7" in calls) is ((code, state) in again)


WHOLE = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29501")


@pytest.fixture
def variables(monkeypatch):
    """A function that makes the launcher's variables those that it is given; "" is as good as none."""

    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)  # of other ranks, before they end

    def change(found):
        for name in WHOLE:
            monkeypatch.setenv(name, found.get(name, ""))

    return change


def without(*names):
    return {name: value for name, value in WHOLE.items() if name not in names}


@pytest.mark.parametrize(
    "found, words",
    [
        (dict(WORLD_SIZE="4"), "WORLD_SIZE=4, without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (dict(RANK="0"), "RANK=0, without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (dict(LOCAL_RANK="1"), "LOCAL_RANK=1, without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        *((without(name), f", without {name}: ") for name in WHOLE),
        (without("MASTER_ADDR", "MASTER_PORT"), "LOCAL_RANK=1, without MASTER_ADDR, MASTER_PORT: "),
        (dict(WHOLE, RANK="4"), "a rank must be below WORLD_SIZE"),
        (dict(WHOLE, LOCAL_RANK="4"), "a rank must be below WORLD_SIZE"),
        (dict(WHOLE, WORLD_SIZE="0"), "a rank must be below WORLD_SIZE"),
        (dict(WHOLE, RANK="one"), "RANK must be a whole number"),
        (dict(WHOLE, RANK="-1"), "RANK must be a whole number"),
        (dict(WHOLE, MASTER_PORT="2950x"), "MASTER_PORT must be a whole number"),
    ],
)
def test_launcher_variables_that_do_not_fit_together_are_one_sentence(found, words, variables, capsys):
    """They were left in the environment, or set by hand: a process would do a share of the work, unasked."""
    variables(found)
    with pytest.raises(SystemExit) as end:
        distributed.run_command(lambda: pytest.fail("went on"), "")
    message = end.value.code
    assert re.fullmatch("error: the environment has .*: for one process, unset .* with torchrun.*", message)
    assert words in message and all(f"{name}={value}" in message for name, value in found.items())
    with pytest.raises(UserError, match="the environment has"):
        distributed.start_process_group(torch.device("cpu"), 1)
    assert distributed.rank_and_world_size() == (0, 1)


def test_slurm_tasks_form_one_group(variables, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    variables({})
    with pytest.raises(UserError, match="srun with several tasks needs MASTER_ADDR and MASTER_PORT set"):
        utils.adopt_launcher()
    variables(dict(MASTER_ADDR="node1", MASTER_PORT="29501"))
    utils.adopt_launcher()
    expected = dict(WHOLE, MASTER_ADDR="node1", WORLD_SIZE="2", LOCAL_RANK="0")
    assert utils.is_launched() and {name: os.environ[name] for name in WHOLE} == expected


@pytest.mark.parametrize("found", [{}, dict(MASTER_ADDR="node1"), dict(MASTER_ADDR="a", MASTER_PORT="1")])
def test_without_a_launcher_there_is_one_process(found, variables):
    """scripts/slurm.sh says where to meet for one task, too."""
    variables(found)
    utils.adopt_launcher()
    distributed.start_process_group(torch.device("cpu"), 1)
    assert not utils.is_launched() and distributed.rank_and_world_size() == (0, 1)


def test_both_programs_refuse_a_world_size_that_was_left_behind(data, tmp_path):
    for program, cfg in (("main.py", "digits"), ("detect.py", "coco/shapes")):
        words = [program, "--cfg", f"configs/{cfg}.yaml", "--data-path", data, "--eval", "--output", tmp_path]
        run = Started(tmp_path, [sys.executable, *words], WORLD_SIZE="4")
        assert run.wait() == 1
        assert run.text().startswith("error: the environment has WORLD_SIZE=4, without RANK"), run.text()
    assert not (tmp_path / "digits").exists()


def test_a_port_that_is_taken_is_named(variables):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        variables(dict(WHOLE, RANK="0", LOCAL_RANK="0", MASTER_PORT=str(port)))
        with pytest.raises(UserError, match=f"port {port} .* is taken by another program: choose another"):
            distributed.start_process_group(torch.device("cpu"), 5)


def fail(error):
    raise error


SHORTAGES = {
    "out of memory (tried to allocate 2.00 GiB)": [
        torch.OutOfMemoryError("Tried to allocate 2.00 GiB. GPU 0"),
    ],
    "out of memory: ": [
        MemoryError("bad allocation"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        OSError(12, "Cannot allocate memory"),
    ],
    "out of memory (a data-": [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")],
    "/dev/shm, through": [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"),
        RuntimeError("unable to write to file </torch_7>: No space left on device (28)"),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No"),
    ],
    "no file descriptors are left": [
        OSError(24, "Too many open files"),
        RuntimeError("unable to open </torch_7>: Too many open files (24)"),
        RuntimeError("received 0 items of ancdata"),
    ],
}


@pytest.mark.parametrize(
    "message, error", [(message, error) for message, errors in SHORTAGES.items() for error in errors]
)
def test_what_a_machine_runs_out_of_is_one_sentence_with_the_keys_that_help(message, error):
    with pytest.raises(SystemExit) as end:
        distributed.run_command(lambda: fail(error), "SMALLER", "WORKERS")
    assert end.value.code.startswith(f"error: {message}") and "\n" not in end.value.code
    assert "SMALLER" in end.value.code or "lower WORKERS" in end.value.code


class Unsendable:
    """A batch that a worker cannot hand over."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "no file descriptors are left"),
        (RuntimeError("unable to write to file </torch_7>: x (28)"), "/dev/shm, through which"),
    ],
)
def test_a_batch_that_a_worker_cannot_send_ends_the_run(error, message):
    """Python drops such a batch; the timeout is for a run that would wait for it."""
    options = dict(worker_init_fn=start_worker, collate_fn=lambda _: Unsendable(error), timeout=60)
    loader = torch.utils.data.DataLoader([0], num_workers=1, **options)
    with pytest.raises(SystemExit, match=f"^error: {message}.* lower WORKERS"):
        distributed.run_command(lambda: next(iter(loader)), "SMALLER", "WORKERS")


def test_what_needs_less_memory_is_told_by_the_keys_that_count():
    batch = "lower DATA.BATCH_SIZE (--batch-size), which is 5"
    training = f"{batch}, and raise TRAIN.ACCUMULATION_STEPS as much"
    training += ", or set TRAIN.USE_CHECKPOINT True (--use-checkpoint)"
    assert distributed.smaller_run(digits_config(batch_size=5)) == training
    assert distributed.smaller_run(digits_config(batch_size=5, eval=True)) == batch
    assert distributed.smaller_run(digits_config(batch_size=5, throughput=True)) == batch
    found = distributed.smaller_run(coco_config("shapes", "DATA.BATCH_SIZE", 5))
    assert found == f"{training}, or lower DET.MIN_SIZES and DET.MAX_SIZE"


def test_pytorchs_own_words_for_too_little_memory_are_known():
    with pytest.raises(SystemExit) as end:
        distributed.run_command(lambda: torch.empty(2**60, dtype=torch.uint8), "SMALLER")
    assert end.value.code == f"error: out of memory (tried to allocate {2**60} bytes): SMALLER"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(5, "Input/output error")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        distributed.run_command(lambda: fail(error), "")
