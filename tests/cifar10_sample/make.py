"""Write logits.json: what the weights of msg_cifar10 give for the sample of CIFAR-10's test images.

The sample is every 50th image of each class by name, from the first on: 20 of 1,000. Images are stored as
PNG, since decoders of JPEG differ. Logits are computed in float64.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

import models

HERE = Path(__file__).parent
WEIGHTS = HERE.parents[1] / "weights" / "msg_cifar10" / "msg_cifar10.safetensors"


def write_logits():
    """Write the hash of the weights, how many images of the sample are right, and the logits of each."""
    model, transform, names = models.load(WEIGHTS)
    paths = sorted((HERE / "val").glob("*/*.png"))
    images = torch.stack([transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        logits = model.double()(images.double())
    right = sum(
        names[best] == path.parent.name for best, path in zip(logits.argmax(1).tolist(), paths, strict=True)
    )
    rows = [
        f'  "{path.parent.name}/{path.name}": {json.dumps([round(value, 6) for value in row])}'
        for path, row in zip(paths, logits.tolist(), strict=True)
    ]
    about = f' "sha256": "{hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()}",\n "right": {right},\n'
    lines = ",\n".join(rows)
    (HERE / "logits.json").write_text(f'{{\n{about} "logits": {{\n{lines}\n }}\n}}\n')
    print(f"{right} of {len(paths)} images are right")


if __name__ == "__main__":
    write_logits()
