"""The comparison of configs over seeds: its runs, and its statistics against scipy's."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import ROOT, write_images
from scipy import stats

from tools import ablate
from utils import UserError

QUICK = ["TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", 0]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        ablate.main(ablate.parse_args())
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("count", [2, 3, 5, 31, 60])
def test_intervals_are_those_of_students_t(count):
    values = dict(enumerate(np.random.default_rng(count).normal(90, 2, count).tolist()))
    found = ablate.mean_and_interval(values)
    numbers = list(values.values())
    low, high = stats.t.interval(0.95, count - 1, np.mean(numbers), stats.sem(numbers))
    assert found["mean"] - found["half"] == pytest.approx(low, rel=1e-3)
    assert found["mean"] + found["half"] == pytest.approx(high, rel=1e-3)
    assert found["std"] == pytest.approx(np.std(numbers, ddof=1))


def test_one_seed_has_no_interval_and_none_has_no_mean():
    assert ablate.mean_and_interval({0: 3.0}) == dict(by_seed={0: 3.0}, mean=3.0, std=None, half=None)
    assert ablate.mean_and_interval({})["mean"] is None


def test_differences_are_of_the_same_seeds():
    assert ablate.differences({0: 5, 2: 9}, {0: 4, 1: 7, 2: 10}) == {0: 1, 2: -1}


def test_minutes_add_up_and_averaged_weights_count_where_there_are_some():
    ends = [dict(seconds=90, acc1=20.0, ema_acc1=30.0), dict(seconds=30, acc1=40.0)]
    runs = [SimpleNamespace(name="a", seed=seed, rows=lambda: ends) for seed in (0, 1)]
    (axes,) = ablate.draw_minutes([*runs, SimpleNamespace(name="b", seed=0, rows=list)]).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1.5, 30], [2, 40]]] * 2 + [[]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_runs_are_done_once_and_another_config_or_a_failure_is_told(run, tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / "data" / part, 4)
    for name, manip_type in (("shuffled", "shuf"), ("kept", "none")):
        model = dict(NAME=name, MSG=dict(MANIP_TYPE=manip_type))
        tree = dict(BASE=[str(ROOT / "configs" / "digits.yaml")], MODEL=model)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    configs = [tmp_path / "kept.yaml", tmp_path / "shuffled.yaml", "--baseline", "shuffled", "--seeds", 1]
    common = [*configs, "--output", tmp_path / "runs", "--data-path", tmp_path / "data", "--opts", *QUICK]
    told = run(*common)
    rows = [line for line in told.splitlines() if line.startswith(("| shuffled |", "| kept |"))]
    assert [row.split(" | ")[0] for row in rows] == ["| shuffled", "| kept"]
    assert "not finished" not in told and len(list((tmp_path / "runs").glob("*.png"))) == 2
    weights = tmp_path / "runs" / "kept" / "seed0" / "best.pth"
    written = weights.stat().st_mtime_ns
    assert "2 runs, 2 of them finished" in run(*common) and weights.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="TRAIN.BASE_LR is 0.008 there and 1.0 in"):
        run(*common, "TRAIN.BASE_LR", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"shuffled, seed 0 \(exit code 1, .*empty"):
        flags = ["--seeds", 1, "--output", tmp_path / "x", "--data-path", tmp_path / "empty"]
        run(tmp_path / "shuffled.yaml", *flags)


def test_two_configs_that_share_a_folder_are_refused(run, tmp_path):
    for name in ("digits", "other"):
        (tmp_path / f"{name}.yaml").write_text(f"BASE: ['{ROOT / 'configs' / 'digits.yaml'}']")
    with pytest.raises(UserError, match="have the same MODEL.NAME, digits"):
        run(tmp_path / "digits.yaml", tmp_path / "other.yaml", "--data-path", tmp_path)
