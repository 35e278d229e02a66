"""Runs side by side: their groups, their numbers against a loop, and what is said of other folders."""

import json
import re
import sys

import pytest
from helpers import ROOT, digits_config

from comparison import COLOURS, differences, group_runs, read_run, style
from config import dump_config
from utils import UserError


@pytest.fixture
def compare(monkeypatch, capsys):
    """Runs the command in this process; returns what it printed and its complaints."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import compare

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        compare.main()
        return capsys.readouterr()

    call.module = compare
    return call


def write_run(folder, scores, *opts, **more):
    """The folder of a run whose top-1 of each epoch is given."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(digits_config("TRAIN.EPOCHS", 3, *opts)))
    rows = [
        dict(epoch=epoch, train_loss=2 - epoch, val_loss=1 - epoch, acc1=score, **more)
        for epoch, score in enumerate(scores)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_of_one_config_are_a_group_whatever_their_seed_and_place(tmp_path):
    folders = [
        write_run(tmp_path / f"{lr}-{seed}", [1.0], "TRAIN.BASE_LR", lr, "SEED", seed, "TAG", f"s{seed}")
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [group.name for group in groups] == ["digits, BASE_LR 0.1", "digits, BASE_LR 0.2"]
    assert [[run.folder for run in group.runs] for group in groups] == [
        list(map(str, folders[:2])), list(map(str, folders[2:]))
    ]  # fmt: skip
    assert differences(groups) == [("TRAIN.BASE_LR", ["0.1", "0.2"])]


def test_curves_are_the_mean_and_range_of_the_runs_that_have_the_epoch(tmp_path):
    runs = [write_run(tmp_path / "a", [10.0, 20.0, 60.0]), write_run(tmp_path / "b", [30.0, 50.0], "SEED", 1)]
    (group,) = group_runs(map(read_run, runs))
    assert group.curve("score") == [
        (0, 20.0, 10.0, 30.0, 2),
        (1, 35.0, 20.0, 50.0, 2),
        (2, 60.0, 60.0, 60.0, 1),
    ]
    assert group.best() == [60.0, 50.0] and group.last() == [60.0, 50.0]
    assert group.state() == "2 to 3 of 3"


def test_best_is_not_last_and_the_average_counts_where_there_is_one(tmp_path):
    run = read_run(write_run(tmp_path / "a", [70.0, 90.0, 80.0]))
    assert group_runs([run])[0].best() == [90.0] and group_runs([run])[0].last() == [80.0]
    averaged = read_run(write_run(tmp_path / "b", [70.0], ema_acc1=75.0))
    assert averaged.rows[0]["score"] == 75.0


def test_a_config_of_an_earlier_version_has_the_defaults_of_later_keys(tmp_path):
    folders = [write_run(tmp_path / name, [1.0]) for name in "ab"]
    path = folders[0] / "config.yaml"
    earlier = path.read_text().replace("LOG:\n  TRACKER: ''\n", "").replace("  REPEATED: 1\n", "")
    assert len(earlier) < len(path.read_text())
    path.write_text(earlier)
    assert len(group_runs(map(read_run, folders))) == 1


def test_other_folders_are_left_out_with_one_line_each(compare, tmp_path):
    good = write_run(tmp_path / "good", [50.0])
    (tmp_path / "empty").mkdir()
    started = write_run(tmp_path / "started", [])
    broken = write_run(tmp_path / "broken", [1.0])
    (broken / "config.yaml").write_text("a: [")
    torn = write_run(tmp_path / "torn", [40.0])
    with open(torn / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "train_l')
    said = compare(*sorted(tmp_path.iterdir()), tmp_path / "none", "--output", tmp_path / "out" / "c")
    lines = said.err.splitlines()
    assert len(lines) == 4 and all(line.startswith("left out: ") for line in lines)
    for folder, words in (
        (started, "no finished epoch"),
        (broken, "not valid YAML"),
        (tmp_path / "none", "not a folder"),
    ):
        assert any(str(folder) in line and words in line for line in lines)
    assert re.search(r"digits +2 +1 of 3 +45.00 \(40.00 to 50.00\)", said.out) and good
    detector = write_run(tmp_path / "detector", [1.0], "DATA.DATASET", "coco")
    assert f"left out: {detector} is of detection" in compare(good, detector, "--output", tmp_path / "c").err
    with pytest.raises(UserError, match="nothing to compare: .*empty is not the folder of a run"):
        compare(tmp_path / "empty")


def test_the_page_holds_the_curves_and_needs_nothing_else(compare, tmp_path):
    write_run(tmp_path / "runs" / "a", [50.0, 60.0], "MODEL.NAME", "a</script>")
    write_run(tmp_path / "runs" / "b", [10.0], "MODEL.NAME", "x<script>")
    folders = list(map(str, sorted((tmp_path / "runs").iterdir())))
    compare(*folders, "--output", tmp_path / "c")
    page = (tmp_path / "c.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"(?i)\b(src|href)=|@import|url\(", page) and "refresh" not in page
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    groups = group_runs(map(read_run, folders))
    for panel, figure in zip(data, ("score", "train_loss", "val_loss"), strict=True):
        for curve, group in zip(panel["curves"], groups, strict=True):
            assert curve["points"] == [list(point) for point in group.curve(figure)]
            assert curve["name"] == group.name
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_watching_reads_the_runs_again(compare, tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [50.0])

    def next_epoch(seconds):
        assert seconds == 5
        rows = (folder / "metrics.jsonl").read_text()
        if rows.count("\n") == 2:
            raise KeyboardInterrupt
        (folder / "metrics.jsonl").write_text(rows + '{"epoch": 1, "train_loss": 1, "acc1": 60.0}\n')

    monkeypatch.setattr(compare.module.time, "sleep", next_epoch)
    with pytest.raises(KeyboardInterrupt):
        compare(folder, "--watch", "--every", 5, "--output", tmp_path / "c")
    page = (tmp_path / "c.html").read_text()
    assert '<meta http-equiv="refresh" content="5">' in page and "2 of 3" in page


def test_no_two_of_28_groups_look_the_same():
    assert len({style(number) for number in range(4 * len(COLOURS))}) == 28
