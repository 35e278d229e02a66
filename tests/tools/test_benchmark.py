"""The benchmarks as a user runs them, on models small enough for a test, and what they draw."""

import argparse
import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from timm.layers import DropPath

from models.fast.choices import Choices, has_onednn
from utils import UserError, adopt_launcher


def benchmark(*arguments):
    command = [sys.executable, "tools/benchmark.py", "--device", "cpu", "--rounds", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


def written(folder):
    """The one result that a benchmark wrote below a folder."""
    (path,) = folder.glob("*/20??-??-??-*.json")
    (result,) = json.loads(path.read_text())
    assert path.name.startswith(result["date"]) and result["command"].startswith("python ")
    assert result["machine"]["threads"] > 0 and result["versions"]["torch"] == torch.__version__
    return result


@pytest.mark.slow
def test_models_are_compared_with_their_peer(tmp_path):
    models = ["msg_cvpr22_tiny_p4_win7_224", "resnet18"]
    done = benchmark("--models", *models, "--dtypes", "float32", "--modes", "inference", "train",
                     "--memory", "--output", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = written(tmp_path)
    assert list(result["settings"]) == ["inference float32, batch 1", "train float32, batch 1"]
    for ours, peer in result["settings"].values():
        assert len(ours["turns"]) == len(peer["turns"]) >= 1 and ours["memory"] > 0
        for row in (ours, peer):
            assert all(steps >= 1 and seconds >= 1 and cold > 0 for steps, seconds, cold in row["turns"])
            assert 1 <= row["threads"] <= torch.get_num_threads()
    assert "of resnet18" in done.stdout


def test_training_steps_for_maps_of_any_size_are_compared_with_swins(tmp_path):
    models = ["msg_cvpr22_tiny_p4_win7_224", "swin_tiny_patch4_window7_224"]
    done = benchmark("--models", *models, "--dtypes", "float32", "--modes", "train", "--maps",
                     "--sizes", "40x64", "--output", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = written(tmp_path)
    ((setting, (ours, peer)),) = result["settings"].items()
    assert setting == "40x64 px maps, train float32, batch 1" and result["peer"] == peer["model"]
    flops, size = result["rates"]["float32"]
    assert flops > 1e9 and size > 1e8 and len(ours["turns"]) == len(peer["turns"]) >= 1


@pytest.mark.parametrize(
    "name", ["msg_cvpr22_tiny_p4_win7_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
def test_a_candidate_gives_the_maps_or_classes_of_images_of_its_sides(tool, name):
    tools = tool("benchmark")
    for mode, maps in (("inference", True), ("train", False)):
        candidate = tools.Candidate(name, tools.Setting(mode, torch.float32, 2, "cpu", (64, 96), maps))
        assert candidate.run is candidate.model
        outputs = candidate.model(candidate.images)
        if maps:
            channels = candidate.model.feature_info.channels()
            strides = candidate.model.feature_info.reduction()
            assert strides[-4:] == [4, 8, 16, 32] and len(outputs) == len(strides)
            for output, count, stride in zip(outputs, channels, strides):
                assert sorted(output.shape) == sorted((2, count, 64 // stride, 96 // stride))
        else:
            assert outputs.shape == (2, 1000)
        before = [parameter.detach().clone() for parameter in candidate.model.parameters()]
        for module in candidate.model.modules():
            if isinstance(module, DropPath):  # a branch dropped for both images would keep its biases
                module.drop_prob = 0.0
        candidate.step()
        same = [torch.equal(a, b) for a, b in zip(before, candidate.model.parameters())]
        assert all(same) if mode == "inference" else not any(same)


def test_a_candidate_is_compiled_where_its_name_says_so(tool):
    tools = tool("benchmark")
    setting = tools.Setting("inference", torch.float32, 1, "cpu", (160, 160))
    plain, compiled = (tools.Candidate(f"test_vit{way}", setting).model for way in ("", ":compile"))
    assert plain._compiled_call_impl is None and compiled._compiled_call_impl is not None


def test_a_runtime_computes_what_the_model_computes(tool):
    tools = tool("benchmark")
    setting = tools.Setting("inference", torch.float32, 2, "cpu", (160, 160))
    candidate = tools.Candidate("test_vit:openvino", setting)
    with torch.inference_mode():
        found, expected = candidate.run(candidate.images), candidate.model(candidate.images)
    assert 0 < (found - expected).abs().max() < 1e-4


def test_an_object_apart_keeps_its_state_in_a_process_of_its_own(tool):
    apart = tool("benchmarking").Apart
    one, other = (apart(str(first), contextlib.nullcontext, iter(range(first, 9))) for first in (1, 5))
    assert [one.call("__next__"), one.call("__next__"), other.call("__next__")] == [1, 2, 5]
    one.close()
    other.close()
    ends = apart("ends", contextlib.nullcontext, functools.partial(os._exit, 7))
    with pytest.raises(UserError, match="ends: its process ended with code 7"):
        ends.call("__call__")


def test_what_cannot_be_made_apart_says_why(tool, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="the environment has RANK=0, without "):
        tool("benchmarking").Apart("none", adopt_launcher).call("any")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--models resnet_none", "resnet_none: a timm model name"),
        ("--models test_vit:sdpa", "test_vit:sdpa: a timm model name, or that and :plain or :onednn"),
        (
            "--models msg_tiny_p4_win7_224:fast",
            ":compile or :openvino or :auto or :eager or :sdpa",
        ),
        ("--models test_vit test_vit:openvino --modes train", "for classifiers in inference on the CPU"),
        ("--models test_vit test_vit:openvino --dtypes float16", "in float32 or bfloat16"),
        ("--sizes 64x0", "--sizes: '64x0' is neither a side in pixels nor HEIGHTxWIDTH"),
        ("--models test_vit --peer swin", "--peer swin is not among --models"),
    ],
)
def test_what_cannot_be_timed_is_one_clear_message(tool, monkeypatch, capsys, words, message):
    with pytest.raises((SystemExit, UserError)) as refused:
        tool("benchmark").check(arguments(tool("benchmark"), monkeypatch, *words.split()))
    assert message in f"{refused.value} {capsys.readouterr().err}"


def test_a_size_that_a_model_does_not_take_is_one_clear_message(tool):
    with pytest.raises(UserError, match="cannot build msg_tiny_p4_win7_224 for classes of 2x64 px: "):
        tool("benchmark").build("msg_tiny_p4_win7_224", (2, 64))


@pytest.fixture
def tool(monkeypatch):
    """Imports a file of tools/ as if it were the command that runs."""

    def load(name):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / f"{name}.py")])
        return importlib.import_module(name)

    monkeypatch.syspath_prepend(ROOT / "tools")
    return load


def test_a_turn_is_a_second_of_steps_after_two_that_do_not_count(tool, monkeypatch):
    benchmarking, clock, steps = tool("benchmarking"), [0.0], iter([90, 90, 0.4, 0.3, 0.4, 0.1])
    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += next(steps)

    count, seconds, cold = benchmarking.turn(step)
    assert count == 3 and (seconds, cold) == pytest.approx((1.1, 90))
    assert benchmarking.cold_ratios([[1, 3.0, 8.0], [1, 3.0]], [[2, 3.0, 2.0], [1, 1.0]]) == [4.0]


@pytest.mark.parametrize("slower, best", [(2, 1), (1, 2)])
def test_a_candidate_takes_the_number_of_threads_that_is_faster(tool, monkeypatch, slower, best):
    benchmark, threads = tool("benchmark"), [2]
    candidate = benchmark.Candidate("test_vit", benchmark.Setting("inference", torch.float32, 1, "cpu"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.append(number))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    seconds_of = {slower: 1.0, best: 0.5}
    monkeypatch.setattr(benchmark.benchmarking, "turn", lambda *_: (1, seconds_of[threads[-1]], 0.0))
    assert candidate.choose_threads() == best and threads == [2, 1, 2, 1, 2, best]


def test_candidates_take_turns_until_their_ratios_are_known(tool):
    benchmarking, calls = tool("benchmarking"), []

    def candidate(name, seconds):
        return lambda: calls.append(name) or (2, seconds[calls.count(name) - 1])

    noisy = [2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 3.0]
    turns = benchmarking.time_in_turn([candidate("a", [1.0] * 9), candidate("b", noisy)], 3, peer=0)
    assert calls == ["a", "b"] * 9 and turns == [[[2, 1.0]] * 9, [[2, seconds] for seconds in noisy]]
    calls.clear()
    assert benchmarking.time_in_turn([candidate("a", [1.0] * 3)], 3, peer=0) == [[[2, 1.0]] * 3]


def test_a_ratio_is_taken_within_its_round(tool):
    ratios = tool("benchmarking").ratios([[1, 3.0], [4, 8.0]], [[2, 3.0], [1, 1.0]])
    assert ratios == [2.0, 2.0]


@pytest.mark.parametrize("count", [6, 11, 33])
def test_intervals_hold_the_median_19_times_in_20(tool, count):
    values = np.random.default_rng(count).normal(size=(4000, count))
    found = [tool("benchmarking").interval(list(sample)) for sample in values]
    held = np.mean([low <= 0 <= high for low, _, high in found])
    assert held > 0.945
    if count > 6:  # the next narrower interval of this kind would hold it too seldom
        ordered, first = np.sort(values), list(np.sort(values)[0]).index(found[0][0]) + 1
        assert np.mean((ordered[:, first] <= 0) & (ordered[:, -1 - first] >= 0)) < 0.955


def test_wide_figures_are_no_claims(tool):
    in_words = tool("tables").in_words
    assert in_words(0.48, 0.5, 0.53) == "0.50 (0.48 to 0.53)"
    assert in_words(0.4, 0.5, 0.6) == "between 0.40 and 0.60"


def test_speeds_are_compared_with_the_peer_the_right_way_round(tool):
    rows = [dict(model="timm", turns=[[1, 2.0]] * 6), dict(model="pil", turns=[[1, 1.0], [2, 1.0]] * 3)]
    result = dict(peer="timm", settings=dict(training=rows))
    assert tool("tables").ratios(result, "training")[1][1:] == (0.25, 0.375, 0.5)
    faster = tool("tables").ratios(dict(result, figure="images per second"), "training")
    assert faster[1][1:] == pytest.approx((2, 8 / 3, 4))


def test_compiled_models_are_compared_with_the_compiled_peer(tool):
    rows = [
        dict(model=name, compiled=compiled, turns=[[1, seconds]] * 6)
        for name, compiled, seconds in (
            ("a", False, 1.0),
            ("b", False, 2.0),
            ("a", True, 1.0),
            ("b", True, 4.0),
        )
    ]
    found = tool("tables").ratios(dict(peer="b", settings=dict(all=rows)), "all")
    assert [median for _, _, median, _ in found] == [0.5, 1, 0.25, 1]


def arguments(tool, monkeypatch, *words):
    """What benchmark.py makes of these words after --device cpu."""
    monkeypatch.setattr(sys, "argv", [sys.argv[0], "--device", "cpu", *words])
    return tool.parse_args()


def settings_of(tool, monkeypatch, *words):
    """What it measures for float32."""
    return tool.plan(arguments(tool, monkeypatch, "--dtypes", "float32", *words))


def test_sizes_modes_and_maps_are_combined(tool, monkeypatch):
    tool = tool("benchmark")
    usual = settings_of(tool, monkeypatch, "--batch-sizes", "1", "2")
    assert list(usual) == ["inference float32, batch 1", "inference float32, batch 2"]
    assert {(setting.sides, setting.maps) for setting in usual.values()} == {((224, 224), False)}
    sizes = settings_of(tool, monkeypatch, "--sizes", "256", "40x64", "--modes", "inference", "train")
    assert [(name, setting.mode, setting.sides) for name, setting in sizes.items()] == [
        (f"{height}x{width} px, {mode} float32, batch 1", mode, (height, width))
        for height, width in ((256, 256), (40, 64))
        for mode in ("inference", "train")
    ]
    ((name, maps),) = settings_of(tool, monkeypatch, "--maps").items()
    assert name == "224x224 px maps, inference float32, batch 1"
    assert (maps.sides, maps.maps) == ((224, 224), True)


@pytest.mark.parametrize("text", ["", "0", "-1", "64x", "x64", "64x64x3", "64,64", "0x64", "999999", "a"])
def test_what_is_no_size_is_refused(tool, text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither a side in pixels nor HEIGHTxWIDTH"):
        tool("benchmarking").image_sides(text)


@pytest.mark.skipif(not has_onednn(), reason="needs oneDNN on x86")
def test_choices_are_between_ways_of_computing_the_same(tool, monkeypatch):
    choices = tool("choices")
    monkeypatch.setattr(choices, "BATCH", 1)
    monkeypatch.setattr(choices, "STAGES", ((2, 24, 3, 2),))
    found = list(choices.operations())
    assert {operation.choice for operation in found} == {*Choices._fields} - {"block", "compiled", "runtime"}
    for operation in found:
        results = [step() for step in operation.steps.values()]
        for result in results[1:] if "attention" not in operation.choice else ():
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-3)
    for operation in choices.blocks():
        fused, layers = (step() for step in operation.steps.values())
        torch.testing.assert_close(fused, layers, rtol=0, atol=5e-2)


def test_a_choice_that_is_wrong_for_this_machine_is_named_by_the_time_of_all_blocks(tool):
    tables, choices = tool("tables"), tool("choices")

    def row(model, blocks, *turns):
        return dict(model=model, choice="linear", blocks=blocks, turns=turns)

    settings = dict(
        first=[row("onednn", 2, (1, 1.0), (2, 2.0), (1, 9.0)), row("pytorch", 2, (1, 2.0))],
        second=[row("onednn", 6, (1, 2.0)), row("pytorch", 6, (2, 2.0))],
    )
    seconds = tables.seconds_of_choices(dict(settings=settings))
    assert seconds == dict(linear=dict(onednn=14.0, pytorch=10.0))
    assert "linear onednn: WRONG here (onednn 1.40, pytorch 1.00), pytorch is faster" in choices.verdict(
        "linear", "onednn", seconds["linear"]
    )
    assert choices.verdict("linear", "pytorch", seconds["linear"]).startswith("linear pytorch: right here")
