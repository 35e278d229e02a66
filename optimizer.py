"""The optimizer and its parameter groups."""

from torch import optim


def parameter_groups(model):
    """Split parameters into two groups: decayed, then not decayed, each in the model's order.

    Not decayed: 1-d parameters, biases, and what ``model.no_weight_decay()`` names.
    """
    skip = model.no_weight_decay()
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = parameter.ndim <= 1 or name.endswith(".bias") or name in skip
            (no_decay if kept else decay).append(parameter)
    return [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]


def build_optimizer(config, model, lr_scale):
    """AdamW or SGD over the model's parameters.

    Args:
        lr_scale: images per update over 512; the base learning rate is multiplied by it.
    """
    settings = config.TRAIN.OPTIMIZER
    common = dict(lr=config.TRAIN.BASE_LR * lr_scale, weight_decay=config.TRAIN.WEIGHT_DECAY)
    groups = parameter_groups(model)
    if settings.NAME == "sgd":
        # Not fused: that SGD leaves its momentum uninitialised where a scaler skips the first update.
        return optim.SGD(groups, momentum=settings.MOMENTUM, nesterov=settings.MOMENTUM > 0, **common)
    fused = next(model.parameters()).is_cuda
    return optim.AdamW(groups, eps=settings.EPS, betas=settings.BETAS, fused=fused, **common)
