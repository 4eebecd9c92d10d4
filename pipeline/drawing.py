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
    bands: Sequence[tuple[drawing.Rectangle, drawing.Rectangle]] = (),
    sides: tuple[int, int] = SIDES,
) -> Image.Image:
    """Draw the first `MAX_BOXES` boxes on a copy that is scaled to a screen; arguments as in `dfine_core.drawing`."""
    few = slice(MAX_BOXES)
    return drawing.draw_boxes(image, boxes[few], labels[few], captions[few], bands=bands[few], sides=sides, font=font)


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Arrange titled images of one height in a row; a panel is at least as wide as its title."""
    gap, title_font = 8, font(max(13, max(panels[0][1].size) // 50))
    line = 2 * title_font.size
    widths = [max(image.width, round(title_font.getlength(title))) for title, image in panels]
    row = Image.new("RGB", (sum(widths) + gap * (len(panels) + 1), round(line) + panels[0][1].height + gap), "white")
    pen, x = ImageDraw.Draw(row), gap
    for (title, image), width in zip(panels, widths, strict=True):
        pen.text((x + width / 2, line / 2), title, fill="black", font=title_font, anchor="mm")
        row.paste(image, (x + (width - image.width) // 2, round(line)))
        x += width + gap
    return row


def shortened(text: str, width: float, text_font: ImageFont.FreeTypeFont) -> str:
    """Shorten a text to a width in px; the start and the longer end stay, because names of one folder differ at their end."""
    if text_font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        start = kept // 4
        short = f"{text[:start]}…{text[len(text) - kept + start :]}"
        if text_font.getlength(short) <= width:
            return short
    return "…"


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
