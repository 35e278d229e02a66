"""torch.compile for training and evaluation."""

import logging
import time


def compile_model(model):
    """Compile a model in place, for one batch size at a time; it stays the same module with the same state.

    Training, evaluation and a smaller last batch have a graph each; no part runs uncompiled. The log says how
    long each takes when it happens.
    """
    from torch._dynamo import config as dynamo
    from torch._dynamo.callback import on_compile_end, on_compile_start  # PyTorch tells this in no public way

    dynamo.recompile_limit = 1000  # of graphs: by default the ninth size is an error
    # Split graphs let gradients travel during the backward pass. On a CPU both would take the same cores.
    dynamo.optimize_ddp = next(model.parameters()).device.type != "cpu"
    logger, begin = logging.getLogger("msg_transformer"), []
    on_compile_start(lambda *_: begin.append(time.monotonic()))
    on_compile_end(lambda *_: logger.info(f"torch.compile took {time.monotonic() - begin.pop():.0f} s"))
    model.compile(fullgraph=True, dynamic=False)
