"""Evaluation by OpenVINO: the numbers of PyTorch, or a refusal."""

import importlib.util
import json
import re
from types import SimpleNamespace

import openvino
import pytest
import torch
from helpers import digits_config, fill_weights, logged, run_folder, run_main
from test_deploy import SMALL, images, save

import models
from config import dump_config, parse_config
from distributed import Compute
from models.deploy import runtime as deploy_runtime
from models.deploy.files import FORMATS, Exportable, run_openvino
from models.deploy.runtime import HandedOver, build_runtime, choose_runtime
from models.fast.choices import PYTORCH
from utils import UserError

CPU, ROUNDED = Compute(torch.device("cpu")), Compute(torch.device("cpu"), torch.bfloat16)


def small():
    return fill_weights(models.build_model(digits_config(*SMALL))).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The ONNX file of the small model."""
    path = tmp_path_factory.mktemp("written") / "x.onnx"
    FORMATS["onnx"].write(Exportable(small(), {}, (3, 32, 32), {}, None), str(path))
    return path


@pytest.fixture
def handed_over(written):
    """A function that gives the small model and the same in OpenVINO, not yet compared."""

    def load(dtype=torch.float32):
        model = small()
        return model, HandedOver(model, run_openvino(written, dtype), dtype)

    return load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A classifier of the three classes of ``data``."""
    path = tmp_path_factory.mktemp("checkpoint") / "x.pth"
    save(path)
    return path


def test_openvino_gives_the_logits_of_pytorch_for_any_number_of_images(handed_over):
    model, runtime = handed_over()
    with logged() as lines, models.inference(runtime):
        for count in (4, 1, 7):
            found, expected = runtime(images(count)), model(images(count))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            assert torch.equal(found.argmax(1), expected.argmax(1)) and not torch.equal(found, expected)
    assert [re.sub(r"\de-\d+", "x", line) for line in lines] == [
        "RUNTIME openvino: x off PyTorch in float32, on 4 images"
    ]


def test_a_runtime_that_computes_something_else_is_refused_at_the_first_images(handed_over):
    model, runtime = handed_over()
    with torch.no_grad():
        model.head.bias[1] += 3e-3
    for _ in range(2):
        words = "^RUNTIME openvino: .* is up to 0.003 off PyTorch, more than 0.0.*: set RUNTIME pytorch$"
        with pytest.raises(UserError, match=words), models.inference(runtime):
            runtime(images(2))
    with torch.no_grad():
        model.head.bias[1] -= 3e-3
    with models.inference(runtime):
        torch.testing.assert_close(runtime(images(2)), model(images(2)), rtol=0, atol=1e-4)


def test_a_runtime_that_fails_at_a_single_image_is_refused(handed_over):
    _, runtime = handed_over()
    run = runtime.run
    runtime.run = lambda x: run(x) if len(x) > 1 else torch.zeros(1, 3)
    with pytest.raises(UserError, match="off PyTorch"), models.inference(runtime):
        runtime(images(3))
    runtime.run = lambda x: run(x[:, :, :16])
    with pytest.raises(UserError, match="^RUNTIME openvino: it cannot be run: .*: set RUNTIME pytorch$"):
        runtime(images(3))


@pytest.fixture
def installed(monkeypatch):
    """Makes packages seem installed, and all others missing."""

    def pretend(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)

    return pretend


@pytest.fixture
def has_bfloat16(monkeypatch):
    """Makes OpenVINO say that this processor has bfloat16."""
    core = openvino.Core
    capable = SimpleNamespace(get_property=lambda *_: ["FP32", "BF16"])
    capable.compile_model = lambda *given: core().compile_model(*given)
    monkeypatch.setattr(openvino, "Core", lambda: capable)
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_bfloat16_is_refused_where_openvino_would_compute_in_float32_instead(monkeypatch, installed):
    installed("onnx", "onnxscript", "openvino")
    words = "does not compute in bfloat16 on this processor"
    monkeypatch.setattr(openvino, "Core", lambda: SimpleNamespace(get_property=lambda *_: ["FP32", "INT8"]))
    with pytest.raises(UserError, match=f"^RUNTIME openvino {words}: set AMP_OPT_LEVEL to O0"):
        choose_runtime("openvino", ROUNDED)
    with pytest.raises(UserError, match=f"^OpenVINO {words}$"):
        run_openvino("x.onnx", torch.bfloat16)
    assert choose_runtime("openvino", CPU) == ("openvino", "")
    name, reason = choose_runtime("auto", ROUNDED)
    assert name == "pytorch" and words in reason


def test_openvino_computes_in_bfloat16_to_within_its_rounding(handed_over, has_bfloat16):
    model, runtime = handed_over(torch.bfloat16)
    with torch.no_grad():
        expected = model(images(6))
    with logged() as lines, models.inference(runtime, torch.bfloat16), ROUNDED.autocast():
        error = (runtime(images(6)) - expected).square().mean().sqrt() / expected.std()
    assert (1e-4 if has_bfloat16 else 0) < error < 0.05
    assert re.fullmatch(r"RUNTIME openvino: \d.\d% of the spread .* in float32, on 6 images", lines[0])
    runtime.compared = False
    with torch.no_grad():
        model.head.bias[1] += 1
    with pytest.raises(UserError, match="OpenVINO differs from PyTorch by .* more than 5%: set RUNTIME py"):
        runtime(images(6))


@pytest.mark.parametrize(
    "name, compute, words",
    [
        ("openvino", Compute(torch.device("mps"), torch.float16), "openvino computes on the CPU: add --dev"),
        ("openvino", CPU, "openvino: missing packages: pip install onnxscript openvino$"),
        ("onnxruntime", CPU, "'onnxruntime' is none of pytorch, openvino, auto$"),
    ],
)
def test_a_runtime_that_cannot_be_used_is_refused(installed, name, compute, words):
    installed("onnx")
    with pytest.raises(UserError, match=f"^RUNTIME {words}"):
        choose_runtime(name, compute)


def test_auto_is_openvino_where_it_is_installed_and_was_measured_to_be_faster(
    monkeypatch, installed, has_bfloat16
):
    installed("onnx", "onnxscript", "openvino")
    monkeypatch.setattr(deploy_runtime, "chosen", lambda: PYTORCH)
    assert choose_runtime("auto", CPU) == ("pytorch", "nobody has measured a faster one on this processor")
    monkeypatch.setattr(deploy_runtime, "chosen", lambda: PYTORCH._replace(runtime="openvino"))
    found = "openvino", "it is the fastest that was measured on this processor"
    assert choose_runtime("auto", CPU) == choose_runtime("auto", ROUNDED) == found
    assert choose_runtime("openvino", ROUNDED)[0] == "openvino"
    on_gpu = "openvino computes on the CPU: add --device cpu"
    assert choose_runtime("auto", Compute(torch.device("cuda"), torch.float16)) == ("pytorch", on_gpu)
    installed("onnx", "onnxscript")
    model, config = small(), digits_config(*SMALL, "RUNTIME", "auto")
    with logged() as lines:
        assert build_runtime(config, model, CPU) is model
    assert lines == ["RUNTIME auto: pytorch, because openvino: missing packages: pip install openvino"]


def test_evaluation_by_openvino_gives_the_figures_of_pytorch(checkpoint, data, tmp_path):
    found = []
    for runtime, count in (("pytorch", 1), ("openvino", 2)):
        arguments = ["--cfg", "configs/digits.yaml", "--data-path", data, "--output", tmp_path, "--eval"]
        arguments += ["--resume", checkpoint, "--batch-size", 4, "--opts", *SMALL, "RUNTIME", runtime]
        printed = run_main(*arguments, processes=count).stdout
        assert ("RUNTIME openvino: " in printed) is (runtime == "openvino")
        found.append(json.loads((run_folder(tmp_path) / "eval.json").read_text()))
    expected, figures = found
    assert "off PyTorch in float32, on 4 images" in printed
    assert figures["acc1"] == expected["acc1"] and figures["images"] == 9
    assert figures["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    for there, here in zip(figures["classes"], expected["classes"], strict=True):
        assert there == pytest.approx(here, abs=1e-5)


def test_a_runtime_is_of_a_machine_and_not_of_a_checkpoint():
    text = dump_config(digits_config("RUNTIME", "openvino"))
    assert "RUNTIME: openvino" in text and parse_config(text, "a checkpoint").RUNTIME == "pytorch"
    text = text.replace("openvino", "onnxruntime")  # of earlier releases
    assert parse_config(text, "a checkpoint").RUNTIME == "pytorch"


def test_a_runtime_has_the_threads_of_pytorch(monkeypatch):
    found = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    core = SimpleNamespace(compile_model=lambda path, device, settings: found.append(settings))
    core.get_property = lambda *_: ["BF16"]
    monkeypatch.setattr(openvino, "Core", lambda: core)
    for dtype, hint in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        run_openvino("x.onnx", dtype)
        settings = dict(INFERENCE_NUM_THREADS=3, ENABLE_CPU_PINNING=False, INFERENCE_PRECISION_HINT=hint)
        assert found[-1] == settings


def test_a_runtime_is_given_the_images_and_the_precision_of_the_config(monkeypatch, has_bfloat16):
    found = []
    monkeypatch.setattr("models.deploy.runtime.hand_over", lambda *given: found.append(given[1:]))
    config = digits_config("RUNTIME", "openvino", "MODEL.MSG.IN_CHANS", 1, "DATA.IMG_SIZE", "[40, 48]")
    for compute in (CPU, ROUNDED):
        build_runtime(config, None, compute)
    assert found == [((1, 40, 48), dtype) for dtype in (torch.float32, torch.bfloat16)]


def test_a_loaded_model_can_be_a_runtimes(checkpoint, monkeypatch):
    monkeypatch.setattr("models.deploy.runtime.hand_over", lambda *given: given)
    model, _, names = models.load(checkpoint, runtime="openvino")
    assert names == [*"abc"] and not model[0].training
    assert model[1:] == ((3, 32, 32), torch.float32)
    with pytest.raises(UserError, match="^RUNTIME 'tensorrt' is none of"):
        models.load(checkpoint, runtime="tensorrt")
