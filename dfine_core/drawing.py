"""Boxes with captions, rendered into an image; one palette for everything that shows classes. Needs Pillow alone."""

import colorsys
from collections.abc import Callable, Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

HUE_STEP = 0.381966  # fraction of a turn, the golden angle: neighbouring labels get distant colours
PADDING = 2  # px between the text of a caption and its edge

Rectangle = tuple[float, float, float, float]  # xyxy
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def label_colour(label: int) -> tuple[int, int, int]:
    """RGB colour of a class."""
    red, green, blue = colorsys.hsv_to_rgb(label * HUE_STEP % 1, 0.9, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    captions: Sequence[str],
    *,
    bands: Sequence[tuple[Rectangle, Rectangle]] = (),
    sides: tuple[int, int] | None = None,
    font: Callable[[int], Font] = ImageFont.load_default,
) -> Image.Image:
    """Draw boxes on a copy of an image. A caption covers its own box only where the box leaves no room.

    Args:
        image: RGB.
        boxes: [K][4] xyxy in pixels of the image, most important first; may reach over its border.
        labels: [K] classes, which choose the colour.
        captions: [K].
        bands: [K] inner and outer box of each, if there are any; drawn as thin lines.
        sides: px, limits of the longer side of the copy, which is scaled to them; None keeps the size.
        font: font of a size in px.
    """
    # 1. Scale the image first, so that lines and text are sharp whatever its size.
    longest = max(image.size)
    scale = min(sides[1] / longest, max(sides[0] / longest, 1.0)) if sides else 1.0
    copy = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen = ImageDraw.Draw(copy)
    width, caption_font = max(2, max(copy.size) // 400), font(max(11, max(copy.size) // 60))
    rectangles = [_scaled(box, scale) for box in boxes]

    # 2. Boxes, the most important on top.
    for rectangle, label in reversed(list(zip(rectangles, labels, strict=True))):
        pen.rectangle(rectangle, outline=label_colour(label), width=width)
    for band, label in reversed(list(zip(bands, labels, strict=True))) if bands else ():
        for edges in band:
            if edges[0] < edges[2] and edges[1] < edges[3]:  # opposite edges of a small object may overlap
                pen.rectangle(_scaled(edges, scale), outline=label_colour(label), width=max(1, width // 3))

    # 3. Captions; the most important choose their position first.
    placed: list[Rectangle] = []
    for rectangle, label, caption in zip(rectangles, labels, captions, strict=True):
        left, top, right, bottom = pen.textbbox((0, 0), caption, font=caption_font)
        size = right - left + 2 * PADDING, bottom - top + 2 * PADDING
        area = place_caption(rectangle, size, copy.size, placed)
        placed.append(area)
        pen.rectangle(area, fill=label_colour(label))
        start = area[0] + PADDING - left, area[1] + PADDING - top
        pen.text(start, caption, fill=_caption_colour(label), font=caption_font)
    return copy


def place_caption(
    box: Rectangle, size: tuple[float, float], canvas: tuple[float, float], placed: Sequence[Rectangle]
) -> Rectangle:
    """Choose the position of a caption: outside of its box if the canvas has room there, clear of other captions if possible.

    Args:
        box: in pixels of the canvas; it may extend beyond it.
        size: width and height of the caption.
        canvas: width and height.
        placed: captions that are already on the canvas.
    """
    candidates = [_rectangle(corner, size) for corner in _corners(box, size, canvas)]
    outside = [area for area in candidates if not _overlap(area, box) and _fits(area, canvas)]
    left, top = (min(max(edge, 0), max(limit - side, 0)) for edge, side, limit in zip(box, size, canvas, strict=False))
    inside = [_rectangle((left, top), size)]
    return min(outside or inside, key=lambda area: sum(_overlap(area, other) for other in placed))


def _corners(box: Rectangle, size: tuple[float, float], canvas: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Upper left corners of a caption at the sides of a box, the usual ones first."""
    left, top, right, bottom = box
    width, height = size
    x = min(max(left, 0), max(canvas[0] - width, 0))
    y = min(max(top, 0), max(canvas[1] - height, 0))
    yield from ((x, top - height - 1), (max(right - width, 0), top - height - 1), (x, bottom + 1))
    yield from ((right + 1, y), (left - width - 1, y))


def _rectangle(corner: tuple[float, float], size: tuple[float, float]) -> Rectangle:
    return corner[0], corner[1], corner[0] + size[0], corner[1] + size[1]


def _fits(area: Rectangle, canvas: tuple[float, float]) -> bool:
    return area[0] >= 0 and area[1] >= 0 and area[2] <= canvas[0] and area[3] <= canvas[1]


def _overlap(one: Rectangle, other: Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _scaled(box: Sequence[float], scale: float) -> Rectangle:
    left, top, right, bottom = (scale * edge for edge in box)
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def _caption_colour(label: int) -> str:
    red, green, blue = label_colour(label)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
