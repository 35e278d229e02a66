"""The benchmarks as a user runs them, on models small enough for a test, and what they draw."""

import argparse
import contextlib
import copy
import importlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, micro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from test_coco_data import write_set
from timm.layers import DropPath

from detection.transforms import resized
from utils import UserError


def benchmark(*arguments):
    command = [sys.executable, "tools/benchmark.py", "--device", "cpu", "--rounds", "3", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_models_are_compared_with_their_peer(tmp_path):
    path = tmp_path / "result"
    done = benchmark("--models", "msg_cvpr22_tiny_p4_win7_224", "resnet18", "--dtypes", "float32",
                     "--modes", "inference", "train", "--memory", "--roofline", "--output", path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(path.with_suffix(".json").read_text())
    assert list(result["settings"]) == ["inference float32, batch 1", "train float32, batch 1"]
    for ours, peer in result["settings"].values():
        assert peer["ratio"] == peer["memory_ratio"] == 1 < ours["memory_ratio"]
        assert ours["quartiles"][0] <= ours["ratio"] <= ours["quartiles"][1]
        assert "ms_per_image" not in ours
        for row in (ours, peer):
            assert 0 < max(row["of_flops"], row["of_bandwidth"]) <= row["of_roofline"]
        assert ours["of_flops"] / peer["of_flops"] == pytest.approx(
            ours["gflops"] / peer["gflops"] / ours["ratio"]
        )
    assert "| `resnet18` | 1 |" in path.with_suffix(".md").read_text()
    assert Image.open(path.with_suffix(".png")).width > 800
    assert Image.open(tmp_path / "result_roofline.png").width > 800


@pytest.mark.slow
def test_growth_with_the_image_size_is_drawn_beside_the_pixels(tmp_path):
    path = tmp_path / "sizes"
    done = benchmark("--models", "msg_cvpr22_tiny_p4_win7_224:sdpa", "--dtypes", "float32", "--maps",
                     "--sizes", 224, 448, "--output", path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = json.loads(path.with_suffix(".json").read_text())["settings"]
    assert list(settings) == [f"{side}x{side} px maps, inference float32, batch 1" for side in (224, 448)]
    small, large = settings.values()
    assert small[0]["growth"] == 1 < large[0]["growth"]
    assert Image.open(path.with_suffix(".png")).width > 800


def test_training_steps_for_maps_of_any_size_are_compared_with_swins(tmp_path):
    path = tmp_path / "maps"
    models = ["msg_cvpr22_tiny_p4_win7_224", "swin_tiny_patch4_window7_224"]
    done = benchmark("--models", *models, "--dtypes", "bfloat16", "--modes", "train", "--memory", "--maps",
                     "--sizes", "40x64", "--output", path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(path.with_suffix(".json").read_text())
    ((setting, (ours, peer)),) = result["settings"].items()
    assert setting == "40x64 px maps, train bfloat16, batch 1"
    assert peer["ratio"] == peer["memory_ratio"] == 1 and ours["memory_ratio"] > 0
    assert 0 < ours["quartiles"][0] <= ours["ratio"] <= ours["quartiles"][1]
    assert "growth" not in ours
    assert "training minimises the sum of their mean squares" in path.with_suffix(".md").read_text()
    assert Image.open(path.with_suffix(".png")).width > 800


@pytest.mark.parametrize(
    "name", ["msg_cvpr22_tiny_p4_win7_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
def test_a_candidate_gives_the_maps_or_classes_of_images_of_its_sides(tool, name):
    tools = tool("benchmark")
    for mode, maps in itertools.product(("inference", "train"), (True, False)):
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


def test_runtimes_are_compared_with_pytorch_in_one_table(tmp_path):
    path = tmp_path / "runtimes"
    done = benchmark("--models", "test_vit", "test_vit:ort", "--peer", "test_vit", "--dtypes", "float32",
                     "--memory", "--sizes", 160, "--output", path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(path.with_suffix(".json").read_text())
    ((own, ort),) = result["settings"].values()
    assert (own["model"], ort["model"]) == ("test_vit", "test_vit:ort")
    assert own["ratio"] == own["memory_ratio"] == 1 and ort["ratio"] > 0 and ort["memory_ratio"] > 0
    flops, size = result["rates"]["float32"]
    assert flops > 1e9 and size > 1e8
    assert f"{flops / 1e9:.0f} GFLOP/s in float32" in path.with_suffix(".md").read_text()


def test_files_are_timed_in_the_types_that_they_compute_in(tool):
    tools = tool("benchmark")
    ways = ("", ":compile", ":int8", ":ort", ":openvino")
    assert [tools.can_run(f"test_vit{way}", "float32") for way in ways] == [True] * 5
    assert [tools.can_run(f"test_vit{way}", "bfloat16") for way in ways] == [True, True, False, False, True]
    setting = tools.Setting("inference", torch.float32, 1, "cpu", (160, 160))
    plain, compiled = (tools.Candidate(f"test_vit{way}", setting).model for way in ways[:2])
    assert plain._compiled_call_impl is None and compiled._compiled_call_impl is not None


def test_each_runtime_computes_what_the_model_computes(tool, tmp_path):
    tools = tool("benchmark")
    for name, dtype, near in (("ort", torch.float32, 1e-4), ("int8", torch.float32, 0.1)):
        setting = tools.Setting("inference", dtype, 2, "cpu", (160, 160), files=str(tmp_path))
        torch.manual_seed(0)
        tools.write_onnx(f"test_vit:{name}", setting)
        torch.manual_seed(0)
        candidate = tools.Candidate(f"test_vit:{name}", setting)
        with torch.inference_mode():
            found, expected = candidate.run(candidate.images), candidate.model(candidate.images)
        found = found[0] if isinstance(found, tuple) else found
        assert 0 < (found - expected).abs().max() < near


@pytest.mark.slow
@pytest.mark.parametrize("way", ["frozen", "tuned"])
@pytest.mark.parametrize("ours", [True, False])
def test_frozen_weights_give_the_numbers_of_pytorch(tool, monkeypatch, way, ours):
    tools, told = tool("benchmark"), importlib.import_module("torch._dynamo.utils").counters
    if ours:
        two = micro(depths=(1, 1), num_heads=(3, 6), shuffle_size=(4, 2))
        monkeypatch.setattr(tools, "build", lambda *_: copy.deepcopy(two))
    side = 32 if ours else 160
    setting = tools.Setting("inference", torch.float32, 2, "cpu", (side, side))
    with tools.ready(f"test_vit:{way}", setting, False, None) as one:
        plain = copy.deepcopy(one.model)
        told.clear()
        with torch.inference_mode():
            found, expected = one.run(one.images), type(plain).forward(plain, one.images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert told["inductor"]["mkldnn_linear_weight_pack_matcher_count"] > 5
    assert (told["inductor"]["select_algorithm_autotune"] > 0) == (way == "tuned")


def test_compiled_ways_have_the_layers_that_the_compiler_is_given(tool):
    tools, inductor = tool("benchmark"), importlib.import_module("torch._inductor.config")
    setting, before = tools.Setting("inference", torch.float32, 1, "cpu"), (False, False)
    for way, frozen in (("compile", before), ("frozen", (True, False)), ("tuned", (True, True))):
        with tools.ready(f"msg_tiny_p4_win7_224:{way}", setting, False, None) as one:
            assert one.model._compiled_call_impl is not None
            assert ("forward" in vars(one.model.head)) == (way == "compile")
            assert (inductor.freezing, inductor.max_autotune) == frozen
        assert (inductor.freezing, inductor.max_autotune) == before


class Counting:
    """What test_an_object_apart calls."""

    def __init__(self, count):
        self.count = count

    def process(self):
        self.count += 1
        return self.count, os.getpid()

    def end(self):
        os._exit(7)


@contextlib.contextmanager
def counting(count):
    if count is None:
        raise UserError("nothing to count")
    yield Counting(count)


def test_an_object_apart_keeps_its_state_in_a_process_of_its_own(tool):
    tools = tool("benchmarking")
    one, other = (tools.Apart(str(count), counting, count) for count in (1, 5))
    (seconds, (count, process)), (_, (others, another)) = one.call("process"), other.call("process")
    assert seconds >= 0 and (count, others) == (2, 6) and len({process, another, os.getpid()}) == 3
    assert one.call("process")[1] == (3, process)
    one.close()
    with pytest.raises(UserError, match="5: its process ended with code 7"):
        other.call("end")


def test_what_cannot_be_made_apart_says_why(tool):
    with pytest.raises(UserError, match="^nothing to count$"):
        tool("benchmarking").Apart("none", counting, None).call("process")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "resnet_none"], "resnet_none: a timm model name"),
        (["--models", "test_vit:sdpa"], "test_vit:sdpa: a timm model name, or that and :plain or :onednn"),
        (
            ["--models", "msg_tiny_p4_win7_224:fast"],
            ":compile or :frozen or :tuned or :int8 or :ort or :openvino or :auto or :eager or :sdpa",
        ),
        (
            ["--models", "test_vit:int8", "--modes", "train"],
            "test_vit:int8: for the inference of classifiers",
        ),
        (["--models", "test_vit", "test_vit:ort"], "--peer test_vit:ort does not run in all of --dtypes"),
        (["--models", "test_vit:tuned", "--modes", "train"], "test_vit:tuned: for inference on the CPU"),
        (["--maps", "--roofline"], "--roofline is for classifiers at 224 px: leave out --sizes and --maps"),
        (["--sizes", "64x0"], "--sizes: '64x0' is neither a side in pixels nor HEIGHTxWIDTH"),
        (["--models", "test_vit", "--peer", "swin"], "--peer swin is not among --models"),
    ],
)
def test_unknown_models_are_one_clear_message(arguments, words):
    done = benchmark(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_size_that_a_model_does_not_take_is_one_clear_message():
    done = benchmark("--models", "msg_tiny_p4_win7_224", "--sizes", "2x64")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: cannot build msg_tiny_p4_win7_224 for classes of 2x64 px: " in done.stderr


def test_input_pipelines_are_compared_with_timms(tmp_path):
    for name in ("a/1.jpg", "a/2.JPEG", "b/c/3.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((320, 260), 60).convert("RGB").save(path)
    path = tmp_path / "data"
    command = ["tools/benchmark_data.py", tmp_path / "images", "--rounds", "3", "--output", path]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.with_suffix(".json").read_text())
    assert result["images"] == 3 and list(result["settings"]) == ["training", "evaluation", "decoding alone"]
    for peer, *ours in result["settings"].values():
        assert peer["ratio"] == 1 and ours
        assert all(row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] for row in ours)
    table = path.with_suffix(".md").read_text()
    assert "| training | opencv |" in table and "| decoding alone | opencv to an eighth |" in table
    assert Image.open(path.with_suffix(".png")).width > 800


def test_pipelines_of_detection_read_the_same_images_as_torchvisions(tool, tmp_path, monkeypatch):
    content = write_set(tmp_path, [(40, 60, "object"), (60, 40, "both"), (40, 50, ""), (50, 50, "object")])
    content["annotations"] = [dict(item, id=i) for i, item in enumerate(content["annotations"])]
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path / f"{split}2017")
        path = tmp_path / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))
    tool = tool("benchmark_data")
    seen = []

    class Watched(tool.GeneralizedRCNNTransform):
        def normalize(self, image):
            assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
            seen.append(tuple(image.shape[1:]))
            return super().normalize(image)

    monkeypatch.setattr(tool, "GeneralizedRCNNTransform", Watched)
    settings = tool.coco_candidates(str(tmp_path), 9, 2)
    assert list(settings) == ["detection, training", "detection, evaluation"]
    for (setting, functions), count in zip(settings.items(), (3, 4)):  # one has no objects
        assert list(functions) == ["torchvision", "torchvision, tensors", "pil", "opencv"]
        for name, function in functions.items():
            seen.clear()
            assert sum(function()) == count, (setting, name)
            assert "torchvision" not in name or len(seen) == count
            if setting == "detection, evaluation" and seen:
                expected = [
                    resized((image["height"], image["width"]), 800, 1333) for image in content["images"]
                ]
                assert seen == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_a_detector_are_whole_and_alike(tool, dtype):
    tool = tool("benchmark_detector")
    cfg = str(ROOT / "configs" / "coco" / "shapes.yaml")
    settings = {mode: tool.Setting(cfg, "", (64, 96), mode, dtype) for mode in ("train", "inference")}
    with tool.ready(tool.OURS, settings["train"]) as candidate:
        first, weights = candidate.step(), copy.deepcopy(candidate.detector.state_dict())
        assert len(first) > 4 and all(map(math.isfinite, first.values()))
        # The optimizer has seen every weight, and left it where it was.
        assert {int(state["step"]) for state in candidate.optimizer.state.values()} == {1}
        assert len(candidate.optimizer.state) == len(list(candidate.detector.parameters()))
        second = candidate.step()
        assert sum(second.values()) == pytest.approx(sum(first.values()), rel=0.2)
        for name, parameter in candidate.detector.named_parameters():
            torch.testing.assert_close(parameter.data, weights[name], rtol=1e-4, atol=1e-7)
    with tool.ready(tool.OURS, settings["inference"]) as candidate:
        assert not candidate.detector.training and candidate.step() == candidate.step() > 0


@pytest.mark.slow
def test_whole_detectors_are_compared(tmp_path):
    path = tmp_path / "detector"
    words = ["--modes", "train", "--dtypes", "float32", "bfloat16", "--memory", "--size", "96", "128"]
    command = [sys.executable, "tools/benchmark_detector.py", *words, "--rounds", "2", "--output", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.with_suffix(".json").read_text())
    assert list(result["settings"]) == [
        f"train, {dtype}, 96x128, one image" for dtype in ("float32", "bfloat16")
    ]
    for ours, peer in result["settings"].values():
        assert peer["ratio"] == peer["memory_ratio"] == 1 and ours["memory_ratio"] > 0.5
    assert "| memory ratio |" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_without_images_is_one_clear_message(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "tools/benchmark_data.py", tmp_path / folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / folder} holds no JPEG images" in done.stderr


@pytest.fixture
def tool(monkeypatch):
    """Imports a file of tools/ as if it were the command that runs."""

    def load(name):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / f"{name}.py")])
        return importlib.import_module(name)

    monkeypatch.syspath_prepend(ROOT / "tools")
    return load


def test_decoding_to_an_eighth_leaves_an_eighth_of_the_sides(tmp_path, tool):
    path, benchmark_data = tmp_path / "1.jpg", tool("benchmark_data")
    Image.effect_noise((320, 240), 60).convert("RGB").save(path)
    calls = benchmark_data.candidates([str(path)], batch_size=1)["decoding alone"]
    assert {name: calls[name]()[0].shape[:2] for name in calls if name != "timm"} == {
        "opencv": (240, 320),
        "opencv to an eighth": (30, 40),
    }


def test_functions_are_timed_in_turn_after_a_warm_up(tool, monkeypatch):
    benchmarking, clock, calls = tool("benchmarking"), [0.0], []

    def advance(name, seconds):
        calls.append(name)
        clock[0] += next(seconds)

    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: clock[0])
    times = dict(a=iter([90, 90, 3, 1, 2]), b=iter([90, 90, 40, 40, 40]))
    functions = [lambda name=name: advance(name, times[name]) for name in times]
    assert benchmarking.time_in_turn(functions, rounds=3) == [[1, 2, 3], [40, 40, 40]]
    assert calls == ["a", "b"] * 5


def settings_of(tool, monkeypatch, *words):
    """What benchmark.py measures when it gets these words after those for a CPU and float32."""
    monkeypatch.setattr(sys, "argv", [sys.argv[0], "--device", "cpu", "--dtypes", "float32", *words])
    return tool.plan(tool.parse_args())


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


@pytest.mark.parametrize(
    "words, grows",
    [
        ("--sizes 64 96x96", True),
        ("--sizes 64", False),
        ("--sizes 64 96x64", False),
        ("--sizes 64 96 --modes inference train", False),
        ("--batch-sizes 1 2", False),
    ],
)
def test_growth_is_told_from_square_sizes_alone(tool, monkeypatch, words, grows):
    tool = tool("benchmark")
    settings = settings_of(tool, monkeypatch, *words.split())
    assert tool.differ_in_square_size_alone(settings.values()) == grows


@pytest.mark.parametrize("text", ["", "0", "-1", "64x", "x64", "64x64x3", "64,64", "0x64", "999999", "a"])
def test_what_is_no_size_is_refused(tool, text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither a side in pixels nor HEIGHTxWIDTH"):
        tool("benchmark").image_sides(text)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_give_their_tables_and_legible_pictures(tool, path, monkeypatch):
    results = json.loads(path.read_text())
    table, figures = tool(Path(results["command"].split()[1]).stem).report(results)
    assert table == path.with_suffix(".md").read_text()
    words, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda word, renderer: words.append(word) or draw(word, renderer))
    for suffix, figure in figures.items():
        words.clear()
        assert path.with_name(f"{path.stem}{suffix}.png").exists()
        FigureCanvasAgg(figure).draw()
        boxes = [word.get_window_extent() for word in words if word.get_visible() and word.get_text()]
        assert len(boxes) > 8
        assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
        assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))
        for line in (line for axes in figure.axes for line in axes.lines):
            drawn = line.get_path().transformed(line.get_transform())
            assert not any(drawn.intersects_bbox(box, filled=False) for box in boxes)


def test_ours_are_blue_and_peers_grey(tool):
    colours = tool("benchmarking").shades({"ours": True, "peer": False, "ours:plain": True, "other": False})
    (red, _, blue), (pale, _, _) = colours["ours"], colours["ours:plain"]
    assert blue > 2 * red and pale > red
    assert all(len(set(colours[name])) == 1 for name in ("peer", "other"))
    assert len(set(colours.values())) == 4


def test_a_recorded_result_is_drawn_again_without_measuring(tool, tmp_path):
    path = shutil.copy(ROOT / "benchmarks" / "data.json", tmp_path)
    tool("benchmarking").main(argparse.Namespace(draw=[path]), None, tool("benchmark_data").report)
    assert (tmp_path / "data.md").read_text() == (ROOT / "benchmarks" / "data.md").read_text()
    assert Image.open(tmp_path / "data.png").width > 800
    with pytest.raises(SystemExit, match=f"^error: {path} was not written by benchmark.py$"):
        tool("benchmarking").main(argparse.Namespace(draw=[path]), None, tool("benchmark").report)
