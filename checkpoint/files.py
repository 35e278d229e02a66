"""The one place that writes and reads checkpoint files.

A checkpoint is a dict of plain types and tensors: ``model``, ``optimizer``, ``lr_scheduler``, ``updater``,
``progress``, ``epoch`` (the last finished one), ``updates`` (since the start of the run), ``score`` (of these
weights, at the end of an epoch), ``max_accuracy`` (of the best so far), ``config`` (YAML text) and
``classes`` (names, in the order of the head). With ``TRAIN.EMA`` it also has ``model_ema``, the averaged
weights, ``ema``, and ``better``, which of the two scored higher when they were last evaluated, model or ema;
the scores are then of the better one. With optimizers other than AdamW and SGD it has ``optimizer_name``.
Files of the official release, with a pickled yacs config and apex's ``amp`` entry, are read too; so are the
weights in bare state dicts, in training checkpoints of timm, Lightning and others, and in safetensors files,
which hold ``config`` and ``classes`` too if they are of ``tools/export.py``. Nothing in a file is ever run,
and what is used of one is checked first.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import pickle
import re
import urllib.parse
from collections import Counter, OrderedDict

import torch
from safetensors import safe_open
from safetensors.torch import save
from timm.models import clean_state_dict

from utils import UserError, advice_on_look_alikes, memory_limit, replacing, sync_folder

from .resize import fit_weights

BEST = "best.pth"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
# What has rows for every class, in a classifier and in a detector.
HEAD = re.compile(r"head\.|.*\.(box_predictor|mask_fcn_logits)\.")
# Where a file may hold its weights, averaged and not. As in timm, the averaged ones come first, unless the
# file says that the others are better.
WEIGHTS = dict(ema=("state_dict_ema", "model_ema"), model=("state_dict", "model", "model_state_dict"))
NEW_RUN = "--pretrained and another --tag"  # a folder that holds a run goes on with that

logger = logging.getLogger("msg_transformer")


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message says which file and what to do."""


def save_checkpoint(path, checkpoint):
    """Write a checkpoint so that ``path`` holds, at any moment, the old file or the whole new one.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path)
    except (OSError, RuntimeError) as error:
        # torch.save wraps some failed writes.
        cause = error if isinstance(error, OSError) else error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).split("\n")[0]) from error


def save_weights(path, weights, metadata):
    """Write a safetensors file of weights alone.

    Args:
        weights: tensors by name.
        metadata: text by name; :func:`read_checkpoint` gives back ``config``, and ``classes`` of a JSON list.
    """
    content = save({name: x.contiguous() for name, x in weights.items()}, metadata)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path)


def _read_safetensors(path):
    """The tensors of a file, or a checkpoint of them where its metadata names a config or classes."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    known = {name: metadata[name] for name in ("config", "classes") if name in metadata}
    if "classes" in known:
        known["classes"] = json.loads(known["classes"])
    return dict(model=tensors, **known) if known else tensors


def save_in_folder(folder, checkpoint, name, keep):
    """Write a checkpoint into a run's folder, then delete those it makes superfluous.

    Args:
        name: file name from :func:`epoch_name` or :func:`within_epoch_name`.
        keep: epoch checkpoints to keep, 0 for all. Of those within an epoch only the newest file of all
            stays.

    Returns:
        Its path.

    Raises:
        OSError: the file cannot be written; those that were there are untouched.
    """
    path = os.path.join(folder, name)
    save_checkpoint(path, checkpoint)
    _prune(folder, keep, name)
    return path


def save_best(folder, checkpoint, saved=None):
    """Keep a checkpoint as the best of a run's folder.

    Args:
        saved: file that already holds it, to link to where the file system can.

    Returns:
        The path of the best.

    Raises:
        OSError: the file cannot be written; the best before is untouched.
    """
    path = os.path.join(folder, BEST)
    if saved is None or not _link(saved, path):
        save_checkpoint(path, checkpoint)
    return path


def score_of_best(folder):
    """The score that a run's ``best.pth`` was kept for, in percent, and of which weights: model or ema.

    Returns:
        (-1, None) where there is no intact one.
    """
    try:
        best = read_run(os.path.join(folder, BEST))
        return best["max_accuracy"], better_of(best)
    except (CheckpointError, KeyError):
        return -1.0, None


def remove_unfinished(folder):
    """Delete the checkpoints that killed runs left half-written in a folder that is this run's alone."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(r".+\.pth(\.[0-9a-f]{8})?\.tmp", name):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def _prune(folder, keep, newest):
    # Files from later in the run were damaged when it resumed: they must not push out good ones.
    newest_first = [name for name in in_order(folder) if place_of(name) <= place_of(newest)][::-1]
    epochs = [name for name in newest_first if place_of(name)[1] == 0]
    within = [name for name in newest_first[1:] if place_of(name)[1] > 0]
    for name in within + (epochs[keep:] if keep else []):
        os.remove(os.path.join(folder, name))


def _link(path, second):
    """Give a file a second name, atomically; False where that cannot be done."""
    try:
        with replacing(second) as temporary:
            os.link(path, temporary)
    except OSError:
        return False
    sync_folder(second)
    return True


def fetch_checkpoint(url):
    """Download a checkpoint once; check it by the SHA-256 prefix in its name, as in ``name-1a2b3c4d.pth``.

    Returns:
        Path of the file in torch.hub's checkpoint folder.

    Raises:
        CheckpointError: not https, cannot be fetched, or has another hash than its name says.
    """
    name = os.path.basename(urllib.parse.urlparse(url).path)
    digest = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not url.startswith("https://"):
        raise CheckpointError(f"{url}: only https addresses are loaded")
    try:
        if not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, digest[1] if digest else None)
        elif digest:
            with open(path, "rb") as file:
                found = hashlib.sha256(file.read()).hexdigest()
            if not found.startswith(digest[1]):
                raise CheckpointError(f"{path} has another hash than its name says: delete it")
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot fetch {url}: {error}") from error
    return path


def read_checkpoint(path):
    """Read a checkpoint of this project, of the official release or of timm onto the CPU.

    On Linux, reading may take twice the file's size and a GiB of memory. torch.save does not compress, so a
    file needs about its own size, however large the model; one made to unfold to more is refused. That is why
    the limit needs no option.

    Args:
        path: a file, or an https address; of safetensors if it ends in ``.safetensors``.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, unfolding to far more than its size, or
            holding objects that could run code.
    """
    if "://" in path:
        path = fetch_checkpoint(path)
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path} is not a regular file" if os.path.exists(path) else f"no checkpoint file {path}"
        )
    size = os.path.getsize(path)
    # An ordered dict stands in for the pickled yacs config of official files and the arguments in timm's.
    configs = "yacs.config.CfgNode", "argparse.Namespace"
    stand_ins = torch.serialization.safe_globals([(OrderedDict, name) for name in configs])
    try:
        with stand_ins, memory_limit(2 * size + 2**30):
            if path.endswith(".safetensors"):
                return _read_safetensors(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|global)\w* ([\w.]+)", str(error))
        what = f" ({next(filter(None, found.groups()))})" if found else ""
        raise CheckpointError(
            f"{path} is damaged, or holds objects other than tensors and plain values{what}; those are never "
            "loaded, because they can run code"
        ) from error
    # torch.load raises nearly anything on a damaged file.
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        if isinstance(error, MemoryError) or "can't allocate memory" in reason:
            reason = f"its {size:,} bytes ask for more memory than {2 * size + 2**30:,}"
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def read_weights(path, which="auto"):
    """Read what evaluation, fine-tuning and use need, see :func:`weights_and_classes`.

    Raises:
        CheckpointError: as for :func:`read_checkpoint`, or weights that no model could have.
    """
    return weights_and_classes(read_checkpoint(path), path, which)


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
    config = _config_of(checkpoint)
    return dict(
        model=weights_of(checkpoint, path, which), classes=_classes_of(checkpoint, path), config=config
    )


def read_run(path):
    """Read what a run continues from, and no other entries.

    Raises:
        CheckpointError: as for :func:`read_checkpoint`, or an entry is missing or is none that a run writes.
    """
    checkpoint = read_checkpoint(path)
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
        run["optimizer"] = _optimizer_of(checkpoint, path)
    if "ema" in run:
        averaged = _checked(checkpoint.get("model_ema"), DICT, "model_ema", path)
        run["model_ema"] = weights_of(dict(model_ema=averaged), path)
    weights = weights_of(dict(model=checkpoint["model"]), path)
    return dict(run, model=weights, classes=_classes_of(checkpoint, path), config=_config_of(checkpoint))


def _whole(least, most=2**31 - 1):
    return (
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number from {least} to {most}",
    )


def _number(least, most):
    return (
        lambda value: type(value) in (int, float) and least <= value <= most,
        f"a number from {least:g} to {most:g}",
    )


def _list_of(kind, words):
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(kind[0], value)), words


def _numbers_from(first):
    return (
        lambda value: isinstance(value, list) and value == list(range(first, first + len(value))),
        f"a list of numbers in order from {first}",
    )


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
KEPT = (
    (lambda value: value is None or type(value) in (bool, int, float) or MOMENT[0](value)),
    "a number or a dense tensor of floats",
)


def _checked(value, kind, name, path):
    """An entry of a checkpoint, without what its kind does not name.

    Raises:
        CheckpointError: it is of another kind.
    """
    if isinstance(kind, dict):
        _checked(value, DICT, name, path)
        return {key: _checked(value.get(key), kind[key], f"{name}.{key}", path) for key in kind}
    fits, words = kind
    if not fits(value):
        found = f"a {type(value).__name__}"
        if value is None or isinstance(value, (bool, int, float, str)):
            found = _short(value)
        elif torch.is_tensor(value):
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


def _classes_of(checkpoint, path):
    classes = checkpoint.get("classes")
    return None if classes is None else _checked(classes, CLASSES, "classes", path)


def _entry_of(checkpoint, which="auto"):
    """Which entry of a checkpoint holds its weights; empty for a bare state dict."""
    places = WEIGHTS["ema"] + WEIGHTS["model"] if which == "auto" else WEIGHTS[which]
    if which == "auto" and checkpoint.get("better") == "model":
        places = WEIGHTS["model"] + WEIGHTS["ema"]
    return next((name for name in places if checkpoint.get(name) is not None), "")


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


def _optimizer_of(checkpoint, path):
    """The state of the optimizer by parameter, and the groups without their settings.

    Where ``optimizer_name`` says that it is neither AdamW nor SGD, the state may have any names, and a group
    may count its updates.
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


def epoch_name(epoch):
    """File name of the checkpoint at the end of ``epoch``, the official one."""
    return f"ckpt_epoch_{epoch}.pth"


def within_epoch_name(epoch, images):
    """File name of a checkpoint within ``epoch``, after ``images`` of its images."""
    return f"ckpt_epoch_{epoch}_images_{images}.pth"


def place_of(path):
    """Where in the run a checkpoint was written: (epochs finished, images of the next); None for others."""
    match = re.fullmatch(r"ckpt_epoch_(\d+)(?:_images_(\d+))?\.pth", os.path.basename(path))
    if not match:
        return None
    return (int(match[1]), int(match[2])) if match[2] else (int(match[1]) + 1, 0)


def in_order(folder):
    """Names of the run's checkpoints in ``folder``, oldest place first, without the best."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(filter(place_of, names), key=place_of)


def read_latest(folder, warn):
    """Read the intact checkpoint of ``folder`` that is furthest in the run.

    Args:
        warn: called with a message for every damaged file that is passed over.

    Returns:
        Its path and what :func:`read_run` makes of it, or (None, None).
    """
    for name in reversed(in_order(folder)):
        path = os.path.join(folder, name)
        try:
            return path, read_run(path)
        except CheckpointError as error:
            warn(f"not resuming from a damaged checkpoint: {error}")
    return None, None


def without_prefix(weights, own, path):
    """Weights under the names of a model, where all of these have a prefix, such as Lightning's ``model.``.

    Args:
        weights: tensors by name.
        own: the names in the model.
        path: their file, for messages.

    Returns:
        The tensors that have the prefix, by their names without it; those given, where some have names of the
        model, or where fewer than half of the model's names are there with a prefix.

    Raises:
        CheckpointError: two prefixes are as good.
    """
    if any(name in own for name in weights):
        return weights
    ends = ((name, dot.end()) for name in weights for dot in re.finditer(r"\.", name))
    prefixes = Counter(name[:end] for name, end in ends if name[end:] in own).most_common(2)
    if not prefixes or 2 * prefixes[0][1] < len(own):
        return weights
    prefix, count = prefixes[0]
    if [count] == [others for _, others in prefixes[1:]]:
        raise CheckpointError(f"{path} holds two models, {prefix} and {prefixes[1][0]}: save one of them")
    taken = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    # mmdet's backbones have a norm for the map of each stage.
    taken = {name: x for name, x in taken.items() if name in own or not re.match(r"norm\d\.", name)}
    logger.info(f"{path}: taking {len(taken)} of its {len(weights)} tensors, those of {prefix}")
    return taken


def load_weights(model, checkpoint, path, new_head=False):
    """Load a checkpoint's weights into ``model``; every name and shape must agree, and the classes if known.

    A prefix of all names is left out, see :func:`without_prefix`.

    Args:
        model: ``model.classes``, where there is one, names its classes in the order of the head.
        checkpoint: what :func:`read_checkpoint` returned; a bare state dict will do.
        path: its file, for messages.
        new_head: for a new run (fine-tuning): leave the model's own head where the classes differ, its own
            head and last norm where it is the backbone of a larger model, and fit weights for other
            sizes as :func:`checkpoint.resize.fit_weights` does; the log says so.

    Raises:
        CheckpointError: weights of another architecture or of other classes, with what differs.
    """
    given, own = weights_of(checkpoint, path), model.state_dict()
    weights = without_prefix(given, own, path)
    # A backbone of mmdet has neither.
    may_lack = ("norm.", "head.") if new_head and weights is not given else ()
    theirs, ours = _classes_of(checkpoint, path), getattr(model, "classes", None)
    difference = class_difference(theirs, ours) if theirs and ours else ""
    unnamed = ours and not theirs
    told = f"{path} does not name its classes: they cannot be compared with the data's" if unnamed else ""
    if difference and not new_head:
        raise CheckpointError(
            f"{path} was trained on other classes: {difference}; to fine-tune it on these use {NEW_RUN}"
        )
    head = {name: value for name, value in own.items() if HEAD.match(name) and name in weights}
    if new_head and head:
        if not difference and any(weights[name].shape[:1] != value.shape[:1] for name, value in head.items()):
            difference = f"{path} has another number of classes"
        told = f"the head is kept: {told or 'the classes are the same'}"
        if difference:
            told, weights = f"the head is new: {difference}", dict(weights, **head)
    weights, changes = fit_weights(weights, model) if new_head else (weights, [])
    for part in may_lack:
        new = {name: value for name, value in own.items() if name.startswith(part)}
        if new and not any(name.startswith(part) for name in weights):
            weights, told = weights | new, ""
            changes.append(f"the {part[:-1]} is new: {path} has none")
    wrong = [words for name in own if name in weights for words in _misfit(name, weights[name], own[name])]
    wrong += [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in own]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        what, advice = _diagnosis(weights, own), own_config(checkpoint, path)
        advice = advice and f". {advice[0].upper()}{advice[1:]}"
        raise CheckpointError(f"{path} does not fit the model: {what}: {'; '.join(wrong[:4])}{more}{advice}")
    model.load_state_dict(weights)
    for change in [told, *changes] if told else changes:
        logger.info(change)


def class_difference(saved, own):
    """How the class names of a checkpoint differ from the model's, in words; empty where they do not."""
    if saved == own:
        return ""
    if sorted(saved) == sorted(own):
        i = next(i for i, (there, here) in enumerate(zip(saved, own)) if there != here)
        return f"the same names in another order, class {i} was {_short(saved[i])} and is {_short(own[i])}"
    lost, new = sorted(set(saved) - set(own)), sorted(set(own) - set(saved))
    parts = [f"it has {len(saved)} classes, the data {len(own)}"] if len(saved) != len(own) else []
    for where, names in (("the checkpoint", lost), ("the data", new)):
        if names:
            some = ", ".join(map(_short, names[:3]))
            parts.append(f"only {where} has {some}{' ...' if len(names) > 3 else ''}")
    return "; ".join(parts) + advice_on_look_alikes([*lost, *new])


def _short(value):
    return repr(value)[:40]


def _misfit(name, theirs, own):
    if theirs.shape != own.shape:
        return [f"{name} is {tuple(theirs.shape)}, the model's {tuple(own.shape)}"]
    if theirs.is_floating_point() != own.is_floating_point():
        return [f"{name} is {theirs.dtype}, the model's {own.dtype}"]
    if name.endswith("relative_position_index") and not theirs.equal(own.cpu()):
        return [f"{name} is another table than the model's"]
    return []


def _diagnosis(weights, own):
    """Name the difference between a checkpoint's weights and the model's in the words of the config."""

    def shape(tensors, name):
        return tuple(tensors[name].shape) if name in tensors else ()

    def variant(tensors):
        return "CVPR 2022" if len(shape(tensors, "layers.0.downsample.reduction.weight")) == 4 else "v1"

    def blocks(tensors):
        return len({name.rsplit(".norm1", 1)[0] for name in tensors if ".norm1." in name})

    if "msg_tokens" in weights and "msg_tokens" not in own:
        return "it has messengers and the model none (MODEL.TYPE, MODEL.MSG.TOKENS)"
    if not any(name.startswith("layers.") for name in weights):
        return "it is not an MSG-Transformer"
    if "layers.0.downsample.norm.weight" in own and variant(weights) != variant(own):
        return (
            f"it is the {variant(weights)} architecture and the config asks for {variant(own)} "
            "(MODEL.MSG.PATCH_EMBED and DOWNSAMPLE: linear for v1, conv for CVPR 2022)"
        )
    if ("msg_tokens" in weights) != ("msg_tokens" in own):
        return f"it was trained with MODEL.MSG.TOKENS {'msg_tokens' in weights}"
    if shape(weights, "patch_embed.proj.weight") != shape(own, "patch_embed.proj.weight"):
        return "another MODEL.MSG.EMBED_DIM, PATCH_SIZE or IN_CHANS"
    if blocks(weights) != blocks(own):
        return f"other MODEL.MSG.DEPTHS ({blocks(weights)} blocks, the model has {blocks(own)})"
    both = "head.weight" in weights and "head.weight" in own
    if both and shape(weights, "head.weight") != shape(own, "head.weight"):
        return (
            f"it has {shape(weights, 'head.weight')[0]} classes, the model {shape(own, 'head.weight')[0]} "
            f"(to fine-tune on other classes use {NEW_RUN})"
        )
    return "another architecture"


def _earlier_groups(optimizer, model):
    """The groups that earlier releases, or the official one, made of the optimizer's parameters.

    The official code decays the messenger tokens by mistake. Earlier releases of this code did not read the
    patterns in ``no_weight_decay`` of timm's models, and gave mergings a rate of their own.

    Returns:
        Lists of parameters, and what is different now, in words; empty for the official code.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    place, groups = list(names), [group["params"] for group in optimizer.param_groups]
    if "lr_scale" in optimizer.param_groups[0]:
        parts = [
            [p for p in group if (".downsample." in names[id(p)]) == merging]
            for group in groups
            for merging in (False, True)
        ]
        change = (
            "which counted mergings as layers: the rates of TRAIN.LAYER_DECAY are from here on as in Swin"
        )
        return sorted(filter(None, parts), key=lambda part: place.index(id(part[0]))), change
    named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    spared = {names[id(p)] for p in groups[-1] if p.ndim > 1 and not names[id(p)].endswith(".bias")}
    late = spared - set(named) or spared & {"msg_tokens"}
    change = f"which decayed {', '.join(sorted(late))}: weight decay spares these from here on"
    decayed = {id(p) for p in groups[0]}
    earlier = [
        [p for p in model.parameters() if id(p) in decayed or names[id(p)] in late],
        [p for p in groups[-1] if names[id(p)] not in late],
    ]
    return earlier, change if late - set(named) else ""


def load_optimizer(optimizer, model, checkpoint, path):
    """Load the optimizer's state, that of official checkpoints included.

    Where the parameter groups were others, see :func:`_earlier_groups`, the state is put where it belongs.

    Raises:
        CheckpointError: the state belongs to other parameters, or is broken.
    """
    if "optimizer" not in checkpoint:
        raise CheckpointError(f"{path} holds weights only: start a new run from it with --pretrained")
    state = _optimizer_of(checkpoint, path)
    theirs, own = checkpoint.get("optimizer_name"), getattr(optimizer, "name", None)
    if theirs != own:
        raise CheckpointError(
            f"{path} was trained with another TRAIN.OPTIMIZER.NAME: {theirs or 'adamw or sgd'} there, "
            f"{own or type(optimizer).__name__} here; set that again, or start from the weights alone with "
            f"{NEW_RUN}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    earlier, change = _earlier_groups(optimizer, model)
    for setting in ("betas", "momentum"):
        had = all(setting in group for group in state["param_groups"])
        if own is None and had != (setting in optimizer.defaults):
            raise CheckpointError(
                f"{path} was trained with another TRAIN.OPTIMIZER.NAME: set that again, or start from the "
                f"weights alone with {NEW_RUN}"
            )
    if theirs == ours:
        moments = state["state"]
    elif theirs == list(map(len, earlier)):
        there = [id(parameter) for group in earlier for parameter in group]
        moments = {index: state["state"].get(there.index(id(p))) for index, p in enumerate(parameters)}
        moments = {index: value for index, value in moments.items() if value is not None}
        if change:
            logger.warning(f"{path} is of an earlier release, {change}; the optimizer's state is kept")
    else:
        raise CheckpointError(
            f"{path}: the optimizer state has groups of {theirs} parameters, this run {ours}: another "
            "model, or TRAIN.LAYER_DECAY on in one of them alone; to start from the weights alone use "
            f"{NEW_RUN}"
        )
    for index, parameter in enumerate(parameters):
        for name, value in moments.get(index, {}).items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: the optimizer's {name} of parameter {index} is {tuple(value.shape)}, the "
                    f"parameter {tuple(parameter.shape)}"
                )
    # Rates and decay come from this run's config, moments and step counts from the file.
    fresh = optimizer.state_dict()
    for group, saved in zip(fresh["param_groups"], state["param_groups"]):
        group.update({name: saved[name] for name in ("step",) if name in saved})
    optimizer.load_state_dict(dict(fresh, state=moments))
