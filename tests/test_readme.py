"""What README.md and docs/ say: their commands parse, their paths exist, their figures are those measured."""

import argparse
import glob
import importlib
import re
import shlex
import sys

import pytest
from helpers import ROOT

from config import get_config, parse_args

sys.path.insert(0, str(ROOT / "tools"))

import tables  # noqa: E402, below the path

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/notes.md",
    "weights/msg_cifar10/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


def text(page):
    return (ROOT / page).read_text()


def commands(page):
    """The words of each command that runs a Python file of ours, as the shell gives them."""
    for block in re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL):
        for line in block.replace("\\\n", " ").replace("<config>", "configs/digits.yaml").split("\n"):
            words = shlex.split(re.sub(r"<[^>]*>", "7", line), comments=True)
            words = [found for word in words for found in sorted(glob.glob(word, root_dir=ROOT)) or [word]]
            files = [place for place, word in enumerate(words) if re.fullmatch(r"(tools/)?\w+\.py", word)]
            if files:
                yield words[files[0] :]


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=f"{page} {' '.join(words)}"[:90]) for page in PAGES for words in commands(page)],
)
def test_every_command_parses(words, monkeypatch):
    file, *arguments = words
    monkeypatch.chdir(ROOT)
    if file in ("main.py", "detect.py"):
        args = parse_args("", throughput=file == "main.py", argv=arguments)
        assert get_config(args, "imagenet" if file == "main.py" else "coco")
        return
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(sys, "argv", [str(ROOT / file), *arguments])
    assert isinstance(importlib.import_module(file[6:-3]).parse_args(), argparse.Namespace)


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text(page)) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []
    written_by_users = re.compile(r"```yaml.*?```", re.DOTALL)
    kinds = "configs|tools|docs|models|data|detection|benchmarks|tests|weights"
    pattern = rf"(?<![\w/<>.*-])((?:{kinds})/[\w/.-]+?\.(?:py|yaml|md|png|json|safetensors))\b"
    named = re.findall(pattern, written_by_users.sub("", text(page)))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_that_the_files_give(page):
    assert tables.filled(page) == text(page)
    assert set(tables.PAGES[page]) == set(re.findall(r"<!-- table: (\w+) -->", text(page)))
