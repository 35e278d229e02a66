"""What timm's users expect of a model, besides ``forward_features`` and ``forward_head``."""

from torch import nn

from .export import image_size
from .macs import classifier_macs


class TimmInterface:
    """timm's methods, for MSGTransformer to inherit."""

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """Patch maps of chosen stages, before merging (timm's interface).

        Args:
            x: images (B, in_chans, height, width); with ``intermediates_only`` and without ``ape`` the sides
                may be any multiples of the model's size.
            indices: stages to return: a list, the last n for an int, all for None.
            norm: apply the final norm to the last stage's map.
            stop_early: accepted for timm; the stages after the last chosen one never run with
                intermediates_only.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: leave out the final tokens.

        Returns:
            The list of maps, or (final tokens, list of maps).

        Raises:
            ValueError: an image size, format or stage that does not exist.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}: use NCHW or NHWC")
        (x, height, width), size = image_size(x), self.img_size
        larger = (height, width) != (size, size)
        for_maps = intermediates_only and self.absolute_pos_embed is None
        if height % size or width % size or (larger and not for_maps):
            raise ValueError(
                f"images of {height}x{width}: use {size}x{size}, or for maps alone, without absolute "
                "positions, multiples of that"
            )
        chosen = stage_indices(indices, len(self.layers))
        scale_y, scale_x = height // size, width // size
        x, maps = self.embed(x), []
        for i, stage in enumerate(self.layers):
            rows, cols = scale_y * stage.windows, scale_x * stage.windows
            x = stage.forward_blocks(x)
            if i in chosen:
                y = stage.patch_map(x, rows, cols)
                y = self.norm(y) if norm and i + 1 == len(self.feature_info) else y
                maps.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
            if intermediates_only and i == max(chosen):
                break
            x = stage.merge(x, rows, cols) if stage.downsample is not None else x
        return maps if intermediates_only else (self.norm(x.squeeze(1)), maps)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Drop what :meth:`forward_intermediates` does not need for ``indices`` (timm's interface)."""
        chosen = stage_indices(indices, len(self.layers))
        self.layers = self.layers[: max(chosen) + 1]
        self.layers[-1].downsample = None
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def get_classifier(self):
        """The linear head."""
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        """Replace the head by a fresh one of ``num_classes`` outputs, 0 for none.

        Raises:
            ValueError: ``global_pool`` asks for a pooling that this model does not have.
        """
        if global_pool not in (None, "", "token" if self.tokens else "avg"):
            raise ValueError(
                f"global_pool {global_pool!r}: this model only has {'token' if self.tokens else 'avg'}"
            )
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.init_linear(head)
        self.head = head.to(weight.device, weight.dtype)

    def set_grad_checkpointing(self, enable=True):
        """Recompute every block in the backward pass instead of storing its activations."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse=False):
        """Patterns that group parameters by depth, for layer-wise learning rates (timm's interface)."""
        stem = r"^(?:absolute_pos_embed|msg_tokens|patch_embed)"
        if coarse:
            return dict(stem=stem, blocks=r"^layers\.(\d+)")
        return dict(
            stem=stem,
            blocks=[
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^layers\.(\d+)\.downsample", (99998,)),
                (r"^norm", (99999,)),
            ],
        )

    def no_weight_decay(self):
        """Names of the parameters that weight decay must leave alone, besides biases and 1-d ones."""
        kinds = ("msg_tokens", "absolute_pos_embed", "relative_position_bias_table", "rel_pos_msg")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def flops(self):
        """Multiply-accumulate operations for one image, under the name that Swin's models give them."""
        return classifier_macs(self)

    def __prepare_scriptable__(self):
        """What ``torch.jit.script`` asks first.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the model cannot be scripted: use torch.jit.trace or torch.export")


def feature_info(stages, patch_size):
    """What timm's ``features_only`` asks of each of the stages, given as a list of StageSizes."""
    return [
        dict(num_chs=sizes.dim, reduction=patch_size * 2**i, module=f"layers.{i}")
        for i, sizes in enumerate(stages)
    ]


def stage_indices(indices, stages):
    """Numbers of the chosen stages, from None (all), an int (the last n) or a list, -1 for the last stage."""
    if indices is None:
        return list(range(stages))
    if isinstance(indices, int):
        indices = range(stages - indices, stages)
    chosen = [i + stages if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < stages for i in chosen):
        raise ValueError(f"stage indices {list(indices)}: the model has stages 0 to {stages - 1}")
    return chosen
