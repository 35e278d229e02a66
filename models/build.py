"""From a config to a model."""

import difflib

import timm

from utils import UserError

from .fast.apex import choose_layer_norm
from .fast.cpu import use_onednn
from .geometry import fit_regions
from .msg_transformer import MSGTransformer


def build_model(config, shuffle_size=None):
    """Build the classifier that ``config.MODEL`` and ``config.DATA.IMG_SIZE`` describe, freshly initialised.

    Args:
        shuffle_size: windows on a side of a shuffle region in each stage; None for what :func:`regions` says.

    Raises:
        UserError: a combination that cannot be built; the message names the key to change.
    """
    if config.MODEL.TYPE == "timm":
        model = _build_timm(config)
    else:
        model = _build_msg(config, shuffle_size or regions(config))
    if config.TRAIN.USE_CHECKPOINT:
        _checkpoint_gradients(model)
    use_onednn(model)
    return model


def regions(config):
    """``MODEL.MSG.SHUF_SIZE`` as a classifier has it: fitted to ``DATA.IMG_SIZE``."""
    msg = config.MODEL.MSG
    exchange = msg.TOKENS and msg.MANIP_TYPE != "none"
    sizes = msg.PATCH_SIZE, msg.WINDOW_SIZE, msg.EMBED_DIM
    return fit_regions(msg.SHUF_SIZE, config.DATA.IMG_SIZE, *sizes, exchange)


def _build_msg(config, shuffle_size):
    msg = config.MODEL.MSG
    arguments = dict(
        img_size=config.DATA.IMG_SIZE,
        patch_size=msg.PATCH_SIZE,
        in_chans=msg.IN_CHANS,
        num_classes=config.MODEL.NUM_CLASSES,
        embed_dim=msg.EMBED_DIM,
        depths=msg.DEPTHS,
        num_heads=msg.NUM_HEADS,
        window_size=msg.WINDOW_SIZE,
        mlp_ratio=msg.MLP_RATIO,
        qkv_bias=msg.QKV_BIAS,
        qk_scale=msg.QK_SCALE,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        ape=msg.APE,
        patch_norm=msg.PATCH_NORM,
        shuffle_size=shuffle_size,
        manip_type=msg.MANIP_TYPE,
        tokens=msg.TOKENS,
        patch_embed=msg.PATCH_EMBED,
        downsample=msg.DOWNSAMPLE,
        attention=msg.ATTENTION,
        global_pool=msg.HEAD if msg.TOKENS else "avg",
        norm_layer=choose_layer_norm(config)[0],
    )
    try:
        return MSGTransformer(**arguments)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"a model of these sizes cannot be made ({str(error).splitlines()[0]}): lower "
            "MODEL.MSG.EMBED_DIM, MLP_RATIO or DEPTHS, or MODEL.NUM_CLASSES"
        ) from error


def _build_timm(config):
    """Any classifier of timm, to compare with; its weights are new whatever its name promises."""
    name, arguments = config.MODEL.TIMM_NAME, dict(config.MODEL.TIMM_ARGS)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        raise UserError(
            f"MODEL.TIMM_NAME {name!r} is no model of timm {timm.__version__}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    given = dict(
        num_classes=config.MODEL.NUM_CLASSES,
        in_chans=config.MODEL.MSG.IN_CHANS,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        img_size=config.DATA.IMG_SIZE,
    )
    if twice := sorted(given.keys() & arguments.keys()):
        raise UserError(f"MODEL.TIMM_ARGS.{twice[0]} has a key of its own: see config.py")
    while True:
        try:
            return timm.create_model(name, pretrained=False, **given, **arguments)
        except Exception as error:
            # Convolutional networks take any size, and are not told it; some networks drop no paths.
            if "unexpected keyword argument 'img_size'" in str(error) and given.pop("img_size", None):
                continue
            unused = "unexpected keyword argument 'drop_path_rate'" in str(error)
            if unused and given.get("drop_path_rate") == 0:
                del given["drop_path_rate"]
                continue
            hint = "set MODEL.DROP_PATH_RATE 0" if unused else "see MODEL.TIMM_ARGS and DATA.IMG_SIZE"
            reason = str(error).split("\n")[0]
            raise UserError(f"timm cannot build {name} ({type(error).__name__}: {reason}): {hint}") from error


def _checkpoint_gradients(model):
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError, NotImplementedError) as error:
        reason = "this model cannot checkpoint its gradients: leave TRAIN.USE_CHECKPOINT False"
        raise UserError(reason) from error
