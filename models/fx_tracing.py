"""What torch.fx meets instead of code that depends on the sizes of images.

torch.fx runs the model with stand-ins for tensors, which have no sizes. Stages, mergings and padding
therefore become single steps of the graph, through timm's list of what it does not look into, and layouts are
made when the graph runs.
"""

from types import SimpleNamespace

from timm.models import register_notrace_function, register_notrace_module
from torch import fx

from .geometry import require_size
from .msg_transformer import MSGTransformer, PatchMerging, Stage
from .padding import Layouts, pad_to_patches, resample_positions

for module in (Stage, PatchMerging):
    register_notrace_module(module)
for function in (pad_to_patches, resample_positions, require_size):
    register_notrace_function(function)


class TraceableMSGTransformer(MSGTransformer):
    """MSGTransformer that timm's ``create_feature_extractor`` takes too.

    A node ``layers.i`` gives the pair of patches (B, H, W, C) and messengers (B, H/w, W/w, C), the patches of
    the last one None if the head reads messengers.
    """

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.layouts = TraceableLayouts()

    def forward_features(self, x, read=None):
        """Images to what the head reads, as in :class:`MSGTransformer`."""
        if read is None or not isinstance(x, fx.Proxy):
            return super().forward_features(x, read)
        _, messengers = self.forward_stages(x, read=read)[-1]
        return self.read_features(None, messengers)


class TraceableLayouts(Layouts):
    """Layouts that a graph asks for when it runs."""

    def __reduce__(self):
        return TraceableLayouts, ()

    def of(self, extent, stage, x):
        """The layout of a stage, or the node of a graph that makes it; see :meth:`Layouts.of`."""
        if not isinstance(x, fx.Proxy):
            return super().of(extent, stage, x)
        sizes = stage.window_size, stage.shuffle_size, stage.tokens
        return x.tracer.create_proxy("call_function", stage_layout, (extent, *sizes, x), {})


def stage_layout(extent, window_size, shuffle_size, tokens, x):
    """The layout of a stage for maps x (B, H, W, C), or None if they consist of whole regions."""
    stage = SimpleNamespace(window_size=window_size, shuffle_size=shuffle_size, tokens=tokens)
    return Layouts().of(extent, stage, x)
