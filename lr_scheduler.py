"""The learning rate at every update."""

from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler


def build_scheduler(config, optimizer, updates_per_epoch, lr_scale):
    """A timm scheduler; ``scheduler.step_update(u)`` sets the learning rate of update u, counted from 0.

    The rate is a function of u and the config alone, so that a resumed run needs no state. All
    schedules start with a linear warm-up of ``WARMUP_EPOCHS`` epochs, or of ``WARMUP_STEPS`` updates where
    these are given, from ``WARMUP_LR`` to ``BASE_LR``. Then ``cosine`` follows the cosine of the whole run,
    as the official code does (it starts below the base rate where the warm-up ends); ``linear`` falls to
    ``MIN_LR`` at the end; ``step`` multiplies by ``DECAY_RATE`` every ``DECAY_EPOCHS``; ``multistep`` at
    every epoch of ``MILESTONES``.

    Args:
        optimizer: its groups' rates are the scaled base rate.
        updates_per_epoch: optimizer updates in an epoch.
        lr_scale: images per update over 512 (16 in detection); multiplies the warm-up and minimum rates too.
    """
    train, settings = config.TRAIN, config.TRAIN.LR_SCHEDULER
    updates = train.EPOCHS * updates_per_epoch
    warmup = train.WARMUP_STEPS or train.WARMUP_EPOCHS * updates_per_epoch
    common = dict(warmup_t=warmup, warmup_lr_init=train.WARMUP_LR * lr_scale, t_in_epochs=False)
    lr_min, rate = train.MIN_LR * lr_scale, settings.DECAY_RATE
    if settings.NAME == "step":
        decay = settings.DECAY_EPOCHS * updates_per_epoch
        return StepLRScheduler(optimizer, decay_t=decay, decay_rate=rate, warmup_prefix=False, **common)
    if settings.NAME == "multistep":
        # timm decays at the update before a milestone, and means to keep it so.
        decay = [epoch * updates_per_epoch + 1 for epoch in settings.MILESTONES]
        return MultiStepLRScheduler(optimizer, decay_t=decay, decay_rate=rate, warmup_prefix=False, **common)
    if settings.NAME == "linear":
        rest = max(1, updates - warmup)
        return PolyLRScheduler(
            optimizer, t_initial=rest, power=1.0, lr_min=lr_min, warmup_prefix=True, **common
        )
    return CosineLRScheduler(optimizer, t_initial=updates, lr_min=lr_min, **common)
