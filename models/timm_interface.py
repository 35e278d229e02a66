"""What timm's users expect of a model, besides ``forward_features`` and ``forward_head``."""

from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn

import checkpoint as ckpt
from checkpoint.resize import resize_table

from .geometry import known_pool, known_sides, known_window, patch_grid
from .macs import classifier_macs


class TimmInterface:
    """timm's methods, for MSGTransformer to inherit."""

    @property
    def in_chans(self):
        """Channels of the images."""
        return self.patch_embed.proj.in_channels

    @property
    def output_fmt(self):
        """timm's word for what :meth:`forward_features` gives: a map, or tokens with the messenger first."""
        return "NLC" if self.global_pool == "token" else "NHWC"

    def set_input_size(self, img_size=None, *, window_size=None):
        """Make the model for images of another size, or give it other windows (timm's interface).

        Images of any size are taken without this, which sets the windows, resamples absolute positions once,
        and counts for ``strict_img_size`` and :meth:`flops`. Shuffle regions keep their number of windows.
        Parameters that are resized are new objects: an optimizer comes after this.

        Args:
            img_size: side of the images in pixels, or (height, width); None for what it is.
            window_size: tokens on a side of a window; None for what it is. Position biases are resized.

        Raises:
            ValueError: sizes that do not exist, or images smaller than a patch. Nothing has changed then.
        """
        sides = self.img_size if img_size is None else known_sides(img_size, self.patch_size)
        window_size = self.layers[0].window_size if window_size is None else known_window(window_size)
        grid = patch_grid(sides, self.patch_size)
        if self.absolute_pos_embed is not None and grid != self.grid_size:
            sizes = dict(old_size=list(self.grid_size), num_prefix_tokens=0)
            positions = resample_abs_pos_embed(self.absolute_pos_embed.detach(), list(grid), **sizes)
            self.absolute_pos_embed = _like(self.absolute_pos_embed, positions)
        self.img_size, self.grid_size = sides, grid
        for stage in self.layers:
            if window_size == stage.window_size:
                continue
            stage.window_size = window_size
            for block in stage.blocks:
                table = block.attn.relative_position_bias_table
                resized = resize_table(table.detach(), window_size)
                block.attn.relative_position_bias_table = _like(table, resized)
                block.attn.set_index(window_size)
        # From these, newer versions of timm build the model again.
        self._traits = dict(getattr(self, "_traits", {}), img_size=sides)
        self._model_args = dict(getattr(self, "_model_args", {}), img_size=sides, window_size=window_size)

    def load_pretrained(self, path, prefix=""):
        """Load a file as ``--pretrained`` does: timm calls this where ``pretrained_cfg`` has ``custom_load``.

        Args:
            path: a file, or an https address.
            prefix: accepted for timm; names have none.

        Raises:
            CheckpointError: no such file, damaged, or of another model.
        """
        try:
            ckpt.load_weights(self, ckpt.read_weights(path), path, new_head=True)
        except ckpt.CheckpointError as error:
            raise ckpt.CheckpointError(
                f"pretrained weights: {error}. Take the file from the repository again (git checkout), or "
                "create the model with pretrained=False"
            ) from error

    def forward_intermediates(
        self,
        x,
        indices=None,
        norm=False,
        stop_early=False,
        output_fmt="NCHW",
        intermediates_only=False,
        output_dict=False,
        return_prefix_tokens=False,
    ):
        """Patch maps of chosen stages, before merging (timm's interface).

        Args:
            x: images (B, in_chans, height, width).
            indices: stages to return: a list, the last n for an int, all for None.
            norm: apply the final norm to the last stage's map.
            stop_early: accepted for timm; ``intermediates_only`` stops after the last chosen stage.
            output_fmt: ``NCHW``, ``NHWC`` or ``NLC``.
            intermediates_only: leave out what the head reads.
            output_dict: return a dict of ``image_intermediates``, ``image_intermediates_prefix`` and
                ``image_features``, what the head reads.
            return_prefix_tokens: make pairs of maps and messengers (B, windows, C).

        Returns:
            The list of maps; unless ``intermediates_only``, what the head reads and the list.

        Raises:
            ValueError: a format that does not exist, or messengers of a model without them.
            AssertionError: stages that do not exist.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r}: use NCHW, NHWC or NLC")
        if return_prefix_tokens and not self.tokens:
            raise ValueError("return_prefix_tokens: this model has no messengers")
        chosen, last = feature_take_indices(len(self.layers), indices)
        stages = self.forward_stages(x, count=1 + last if intermediates_only else None)
        maps, prefixes = [], []
        for i in sorted(chosen):
            normed = norm and i + 1 == len(self.feature_info)
            patches, *messengers = (self.norm(y) if normed else y for y in stages[i] if y is not None)
            if output_fmt != "NHWC":
                patches = patches.permute(0, 3, 1, 2) if output_fmt == "NCHW" else patches.flatten(1, 2)
            maps.append(patches)
            prefixes += [y.flatten(1, 2) for y in messengers]
        features = None if intermediates_only else self.read_features(*stages[-1])
        if output_dict:
            parts = dict(
                image_intermediates=maps,
                image_intermediates_prefix=prefixes if return_prefix_tokens else None,
                image_features=features,
            )
            return {name: part for name, part in parts.items() if part is not None}
        if return_prefix_tokens:
            maps = list(zip(maps, prefixes))
        return maps if intermediates_only else (features, maps)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Drop what :meth:`forward_intermediates` does not need for ``indices`` (timm's interface)."""
        chosen, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
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

        Args:
            global_pool: what it reads, as for the model; None for what is read now.

        Raises:
            ValueError: ``global_pool`` asks for a pooling that this model does not have.
        """
        if global_pool is not None:
            self.global_pool = known_pool(global_pool, self.tokens)
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.init_linear(head)
        self.head = head.to(weight.device, weight.dtype)

    @staticmethod
    def init_linear(module):
        """Truncated normal of std 0.02 for a linear layer's weight, 0 for its bias; nothing else."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable=True):
        """Recompute every block in the backward pass instead of storing its activations."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse=False):
        """Patterns that group parameters by depth, for layer-wise learning rates (timm's interface).

        The layers are those of timm's Swin: a merging belongs to the block after it, the final norm to the
        last block. What a pattern ends with, 99999, means to timm that it joins the layer before.
        """
        stem = r"^(?:absolute_pos_embed|msg_tokens|patch_embed)"
        if coarse:
            return dict(stem=stem, blocks=r"^layers\.(\d+)")
        return dict(
            stem=stem,
            blocks=[
                (r"^layers\.([1-9]\d*)\.blocks\.0\.", (-1, 99999)),
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
        """Multiply-accumulate operations for one image, under Swin's name for them."""
        return classifier_macs(self)

    def __prepare_scriptable__(self):
        """Refuse what ``torch.jit.script`` asks for first."""
        raise NotImplementedError("the model cannot be scripted: use torch.jit.trace or torch.export")


def _like(parameter, values):
    """A parameter of other values that trains if this one does."""
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def feature_info(stages, patch_size):
    """What timm's ``features_only`` asks of each of the stages, given as a list of StageSizes."""
    return [
        dict(num_chs=sizes.dim, reduction=patch_size * 2**i, module=f"layers.{i}")
        for i, sizes in enumerate(stages)
    ]
