"""The names under which ``timm.create_model`` knows the six models of the paper."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .msg_transformer import MSGTransformer

_UNTRAINED = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    interpolation="bicubic",
    crop_pct=224 / 256,
    first_conv="patch_embed.proj",
    classifier="head",
)
default_cfgs = generate_default_cfgs(
    {
        f"msg_{variant}{size}_p4_win7_224": _UNTRAINED
        for variant in ("", "cvpr22_")
        for size in ("tiny", "small", "base")
    }
)


def _create(variant, pretrained, defaults, kwargs):
    return build_model_with_cfg(
        MSGTransformer,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **dict(defaults, **kwargs),
    )


@register_model
def msg_tiny_p4_win7_224(pretrained=False, **kwargs):
    """MSG-Transformer-T of arXiv v1: 28.3M parameters, 4.6 GMACs."""
    return _create("msg_tiny_p4_win7_224", pretrained, dict(drop_path_rate=0.2), kwargs)


@register_model
def msg_small_p4_win7_224(pretrained=False, **kwargs):
    """MSG-Transformer-S of arXiv v1: 49.6M parameters, 8.9 GMACs."""
    defaults = dict(depths=(2, 2, 18, 2), drop_path_rate=0.3)
    return _create("msg_small_p4_win7_224", pretrained, defaults, kwargs)


@register_model
def msg_base_p4_win7_224(pretrained=False, **kwargs):
    """MSG-Transformer-B of arXiv v1: 87.8M parameters, 15.8 GMACs."""
    defaults = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
    return _create("msg_base_p4_win7_224", pretrained, defaults, kwargs)


def _cvpr22(**sizes):
    return dict(patch_embed="conv", downsample="conv", **sizes)


@register_model
def msg_cvpr22_tiny_p4_win7_224(pretrained=False, **kwargs):
    """MSG-Transformer-T of CVPR 2022: 25.1M parameters, 3.8 GMACs."""
    defaults = _cvpr22(embed_dim=64, depths=(2, 4, 12, 4), num_heads=(2, 4, 8, 16), drop_path_rate=0.1)
    return _create("msg_cvpr22_tiny_p4_win7_224", pretrained, defaults, kwargs)


@register_model
def msg_cvpr22_small_p4_win7_224(pretrained=False, **kwargs):
    """MSG-Transformer-S of CVPR 2022: 56.0M parameters, 8.5 GMACs."""
    defaults = _cvpr22(depths=(2, 4, 12, 4), drop_path_rate=0.3)
    return _create("msg_cvpr22_small_p4_win7_224", pretrained, defaults, kwargs)


@register_model
def msg_cvpr22_base_p4_win7_224(pretrained=False, **kwargs):
    """MSG-Transformer-B of CVPR 2022: 84.4M parameters, 14.3 GMACs."""
    defaults = _cvpr22(depths=(2, 4, 28, 4), drop_path_rate=0.5)
    return _create("msg_cvpr22_base_p4_win7_224", pretrained, defaults, kwargs)
