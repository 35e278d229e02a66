"""Loads what checkpoints hold into models and optimizers, and says what does not fit."""

import logging
import re
from collections import Counter

import torch

from utils import advice_on_look_alikes

from .contents import NEW_RUN, CheckpointError, classes_of, optimizer_of, own_config, short, weights_of
from .resize import fit_weights

# What has rows for every class, in a classifier and in a detector.
HEAD = re.compile(r"head\.|.*\.(box_predictor|mask_fcn_logits)\.")

logger = logging.getLogger("msg_transformer")


def load_weights(model, checkpoint, path, new_head=False):
    """Load a checkpoint's weights into ``model``; every name and shape must agree, and the classes if known.

    A prefix of all names is left out, see :func:`without_prefix`.

    Args:
        model: ``model.classes``, where there is one, names its classes in the order of the head.
        checkpoint: what :func:`read_checkpoint` returned from ``path``; a bare state dict will do.
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
    theirs, ours = classes_of(checkpoint, path), getattr(model, "classes", None)
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


def without_prefix(weights, own, path):
    """Weights by the model's ``own`` names, where all have a prefix, such as Lightning's ``model.``.

    Those given return where some have names of the model, or where fewer than half of the model's names are
    there with a prefix.

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


def class_difference(saved, own):
    """How the class names of a checkpoint differ from the model's, in words; empty where they do not."""
    if saved == own:
        return ""
    if sorted(saved) == sorted(own):
        i = next(i for i, (there, here) in enumerate(zip(saved, own)) if there != here)
        return f"the same names in another order, class {i} was {short(saved[i])} and is {short(own[i])}"
    lost, new = sorted(set(saved) - set(own)), sorted(set(own) - set(saved))
    parts = [f"it has {len(saved)} classes, the data {len(own)}"] if len(saved) != len(own) else []
    for where, names in (("the checkpoint", lost), ("the data", new)):
        if names:
            some = ", ".join(map(short, names[:3]))
            parts.append(f"only {where} has {some}{' ...' if len(names) > 3 else ''}")
    return "; ".join(parts) + advice_on_look_alikes([*lost, *new])


def _misfit(name, theirs, own):
    if theirs.shape != own.shape:
        return [f"{name} is {tuple(theirs.shape)}, the model's {tuple(own.shape)}"]
    if theirs.is_floating_point() != own.is_floating_point():
        return [f"{name} is {theirs.dtype}, the model's {own.dtype}"]
    if name.endswith("relative_position_index") and not theirs.equal(own.cpu()):
        return [f"{name} is another table than the model's"]
    return []


def _diagnosis(weights, own):
    """What a checkpoint's weights are, in a few words, where they are not the model's."""
    if not any(name.startswith("layers.") for name in weights):
        return "it is not an MSG-Transformer"
    merging = "layers.0.downsample.reduction.weight"
    kinds = [("v1", "CVPR 2022")[x[merging].ndim == 4] for x in (weights, own) if merging in x]
    if len(set(kinds)) == 2:
        return (
            f"it is the {kinds[0]} architecture and the config asks for {kinds[1]} "
            "(MODEL.MSG.PATCH_EMBED and DOWNSAMPLE: linear for v1, conv for CVPR 2022)"
        )
    heads = [len(tensors["head.weight"]) if "head.weight" in tensors else 0 for tensors in (weights, own)]
    if all(heads) and heads[0] != heads[1]:
        return (
            f"it has {heads[0]} classes, the model {heads[1]} (to fine-tune on other classes use {NEW_RUN})"
        )
    return "it is another architecture"


def load_optimizer(optimizer, model, checkpoint, path):
    """Load the optimizer's state, that of official checkpoints included.

    Raises:
        CheckpointError: the state belongs to other parameters, or is broken.
    """
    if "optimizer" not in checkpoint:
        raise CheckpointError(f"{path} holds weights only: start a new run from it with --pretrained")
    state = optimizer_of(checkpoint, path)
    saved, names = state["param_groups"], (checkpoint.get("optimizer_name"), getattr(optimizer, "name", None))
    theirs, own = (name or _kind(groups) for name, groups in zip(names, (saved, [optimizer.defaults])))
    if theirs != own or names[0] != names[1]:
        raise CheckpointError(
            f"{path} was trained with another TRAIN.OPTIMIZER.NAME: {theirs} there, {own} here; set that "
            f"again, or start from the weights alone with {NEW_RUN}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in saved]
    official = _official_groups(optimizer, model)
    if theirs == ours:
        moments = state["state"]
    elif theirs == list(map(len, official)):
        there = [id(parameter) for group in official for parameter in group]
        moments = {index: state["state"].get(there.index(id(p))) for index, p in enumerate(parameters)}
        moments = {index: value for index, value in moments.items() if value is not None}
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
    for group, before in zip(fresh["param_groups"], saved):
        group.update({name: before[name] for name in ("step",) if name in before})
    optimizer.load_state_dict(dict(fresh, state=moments))


def _kind(groups):
    """Which optimizer of PyTorch has such groups: adamw or sgd, or both where they contradict each other."""
    return " and ".join(sorted({"adamw" if "betas" in group else "sgd" for group in groups}))


def _official_groups(optimizer, model):
    """The groups of parameters in the official code, which decays the messenger tokens by mistake."""
    decayed, tokens = {id(p) for p in optimizer.param_groups[0]["params"]}, getattr(model, "msg_tokens", None)
    return [
        [p for p in model.parameters() if id(p) in decayed or p is tokens],
        [p for p in optimizer.param_groups[-1]["params"] if p is not tokens],
    ]
