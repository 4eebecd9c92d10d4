"""Images that show single detections: ground truth next to detections, and the refinement of one box by the decoder."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dfine_core import Detector
from dfine_core.boxes import cxcywh_to_xyxy, iou
from dfine_core.inference import DEFAULT_THRESHOLD, predict_batch
from dfine_core.model import distribution
from dfine_core.structures import QueryPredictions
from dfine_core.uncertainty import edge_std
from pipeline.data.augment.decode import decode_rgb
from pipeline.data.augment.samples import plain_sample, without_crowd
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.drawing import MAX_BOXES, draw_boxes, font, png_bytes, shortened, side_by_side
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.evaluate import evaluation_mode
from pipeline.evaluation.figures import png

PANEL_SIDES = 640, 800  # px, limits of the longer side of an image next to another
TITLE_WIDTH = 440  # points, width of the left half of a refinement
EDGES = ("left", "top", "right", "bottom")


def ground_truth_and_detections(
    image: NDArray[np.uint8],
    true_boxes: NDArray[np.float32],
    true_labels: NDArray[np.integer],
    detections: DetectionTable,
    names: Sequence[str],
    thresholds: Sequence[float] | None = None,
) -> Image.Image:
    """Render the ground truth on the left, and detections that reach their threshold on the right.

    Args:
        image: [H, W, 3] RGB.
        true_boxes: [G, 4] xyxy in pixels.
        true_labels: [G].
        detections: of this image alone.
        names: class names by label.
        thresholds: least score by label; None: the default for all.
    """
    pixels = Image.fromarray(image)
    true_names = [names[label] for label in true_labels.tolist()]
    left = draw_boxes(pixels, true_boxes.tolist(), true_labels.tolist(), true_names, sides=PANEL_SIDES)

    least = np.full(len(names), DEFAULT_THRESHOLD) if thresholds is None else np.array(thresholds)
    kept = detections[detections.score >= least[detections.label]]
    rows = sorted(zip(kept.score.tolist(), kept.label.tolist(), kept.box.tolist(), strict=True), reverse=True)
    texts = [f"{names[label]} {score:.2f}" for score, label, _ in rows]
    right = draw_boxes(pixels, [box for *_, box in rows], [label for _, label, _ in rows], texts, sides=PANEL_SIDES)

    left_out = f", the best {MAX_BOXES} rendered" if len(rows) > MAX_BOXES else ""
    return side_by_side(
        [
            (f"ground truth: {len(true_boxes)}", left),
            (f"detections {_from_text(least)}: {len(rows)}{left_out}", right),
        ]
    )


def _from_text(least: NDArray[np.float64]) -> str:
    low, high = least.min(), least.max()
    return f"with a score of {low:g} or more" if low == high else "above the threshold of their class"


def refinement_view(
    image: NDArray[np.uint8],
    predictions: QueryPredictions,
    index: int,
    query: int,
    bins: Tensor,
    reg_scale: float,
    *,
    title: str = "",
    true_box: Tensor | None = None,
) -> Figure:
    """Render the refinement of one box by FDR: the initial box, the box after every layer, the distributions of its four edges.

    A band around each edge of the last box shows its uncertainty: one standard deviation to either side.

    Args:
        image: [H, W, 3] RGB, of any size; the whole input of the detector.
        predictions: `output.matching` of a batch, with edge distributions.
        index: index of the image in the batch.
        query: index of the query.
        bins: [N] values of W(n), the detector's `decoder.bins`.
        true_box: [4] cxcywh, normalised; rendered, with the offsets that lead to it, and compared with the boxes.
    """
    if predictions.edge_logits is None:
        raise ValueError("this detector regresses boxes directly (regression='direct'): it has no edge distributions")

    # 1. Boxes, edge distributions and deviations of this query, on the CPU.
    initial = predictions.initial_boxes[index, query].cpu()
    boxes = [initial, *predictions.boxes[:, index, query].cpu()]
    probabilities = predictions.edge_logits[:, index, query].float().softmax(-1).cpu().numpy()  # [L, 4, N]
    offsets = 100 * bins.cpu().numpy() / reg_scale  # percent of the initial box's width or height
    true_offsets = None
    if true_box is not None:
        true_box = true_box.cpu()
        true_offsets = 100 * distribution.true_offsets(initial, cxcywh_to_xyxy(true_box), reg_scale).numpy() / reg_scale
    last_layer = predictions.edge_logits[-1, index, query].float().softmax(-1)
    deviations = edge_std(last_layer, bins, predictions.initial_boxes[index, query], reg_scale)
    pixels = deviations.cpu().numpy() * np.tile(image.shape[1::-1], 2)

    # 2. Left the boxes, right the four edges.
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    shades = colormaps["plasma"](np.linspace(0.05, 0.85, len(boxes)))
    steps = figure.add_subplot(grid[:, :2])
    steps.set_title(shortened(title, TITLE_WIDTH, font(10)), fontsize=10, parse_math=False)
    _draw_steps(steps, image, boxes, shades, true_box)
    _draw_bands(steps, cxcywh_to_xyxy(boxes[-1]).numpy() * np.tile(image.shape[1::-1], 2), pixels, shades[-1])
    for edge, name in enumerate(EDGES):
        axes = figure.add_subplot(grid[edge // 2, 2 + edge % 2])
        true_offset = None if true_offsets is None else true_offsets[edge]
        _draw_distributions(axes, probabilities[:, edge], offsets, shades[1:], true_offset)
        axes.set_title(f"{name} edge: probability by offset, ± {pixels[edge]:.1f} px", fontsize=9)
        axes.set_xlabel(f"offset outwards, % of the {'height' if edge % 2 else 'width'}", fontsize=8)
    return figure


def _draw_steps(
    axes: Axes, image: NDArray[np.uint8], boxes: Sequence[Tensor], shades: NDArray[np.float64], true_box: Tensor | None
) -> None:
    """Draw the initial box, dotted, and that of every layer: normalised cxcywh."""
    size = np.tile(image.shape[1::-1], 2)
    _draw_image(axes, image)
    outlines = []
    if true_box is not None:
        outlines.append(cxcywh_to_xyxy(true_box).numpy() * size)
        _outline(axes, outlines[0], "lime", label="ground truth", width=3)
    for number, (box, shade) in enumerate(zip(boxes, shades, strict=True)):
        name = f"layer {number - 1}" if number else "initial"
        label = name if true_box is None else f"{name}, IoU {_iou(box, true_box):.2f}"
        outlines.append(cxcywh_to_xyxy(box).numpy() * size)
        _outline(axes, outlines[-1], shade, label=label, style="-" if number else ":")
    _zoom_to(axes, np.array(outlines), image.shape)
    axes.legend(loc="upper right", fontsize=8)


def _draw_bands(
    axes: Axes, box: NDArray[np.floating], deviations: NDArray[np.floating], colour: NDArray[np.float64]
) -> None:
    """Shade one standard deviation to either side of every edge: box [4] xyxy, deviations [4], in pixels."""
    left, top, right, bottom = box.tolist()
    for edge, (at, deviation) in enumerate(zip(box.tolist(), deviations.tolist(), strict=True)):
        corner = (left, at - deviation) if edge % 2 else (at - deviation, top)
        size = (right - left, 2 * deviation) if edge % 2 else (2 * deviation, bottom - top)
        axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="none", alpha=0.25))


def _draw_distributions(
    axes: Axes,
    probabilities: NDArray[np.float32],
    offsets: NDArray[np.floating],
    shades: NDArray[np.float64],
    true_offset: float | None,
) -> None:
    """Plot [L, N] over the bins, at equal distances although they widen outwards; `true_offset` leads to the true edge."""
    bins = np.arange(len(offsets))
    for row, shade in zip(probabilities, shades, strict=True):
        axes.plot(bins, row, color=shade, lw=1.5)
    if true_offset is not None:
        axes.axvline(float(np.interp(true_offset, offsets, bins)), color="limegreen", ls="--", lw=1.5)
    marked = np.unique(np.linspace(0, len(offsets) - 1, 9).round().astype(int))
    axes.set_xticks(marked, [f"{offsets[index]:+.3g}" for index in marked], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(0)


def sample_images(
    detector: Detector, shards: ShardSet, *, device: torch.device, count: int = 8, seed: int = 0
) -> Iterator[tuple[str, bytes]]:
    """Render `count` randomly sampled images, the same at every call: name and PNG.

    "images/<image id>" has ground truth and detections, "refinement/<image id>" the box with the highest score, layer by layer.
    """
    names = [category.name for category in shards.categories]
    for record in _sampled_records(shards, count, seed):
        output = detect_record(detector, record, device)
        image = decode_rgb(record.image, record.width, record.height)
        rendered = ground_truth_and_detections(image, output.true_boxes, output.true_labels, output.detections, names)
        yield f"images/{record.image_id}", png_bytes(rendered)
        if output.predictions.edge_logits is not None:
            yield f"refinement/{record.image_id}", png(best_refinement(detector, image, output, names))


def best_refinement(
    detector: Detector, image: NDArray[np.uint8], output: "SampleOutput", names: Sequence[str]
) -> Figure:
    """Render the refinement of the box with the highest score; see `refinement_view`."""
    logits = output.predictions.logits[-1, 0]
    query, label = divmod(int(logits.flatten().argmax()), detector.config.num_classes)
    box = output.predictions.boxes[-1, 0, query].cpu()
    return refinement_view(
        image,
        output.predictions,
        index=0,
        query=query,
        bins=detector.decoder.bins,
        reg_scale=detector.config.reg_scale,
        title=f"{names[label]} {float(logits[query, label].sigmoid()):.2f}",
        true_box=_nearest(box, output.normalised_boxes),
    )


@dataclass(frozen=True)
class SampleOutput:
    """Ground truth of one image, and what the detector finds in it."""

    true_boxes: NDArray[np.float32]  # [G, 4] xyxy in pixels, without crowd regions
    true_labels: NDArray[np.int32]  # [G]
    normalised_boxes: Tensor  # [G', 4] cxcywh, of the visible boxes
    predictions: QueryPredictions
    detections: DetectionTable


def detect_record(detector: Detector, record: ImageRecord, device: torch.device) -> SampleOutput:
    """Detect in one image, with the queries of every decoder layer."""
    boxes, labels = record.boxes[~record.crowd], record.labels[~record.crowd]
    sample = plain_sample(without_crowd(record), canvas=detector.config.input_size)
    pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None].to(device)
    size = torch.tensor([[record.width, record.height]], device=device)
    with evaluation_mode(detector), torch.no_grad(), torch.autocast(device.type, enabled=False):
        detections, output = predict_batch(detector, pixels, size, every_layer=True)
    assert output.matching is not None
    table = DetectionTable.from_batch(detections, torch.tensor([record.image_id]), padding=[False])
    return SampleOutput(boxes, labels, torch.from_numpy(sample.boxes).reshape(-1, 4), output.matching, table)


def _sampled_records(shards: ShardSet, count: int, seed: int) -> Iterator[ImageRecord]:
    images = shards.manifest.images
    numbers = np.random.default_rng(seed).choice(images, min(count, images), replace=False)
    yield from records_at(shards, np.sort(numbers).tolist())


def records_at(shards: ShardSet, numbers: Iterable[int]) -> Iterator[ImageRecord]:
    """Read images by their number in the order of the shards, which is that of `GroundTruth.image_id`."""
    source = locate_row_groups(shards)
    begins = np.cumsum(source.rows) - source.rows
    for number in numbers:
        group = int(np.searchsorted(begins, number, side="right")) - 1
        yield from records_from_table(read_row_groups(source, [group])[group].slice(number - begins[group], 1))


def _nearest(box: Tensor, candidates: Tensor) -> Tensor | None:
    """True box that a box overlaps most, None if it overlaps none: cxcywh."""
    if len(candidates) == 0:
        return None
    overlaps = iou(cxcywh_to_xyxy(candidates), cxcywh_to_xyxy(box))
    return candidates[overlaps.argmax()] if overlaps.max() > 0 else None


def _iou(a: Tensor, b: Tensor) -> float:
    return float(iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)))


def _draw_image(axes: Axes, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))  # pixel corners at integers, like those of boxes
    axes.axis("off")


def _outline(
    axes: Axes,
    box: NDArray[np.floating],
    colour: str | NDArray[np.float64],
    *,
    label: str,
    style: str = "-",
    width: float = 1.6,
) -> None:
    left, top, right, bottom = box.tolist()
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=width, ls=style, label=label)
    )


def _zoom_to(axes: Axes, boxes: NDArray[np.floating], shape: Iterable[int]) -> None:
    height, width, *_ = shape
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    room = 0.6 * np.maximum(high - low, 8)
    (left, top), (right, bottom) = np.maximum(low - room, 0), np.minimum(high + room, [width, height])
    if right > left and bottom > top:
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
