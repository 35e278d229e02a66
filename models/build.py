"""From a config to a model."""

from utils import UserError

from .apex import choose_layer_norm
from .cpu import use_onednn
from .msg_transformer import MSGTransformer


def build_model(config):
    """Build the classifier that ``config.MODEL`` and ``config.DATA.IMG_SIZE`` describe, freshly initialised.

    ``IMG_SIZE`` is a side or [height, width]. On the CPU its linear layers run through oneDNN.

    Raises:
        UserError: a combination that cannot be built; the message names the key to change.
    """
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
        shuffle_size=msg.SHUF_SIZE,
        manip_type=msg.MANIP_TYPE,
        tokens=msg.TOKENS,
        patch_embed=msg.PATCH_EMBED,
        downsample=msg.DOWNSAMPLE,
        attention=msg.ATTENTION,
        global_pool=msg.HEAD if msg.TOKENS else "avg",
        norm_layer=choose_layer_norm(config)[0],
    )
    try:
        model = MSGTransformer(**arguments)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"a model of these sizes cannot be made ({str(error).splitlines()[0]}): lower "
            "MODEL.MSG.EMBED_DIM, MLP_RATIO or DEPTHS, or MODEL.NUM_CLASSES"
        ) from error
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    use_onednn(model)
    return model
