"""Checkpoint files: atomic, never run, official ones too, refused with a reason where they do not fit."""

import email.message
import functools
import hashlib
import io
import os
import shutil
import stat
import urllib.response

import pytest
import torch
import yaml
from helpers import MICRO, coco_config, digits_config, logged, micro, restore, small_run
from torch import nn
from yacs.config import CfgNode

import checkpoint as ckpt
from config import dump_config, flat_config, function_difference
from models.build import build_model
from models.from_checkpoint import read_described
from models.msg_transformer import MSGTransformer
from optimizer import build_optimizer
from training.setup import read_start


def official_checkpoint(path, old_torch):
    """What the official code writes after an update: pickled yacs config, apex state, its own groups."""
    model = MSGTransformer(**MICRO)
    skip = ("relative_position_bias_table", "rel_pos_msg")
    spared = [n for n, p in model.named_parameters() if p.ndim == 1 or n.endswith(skip)]
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n not in spared]},
        {"params": [named[n] for n in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.123, weight_decay=0.05)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    config = CfgNode({"MODEL": {"NAME": "micro", "MSG": {"DEPTHS": [2, 2, 2]}}, "BETAS": (0.9, 0.999)})
    config.freeze()
    state = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        lr_scheduler=dict(base_values=[0.123, 0.123], t_initial=300, metric=None),
        max_accuracy=81.25,
        epoch=7,
        config=config,
        amp={"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 12}},
    )
    if old_torch:  # which counted steps in a Python number
        for moments in state["optimizer"]["state"].values():
            moments["step"] = int(moments["step"])
    torch.save(state, path)
    return model, optimizer


@pytest.mark.parametrize("old_torch", [False, True])
def test_official_checkpoint_loads_weights_and_optimizer(tmp_path, old_torch):
    path = str(tmp_path / "ckpt_epoch_7.pth")
    theirs, their_optimizer = official_checkpoint(path, old_torch)
    checkpoint = ckpt.read_checkpoint(path)
    assert (checkpoint["epoch"], checkpoint["max_accuracy"]) == (7, 81.25)
    assert not isinstance(checkpoint["config"], CfgNode)  # nothing of yacs runs
    assert checkpoint["config"]["MODEL"]["MSG"]["DEPTHS"] == [2, 2, 2]
    model = MSGTransformer(**MICRO)
    optimizer = build_optimizer(digits_config(), model, 1.0)
    ckpt.load_weights(model, checkpoint, path)
    ckpt.load_optimizer(optimizer, model, checkpoint, path)
    for ours, their in zip(model.parameters(), theirs.parameters()):
        assert torch.equal(ours, their)
        assert torch.equal(optimizer.state[ours]["exp_avg"], their_optimizer.state[their]["exp_avg"])
        assert optimizer.state[ours]["step"] == 1
    assert {group["lr"] for group in optimizer.param_groups} == {8e-3}  # the run's own
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


def test_damaged_files_are_refused_and_passed_over(tmp_path):
    good = tmp_path / "ckpt_epoch_4.pth"
    ckpt.save_checkpoint(str(good), dict(model=micro().state_dict(), epoch=4))
    content = good.read_bytes()
    newest = tmp_path / "ckpt_epoch_11.pth"
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        newest.write_bytes(content[:length])
        with pytest.raises(ckpt.CheckpointError, match="ckpt_epoch_11.pth"):
            ckpt.read_checkpoint(str(newest))
    warnings = []
    assert ckpt.read_latest(str(tmp_path), warnings.append)[0] == str(good)
    assert len(warnings) == 1 and "ckpt_epoch_11.pth" in warnings[0]
    newest.write_bytes(content)
    assert ckpt.read_latest(str(tmp_path), warnings.append)[0] == str(newest)
    assert ckpt.read_latest(str(tmp_path / "none"), warnings.append) == (None, None)


def test_a_checkpoint_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """Content, then name, then folder: in another order a power cut leaves the name of an empty file."""
    calls = []

    def recorded(name, function):
        def call(what, *others):
            found = os.stat(what)  # a path or an open file
            calls.append((name, "folder" if stat.S_ISDIR(found.st_mode) else "file", found.st_size))
            return function(what, *others)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    ckpt.save_checkpoint(str(tmp_path / "c.pth"), dict(model=micro().state_dict(), epoch=1))
    size = os.path.getsize(tmp_path / "c.pth")
    assert [call[:2] for call in calls] == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]
    assert calls[0][2] == calls[1][2] == size  # all of the content was handed to the system
    calls.clear()
    ckpt.save_best(str(tmp_path), None, saved=str(tmp_path / "c.pth"))  # a second name of the same content
    assert [call[:2] for call in calls] == [("replace", "file"), ("fsync", "folder")]


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    folder, state = str(tmp_path), dict(model=micro().state_dict())

    def save(epoch, name):
        return ckpt.save_in_folder(folder, dict(state, epoch=epoch), name, keep=2)

    ckpt.save_best(folder, None, saved=save(0, ckpt.epoch_name(0)))
    assert ckpt.read_checkpoint(os.path.join(folder, ckpt.BEST))["epoch"] == 0
    save(1, ckpt.epoch_name(1))
    save(1, ckpt.within_epoch_name(2, 640))
    save(1, ckpt.within_epoch_name(2, 1280))
    assert ckpt.in_order(folder) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "ckpt_epoch_2_images_1280.pth"]
    save(2, ckpt.epoch_name(2))
    assert ckpt.in_order(folder) == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth"]
    ckpt.save_best(folder, dict(state, epoch=10))
    save(10, ckpt.epoch_name(10))
    assert sorted(os.listdir(folder)) == ["best.pth", "ckpt_epoch_10.pth", "ckpt_epoch_2.pth"]
    assert ckpt.read_checkpoint(os.path.join(folder, ckpt.BEST))["epoch"] == 10


def quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1j,
        lambda x: x.long(),
        lambda x: x.bool(),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: torch.full_like(x, float("nan")),
        lambda x: x / 0,
        lambda x: torch.nested.nested_tensor(list(x)),
        quantized,
        list,
    ],
)
def test_weights_of_another_kind_are_refused(change):
    model = MSGTransformer(**MICRO)
    weights = model.state_dict()
    weights["head.weight"] = change(weights["head.weight"])
    for new_head in (False, True):
        with pytest.raises(ckpt.CheckpointError, match=r"other.pth.*head.weight") as error:
            ckpt.load_weights(model, dict(model=weights), "other.pth", new_head)
        assert "\n" not in str(error.value)


def test_half_precision_weights_load():
    weights = {n: x.half() if x.is_floating_point() else x for n, x in micro().state_dict().items()}
    model = MSGTransformer(**MICRO)
    ckpt.load_weights(model, weights, "half.pth")
    assert torch.equal(model.head.weight, weights["head.weight"].float())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "name, moment", [("adamw", "exp_avg"), ("sgd", "momentum_buffer"), ("lion", "exp_avg")]
)
def test_broken_optimizer_states_are_refused(name, moment):
    model = micro()
    optimizer = build_optimizer(digits_config("TRAIN.OPTIMIZER.NAME", name), model, 1.0)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    of_name = dict(optimizer_name=name) if name == "lion" else {}
    ckpt.load_optimizer(optimizer, model, dict(of_name, optimizer=optimizer.state_dict()), "a.pth")
    shape = optimizer.param_groups[0]["params"][0].shape
    broken = [{moment: torch.ones(shape) * 1j}, {moment: torch.ones(shape, dtype=torch.long)}]
    broken += [{moment: quantized(torch.ones(shape))}, {moment: torch.full(shape, float("nan"))}]
    broken += [{moment: torch.ones(shape).to_sparse()}, {moment: torch.ones(shape).bool()}]
    broken += [{moment: torch.ones(shape, device="meta")}, {moment: "x"}, {moment: torch.ones(3)}]
    if name == "adamw":
        broken += [{moment: None}, {"exp_avg_sq": -torch.ones(shape)}]
        broken += [{"step": step} for step in (None, "1", -1, 0.5, 2**63, float("nan"), torch.ones(2))]
    whole = optimizer.state_dict()
    states = [
        dict(whole, state={**whole["state"], 0: dict(whole["state"][0], **change)}) for change in broken
    ]
    states += [dict(whole, param_groups=groups) for groups in ([1, 2], None, [dict(params=None)])]
    states += [dict(whole, param_groups=[dict(params=[1, 0])])]
    states += [dict(whole, state=entries) for entries in ([1], {0: [1]}, {10**6: {}}, {"0": {}})]
    for state in states:
        with pytest.raises(ckpt.CheckpointError, match="a.pth.*(optimizer|OPTIMIZER)"):
            ckpt.load_optimizer(optimizer, model, dict(of_name, optimizer=state), "a.pth")
    # No run names these two: by a name, their states could have any entries.
    if name != "lion":
        with pytest.raises(ckpt.CheckpointError, match="a.pth.*OPTIMIZER"):
            ckpt.load_optimizer(optimizer, model, dict(optimizer=whole, optimizer_name=name), "a.pth")


OTHER_CLASSES = [
    ("abcdefghix", ["only the checkpoint has 'x'", "only the data has 'j'"]),
    ("bacdefghij", ["the same names in another order, class 0 was 'b' and is 'a'"]),
    ("0123456789", ["only the checkpoint has '0', '1', '2' ...", "only the data has 'a', 'b', 'c' ..."]),
]


@pytest.mark.parametrize("names, words", OTHER_CLASSES)
def test_other_classes_are_refused_with_what_differs(names, words):
    model = micro()
    model.classes = list("abcdefghij")
    with pytest.raises(ckpt.CheckpointError) as error:
        ckpt.load_weights(model, dict(model=model.state_dict(), classes=list(names)), "other.pth")
    told = ["other.pth", "--pretrained and another --tag", *words]
    assert all(word in str(error.value) for word in told), error.value


@pytest.mark.parametrize(
    "classes, kept, words",
    [(list(names), False, ["the head is new", *words]) for names, words in OTHER_CLASSES]
    + [
        (list("abcdefghij"), True, ["the head is kept: the classes are the same"]),
        (None, True, ["the head is kept", "c.pth does not name its classes"]),
    ],
)
def test_fine_tuning_says_whether_the_head_is_new(classes, kept, words):
    source, target = micro(), MSGTransformer(**MICRO)
    target.classes, head = list("abcdefghij"), target.head.weight.clone()
    with logged() as lines:
        ckpt.load_weights(target, dict(model=source.state_dict(), classes=classes), "c.pth", new_head=True)
    assert torch.equal(target.head.weight, source.head.weight if kept else head)
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert all(word in " ".join(lines) for word in words), lines


def test_weights_without_optimizer_are_not_resumed():
    model = nn.Linear(2, 2)
    with pytest.raises(ckpt.CheckpointError, match="weights only.*--pretrained"):
        ckpt.load_optimizer(torch.optim.AdamW(model.parameters()), model, dict(model={}), "w.pth")


def test_downloads_are_checked_against_the_hash_in_their_name(tmp_path, monkeypatch):
    def open_url(request):
        content = io.BytesIO((tmp_path / os.path.basename(request.full_url)).read_bytes())
        return urllib.response.addinfourl(content, email.message.Message(), request.full_url)

    monkeypatch.setattr(torch.hub, "urlopen", open_url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    good = tmp_path / "good.pth"
    ckpt.save_checkpoint(str(good), dict(model=micro().state_dict(), epoch=3))
    digest = hashlib.sha256(good.read_bytes()).hexdigest()[:8]
    shutil.copy(good, tmp_path / f"msg-{digest}.pth")
    shutil.copy(good, tmp_path / "msg-00000000.pth")
    address = "https://example.org"
    assert ckpt.read_checkpoint(f"{address}/good.pth")["epoch"] == 3
    assert ckpt.read_checkpoint(f"{address}/msg-{digest}.pth")["epoch"] == 3
    with pytest.raises(ckpt.CheckpointError, match="msg-00000000.pth.*hash"):
        ckpt.read_checkpoint(f"{address}/msg-00000000.pth")
    with pytest.raises(ckpt.CheckpointError, match="none.pth"):
        ckpt.read_checkpoint(f"{address}/none.pth")
    with pytest.raises(ckpt.CheckpointError, match="only https"):
        ckpt.read_checkpoint("http://localhost/good.pth")


DIGITS = digits_config()


def evaluated(path, *opts, **modes):
    """The digits config, changed by keys and values, to evaluate a checkpoint."""
    config = DIGITS.clone()
    config.defrost()
    config.MODEL.RESUME = path
    config.EVAL_MODE = not modes
    for key, value in [*zip(opts[::2], opts[1::2]), *modes.items()]:
        *sections, name = key.split(".")
        functools.reduce(getattr, sections, config)[name] = value
    return config


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A checkpoint of configs/digits.yaml, in a folder that also holds its config."""
    folder = tmp_path_factory.mktemp("described")
    text = dump_config(DIGITS)
    (folder / "config.yaml").write_text(text)
    model = build_model(DIGITS)
    torch.save(dict(model=model.state_dict(), config=text), folder / "c.pth")
    return str(folder / "c.pth")


@pytest.mark.parametrize(
    "key, value, theirs",
    [
        ("MODEL.MSG.MANIP_TYPE", "none", "shuf"),
        ("MODEL.MSG.HEAD", "avg", "token"),
        ("MODEL.MSG.QK_SCALE", 0.5, None),
        ("MODEL.MSG.SHUF_SIZE", [2, 2, 1], [4, 2, 1]),
        ("MODEL.MSG.EMBED_DIM", 96, 48),
        ("DATA.IMG_SIZE", [48, 48], [32, 32]),
        ("DATA.INTERPOLATION", "bilinear", "bicubic"),
    ],
)
def test_evaluation_under_another_config_is_refused_with_both_values(described, key, value, theirs):
    words = f"{key} is {theirs!r} in the checkpoint and {value!r} in the config"
    with pytest.raises(ckpt.CheckpointError) as error:
        read_start(evaluated(described, key, value))
    own = os.path.join(os.path.dirname(described), "config.yaml")
    told = [words, f"It is a digits: use --cfg {own}", "TEST.OTHER_CONFIG"]
    assert all(word in str(error.value) for word in told), error.value


def test_another_config_is_refused_before_the_data_are_read_unless_it_is_on_purpose(described):
    key = "MODEL.MSG.MANIP_TYPE"
    words = f"c.pth was trained with another config: {key} is 'shuf'"
    for modes in ({}, dict(THROUGHPUT_MODE=True)):
        with pytest.raises(ckpt.CheckpointError, match=words):
            read_start(evaluated(described, key, "none", **modes))
    allowed = evaluated(described, key, "none", "TEST.OTHER_CONFIG", True)
    with logged() as lines:
        assert read_start(allowed)[0] == described
    assert len(lines) == 1 and words in lines[0]


def test_what_leaves_the_result_as_it_is_may_differ(described):
    opts = ["MODEL.DROP_PATH_RATE", 0.3, "MODEL.MSG.ATTENTION", "eager", "DATA.IMG_SIZE", [32, 32]]
    opts += ["DATA.INTERPOLATION", "random", "TEST.CROP", False, "DATA.BACKEND", "opencv", "TAG", "x"]
    with logged() as lines:
        read_start(evaluated(described, *opts))
    assert not lines


def differences(theirs, **changes):
    """Between a config as a checkpoint holds it, and the digits config with other values."""
    return function_difference(theirs, flat_config(DIGITS) | changes, "c.pth")


def test_an_official_config_is_compared_by_what_it_says_and_by_the_defaults_of_what_it_does_not_know():
    msg = CfgNode(dict(EMBED_DIM=48, DEPTHS=[2, 2, 2], NUM_HEADS=(3, 6, 12), WINDOW_SIZE=4, PATCH_SIZE=2))
    msg.update(SHUF_SIZE=[4, 2, 1], MANIP_TYPE="shuf")
    config = CfgNode(dict(MODEL=dict(TYPE="msg", NAME="micro", MSG=msg), DATA=dict(IMG_SIZE=32, X=msg)))
    read = ckpt.weights_and_classes(dict(model=micro().state_dict(), config=config), "c.pth")["config"]
    conv = {"MODEL.MSG.PATCH_EMBED": "conv", "MODEL.MSG.DOWNSAMPLE": "conv"}  # of CVPR 2022, and in no config
    assert differences(read) == differences(read, **conv) == []
    (words,) = differences(read, **{"MODEL.MSG.HEAD": "avg"})
    assert words == "MODEL.MSG.HEAD is 'token' in the checkpoint and 'avg' in the config"
    (words,) = differences(read, **{"DATA.IMG_SIZE": 64, "TEST.CROP": True})
    assert words.startswith("DATA.IMG_SIZE is [32, 32]")
    loop = {}
    loop["MODEL"] = dict(loop=loop, MSG=[loop])
    weights = micro().state_dict()
    for hostile in (loop, dict(MODEL=dict(NAME=torch.ones(2), X=[[1]])), dict(a=1), [1]):
        assert ckpt.weights_and_classes(dict(model=weights, config=hostile), "c.pth")["config"] is None


def test_a_given_config_agrees_with_that_of_the_checkpoint(described, tmp_path):
    cfg = tmp_path / "other.yaml"
    for change, words in (
        ("DATA: {BATCH_SIZE: 5}", None),
        ("MODEL: {MSG: {HEAD: avg}}", "MODEL.MSG.HEAD is 'token' in the checkpoint and 'avg' in the config"),
        ("MODEL: {MSG: {HEAD: avg}}\nTEST: {OTHER_CONFIG: True}", None),
    ):
        cfg.write_text(f"BASE: ['{described[:-5]}config.yaml']\n{change}")
        if words is None:
            read_described(described, cfg)
        else:
            with pytest.raises(ckpt.CheckpointError, match=words):
                read_described(described, cfg)


def test_configs_of_other_programs_are_not_compared(described, tmp_path):
    content, path = ckpt.read_checkpoint(described), str(tmp_path / "c.pth")
    for text in ("epochs: 3", "experiment 7", "MODEL: {"):
        torch.save(dict(content, config=text), path)
        read_start(evaluated(path, "MODEL.MSG.HEAD", "avg"))


def test_models_of_timm_and_detectors_are_compared_by_their_own_keys():
    timm = {"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": "test_vit", "MODEL.TIMM_ARGS.depth": 3}
    text = yaml.safe_dump(dict(MODEL=dict(TYPE="timm", TIMM_NAME="test_vit", TIMM_ARGS=dict(depth=2))))
    (words,) = differences(text, **timm, **{"MODEL.MSG.HEAD": "avg", "DATA.IMG_SIZE": 224})
    assert words == "MODEL.TIMM_ARGS.depth is 2 in the checkpoint and 3 in the config"
    shapes = coco_config()
    changes = {"DET.TEST_SIZE": 320, "DET.PICTURES": 3, "DATA.IMG_SIZE": 64, "MODEL.MSG.HEAD": "avg"}
    changes |= {"MODEL.MSG.MANIP_TYPE": "mean"}
    found = function_difference(dump_config(shapes), flat_config(shapes) | changes, "c.pth")
    assert [words.split()[0] for words in found] == ["DET.TEST_SIZE", "MODEL.MSG.MANIP_TYPE"]
    assert not function_difference(dump_config(shapes), flat_config(shapes), "c.pth")


def test_a_checkpoint_that_does_not_fit_says_what_it_is(described):
    with pytest.raises(ckpt.CheckpointError, match="does not fit.* It is a digits: use --cfg .*config.yaml$"):
        ckpt.load_weights(micro(depths=(2, 4, 2)), ckpt.read_weights(described), described)


def test_evaluation_takes_the_best_checkpoint_of_the_run_before_the_latest(tmp_path):
    config = evaluated("", "OUTPUT", str(tmp_path))
    state = dict(model=build_model(config).state_dict(), config=dump_config(config))
    with pytest.raises(ckpt.CheckpointError, match="nothing to evaluate"):
        read_start(config)
    latest = ckpt.save_in_folder(config.OUTPUT, dict(state, epoch=7, score=1.0), ckpt.epoch_name(7), 0)
    assert read_start(config)[0] == latest
    best = ckpt.save_best(config.OUTPUT, dict(state, epoch=3, score=2.0))
    assert read_start(config)[0] == best
    assert read_start(evaluated(latest, "OUTPUT", str(tmp_path)))[0] == latest


def test_fine_tuning_names_what_the_weights_were_trained_with(described, tmp_path):
    config = evaluated("", "MODEL.MSG.HEAD", "avg")
    run = small_run(tmp_path, config=dump_config(config))
    with logged() as lines:
        restore(run, PRETRAINED=described)
    assert "MODEL.MSG.HEAD is 'token' in the checkpoint and 'avg' in the config" in lines[0]


def test_fine_tuning_in_the_folder_of_a_run_on_other_classes_asks_for_another_tag(described, tmp_path):
    state = dict(model=micro().state_dict(), classes=list("abcdefghij"), epoch=0, score=1.0)
    ckpt.save_in_folder(str(tmp_path), state, ckpt.epoch_name(0), 0)
    run = small_run(tmp_path)
    run.model.classes = list("abcdefghik")
    with pytest.raises(ckpt.CheckpointError, match="other classes.* use --pretrained and another --tag$"):
        restore(run, PRETRAINED=described)
