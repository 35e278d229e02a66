"""What several test files need: reference numbers, small models, small image folders, runs of main.py."""

import argparse
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import get_config
from models.msg_transformer import MSGTransformer

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"
CVPR22 = dict(patch_embed="conv", downsample="conv")
CVPR22_TINY = dict(CVPR22, embed_dim=64, depths=(2, 4, 12, 4), num_heads=(2, 4, 8, 16))
MICRO = dict(
    img_size=32,
    patch_size=2,
    num_classes=10,
    embed_dim=48,
    depths=(2, 2, 2),
    num_heads=(3, 6, 12),
    window_size=4,
    shuffle_size=(4, 2, 1),
)


def reference(name):
    """A file of reference numbers."""
    return json.loads((REFERENCE / name).read_text())


def fill_weights(model):
    """Fill parameters with the pseudo-random values under which the reference numbers were made."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            r = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * r if name.endswith("weight") else 0.1 * r)
            elif any(part in name for part in ("msg", "bias_table", "pos_embed")):
                parameter.copy_(0.5 * r)
            else:
                parameter.copy_(r / parameter[0].numel() ** 0.5)
    return model


def golden_images(size):
    """The two images under which the reference numbers were made."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2021), dtype=torch.float64)


def micro(**changes):
    """A micro model in evaluation mode, with the reference weights."""
    return fill_weights(MSGTransformer(**dict(MICRO, drop_path_rate=0.0, **changes))).eval()


def digits_config(*opts, **flags):
    """The digits config, changed by --opts words and by flags."""
    cfg = str(ROOT / "configs" / "digits.yaml")
    return get_config(argparse.Namespace(cfg=cfg, opts=list(map(str, opts)), **flags))


def write_images(folder, per_class, classes=("a", "b", "c"), size=32, seed=0):
    """Write an ImageFolder split of small noise images, each class with its own mean colour."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        for i in range(per_class):
            pixels = rng.integers(0, 128, (size, size, 3)) + np.eye(3)[label % 3] * 100
            Image.fromarray(pixels.astype(np.uint8)).save(os.path.join(folder, name, f"{i}.png"))


def run_main(*arguments, processes=1, check=True, timeout=300):
    """Run main.py as a user would, on the CPU; more processes go through torchrun.

    Returns:
        The finished process, with stdout and stderr as text.
    """
    command = [sys.executable, "main.py"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "main.py"]
    command += [*map(str, arguments), "--device", "cpu"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done
