"""Models from their checkpoints: models.load, and the README's lines as they stand."""

import json
import re
import shlex

import pytest
import torch
from helpers import ROOT, run_folder, run_main
from PIL import Image
from torch.nn.functional import cross_entropy

import checkpoint as ckpt
import models
from config import ConfigError
from data.datasets import ImageFolder

# Images of 48 px are cropped, and patches of 4 px leave maps of 12, 6 and 3.
OPTS = shlex.split("DATA.IMG_SIZE 48 DATA.INTERPOLATION bilinear MODEL.MSG.PATCH_SIZE 4 DATA.NUM_WORKERS 0")
OPTS += shlex.split("TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folder of a run of one epoch."""
    output = tmp_path_factory.mktemp("output")
    run_main("--cfg", "configs/digits.yaml", "--data-path", data, "--output", output, "--opts", *OPTS)
    return run_folder(output)


def test_a_loaded_model_gives_the_figures_of_evaluation(trained, data):
    model, transform, class_names = models.load(trained / "best.pth")
    assert class_names == ["a", "b", "c"] and not model.training
    images, targets = zip(*ImageFolder(data / "val", transform))
    assert images[0].shape == (3, 48, 48)
    with torch.no_grad():
        logits = model(torch.stack(images))
    found = cross_entropy(logits.double(), torch.tensor(targets)).item()
    row = json.loads((trained / "metrics.jsonl").read_text())
    assert found == pytest.approx(row["val_loss"], rel=1e-6)
    assert 100 * (logits.argmax(1) == torch.tensor(targets)).float().mean().item() == pytest.approx(
        row["acc1"]
    )


def test_the_averaged_weights_are_taken_where_there_are_any(trained, tmp_path):
    content = ckpt.read_checkpoint(str(trained / "best.pth"))
    averaged = {name: value * 2 for name, value in content["model"].items() if value.is_floating_point()}
    torch.save(dict(content, model_ema=dict(content["model"], **averaged)), tmp_path / "ema.pth")
    found = models.load(tmp_path / "ema.pth").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in averaged.items())
    own = models.load(tmp_path / "ema.pth", weights="model").model.state_dict()
    assert all(torch.equal(own[name], content["model"][name]) for name in averaged)


def test_what_a_checkpoint_lacks_is_given_or_refused(trained, tmp_path):
    path, cfg = tmp_path / "checkpoint.pth", tmp_path / "model.yaml"
    content = ckpt.read_checkpoint(str(trained / "best.pth"))

    def load_changed(changes, given=None):
        torch.save({name: x for name, x in dict(content, **changes).items() if x is not None}, path)
        return models.load(path, given)

    with pytest.raises(ckpt.CheckpointError, match="does not say how its model is built: give its config"):
        load_changed(dict(config=None))
    cfg.write_text(content["config"])
    expected = models.load(trained / "best.pth").model.state_dict()
    found = load_changed(dict(config=None, classes=None), cfg)
    assert found.class_names is None
    assert all(torch.equal(expected[name], value) for name, value in found.model.state_dict().items())
    with pytest.raises(ckpt.CheckpointError, match="it names 2 classes, and its config says 3"):
        load_changed(dict(classes=["a", "b"]))
    with pytest.raises(ckpt.CheckpointError, match="of a detector"):
        load_changed(dict(config=content["config"].replace("DATASET: imagenet", "DATASET: coco")))
    for text, words in (
        ("MODEL: {NAME: !!python/object/apply:os.getcwd []}", "the config in .* is not valid YAML"),
        ("BASE: ['/etc/passwd']\nMODEL: {NMAE: x}", "the config in .*: unknown key MODEL.NMAE"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_changed(dict(config=text))


def test_the_lines_of_the_readme_run_as_they_stand(trained, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "models.load" in block)
    checkpoint, picture = re.findall(r'"((?:output|datasets)/[^"]+)"', lines)
    for name in (checkpoint, picture):
        (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / checkpoint).symlink_to(trained / "best.pth")
    Image.new("RGB", (40, 32), "red").save(tmp_path / picture)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert re.fullmatch(r"[abc] (0\.\d+|1\.0)\n", capsys.readouterr().out)
