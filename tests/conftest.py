"""The images that runs in tests train on, and what every test gives back."""

import signal
import subprocess
import sys

import pytest
from helpers import ROOT, logged, write_images
from torch.distributed import TCPStore

import utils


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """An ImageFolder of three classes of small noise images: 72 for training, 9 for validation."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", 24)
    write_images(folder / "val", 3, seed=1)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Generated shapes for detection: 24 images for training, 7 of them without objects, and 7 others."""
    folder = tmp_path_factory.mktemp("shapes")
    command = [sys.executable, "tools/make_shapes.py", str(folder), "--train", "24", "--val", "7"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Reports without halves of characters, which tests of odd names log and pytest-xdist cannot send."""
    report = yield
    sections = report.sections
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in sections]
    return report


@pytest.fixture(autouse=True)
def signal_handlers():
    """Give pytest back the signals that a Guard takes."""
    handlers = [signal.getsignal(number) for number in utils.STOP_SIGNALS]
    yield
    for number, handler in zip(utils.STOP_SIGNALS, handlers):
        signal.signal(number, handler)


@pytest.fixture
def log():
    """The lines that are logged."""
    with logged() as lines:
        yield lines


@pytest.fixture
def port():
    """Port of a store where a group of processes meets, as those of torchrun do at the store of its own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def pytest_unconfigure(config):
    """End the workers of loaders that a failed test left alive: they ignore SIGTERM."""
    utils.end_workers()
