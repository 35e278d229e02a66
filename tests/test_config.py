"""Config: official keys and defaults, BASE, --opts, flags, errors that name the key and the file."""

import argparse

import pytest
import yaml
from helpers import ROOT, digits_config

from config import ConfigError, default_config, dump_config, get_config
from detection.detector import build_detector
from models import build_model

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml"))


def config_of(tmp_path, text, name="run.yaml", **flags):
    path = tmp_path / name
    path.write_text(text)
    return get_config(argparse.Namespace(cfg=str(path), **flags))


def refusal(tmp_path, text, **flags):
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, text, **flags)
    return str(error.value)


def test_official_keys_have_official_defaults():
    config = default_config()
    expected = {
        "DATA": dict(
            BATCH_SIZE=128, DATA_PATH="", DATASET="imagenet", IMG_SIZE=224, INTERPOLATION="bicubic",
            PIN_MEMORY=True, NUM_WORKERS=8,
        ),
        "MODEL": dict(
            TYPE="msg", RESUME="", NUM_CLASSES=1000, DROP_RATE=0.0, DROP_PATH_RATE=0.1, LABEL_SMOOTHING=0.1
        ),
        "TRAIN": dict(
            START_EPOCH=0, EPOCHS=300, WARMUP_EPOCHS=20, WEIGHT_DECAY=0.05, BASE_LR=5e-4, WARMUP_LR=5e-7,
            MIN_LR=5e-6, CLIP_GRAD=5.0, AUTO_RESUME=True, ACCUMULATION_STEPS=0, USE_CHECKPOINT=False,
        ),
        "AUG": dict(
            COLOR_JITTER=0.4, AUTO_AUGMENT="rand-m9-mstd0.5-inc1", REPROB=0.25, REMODE="pixel", RECOUNT=1,
            MIXUP=0.8, CUTMIX=1.0, CUTMIX_MINMAX=None, MIXUP_PROB=1.0, MIXUP_SWITCH_PROB=0.5,
            MIXUP_MODE="batch",
        ),
    }  # fmt: skip
    for section, values in expected.items():
        assert {key: config[section][key] for key in values} == values
    assert dict(config.MODEL.MSG, TOKENS=0, PATCH_EMBED=0, DOWNSAMPLE=0, ATTENTION=0) == dict(
        PATCH_SIZE=4, IN_CHANS=3, EMBED_DIM=96, DEPTHS=[2, 2, 6, 2], NUM_HEADS=[3, 6, 12, 24], WINDOW_SIZE=7,
        MLP_RATIO=4.0, QKV_BIAS=True, QK_SCALE=None, APE=False, PATCH_NORM=True, SHUF_SIZE=[4, 4, 2, 1],
        MANIP_TYPE="shuf", TOKENS=0, PATCH_EMBED=0, DOWNSAMPLE=0, ATTENTION=0,
    )  # fmt: skip
    assert dict(config.TRAIN.LR_SCHEDULER) == dict(
        NAME="cosine", MILESTONES=[27, 33], DECAY_EPOCHS=30, DECAY_RATE=0.1
    )
    assert dict(config.TRAIN.OPTIMIZER) == dict(NAME="adamw", EPS=1e-8, BETAS=(0.9, 0.999), MOMENTUM=0.9)
    assert (config.TEST.CROP, config.TAG, config.SAVE_FREQ, config.PRINT_FREQ, config.SEED) == (
        True,
        "default",
        1,
        100,
        0,
    )


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_builds_its_model_and_begins_with_its_command(path):
    config = get_config(argparse.Namespace(cfg=str(ROOT / path)))
    detects = config.DATA.DATASET == "coco"
    model = build_detector(config, 80).backbone.model if detects else build_model(config)
    assert model.flops() > 0
    header = "".join(line for line in (ROOT / path).read_text().splitlines() if line.startswith("#"))
    assert f"{'detect' if detects else 'main'}.py --cfg {path} --data-path" in header


def test_later_sources_win(tmp_path):
    (tmp_path / "base.yaml").write_text("SEED: 1\nTAG: base\nPRINT_FREQ: 7\nDATA: {BATCH_SIZE: 10}\n")
    config = config_of(
        tmp_path,
        "BASE: ['base.yaml']\nSEED: 2\nDATA: {NUM_WORKERS: 3}\n",
        opts=["DATA.NUM_WORKERS", "4", "TRAIN.BASE_LR", "1e-3", "MODEL.MSG.DEPTHS", "[1, 1, 1, 1]"],
        batch_size=20,
        output="runs",
    )
    assert (config.PRINT_FREQ, config.SEED, config.DATA.NUM_WORKERS, config.DATA.BATCH_SIZE) == (7, 2, 4, 20)
    assert (config.TRAIN.BASE_LR, config.MODEL.MSG.DEPTHS) == (1e-3, [1, 1, 1, 1])
    assert config.OUTPUT == "runs/msg_tiny_p4_win7_224/base"


def test_numbers_written_like_5e_4_are_numbers(tmp_path):
    config = config_of(tmp_path, "TRAIN: {BASE_LR: 5e-3, CLIP_GRAD: 1}\nMODEL: {MSG: {QK_SCALE: 1e-1}}")
    assert (config.TRAIN.BASE_LR, config.TRAIN.CLIP_GRAD, config.MODEL.MSG.QK_SCALE) == (5e-3, 1.0, 0.1)


@pytest.mark.parametrize(
    "text, words",
    [
        ("TRAIN: {EPOCH: 3}", ["run.yaml", "unknown key TRAIN.EPOCH;", "did you mean TRAIN.EPOCHS"]),
        ("TRIAN: {EPOCHS: 3}", ["unknown key TRIAN.EPOCHS", "TRAIN.EPOCHS"]),
        ("EMBED_DIM: 3", ["unknown key EMBED_DIM", "MODEL.MSG.EMBED_DIM"]),
        ("TRAIN: {EPOCHS: many}", ["run.yaml", "TRAIN.EPOCHS is 'many'", "whole number"]),
        ("TRAIN: {EPOCHS: 1.5}", ["TRAIN.EPOCHS is 1.5", "whole number"]),
        ("TRAIN: {AUTO_RESUME: 3}", ["TRAIN.AUTO_RESUME is 3", "True or False"]),
        ("TRAIN: 3", ["TRAIN is a section"]),
        ("DATA: {BATCH_SIZE: 0}", ["run.yaml", "DATA.BATCH_SIZE is 0", "at least 1"]),
        ("DATA: {BATCH_SIZE: 3}", ["DATA.BATCH_SIZE is 3", "even"]),
        ("AUG: {MIXUP_MODE: all}", ["AUG.MIXUP_MODE", "'pair'"]),
        ("MODEL: {DROP_PATH_RATE: 1.0}", ["MODEL.DROP_PATH_RATE", "below 1"]),
        ("TRAIN: {BASE_LR: 1e999}", ["TRAIN.BASE_LR is inf", "finite"]),
        ("TRAIN: {LR_SCHEDULER: {DECAY_RATE: -3}}", ["DECAY_RATE is -3.0", "above 0"]),
        ("TRAIN: {OPTIMIZER: {MOMENTUM: -1}}", ["MOMENTUM is -1.0", "below 1"]),
        ("MODEL: {MSG: {QK_SCALE: 0}}", ["QK_SCALE is 0.0", "None or above 0"]),
        ("TAG: ../../x", ["TAG is '../../x'", "below OUTPUT"]),
        ("TRAIN: {EPOCHS: 3", ["run.yaml is not valid YAML"]),
        ("TAG: !!python/object/apply:os.system ['echo hacked']", ["run.yaml is not valid YAML"]),
        ("- a\n- b", ["run.yaml", "found a list"]),
        ("BASE: [none.yaml]", ["cannot read the config file", "none.yaml"]),
        ("BASE: [run.yaml]", ["BASE goes in a circle"]),
    ],
)
def test_errors_name_the_key_the_file_and_a_way_out(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


def test_errors_from_the_command_line_name_the_flag(tmp_path):
    assert "--opts: unknown key SED; did you mean SEED?" in refusal(tmp_path, "", opts=["SED", "1"])
    assert "no partner" in refusal(tmp_path, "", opts=["SEED"])
    assert refusal(tmp_path, "", batch_size=-1).startswith("--batch-size: DATA.BATCH_SIZE is -1")


def test_dumped_config_gives_the_same_run_again(tmp_path):
    config = digits_config(
        "SEED", 5, "AUG.CUTMIX_MINMAX", "[0.2, 0.8]", tag="x", output="some/where", batch_size=8
    )
    again = config_of(tmp_path, dump_config(config))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(config.dump())


def test_impossible_model_names_the_key():
    with pytest.raises(ConfigError, match="DATA.IMG_SIZE is 64"):
        build_model(digits_config("DATA.IMG_SIZE", 64))
