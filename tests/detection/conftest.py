"""The images of small COCO files."""

import pytest
from PIL import Image


@pytest.fixture
def small(tmp_path):
    """A folder with the images of :func:`test_coco.small_content`."""
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path
