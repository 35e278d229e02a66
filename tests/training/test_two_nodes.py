"""Two nodes for real: two network namespaces with a link between them, one process on each."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from helpers import Started, assert_same_weights, run_main

pytestmark = pytest.mark.chaos

TIMEOUT = 15
ARGUMENTS = shlex.split("--cfg configs/digits.yaml --batch-size 4 --device cpu --opts DATA.NUM_WORKERS 1")
ARGUMENTS += shlex.split("MODEL.DROP_RATE 0.1 PRINT_FREQ 1 SAVE_FREQ 1 TRAIN.WARMUP_EPOCHS 1 TRAIN.EPOCHS 2")
ARGUMENTS += shlex.split(f"TRAIN.SAVE_STEPS 1 DIST.TIMEOUT_SECONDS {TIMEOUT}")


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
        first, second = names
        link = f"link add eth0 netns {first} type veth peer name eth0 netns {second}"
        assert ip(*link.split()).returncode == 0
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0").returncode == 0
            for device in ("lo", "eth0"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield names
    finally:
        for name in names:
            subprocess.run(f"ip netns pids {name} | xargs -r kill -9", shell=True, check=False)
            ip("netns", "delete", name)


def start_both(folder, nodes, data):
    """One torchrun on each node, with one process."""
    both = []
    for rank, name in enumerate(nodes):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
        command += ["--master_addr=10.77.0.1", "--master_port=29500", "main.py", *ARGUMENTS]
        command += ["--data-path", str(data), "--output", str(folder / "two")]
        both.append(Started(folder, command, GLOO_SOCKET_IFNAME="eth0"))
    return both


@pytest.mark.parametrize("side", [0, 1])
def test_a_cut_link_ends_both_sides_in_time_and_the_restart_is_exact(side, nodes, data, tmp_path):
    run_main(*ARGUMENTS, "--data-path", data, "--output", tmp_path / "one", processes=2)
    both = start_both(tmp_path, nodes, data)
    both[0].wait_for("[0/2][4/")
    assert ip("-n", nodes[side], "link", "set", "eth0", "down").returncode == 0
    cut = time.monotonic()
    for node in both:
        # After the training processes' timeout, torchrun looks for the other node for some seconds.
        assert node.wait(TIMEOUT + 60) != 0
        assert "error: lost contact with another process" in node.text(), node.text()
    seconds = time.monotonic() - cut
    assert seconds < TIMEOUT + 10, seconds
    assert ip("-n", nodes[side], "link", "set", "eth0", "up").returncode == 0
    both = start_both(tmp_path, nodes, data)
    for node in both:
        assert node.wait() == 0, node.text()
    assert re.search(r"resuming from \S+ckpt_epoch_0_images_\d+.pth", both[0].text())
    assert_same_weights(tmp_path / "two", tmp_path / "one")
