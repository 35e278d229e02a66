"""What an evaluation leaves for people, and how predictions are drawn."""

import os

import matplotlib
from PIL import Image, ImageDraw, ImageFont

BAR, INK, PAPER = "#9dc3ea", "#22262b", "#ffffff"


def font(size):
    """The font of all text on images, which comes with matplotlib; ``size`` in pixels."""
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def enlarged(image, side=224):
    """A PIL image by a whole factor larger, so that its long side has about ``side`` pixels; (image, factor).

    Pixels stay squares. Larger images, and those of extreme shapes, return as they are.
    """
    factor = max(1, round(side / max(image.size)))
    if factor == 1 or min(image.size) * factor < 16:
        return image, 1
    return image.resize([factor * n for n in image.size], Image.Resampling.NEAREST), factor


def caption(image, scores):
    """A PIL image, enlarged where it is small, above the classes that were predicted.

    Args:
        scores: (name, score) from the best down; the score, 0 to 1, is also the length of a bar.
    """
    image, _ = enlarged(image)
    width = max(224, image.width)
    size = min(40, max(13, width // 32))
    height, letters = int(1.5 * size), font(size)
    sheet = Image.new("RGB", (width, image.height + height * len(scores) + size // 2), PAPER)
    sheet.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    numbers = max([letters.getlength(f"{score:.3f}") for _, score in scores], default=0)
    for i, (name, score) in enumerate(scores):
        top = image.height + size // 4 + i * height
        draw.rectangle((0, top + 1, score * width, top + height - 1), fill=BAR)
        draw.text((size // 3, top + size // 5), f"{score:.3f}", fill=INK, font=letters)
        room = width - numbers - size
        draw.text((numbers + size, top + size // 5), fitting(name, letters, room), fill=INK, font=letters)
    return sheet


def fitting(text, letters, width):
    """The text, or as much of its beginning as fits into ``width`` pixels of the font ``letters``."""
    text = " ".join(text.split())
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
