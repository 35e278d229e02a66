"""tools/benchmark.py as a user runs it, on models small enough for a test."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT
from PIL import Image


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
    done = benchmark("--models", "msg_cvpr22_tiny_p4_win7_224:sdpa", "--sizes", 224, 448, "--output", path)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(path.with_suffix(".json").read_text())["settings"].values()
    assert small[0]["growth"] == 1 < large[0]["growth"]
    assert Image.open(path.with_suffix(".png")).width > 800


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "resnet_none"], "resnet_none: a timm model name"),
        (["--models", "test_vit:sdpa"], "test_vit:sdpa: a timm model name, or that and :plain or :onednn"),
        (["--models", "msg_tiny_p4_win7_224:fast"], ":plain or :onednn or :auto or :eager or :sdpa"),
        (["--sizes", 224, "--roofline"], "--roofline is for whole models: leave out --sizes"),
        (["--models", "test_vit", "--peer", "swin"], "--peer swin is not among --models"),
    ],
)
def test_unknown_models_are_one_clear_message(arguments, words):
    done = benchmark(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


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
    assert "| training | opencv |" in path.with_suffix(".md").read_text()
    assert Image.open(path.with_suffix(".png")).width > 800


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_without_images_is_one_clear_message(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "tools/benchmark_data.py", tmp_path / folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / folder} holds no JPEG images" in done.stderr
