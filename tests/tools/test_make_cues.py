"""Images of a cue and two digits: what they show is what their folders say."""

import argparse

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tools import make_cues
from utils import UserError

DIGITS = load_digits(n_class=5)
NUMBERS = {image.astype(int).tobytes(): number for number, image in enumerate(DIGITS.images)}


def write(folder, distance=1, seed=0):
    settings = dict(distance=distance, train=200, val=100, seed=seed)
    make_cues.main(argparse.Namespace(folder=str(folder), **settings))
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*/*.png"))}


def read(path):
    """Whether the cue is red, and the numbers of the digits right of and below it, found by their pixels."""
    pixels = np.asarray(Image.open(path)).astype(int)
    cue, right, below = pixels[:8, :8], pixels[:8, -8:], pixels[-8:, :8]
    digits = [NUMBERS[np.round(window[..., 0] * 16 / 255).astype(int).tobytes()] for window in (right, below)]
    assert np.ptp(right, axis=2).max() == np.ptp(below, axis=2).max() == 0  # grey
    red, _, blue = cue.reshape(-1, 3).mean(0)
    pixels[:8, :8] = pixels[:8, -8:] = pixels[-8:, :8] = 0
    assert not pixels.any()
    return red > blue, *digits


@pytest.mark.parametrize("distance", [1, 2, 4])
def test_the_cue_says_which_of_two_digits_is_the_class(tmp_path, distance):
    write(tmp_path, distance)
    used = {}
    for split in ("train", "val"):
        found = [(path.parent.name, *read(path)) for path in tmp_path.glob(f"{split}/*/*.png")]
        for name, red, right, below in found:
            classes = DIGITS.target[right], DIGITS.target[below]
            assert name == str(classes[0 if red else 1])
            assert classes[0] != classes[1]  # so that half is the most for whoever cannot see the cue
        assert 0.35 < np.mean([red for _, red, _, _ in found]) < 0.65
        used[split] = {number for _, _, right, below in found for number in (right, below)}
    assert len(used["train"] | used["val"]) > 300 and used["train"].isdisjoint(used["val"])


def test_a_seed_gives_the_same_bytes_every_time(tmp_path):
    first, second, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", seed=1)
    assert len(first) == 300 and first == second == write(tmp_path / "a")
    assert sorted(first.values()) != sorted(other.values())


def test_a_folder_with_anything_else_is_left_alone(tmp_path):
    write(tmp_path / "cues", distance=1)
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "cues"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="choose another folder"):
            write(folder, distance=2)
        assert sorted(tmp_path.rglob("*")) == before
