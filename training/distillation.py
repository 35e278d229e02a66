"""Knowledge distillation: a student learns from a teacher's predictions beside the labels."""

import logging
import os

import timm
import torch
from torch import nn
from torch.nn import functional

import checkpoint as ckpt
from config import flat_config, function_difference, image_shape
from data.transforms import normalization
from distributed import from_rank_0
from models.from_checkpoint import build_ready, read_described
from utils import UserError

logger = logging.getLogger("msg_transformer")


def distillation_loss(student, teacher, kind, temperature):
    """How far a student's logits are from a teacher's, the mean over the images of a batch.

    - ``soft`` (Hinton et al., arXiv 1503.02531): T^2 KL(softmax(teacher / T) || softmax(student / T)). With
      T^2 its gradients stay as large as those of the labels, whatever the temperature T.
    - ``hard`` (DeiT, arXiv 2012.12877): the cross entropy with the teacher's most likely class.

    Args:
        student, teacher: logits (B, classes).
    """
    if kind == "hard":
        return functional.cross_entropy(student, teacher.argmax(1))
    student, teacher = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class Distillation(nn.Module):
    """The loss (1 - alpha) labels + alpha :func:`distillation_loss`.

    Args:
        teacher: a classifier; it stays in evaluation mode, without gradients.
        rescale: (factor, offset) for each channel, (C, 1, 1): from the student's normalisation of images to
            the teacher's.
        settings: ``config.DISTILL``.
    """

    def __init__(self, teacher, rescale, settings, compute):
        super().__init__()
        self.compute = compute
        self.teacher = teacher.eval().requires_grad_(False)
        self.factor, self.offset = (nn.Buffer(values, persistent=False) for values in rescale)
        self.kind, self.temperature, self.alpha = settings.KIND, settings.TEMPERATURE, settings.ALPHA

    def forward(self, images, logits, label_loss):
        """The two parts by name, which add up to the loss.

        Args:
            images: (B, C, H, W) as the student sees them, after mixup.
            logits, label_loss: (B, classes) of the student, and the loss of the labels.
        """
        with torch.no_grad(), self.compute.autocast():
            told = self.teacher(images * self.factor + self.offset)
        loss = distillation_loss(logits.float(), told.float(), self.kind, self.temperature)
        return dict(labels=(1 - self.alpha) * label_loss, teacher=self.alpha * loss)


def build_distillation(config, classes, compute):
    """The :class:`Distillation` that ``config.DISTILL`` asks for, or None.

    Args:
        classes: the names of the run's classes, in the order of its logits.

    Raises:
        UserError: no such teacher, or one of other classes or images.
    """
    settings = config.DISTILL
    if not settings.TEACHER:
        return None
    mean, std = map(torch.tensor, normalization(config.MODEL.MSG.IN_CHANS))
    if timm.is_model(settings.TEACHER) and not os.path.exists(settings.TEACHER):
        teacher = _build_timm(config, classes)
        their_mean, their_std = (torch.tensor(teacher.pretrained_cfg[key]) for key in ("mean", "std"))
    else:
        teacher, (their_mean, their_std) = _read_ours(config, classes), (mean, std)
    if len(their_mean) != len(mean):
        raise UserError(f"DISTILL.TEACHER {settings.TEACHER} takes images of {len(their_mean)} channels")
    rescale = [values[:, None, None] for values in (std / their_std, (mean - their_mean) / their_std)]
    _try(teacher, config, len(classes))
    logger.info(
        f"distillation ({settings.KIND}, {settings.ALPHA:g} of the loss) from {settings.TEACHER}, "
        f"{sum(parameter.numel() for parameter in teacher.parameters()):,} parameters"
    )
    return Distillation(teacher, rescale, settings, compute).to(compute.device)


def _read_ours(config, classes):
    """The teacher of a checkpoint of this code."""
    path = config.DISTILL.TEACHER
    if config.DISTILL.WEIGHTS:
        raise UserError(f"DISTILL.WEIGHTS is for models of timm: {path} holds its weights itself")
    if not os.path.exists(path) and not path.startswith("https:"):
        raise UserError(f"DISTILL.TEACHER {path}: no such checkpoint, and no such model of timm")
    theirs, checkpoint = from_rank_0(lambda: read_described(path))
    differences = function_difference(checkpoint["config"], flat_config(config), f"the config in {path}")
    if differences := [words for words in differences if words.startswith("DATA.")]:
        logger.warning(f"DISTILL.TEACHER {path} was trained on other images: {'; '.join(differences)}")
    teacher, _, names = build_ready(theirs, checkpoint, path)
    if names is not None and names != classes:
        raise UserError(
            f"DISTILL.TEACHER {path} knows other classes than the data have, or in another order: "
            f"{', '.join(names[:3])} ... there, {', '.join(classes[:3])} ... here"
        )
    return teacher


def _build_timm(config, classes):
    """The teacher of a timm name, with ``DISTILL.WEIGHTS``."""
    name, weights = config.DISTILL.TEACHER, config.DISTILL.WEIGHTS
    if not weights:
        raise UserError(
            f"DISTILL.WEIGHTS is empty: give the file of {name}'s weights, or pretrained for timm's own"
        )
    given = dict(num_classes=len(classes), in_chans=config.MODEL.MSG.IN_CHANS)
    pretrained = weights == "pretrained"
    theirs = timm.get_pretrained_cfg(name).num_classes if pretrained else len(classes)
    if theirs != len(classes):
        raise UserError(
            f"DISTILL.TEACHER {name}: timm's own weights are for {theirs} classes, and the data have "
            f"{len(classes)}: give the file of weights that were trained on these (DISTILL.WEIGHTS)"
        )
    try:
        try:
            teacher = timm.create_model(name, pretrained, img_size=config.DATA.IMG_SIZE, **given)
        except TypeError:  # convolutional networks take any size, and are not told it
            teacher = timm.create_model(name, pretrained, **given)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"timm cannot build the teacher {name} ({type(error).__name__}: {reason})") from error
    if not pretrained:
        teacher.classes, checkpoint = classes, from_rank_0(lambda: ckpt.read_weights(weights))
        ckpt.load_weights(teacher, checkpoint, weights)
        asked = {key: x for key, x in flat_config(config).items() if "MODEL.TIMM_ARGS." not in key}
        asked.update({"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": name})
        differences = function_difference(checkpoint["config"], asked, f"the config in {weights}")
        if differences := [words for words in differences if words.startswith("MODEL.")]:
            raise UserError(
                f"DISTILL.WEIGHTS {weights} is of another model than {name}: {'; '.join(differences)}; give "
                "it as DISTILL.TEACHER"
            )
    return teacher


def _try(teacher, config, classes):
    """Refuse a teacher that does not take the run's images, or gives other logits."""
    channels, height, width = image_shape(config)
    try:
        with torch.no_grad():
            shape = tuple(teacher.eval()(torch.zeros(2, channels, height, width)).shape)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"DISTILL.TEACHER {config.DISTILL.TEACHER} does not take images of {channels} "
            f"channels and {height}x{width} pixels ({reason}): change DATA.IMG_SIZE or the teacher"
        ) from error
    if shape != (2, classes):
        raise UserError(
            f"DISTILL.TEACHER {config.DISTILL.TEACHER} gives {shape[-1]} logits, and the data have {classes} "
            "classes"
        )
