"""Files for other programs: each computes what its checkpoint computes, or is not kept."""

import copy
import importlib
import importlib.util
import json
import sys
from contextlib import nullcontext

import onnxruntime
import pytest
import torch
from helpers import ROOT, coco_config, digits_config, fill_weights
from safetensors import safe_open

import checkpoint as ckpt
import models
from config import dump_config
from models.deploy.files import (
    FORMATS,
    OF_OPENVINO,
    Exportable,
    Format,
    largest_error,
    require_near,
    require_packages,
    write_checked,
)
from utils import UserError

CLASSES = ["a", "b", "c"]
SMALL = ["MODEL.NUM_CLASSES", 3, "MODEL.MSG.DEPTHS", "[1, 1]", "MODEL.MSG.NUM_HEADS", "[3, 6]"]
SMALL += ["MODEL.MSG.SHUF_SIZE", "[4, 2]", "DATA.NUM_WORKERS", 0]
SIZES = ["DATA.IMG_SIZE", "[40, 48]"]  # windows reach over the edge


def save(path, *opts, **entries):
    """A checkpoint of a small classifier of three classes; returns its model."""
    config = digits_config(*SMALL, *opts)
    model = fill_weights(models.build_model(config)).eval()
    content = dict(model=model.state_dict(), config=dump_config(config), classes=CLASSES, epoch=0)
    ckpt.save_checkpoint(str(path), dict(content, **entries))
    return model


@pytest.fixture
def export(monkeypatch, capfd):
    """Runs tools/export.py in this process; gives its exit code, and what it printed to stdout and stderr."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("export")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        try:
            tool.main(tool.parse_args())
            return 0, *capfd.readouterr()
        except SystemExit as stopped:
            return stopped.code, *capfd.readouterr()
        except UserError as error:
            return 1, "", f"error: {error}"

    return run


def images(count, *size):
    return torch.randn(count, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(count))


def run_onnx(path):
    """What ONNX Runtime computes, and the metadata that it finds."""
    session = onnxruntime.InferenceSession(str(path))
    return (
        lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]),
        session.get_modelmeta().custom_metadata_map,
    )


def assert_computes(run, model, size, tolerance=1e-4):
    for count in (1, 3):
        x = images(count, *size)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=0, atol=tolerance)


def test_files_compute_what_the_checkpoint_computes_and_say_what_they_take(tmp_path, export):
    model = save(tmp_path / "x.pth", *SIZES)
    formats = ["onnx", "safetensors"]
    code, out, err = export(tmp_path / "x.pth", "--formats", *formats)
    assert code == 0, err
    found = [row for row in map(str.split, out.splitlines()) if row[0] in formats]
    runners = [("onnx", "onnxruntime"), ("onnx", "openvino"), ("safetensors", "this")]
    assert [(row[0], row[1]) for row in found] == runners
    assert all(float(row[-2]) > 0 and float(row[-1]) < 1e-4 for row in found)
    run, metadata = run_onnx(tmp_path / "x.onnx")
    assert_computes(run, model, (40, 48))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        described = [metadata, file.metadata()]
    for metadata in described:
        assert json.loads(metadata["classes"]) == CLASSES
        takes = json.loads(metadata["input"])
        assert takes["size"] == [40, 48] and takes["mean"][0] == 0.485
        assert "NAME: digits" in metadata["config"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.pth", "x.safetensors"]


def exportable(model, *size):
    return Exportable(model, model.state_dict(), size, {}, None)


def written(kept):
    """A format whose files hold nothing and run as ``kept``, and which one missing program could run too."""
    runners = dict(this=lambda path, _: kept, no_such_package=None)

    def write(_, path):
        open(path, "w").close()

    return Format(write, runners, ("no_such_package",))


def moved(layer, by):
    """A copy of a linear layer with other biases."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.bias += by
    return other


def test_a_file_that_computes_something_else_is_not_kept(tmp_path):
    layer, path, x = torch.nn.Linear(4, 3).eval(), tmp_path / "x", torch.zeros(2, 4)
    path.write_text("the one before")
    with pytest.raises(UserError, match="^this is up to 0.0003 off PyTorch, more than 0.0001: the file is"):
        write_checked(exportable(layer, 4), written(moved(layer, 3e-4)), str(path), [x])
    assert path.read_text() == "the one before" and len(list(tmp_path.iterdir())) == 1
    kept = write_checked(exportable(layer, 4), written(layer), str(path), [x])
    assert kept.errors == {"this": 0} and path.read_text() == ""


@pytest.mark.parametrize("compare", [largest_error, require_near])
@pytest.mark.parametrize(
    "found, words",
    [
        (torch.zeros(2, 1), "the shape"),  # subtracting would broadcast it
        (torch.zeros(3), "the shape"),
        (torch.full((2, 3), torch.nan), "numbers that are not finite"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(compare, found, words):
    with pytest.raises(UserError, match=f"^it .*gives {words}"):
        compare("it", [found], [torch.zeros(2, 3)], 1.0)


def test_errors_are_measured_by_the_largest_output_or_by_the_spread():
    outputs = torch.tensor([-100.0, 0, 100])
    for scale, allowed in ((1, 1e-2), (1e-3, 1e-4)):  # of the largest output where that is above 1
        for share in (0.9, 1.1):
            found = [scale * outputs + share * allowed]
            with (
                nullcontext() if share < 1 else pytest.raises(UserError, match="^it is up to .* off PyTorch")
            ):
                error = largest_error("it", found, [scale * outputs], 1e-4)
                assert error == pytest.approx(share * allowed, rel=0.01)
    spread = outputs.std(correction=0)
    for share in (0.09, 0.11):
        with nullcontext() if share < 0.1 else pytest.raises(UserError, match="^it differs .* 11.0% of"):
            error = require_near("it", [outputs + share * spread], [outputs], 0.1)
            assert error == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("channels, mean", [(1, [0.449]), (3, [0.485, 0.456, 0.406])])
def test_a_file_says_the_normalisation_of_every_channel(tmp_path, export, channels, mean):
    save(tmp_path / "x.pth", "MODEL.MSG.IN_CHANS", channels)
    code, _, err = export(tmp_path / "x.pth", "--formats", "safetensors")
    assert code == 0, err
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        takes = json.loads(file.metadata()["input"])
    assert takes["mean"] == pytest.approx(mean, abs=1e-3) and len(takes["std"]) == channels


def test_missing_packages_are_one_message_with_the_command(monkeypatch):
    find = importlib.util.find_spec
    lacking = ("onnxruntime", "openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else find(name))
    with pytest.raises(
        UserError, match="^onnx, openvino: missing packages: pip install onnxruntime openvino$"
    ):
        require_packages(dict(onnx=FORMATS["onnx"].packages, openvino=OF_OPENVINO))
    require_packages(dict(safetensors=FORMATS["safetensors"].packages))


def test_weights_come_back_from_a_safetensors_file(tmp_path, export):
    averaged = fill_weights(models.build_model(digits_config(*SMALL)))
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.9)
    save(tmp_path / "x.pth", model_ema=averaged.state_dict())
    code, _, err = export(tmp_path / "x.pth", "--formats", "safetensors")
    assert code == 0, err
    model, _, class_names = models.load(tmp_path / "x.safetensors")
    assert class_names == CLASSES
    for name, value in averaged.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(ckpt.CheckpointError, match="is not the checkpoint of a run: --pretrained takes"):
        ckpt.read_run(str(tmp_path / "x.safetensors"))


def test_what_cannot_be_exported_is_one_message_and_nothing_is_overwritten(tmp_path, export):
    save(tmp_path / "x.pth")
    save(tmp_path / "detector.pth", config=dump_config(coco_config("shapes", "MODEL.NUM_CLASSES", 3)))
    ckpt.save_checkpoint(str(tmp_path / "bare.pth"), dict(model={"a": torch.zeros(1)}))
    (tmp_path / "x.safetensors").write_text("mine")
    for arguments, words in (
        (["x.pth", "--formats", "safetensors"], "x.safetensors; --overwrite replaces, --name renames"),
        (["x.pth", "--size", "dynamic"], "--size: 'dynamic' is neither a side in pixels nor HEIGHTxWIDTH"),
        (["detector.pth", "--name", "y"], "detector.pth is of a detector: use detection.load"),
        (["bare.pth"], "bare.pth does not say how its model is built"),
        (["none.pth"], "no checkpoint file"),
    ):
        code, _, err = export(tmp_path / arguments[0], *arguments[1:])
        assert code and words in err, err
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4
