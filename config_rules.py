"""What the options of config.py may be: a rule for every key, in the same order, and rules across keys."""

import ast
import difflib
import os
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

import yaml
from yacs.config import CfgNode

from utils import UserError

# Datasets of torchvision that DATA.DATASET takes as torch/<name>.
TORCHVISION = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
# What changes no number of a run, or is set by the data.
APART = ("OUTPUT", "TAG", "DEVICE", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "MODEL.NUM_CLASSES", "PRINT_FREQ")
APART += ("LOG.TRACKER", "RUNTIME")
# What decides the result of given weights: in every model, in classifiers, in detectors.
OF_MODELS = ("MODEL.TYPE", "MODEL.TIMM_NAME", "MODEL.TIMM_ARGS.", "MODEL.MSG.")
OF_CLASSIFIERS = ("DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP")
OF_DETECTORS = ("TEST_SIZE", "MAX_SIZE", "SHUF_SIZE", "CHANNELS", "ANCHOR_SCALE", "ANCHOR_RATIOS")
OF_DETECTORS += ("PROPOSALS_TEST", "DELTA_STDS", "BOX_CONVS", "BOX_FCS", "MASK_CONVS", "SCORE_THRESHOLD")
OF_DETECTORS = tuple(f"DET.{name}" for name in (*OF_DETECTORS, "NMS_IOU", "PER_IMAGE"))
VERSION = ("MODEL.MSG.PATCH_EMBED", "MODEL.MSG.DOWNSAMPLE")  # v1 or CVPR 2022; official configs have neither
# Keys of earlier releases, with the values that had no effect: configs that those releases wrote have them.
GONE = {
    "AUG.REPEATED": 1,
    "DATA.MAX_SCANS": 100,
    "DATA.PROGRESSIVE": [],
    "DET.FROZEN_STAGES": 0,
    "TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS": 0,
    "TRAIN.LR_SCHEDULER.CYCLES": 1,
    "TRAIN.LR_SCHEDULER.CYCLE_DECAY": 0.1,
    "TRAIN.LR_SCHEDULER.POWER": 0.9,
}
LARGEST = 2**31 - 1  # of any number but the seed
LARGEST_SEED = 2**63 - 1


class ConfigError(UserError):
    """A config cannot be used; the message says which key of which file and what to do."""


class Rule(NamedTuple):
    """What the value of a key may be.

    Attributes:
        possible: a test of a value of the right kind.
        words: what passes it.
        names: the words to choose from, where there are some.
        kind: of values that may be None; else the kind is that of the default.
    """

    possible: Callable
    words: str
    names: tuple = ()
    kind: type | None = None


def _any(value):
    return True


def _one_of(*names):
    return Rule(names.__contains__, "one of " + ", ".join(map(repr, names)), names)


def _at_least(low):
    return Rule(lambda value: value >= low, f"at least {low}")


def _between(low, high):
    return Rule(lambda value: low <= value <= high, f"at least {low} and at most {high}")


def _side_or_sides(low, high):
    def possible(value):
        sides = value if type(value) is list else [value, value]
        return len(sides) == 2 and _all_between(sides, low, high, (int,))

    return Rule(possible, f"a whole number or [height, width], at least {low} and at most {high}")


def _numbers(low, high, kinds=(int, float), some=False):
    words = f"a list of {'' if float in kinds else 'whole '}numbers, at least {low} and at most {high}"
    words += ", one or more of them" if some else ""
    return Rule(lambda value: (value or not some) and _all_between(value, low, high, kinds), words)


def _all_between(values, low, high, kinds=(int, float)):
    """Whether a list holds nothing but numbers from ``low`` to ``high``."""
    return all(type(value) in kinds and low <= value <= high for value in values)


def _is_below(name):
    """Whether a path stays below the folder that it is joined to."""
    path = PurePath(name)
    return bool(name) and not path.anchor and ".." not in path.parts


_BOOL = Rule(_any, "True or False")
_TEXT = Rule(_any, "text")
_PATH = Rule(_any, "text")  # where ~ is the home folder
_ELSEWHERE = Rule(_any, "what another function checks")
_ABOVE_0 = Rule(lambda value: value > 0, "above 0")
_BELOW_1 = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
_SHARE = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
_FACTOR = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
_FOLDER = Rule(_is_below, "a name for a folder below OUTPUT")
_STAGES = _numbers(1, 1000, (int,))

# What the values of each key may be, in the order of the defaults in config.py. Most of the upper limits are
# for what cannot be held in memory, counted in time, or waited for.
RULES = {
    "BASE": _ELSEWHERE,  # in config.py
    "DATA.BATCH_SIZE": _between(1, 10**6),
    "DATA.DATA_PATH": _PATH,
    "DATA.BACKEND": _one_of("pil", "opencv"),
    "DATA.DATASET": _one_of(
        "imagenet", "tar", "wds", "hfds", *(f"torch/{name}" for name in TORCHVISION), "coco"
    ),
    "DATA.IMG_SIZE": _side_or_sides(1, 10**5),
    "DATA.INTERPOLATION": _one_of("bicubic", "bilinear", "lanczos", "nearest", "random"),
    "DATA.PIN_MEMORY": _BOOL,
    "DATA.ON_ERROR": _one_of("raise", "skip"),
    "DATA.MAX_PIXELS": _at_least(1),
    "DATA.EXIF_ORIENTATION": _one_of("ignore", "apply"),
    "DATA.NUM_WORKERS": _between(0, 1000),
    "MODEL.TYPE": _one_of("msg", "timm"),
    "MODEL.TIMM_NAME": _TEXT,
    "MODEL.TIMM_ARGS": _ELSEWHERE,  # in _argument
    "MODEL.NAME": _FOLDER,
    "MODEL.RESUME": _PATH,
    "MODEL.PRETRAINED": _PATH,
    "MODEL.NUM_CLASSES": _between(1, 10**6),
    "MODEL.DROP_RATE": _BELOW_1,
    "MODEL.DROP_PATH_RATE": _BELOW_1,
    "MODEL.LABEL_SMOOTHING": _BELOW_1,
    "MODEL.MSG.PATCH_SIZE": _between(1, 10**5),
    "MODEL.MSG.IN_CHANS": _between(1, 10**4),
    "MODEL.MSG.EMBED_DIM": _between(1, 10**4),
    "MODEL.MSG.DEPTHS": _STAGES,
    "MODEL.MSG.NUM_HEADS": _STAGES,
    "MODEL.MSG.WINDOW_SIZE": _between(1, 10**5),
    "MODEL.MSG.MLP_RATIO": _ELSEWHERE,  # in check_config
    "MODEL.MSG.QKV_BIAS": _BOOL,
    "MODEL.MSG.QK_SCALE": Rule(lambda value: value is None or value > 0, "None or above 0", kind=float),
    "MODEL.MSG.APE": _BOOL,
    "MODEL.MSG.PATCH_NORM": _BOOL,
    "MODEL.MSG.SHUF_SIZE": _STAGES,
    "MODEL.MSG.MANIP_TYPE": _one_of("shuf", "mean", "shift", "none"),
    "MODEL.MSG.TOKENS": _BOOL,
    "MODEL.MSG.HEAD": _one_of("token", "avg"),
    "MODEL.MSG.PATCH_EMBED": _one_of("linear", "conv"),
    "MODEL.MSG.DOWNSAMPLE": _one_of("linear", "conv"),
    "MODEL.MSG.ATTENTION": _one_of("auto", "eager", "sdpa", "blocked", "triton"),
    "TRAIN.START_EPOCH": _between(0, 10**6),
    "TRAIN.EPOCHS": _between(1, 10**6),
    "TRAIN.WARMUP_EPOCHS": _between(0, 10**6),
    "TRAIN.WARMUP_STEPS": _at_least(0),
    "TRAIN.WEIGHT_DECAY": _at_least(0),
    "TRAIN.BASE_LR": _ABOVE_0,
    "TRAIN.WARMUP_LR": _at_least(0),
    "TRAIN.MIN_LR": _at_least(0),
    "TRAIN.LAYER_DECAY": _FACTOR,
    "TRAIN.CLIP_GRAD": _at_least(0),
    "TRAIN.AUTO_RESUME": _BOOL,
    "TRAIN.SAVE_STEPS": _at_least(0),
    "TRAIN.SAVE_MINUTES": _at_least(0),
    "TRAIN.KEEP_CHECKPOINTS": _at_least(0),
    "TRAIN.ON_SAVE_ERROR": _one_of("continue", "stop"),
    "TRAIN.MAX_NONFINITE": _at_least(0),
    "TRAIN.ACCUMULATION_STEPS": _at_least(0),
    "TRAIN.USE_CHECKPOINT": _BOOL,
    "TRAIN.EMA.ENABLED": _BOOL,
    "TRAIN.EMA.DECAY": _BELOW_1,
    "TRAIN.EMA.WARMUP": _BOOL,
    "TRAIN.LR_SCHEDULER.NAME": _one_of("cosine", "linear", "step", "multistep"),
    "TRAIN.LR_SCHEDULER.MILESTONES": Rule(
        lambda value: _all_between(value, 0, 10**6) and value == sorted(value),
        f"a list of numbers, at least 0 and at most {10**6}, in order, smallest first",
    ),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": _between(1, 10**6),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": _FACTOR,
    "TRAIN.OPTIMIZER.NAME": _ELSEWHERE,  # in check_config, one of OPTIMIZERS
    "TRAIN.OPTIMIZER.EPS": _ABOVE_0,
    "TRAIN.OPTIMIZER.BETAS": Rule(
        lambda value: len(value) == 2 and _all_between(value, 0, 1) and 1 not in value,
        "two numbers, at least 0 and below 1",
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": _BELOW_1,
    "DISTILL.TEACHER": _PATH,
    "DISTILL.WEIGHTS": _PATH,
    "DISTILL.KIND": _one_of("soft", "hard"),
    "DISTILL.TEMPERATURE": _between(0.01, 1000),
    "DISTILL.ALPHA": _SHARE,
    "AUG.COLOR_JITTER": _at_least(0),
    "AUG.AUTO_AUGMENT": _TEXT,
    "AUG.CROP": _BOOL,
    "AUG.HFLIP": _SHARE,
    "AUG.REPROB": _SHARE,
    "AUG.REMODE": _one_of("pixel", "rand", "const"),
    "AUG.RECOUNT": _between(0, 100),
    "AUG.MIXUP": _at_least(0),
    "AUG.CUTMIX": _at_least(0),
    "AUG.CUTMIX_MINMAX": Rule(
        lambda value: (
            value is None or (len(value) == 2 and _all_between(value, 0, 1) and 0 < value[0] <= value[1])
        ),
        "None or two ratios, smallest first, above 0 and at most 1",
        kind=list,
    ),
    "AUG.MIXUP_PROB": _SHARE,
    "AUG.MIXUP_SWITCH_PROB": _SHARE,
    "AUG.MIXUP_MODE": _one_of("batch", "pair", "elem"),
    "TEST.CROP": _BOOL,
    "TEST.WEIGHTS": _one_of("auto", "model", "ema"),
    "TEST.OTHER_CONFIG": _BOOL,
    "DET.TRAIN_IMAGES": _PATH,
    "DET.TRAIN_JSON": _PATH,
    "DET.VAL_IMAGES": _PATH,
    "DET.VAL_JSON": _PATH,
    "DET.MIN_SIZES": _numbers(16, 10**5, (int,), some=True),
    "DET.MAX_SIZE": _between(16, 10**5),
    "DET.CROP_MIN_SIZES": _numbers(16, 10**5, (int,)),
    "DET.CROP_SIZES": Rule(
        lambda value: (
            not value or (len(value) == 2 and _all_between(value, 16, 10**5, (int,)) and value[0] <= value[1])
        ),
        f"an empty list or two whole numbers, smallest first, at least 16 and at most {10**5}",
    ),
    "DET.TEST_SIZE": _between(16, 10**5),
    "DET.SHUF_SIZE": _STAGES,
    "DET.CHANNELS": _between(1, 2000),
    "DET.ANCHOR_SCALE": _between(1, 10**4),
    "DET.ANCHOR_RATIOS": _numbers(0.001, 1000, some=True),
    "DET.RPN_SAMPLES": _at_least(1),
    "DET.PROPOSALS_TRAIN": _at_least(1),
    "DET.PROPOSALS_TEST": _at_least(1),
    "DET.ROI_SAMPLES": _at_least(1),
    "DET.ROI_POSITIVE": _SHARE,
    "DET.IOU_THRESHOLDS": _numbers(0, 1, some=True),
    "DET.LOSS_WEIGHTS": _numbers(0, 10**6),
    "DET.DELTA_STDS": Rule(
        lambda value: all(type(v) is list and len(v) == 4 and _all_between(v, 1e-6, 10**6) for v in value),
        "four positive numbers for each stage",
    ),
    "DET.BOX_LOSS": _one_of("giou", "smooth_l1"),
    "DET.BOX_CONVS": _between(0, 100),
    "DET.BOX_FCS": _numbers(1, 10**4, (int,), some=True),
    "DET.MASK_CONVS": _between(0, 100),
    "DET.SCORE_THRESHOLD": _SHARE,
    "DET.NMS_IOU": _SHARE,
    "DET.PER_IMAGE": _at_least(1),
    "DET.PICTURES": _at_least(0),
    "DEVICE": _one_of("", "cuda", "mps", "cpu"),
    "AMP_OPT_LEVEL": _one_of("O0", "O1", "O2"),
    "AMP_DTYPE": _one_of("float16", "bfloat16"),
    "AMP.FUSED_LAYERNORM": _BOOL,
    "COMPILE": _BOOL,
    "RUNTIME": _one_of("pytorch", "openvino", "auto"),
    "DETERMINISTIC": _BOOL,
    "DIST.TIMEOUT_SECONDS": _between(1, 10**6),
    "LOG.TRACKER": _one_of("", "wandb"),
    "OUTPUT": _PATH,
    "TAG": _FOLDER,
    "SAVE_FREQ": _at_least(1),
    "PRINT_FREQ": _at_least(1),
    "SEED": _at_least(0),
    "EVAL_MODE": _BOOL,
    "THROUGHPUT_MODE": _BOOL,
    "LOCAL_RANK": _at_least(0),
}
# Keys that take one word of a few.
CHOICES = {key: rule.names for key, rule in RULES.items() if rule.names}
# Optimizers of timm that a run can resume with, see optimizer.py, and Swin's names for those of apex.
OPTIMIZERS = """
    adabelief adadelta adagrad adam adamax adamc adamp adamuon adamw adamwlegacy adan adanw adopt adoptc
    adoptw cadamc cadamp cadamw cadan cadanw cadopt cadoptc cadoptw clamb clambw claprop clion clionc
    cmars cnadamc cnadamw crmsproptf csgdc csgdp csgdw fused_adam fused_lamb lamb lambc lambcd lambcw
    lambw laprop lapropc larc lars lion lionc madgrad madgradw mars momentum muon nadam nadamc nadamlegacy
    nadamuon nadamw nesterov nesterovw nlarc nlars nmuon novograd novogradc novogradw radabelief radam
    radamlegacy radamw rmsprop rmsproptf rmsproptfc rmsproptfw sgd sgdc sgdp sgdw
""".split()  # noqa: SIM905, shorter than a list
_WORDS = dict(true=True, yes=True, on=True, false=False, no=False, off=False, none=None, null=None)
_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
}


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases: a few lines of them can unfold to gigabytes, or to a circle.

    A key that is given twice is an error: the last one would win without a word.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"configs may not use aliases{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"{key.value} is given twice{key.start_mark}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _LoaderOfText(_Loader):
    """For what people write: values are text, as on the command line, until the kind of their key is known.

    YAML would make ``TAG: 1.10`` the number 1.1, ``0010`` the number 8 and ``12:30`` the number 750.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in _Loader.yaml_implicit_resolvers.items()
    }


def read_tree(text, source, values_as_text=False):
    """The nested dict of a YAML text; empty where there is nothing in it."""
    try:
        tree = yaml.load(text, _LoaderOfText if values_as_text else _Loader)
    # The reader leaves impossible dates and numbers, false tags, and lists in lists in lists, to Python.
    except Exception as error:
        raise ConfigError(
            f"{source} is not valid YAML: {_shorten(' '.join(str(error).split()), 300)}"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected 'KEY: value' lines, found a {type(tree).__name__}")
    return tree


def leaves(tree, prefix=""):
    """Dotted keys and values of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assign(config, key, value, source, sources):
    """Set one dotted key, after checking its name and type."""
    node, *path = config, *key.split(".")
    for name in path[:-1]:
        node = node.get(name) if isinstance(node, CfgNode) else None
    if key.rpartition(".")[0] == "MODEL.TIMM_ARGS":
        node[path[-1]] = _argument(value, key, source)
        sources[key] = source
        return
    if not isinstance(node, CfgNode) or path[-1] not in node:
        if key in GONE and _literal(value) == GONE[key]:
            return
        near = nearest_key(key)
        hint = f"did you mean {near}?" if near else "config.py lists every key"
        raise ConfigError(f"{source}: unknown key {show_value(key)[1:-1]}; {hint}")
    present = node[path[-1]]
    if isinstance(present, CfgNode):
        if value is None or value == {}:
            return
        raise ConfigError(
            f"{source}: {key} is a section; set one of its keys, such as {key}.{next(iter(present))}"
        )
    node[path[-1]] = _coerce(value, present, key, source)
    sources[key] = source


def nearest_key(key):
    """The key that was probably meant, or None."""
    known = list(RULES)
    wanted = key.upper().replace("-", "_")
    near = difflib.get_close_matches(wanted, known, 1, 0.75)
    if near:
        return near[0]
    # A key in the wrong section is as likely as a typing error: compare the last part too.
    lasts = [name.split(".")[-1] for name in known]
    near = difflib.get_close_matches(wanted.split(".")[-1], lasts, 1, 0.8)
    return known[lasts.index(near[0])] if near else None


def _coerce(value, present, key, source):
    """Bring a value to the type of the present one, or refuse it."""
    rule = RULES.get(key, _ELSEWHERE)
    kind = rule.kind or type(present)

    def refuse(what):
        raise ConfigError(f"{source}: {key} is {show_value(value)}, but must be {what}")

    if kind is str:
        if type(value) is not str or "\0" in value:
            refuse(f"text, such as {present!r}")
        return os.path.expanduser(value) if rule is _PATH else value
    value = _number_or_text(value, key, source)
    if value is None and rule.kind:
        return None
    words = f"{_NAMES[kind]}, such as {present!r}"
    if key == "DATA.IMG_SIZE":  # one side or two, whichever an earlier file has
        kind, words = list if type(value) is list else int, rule.words
    if kind in (list, tuple) and type(value) is list:
        value = kind(value)
    if type(value) is not kind and not (kind is float and type(value) is int):
        refuse(words)
    largest = LARGEST_SEED if key == "SEED" else LARGEST
    if not all(abs(number) <= largest for number in _numbers_in(value)):
        refuse(f"finite and no larger than {largest}")
    return float(value) if kind is float else value


def _argument(value, key, source):
    """An argument of timm's models: a number, a text, a truth value, None, or a list of these."""
    value = _number_or_text(value, key, source)
    entries = value if isinstance(value, list) else [value]
    plain = all(type(entry) in (bool, int, float, str, type(None)) for entry in entries)
    if not re.fullmatch(r"MODEL\.TIMM_ARGS\.[a-z]\w{0,99}", key) or not plain:
        raise ConfigError(f"{source}: {key} is {show_value(value)}, which is no argument of a model of timm")
    return None if value is None else _coerce(value, value, key, source)


def _number_or_text(value, key, source):
    """What text says, see :func:`_literal`; numbers that YAML and Python read differently are refused."""
    value = _literal(value)
    if _is_ambiguous(value):
        raise ConfigError(
            f"{source}: {key} is {show_value(value)}, but must be a number without a leading 0 or colons, "
            "which programs read differently"
        )
    return value


def _literal(value):
    """What text says, in lists too; truth values in YAML's words as well as in Python's."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _WORDS.get(value.lower(), value)
    return [_literal(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _is_ambiguous(value):
    """Whether text or an entry of a list, such as 010 or 1:30, is a number to YAML and not to Python."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_ambiguous, value))
    return isinstance(value, str) and bool(re.fullmatch(r"[-+]?(0[\d_]+|\d[\d_]*(:\d+)+(\.\d*)?)", value))


def _numbers_in(value):
    """The numbers in a value and its nested lists."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _numbers_in(entry)
    elif type(value) in (int, float):
        yield value


def show_value(value):
    """A value as Python writes it, on one line and not too long."""
    try:
        return _shorten(repr(value))
    except ValueError:  # more digits than Python writes
        return "an enormous number"


def _shorten(text, most=120):
    return text if len(text) <= most else f"{text[:most]}..."


def _value(config, key):
    for name in key.split("."):
        config = config[name]
    return config


def check_dataset(config, sources, dataset):
    """Refuse a config that is for the other program."""
    programs = {**dict.fromkeys(CHOICES["DATA.DATASET"], "main.py"), "coco": "detect.py"}
    found = config.DATA.DATASET
    if dataset and found in programs and programs[found] != programs[dataset]:
        raise ConfigError(
            f"{sources.get('DATA.DATASET', 'defaults')}: DATA.DATASET is {found!r}, which is for "
            f"{programs[found]}; {programs[dataset]} takes configs whose DATA.DATASET is {dataset!r}"
        )


def check_version(config, sources):
    """Refuse to mix v1 and CVPR 2022 unless both keys that tell them apart are set.

    Official configs have neither key: each of the two official versions can only build one of them. Depths
    tell which it is.
    """
    if all(key in sources for key in VERSION):
        return
    msg = config.MODEL.MSG
    if list(msg.DEPTHS) in ([2, 4, 12, 4], [2, 4, 28, 4]):
        problem = f"MODEL.MSG.DEPTHS {msg.DEPTHS} are those of the CVPR 2022 models"
        source = sources["MODEL.MSG.DEPTHS"]
    elif msg.PATCH_EMBED != msg.DOWNSAMPLE:
        problem = f"MODEL.MSG.PATCH_EMBED {msg.PATCH_EMBED} does not go with DOWNSAMPLE {msg.DOWNSAMPLE}"
        source = next(sources[key] for key in VERSION if key in sources)
    else:
        return
    raise ConfigError(
        f"{source}: {problem}, so set both keys: MODEL.MSG.PATCH_EMBED conv and MODEL.MSG.DOWNSAMPLE conv "
        "build a model of CVPR 2022, as configs/cvpr22 does; any other pair builds a mix, if you want one"
    )


def check_config(config, sources):
    """Refuse impossible values. What only the model can judge, the model refuses itself."""

    def require(key, fits, what):
        if not fits:
            found = show_value(_value(config, key))
            raise ConfigError(f"{sources.get(key, 'defaults')}: {key} is {found}, but must be {what}")

    for key, rule in RULES.items():
        value = _value(config, key)
        if not rule.possible(value):
            lower = {name.lower(): name for name in rule.names}
            near = difflib.get_close_matches(str(value).lower(), lower, 1, 0.7)
            hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
            require(key, False, rule.words + hint)
    data, model, train, aug, det = config.DATA, config.MODEL, config.TRAIN, config.AUG, config.DET
    trains = not (config.EVAL_MODE or config.THROUGHPUT_MODE)
    if model.TYPE == "timm":
        what = "False for models of timm, which have their own norms"
        require("AMP.FUSED_LAYERNORM", not config.AMP.FUSED_LAYERNORM, what)
    if (name := train.OPTIMIZER.NAME) not in OPTIMIZERS:
        near = difflib.get_close_matches(name.lower(), OPTIMIZERS, 5, 0.5) or ["adamw", "sgd", "lamb", "lion"]
        what = "an optimizer of timm that a run can resume with, such as " + ", ".join(map(repr, near))
        require("TRAIN.OPTIMIZER.NAME", False, what)

    detects = data.DATASET == "coco"
    if detects:
        require("MODEL.TYPE", model.TYPE == "msg", "'msg' for detection")
        require("DISTILL.TEACHER", not config.DISTILL.TEACHER, "empty for detection")
        require("THROUGHPUT_MODE", not config.THROUGHPUT_MODE, "False for detection")
        what = "False for detection, whose images have too many sizes to compile for"
        require("COMPILE", not config.COMPILE, what)
        require("RUNTIME", config.RUNTIME == "pytorch", "'pytorch' for detection")
        require("DATA.BACKEND", data.BACKEND == "pil", "'pil' for detection")
    if config.RUNTIME != "pytorch" and not trains:
        require("COMPILE", not config.COMPILE, f"False with RUNTIME {config.RUNTIME}")
    named = model.TYPE == "timm"
    require("MODEL.TIMM_NAME", bool(model.TIMM_NAME) == named, "given where MODEL.TYPE is timm only")
    what = "at least 1 / MODEL.MSG.EMBED_DIM and at most 100"
    require("MODEL.MSG.MLP_RATIO", 1 / model.MSG.EMBED_DIM <= model.MSG.MLP_RATIO <= 100, what)
    if data.DATA_PATH:
        what = "1 or 3 with data, and 3 for detection and with DATA.BACKEND opencv"
        possible = (3,) if detects or data.BACKEND == "opencv" else (1, 3)
        require("MODEL.MSG.IN_CHANS", model.MSG.IN_CHANS in possible, what)
    require("DET.TEST_SIZE", det.TEST_SIZE < det.MAX_SIZE, "below DET.MAX_SIZE")
    for key in ("DET.LOSS_WEIGHTS", "DET.DELTA_STDS"):
        fits = len(_value(config, key)) == len(det.IOU_THRESHOLDS)
        require(key, fits, "as long as DET.IOU_THRESHOLDS")
    mixes = aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None
    if mixes and trains and not detects:
        require("DATA.BATCH_SIZE", data.BATCH_SIZE % 2 == 0, "even for mixup and CutMix, which mix pairs")


def differences(theirs, ours):
    """Texts with each option that makes something else of the same weights in two flat configs."""
    there, here = _function(theirs), _function(ours)
    keys = [key for key in here if key in there]
    keys += sorted(key for key in here.keys() ^ there.keys() if key.startswith("MODEL.TIMM_ARGS."))
    return [
        f"{key} is {show_value(there.get(key))} in the checkpoint and {show_value(here.get(key))} in the "
        "config"
        for key in keys
        if there.get(key) != here.get(key)
    ]


def _function(options):
    """The options that decide the result of trained weights, by key; equal ones have equal values."""
    detects = options["DATA.DATASET"] == "coco"
    kinds = (*OF_MODELS, *(OF_DETECTORS if detects else OF_CLASSIFIERS))
    found = {key: value for key, value in options.items() if key.startswith(kinds)}
    unused = ["MODEL.MSG.ATTENTION"]
    if detects:
        unused += ["MODEL.MSG.HEAD", "MODEL.MSG.SHUF_SIZE"]
    else:
        size = found["DATA.IMG_SIZE"]
        found["DATA.IMG_SIZE"] = sides = size if isinstance(size, list) else [size, size]
        unused += ["TEST.CROP"] if any(type(side) is int and side <= 32 for side in sides) else []
        if found["DATA.INTERPOLATION"] == "random":
            found["DATA.INTERPOLATION"] = "bicubic"
    if options["MODEL.TYPE"] == "timm":
        unused += [key for key in found if key.startswith("MODEL.MSG.") and key != "MODEL.MSG.IN_CHANS"]
    return {key: value for key, value in found.items() if key not in unused}
