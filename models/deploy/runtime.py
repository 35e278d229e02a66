"""Evaluation by OpenVINO in place of PyTorch."""

import importlib.metadata
import logging
import os
import tempfile
from dataclasses import replace

import torch
from torch import nn

from config import CHOICES, image_shape
from utils import UserError

from ..fast.choices import chosen
from .files import (
    CLOSE,
    FORMATS,
    OF_OPENVINO,
    Exportable,
    attempt,
    largest_error,
    logits_of,
    openvino_has_bfloat16,
    require_near,
    require_packages,
    run_openvino,
    write_checked,
)

# Largest root mean square error of bfloat16 to float32, as a share of the spread of the logits.
ROUNDED = 0.05

logger = logging.getLogger("msg_transformer")


def build_runtime(config, model, compute):
    """What evaluates images of ``DATA.IMG_SIZE`` by ``RUNTIME``: the model itself, or a :class:`HandedOver`.

    Args:
        model: with its weights, on the device of ``compute``, a :class:`~distributed.Compute`.

    Raises:
        UserError: the runtime cannot compute this model, or not as ``compute`` says.
    """
    name, reason = choose_runtime(config.RUNTIME, compute)
    if config.RUNTIME == "auto":
        logger.info(f"RUNTIME auto: {name}, because {reason}")
    if name == "pytorch":
        return model
    return hand_over(model, image_shape(config), compute.dtype or torch.float32)


def choose_runtime(name, compute):
    """What ``RUNTIME`` names, or what ``auto`` stands for; and why that, "" where it is named.

    Raises:
        UserError: it is not installed, or not for the device or the precision of ``compute``.
    """
    if name not in CHOICES["RUNTIME"]:
        raise UserError(f"RUNTIME {name!r} is none of {', '.join(CHOICES['RUNTIME'])}")
    problem = "" if name == "pytorch" else _obstacle(compute)
    if name == "auto":
        if problem or chosen().runtime != "openvino":
            return "pytorch", problem or "nobody has measured a faster one on this processor"
        return "openvino", "it is the fastest that was measured on this processor"
    if problem:
        raise UserError(f"RUNTIME {problem}")
    return name, ""


def _obstacle(compute):
    """Why OpenVINO cannot evaluate as ``compute`` says, in words that begin with its name; or ""."""
    if compute.device.type != "cpu":
        return "openvino computes on the CPU: add --device cpu"
    try:
        require_packages(dict(openvino=OF_OPENVINO))
    except UserError as error:
        return str(error)
    if compute.dtype == torch.bfloat16 and not openvino_has_bfloat16():
        return (
            "openvino does not compute in bfloat16 on this processor: set AMP_OPT_LEVEL to O0 (--disable-amp)"
        )
    return ""


def hand_over(model, size, dtype=torch.float32):
    """A classifier that OpenVINO computes.

    Args:
        model: on the CPU; its weights must stay as they are.
        size: (C, H, W) of its images.
        dtype: float32 or bfloat16, to compute in.

    Raises:
        UserError: a package is missing, or OpenVINO cannot compute this model.
    """
    require_packages(dict(openvino=OF_OPENVINO))
    precision, version = str(dtype).removeprefix("torch."), importlib.metadata.version("openvino")
    threads = torch.get_num_threads()
    logger.info(f"RUNTIME openvino: OpenVINO {version} in {precision}, {threads} threads")
    exportable = Exportable(model.eval(), {}, tuple(size), {}, rebuild=None)
    kind = replace(FORMATS["onnx"], runners=dict(OpenVINO=lambda path, _: run_openvino(path, dtype)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            kept = write_checked(exportable, kind, os.path.join(folder, "model.onnx"), [])
        except UserError as error:
            raise UserError(f"RUNTIME openvino: {error}: set RUNTIME pytorch") from error
    return HandedOver(model, kept.runs["OpenVINO"], dtype).eval()


class HandedOver(nn.Module):
    """A classifier whose logits come from OpenVINO.

    The first images that it is given are computed by PyTorch in float32 too, and compared.

    Args:
        model: in PyTorch.
        run: a function of images (B, C, H, W) float32.
        dtype: what it computes in.
    """

    def __init__(self, model, run, dtype):
        super().__init__()
        self.model, self.run, self.dtype, self.compared = model, run, dtype, False

    def forward(self, images):
        """Logits (B, classes) of images (B, C, H, W); a UserError if they are not those of PyTorch."""
        if not self.compared:
            self._compare([images[:1], images])
            self.compared = True
        return self.run(images)

    def _compare(self, batches):
        """Refuse what differs by more than rounding; one image alone is as a last batch may be."""
        title = "OpenVINO"
        try:
            with torch.autocast("cpu", enabled=False):
                expected = logits_of(self.model, batches)
            found = attempt("be run", logits_of, self.run, batches)
            expected, found = [torch.cat(expected)], [torch.cat(found)]  # the spread of more than one image
            if self.dtype == torch.float32:
                error = f"{largest_error(title, found, expected, CLOSE):.1g}"
            else:
                error = f"{require_near(title, found, expected, ROUNDED):.1%} of the spread of the logits"
        except UserError as refusal:
            raise UserError(f"RUNTIME openvino: {refusal}: set RUNTIME pytorch") from refusal
        logger.info(f"RUNTIME openvino: {error} off PyTorch in float32, on {len(batches[-1])} images")
