"""Config: official keys and defaults, BASE, --opts, flags, errors that name the key and the file."""

import argparse
import math
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import ROOT, coco_config, config_of_file, digits_config

from config import (
    CHOICES,
    ConfigError,
    default_config,
    dump_config,
    flat_config,
    get_config,
    image_shape,
    parse_args,
    parse_config,
)
from config_rules import RULES, assign, check_config, leaves
from detection.detector import build_detector
from models import build_model, count_macs
from models.deploy import files as deploy
from models.fast.attention import BACKENDS
from utils import UserError

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml"))


def config_of(tmp_path, text, name="run.yaml", opts=(), **flags):
    path = tmp_path / name
    path.write_text(text)
    return config_of_file(path, *opts, **flags)


def refusal(tmp_path, text, **flags):
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, text, **flags)
    return str(error.value)


def test_official_keys_have_official_defaults():
    config = default_config()
    expected = {
        "DATA": dict(
            BATCH_SIZE=128, DATA_PATH="", DATASET="imagenet", IMG_SIZE=224, INTERPOLATION="bicubic",
            PIN_MEMORY=True, NUM_WORKERS=8, EXIF_ORIENTATION="ignore",
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
    assert dict(config.MODEL.MSG, TOKENS=0, HEAD=0, PATCH_EMBED=0, DOWNSAMPLE=0, ATTENTION=0) == dict(
        PATCH_SIZE=4, IN_CHANS=3, EMBED_DIM=96, DEPTHS=[2, 2, 6, 2], NUM_HEADS=[3, 6, 12, 24], WINDOW_SIZE=7,
        MLP_RATIO=4.0, QKV_BIAS=True, QK_SCALE=None, APE=False, PATCH_NORM=True, SHUF_SIZE=[4, 4, 2, 1],
        MANIP_TYPE="shuf", TOKENS=0, HEAD=0, PATCH_EMBED=0, DOWNSAMPLE=0, ATTENTION=0,
    )  # fmt: skip
    assert dict(config.TRAIN.LR_SCHEDULER) == dict(
        NAME="cosine", MILESTONES=[27, 33], DECAY_EPOCHS=30, DECAY_RATE=0.1
    )  # fmt: skip
    assert dict(config.TRAIN.OPTIMIZER) == dict(NAME="adamw", EPS=1e-8, BETAS=(0.9, 0.999), MOMENTUM=0.9)
    found = config.TEST.CROP, config.TAG, config.SAVE_FREQ, config.PRINT_FREQ, config.SEED
    assert found == (True, "default", 1, 100, 0)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_builds_its_model_and_begins_with_its_command(path):
    text = (ROOT / path).read_text().replace(" \\\n#", "")
    header = text[: re.search("^[^#]", text, re.MULTILINE).start()]
    program, words = re.search(r"(main|detect)\.py (.*)", header).groups()
    args = parse_args("", argv=shlex.split(words))
    assert args.cfg == path and args.data_path
    assert re.search(r"(Time not measured|We have not trained it)\.|\bminutes\b", header)
    if "finetune" in path:
        words = " ".join(header.replace("#", " ").split())
        assert re.search(r"We have not trained it|Top-1 \d\d\.\d", words)
        assert "--pretrained <checkpoint>" in words or "  PRETRAINED: weights/" in text
    args.cfg = str(ROOT / path)
    config = get_config(args, dict(main="imagenet", detect="coco")[program])
    with torch.device("meta"):  # without weights
        model = build_detector(config, 80).backbone.model if program == "detect" else build_model(config)
    assert count_macs(model, image_shape(config)) > 0


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


@pytest.mark.parametrize("base, size", [(224, [256, 192]), ([256, 192], 224), (224, [224, 224])])
def test_the_image_size_is_a_side_or_height_and_width_whatever_the_base_has(tmp_path, base, size):
    (tmp_path / "base.yaml").write_text(f"DATA: {{IMG_SIZE: {base}}}")
    for config in (
        config_of(tmp_path, f"BASE: [base.yaml]\nDATA: {{IMG_SIZE: {size}}}"),
        config_of(tmp_path, "BASE: [base.yaml]", opts=["DATA.IMG_SIZE", str(size)]),
    ):
        again = config_of(tmp_path, dump_config(config), "again.yaml")
        assert [size] * 2 == [config.DATA.IMG_SIZE, again.DATA.IMG_SIZE]
        assert yaml.safe_load(dump_config(config))["DATA"]["IMG_SIZE"] == size


@pytest.mark.parametrize(
    "value", ["256x192", "2.5", "0", "True", "None", "[]", "[64]", "[64, 64, 3]", "[64, 0]", "[64.0, 64]"]
)
def test_other_image_sizes_are_refused_with_what_is_allowed(tmp_path, value):
    message = refusal(tmp_path, "", opts=["DATA.IMG_SIZE", value])
    assert message.startswith("--opts: DATA.IMG_SIZE is ")
    assert message.endswith("must be a whole number or [height, width], at least 1 and at most 100000")


def test_numbers_written_like_5e_4_are_numbers(tmp_path):
    text = "TRAIN: {BASE_LR: 5e-3, CLIP_GRAD: 1}\nMODEL: {MSG: {QK_SCALE: 1e-1}}\n"
    config = config_of(tmp_path, text + "AUG: {CUTMIX_MINMAX: [2e-1, 1]}")
    assert (config.TRAIN.BASE_LR, config.TRAIN.CLIP_GRAD, config.MODEL.MSG.QK_SCALE) == (5e-3, 1.0, 0.1)
    assert config.AUG.CUTMIX_MINMAX == [0.2, 1]


@pytest.mark.parametrize("word", ["1.10", "0010", "12:30", "1_0", "no", "2026-11-30", "1e3", "007"])
def test_text_is_taken_as_it_is_written(tmp_path, word):
    config = config_of(tmp_path, f"TAG: {word}")
    assert config.TAG == config_of(tmp_path, "", opts=["TAG", word]).TAG == word
    assert word == config_of(tmp_path, dump_config(config), "again.yaml").TAG
    assert parse_config(dump_config(config), "a.pth").TAG == flat_config(config)["TAG"] == word


def test_truth_values_may_be_written_as_in_yaml(tmp_path):
    for word, value in dict(yes=True, On=True, true=True, NO=False, off=False).items():
        assert config_of(tmp_path, f"COMPILE: {word}").COMPILE is value


@pytest.mark.parametrize(
    "text, words",
    [
        ("TRAIN: {EPOCH: 3}", ["run.yaml", "unknown key TRAIN.EPOCH;", "did you mean TRAIN.EPOCHS"]),
        ("DATA: {PROGRESSIVE: [[0, 32, 0.5]]}", ["run.yaml", "unknown key DATA.PROGRESSIVE;"]),
        ("EMBED_DIM: 3", ["unknown key EMBED_DIM", "MODEL.MSG.EMBED_DIM"]),
        ("TRAIN: {EPOCHS: many}", ["run.yaml", "TRAIN.EPOCHS is 'many'", "whole number"]),
        ("TRAIN: {EPOCHS: 1.5}", ["TRAIN.EPOCHS is 1.5", "whole number"]),
        ("TRAIN: {AUTO_RESUME: 3}", ["TRAIN.AUTO_RESUME is 3", "True or False"]),
        ("train: {epochs: 3}", ["unknown key train.epochs;", "did you mean TRAIN.EPOCHS"]),
        ("Model.Msg.Embed-Dim: 3", ["did you mean MODEL.MSG.EMBED_DIM"]),
        ("MODEL: {MSG: {MANIP_TYPE: ShUF}}", ["MANIP_TYPE is 'ShUF'", "did you mean 'shuf'?"]),
        ("AMP_OPT_LEVEL: o1", ["did you mean 'O1'?"]),
        ("LOG: {TRACKER: wandv}", ["did you mean 'wandb'?"]),
        ("DATA: {DATASET: torch/cifar1}", ["did you mean 'torch/cifar10'"]),
        ("DATA: {DATASET: tfds/mnist}", ["DATASET is 'tfds/mnist', but must be one of 'imagenet', 'tar'"]),
        ("TRAIN: {EPOCHS: 9223372036854775808}", ["run.yaml", "TRAIN.EPOCHS is 9223372036854775808"]),
        ("MODEL: {MSG: {MLP_RATIO: 1e300}}", ["MODEL.MSG.MLP_RATIO is", "finite and no larger than"]),
        ("MODEL: {MSG: {MLP_RATIO: 1000}}", ["MODEL.MSG.MLP_RATIO is 1000.0", "at most 100"]),
        ("AUG: {CUTMIX_MINMAX: [a, b]}", ["AUG.CUTMIX_MINMAX is ['a', 'b']", "two ratios"]),
        ("TRAIN: {LR_SCHEDULER: {MILESTONES: [a]}}", ["MILESTONES is ['a']", "a list of numbers"]),
        ("TRAIN: {LR_SCHEDULER: {MILESTONES: [33, 27]}}", ["MILESTONES is [33, 27]", "in order"]),
        ("MODEL: {MSG: {DEPTHS: [true, 2, 6, 2]}}", ["DEPTHS is [True, 2, 6, 2]", "whole numbers"]),
        ("DET: {TEST_SIZE: 1333}", ["DET.TEST_SIZE is 1333", "below DET.MAX_SIZE"]),
        ("DET: {LOSS_WEIGHTS: [1.0]}", ["DET.LOSS_WEIGHTS is [1.0]", "as long as DET.IOU_THRESHOLDS"]),
        ("DET: {DELTA_STDS: [1, 2, 3]}", ["DET.DELTA_STDS", "four positive numbers"]),
        ("DET: {CROP_SIZES: [600, 384]}", ["DET.CROP_SIZES is [600, 384]"]),
        ("DET: {MIN_SIZES: []}", ["DET.MIN_SIZES is []"]),
        ("DET: {NMS_IOU: 2}", ["DET.NMS_IOU is 2", "between 0 and 1"]),
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
        ("- a\n- b", ["run.yaml", "found a list"]),
        ("TRAIN: {EPOCHS: 3}\nTRAIN: {BASE_LR: 1}", ["run.yaml", "TRAIN is given twice", "line 2"]),
        ("BASE: [none.yaml]", ["cannot read the config file", "none.yaml"]),
        ("BASE: [run.yaml]", ["BASE goes in a circle"]),
    ],
)
def test_errors_name_the_key_the_file_and_a_way_out(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "key, value", [("TRAIN.EPOCHS", "0010"), ("SEED", "-08"), ("TRAIN.BASE_LR", "12:30")]
)
def test_numbers_that_yaml_and_python_read_differently_are_refused(tmp_path, key, value):
    words = f"{key} is '{value}', but must be a number without a leading 0 or colons"
    assert f"run.yaml: {words}" in refusal(tmp_path, f"{key}: {value}")
    assert refusal(tmp_path, "", opts=[key, value]).startswith(f"--opts: {words}")
    for text in (f"MODEL: {{MSG: {{DEPTHS: [2, {value}]}}}}", f"MODEL: {{TIMM_ARGS: {{depth: {value}}}}}"):
        assert "must be a number without a leading 0 or colons" in refusal(tmp_path, text)


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


def test_a_model_that_no_memory_holds_is_one_message():
    sizes = dict(PATCH_SIZE=1, WINDOW_SIZE=10**5, EMBED_DIM=10**4)
    sizes |= dict(DEPTHS=[1], NUM_HEADS=[1000], SHUF_SIZE=[1])
    opts = [word for key, value in sizes.items() for word in (f"MODEL.MSG.{key}", value)]
    with pytest.raises(UserError, match="cannot be made .*: lower MODEL.MSG.EMBED_DIM"):
        build_model(digits_config("DATA.IMG_SIZE", 10**5, *opts))


OFFICIAL = """
MODEL:
  TYPE: msg
  NAME: msg_tiny_p4_win7_224
  DROP_PATH_RATE: {}
  MSG:
    EMBED_DIM: {}
    DEPTHS: [ {} ]
    NUM_HEADS: [ {} ]
    WINDOW_SIZE: 7
    SHUF_SIZE: [4, 4, 2, 1]
    MANIP_TYPE: shuf"""


@pytest.mark.parametrize(
    "sizes", [(0.2, 96, "2, 2, 6, 2", "3, 6, 12, 24"), (0.5, 128, "2, 2, 18, 2", "4, 8, 16, 32")]
)
def test_official_v1_files_build_v1(tmp_path, sizes):
    config = config_of(tmp_path, OFFICIAL.format(*sizes))
    assert (config.MODEL.MSG.PATCH_EMBED, config.MODEL.MSG.DOWNSAMPLE) == ("linear", "linear")


@pytest.mark.parametrize(
    "sizes",
    [
        (0.1, 64, "2, 4, 12, 4", "2, 4, 8, 16"),
        (0.3, 96, "2, 4, 12, 4", "3, 6, 12, 24"),
        (0.5, 96, "2, 4, 28, 4", "3, 6, 12, 24"),
    ],
)
def test_official_cvpr22_files_ask_for_the_keys_that_they_lack(tmp_path, sizes):
    text = OFFICIAL.format(*sizes)
    message = refusal(tmp_path, text)
    assert message.startswith(f"{tmp_path}/run.yaml: MODEL.MSG.DEPTHS") and "CVPR 2022" in message
    assert "MODEL.MSG.PATCH_EMBED conv and MODEL.MSG.DOWNSAMPLE conv" in message
    assert "DOWNSAMPLE" in refusal(tmp_path, text, opts=["MODEL.MSG.PATCH_EMBED", "conv"])
    for embed, merge in (("conv", "conv"), ("linear", "linear"), ("linear", "conv")):
        opts = ["MODEL.MSG.PATCH_EMBED", embed, "MODEL.MSG.DOWNSAMPLE", merge]
        msg = config_of(tmp_path, text, opts=opts).MODEL.MSG
        assert (embed, merge) == (msg.PATCH_EMBED, msg.DOWNSAMPLE)


@pytest.mark.parametrize("key", ["PATCH_EMBED", "DOWNSAMPLE"])
def test_half_of_cvpr22_is_refused_unless_both_keys_say_so(tmp_path, key):
    (tmp_path / "half.yaml").write_text(f"MODEL: {{MSG: {{{key}: conv}}}}")
    message = refusal(tmp_path, "BASE: [half.yaml]")
    assert (
        message.startswith(f"{tmp_path}/half.yaml: MODEL.MSG.PATCH_EMBED") and "does not go with" in message
    )
    other = {"PATCH_EMBED": "DOWNSAMPLE", "DOWNSAMPLE": "PATCH_EMBED"}[key]
    config = config_of(tmp_path, "BASE: [half.yaml]", opts=[f"MODEL.MSG.{other}", "linear"])
    assert config.MODEL.MSG[key] == "conv" and config.MODEL.MSG[other] == "linear"


def test_each_program_refuses_the_configs_of_the_other_before_it_writes(tmp_path):
    for program, cfg, other in (("main", "coco/shapes", "detect.py"), ("detect", "digits", "main.py")):
        words = [f"{program}.py", "--cfg", f"configs/{cfg}.yaml", "--output", tmp_path, "--data-path", "none"]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert re.match(f"error: .*DATA.DATASET is .* is for {other};", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_throughput_and_runtimes_compute_in_float32_unless_a_precision_is_asked_for(tmp_path):
    def level(text="", **flags):
        return config_of(tmp_path, text, **flags).AMP_OPT_LEVEL

    timing, evaluation = dict(throughput=True), dict(eval=True)
    assert level() == level(**evaluation) == "O1" and level(**timing) == "O0"
    assert level("AMP_OPT_LEVEL: O1", **timing) == level(amp_opt_level="O1", **timing) == "O1"
    assert level("AMP_DTYPE: bfloat16", **timing) == level(opts=["AMP_DTYPE", "float16"], **timing) == "O1"
    assert level("RUNTIME: openvino", **evaluation) == "O0"
    assert level("RUNTIME: openvino") == level("RUNTIME: auto", **evaluation) == "O1"
    assert level("{RUNTIME: openvino, AMP_DTYPE: bfloat16}", **evaluation) == "O1"
    assert level("{RUNTIME: openvino, COMPILE: True}") == "O1"
    with pytest.raises(ConfigError, match="COMPILE is True, but must be False with RUNTIME openvino"):
        level("{RUNTIME: openvino, COMPILE: True}", **evaluation)


def from_flags(*argv):
    return get_config(parse_args("", throughput=True, argv=["--cfg", "configs/digits.yaml", *argv]))


def test_flags_of_swin_and_of_either_spelling_are_taken():
    config = from_flags("--optim", "sgd", "--disable_amp", "--batch_size=8", "--data-path", "a", "--tag=c_d")
    assert (config.TRAIN.OPTIMIZER.NAME, config.AMP_OPT_LEVEL, config.DATA.BATCH_SIZE) == ("sgd", "O0", 8)
    assert (config.DATA.DATA_PATH, config.TAG) == ("a", "c_d")
    assert from_flags("--disable-amp", "--local_rank=1").LOCAL_RANK == 1


def test_mistakes_in_flags_are_told(capsys):
    with pytest.raises(
        ConfigError, match="--optim: TRAIN.OPTIMIZER.NAME is 'lyon', but must be an optimizer"
    ):
        from_flags("--optim", "lyon")
    for flag in ("--data-pth", "--batch", "--fused_window_process"):
        with pytest.raises(SystemExit):
            from_flags(flag, "8")
        assert f"unrecognized arguments: {flag.replace('_', '-')} 8" in capsys.readouterr().err


def test_home_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("MODEL: {RESUME: ~/a.pth, PRETRAINED: ~/b.pth}\nTAG: ~x")
    (tmp_path / "run.yaml").write_text("BASE: [~/base.yaml]")
    flags = dict(data_path="~/data", output="~/out", opts=["DET.VAL_JSON", "~/val.json"])
    config = get_config(argparse.Namespace(cfg="~/run.yaml", **flags))
    found = [config.MODEL.RESUME, config.MODEL.PRETRAINED, config.DATA.DATA_PATH, config.DET.VAL_JSON]
    assert found == [str(tmp_path / name) for name in ("a.pth", "b.pth", "data", "val.json")]
    assert str(tmp_path / "out/msg_tiny_p4_win7_224/~x") == config.OUTPUT


def is_finite(value):
    entries = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(v, str) or v is None or math.isfinite(v) for v in entries if type(v) is not list)


ODD = ["", "-1", "0", "1.5", str(2**63), "1e300", "-1e300", "nan", "1e999", "1j", "b'x'", "[]", "[nan, 1]"]
ODD += ["['a', 'b']", "[a", "[[1, 2], [3]]", "[[[1]]]", "[True, True]", "[None]", f"[{2**63}]", "[-1, -1]"]
ODD += ["{[]: 1}", "{'a': 1}", "\0", "\ud800"]
ODD += ["x" * 5000, "9" * 5000, "0x" + "f" * 5000, "(" * 300]


def test_every_key_takes_or_refuses_any_value_in_one_line():
    for key, default in leaves(default_config()):
        for value in ODD if key not in ("BASE", "MODEL.TIMM_ARGS") else ():
            config, sources = default_config(), {}
            try:
                assign(config, key, value, "--opts", sources)
                check_config(config, sources)
            except ConfigError as error:
                message = str(error)
                assert message.startswith(f"--opts: {key} is ") and len(message.splitlines()) == 1, message
                assert len(message) < 500
            else:
                taken = dict(leaves(config))[key]
                assert default is None or type(taken) is type(default), (key, value)
                assert is_finite(taken), (key, value)


def test_keys_of_earlier_releases_are_passed_over_where_they_had_no_effect(tmp_path):
    old = "AUG: {REPEATED: 1}\n"
    old += "TRAIN: {LR_SCHEDULER: {CYCLES: 1, CYCLE_DECAY: 0.1, POWER: 0.9, COOLDOWN_EPOCHS: 0}}"
    assert config_of(tmp_path, old) == config_of(tmp_path, "")
    assert "unknown key TRAIN.LR_SCHEDULER.CYCLES" in refusal(tmp_path, old.replace("S: 1", "S: 2"))
    old = old.replace("S: 1", "S: 2, NAME: tanh")
    old += "\nLOG: {TRACKER: trackio}\nMODEL: {DROP_RATE: 0.3}"
    assert parse_config(old, "a checkpoint").MODEL.DROP_RATE == 0.3


def test_a_diamond_of_base_files_is_no_circle(tmp_path):
    (tmp_path / "root.yaml").write_text("SEED: 3")
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("BASE: [root.yaml]")
    assert config_of(tmp_path, "BASE: [a.yaml, b.yaml]").SEED == 3


def test_detection_refuses_runtimes_and_to_compile_but_reads_checkpoints_that_asked_for_it():
    with pytest.raises(ConfigError, match="RUNTIME is 'openvino', but must be 'pytorch' for detection"):
        coco_config("shapes", "RUNTIME", "openvino")
    with pytest.raises(ConfigError, match="--opts: COMPILE is True, but must be False for detection, whose"):
        coco_config("shapes", "COMPILE", True)
    with pytest.raises(ConfigError, match="DATA.BACKEND is 'opencv', but must be 'pil' for detection"):
        coco_config("shapes", "DATA.BACKEND", "opencv")
    asked = dump_config(coco_config()).replace("COMPILE: false", "COMPILE: true").replace(": pil", ": opencv")
    assert "COMPILE: true" in asked and "BACKEND: opencv" in asked
    found = parse_config(asked, "a checkpoint")
    assert not found.COMPILE and found.DATA.BACKEND == "pil"
    assert parse_config(dump_config(digits_config("COMPILE", True)), "a checkpoint").COMPILE


def test_the_config_that_a_classification_run_writes_has_no_keys_of_detection():
    classification = digits_config("DET.CHANNELS", 64)
    assert "DET" not in yaml.safe_load(dump_config(classification))
    assert yaml.safe_load(dump_config(coco_config()))["DET"]["CHANNELS"] == 40


def test_choices_that_are_read_before_pytorch_are_those_of_the_models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import export

    assert CHOICES["MODEL.MSG.ATTENTION"] == BACKENDS
    assert list(deploy.FORMATS) == export.FORMAT_NAMES


def test_every_key_has_its_rule_in_the_order_of_the_defaults():
    defaults = dict(leaves(default_config()))
    assert list(RULES) == list(defaults)
    assert all(RULES[key].possible(value) for key, value in defaults.items())
    elsewhere = ("BASE", "MODEL.TIMM_ARGS", "MODEL.MSG.MLP_RATIO", "TRAIN.OPTIMIZER.NAME")
    words = {bool: "True or False", str: "text"}
    for key, rule in RULES.items():
        if rule.possible is RULES["COMPILE"].possible and key not in elsewhere:  # anything of the right kind
            assert rule.words == words[type(defaults[key])], key
