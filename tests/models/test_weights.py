"""The weights of msg_cifar10: found by timm, as good as they were, and described as they are."""

import hashlib
import json

import pytest
import timm
import torch
from helpers import ROOT, config_of_file, run_main
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import adapt_input_conv
from torchvision.datasets import ImageFolder

import checkpoint as ckpt
import models
from config import parse_config
from models.build import build_model

FOLDER = ROOT / "weights" / "msg_cifar10"
FILE = FOLDER / "msg_cifar10.safetensors"
SAMPLE = ROOT / "tests" / "cifar10_sample"


def create(**arguments):
    return timm.create_model("msg_cifar10", pretrained=True, **arguments).eval()


@pytest.fixture(scope="module")
def recorded():
    """What tests/cifar10_sample/make.py wrote: the number of right images, and logits by path."""
    content = json.loads((SAMPLE / "logits.json").read_text())
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == content["sha256"], "other weights than it was for"
    return content["right"], {name: torch.tensor(row) for name, row in content["logits"].items()}


def test_timm_finds_weights_that_give_the_recorded_logits_and_top_1_on_the_sample(recorded):
    model, (right, logits) = create(), recorded
    data = ImageFolder(SAMPLE / "val", create_transform(**resolve_model_data_config(model)))
    assert len(data) == 200 and data.classes == list(model.pretrained_cfg["label_names"])
    assert all(data.targets.count(target) == 20 for target in range(10))
    images, targets = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in data)))
    with torch.no_grad():
        found = model(images)
    names = ["/".join(path.replace("\\", "/").split("/")[-2:]) for path, _ in data.samples]
    expected = torch.stack([logits.pop(name) for name in names])
    assert not logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (
        abs((found.argmax(1) == targets).sum().item() - right) <= 1
    )  # two logits may be equal in all but bits


def test_main_evaluates_the_file(recorded, tmp_path):
    run_main("--cfg", "configs/cifar10_small.yaml", "--data-path", SAMPLE, "--eval", "--resume", FILE,
             "--output", tmp_path, "--opts", "AMP_OPT_LEVEL", "O0", "DATA.NUM_WORKERS", "0")  # fmt: skip
    (report,) = tmp_path.rglob("eval.json")
    found = json.loads(report.read_text())
    assert found["images"] == 200 and abs(found["acc1"] * 2 - recorded[0]) <= 1


def test_the_file_is_what_timms_name_and_the_config_build():
    ready = models.load(FILE)
    model = create()
    assert list(model.pretrained_cfg["label_names"]) == ready.class_names
    image = Image.effect_noise((40, 50), 100).convert("RGB")
    found = create_transform(**resolve_model_data_config(model))(image)
    assert torch.equal(found, ready.transform(image))
    own = build_model(config_of_file("configs/cifar10_small.yaml"))
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(found[None]), ready.model(found[None]))
    assert FILE.stat().st_size <= 6e6


def test_weights_are_fitted_to_other_channels_and_classes():
    weights = ckpt.read_weights(str(FILE))["model"]
    for arguments, new in (
        (dict(num_classes=5), {"head.weight", "head.bias"}),
        (dict(in_chans=1), {"patch_embed.proj.weight"}),
        (dict(num_classes=0), set()),
        (dict(features_only=True), set()),
    ):
        model = create(**arguments)
        own = getattr(model, "model", model).state_dict()
        changed = {
            name
            for name, x in own.items()
            if not (x.shape == weights[name].shape and torch.equal(x, weights[name]))
        }
        assert changed == new
        found = model(torch.zeros(1, arguments.get("in_chans", 3), 32, 32))
    assert [tuple(x.shape[1:]) for x in found] == [(32, 16, 16), (64, 8, 8), (128, 4, 4)]
    expected = adapt_input_conv(1, weights["patch_embed.proj.weight"])
    assert torch.equal(create(in_chans=1).patch_embed.proj.weight, expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: path.unlink(), "no checkpoint file"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged or not a checkpoint"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is damaged or not"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named_with_what_to_do(change, words, tmp_path):
    path = tmp_path / "msg_cifar10.safetensors"
    path.write_bytes(FILE.read_bytes())
    change(path)
    with pytest.raises(ckpt.CheckpointError, match=f"{path}.*{words}|{words}.*{path}") as found:
        create(pretrained_cfg_overlay=dict(file=str(path), custom_load=True))
    assert "pretrained=False" in str(found.value) and len(str(found.value).splitlines()) == 1
    assert timm.create_model("msg_cifar10", pretrained_cfg_overlay=dict(file=str(path))) is not None


def test_the_committed_config_is_that_of_the_file():
    config = parse_config((FOLDER / "config.yaml").read_text(), "config.yaml")
    assert config == parse_config(ckpt.read_weights(str(FILE))["config"], "the file's config")
    names = (FOLDER / "classes.txt").read_text().split()
    assert names == ckpt.read_weights(str(FILE))["classes"]
