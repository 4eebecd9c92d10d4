"""Boxes with labels, drawn onto images; one palette for evaluations, predictions and reports."""

import colorsys
import io
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MAX_BOXES = 60  # rendered per image
SIDES = 640, 1600  # px, limits of the longer side of a drawing
HUE_STEP = 0.381966  # fraction of a turn, the golden angle: neighbouring labels get distant colours
PADDING = 2  # px between a label's text and its edge

Rectangle = tuple[float, float, float, float]  # xyxy


def colour(label: int) -> tuple[int, int, int]:
    """RGB colour of a class."""
    red, green, blue = colorsys.hsv_to_rgb(label * HUE_STEP % 1, 0.9, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def css_colour(label: int) -> str:
    """Colour of a class for a page."""
    return "#{:02x}{:02x}{:02x}".format(*colour(label))


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
    *,
    sides: tuple[int, int] = SIDES,
) -> Image.Image:
    """Draw boxes on a copy that is scaled to a screen. A label covers its own box only where the box leaves no room.

    Args:
        image: RGB.
        boxes: [K][4] xyxy in pixels of the image, most important first; of these, `MAX_BOXES` are drawn.
        labels: [K] classes, which choose the colour.
        texts: [K] of the labels.
        sides: px, limits of the longer side of the drawing.
    """
    # 1. Scale the image first, so that lines and text are sharp whatever its size.
    longest = max(image.size)
    scale = min(sides[1] / longest, max(sides[0] / longest, 1.0))
    drawing = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen = ImageDraw.Draw(drawing)
    width, text_font = max(2, max(drawing.size) // 400), font(max(11, max(drawing.size) // 60))
    rectangles = [_scaled(box, scale) for box in boxes[:MAX_BOXES]]

    # 2. Boxes, the most important on top.
    for rectangle, label in reversed(list(zip(rectangles, labels, strict=False))):
        pen.rectangle(rectangle, outline=colour(label), width=width)

    # 3. Labels; the most important choose their position first.
    placed: list[Rectangle] = []
    for rectangle, label, text in zip(rectangles, labels, texts, strict=False):
        left, top, right, bottom = pen.textbbox((0, 0), text, font=text_font)
        size = right - left + 2 * PADDING, bottom - top + 2 * PADDING
        area = place_label(rectangle, size, drawing.size, placed)
        placed.append(area)
        pen.rectangle(area, fill=colour(label))
        pen.text((area[0] + PADDING - left, area[1] + PADDING - top), text, fill=_text_colour(label), font=text_font)
    return drawing


def place_label(
    box: Rectangle, size: tuple[float, float], canvas: tuple[int, int], placed: Sequence[Rectangle]
) -> Rectangle:
    """Choose the position of a label: outside of its box if the canvas has room there, clear of other labels if possible.

    Args:
        box: in pixels of the canvas; it may extend beyond it.
        size: width and height of the label.
        canvas: width and height.
        placed: labels that are already on the canvas.
    """
    candidates = [_rectangle(corner, size) for corner in _corners(box, size, canvas)]
    outside = [area for area in candidates if not _overlap(area, box) and _fits(area, canvas)]
    left, top = (min(max(edge, 0), max(limit - side, 0)) for edge, side, limit in zip(box, size, canvas, strict=False))
    inside = [_rectangle((left, top), size)]
    return min(outside or inside, key=lambda area: sum(_overlap(area, other) for other in placed))


def _corners(box: Rectangle, size: tuple[float, float], canvas: tuple[int, int]) -> Iterator[tuple[float, float]]:
    """Upper left corners of a label at the sides of a box, the usual ones first."""
    left, top, right, bottom = box
    width, height = size
    x = min(max(left, 0), max(canvas[0] - width, 0))
    y = min(max(top, 0), max(canvas[1] - height, 0))
    yield from ((x, top - height - 1), (max(right - width, 0), top - height - 1), (x, bottom + 1))
    yield from ((right + 1, y), (left - width - 1, y))


def _rectangle(corner: tuple[float, float], size: tuple[float, float]) -> Rectangle:
    return corner[0], corner[1], corner[0] + size[0], corner[1] + size[1]


def _fits(area: Rectangle, canvas: tuple[int, int]) -> bool:
    return area[0] >= 0 and area[1] >= 0 and area[2] <= canvas[0] and area[3] <= canvas[1]


def _overlap(one: Rectangle, other: Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _scaled(box: Sequence[float], scale: float) -> Rectangle:
    left, top, right, bottom = (scale * edge for edge in box)
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def _text_colour(label: int) -> str:
    red, green, blue = colour(label)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Arrange titled images of one height in a row."""
    gap, title_font = 8, font(max(13, max(panels[0][1].size) // 50))
    line = 2 * title_font.size
    width = sum(image.width for _, image in panels) + gap * (len(panels) + 1)
    row = Image.new("RGB", (width, round(line) + panels[0][1].height + gap), "white")
    pen, x = ImageDraw.Draw(row), gap
    for title, image in panels:
        pen.text((x + image.width / 2, line / 2), title, fill="black", font=title_font, anchor="mm")
        row.paste(image, (x, round(line)))
        x += image.width + gap
    return row


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Font of Matplotlib, which covers more characters than that of Pillow."""
    import matplotlib  # here: it is slow to import, and not every user of the palette draws

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
