"""The one place that writes and reads checkpoint files.

A checkpoint is a dict of plain types and tensors: ``model``, ``optimizer``, ``lr_scheduler``, ``updater``,
``progress``, ``epoch`` (the last finished one), ``max_accuracy`` and ``config`` (YAML text). Files of the
official release, with a pickled yacs config and apex's ``amp`` entry, are read too. Nothing in a file is ever
run.
"""

import contextlib
import hashlib
import os
import pickle
import re
import urllib.parse
from collections import OrderedDict

import torch

from utils import UserError, replacing

BEST = "best.pth"


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
        _sync_folder(path)
    except (OSError, RuntimeError) as error:
        # torch.save wraps some failed writes.
        cause = error if isinstance(error, OSError) else error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).split("\n")[0]) from error


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


def remove_unfinished(folder):
    """Delete the checkpoints that killed runs left half-written in a folder that is this run's alone."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(r".+\.pth(\.[0-9a-f]{8})?\.tmp", name):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def _prune(folder, keep, newest):
    # Files of a later place were damaged when the run resumed: they must not push out good ones.
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
    _sync_folder(second)
    return True


def _sync_folder(path):
    folder = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def fetch_checkpoint(url):
    """Download a checkpoint once; check it by the SHA-256 prefix in its name, as in ``name-1a2b3c4d.pth``.

    Returns:
        Path of the file in torch.hub's checkpoint folder.

    Raises:
        CheckpointError: not https, not to be had, or with another hash than its name says.
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
    """Read a checkpoint of this project or of the official release onto the CPU.

    Args:
        path: a file, or an https address.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or holding objects that could run code.
    """
    if "://" in path:
        path = fetch_checkpoint(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"no checkpoint file {path}")
    try:
        # An ordered dict stands in for the pickled yacs config of official files.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
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
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


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
        Its path and content, or (None, None).
    """
    for name in reversed(in_order(folder)):
        path = os.path.join(folder, name)
        try:
            checkpoint = read_checkpoint(path)
            if not isinstance(checkpoint.get("model"), dict) or not isinstance(checkpoint.get("epoch"), int):
                raise CheckpointError(f"{path} is not the checkpoint of a run")
            return path, checkpoint
        except CheckpointError as error:
            warn(f"not resuming from a damaged checkpoint: {error}")
    return None, None


def score_of_best(folder):
    """The score that a run's ``best.pth`` was kept for, in percent; -1 where there is no intact one."""
    try:
        score = read_checkpoint(os.path.join(folder, BEST)).get("max_accuracy")
    except CheckpointError:
        return -1.0
    return float(score) if isinstance(score, (int, float)) else -1.0


def load_weights(model, checkpoint, path, new_head=False):
    """Load a checkpoint's weights into ``model``; every name and shape must agree.

    Args:
        checkpoint: what :func:`read_checkpoint` returned; a bare state dict will do.
        path: its file, for messages.
        new_head: leave the model's own head where the number of classes differs (fine-tuning).

    Raises:
        CheckpointError: weights of another architecture or class count, with what differs.
    """
    weights = checkpoint.get("model", checkpoint)
    own = model.state_dict()
    if not isinstance(weights, dict) or not weights or not all(map(_is_weight, *zip(*weights.items()))):
        raise CheckpointError(f"{path} holds no model weights")
    if new_head and "head.weight" in weights and weights["head.weight"].shape != own["head.weight"].shape:
        weights = dict(weights, **{name: own[name] for name in ("head.weight", "head.bias")})
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in own]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        what = _diagnosis(weights, own)
        raise CheckpointError(f"{path} does not fit the model: {what}: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(weights)


def _is_weight(name, value):
    dense = torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and dense


def _diagnosis(weights, own):
    """Name the difference between a checkpoint's weights and the model's in the words of the config."""

    def shape(tensors, name):
        return tuple(tensors[name].shape) if name in tensors else ()

    def variant(tensors):
        return "CVPR 2022" if len(shape(tensors, "layers.0.downsample.reduction.weight")) == 4 else "v1"

    def blocks(tensors):
        return len({name.rsplit(".norm1", 1)[0] for name in tensors if ".norm1." in name})

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
    if shape(weights, "head.weight") != shape(own, "head.weight"):
        return (
            f"it has {shape(weights, 'head.weight')[0]} classes, the model {shape(own, 'head.weight')[0]} "
            "(to fine-tune on other classes use --pretrained)"
        )
    return "another architecture"


def load_optimizer(optimizer, model, checkpoint, path):
    """Load the optimizer's state, that of official checkpoints included.

    The official code weight-decays the messenger tokens by mistake, so that its first parameter group has one
    tensor more than ours; the state is put where it belongs.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    if "optimizer" not in checkpoint:
        raise CheckpointError(f"{path} holds weights only: start a new run from it with --pretrained")
    state = checkpoint["optimizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    for setting in ("betas", "momentum"):
        if all(setting in group for group in state["param_groups"]) != (setting in optimizer.defaults):
            raise CheckpointError(
                f"{path} was trained with another TRAIN.OPTIMIZER.NAME: set that again, or start from the "
                "weights alone with --pretrained"
            )
    if theirs == [ours[0] + 1, ours[1] - 1] and model.msg_tokens is not None:
        decayed = {id(parameter) for parameter in parameters[: ours[0]]} | {id(model.msg_tokens)}
        # A stable sort: the official order is decayed parameters first, each group in the model's order.
        official = sorted(map(id, model.parameters()), key=lambda parameter: parameter not in decayed)
        moments = {index: state["state"].get(official.index(id(p))) for index, p in enumerate(parameters)}
        moments = {index: value for index, value in moments.items() if value is not None}
    elif theirs == ours:
        moments = state["state"]
    else:
        raise CheckpointError(
            f"{path}: the optimizer state has groups of {theirs} parameters, this model {ours}; to start "
            "from the weights alone use --pretrained"
        )
    for index, parameter in enumerate(parameters):
        for name, value in moments.get(index, {}).items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: the optimizer's {name} of parameter {index} is {tuple(value.shape)}, the "
                    f"parameter {tuple(parameter.shape)}"
                )
    # Rates and decay come from this run's config, moments and step counts from the file.
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=moments))
