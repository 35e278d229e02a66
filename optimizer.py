"""The optimizer, its parameter groups, and one update: accumulate, scale, clip, skip, average."""

import contextlib
import fnmatch
import logging

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn, optim

from models.fast.apex import find_apex
from utils import UserError

# Swin's names for optimizers of NVIDIA's apex: the class there, and what stands in for it without apex.
APEX = dict(fused_adam=("FusedAdam", "adamw"), fused_lamb=("FusedLAMB", "lamb"))
OF_ADAMW = dict(eps=1e-8, betas=(0.9, 0.999))  # the defaults in config.py

logger = logging.getLogger("msg_transformer")


class NonFiniteError(UserError):
    """Too many updates in a row had a non-finite gradient."""


def parameter_groups(model):
    """Split parameters into two groups: decayed, then not decayed, each in the model's order.

    Not decayed: 1-d parameters, biases, and what ``model.no_weight_decay()`` names where there is one, whose
    entries may be patterns, as in timm.
    """
    skip = ["*.bias", *(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())]
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = parameter.ndim <= 1 or any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)
            (no_decay if kept else decay).append(parameter)
    return [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]


def layer_groups(model, weight_decay, layer_decay, with_fallback):
    """timm's ``param_groups_layer_decay``: groups by depth, with ``lr_scale`` for timm's schedulers.

    A layer's scale is layer_decay^(layers after it), where ``model.group_matcher()`` says what a layer is.
    Weight decay spares what it does in :func:`parameter_groups`.

    Args:
        with_fallback: set ``use_fallback`` in the groups of what ``model.no_weight_decay()`` names, for Muon.

    Raises:
        UserError: the model does not say what its layers are.
    """
    if not hasattr(model, "group_matcher"):
        raise UserError(
            "TRAIN.LAYER_DECAY: this model has no group_matcher to tell its layers: set it to 1.0"
        )
    named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    groups = param_groups_layer_decay(
        model,
        weight_decay,
        no_weight_decay_list=set(named) | biases,
        fallback_list=named if with_fallback else (),
        layer_decay=layer_decay,
    )
    scales = sorted({group["lr_scale"] for group in groups})
    logger.info(
        f"TRAIN.LAYER_DECAY: {len(scales)} layers, whose rates are {scales[0]:.2g} to {scales[-1]:g} of it"
    )
    return groups


def build_optimizer(config, model, lr_scale):
    """The optimizer ``TRAIN.OPTIMIZER.NAME`` over the model's parameter groups.

    AdamW and SGD are PyTorch's; the other names are timm's or apex's, and the log says what they became.
    ``EPS`` and ``BETAS`` are AdamW's by default; timm's other optimizers have their own until these change.

    Args:
        lr_scale: images per update over 512; the base learning rate is multiplied by it.

    Returns:
        An optimizer; if not AdamW or SGD, its attribute ``name`` tells whose state a checkpoint holds.

    Raises:
        UserError: settings that the optimizer does not take.
    """
    settings = config.TRAIN.OPTIMIZER
    name, decay = settings.NAME, config.TRAIN.WEIGHT_DECAY
    common = dict(lr=config.TRAIN.BASE_LR * lr_scale, weight_decay=decay)
    groups = parameter_groups(model)
    if config.TRAIN.LAYER_DECAY < 1:
        groups = layer_groups(model, decay, config.TRAIN.LAYER_DECAY, with_fallback="muon" in name)
    on_gpu, of_adam = next(model.parameters()).is_cuda, dict(eps=settings.EPS, betas=settings.BETAS)
    if name in APEX:
        optimizer, name = _build_apex(name, groups, on_gpu, of_adam | common)
        if optimizer is not None:
            return optimizer
    if name == "sgd":
        # Not fused: that SGD leaves its momentum uninitialised where a scaler skips the first update.
        return optim.SGD(groups, momentum=settings.MOMENTUM, nesterov=settings.MOMENTUM > 0, **common)
    if name == "adamw":
        return optim.AdamW(groups, fused=True, **of_adam, **common)
    if settings.NAME not in APEX:
        of_adam = {key: value for key, value in of_adam.items() if value != OF_ADAMW[key]}
    return _build_timm(name, groups, dict(momentum=settings.MOMENTUM, **of_adam, **common))


def _build_apex(name, groups, on_gpu, settings):
    """apex's optimizer and its name, or None and the name of what stands in for it; the log tells."""
    wanted, instead = APEX[name]
    optimizer, problem = find_apex(f"optimizers.{wanted}", on_gpu)
    if optimizer is not None:
        try:
            optimizer = optimizer(groups, **settings)
            optimizer.name = f"apex {name}"
            logger.info(f"{name}: apex's {wanted}")
            return optimizer, name
        except (ImportError, RuntimeError) as error:
            problem = f"apex was built without its CUDA kernels ({error})"
    whose = "timm's LAMB" if instead == "lamb" else "PyTorch's fused AdamW"
    logger.warning(f"{name}: {whose}, because {problem}")
    return None, instead


def _build_timm(name, groups, settings):
    betas = get_optimizer_info(name).num_betas
    if "betas" in settings and get_optimizer_info(name).has_betas and len(settings["betas"]) != betas:
        raise UserError(f"TRAIN.OPTIMIZER.BETAS: {name} takes {betas} of them: leave them at their default")
    if "muon" in name and "lr_scale" not in groups[0]:
        # Tables, positions and messengers are no matrices: they get its AdamW, as 1-d parameters do.
        groups = [groups[0], dict(groups[1], use_fallback=True)]
    try:
        optimizer = create_optimizer_v2(groups, name, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"TRAIN.OPTIMIZER: {name} does not take these settings: {error}") from error
    optimizer.name = name
    shown = ("betas", "momentum", "eps", "weight_decay")
    shown = ", ".join(f"{key} {optimizer.defaults[key]}" for key in shown if key in optimizer.defaults)
    logger.info(f"optimizer {name}: {type(optimizer).__name__} with {shown}")
    return optimizer


class WeightAverage:
    """The exponential moving average of a model's weights and buffers, by timm's ModelEmaV3.

    At update u, counted from 1, the average moves towards the weights by 1 - decay, and at the first it
    becomes them. With a warm-up, decay is 1 - u^(-2/3) where that is less than the one given.

    Attributes:
        model: a module in evaluation mode that holds the average.
        updates: how often it was updated; skipped updates do not count.
    """

    def __init__(self, model, decay, warmup):
        self._ema = ModelEmaV3(model, decay=decay, use_warmup=warmup)
        self.model, self.updates = self._ema.module, 0

    def restart(self, model):
        """Begin again at the weights that ``model`` has now."""
        self._ema.set(model)
        self.updates = 0

    def update(self, model):
        """Move towards the weights of ``model``, which may be a DistributedDataParallel one."""
        self.updates += 1
        self._ema.update(model, step=self.updates)


def build_average(config, model):
    """The :class:`WeightAverage` that ``TRAIN.EMA`` asks for, or None."""
    settings = config.TRAIN.EMA
    return WeightAverage(model, settings.DECAY, settings.WARMUP) if settings.ENABLED else None


class Updater:
    """Optimizer updates: accumulation, gradient scaling, clipping, and no change from bad gradients.

    An update whose gradient norm is not finite is skipped on every process alike and counted. The gradient
    scaler serves for that in every precision; it scales the loss only where it is float16.

    Args:
        model: the module that is called, a DistributedDataParallel one where there are several processes.
        accumulation: micro-batches of an update.
        clip_grad: largest global gradient norm, 0 for no clipping.
        max_nonfinite: skipped updates in a row after which the run ends.

    Attributes:
        average: the :class:`WeightAverage` that follows every update that is not skipped; None at first.
    """

    def __init__(self, model, optimizer, compute, accumulation, clip_grad, max_nonfinite):
        self.model, self.optimizer, self.compute = model, optimizer, compute
        self.accumulation, self.clip_grad, self.max_nonfinite = accumulation, clip_grad, max_nonfinite
        self.average = None
        device, self.scales = compute.device, compute.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self.scales else 1.0)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        cuda = device.type == "cuda"
        self.counted = torch.zeros((), dtype=torch.int64, pin_memory=cuda)
        self.counted_event = torch.cuda.Event() if cuda else None

    @contextlib.contextmanager
    def micro_batch(self, part):
        """Context of forward and :meth:`backward` of micro-batch ``part``; the last sends gradients."""
        if part == 0:
            self.optimizer.zero_grad()
        last = part + 1 == self.accumulation
        quiet = not last and isinstance(self.model, nn.parallel.DistributedDataParallel)
        with self.model.no_sync() if quiet else contextlib.nullcontext():
            yield

    def backward(self, loss):
        """Accumulate the gradients of a micro-batch's mean loss."""
        self.scaler.scale(loss / self.accumulation).backward()

    def update(self):
        """Clip, then change the parameters unless a gradient is not finite.

        Returns:
            The global gradient norm before clipping, a tensor on the device.

        Raises:
            NonFiniteError: ``max_nonfinite`` updates in a row were skipped, the last but one among them.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        bad = ~torch.isfinite(norm)
        # The scaler looks at single elements: it must see what makes the norm alone overflow, too.
        parameters[0].grad.add_(torch.where(bad, torch.nan, 0.0))
        norm = norm / self.scaler.scale(torch.ones((), device=self.compute.device))
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        # Only float16 has a scale to find; elsewhere a skipped update must not change it.
        self.scaler.update(None if self.scales else 1.0)
        self.skipped = self.skipped + bad.long()
        self.skipped_in_a_row = bad.long() * (self.skipped_in_a_row + 1)
        if self.average is not None and not bad:  # which waits for the device
            self.average.update(self.model)
        self._check_the_update_before()
        return norm

    def _check_the_update_before(self):
        """End the run after too many skips, without waiting for the update that was just queued."""
        if self.counted_event is not None:
            self.counted_event.synchronize()
        in_a_row = int(self.counted)
        self.counted.copy_(self.skipped_in_a_row, non_blocking=self.counted_event is not None)
        if self.counted_event is not None:
            self.counted_event.record()
        if self.max_nonfinite and in_a_row >= self.max_nonfinite:
            raise NonFiniteError(
                f"loss or gradients were not finite in {self.max_nonfinite} updates in a row"
            )

    def state_dict(self):
        """The gradient scale, the precision it is for, and the counts of skipped updates."""
        counts = dict(skipped=self.skipped.item(), skipped_in_a_row=self.skipped_in_a_row.item())
        return dict(scaler=self.scaler.state_dict(), amp_dtype=str(self.compute.dtype), **counts)

    def load_state_dict(self, state):
        """Continue from :meth:`state_dict`; a scale saved for another precision is left alone."""
        if state["amp_dtype"] == str(self.compute.dtype):
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state["skipped"])
        self.skipped_in_a_row.fill_(state["skipped_in_a_row"])
        self.counted.fill_(state["skipped_in_a_row"])
