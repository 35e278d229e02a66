"""What only a GPU can show of training: a resumed float16 run, deterministic kernels."""

import shlex
import signal

import pytest
import torch
from helpers import Started, assert_same_weights, main_command, run_folder

import checkpoint as ckpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ARGUMENTS = shlex.split(
    "--cfg configs/digits.yaml --batch-size 4 --amp-opt-level O1 --opts DATA.NUM_WORKERS 1"
)
ARGUMENTS += shlex.split(
    "MODEL.DROP_RATE 0.1 MODEL.DROP_PATH_RATE 0.2 AUG.MIXUP 0.8 PRINT_FREQ 1 SAVE_FREQ 1"
)
ARGUMENTS += shlex.split("TRAIN.WARMUP_EPOCHS 1 TRAIN.EPOCHS 12 DETERMINISTIC True AMP_DTYPE float16")


def final_scaler(output):
    """The gradient scaler's state at the end of a run."""
    name = ckpt.in_order(run_folder(output))[-1]
    return ckpt.read_checkpoint(str(run_folder(output) / name))["updater"]["scaler"]


def test_a_stopped_float16_run_ends_with_the_bits_and_the_loss_scale_of_a_calm_one(data, tmp_path):
    """216 updates; three times a signal stops the second run."""
    commands = [
        main_command(*ARGUMENTS, "--data-path", data, "--output", tmp_path / name, device="cuda")
        for name in ("calm", "stopped")
    ]
    calm = Started(tmp_path, commands[0])
    assert calm.wait() == 0, calm.text()
    for epoch in (2, 5, 9):
        run = Started(tmp_path, commands[1])
        run.wait_for(f"Train: [{epoch}/12][7/")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, run.text()
    last = Started(tmp_path, commands[1])
    assert last.wait() == 0, last.text()
    assert_same_weights(tmp_path / "stopped", tmp_path / "calm")
    assert final_scaler(tmp_path / "stopped") == final_scaler(tmp_path / "calm")
