"""Draw predictions: single images with their boxes, a contact sheet, and the refinement of a box by the decoder."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from dfine_core.drawing import Rectangle
from dfine_core.image_detections import inner_outer
from dfine_core.images import SUFFIXES
from dfine_core.inference import LoadedDetector, image_sizes, prepare
from pipeline import storage
from pipeline.drawing import draw_boxes, font, shortened
from pipeline.predict.inputs import InputImage, Inputs, decode_input, read_images
from pipeline.predict.plan import PredictPlan
from pipeline.predict.predicted_images import read_part

CELL = 320  # px, side of a contact sheet cell
NAME_BYTES = 120  # an image's name takes so many in the name of its drawing; file systems accept 255 in all
DRAWINGS_FOLDER, EXPLAINED_FOLDER, CONTACT_SHEET = "drawings", "explained", "contact_sheet.jpg"


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
    bands: Sequence[tuple[Rectangle, Rectangle]] = (),
) -> Image.Image:
    """Draw the best boxes on a copy that is scaled to a screen, see `draw_boxes`.

    Args:
        image: RGB.
        boxes: [K][4] xyxy in pixels of the image, best first.
        names: class names by label.
        bands: [K] inner and outer boxes, or none.
    """
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    return draw_boxes(image, boxes, labels, texts, bands=bands)


def contact_sheet(drawings: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Arrange titled drawings in a grid."""
    columns = max(1, math.ceil(math.sqrt(len(drawings))))
    line, gap = 20, 6
    rows = math.ceil(len(drawings) / columns)
    sheet = Image.new("RGB", (columns * (CELL + gap) + gap, rows * (CELL + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (title, drawing) in enumerate(drawings):
        x, y = gap + index % columns * (CELL + gap), gap + index // columns * (CELL + line + gap)
        small = drawing.copy()
        small.thumbnail((CELL, CELL))
        sheet.paste(small, (x + (CELL - small.width) // 2, y + (CELL - small.height) // 2))
        pen.text((x, y + CELL + 2), shortened(title, CELL, font(12)), fill="black", font=font(12))
    return sheet


# Drawings of a prediction


def write_drawings(
    out: str,
    inputs: Inputs,
    plan: PredictPlan,
    loaded: LoadedDetector,
    *,
    num_images: int,
    num_explanations: int,
) -> None:
    """Draw images spread evenly over the inputs, with a contact sheet.

    Args:
        num_images: images to draw.
        num_explanations: images for which the refinement of the best box is drawn, if its score reaches the threshold;
            `loaded` must not be deployed then.
    """
    names = [category.name for category in plan.categories]
    drawings: list[tuple[str, Image.Image]] = []
    for index, (source, row) in enumerate(_sample(out, inputs, plan, max(num_images, num_explanations))):
        image = decode_input(source)
        title = Path(source.file_name).name
        if index < num_images:
            boxes = np.reshape(row["boxes"], (-1, 4)).tolist()
            bands = [inner_outer(each) for each in np.reshape(row["edge_intervals"] or [], (-1, 4, 2)).tolist()]
            drawing = draw_detections(image, boxes, row["labels"], row["scores"], names, bands)
            drawings.append((f"{title}: {len(row['labels'])}", drawing))
            storage.write_atomic(storage.join(out, DRAWINGS_FOLDER, f"{drawing_name(source)}.jpg"), _jpeg(drawing))
        if index < num_explanations and row["labels"]:
            content = explanation(loaded, image, names, title)
            storage.write_atomic(storage.join(out, EXPLAINED_FOLDER, f"{drawing_name(source)}.png"), content)
    if drawings:
        storage.write_atomic(storage.join(out, CONTACT_SHEET), _jpeg(contact_sheet(drawings)))


def drawing_name(source: InputImage) -> str:
    """File name of a drawing, without its suffix: the id of the image, which is unique, and its name.

    A shard set may hold any text as a name. Only the part after the last slash is used, without characters that have a meaning
    in paths, and shortened to what file systems accept.
    """
    name = source.file_name.replace("\\", "/").rpartition("/")[2]
    stem = name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name
    plain = re.sub(r"[^\w.-]+", "_", stem).encode()[:NAME_BYTES].decode(errors="ignore")
    return f"{source.image_id}_{plain}"


def explanation(loaded: LoadedDetector, image: Image.Image, names: Sequence[str], title: str) -> bytes:
    """Draw how the decoder refined the best box of an image, as PNG; see `refinement_view`."""
    from pipeline.evaluation.figures import png  # matplotlib, which most predictions do without
    from pipeline.evaluation.sample_images import refinement_view

    _, output = loaded.predict(prepare([image], loaded.config.input_size), image_sizes([image]), every_layer=True)
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


def _sample(out: str, inputs: Inputs, plan: PredictPlan, count: int) -> Iterator[tuple[InputImage, dict[str, Any]]]:
    """Sample images evenly from the whole sequence, with their rows; those that could not be read are left out."""
    count = min(count, plan.num_images)
    last: tuple[int, pa.Table] | None = None
    for index in np.unique(np.linspace(0, plan.num_images - 1, count).round().astype(int)).tolist():
        part, position = divmod(index, plan.part_size)
        if last is None or last[0] != part:
            last = part, read_part(out, part)
        (row,) = last[1].slice(position, 1).to_pylist()
        (source,) = read_images(inputs, index, index + 1)
        if row["rejected"] is None and isinstance(source, InputImage):
            yield source, row


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()
