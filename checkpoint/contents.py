"""What may stand in a checkpoint, and the check of what does.

A checkpoint is a dict of plain types and tensors: ``model``, ``optimizer``, ``lr_scheduler``, ``updater``,
``progress``, ``epoch`` (the last finished one), ``updates`` (since the start of the run), ``score`` (of these
weights, at the end of an epoch), ``max_accuracy`` (of the best so far), ``config`` (YAML text) and
``classes`` (names, in the order of the head). With ``TRAIN.EMA`` it also has ``model_ema``, the averaged
weights, ``ema``, and ``better``, which of the two scored higher when they were last evaluated, model or ema;
the scores are then of the better one. With optimizers other than AdamW and SGD it has ``optimizer_name``.
From a CPU it has ``cpu``, the processor and the libraries that were chosen for it.
Files of the official release, with a pickled yacs config and apex's ``amp`` entry, are read too; so are the
weights in bare state dicts, in training checkpoints of timm, Lightning and others, and in safetensors files,
which hold ``config`` and ``classes`` too if they are of ``tools/export.py``. Nothing in a file is ever run,
and what is used of one is checked first.
"""

import itertools
import logging
import os
import re

import torch
from timm.models import clean_state_dict

from utils import UserError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
# Where a file may hold its weights, averaged and not. As in timm, the averaged ones come first, unless the
# file says that the others are better.
WEIGHTS = dict(ema=("state_dict_ema", "model_ema"), model=("state_dict", "model", "model_state_dict"))
NEW_RUN = "--pretrained and another --tag"  # a folder that holds a run goes on with that

logger = logging.getLogger("msg_transformer")


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message says which file and what to do."""


def _whole(least, most=2**31 - 1):
    words = f"a whole number from {least} to {most}"
    return lambda value: type(value) is int and least <= value <= most, words


def _number(least, most):
    words = f"a number from {least:g} to {most:g}"
    return lambda value: type(value) in (int, float) and least <= value <= most, words


def _list_of(kind, words):
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(kind[0], value)), words


def _numbers_from(first):
    words = f"a list of numbers in order from {first}"
    return lambda value: isinstance(value, list) and value == list(range(first, first + len(value))), words


def _is_parts(value):
    return isinstance(value, dict) and all(isinstance(name, str) and SUMS[0](value[name]) for name in value)


def _is_dense(value):
    kind = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
    return kind and not value.is_nested and value.device.type == "cpu" and value.dtype in DTYPES


def _is_step(value):
    number = value.item() if _is_dense(value) and not value.ndim else value
    return type(number) in (int, float) and 0 <= number < 2**31 and number == int(number)


# A kind of entry is a test and its words, or a dict of kinds by name.
DICT = (lambda value: isinstance(value, dict)), "a dict"
TEXT = (lambda value: isinstance(value, str)), "text"
DENSE = _is_dense, "a dense tensor of real numbers"
MOMENT = (lambda value: _is_dense(value) and value.is_floating_point()), "a dense tensor of floats"
SQUARES = (lambda value: not (value < 0).any()), "one without negative numbers"
STEP = _is_step, "a number of updates"
CLASSES = _list_of(TEXT, "a list of names")
BETTER = (lambda value: isinstance(value, str) and value in WEIGHTS), "model or ema"
SUMS = _list_of(_number(-1e39, 1e39), "a list of finite numbers")
PARTS = _is_parts, "lists of finite numbers by name"
RUN = dict(
    epoch=_whole(-1),
    updates=_whole(0),
    max_accuracy=_number(-1, 101),  # the official percentages are rounded to float32
    score=_number(0, 101),
    better=BETTER,
    optimizer_name=TEXT,
    cpu=TEXT,
    updater=dict(
        scaler=dict(
            scale=_number(1e-45, 1e38),
            growth_factor=_number(1, 1e38),
            backoff_factor=_number(1e-45, 1),
            growth_interval=_whole(1),
            _growth_tracker=_whole(0),
        ),
        amp_dtype=TEXT,
        skipped=_whole(0),
        skipped_in_a_row=_whole(0),
    ),
    ema=dict(updates=_whole(0)),
    progress=dict(
        epoch=_whole(0),
        images=_whole(1),
        updates=_whole(1),
        images_per_update=_whole(1),
        loss=SUMS,
        norm=SUMS,
    ),
)
OPTIMIZER = dict(state=DICT, param_groups=_list_of(DICT, "a list of dicts"))
ADAMW = dict(step=STEP, exp_avg=MOMENT, exp_avg_sq=MOMENT)
SGD = dict(momentum_buffer=MOMENT)
# What other optimizers keep of a parameter, under whatever name.
PLAIN = (bool, int, float, type(None))
KEPT = (lambda value: type(value) in PLAIN or MOMENT[0](value)), "a number or a dense tensor of floats"


def better_of(checkpoint):
    """Whether a checkpoint's ``model`` or its average (ema) is better; the average where it does not say."""
    better = "ema" if checkpoint.get("model_ema") is not None else "model"
    return "model" if checkpoint.get("better") == "model" else better


def weights_and_classes(checkpoint, path, which="auto"):
    """``model``, the weights or their average; ``classes``; ``config``, YAML text.

    ``which`` of them is a value of ``TEST.WEIGHTS`` in config.py. ``classes`` are None where they are not
    named, and ``config`` where there is none. Of a file of the official release ``config`` is a dict: what it
    says about the model and its images, by dotted key.
    """
    entry = _entry_of(checkpoint, which)
    if checkpoint.get("model_ema") is not None:
        words = dict(ema="its averaged weights (EMA)", model="its weights, not their average (EMA)")
        why = ", the better of the two" if which == "auto" and checkpoint.get("better") else ""
        logger.info(f"{path}: taking {words[better_of(checkpoint) if which == 'auto' else which]}{why}")
    elif entry not in ("", "model"):
        logger.info(f"{path}: taking its weights from {entry}")
    source = checkpoint[entry] if entry else checkpoint
    if isinstance(source, dict) and "n_averaged" in source:
        logger.info(f"{path}: its weights are an average of torch's AveragedModel")
    config = _config_of(checkpoint)
    return dict(
        model=weights_of(checkpoint, path, which), classes=classes_of(checkpoint, path), config=config
    )


def run_of(checkpoint, path):
    """What a run continues from in what :func:`read_checkpoint` returned, and no other entries.

    Raises:
        CheckpointError: an entry is missing or is none that a run writes.
    """
    if not isinstance(checkpoint.get("model"), dict) or "epoch" not in checkpoint:
        raise CheckpointError(f"{path} is not the checkpoint of a run: --pretrained takes the weights alone")
    # At the end of an epoch, progress is None; within it, score is, and in the first epoch better.
    absent = [name for name in ("progress", "score", "better") if checkpoint.get(name) is None]
    found = [name for name in RUN if name in checkpoint and name not in absent]
    run = {name: _checked(checkpoint[name], RUN[name], name, path) for name in found}
    # Within the first epoch, the last finished one is -1.
    _checked(run["epoch"], _whole(-1 if "progress" in run else 0), "epoch", path)
    if "progress" in run:
        now = run["epoch"] + 1
        _checked(run["progress"]["epoch"], _whole(now, now), "progress.epoch", path)
        parts = checkpoint["progress"].get("parts", {})
        run["progress"]["parts"] = _checked(parts, PARTS, "progress.parts", path)
    if "optimizer" in checkpoint:
        run["optimizer"] = optimizer_of(checkpoint, path)
    if "ema" in run:
        averaged = _checked(checkpoint.get("model_ema"), DICT, "model_ema", path)
        run["model_ema"] = weights_of(dict(model_ema=averaged), path)
    weights = weights_of(dict(model=checkpoint["model"]), path)
    return dict(run, model=weights, classes=classes_of(checkpoint, path), config=_config_of(checkpoint))


def own_config(checkpoint, path):
    """What to use a checkpoint with, in words: its own config; empty where it does not name its model."""
    config = checkpoint.get("config")
    found = re.search(r"^  NAME: (.+)$", config, re.MULTILINE) if isinstance(config, str) else None
    name = found[1] if found else config.get("MODEL.NAME") if isinstance(config, dict) else None
    if not isinstance(name, str):
        return ""
    beside = os.path.join(os.path.dirname(path), "config.yaml")
    where = f"--cfg {beside}" if os.path.isfile(beside) else "its own config"
    return f"it is a {name:.60}: use {where}"


def weights_of(checkpoint, path, which="auto"):
    """The weights in what :func:`read_checkpoint` returned, by name.

    Args:
        which: a value of ``TEST.WEIGHTS`` in config.py.

    Raises:
        CheckpointError: there are none, or none that a model could have.
    """
    entry = _entry_of(checkpoint, which)
    if which == "ema" and not entry:
        raise CheckpointError(f"{path} has no averaged weights (EMA): take auto or model of TEST.WEIGHTS")
    weights = checkpoint[entry] if entry else checkpoint
    names = weights if isinstance(weights, dict) else ()
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.]{1,200}", name) for name in names):
        raise CheckpointError(f"{path} holds no model weights{f' in {entry}' if entry else ''}")
    # Of torch's AveragedModel, which counts its updates beside the weights.
    weights = {name: value for name, value in weights.items() if name != "n_averaged"}
    bare = clean_state_dict(weights)  # without the prefixes of DistributedDataParallel and torch.compile
    if len(bare) < len(weights):
        raise CheckpointError(f"{path} holds weights twice, with and without the prefix of a wrapper")
    return _plain(bare, entry or "model", path)


def optimizer_of(checkpoint, path):
    """The state of the optimizer by parameter, and the groups without their settings.

    With an ``optimizer_name``, the state may have any names, and a group may count its updates.
    """
    saved = _checked(checkpoint["optimizer"], OPTIMIZER, "optimizer", path)
    groups, kinds, other = [], [], "optimizer_name" in checkpoint
    for i, group in enumerate(saved["param_groups"]):
        group_kind = dict(params=_numbers_from(len(kinds)))
        params = _checked(group, group_kind, f"optimizer.param_groups.{i}", path)["params"]
        kept = {name: None for name in ("betas", "momentum") if name in group}
        if other and "step" in group:
            kept["step"] = _checked(group["step"], STEP, f"optimizer.param_groups.{i}.step", path)
        groups.append(kept | dict(params=params))
        kinds += [ADAMW if "betas" in group else SGD] * len(params)
    state = {}
    for index, moments in saved["state"].items():
        _checked(index, _whole(0, len(kinds) - 1), "a parameter's number in optimizer.state", path)
        _checked(moments, DICT, f"optimizer.state.{index}", path)
        if other:
            names = {name: STEP if name == "step" else KEPT for name in moments}
            state[index] = _checked(moments, names, f"optimizer.state.{index}", path)
        # SGD without momentum has none to save.
        elif kinds[index] is ADAMW or moments.get("momentum_buffer") is not None:
            state[index] = _checked(moments, kinds[index], f"optimizer.state.{index}", path)
    tensors = {f"{i}.{name}": x for i, moments in state.items() for name, x in moments.items()}
    plain = _plain({name: x for name, x in tensors.items() if torch.is_tensor(x)}, "optimizer.state", path)
    for name, squares in plain.items():
        if name.endswith("exp_avg_sq"):
            _checked(squares, SQUARES, f"optimizer.state.{name}", path)
    state = {i: {name: plain.get(f"{i}.{name}", x) for name, x in state[i].items()} for i in state}
    return dict(param_groups=groups, state=state)


def classes_of(checkpoint, path):
    classes = checkpoint.get("classes")
    return None if classes is None else _checked(classes, CLASSES, "classes", path)


def _config_of(checkpoint):
    """The config as :func:`weights_and_classes` describes it."""
    config = checkpoint.get("config")
    if isinstance(config, str):
        return config
    config = config if isinstance(config, dict) else {}
    model, found = config.get("MODEL"), {}
    sections = {"DATA": config.get("DATA"), "TEST": config.get("TEST"), "MODEL": model}
    sections["MODEL.MSG"] = model.get("MSG") if isinstance(model, dict) else None
    for section, options in sections.items():
        for name, value in itertools.islice(options.items(), 100) if isinstance(options, dict) else ():
            entries = value if type(value) in (list, tuple) else [value]
            if len(entries) <= 100 and all(type(x) in (bool, int, float, str, type(None)) for x in entries):
                found[f"{section}.{name}"] = list(value) if entries is value else value
    return found or None


def _entry_of(checkpoint, which="auto"):
    """Which entry of a checkpoint holds its weights; empty for a bare state dict."""
    places = WEIGHTS["ema"] + WEIGHTS["model"] if which == "auto" else WEIGHTS[which]
    if which == "auto" and checkpoint.get("better") == "model":
        places = WEIGHTS["model"] + WEIGHTS["ema"]
    return next((name for name in places if checkpoint.get(name) is not None), "")


def _checked(value, kind, name, path):
    """An entry of a checkpoint, without what its kind does not name; one of another kind is refused."""
    if isinstance(kind, dict):
        _checked(value, DICT, name, path)
        return {key: _checked(value.get(key), kind[key], f"{name}.{key}", path) for key in kind}
    fits, words = kind
    if not fits(value):
        plain = value is None or isinstance(value, (bool, int, float, str))
        found = short(value) if plain else f"a {type(value).__name__}"
        if torch.is_tensor(value):
            found = f"a {value.dtype} tensor ({value.layout}, {value.device})"
        raise CheckpointError(
            f"{path} is damaged or was not written by a run: {name} is {found}, not {words} (--pretrained "
            "takes the weights alone)"
        )
    return value


def _plain(tensors, name, path):
    """Dense tensors by name as plain ones, without attributes and none a view of a larger one.

    So they can be sent to other processes and copied at the cost of their own size.

    Raises:
        CheckpointError: they claim more memory than they have, or are not finite.
    """
    tensors = _checked(tensors, dict.fromkeys(tensors, DENSE), name, path)
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors.values()}
    if sum(x.nbytes for x in tensors.values()) > 2 * sum(memory.values()):  # some may be the same
        raise CheckpointError(
            f"{path} is damaged: the tensors of {name} claim more memory than the file holds"
        )
    bad = [key for key, x in tensors.items() if not x.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(tensors)} tensors of {name} are not finite ({bad[0]} ...): use a "
            "checkpoint from before the training diverged"
        )
    whole = {key: x.nbytes == x.untyped_storage().nbytes() for key, x in tensors.items()}
    return {key: x.detach() if whole[key] else x.detach().clone() for key, x in tensors.items()}


def short(value):
    return repr(value)[:40]
