"""Writes and reads checkpoint files, names them, and says which of a folder a run continues from.

What may stand in them is described in ``checkpoint/contents.py``.
"""

import contextlib
import json
import os
import pickle
import re
import urllib.parse
from collections import OrderedDict

import torch
from safetensors import safe_open
from safetensors.torch import save

from utils import replacing, sync_folder

from .contents import CheckpointError, better_of, run_of, weights_and_classes

BEST = "best.pth"


@contextlib.contextmanager
def _writing(path):
    """Context that yields an open file, which then becomes ``path`` for good; failures are OSErrors."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path)
    except (OSError, RuntimeError) as error:
        # torch.save wraps some failed writes.
        cause = error if isinstance(error, OSError) else error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).split("\n")[0]) from error


def save_checkpoint(path, checkpoint):
    """Write a checkpoint; ``path`` holds the old file or the whole new one at any moment.

    Raises:
        OSError: the file cannot be written.
    """
    with _writing(path) as file:
        torch.save(checkpoint, file)


def save_weights(path, weights, metadata):
    """Write a safetensors file of weights alone, tensors by name.

    Args:
        metadata: text by name; :func:`read_checkpoint` gives back ``config``, and ``classes`` of a JSON list.
    """
    content = save({name: x.contiguous() for name, x in weights.items()}, metadata)
    with _writing(path) as file:
        file.write(content)


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
    """Keep a checkpoint as the best of a run's folder; returns its path.

    Args:
        saved: file that already holds it, to link to where the file system can.

    Raises:
        OSError: the file cannot be written; the best before is untouched.
    """
    path = os.path.join(folder, BEST)
    if saved is None or not _link(saved, path):
        save_checkpoint(path, checkpoint)
    return path


def score_of_best(folder):
    """The score of a run's ``best.pth`` in percent, and whose: model or ema; (-1, None) without one."""
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
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot fetch {url}: {error}") from error
    return path


def read_checkpoint(path):
    """Read a checkpoint of this project, of the official release or of timm onto the CPU.

    Args:
        path: a file, or an https address; of safetensors if it ends in ``.safetensors``.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or holding objects that could run code.
    """
    if "://" in path:
        path = fetch_checkpoint(path)
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path} is not a regular file" if os.path.exists(path) else f"no checkpoint file {path}"
        )
    # An ordered dict stands in for the pickled yacs config of official files and the arguments in timm's.
    configs = "yacs.config.CfgNode", "argparse.Namespace"
    stand_ins = torch.serialization.safe_globals([(OrderedDict, name) for name in configs])
    try:
        with stand_ins:
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
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def read_weights(path, which="auto"):
    """:func:`~checkpoint.contents.weights_and_classes` of a file: what evaluation and fine-tuning need."""
    return weights_and_classes(read_checkpoint(path), path, which)


def read_run(path):
    """:func:`~checkpoint.contents.run_of` of a file: what a run continues from."""
    return run_of(read_checkpoint(path), path)


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
