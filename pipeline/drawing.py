"""Renderings of evaluations, predictions and reports: the core's boxes, scaled to a screen and arranged in rows."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dfine_core import drawing

MAX_BOXES = 60  # rendered per image
SIDES = 640, 1600  # px, limits of the longer side of a drawing


def css_colour(label: int) -> str:
    """Colour of a class for a page."""
    return "#{:02x}{:02x}{:02x}".format(*drawing.label_colour(label))


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    captions: Sequence[str],
    *,
    sides: tuple[int, int] = SIDES,
) -> Image.Image:
    """Draw the first `MAX_BOXES` boxes on a copy that is scaled to a screen; arguments as in `dfine_core.drawing`."""
    few = slice(MAX_BOXES)
    return drawing.draw_boxes(image, boxes[few], labels[few], captions[few], sides=sides, font=font)


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
