"""main.py as a user runs it: training, resuming, evaluating, timing, and what it says when it cannot."""

import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    PROGRAMS,
    ROOT,
    assert_same_tensors,
    digits_config,
    restore,
    run_folder,
    run_main,
    small_run,
    write_images,
)
from PIL import Image
from torch.nn.functional import cross_entropy

import checkpoint as ckpt
from data import build_loaders
from distributed import seeded
from logger import ProgressBar, log_progress, read_metrics, start_logging
from models import build_model

SMALL = shlex.split(
    "--cfg configs/digits.yaml --batch-size 4 --opts DATA.NUM_WORKERS 1 PRINT_FREQ 1 SAVE_FREQ 1"
)
SMALL += shlex.split("TRAIN.WARMUP_EPOCHS 1 MODEL.DROP_RATE 0.1 TRAIN.EPOCHS")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folder of a run of two epochs in two processes, and what it printed."""
    output = tmp_path_factory.mktemp("output")
    done = run_main(*SMALL, 2, "AUG.MIXUP", 0.8, "--data-path", data, "--output", output, processes=2)
    return run_folder(output), done.stdout


def log_of(folder):
    """The log of rank 0 in a run's folder."""
    return (folder / "log_rank0.txt").read_text()


def figures(text):
    """The last accuracy line: (top-1, top-5, loss, images)."""
    found = re.findall(r"\* Acc@1 ([\d.]+) Acc@5 ([\d.]+) Loss ([\d.]+) on (\d+) images", text)
    return tuple(map(float, found[-1]))


def test_foreign_lines_among_the_metrics_do_no_harm(trained, tmp_path):
    rows = (trained[0] / "metrics.jsonl").read_text()
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n{"loss": 1}\n' + rows + '{"epoch": "2", "acc1": null}\n{"epoch": 2, "tr')
    assert read_metrics(path) == [json.loads(line) for line in rows.splitlines()]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_run_leaves_logs_metrics_curves_and_checkpoints(trained):
    folder, log = trained[0], log_of(trained[0])
    assert "INFO Train: [1/2][8/9]\teta 0:00:00 (run 0:00:00) lr " in log
    for name in ("config.yaml", "log_rank0.txt", "log_rank1.txt", "ckpt_epoch_0.pth", "best.pth"):
        assert (folder / name).stat().st_size > 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert figures(log)[:3] == pytest.approx(
        [rows[1]["acc1"], rows[1]["acc5"], rows[1]["val_loss"]], abs=1e-3
    )
    assert ckpt.read_checkpoint(str(folder / "best.pth"))["classes"] == ["a", "b", "c"]
    assert Image.open(folder / "curves.png").width > 800
    assert any(name.startswith("events") for name in os.listdir(folder / "tensorboard"))


def test_a_short_run_prints_what_it_trains_a_line_an_epoch_and_the_result(trained, data):
    folder, printed = trained
    best = max(row["acc1"] for row in read_metrics(folder / "metrics.jsonl"))
    start, first, second, result = re.fullmatch(
        r"(.*?)(epoch 0 \(1 of 2\).*?)\n(epoch 1 \(2 of 2\).*?)\n(trained epochs.*)", printed, re.DOTALL
    ).groups()
    model = build_model(digits_config("MODEL.NUM_CLASSES", 3))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for words in (
        f"train on 2 x cpu, PyTorch {torch.__version__}\n",
        f"\n{data}/train: 72 images in 3 classes\n",
        f"\ndigits: {parameters:,} parameters, ",
        "\n2 epochs of 9 updates with 8 images each, at a learning rate of up to 0.000125 "
        f"(TRAIN.BASE_LR for 512 images), to {folder}\n",
    ):
        assert words in start
    for line in (first, second):
        assert re.fullmatch(
            r"epoch \d \(\d of 2\): loss \d\.\d{4}, top-1 [\d.]+% \(best [\d.]+%\), 0:\d\d:\d\d left", line
        )
    assert f"{best:.2f}%" in result
    assert f"best checkpoint: {folder}/best.pth\n" in result
    assert result.endswith(f"training curves: {folder}/curves.png\n")
    assert len(printed.splitlines()) < 15


def test_a_long_epoch_shows_its_progress_on_the_console_too(capsys, tmp_path):
    start_logging(str(tmp_path), 0, training=True)
    for seconds in (59, 61):
        log_progress(f"a line of {seconds} s", seconds)
    assert capsys.readouterr().out == "a line of 61 s\n"
    assert re.findall(r"\(test_runs.py \d+\): INFO a line of (\d+) s", log_of(tmp_path)) == ["59", "61"]


class Terminal(io.StringIO):
    """What a program shows on a terminal."""

    def isatty(self):
        return True


def test_a_terminal_has_a_bar_and_the_log_file_the_lines(tmp_path, monkeypatch):
    """Lines stand above the bar, which is gone at the end, an error's too."""
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    start_logging(str(tmp_path), 0, training=True)
    with pytest.raises(SystemExit), ProgressBar("epoch 0", 10) as bar:
        for step in bar.over(range(10)):
            log_progress(f"line {step}", 3600)
            if step == 1:
                logging.getLogger("msg_transformer").warning("careful")
            if step == 2:
                sys.exit("stopped")
    shown = terminal.getvalue()
    assert "epoch 0:  10%" in shown and "line 1" not in shown
    assert re.search(r"\r +\r\S*WARNING\S* careful\n\repoch 0", shown), shown
    assert re.search(r"\r +\r$", shown) and bar.disable and not bar.clock.is_alive()
    assert re.findall(r"INFO line (\d)", log_of(tmp_path)) == ["0", "1", "2"]


@pytest.mark.parametrize("rank, terminal", [(1, Terminal()), (0, io.StringIO())])
def test_other_ranks_and_files_have_no_bar(rank, terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    start_logging(str(tmp_path), rank, training=True)
    with ProgressBar("epoch 0", 3) as bar:
        assert list(bar.over("abc")) == ["a", "b", "c"]
        log_progress("a line", 3600)
    assert terminal.getvalue() == ("a line\n" if rank == 0 else "")


def test_the_rate_of_a_bar_does_not_count_the_start(monkeypatch):
    bar = ProgressBar("epoch 0", 10, disable=False, file=io.StringIO(), initial=3)
    begin = bar.start_t
    with bar:
        for seconds in (100, 102, 104):  # the first update waited for the workers
            monkeypatch.setattr(bar, "_time", lambda seconds=seconds: begin + seconds)
            bar.update()
        assert bar.format_dict["n"] == 6 and bar.format_dict["rate"] == pytest.approx(0.5)
        assert bar.format_dict["elapsed"] == pytest.approx(4)
        assert "6/10 [00:04<00:08," in str(bar)


def test_a_bar_shows_the_time_while_nothing_is_done():
    screen = io.StringIO()
    with ProgressBar("epoch 0", 10, disable=False, file=screen):
        while "0/10 [00:01<" not in screen.getvalue():
            time.sleep(0.01)


HEAVY = {"torch", "torchvision", "timm", "matplotlib", "cv2", "sklearn"}


@pytest.mark.parametrize("words", ["main.py --nonsense x", *(f"{program} --help" for program in PROGRAMS)])
def test_usage_and_mistakes_are_shown_before_anything_heavy_is_imported(words):
    command = [sys.executable, "-X", "importtime", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & HEAVY
    helps = words.endswith("--help")
    assert (done.returncode, helps) in ((0, True), (2, False))
    assert "usage: " in done.stdout if helps else "error: " in done.stderr


def test_the_learning_rate_is_for_the_images_of_all_processes(trained):
    """2 epochs of 9 updates, the first to warm up; an update takes 8 images, the config has rates for 512."""
    rows = read_metrics(trained[0] / "metrics.jsonl")
    base, warmup, least = (rate * 8 / 512 for rate in (8e-3, 8e-6, 8e-5))
    last_of_warmup = warmup + (base - warmup) * 8 / 9
    last = least + (base - least) * (1 + math.cos(math.pi * 17 / 18)) / 2
    assert [row["lr"] for row in rows] == pytest.approx([last_of_warmup, last], rel=1e-9)


def test_processes_see_different_images_and_share_their_gradients(trained):
    logs = [(trained[0] / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    losses, norms = (
        [re.findall(rf"Train: .*\t{name} ([\d.]+) \(([\d.]+)\)", log) for log in logs]
        for name in ("loss", "grad_norm")
    )
    assert len(norms[0]) == 18 and norms[0] == norms[1]
    assert all(one != other for one, other in zip(*losses))
    rows = read_metrics(trained[0] / "metrics.jsonl")
    for row, last in zip(rows, (8, 17)):
        means = [float(losses_of_rank[last][1]) for losses_of_rank in losses]
        assert row["train_loss"] == pytest.approx(sum(means) / 2, abs=1e-4)
        assert row["grad_norm"] == pytest.approx(float(norms[0][last][1]), abs=1e-4)


def test_the_first_loss_is_that_of_the_seeds_model_and_images(data, tmp_path):
    """Labels are smoothed once, though mixup, which mixes nothing here, smooths them as well."""
    opts = ["SEED", 3, "AUG.MIXUP", 0.8, "AUG.MIXUP_PROB", 0.0, "MODEL.LABEL_SMOOTHING", 0.5]
    opts += ["MODEL.DROP_PATH_RATE", 0.0, "PRINT_FREQ", 1, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0]
    where = ["--data-path", data, "--output", tmp_path]
    run_main("--cfg", "configs/digits.yaml", *where, "--batch-size", 36, "--opts", *opts)
    config = digits_config(*opts, "MODEL.NUM_CLASSES", 3, data_path=str(data), batch_size=36)
    with seeded("model", 3):
        model = build_model(config)
    images, targets = next(iter(build_loaders(config)[0]))
    expected = cross_entropy(model(images), targets, label_smoothing=0.5).item()
    found = float(re.search(r"Train: \[0/1\]\[0/2\].*\tloss ([\d.]+)", log_of(run_folder(tmp_path)))[1])
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_same_command_resumes_and_says_so(trained, data, tmp_path):
    folder = run_folder(tmp_path)
    shutil.copytree(trained[0], folder)
    arguments = ["AUG.MIXUP", 0.8, "--data-path", data, "--output", tmp_path]
    assert "all 2 epochs are trained already" in run_main(*SMALL, 2, *arguments, processes=2).stdout
    (folder / "ckpt_epoch_1.pth").unlink()
    printed = run_main(*SMALL, 2, *arguments, processes=2).stdout
    assert f"resuming from {folder}/ckpt_epoch_0.pth: epoch 1" in printed
    assert_same_tensors(*(ckpt.read_run(str(f / "ckpt_epoch_1.pth"))["model"] for f in (trained[0], folder)))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_evaluation_takes_the_averaged_weights_that_are_asked_for(data, tmp_path):
    where = ["--data-path", data, "--output", tmp_path]
    opts = ["TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.9, "TRAIN.BASE_LR", 0.05]
    printed = run_main(*SMALL, 1, *opts, "TRAIN.WARMUP_EPOCHS", 0, *where).stdout
    (row,) = read_metrics(run_folder(tmp_path) / "metrics.jsonl")
    own, averaged = (f"{row[name]:.2f}%" for name in ("acc1", "ema_acc1"))
    assert f"top-1 {own}, EMA top-1 {averaged} (best " in printed
    assert abs(row["val_loss"] - row["ema_val_loss"]) > 1e-3
    expected = pytest.approx((row["ema_acc1"], row["ema_acc5"], row["ema_val_loss"], 9), abs=1e-3)
    done = run_main("--cfg", "configs/digits.yaml", "--eval", *where, "--opts", "TEST.WEIGHTS", "ema")
    assert figures(done.stdout) == expected and "taking its averaged weights (EMA)" in done.stdout


def test_another_run_does_not_change_the_files_of_the_first(tmp_path):
    small_run(tmp_path).end_epoch(dict(train_loss=1.0), dict(acc1=50.0))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ckpt.CheckpointError, match="ckpt_epoch_0.pth would be overwritten: choose another"):
        restore(small_run(tmp_path), auto_resume=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("processes, batch_size", [(1, 1), (3, 7)])
def test_evaluation_is_the_same_for_any_processes_and_batch_size(
    trained, data, processes, batch_size, tmp_path
):
    printed = run_main(
        "--cfg", "configs/digits.yaml", "--data-path", data, "--eval", "--batch-size", batch_size,
        "--resume", trained[0] / "ckpt_epoch_1.pth", "--output", tmp_path, processes=processes,
    ).stdout  # fmt: skip
    assert figures(printed) == pytest.approx(figures(log_of(trained[0])), abs=1e-6)
    report = json.loads((run_folder(tmp_path) / "eval.json").read_text())
    assert report["images"] == 9 and [row["images"] for row in report["classes"]] == [3, 3, 3]
    files = [mistake["file"] for mistake in report["mistakes"]]
    wrong = sum(row["images"] - row["right"] for row in report["classes"])
    assert len(files) == len(set(files)) == wrong == round(9 * (1 - figures(printed)[0] / 100))
    assert not (trained[0] / "eval.json").exists()


def test_fine_tuning_on_other_classes_starts_from_the_weights(trained, tmp_path):
    """The learning rate is too small to move a weight: what is there at the end was there at the start."""
    write_images(tmp_path / "train", 8, classes="ab")
    write_images(tmp_path / "val", 2, classes="ab")
    printed = run_main(
        *SMALL, 1, "TRAIN.BASE_LR", 1e-12, "TRAIN.WARMUP_LR", 0, "TRAIN.MIN_LR", 0, "--data-path", tmp_path,
        "--output", tmp_path, "--pretrained", trained[0] / "best.pth", "--accumulation-steps", 2,
        "--use-checkpoint", "--amp-opt-level", "O2",
    ).stdout  # fmt: skip
    assert "starting from the weights of" in printed and "running as O1" in printed
    assert "the head is new: it has 3 classes, the data 2; only the checkpoint has 'c'" in printed
    source, tuned = (
        ckpt.read_checkpoint(str(f / "best.pth"))["model"] for f in (trained[0], run_folder(tmp_path))
    )
    assert tuned.pop("head.weight").shape == (2, 192) and tuned.pop("head.bias").shape == (2,)
    for name, weight in tuned.items():
        torch.testing.assert_close(weight, source[name], rtol=0, atol=1e-6)


def test_throughput_of_a_checkpoint_takes_its_classes_where_there_are_no_data(trained, tmp_path):
    words = ["--cfg", "configs/digits.yaml", "--throughput", "--batch-size", 1, "--output", tmp_path]
    printed = run_main(*words, "--resume", trained[0] / "best.pth").stdout
    assert f"timing {trained[0] / 'best.pth'}" in printed and " throughput " in printed


def test_throughput_without_data():
    arguments = ["--cfg", "configs/digits.yaml", "--throughput", "--batch-size", 2]
    printed = run_main(*arguments, "--opts", "DATA.IMG_SIZE", "[32, 48]").stdout
    assert float(re.search(r"batch_size 2 throughput ([\d.]+) images/s in float32", printed)[1]) > 0


def test_a_folder_of_other_classes_is_not_evaluated_and_the_message_is_one_line(trained, tmp_path):
    write_images(tmp_path / "val", 1, classes="abd")
    arguments = ["--cfg", "configs/digits.yaml", "--data-path", tmp_path, "--eval", "--output", tmp_path]
    done = run_main(*arguments, "--resume", trained[0] / "best.pth", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(r"error: .*best.pth was trained on other classes.* only the data has 'd'", done.stderr)
