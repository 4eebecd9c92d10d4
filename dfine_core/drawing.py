"""Boxes rendered into an image, each with its caption beside it; needs Pillow alone."""

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

HUE_STEP = 0.381966  # share of the circle, the golden angle: neighbouring labels get colours far apart


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], captions: Sequence[str]
) -> Image.Image:
    """Draw boxes into a copy of an image; earlier ones lie on top.

    A caption stands above its box, or below it where there is no room, and inside only if the box fills the height.

    Args:
        image: RGB.
        boxes: [K][4] xyxy in its pixels; may reach over its border.
        labels: [K], one colour each.
        captions: [K].
    """
    copy = image.copy()
    pen = ImageDraw.Draw(copy)
    width = max(2, max(copy.size) // 400)
    font = ImageFont.load_default(max(11, max(copy.size) // 60))
    for box, label, caption in reversed(list(zip(boxes, labels, captions, strict=True))):
        left, right = sorted((box[0], box[2]))
        top, bottom = sorted((box[1], box[3]))
        pen.rectangle((left, top, right, bottom), outline=label_colour(label), width=width)
        _, _, text_width, text_height = (round(edge) + 2 for edge in pen.textbbox((0, 0), caption, font=font))
        x = max(0, min(left, copy.width - text_width))
        y = _caption_top(top, bottom, text_height, copy.height)
        pen.rectangle((x, y, x + text_width, y + text_height - 1), fill=label_colour(label))
        pen.text((x + 1, y), caption, fill="white", font=font)
    return copy


def label_colour(label: int) -> tuple[int, int, int]:
    """RGB colour of a class, dark enough for white text."""
    red, green, blue = colorsys.hsv_to_rgb(label * HUE_STEP % 1, 0.9, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _caption_top(top: float, bottom: float, text_height: int, image_height: int) -> float:
    if top >= text_height:
        return top - text_height
    below = bottom + 1
    return below if below + text_height <= image_height else max(0.0, top)
