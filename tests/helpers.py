"""What several test files need: reference numbers, small models, small image folders, runs of main.py."""

import argparse
import atexit
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import checkpoint as ckpt
from analysis.report import draw_curves
from config import get_config, parse_config
from data.samplers import TrainBatchSampler
from distributed import Compute
from logger import DRAWN
from lr_scheduler import build_scheduler
from models.msg_transformer import MSGTransformer
from optimizer import Updater, build_optimizer
from training.guard import Guard
from training.run import Run, Settings
from training.setup import read_start
from training.tracking import RunRecord

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
REFERENCE = TESTS / "reference"
# What people start: other files of tools/ are imported by these.
TOOLS = sorted(f"tools/{path.name}" for path in ROOT.glob("tools/*.py") if "__main__" in path.read_text())
PROGRAMS = ["main.py", "detect.py", *TOOLS]
CVPR22 = dict(patch_embed="conv", downsample="conv")
CVPR22_TINY = dict(CVPR22, embed_dim=64, depths=(2, 4, 12, 4), num_heads=(2, 4, 8, 16))
MICRO = dict(
    img_size=32,
    patch_size=2,
    num_classes=10,
    embed_dim=48,
    depths=(2, 2, 2),
    num_heads=(3, 6, 12),
    window_size=4,
    shuffle_size=(4, 2, 1),
)


def reference(name):
    """A file of reference numbers."""
    return json.loads((REFERENCE / name).read_text())


def fill_weights(model):
    """Fill parameters with the pseudo-random values under which the reference numbers were made."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            r = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * r if name.endswith("weight") else 0.1 * r)
            elif any(part in name for part in ("msg", "bias_table", "pos_embed")):
                parameter.copy_(0.5 * r)
            else:
                parameter.copy_(r / parameter[0].numel() ** 0.5)
    return model


def golden_images(size):
    """The two images under which the reference numbers were made."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2021), dtype=torch.float64)


def micro(**changes):
    """A micro model in evaluation mode, with the reference weights."""
    return fill_weights(MSGTransformer(**dict(MICRO, drop_path_rate=0.0, **changes))).eval()


def config_of_file(path, *opts, **flags):
    """The config of a YAML file, changed by --opts words and by flags."""
    return get_config(argparse.Namespace(cfg=str(ROOT / path), opts=list(map(str, opts)), **flags))


def digits_config(*opts, **flags):
    """The digits config, likewise."""
    return config_of_file("configs/digits.yaml", *opts, **flags)


def coco_config(name="shapes", *opts):
    """A config of configs/coco, likewise."""
    return config_of_file(f"configs/coco/{name}.yaml", *opts)


def write_images(folder, per_class, classes=("a", "b", "c"), size=32, seed=0):
    """Write an ImageFolder split of small noise images, each class with its own mean colour."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        for i in range(per_class):
            pixels = rng.integers(0, 128, (size, size, 3)) + np.eye(3)[label % 3] * 100
            Image.fromarray(pixels.astype(np.uint8)).save(os.path.join(folder, name, f"{i}.png"))


def write_set(folder, images):
    """A COCO set for training and validation of images (height, width, "object", "crowd", "both" or "")."""
    content = dict(images=[], annotations=[], categories=[dict(id=1, name="a")])
    for split in ("train", "val"):
        (folder / split).mkdir(exist_ok=True)
    for i, (height, width, kind) in enumerate(images):
        number = 7 * (i + 3) % 101  # neither in order nor its place
        for split in ("train", "val"):
            Image.new("RGB", (width, height)).save(folder / split / f"{i}.png")
        content["images"].append(dict(id=number, file_name=f"{i}.png", height=height, width=width))
        item = dict(image_id=number, category_id=1, bbox=[1, 1, 5 + i, 6], area=15)
        item["segmentation"] = [[1, 1, 6 + i, 1, 6 + i, 7]]
        for crowd in dict(object=[0], crowd=[1], both=[1, 0]).get(kind, []):
            content["annotations"].append(dict(item, iscrowd=crowd))
    (folder / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return content


def main_command(*arguments, processes=1, torchrun=(), device="cpu", program="main.py"):
    """The words of a command; more processes than one go through torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    return [*command, program, *map(str, arguments), "--device", device]


def run_main(*arguments, processes=1, check=True, timeout=1800, program="main.py"):
    """Run main.py as a user would; returns the finished process, with stdout and stderr as text."""
    done = run_forked(program, *arguments, "--device", "cpu", processes=processes, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_forked(program, *arguments, processes=1, timeout=300):
    """Run a program of the repository in processes forked from one that has imported torch and main.py.

    Importing them takes longer than most runs in tests. For what must be a Python or a torchrun of its own
    there is :func:`main_command`.

    Args:
        program: its path below the repository.
        processes: more than one get what torchrun puts into their environment.
    """
    context = multiprocessing.get_context("forkserver")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    command, started = [str(ROOT / program), *map(str, arguments)], []
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as error:
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            context.set_forkserver_preload(["main", "detect", "torch.utils.tensorboard"])
            for rank in range(processes):
                if processes > 1:
                    environment.update(RANK=str(rank), LOCAL_RANK=str(rank))
                given = command, dict(environment), [out.name, error.name]
                started.append(context.Process(target=_run_program, args=given))
                started[-1].start()
        end = time.monotonic() + timeout
        for process in started:
            process.join(max(0, end - time.monotonic()))
        late = [process.kill() for process in started if process.exitcode is None]
        if late:
            raise subprocess.TimeoutExpired(command, timeout)
        texts = [file.read() for file in (out, error)]
        code = next((process.exitcode for process in started if process.exitcode), 0)
        return subprocess.CompletedProcess(command, code, *texts)


def _run_program(command, environment, outputs):
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # the default again
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[:] = command
    sys.path[:0] = [os.path.dirname(command[0]), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]  # timm has imported it where it is installed: a stand-in must win here too
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Started:
    """A command that runs in a session of its own, with what it prints in a new file of ``folder``."""

    def __init__(self, folder, command, **environment):
        self.path = folder / f"console{len(list(folder.glob('console*')))}.txt"
        environment = dict(os.environ, OMP_NUM_THREADS="1", **environment)
        command = list(map(str, command))
        after = [word for flag, word in zip(command, command[1:]) if flag in ("--output", "OUTPUT")]
        self.output = Path(after[0] if after else folder)
        self.before = {path: path.stat().st_size for path in self.logs()}
        with open(self.path, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def text(self):
        """What it has printed so far."""
        return self.path.read_text()

    def logs(self):
        """The log files of rank 0 below its ``--output``."""
        return list(self.output.glob("*/*/log_rank0.txt"))

    def told(self):
        """What it has printed and logged so far: the updates of short epochs are in the log alone."""
        logged = [path.read_bytes()[self.before.get(path, 0) :].decode() for path in self.logs()]
        return self.text() + "".join(logged)

    def runs(self):
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def wait_for(self, words, seconds=600):
        """Wait until it has printed or logged ``words``."""
        end = time.monotonic() + seconds
        while words not in self.told():
            assert self.runs() and time.monotonic() < end, self.text()
            time.sleep(0.02)

    def wait(self, seconds=300):
        """Wait for the end; returns the exit code."""
        return self.process.wait(seconds)


def start_two(folder, commands, port, **environment):
    """Two commands as processes that meet at a port, each the first of its node; no launcher ends them."""
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK="0")
    environment |= dict(TORCHELASTIC_USE_AGENT_STORE="True")
    return [Started(folder, command, RANK=str(rank), **environment) for rank, command in enumerate(commands)]


def silent_record(folder):
    """The record of a run that leaves none, as on other ranks than 0."""
    return RunRecord(str(folder), 1, draw_curves, DRAWN)


def new_run(folder, model, sampler, config, /, **settings):
    """A run on the CPU that has not begun; settings are those of :class:`training.run.Settings`."""
    optimizer, train = build_optimizer(config, model, 1.0), config.TRAIN
    scheduler = build_scheduler(config, optimizer, sampler.updates_per_epoch, 1.0)
    compute, accumulation = Compute(torch.device("cpu")), sampler.accumulation
    updater = Updater(model, optimizer, compute, accumulation, train.CLIP_GRAD, train.MAX_NONFINITE)
    settings = Settings(str(folder), seed=sampler.seed, **settings)
    return Run(settings, updater, scheduler, sampler, silent_record(folder), Guard(0, 0))


def small_run(folder, **settings):
    """A run of a micro model that keeps its checkpoints in ``folder``, at the start of epoch 0."""
    os.makedirs(folder, exist_ok=True)
    sampler = TrainBatchSampler(8, 4, 1, 0, 1, seed=0)
    return new_run(folder, micro(), sampler, digits_config(), **settings)


class Batches(list):
    """A list of batches that passes for a loader."""

    paths = [f"{index}.png" for index in range(64)]

    def check_failures(self):
        """None failed."""


def restore(run, auto_resume=True, **start):
    """Restore a run as main.py does, with options of ``MODEL`` such as RESUME; returns it."""
    config = parse_config(run.settings.config, "the run") if run.settings.config else digits_config()
    config.defrost()
    config.EVAL_MODE, config.OUTPUT = False, run.settings.folder
    config.TRAIN.AUTO_RESUME = auto_resume
    for name, path in start.items():
        config.MODEL[name] = str(path)
    run.restore(read_start(config))
    return run


def loop_exchange(manip_type, x):
    """The exchange of messengers (regions, G, C), a window and a channel group at a time."""
    y, windows = x.clone(), x.shape[1]
    size = x.shape[2] // windows
    for j, group in itertools.product(range(windows), range(windows)):
        place = slice(group * size, (group + 1) * size)
        if manip_type == "shuf":
            y[:, j, place] = x[:, group, j * size : (j + 1) * size]
        elif manip_type == "shift":
            y[:, j, place] = x[:, (j + group) % windows, place]
        elif manip_type == "mean":
            y[:, j, place] = sum(x[:, window, place] for window in range(windows)) / windows
    return y


@contextlib.contextmanager
def logged():
    """Context that yields the list of the lines that are logged in it."""
    handler, logger, lines = logging.Handler(), logging.getLogger("msg_transformer"), []
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def run_folder(output, model="digits"):
    """Where a run of a config, named by its ``MODEL.NAME``, writes below ``output``."""
    return Path(output) / model / "default"


def assert_same_weights(output, expected):
    """The last checkpoints of two runs, given by their ``--output``, hold the same bits."""
    name = ckpt.in_order(run_folder(expected))[-1]
    found, wanted = (ckpt.read_checkpoint(str(run_folder(root) / name)) for root in (output, expected))
    assert found.get("ema") == wanted.get("ema")
    for kind in ("model", *(["model_ema"] if "ema" in wanted else [])):
        assert_same_tensors(found[kind], wanted[kind])


def assert_same_tensors(found, wanted):
    """Two dicts hold the same tensors under the same names."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


def losses(folder):
    """The logged loss and gradient norm of every update, and the metrics of every epoch but its times."""
    pattern = r"Train: \[(\d+)/\d+\]\[(\d+)/\d+\].*loss ([\d.]+ \([\d.]+\)).*\tgrad_norm ([\d.]+ \([\d.]+\))"
    log = (folder / "log_rank0.txt").read_text()
    updates = {(epoch, update): values for epoch, update, *values in re.findall(pattern, log)}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second")
    return updates, [{name: value for name, value in row.items() if name not in times} for row in rows]


def assert_same_run(output, expected, model="digits"):
    """Two runs ended with the same last and best weights, optimizer state, losses and metrics."""
    folders = [run_folder(root, model) for root in (output, expected)]
    assert losses(folders[0]) == losses(folders[1])
    for name in (ckpt.in_order(folders[1])[-1], ckpt.BEST):
        found, wanted = (ckpt.read_checkpoint(str(folder / name)) for folder in folders)
        for key in ("epoch", "score", "max_accuracy", "ema"):
            assert found.get(key) == wanted.get(key), key
        for kind in ("model", *(["model_ema"] if "ema" in wanted else [])):
            assert_same_tensors(found[kind], wanted[kind])
        for index, moments in wanted["optimizer"]["state"].items():
            assert_same_tensors(found["optimizer"]["state"][index], moments)
