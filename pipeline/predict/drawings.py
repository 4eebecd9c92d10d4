"""Pictures of what was detected: single images with their boxes, all of them on one page, and how the decoder refined one."""

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from dfine_core.images import read_image
from dfine_core.inference import LoadedDetector, prepare, sizes_of
from pipeline import storage
from pipeline.data.prepare.image_files import read_file
from pipeline.data.shards.manifest import Category
from pipeline.drawing import draw_boxes, font
from pipeline.evaluation.figures import png
from pipeline.evaluation.sample_images import refinement_view
from pipeline.predict.inputs import Inputs, Picture, read_pictures
from pipeline.predict.partition import Plan, read_part

CELL = 320  # px, side of a cell of the contact sheet
CONTACT_SHEET = "contact_sheet.jpg"


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
) -> Image.Image:
    """Draw the best boxes on a copy that is scaled to a screen, see `draw_boxes`.

    Args:
        image: RGB.
        boxes: [K][4] xyxy in pixels of the image, best first.
        names: class names by label.
    """
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    return draw_boxes(image, boxes, labels, texts)


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """All pictures on one page, each with its title."""
    columns = max(1, math.ceil(math.sqrt(len(pictures))))
    line, gap = 20, 6
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (CELL + gap) + gap, rows * (CELL + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (title, picture) in enumerate(pictures):
        x, y = gap + number % columns * (CELL + gap), gap + number // columns * (CELL + line + gap)
        small = picture.copy()
        small.thumbnail((CELL, CELL))
        sheet.paste(small, (x + (CELL - small.width) // 2, y + (CELL - small.height) // 2))
        shown = title if len(title) <= 44 else f"…{title[-43:]}"
        pen.text((x, y + CELL + 2), shown, fill="black", font=font(12))
    return sheet


# Of a prediction


def write_drawings(
    out: str,
    inputs: Inputs,
    plan: Plan,
    categories: Sequence[Category],
    loaded: LoadedDetector,
    *,
    pictures: int,
    explain: int,
) -> None:
    """Draw pictures from all over the inputs below `out`, and a contact sheet of them.

    Args:
        explain: of so many pictures also how the decoder refined its surest box; `loaded` must not be deployed then.
    """
    names = [category.name for category in categories]
    drawn: list[tuple[str, Image.Image]] = []
    for picture, row in _chosen(out, inputs, plan, max(pictures, explain)):
        image = _image(picture)
        title = Path(picture.file_name).name
        if len(drawn) < pictures:
            shown = draw_detections(
                image, np.reshape(row["boxes"], (-1, 4)).tolist(), row["labels"], row["scores"], names
            )
            drawn.append((f"{title}: {len(row['labels'])}", shown))
            storage.write_atomic(storage.join(out, f"pictures/{picture.image_id}.jpg"), _jpeg(shown))
        if explain > 0:
            explain -= 1
            content = explanation(loaded, image, names, title)
            storage.write_atomic(storage.join(out, f"explained/{picture.image_id}.png"), content)
    if drawn:
        storage.write_atomic(storage.join(out, CONTACT_SHEET), _jpeg(contact_sheet(drawn)))


def explanation(loaded: LoadedDetector, image: Image.Image, names: Sequence[str], title: str) -> bytes:
    """PNG of how the surest box of an image came about, see `refinement_view`."""
    _, output = loaded.predict(prepare([image], loaded.config.input_size), sizes_of([image]), every_layer=True)
    assert output.matching is not None
    logits = output.logits[0]
    query, label = divmod(int(logits.flatten().argmax()), loaded.config.num_classes)
    figure = refinement_view(
        np.asarray(image),
        output.matching,
        index=0,
        query=query,
        bins=loaded.detector.decoder.bins,
        reg_scale=loaded.config.reg_scale,
        title=f"{title}: {names[label]} {float(logits[query, label].sigmoid()):.2f}",
    )
    return png(figure)


def _chosen(out: str, inputs: Inputs, plan: Plan, count: int) -> Iterator[tuple[Picture, dict[str, Any]]]:
    """Pictures that could be read, evenly from the whole row, and their rows."""
    last: tuple[int, pa.Table] | None = None
    for number in np.unique(np.linspace(0, plan.pictures - 1, min(count, plan.pictures)).round().astype(int)).tolist():
        part, place = divmod(number, plan.part)
        if last is None or last[0] != part:
            last = part, read_part(out, part)
        (row,) = last[1].slice(place, 1).to_pylist()
        (picture,) = read_pictures(inputs, number, number + 1)
        if row["rejected"] is None and isinstance(picture, Picture):
            yield picture, row


def _image(picture: Picture) -> Image.Image:
    content = picture.content
    return read_image(read_file(content) if isinstance(content, str) else content)


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()
