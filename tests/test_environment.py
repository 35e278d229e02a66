"""A Python without PyTorch, and other people's modules in place of ours, are told in one sentence."""

import subprocess
import sys

import pytest
from helpers import PROGRAMS, ROOT


def run(folder, *arguments):
    """The exit code of Python, and the lines that it prints to stderr."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_python_without_pytorch_is_told_what_to_activate(program):
    code, lines = run(ROOT, "-S", program, "x")  # without the installed packages
    assert code == 1 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and " has no torch, " in lines[0]
    assert "activate the environment (source .venv/bin/activate), or run" in lines[0]


def test_importing_models_without_pytorch_says_the_same():
    code, lines = run(ROOT, "-S", "-c", "import models")
    assert code == 1 and " has no torch, " in lines[-1] and lines[-1].startswith("ImportError: ")


@pytest.mark.parametrize("theirs", ["utils.py", "config.py", "data/__init__.py"])
def test_modules_of_ours_that_are_hidden_by_others_are_named(tmp_path, theirs):
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).touch()
    code, lines = run(tmp_path, "-c", f"import sys; sys.path.append({str(ROOT)!r}); import models")
    assert code == 1, lines
    assert f"of {ROOT} is hidden by {tmp_path / theirs}: rename that, or put {ROOT} " in lines[-1]
