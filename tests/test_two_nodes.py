"""Two nodes for real: two network namespaces with a link between them, one process on each."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, run_main, write_images

import checkpoint as ckpt

pytestmark = pytest.mark.chaos

TIMEOUT = 15
OPTS = ["--opts", "DATA.NUM_WORKERS", "1", "MODEL.DROP_RATE", "0.1", "PRINT_FREQ", "1", "SAVE_FREQ", "1"]
OPTS += [
    "TRAIN.WARMUP_EPOCHS",
    "1",
    "TRAIN.EPOCHS",
    "2",
    "TRAIN.SAVE_STEPS",
    "1",
    "DIST.TIMEOUT_SECONDS",
    TIMEOUT,
]
ARGUMENTS = ["--cfg", "configs/digits.yaml", "--batch-size", "4", "--device", "cpu", *OPTS]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def nodes():
    """Names of two namespaces with addresses 10.77.0.1 and 10.77.0.2; the links are called eth0."""
    if not shutil.which("ip"):
        pytest.skip("no ip command (Debian: iproute2)")
    names = [f"msg{os.getpid()}{side}" for side in "ab"]
    made = [ip("netns", "add", name) for name in names]
    if any(done.returncode for done in made):
        pytest.skip(f"cannot make network namespaces: {made[0].stderr.strip()}")
    try:
        link = [
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names[1],
        ]
        assert ip(*link).returncode == 0
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0").returncode == 0
            for device in ("lo", "eth0"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield names
    finally:
        for name in names:
            subprocess.run(f"ip netns pids {name} | xargs -r kill -9", shell=True, check=False)
            ip("netns", "delete", name)


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "data" / "train", 24)
    write_images(tmp_path / "data" / "val", 2, seed=1)
    return tmp_path / "data"


class Node:
    """torchrun on one node, its output in a file."""

    def __init__(self, folder, name, rank, arguments):
        self.path = folder / f"node{rank}_{len(list(folder.glob('node*')))}.txt"
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
        command += ["--master_addr=10.77.0.1", "--master_port=29500", "main.py", *arguments]
        environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="eth0")
        with open(self.path, "wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def text(self):
        return self.path.read_text()


def start_both(folder, nodes, data):
    arguments = [*ARGUMENTS, "--data-path", data, "--output", folder / "two"]
    return [Node(folder, name, rank, arguments) for rank, name in enumerate(nodes)]


def final_weights(output):
    path = output / "digits" / "default" / "ckpt_epoch_1.pth"
    return ckpt.read_checkpoint(str(path))["model"]


def assert_same_weights(folder):
    expected, found = final_weights(folder / "one"), final_weights(folder / "two")
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_two_nodes_train_like_one(nodes, data, tmp_path):
    run_main(*ARGUMENTS, "--data-path", data, "--output", tmp_path / "one", processes=2)
    both = start_both(tmp_path, nodes, data)
    for node in both:
        assert node.process.wait(180) == 0, node.text()
    assert "train on 2 x cpu" in both[0].text()
    assert_same_weights(tmp_path)


@pytest.mark.parametrize("side", [0, 1])
def test_a_cut_link_ends_both_sides_in_time_and_the_restart_is_exact(side, nodes, data, tmp_path, count):
    run_main(*ARGUMENTS, "--data-path", data, "--output", tmp_path / "one", processes=2)
    both = start_both(tmp_path, nodes, data)
    end = time.monotonic() + 90
    while "[0/2][4/" not in both[0].text():
        running = both[0].process.poll() is None and time.monotonic() < end
        assert running, both[0].text() + both[1].text()
        time.sleep(0.02)
    assert ip("-n", nodes[side], "link", "set", "eth0", "down").returncode == 0
    cut = time.monotonic()
    for node in both:
        # After the training processes' timeout, torchrun looks for the other node for some seconds.
        assert node.process.wait(TIMEOUT + 60) != 0
        assert "error: lost contact with another process" in node.text(), node.text()
    seconds = time.monotonic() - cut
    assert seconds < TIMEOUT + 10, seconds
    assert ip("-n", nodes[side], "link", "set", "eth0", "up").returncode == 0
    both = start_both(tmp_path, nodes, data)
    for node in both:
        assert node.process.wait(180) == 0, node.text()
    assert re.search(r"resuming from \S+ckpt_epoch_0_images_\d+.pth", both[0].text())
    assert_same_weights(tmp_path)
    count("cut links between two nodes survived bit for bit", 1)
