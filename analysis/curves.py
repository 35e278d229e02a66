"""Draws the curves of a classifier's run."""

import math

from utils import replacing


def draw_curves(epochs, path, hyperparameters):
    """Draw loss, accuracy and learning rate over the epochs to a PNG file.

    The training loss cannot fall below the floor of label smoothing, which is drawn. With five classes or
    fewer top-5 is always 100%, and left out.

    Args:
        epochs: rows with epoch (from 0), train_loss, val_loss, acc1, acc5 (percent), lr; of an averaged
            model also ema_acc1.
        hyperparameters: a flat dict; ``MODEL.NUM_CLASSES`` and ``MODEL.LABEL_SMOOTHING`` are used.
    """
    # pyplot is not used: it keeps global state and a figure for every call.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x = [row["epoch"] for row in epochs]
    classes = hyperparameters.get("MODEL.NUM_CLASSES", math.inf)
    smoothing = hyperparameters.get("MODEL.LABEL_SMOOTHING", 0)
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "o" if len(x) < 40 else ""
    loss.plot(x, [row["train_loss"] for row in epochs], marker=marker, ms=3, label="training (augmented)")
    loss.plot(x, [row["val_loss"] for row in epochs], marker=marker, ms=3, label="validation")
    # A teacher's targets have another entropy.
    if smoothing and math.isfinite(classes) and not hyperparameters.get("DISTILL.TEACHER"):
        label = f"floor of label smoothing {smoothing:g}"
        loss.axhline(smoothing_floor(smoothing, classes), color="C0", lw=0.9, ls="--", label=label)
    loss.set(title="Cross entropy", ylim=(0, None))
    ema = [row.get("ema_acc1", math.nan) for row in epochs]
    scores = [max(row["acc1"], row.get("ema_acc1", 0)) for row in epochs]
    best, best_epoch = max(scores), epochs[scores.index(max(scores))]["epoch"]
    accuracy.plot(x, [row["acc1"] for row in epochs], marker=marker, ms=3, label="top-1")
    if classes > 5:
        accuracy.plot(x, [row["acc5"] for row in epochs], marker=marker, ms=3, label="top-5")
    if not all(map(math.isnan, ema)):
        accuracy.plot(x, ema, marker=marker, ms=3, label="top-1 of the average (EMA)")
    accuracy.plot(best_epoch, best, "*", ms=11, color="black", label=f"best top-1, epoch {best_epoch}")
    accuracy.set(title=f"Validation: best top-1 {best:.2f}% (epoch {best_epoch})", ylabel="%")
    rate.plot(x, [row["lr"] for row in epochs], marker=marker, ms=3, color="black")
    rate.set(title="Learning rate at the end of the epoch", ylim=(0, None))
    rate.yaxis.set_major_formatter("{x:.3g}")  # not 0.2 and a factor above the axis, which moves the title
    for axes in (loss, accuracy, rate):
        axes.set_title(axes.get_title(), fontsize=10)
        axes.set_xlabel("epoch, as in the names of checkpoints")
        axes.axvline(best_epoch, color="black", lw=0.8, ls=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(x) < 3:  # no ticks between epochs, and none for epochs to come
            axes.set(xticks=x, xlim=(x[0] - 0.5, x[-1] + 0.5))
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy):
        axes.legend(fontsize=8.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=166, format="png")


def smoothing_floor(smoothing, classes):
    """The least training loss under label smoothing, the entropy of its targets; 0 for none.

    A target has 1 - smoothing + smoothing / classes for its class, and smoothing / classes for the others.
    """
    shares = [1 - smoothing + smoothing / classes, *[smoothing / classes] * (classes - 1)]
    return -sum(share * math.log(share) for share in shares if share > 0)
