"""What runs on Linux alone must not be needed: Windows, macOS, Apple's GPUs. All of it is tested on Linux."""

import os
import pickle
import platform
import subprocess
import sys
import types

import pytest
import torch
from helpers import ROOT, Started, coco_config, digits_config, run_folder, write_set

import detection.loaders
from config import get_config, parse_args
from data import build_loaders
from distributed import Compute, build_compute
from logger import read_metrics
from utils import UserError

# Windows as far as it can be played: spawned workers read this file too. The libraries come first, since they
# ask for the operating system in other ways.
WINDOWS = """
import errno, multiprocessing, os, shutil, signal, sys, types
import timm.data, torch
if __name__ == "__main__":
    import matplotlib.backends.backend_agg, torch.utils.tensorboard

def open_file(path, *others, open=os.open, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "a folder", path)
    return open(path, *others, **options)

os.open = open_file
shutil._use_fd_functions = False  # what removes a folder opens none there
without = types.ModuleType("signal")
here = ("SIGINT", "SIGTERM", "SIGABRT", "SIG_DFL", "SIG_IGN")
vars(without).update({k: v for k, v in vars(signal).items() if k[:3] != "SIG" or k in here})
sys.modules.update(fcntl=None, resource=None, signal=without)
for name in ("fork", "killpg", "getpgid", "setsid", "uname", "sched_getaffinity", "mkfifo", "getuid"):
    delattr(os, name)

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import distributed, main
    from config import read_command_line
    config = read_command_line("", "imagenet")
    distributed.run_command(lambda: main.main(config), "")
"""


def test_an_epoch_and_its_evaluation_need_nothing_that_windows_lacks(data, tmp_path):
    script = tmp_path / "windows.py"
    script.write_text(WINDOWS)
    command = [sys.executable, script, "--cfg", "configs/digits.yaml", "--data-path", data, "--device", "cpu"]
    command += ["--output", tmp_path, "--batch-size", 36, "--opts", "TRAIN.EPOCHS", 1, "PRINT_FREQ", 1]
    command += ["TRAIN.WARMUP_EPOCHS", 0, "DATA.NUM_WORKERS", 1]
    run = Started(tmp_path, list(map(str, command)), PYTHONPATH=str(ROOT))
    assert run.wait() == 0, run.text()
    told = run.told()
    assert "Train: [0/1][1/2]" in told and "mem nanMB" in told and "no lock for" in told
    assert "Traceback" not in told
    (row,) = read_metrics(run_folder(tmp_path) / "metrics.jsonl")
    assert row["epoch"] == 0 and (run_folder(tmp_path) / "best.pth").exists()


@pytest.mark.parametrize("backend", ["pil", "opencv", "coco"])
def test_what_a_worker_is_given_can_be_pickled(backend, data, tmp_path):
    """Where processes are not forked: on Windows and macOS, and on Linux from Python 3.14 on."""
    if backend == "coco":
        write_set(tmp_path, [(40, 40, "object")] * 4)
        of_set = ["DATA.DATA_PATH", tmp_path, "DATA.BATCH_SIZE", 1]
        train, _, val, _ = detection.loaders.build_detection_loaders(coco_config("shapes", *of_set))
    else:
        train, _, val, _ = build_loaders(digits_config("DATA.BACKEND", backend, data_path=str(data)))
    for part, key in ((train.loader, (0, 1)), (val.loader, 1)):
        given = part.dataset, part.collate_fn, part.worker_init_fn
        samples, collate, _ = pickle.loads(pickle.dumps(given))
        images, _, failed = collate([samples[key]])
        assert len(images) and not failed


def compute_of(*opts):
    return build_compute(get_config(parse_args("", argv=["--cfg", "configs/digits.yaml", *opts])))


@pytest.mark.parametrize("emulated", [False, True])
def test_mixed_precision_on_a_cpu_is_float32_if_bfloat16_would_be_emulated(monkeypatch, emulated):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    supported = dict(_is_mkldnn_bf16_supported=lambda: not emulated)
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**supported))
    compute = compute_of("--device", "cpu", "--opts", "AMP_OPT_LEVEL", "O1")
    assert compute.dtype is (None if emulated else torch.bfloat16)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert compute_of("--device", "cpu", "--opts", "AMP_OPT_LEVEL", "O1").dtype == torch.bfloat16


def test_the_gpu_of_a_mac_takes_the_precision_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mixed = "AMP_OPT_LEVEL", "O1"
    half, brain, full = (
        compute_of("--device", "mps", *opts)
        for opts in (("--opts", *mixed), ("--opts", *mixed, "AMP_DTYPE", "bfloat16"), ("--disable-amp",))
    )
    assert half == Compute(torch.device("mps", 0), torch.float16)
    assert (brain.dtype, full.dtype) == (torch.bfloat16, None)
    assert half.float64_device() == torch.device("cpu")


@pytest.mark.parametrize("available, opts", [(False, ()), (True, ("--local-rank", "1"))])
def test_a_gpu_that_is_not_there_is_refused(available, opts, monkeypatch):
    """A Mac has one GPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    with pytest.raises(UserError, match="no GPU for --device mps, PyTorch sees [01]: use --device cpu"):
        compute_of("--device", "mps", *opts)


FAULTS = """
import resource, sys
from utils import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for repeat in range(30):
    if repeat == 10:  # the pages of the first ones are new in any case
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cleared(choice, **variables):
    """Pages that the kernel cleared for 20 times 64 MiB, each freed before the next."""
    names = ("GLIBC_TUNABLES", "MALLOC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment.update(variables, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", FAULTS, choice]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_freed_memory_is_used_again_unless_variables_of_glibc_say_otherwise():
    released, kept = cleared("default"), cleared("keep")
    assert kept < released / 20
    assert cleared("keep", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072") > released / 2
