"""Write images whose answer needs two distant windows: a cue's colour says which of two digits to name.

python tools/make_cues.py datasets/cues

An image is black and has windows of 8 px. The one at the top left is the cue. Two digits from 0 to 4, real
8x8 scans of scikit-learn's, stand ``--distance`` windows to the right of it and as far below it. They are
never equal. The class is the digit on the right if the cue is red, and the digit below if it is blue.
examples.png shows eight of the images.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import check_environment


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", help="train/<digit>/<number>.png and val/<digit>/<number>.png go here")
    add("--distance", type=int, default=2, help="windows from the cue to a digit; default: %(default)s")
    add("--train", type=int, default=3200, help="training images; default: %(default)s")
    add("--val", type=int, default=1000, help="validation images; default: %(default)s")
    add("--seed", type=int, default=0, help="another one gives other images; default: %(default)s")
    args = parser.parse_args()
    if min(args.distance, args.train, args.val) < 1:
        parser.error("--distance, --train and --val must be 1 or more")
    return args


if __name__ == "__main__":  # before what takes seconds to import
    check_environment()
    ARGS = parse_args()

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from utils import UserError, telling_errors

WINDOW = 8  # pixels on a side, as many as a digit has
RED, BLUE = (220, 40, 40), (40, 80, 220)


def main(args):
    """Write the folder; the same command writes the same bytes again.

    Raises:
        UserError: the folder holds anything else.
    """
    folder, settings = Path(args.folder), {key: value for key, value in vars(args).items() if key != "folder"}
    note = folder / "cues.json"
    found = json.loads(note.read_text()) if note.exists() else None
    if found != settings and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something else than these images: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings) + "\n")
    digits = load_digits(n_class=5)
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=0.2, stratify=digits.target, random_state=0)
    for split, chosen, count in (("train", train, args.train), ("val", val, args.val)):
        rng = np.random.default_rng([args.seed, split == "val"])
        for number in range(count):
            image, name = compose(digits, chosen, args.distance, rng)
            path = folder / split / str(name) / f"{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    draw_examples(folder / "val", folder / "examples.png")
    print(f"{folder}: {args.train} training and {args.val} validation images")


def compose(digits, chosen, distance, rng):
    """An image (height, width, 3) of two of the chosen digits and a cue, and the digit to name."""
    right, below = rng.choice(chosen, 2)
    while digits.target[right] == digits.target[below]:
        below = rng.choice(chosen)
    image = np.zeros((distance + 1, WINDOW, distance + 1, WINDOW, 3), np.uint8)  # rows, columns, colours
    for (row, column), number in (((0, distance), right), ((distance, 0), below)):
        image[row, :, column] = np.round(digits.images[number] * 255 / 16)[:, :, None]
    red = rng.random() < 0.5
    image[0, :, 0] = RED if red else BLUE
    side = (distance + 1) * WINDOW
    return image.reshape(side, side, 3), digits.target[right if red else below]


def draw_examples(folder, path):
    """Draw the first eight images of a folder of classes, with their classes and the borders of windows."""
    files = sorted(folder.glob("*/*.png"), key=lambda file: file.name)[:8]
    figure = Figure((9, 1.35), layout="constrained")
    for axes, file in zip(figure.subplots(1, 8), files):
        image = np.asarray(Image.open(file))
        axes.imshow(image)
        for place in range(WINDOW, len(image), WINDOW):
            axes.axhline(place - 0.5, color="#888888", lw=0.8)
            axes.axvline(place - 0.5, color="#888888", lw=0.8)
        axes.set(title=file.parent.name, xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    with telling_errors():
        main(ARGS)
