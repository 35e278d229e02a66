"""A run that is killed at any moment and started again ends with the same bits as one that never was."""

import contextlib
import itertools
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    Started,
    assert_same_run,
    digits_config,
    logged,
    main_command,
    micro,
    restore,
    run_folder,
    run_main,
    small_run,
    start_two,
)

import checkpoint as ckpt
from config import dump_config
from data.samplers import TrainBatchSampler
from distributed import be_deterministic
from logger import read_metrics
from models.fast import choices
from optimizer import WeightAverage
from training.guard import FolderClaim
from training.setup import read_start
from utils import UserError

ARGUMENTS = shlex.split(
    "--cfg configs/digits.yaml --batch-size 4 --opts DATA.NUM_WORKERS 1 MODEL.DROP_RATE 0.1"
)
ARGUMENTS += shlex.split("MODEL.DROP_PATH_RATE 0.2 AUG.MIXUP 0.8 PRINT_FREQ 1 SAVE_FREQ 1")
ARGUMENTS += shlex.split("TRAIN.WARMUP_EPOCHS 1 TRAIN.EPOCHS 2")


def kill_until_done(command, output, kills, rng, patience=3600):
    """Start a run again and again, killing it at random moments, also as it saves; returns how often."""
    hits, folder = 0, run_folder(output)
    end = time.monotonic() + patience
    while True:
        run = Started(output.parent, command)
        assert time.monotonic() < end, run.text()
        aim, rest = rng.choice(["start", "update", "save", "save"]), rng.random() * 0.3
        while run.runs() and hits < kills:
            trains = "Train: " in run.told()
            if aim == "start" or (aim == "update" and trains):
                time.sleep(10 * rest if aim == "start" else rest)
                break
            if aim == "save" and trains and unfinished(folder):
                break
            time.sleep(0.0005)
        if run.runs() and hits < kills:
            # torchrun starts its workers in sessions of their own: the command line finds them all.
            subprocess.run(["pkill", "-9", "-f", str(output)], check=False)
            hits += 1
            run.wait()
            continue
        assert run.wait() == 0, run.text()
        return hits


def unfinished(folder):
    """Whether a checkpoint is half-written."""
    return folder.exists() and any(".pth." in name for name in os.listdir(folder))


def end_epoch(run, score):
    """End the run's epoch with a score; returns the names of the files written."""
    return run.end_epoch(dict(train_loss=1.0), dict(acc1=score))


def resumed(folder, path=""):
    """A small run that was restored from its folder, or from a given file."""
    return restore(small_run(folder), RESUME=path)


def kill_at(step):
    """From now on, count what this process asks of the file system, and kill it before request ``step``."""
    requests = itertools.count()

    def request(event, *_):
        asked = ("open", "os.rename", "os.link", "os.remove", "os.listdir", "os.fsync")
        if event in asked and next(requests) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda number: (request("os.fsync"), fsync(number))
    sys.addaudithook(request)


@pytest.mark.parametrize("due", [True, False], ids=["epoch and best", "best alone"])
def test_the_best_survives_a_kill_at_every_step_of_a_save(tmp_path, due):
    outcomes = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        run = small_run(folder, keep=1, save_freq=1 if due else 2)
        end_epoch(run, 50.0)
        run.start_epoch(1)
        child = forked(lambda run=run, step=step: (kill_at(step), end_epoch(run, 60.0)))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = code == -signal.SIGKILL
        assert killed or code == 0
        again, best = resumed(folder), ckpt.read_checkpoint(str(folder / "best.pth"))
        assert again.best == best["score"] == best["max_accuracy"]
        assert best["epoch"] == [50.0, 60.0].index(again.best)
        assert again.progress.epoch == (2 if due and again.best == 60.0 else 1)
        outcomes.add(again.best)
        assert sorted(os.listdir(folder))[0] == "best.pth" and not unfinished(folder)
        if not killed:
            break
    assert outcomes == {50.0, 60.0} and again.best == 60.0


def test_a_run_claims_no_best_that_its_folder_does_not_hold(tmp_path):
    run = small_run(tmp_path / "first")
    end_epoch(run, 50.0)
    run.start_epoch(1)
    end_epoch(run, 40.0)
    best, other = resumed(tmp_path / "a", tmp_path / "first" / "ckpt_epoch_0.pth"), tmp_path / "b"
    assert best.best == ckpt.score_of_best(str(tmp_path / "a"))[0] == 50.0
    with logged() as lines:
        run = resumed(other, tmp_path / "first" / "ckpt_epoch_1.pth")
    assert run.best == -1 and "the best so far is unknown" in "".join(lines)
    run.start_epoch(2)
    end_epoch(run, 30.0)
    assert ckpt.score_of_best(str(other))[0] == resumed(other).best == 30.0


def test_a_best_that_cannot_be_written_is_not_reported(tmp_path):
    (tmp_path / "best.pth").mkdir()
    run = small_run(tmp_path, epochs=2)
    with logged() as lines:
        for epoch, score, best in ((0, 50.0, -1.0), (1, 40.0, 40.0)):
            run.start_epoch(epoch)
            assert end_epoch(run, score) == [f"ckpt_epoch_{epoch}.pth", "best.pth"][: 1 + epoch]
            assert run.best == best
            if not epoch:
                (tmp_path / "best.pth").rmdir()
    assert "cannot write a checkpoint" in "".join(lines) and "(best unknown)" in "".join(lines)
    assert "-1.00" not in "".join(lines) and resumed(tmp_path).best == 40.0
    (tmp_path / "other" / "best.pth").mkdir(parents=True)
    run = small_run(tmp_path / "other", epochs=1)
    with logged() as lines:
        for _ in run.epochs_left():
            end_epoch(run, 50.0)
    assert f"best checkpoint: none, {tmp_path}/other/best.pth could not be written" in lines[-1]


def forked(work):
    """Start a process that does ``work`` and ends with 0, or with 1 where that raises; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # those of the parent are not there, and would be waited for
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_two_writers_of_one_file_leave_one_of_them_whole(tmp_path):
    path = str(tmp_path / "file.pth")

    def write(number):
        checkpoint = dict(epoch=number, x=torch.full((1 << 18,), number))
        for _ in range(40):
            ckpt.save_checkpoint(path, checkpoint)

    writers, reads = [forked(lambda number=number: write(number)) for number in range(2)], 0
    while writers:
        ended = {writer: os.waitpid(writer, os.WNOHANG) for writer in writers}
        assert all(status == 0 for _, status in ended.values())
        writers = [writer for writer, (number, _) in ended.items() if not number]
        if os.path.exists(path):
            content = ckpt.read_checkpoint(path)
            assert content["x"].eq(content["epoch"]).all()
            reads += 1
    assert reads > 5 and os.listdir(tmp_path) == ["file.pth"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    ready, claim, second = tmp_path / "ready", FolderClaim(str(tmp_path)), FolderClaim(str(tmp_path))
    first = forked(lambda: (claim.take(), ready.touch(), time.sleep(600)))
    try:
        while not ready.exists():
            assert os.waitpid(first, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        owner = f"process {first} on {socket.gethostname()} since "
        with pytest.raises(UserError, match=f"^{tmp_path} belongs to another run, {owner}.* another --tag"):
            second.take()
    finally:
        os.kill(first, signal.SIGKILL)
    second.take()
    os.waitpid(first, 0)
    assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_wrong_checkpoint_is_told_before_the_data_are_looked_at(tmp_path):
    where = ["--data-path", tmp_path / "nowhere", "--output", tmp_path, "--resume", tmp_path / "missing.pth"]
    done = run_main(*ARGUMENTS, *where, check=False)
    assert done.returncode == 1 and done.stderr == f"error: no checkpoint file {tmp_path}/missing.pth\n"


@pytest.mark.parametrize(
    "settings, count",
    [(dict(keep=2), 3), (dict(save_freq=4), 4)],  # two and the best; after epochs 0, 4, 8 and 9
)
def test_the_disk_that_checkpoints_will_take_is_told(tmp_path, monkeypatch, settings, count):
    run = small_run(tmp_path, epochs=10, **settings)
    size = sum(tensor.nbytes for tensor in run.model.state_dict().values())
    size += 2 * sum(parameter.nbytes for parameter in run.model.parameters())
    with logged() as lines:
        for free in (count * size, count * size - 1):
            monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
            run.warn_of_a_small_disk()
    assert len(lines) == 1 and f"checkpoints: {count} of {size / 1e6:.0f} MB each will take " in lines[0]


def disturbed_run(tmp_path, data, processes, kills, opts):
    arguments = [*ARGUMENTS, *opts]
    where = ["--data-path", data, "--output"]
    calm, output = tmp_path / "calm", tmp_path / "disturbed"
    run_main(*arguments, *where, calm, processes=processes)
    arguments += ["TRAIN.SAVE_STEPS", 1, *where, output]
    command = main_command(*arguments, processes=processes)
    assert kill_until_done(command, output, kills, random.Random(2)) == kills
    assert_same_run(output, calm)


@pytest.mark.parametrize("backend", ["pil", pytest.param("opencv", marks=pytest.mark.slow)])
def test_resume_is_bit_exact_after_kills(tmp_path, data, backend):
    opts = ["DATA.BACKEND", backend, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.REPROB", 0.5]
    disturbed_run(tmp_path, data, 1, 2, [*opts, "TRAIN.ACCUMULATION_STEPS", 2, "TRAIN.EPOCHS", 2])


@pytest.mark.slow
def test_averaged_weights_go_on_bit_for_bit_after_kills(tmp_path, data):
    """72 images make 4 updates of an epoch in two processes that each add up two micro-batches."""
    opts = ["TRAIN.ACCUMULATION_STEPS", 2, "TRAIN.EMA.ENABLED", True, "TRAIN.EMA.WARMUP", True]
    disturbed_run(tmp_path, data, 2, 1, [*opts, "DETERMINISTIC", True])
    folder = run_folder(tmp_path / "disturbed")
    last, best = (ckpt.read_checkpoint(str(folder / name)) for name in ("ckpt_epoch_1.pth", "best.pth"))
    assert last["ema"]["updates"] == 8
    rows = read_metrics(folder / "metrics.jsonl")
    scores = [max(row["acc1"], row["ema_acc1"]) for row in rows]
    assert [best["score"], best["max_accuracy"]] == [scores[best["epoch"]]] * 2 == [max(scores)] * 2
    assert last["score"] == scores[1]
    assert last["better"] == ("ema" if scores[1] == rows[1]["ema_acc1"] else "model")


def test_averaging_may_begin_and_end_with_a_resume_and_the_log_says_so(tmp_path):
    def run_of(average):
        run = small_run(tmp_path)
        run.updater.average = WeightAverage(run.model, 0.5, warmup=False) if average else None
        with logged() as lines:
            restore(run)
        return run, " ".join(lines)

    first, _ = run_of(average=False)
    end_epoch(first, 50.0)
    averaged, told = run_of(average=True)
    assert "ckpt_epoch_0.pth has no averaged weights: the average (TRAIN.EMA) starts from its weights" in told
    with torch.no_grad():
        next(averaged.updater.average.model.parameters()).add_(1.0)
    averaged.updater.average.updates = 7
    averaged.start_epoch(1)
    averaged.end_epoch(dict(train_loss=1.0), dict(acc1=40.0, ema_acc1=60.0))
    assert ckpt.score_of_best(str(tmp_path)) == (60.0, "ema")
    again, told = run_of(average=True)
    average = again.updater.average
    assert average.updates == 7 and "averaged weights" not in told
    difference = next(average.model.parameters()) - next(again.model.parameters())
    torch.testing.assert_close(difference, torch.ones_like(difference))
    plain, told = run_of(average=False)
    assert plain.updater.average is None and "averaged weights, which are dropped" in told
    assert torch.equal(next(plain.model.parameters()), next(first.model.parameters()))


def averaging_run(folder, **settings):
    """A small run whose weights are those of the micro model, and their average the same plus 1."""
    run = small_run(folder, **settings)
    run.updater.average = WeightAverage(run.model, 0.5, warmup=True)
    restore(run)
    if not run.updater.average.updates:
        with torch.no_grad():
            next(run.updater.average.model.parameters()).add_(1.0)
        run.updater.average.updates = 7
    return run


def taken(path, which="auto"):
    """Whether the weights of a file of :func:`averaging_run` or their average are taken."""
    weights, content = ckpt.read_weights(str(path), which)["model"], ckpt.read_checkpoint(str(path))
    (kind,) = (kind for kind in ("model", "model_ema") if torch.equal(*firsts(weights, content[kind])))
    return kind


def firsts(*weights):
    return [next(iter(each.values())) for each in weights]


def test_the_best_is_the_best_of_the_weights_and_of_their_average_and_says_which(tmp_path):
    """The average is better in the first two epochs and equal in the last; the weights are in the third."""
    run, best = averaging_run(tmp_path, epochs=5), tmp_path / "best.pth"
    scores, found = [(30.0, 31.0), (50.0, 60.0), (84.0, 31.0), (70.0, 70.0)], []
    with logged() as lines:
        for epoch, (acc1, ema_acc1) in enumerate(scores):
            run.start_epoch(epoch)
            run.end_epoch(dict(train_loss=1.0), dict(acc1=acc1, ema_acc1=ema_acc1))
            found.append((ckpt.score_of_best(str(tmp_path)), taken(tmp_path / f"ckpt_epoch_{epoch}.pth")))
    kept = [(31.0, "ema"), (60.0, "ema"), (84.0, "model"), (84.0, "model")]
    assert found == list(zip(kept, ["model_ema", "model_ema", "model", "model_ema"]))
    told = " ".join(lines)
    assert "EMA top-1 60.00% (best 60.00% of their average)" in told and taken(best) == "model"
    assert "EMA top-1 31.00% (best 84.00% of the weights themselves)" in told
    again = averaging_run(tmp_path, epochs=5)
    assert (again.best, again.best_in_words()) == (84.0, "84.00% of the weights themselves")


def test_an_evaluation_takes_the_weights_that_it_is_asked_for(tmp_path):
    def chosen(which):
        config = digits_config("TEST.WEIGHTS", which, "MODEL.RESUME", best, eval=True)
        with logged() as lines:
            return firsts(read_start(config)[1]["model"], run.model.state_dict()), lines[-1]

    run, best = averaging_run(tmp_path), tmp_path / "best.pth"
    run.end_epoch(dict(train_loss=1.0), dict(acc1=84.0, ema_acc1=31.0))
    (found, own), told = chosen("auto")
    assert torch.equal(found, own) and told == (
        f"{best}: taking its weights, not their average (EMA), the better of the two"
    )
    (found, own), told = chosen("ema")
    assert torch.equal(found, own + 1) and told == f"{best}: taking its averaged weights (EMA)"
    torch.save(run.model.state_dict(), tmp_path / "bare.pth")
    ckpt.read_weights(str(tmp_path / "bare.pth"), "model")
    with pytest.raises(ckpt.CheckpointError, match="bare.pth has no averaged weights .EMA.: take auto or"):
        ckpt.read_weights(str(tmp_path / "bare.pth"), "ema")


def test_a_checkpoint_of_earlier_releases_is_evaluated_by_its_average_and_resumed(tmp_path):
    run, best = averaging_run(tmp_path), tmp_path / "best.pth"
    run.end_epoch(dict(train_loss=1.0), dict(acc1=84.0, ema_acc1=31.0))
    content = dict(ckpt.read_checkpoint(str(best)), max_accuracy=31.0, score=31.0)
    del content["better"], content["updates"]
    for path in (best, tmp_path / "ckpt_epoch_0.pth"):
        torch.save(content, path)
    assert [taken(best, which) for which in ("auto", "model", "ema")] == ["model_ema", "model", "model_ema"]
    again = averaging_run(tmp_path)
    assert (again.progress.epoch, again.before) == (1, 2)
    assert again.best_in_words() == "31.00% of their average"
    again.end_epoch(dict(train_loss=1.0), dict(acc1=84.0, ema_acc1=31.0))
    assert ckpt.score_of_best(str(tmp_path)) == (84.0, "model")


def test_options_that_changed_since_the_checkpoint_are_told(tmp_path):
    def told(*opts):
        run = small_run(tmp_path, config=dump_config(digits_config(*opts)))
        with logged() as lines:
            restore(run)
        return run, " ".join(lines)

    first, _ = told()
    end_epoch(first, 50.0)
    assert "not trained with" not in told("DATA.NUM_WORKERS", 3, "PRINT_FREQ", 7)[1]
    changed = told("SEED", 3, "AUG.MIXUP", 0.5)[1]
    assert "options that the checkpoint was not trained with: AUG.MIXUP 0.0 -> 0.5, SEED 0 -> 3" in changed
    stranger = dict(ckpt.read_checkpoint(str(tmp_path / "ckpt_epoch_0.pth")), config='TAG: a\nSEED: "\\e[2J"')
    torch.save(stranger, tmp_path / "ckpt_epoch_0.pth")
    assert "SEED '\\x1b[2J' -> 0" in told()[1]


def test_a_checkpoint_of_another_processor_is_told(tmp_path, monkeypatch):
    end_epoch(small_run(tmp_path), 50.0)
    with logged() as lines:
        restore(small_run(tmp_path))
    assert not any("another processor" in line for line in lines)
    monkeypatch.setattr(choices, "describe", lambda: "another")
    with logged() as lines:
        restore(small_run(tmp_path))
    (words,) = (line for line in lines if "another processor" in line)
    assert "here another): this run will end with other bits" in words


def test_a_new_run_averages_from_the_weights_it_starts_with(tmp_path):
    own = micro().state_dict()
    weights = {name: value + 1 for name, value in own.items() if value.is_floating_point()}
    torch.save(dict(own, **weights), tmp_path / "pretrained.pth")
    run = small_run(tmp_path / "run")
    run.updater.average = WeightAverage(run.model, 0.5, warmup=False)
    restore(run, PRETRAINED=tmp_path / "pretrained.pth")
    found = run.updater.average.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in weights.items())


@pytest.mark.chaos
@pytest.mark.parametrize("processes, accumulation", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_resume_is_bit_exact_after_20_kills(tmp_path, data, processes, accumulation):
    opts = ["TRAIN.ACCUMULATION_STEPS", accumulation, "TRAIN.EPOCHS", 3 * accumulation]
    disturbed_run(tmp_path, data, processes, 20, opts)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_bit_exact_with_a_compiled_model(tmp_path, data, processes):
    opts = ["COMPILE", True, "TRAIN.ACCUMULATION_STEPS", 2, "TRAIN.EPOCHS", 2]
    disturbed_run(tmp_path, data, processes, 2, opts)
    assert "torch.compile took" in (run_folder(tmp_path / "disturbed") / "log_rank0.txt").read_text()


@pytest.mark.parametrize("batch_size, world_size", [(8, 1), (5, 1), (4, 2), (3, 3)])
def test_another_size_goes_on_with_the_unseen_images(batch_size, world_size):
    seen = [index for batch in list(TrainBatchSampler(72, 8, 1, 0, 1, seed=0))[:4] for _, index in batch]
    rest = []
    for rank in range(world_size):
        sampler = TrainBatchSampler(72, batch_size, 1, rank, world_size, seed=0)
        sampler.start(0, images=32)
        rest += [index for batch in sampler for _, index in batch]
    assert not set(seen) & set(rest) and len(set(rest)) == len(rest)
    assert len(seen) + len(rest) > 72 - batch_size * world_size


def test_another_number_of_processes_resumes_and_says_what_changed(tmp_path):
    run = small_run(tmp_path)
    run.start_epoch(0)
    run.progress.add(4, dict(loss=torch.tensor(3.0)), torch.tensor(1.0))
    assert run.save() == ["ckpt_epoch_0_images_4.pth"]
    again = small_run(tmp_path)
    again.sampler = TrainBatchSampler(8, 1, 1, 1, 2, seed=0)  # of the second of two
    with logged() as lines:
        restore(again)
    told = "images per update: 4 before, 2 now. The epoch goes on after its first 4 images"
    assert any(told in line for line in lines), lines
    assert (again.progress.images, again.position(), again.before) == (4, 2.0, 0)
    assert again.progress.sums["loss"] == 3.0


@contextlib.contextmanager
def small_disk():
    """Files may grow to 100 kB, less than a checkpoint, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_never_damages_a_checkpoint(tmp_path):
    end_epoch(small_run(tmp_path, epochs=2), 50.0)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pth")}
    run, stopping = (small_run(tmp_path, epochs=2, stop_on_save_error=stop) for stop in (False, True))
    for each in (run, stopping):
        restore(each)
    with logged() as lines, small_disk(), pytest.raises(ckpt.CheckpointError, match="last checkpoint could"):
        for _ in run.epochs_left():
            assert end_epoch(run, 60.0) == [] and run.best == 50.0
    assert "training goes on, earlier checkpoints are untouched" in "".join(lines)
    stopping.start_epoch(1)
    with small_disk(), pytest.raises(ckpt.CheckpointError, match="cannot write a checkpoint to .*; stopping"):
        end_epoch(stopping, 60.0)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "ckpt_epoch_0.pth"]


def test_a_disk_that_is_full_from_the_start_ends_in_one_message(tmp_path, data):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        (disk / "other").write_bytes(bytes(60 << 10))
        where = ["--data-path", data, "--output", disk]
        done = run_main(*ARGUMENTS, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, *where, check=False)
        (disk / "other").unlink()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 1 and "epoch 0 (1 of 1): loss " in done.stdout, done.stdout + done.stderr
    assert "cannot write a checkpoint to" in done.stdout and "cannot write metrics" in done.stdout
    assert done.stderr.count("log_rank0.txt: [Errno 28] No space left on device; going on") == 1
    assert "the last checkpoint could not be written" in done.stderr and "Traceback" not in done.stderr


def test_an_output_folder_that_cannot_be_written_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^cannot write to the output folder {tmp_path}/file/run: Not a dir"):
        FolderClaim(f"{tmp_path}/file/run").take()


def test_deterministic_refuses_other_kernels():
    """The CPU has next to none of them; asking PyTorch shows that the switch is thrown."""
    switches = torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(switches[0])
        torch.backends.cudnn.benchmark = switches[1]


@pytest.mark.slow
def test_every_process_uses_the_checkpoint_that_rank_0_chose(tmp_path, data, port):
    """Rank 1 is given an output folder without any checkpoint, as if its file system showed it none."""
    arguments = [*ARGUMENTS, "--data-path", data, "--output"]
    run_main(*arguments, tmp_path / "rank0", processes=2)
    folder = run_folder(tmp_path / "rank0")
    (folder / "ckpt_epoch_1.pth").unlink()
    commands = [main_command(*arguments, tmp_path / f"rank{rank}") for rank in range(2)]
    for run in start_two(tmp_path, commands, port):
        assert run.wait() == 0, run.text()
    log = (run_folder(tmp_path / "rank1") / "log_rank1.txt").read_text()
    assert f"resuming from {folder}/ckpt_epoch_0.pth: epoch 1" in log
