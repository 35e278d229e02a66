"""Checkpoints and configs from strangers: nothing in them runs, whichever way they come in."""

import contextlib
import functools
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
import torch.utils.collect_env
import yaml
from helpers import config_of_file, digits_config, micro, restore, small_run
from yacs.config import CfgNode

import checkpoint as ckpt
from config import ConfigError
from data.samplers import TrainBatchSampler
from optimizer import build_optimizer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in ("Detected pickle protocol", "Environment variable")
]


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class SetsState:
    """Unpickling this makes a folder in ``__setstate__``."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        os.mkdir(state["folder"])


def traps(trap):
    """Objects that make the folder ``trap`` when they are unpickled, by what they use for it."""
    code, script = f"__import__('os').mkdir({trap!r})", f"{trap}.py"
    with open(script, "w") as file:
        file.write(code)
    return {
        "eval": Calls(eval, code),
        "getattr": Calls(CfgNode._load_cfg_py_source, script),
        "torch's shell": Calls(torch.utils.collect_env.run, f"mkdir {trap}"),
        "__setstate__": SetsState(trap),
    }


@pytest.fixture(scope="module")
def official():
    """What the official code saves: weights, optimizer, a pickled yacs config, apex's state."""
    model = micro()
    return dict(
        model=model.state_dict(),
        optimizer=build_optimizer(digits_config(), model, 1.0).state_dict(),
        config=CfgNode({"MODEL": {"NAME": "micro", "MSG": {"DEPTHS": [2, 2, 2]}}}),
        epoch=5,
        max_accuracy=81.25,
        amp={"loss_scaler0": {"loss_scale": 65536.0}},
    )


def places(official, bad):
    """Checkpoints that hold the object ``bad`` in different places, good weights next to it."""
    config, node = CfgNode(), CfgNode()
    # Not in the constructor: it would copy the object, and so call it.
    config.DEPTHS = [2, (bad,)]
    node.__dict__["__setstate__"] = bad
    weights = OrderedDict(official["model"])
    weights._metadata = bad
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = bad
    return {
        "the config": dict(official, config=bad),
        "a value in the config": dict(official, config=config),
        "the state of the config": dict(official, config=node),
        "the state of the weights": dict(official, model=weights),
        "the state of a weight": dict(official, model={"head.weight": parameter}),
        "the optimizer": dict(official, optimizer=dict(state={0: bad}, param_groups=[])),
        "the whole file": bad,
    }


def archive(path, pickled):
    """A checkpoint file around the bytes of a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")


def refuse(path, trap, load):
    """Check that a file makes the folder ``trap`` when ``load`` reads it, and does not when we do."""
    assert not os.path.exists(trap)
    with contextlib.suppress(Exception):
        load(path)
    assert os.path.isdir(trap), f"{path} does nothing"
    os.rmdir(trap)
    with pytest.raises(ckpt.CheckpointError) as error:
        ckpt.read_checkpoint(path)
    message = str(error.value)
    assert path in message and "can run code" in message and "\n" not in message
    assert not os.path.exists(trap)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_is_called(tmp_path, official, legacy):
    trap = str(tmp_path / "trap")
    contents = {name: dict(official, config=bad) for name, bad in traps(trap).items()}
    contents |= places(official, Calls(os.mkdir, trap))
    allowed = set(torch.serialization.get_safe_globals())
    for name, content in contents.items():
        path = str(tmp_path / f"{name}.pth")
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        refuse(path, trap, functools.partial(torch.load, weights_only=False))
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_torchs_switch_for_trusting_files_is_not_obeyed(tmp_path, official, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trap = str(tmp_path / "bad.pth"), str(tmp_path / "trap")
    torch.save(dict(official, config=Calls(os.mkdir, trap)), path)
    refuse(path, trap, torch.load)


def test_stand_ins_for_configs_cannot_be_bent_into_calls(tmp_path):
    path = str(tmp_path / "bent.pth")
    stand_in = b"cyacs.config\nCfgNode\n"
    pickles = [
        stand_in + b"cbuiltins\nprint\nb.",
        stand_in + b")\x81(S'x'\ntR.",  # calls an instance
        stand_in + b")\x81cos\nsystem\nb.",
        b"cyacs.config\nCfgNode.load_cfg\n.",
        b"cyacs.config\n_load_module_from_file\n.",
        stand_in + b")R}X\x09\x00\x00\x00__class__cos\nsystem\nsb.",
        stand_in + b")RX\x01\x00\x00\x00xcbuiltins\ngetattr\nsb.",
    ]
    archive(path, pickle.dumps(dict(epoch=3), 2))
    assert ckpt.read_checkpoint(path) == dict(epoch=3)
    for pickled in pickles:
        archive(path, b"\x80\x02" + pickled)
        with pytest.raises(ckpt.CheckpointError, match="bent.pth"):
            ckpt.read_checkpoint(path)


def test_a_file_passed_over_does_not_cost_those_written_after_it(tmp_path, official):
    (tmp_path / "ckpt_epoch_5.pth").write_bytes(b"damaged")
    for name in (ckpt.epoch_name(1), ckpt.within_epoch_name(2, 64)):
        path = ckpt.save_in_folder(str(tmp_path), official, name, keep=1)
        assert ckpt.read_latest(str(tmp_path), lambda _: None)[0] == path


def restored(official, folder, **changes):
    """Resume a run from a checkpoint with changed entries."""
    path = str(folder / "other.pth")
    torch.save(dict(official, **changes), path)
    run = small_run(folder)
    run.model.classes = list("0123456789")
    run.sampler = TrainBatchSampler(72, 8, 1, 0, 1, seed=0)
    return restore(run, auto_resume=False, RESUME=path)


def run_entries():
    """Entries of a checkpoint within an epoch, besides the optimizer's."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0).state_dict()
    place = dict(
        epoch=6, images=64, updates=8, images_per_update=8, loss=[9.0], norm=[3.0], parts={"a": [1.0]}
    )
    return dict(
        model={"weight": torch.ones(2)},
        epoch=5,
        updates=50,
        max_accuracy=81.25,
        updater=dict(scaler=scaler, amp_dtype="None", skipped=2, skipped_in_a_row=0),
        progress=place,
        ema=dict(updates=14),
        better="ema",
        model_ema={"weight": torch.ones(2)},
        classes=["a", "b"],
    )


NONSENSE = {
    "epoch": [-1, 0.5, True, "5", 2**63, torch.tensor(5), float("nan"), None, [5]],
    "updates": [-1, 0.5, True, "8", 2**63],
    "max_accuracy": ["high", None, float("nan"), float("inf"), -2, 1e9, 3j, torch.tensor(50.0), True],
    "updater": [3, None, {}],
    "updater.scaler": [None, {}],
    "updater.scaler.scale": ["1", 0.0, -1.0, float("nan"), float("inf")],
    "updater.scaler.growth_interval": [0, 0.5],
    "updater.scaler._growth_tracker": [-1],
    "updater.amp_dtype": [16],
    "updater.skipped": [-1, 2**63, 0.5],
    "progress": ["at its end", 3, {}, ""],
    "progress.epoch": [5, -6, 6.0],
    "progress.images": [-8, 0, 0.5, 2**63, None],
    "progress.updates": [0, "8"],
    "progress.images_per_update": [0],
    "progress.loss": [9.0, [], [float("nan")], ["9"], [None]],
    "progress.norm": [{}, [10**400]],
    "progress.parts": [[1.0], {"a": 1.0}, {3: [1.0]}],
    "classes": ["ab", [1, 2], [], {"a": 0}],
    "model.weight": [torch.ones(2) * 1j, torch.tensor([1.0, float("nan")]), torch.ones(2).to_sparse()],
    "optimizer": [None, [1], {}],
    "ema": [3, None, {}],
    "better": ["best", 1, ["ema"]],
    "ema.updates": [-1, 0.5, 2**63],
    "model_ema": [3, None, {}, torch.ones(2)],
    "model_ema.weight": [torch.ones(2) * 1j, torch.tensor([1.0, float("nan")])],
}


@pytest.mark.parametrize("place", NONSENSE)
def test_entries_that_no_run_writes_are_named_and_passed_over(tmp_path, place):
    good, bad = str(tmp_path / "ckpt_epoch_4.pth"), str(tmp_path / "ckpt_epoch_5.pth")
    torch.save(run_entries(), good)
    for value in NONSENSE[place]:
        content = entry = run_entries()
        *folders, name = place.split(".")
        for folder in folders:
            entry = entry[folder]
        entry[name] = value
        torch.save(content, bad)
        with pytest.raises(ckpt.CheckpointError) as error:
            ckpt.read_run(bad)
        words = str(error.value)
        assert bad in words and place.split(".")[-1] in words and "\n" not in words, (value, words)
        warnings = []
        assert ckpt.read_latest(str(tmp_path), warnings.append)[0] == good and bad in warnings[0]


def test_the_epoch_before_the_first_is_only_one_within_it(tmp_path):
    path, content = str(tmp_path / "c.pth"), dict(run_entries(), epoch=-1)
    content["progress"]["epoch"] = 0
    torch.save(content, path)
    assert ckpt.read_run(path)["epoch"] == -1
    torch.save(dict(content, progress=None), path)
    with pytest.raises(ckpt.CheckpointError, match="epoch is -1, not a whole number from 0"):
        ckpt.read_run(path)


def test_only_what_a_run_needs_is_taken_from_its_checkpoint(tmp_path):
    path, content = str(tmp_path / "c.pth"), run_entries()
    content["model"]["weight"].note = content["progress"]["more"] = content["more"] = "anything"
    torch.save(content, path)
    run = ckpt.read_run(path)
    assert run["progress"] == run_entries()["progress"] and "more" not in run
    assert torch.equal(run["model"]["weight"], torch.ones(2)) and not hasattr(run["model"]["weight"], "note")


def test_a_place_beyond_the_training_set_is_refused(tmp_path, official):
    entries = {name: run_entries()[name] for name in ("updater", "progress")}
    assert restored(official, tmp_path, **entries).progress.images == 64
    entries["progress"].update(images=80)
    with pytest.raises(ckpt.CheckpointError, match="other.pth stands at image 80 .* training set has 72"):
        restored(official, tmp_path, **entries)


def test_tensors_that_claim_more_memory_than_the_file_has_are_refused(tmp_path):
    path, alias = str(tmp_path / "bomb.pth"), torch.zeros(2**20)
    expanded = {"weight": torch.zeros(1).expand(6 * 2**30)}
    for weights in (expanded, {f"weight{i}": alias.view(-1) for i in range(2000)}):
        torch.save(dict(model=weights), path)
        with pytest.raises(ckpt.CheckpointError, match="bomb.pth .* claim more memory than the file holds"):
            ckpt.read_weights(path)


def test_views_of_one_storage_travel_at_their_own_size(tmp_path):
    path, flat = str(tmp_path / "flat.pth"), torch.arange(1000.0)
    torch.save({f"weight{i}": flat[i : i + 10] for i in range(0, 1000, 10)}, path)
    weights = ckpt.read_weights(path)["model"]
    assert torch.equal(weights["weight20"], flat[20:30])
    assert len(pickle.dumps(weights)) < 100_000


def test_what_is_not_a_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "ckpt_epoch_9.pth")
    for path in (str(tmp_path / "ckpt_epoch_9.pth"), "/dev/zero", str(tmp_path)):
        with pytest.raises(ckpt.CheckpointError, match=f"{path} is not a regular file"):
            ckpt.read_checkpoint(path)
    assert ckpt.read_latest(str(tmp_path), lambda _: None) == (None, None)


def tagged(trap):
    """YAML files with Python tags; the first three make the folder ``trap`` when they are trusted."""
    code = f"__import__('os').mkdir('{trap}')"
    return [
        f"TAG: !!python/object/apply:os.mkdir ['{trap}']",
        f'TAG: !!python/object/apply:builtins.eval ["{code}"]',
        f"? !!python/object/apply:os.mkdir ['{trap}']\n: 1",
        f"TAG: !!python/object/new:os.mkdir ['{trap}']",
        "TRAIN: {OPTIMIZER: {BETAS: !!python/tuple [0.9, 0.99]}}",
        "TAG: !unknown x",
    ]


def test_python_tags_in_configs_are_refused(tmp_path):
    trap, path, child = str(tmp_path / "trap"), tmp_path / "bad.yaml", tmp_path / "child.yaml"
    child.write_text("BASE: [bad.yaml]")
    for i, text in enumerate(tagged(trap)):
        path.write_text(text)
        if i < 3:
            yaml.unsafe_load(text)
            os.rmdir(trap)
        for config in (path, child):
            with pytest.raises(ConfigError, match="bad.yaml is not valid YAML"):
                config_of_file(config)
        assert not os.path.exists(trap)


def test_code_in_option_values_is_text(tmp_path):
    trap = tmp_path / "trap"
    code = f"__import__('os').mkdir('{trap}')"
    with pytest.raises(ConfigError, match="SEED is"):
        digits_config("SEED", code)
    tag = digits_config("TAG", code).TAG
    assert tag == code
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    [
        "&a\nMODEL: *a",
        "a: &a {b: {}}\nMODEL: {x: *a, y: *a}",  # a few lines of this unfold to gigabytes
        "SEED: " + "[" * 5000,
        "SEED: " + "9" * 5000,
        "SEED: '" + "-" * 100000 + "1'",
        "SEED: 0x_",
        "TAG: !!timestamp 2020-99-99",
        "BASE: {3: 4}",
        'BASE: ["a\\0b"]',
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_breaks_the_reader_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml") as error:
        config_of_file(path)
    assert "unknown key" not in str(error.value)
