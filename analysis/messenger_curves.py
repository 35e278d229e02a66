"""How much of the class score messengers carry, over many images.

Deletion and insertion curves say which map orders the messengers of a stage best: by ablation, by attention,
by gradient, or at random. Switching the exchange off says what crosses windows. docs/messengers.md has the
formulas.
"""

import numpy as np
import torch

from .messengers import (
    ablate,
    ablate_each,
    attention_map,
    blocks_of,
    class_scores,
    gradient_map,
    grids,
    without_exchange,
)

ORDERS = ("ablation", "attention", "gradient", "random")
STEPS = 8  # of a curve, at most


def measure_curves(model, image, seed=0):
    """What the score of the predicted class depends on, for one image (channels, height, width).

    Returns:
        A dict of ``score`` and ``blank``, the scores of the image and of a blank one; ``curves``, what
        :func:`curve` gives for each stage of more than one window and each of :data:`ORDERS`, ``seed`` being
        that of the random one; and ``exchange``, see :func:`switch_off`.
    """
    with torch.no_grad():
        scores, blank = class_scores(model, torch.stack([image, torch.zeros_like(image)]))
    target, curves = int(scores.argmax()), {}
    maps = dict(attention=attention_map(model, image), gradient=gradient_map(model, image, target))
    for stage, grid in enumerate(grids(model, image.shape[1:])):
        if grid.shown[0] * grid.shown[1] == 1:
            continue
        values = {name: grid.means(pixels).flatten() for name, pixels in maps.items()}
        values["ablation"] = (scores[target] - ablate_each(model, image, stage)[..., target]).flatten()
        values["random"] = torch.rand(
            len(values["ablation"]), generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        curves[stage] = {
            name: curve(model, image, stage, target, values[name].argsort(descending=True).tolist())
            for name in ORDERS
        }
    return dict(
        score=float(scores[target]),
        blank=float(blank[target]),
        curves=curves,
        exchange=switch_off(model, image, target),
    )


def steps_of(count):
    """How many of ``count`` messengers are silenced at each point of a curve."""
    return np.round(np.linspace(0, count, min(count, STEPS) + 1)).astype(int).tolist()


def curve(model, image, stage, target, order):
    """The score of a class where the first messengers of an order are silenced, and where all others are.

    These are deletion and insertion, a pair of arrays (steps+1,) over :func:`steps_of` messengers.

    Args:
        order: numbers of the stage's windows that hold a part of the image, row-major.
    """
    grid, steps = grids(model, image.shape[1:])[stage], steps_of(len(order))
    masks = torch.zeros(2, len(steps), grid.rows, grid.columns, dtype=torch.bool)
    for place, count in enumerate(steps):
        for rank, number in enumerate(order):
            masks[int(rank >= count), place, number // grid.shown[1], number % grid.shown[1]] = True
    scores = ablate(model, image, stage, masks.flatten(0, 1))[:, target]
    return tuple(scores.unflatten(0, (2, -1)).cpu().double().numpy())


def switch_off(model, image, target):
    """Scores of a class without exchanges: a dict of names to a dict of ``off`` and ``withheld``.

    Names are ``stage 1, block 1``, ``stage 1`` for all its blocks, and ``all``. Each entry is the score and
    whether the predicted class is still ``target``. Blocks whose regions have one window are left out.
    """
    places = [place for place, block in blocks_of(model) if model.layers[place[0]].shuffle_size > 1]
    groups = {f"stage {i + 1}, block {j + 1}": [(i, j)] for i, j in places}
    for i in sorted({place[0] for place in places}):
        groups[f"stage {i + 1}"] = [place for place in places if place[0] == i]
    groups["all"] = places
    found = {}
    for name, chosen in groups.items():
        found[name] = {}
        for kind in ("off", "withheld"):
            scores = without_exchange(model, image[None], chosen, kind == "withheld")[0]
            found[name][kind] = float(scores[target]), bool(scores.argmax() == target)
    return found


def summarize(measured):
    """Figures over images, from what :func:`measure_curves` returned for each.

    Returns:
        A dict of ``images``; ``score`` and ``blank``, means; ``curves``, for each stage, order, and deletion
        or insertion a dict of the mean ``curve``, its ``area`` from 0 (all silenced) to 1 (none), and its
        ``gain`` over a random order with the standard ``error``; ``exchange``, for each name and kind the
        ``share`` of the score that is lost, the mean ``drop`` with its standard ``error``, and the share of
        predictions ``kept``.
    """
    score, blank = (np.array([row[key] for row in measured]) for key in ("score", "blank"))
    curves = {}
    for stage in measured[0]["curves"]:
        found = {
            name: np.array([row["curves"][stage][name] for row in measured]) for name in ORDERS
        }  # images, 2, steps+1
        top, floor = (found["random"][:, 0, end].mean() for end in (0, -1))
        areas = {name: _area(of_order) for name, of_order in found.items()}  # images, 2
        curves[stage] = dict(intact=float(top), silenced=float(floor), orders={})
        for name in ORDERS:
            entry = {}
            for kind, what in enumerate(("deletion", "insertion")):
                gain = (areas[name] - areas["random"])[:, kind] * (-1, 1)[kind]
                entry[what] = dict(
                    curve=found[name][:, kind].mean(0).tolist(),
                    area=float((areas[name][:, kind].mean() - floor) / (top - floor)),
                    gain=float(gain.mean()),
                    error=_error(gain),
                )
            curves[stage]["orders"][name] = entry
    exchange = {}
    for name in measured[0]["exchange"]:
        exchange[name] = {}
        for kind in ("off", "withheld"):
            left, kept = np.array([row["exchange"][name][kind] for row in measured]).T
            exchange[name][kind] = dict(
                share=float((score - left).sum() / (score - blank).sum()),
                drop=float((score - left).mean()),
                error=_error(score - left),
                kept=float(kept.mean()),
            )
    means = dict(score=float(score.mean()), blank=float(blank.mean()))
    return dict(images=len(measured), **means, curves=curves, exchange=exchange)


def _area(curves):
    """The mean along curves (..., steps+1), by the trapezoidal rule."""
    return (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2


def _error(values):
    """The standard error of a mean; None of a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
