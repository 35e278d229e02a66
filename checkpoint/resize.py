"""One filter for weights that start a model of other sizes: of images, windows, regions, channels, classes.

It serves ``--pretrained``, the detector, timm and torch.hub alike. Resuming and evaluation do not pass
through it: there everything must agree.
"""

import logging
import math
import re
import warnings

from timm.layers import gen_relative_position_index, resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv

logger = logging.getLogger("msg_transformer")


def fit_weights(weights, model):
    """Weights for a model of other sizes.

    - Tables of position biases for other windows: timm's ``resize_rel_pos_bias_table``, which interpolates
      between offsets that spread outwards, so that near ones change least.
    - Tables of relative positions, which the window decides, are the model's where windows differ or the
      weights have none.
    - Messengers for other shuffle regions: the R x R grid of a region is resampled bicubically by
      ``resample_abs_pos_embed``, as positions are, since where its window is in the region is all that
      distinguishes one from another before the first block.
    - Absolute positions for another map: the same. The old map is taken to be square.
    - A first convolution for images of other than three channels: ``adapt_input_conv``, which repeats the
      three and scales them, or adds them up for one.
    - A head for another number of classes is the model's own, or left out if that has none.

    What cannot be fitted is left as it is, for whoever loads it to refuse.

    Args:
        weights: tensors by name, as in ``model.state_dict()``.
        model: an MSGTransformer, or a module that has one within.

    Returns:
        Tensors by name, and what was changed: a list of lines, empty where the very same tensors return.
    """
    own, fitted = model.state_dict(), dict(weights)
    changes = _fit_windows(fitted, own)
    for name in [name for name in own if name in fitted and fitted[name].shape != own[name].shape]:
        old, new, kind = fitted[name], own[name], name.rpartition(".")[2]
        if kind == "msg_tokens" and _agree(old, new, but=1) and _is_square(old.shape[1]):
            sides = math.isqrt(old.shape[1]), math.isqrt(new.shape[1])
            fitted[name] = _resample(old[:, :, 0], sides[0], (sides[1], sides[1]))[:, :, None]
            change = f"resampled from regions of {_square(sides[0])} windows to {_square(sides[1])}"
        elif kind == "absolute_pos_embed" and _agree(old, new, but=1) and _is_square(old.shape[1]):
            side, grid = math.isqrt(old.shape[1]), model.get_submodule(name[: -len(kind) - 1]).grid_size
            fitted[name] = _resample(old, side, grid)
            change = f"resampled from {_square(side)} patches to {grid[0]}x{grid[1]}"
        elif name.endswith("patch_embed.proj.weight") and _agree(old, new, but=1) and old.shape[1] == 3:
            fitted[name] = adapt_input_conv(new.shape[1], old)
            change = f"adapted from 3 channels to {new.shape[1]}"
        else:
            continue
        changes.append(f"{name} is {change}")
    return fitted, changes + _fit_head(fitted, own)


def resize_table(table, window_size):
    """A table of position biases ((2w-1)^2, heads) for windows of ``window_size`` tokens on a side."""
    shape = (2 * window_size - 1) ** 2, table.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of how timm indexes its tensors
        return resize_rel_pos_bias_table(table, (window_size, window_size), shape)


def fit_on_load(model, state_dict, prefix, *_):
    """A hook of ``load_state_dict`` that passes what is loaded through :func:`fit_weights`; the log tells."""
    weights = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    fitted, changes = fit_weights(weights, model)
    for name in weights.keys() - fitted.keys():
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in fitted.items()})
    for change in changes:
        logger.warning(f"loading weights of other sizes: {change}")


def _fit_windows(weights, own):
    """Fit what depends on the window, in place; returns what was changed."""
    resized, computed = [], 0
    for name in [name for name in own if re.search(r"(^|\.)relative_position_index$", name)]:
        table, window = name.replace("position_index", "position_bias_table"), math.isqrt(len(own[name]))
        if table not in weights:
            continue
        old, index = weights[table], weights.get(name)
        fits, windows = _agree(old, own[table], but=0), ((math.isqrt(len(old)) + 1) // 2 if old.ndim else 0)
        other = fits and len(old) != len(own[table]) and (2 * windows - 1) ** 2 == len(old)
        if other and (index is None or index.cpu().equal(gen_relative_position_index((windows, windows)))):
            weights[table], weights[name] = resize_table(old, window), own[name]
            resized.append((windows, window))
        elif index is None:
            weights[name] = own[name]
            computed += 1
    changes = [
        f"the position biases of {resized.count(sizes)} blocks are resized from windows of "
        f"{_square(sizes[0])} to {_square(sizes[1])}"
        for sizes in sorted(set(resized))
    ]
    if computed:
        changes.append(f"the relative positions of {computed} blocks are computed, the weights have none")
    return changes


def _fit_head(weights, own):
    """Fit the classifier's head, in place; returns what was changed."""
    names = [name for name in ("head.weight", "head.bias") if name in weights]
    if not any(name.startswith("head.") for name in own):
        for name in names:
            del weights[name]
        return ["the head is left out: the model has none"] if names else []
    if not names or not all(_agree(weights[name], own[name], but=0) for name in names):
        return []
    classes = len(weights[names[0]]), len(own[names[0]])
    if classes[0] == classes[1]:
        return []
    weights.update({name: own[name] for name in names})
    return [f"the head is new: the weights have {classes[0]} classes, the model {classes[1]}"]


def _agree(x, y, but):
    """Whether two shapes agree except in one dimension."""
    return x.ndim == y.ndim and all(i == but or x.shape[i] == y.shape[i] for i in range(x.ndim))


def _is_square(number):
    return math.isqrt(number) ** 2 == number


def _square(side):
    return f"{side}x{side}"


def _resample(x, side, grid):
    """A square of vectors (1, side*side, C) resampled to a grid (1, rows*columns, C)."""
    return resample_abs_pos_embed(x, list(grid), old_size=[side, side], num_prefix_tokens=0)
