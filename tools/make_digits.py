"""Write scikit-learn's bundled digits (1,797 real 8x8 scans) as an ImageFolder: 1,437 train, 360 val.

python tools/make_digits.py datasets/digits
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import check_environment


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="train/<digit>/<number>.png and val/<digit>/<number>.png go here")
    return parser.parse_args()


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    ARGS = parse_args()

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main(folder):
    """Write the folder; an image that is there already is written again with the same bytes."""
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=360, stratify=digits.target, random_state=0)
    for split, chosen in (("train", train), ("val", val)):
        for number in chosen:
            path = os.path.join(folder, split, str(digits.target[number]), f"{number:04d}.png")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            grey = np.round(digits.images[number] * 255 / 16).astype(np.uint8)
            Image.fromarray(grey).save(path)
    print(f"{folder}: {len(train)} training and {len(val)} validation images")


if __name__ == "__main__":
    main(ARGS.folder)
