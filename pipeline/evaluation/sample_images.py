"""Detections beside the truth, and how the decoder refined one box, as pictures of single images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from dfine_core.boxes import cxcywh_to_xyxy, iou
from dfine_core.config import ModelConfig
from dfine_core.inference import DEFAULT_THRESHOLD, predict_batch
from dfine_core.model import distribution
from dfine_core.structures import QueryPredictions
from pipeline.data.augment.decode import decode_rgb
from pipeline.data.augment.samples import plain_sample, without_crowd
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.evaluate import evaluation_mode

MOST_DRAWN = 60  # detections of one picture
EDGES = ("left", "top", "right", "bottom")
HUE_STEP = 0.381966  # of the circle, the golden angle: labels near each other get colours far apart


def picture(
    image: NDArray[np.uint8],
    true_boxes: NDArray[np.float32],
    true_labels: NDArray[np.integer],
    detections: DetectionTable,
    names: Sequence[str],
    threshold: float = DEFAULT_THRESHOLD,
) -> Figure:
    """The truth on the left, detections of at least `threshold` on the right.

    Args:
        image: [H, W, 3].
        true_boxes: [G, 4] xyxy in pixels.
        true_labels: [G].
        detections: of this image alone.
    """
    kept = detections[detections.score >= threshold]
    figure, (left, right) = _beside_each_other(image)
    for box, label in zip(true_boxes, true_labels.tolist(), strict=True):
        _draw_box(left, box, _colour(label), names[label])
    best_last = sorted(zip(kept.score.tolist(), kept.label.tolist(), kept.box.tolist(), strict=True))[-MOST_DRAWN:]
    for score, label, box in best_last:
        _draw_box(right, np.asarray(box), _colour(label), f"{names[label]} {score:.2f}")
    left.set_title(f"truth: {len(true_boxes)}", fontsize=10)
    left_out = f", the best {len(best_last)} shown" if len(best_last) < len(kept) else ""
    right.set_title(f"detections scored {threshold:g} or more: {len(kept)}{left_out}", fontsize=10)
    return figure


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
    """One box as FDR made it: the initial box, the box after every layer, the distributions of its four edges.

    A band around each edge of the last box shows how unsure it is: one standard deviation to either side.

    Args:
        image: [H, W, 3] of any size, as a whole what the detector saw.
        predictions: `output.matching` of a batch, with edge distributions.
        index: of the image in the batch.
        query: of the image.
        bins: [N] values of W(n), the detector's `decoder.bins`.
        true_box: [4] cxcywh, normalised; shown, with the offsets that lead to it, and measured against.
    """
    if predictions.edge_logits is None:
        raise ValueError("this detector regresses boxes directly (regression='direct'): it has no edge distributions")
    initial = predictions.initial_boxes[index, query].cpu()
    boxes = [initial, *predictions.boxes[:, index, query].cpu()]
    probabilities = predictions.edge_logits[:, index, query].float().softmax(-1).cpu().numpy()  # [L, 4, N]
    offsets = 100 * bins.cpu().numpy() / reg_scale  # percent of the initial box's width or height
    wanted = None
    if true_box is not None:
        true_box = true_box.cpu()
        wanted = 100 * distribution.true_offsets(initial, cxcywh_to_xyxy(true_box), reg_scale).numpy() / reg_scale

    deviations = distribution.edge_deviations(
        predictions.initial_boxes[index, query], predictions.edge_logits[-1, index, query], bins, reg_scale
    )
    pixels = deviations.cpu().numpy() * np.tile(image.shape[1::-1], 2)

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    shades = colormaps["plasma"](np.linspace(0.05, 0.85, len(boxes)))
    steps = figure.add_subplot(grid[:, :2])
    steps.set_title(title, fontsize=10, parse_math=False)
    _draw_steps(steps, image, boxes, shades, true_box)
    _draw_bands(steps, cxcywh_to_xyxy(boxes[-1]).numpy() * np.tile(image.shape[1::-1], 2), pixels, shades[-1])
    for edge, name in enumerate(EDGES):
        axes = figure.add_subplot(grid[edge // 2, 2 + edge % 2])
        _draw_distributions(axes, probabilities[:, edge], offsets, shades[1:], None if wanted is None else wanted[edge])
        axes.set_title(f"{name} edge: probability by offset, ± {pixels[edge]:.1f} px", fontsize=10)
        axes.set_xlabel(f"offset outwards, % of the {'height' if edge % 2 else 'width'}", fontsize=8)
    return figure


def _draw_steps(
    axes: Axes, image: NDArray[np.uint8], boxes: Sequence[Tensor], shades: NDArray[np.float64], true_box: Tensor | None
) -> None:
    """The initial box, dotted, and that of every layer: normalised cxcywh."""
    size = np.tile(image.shape[1::-1], 2)
    _show(axes, image)
    drawn = []
    if true_box is not None:
        drawn.append(cxcywh_to_xyxy(true_box).numpy() * size)
        _draw_box(axes, drawn[0], "lime", label="truth", width=3)
    for number, (box, shade) in enumerate(zip(boxes, shades, strict=True)):
        name = f"layer {number - 1}" if number else "initial"
        label = name if true_box is None else f"{name}, IoU {_iou(box, true_box):.2f}"
        drawn.append(cxcywh_to_xyxy(box).numpy() * size)
        _draw_box(axes, drawn[-1], shade, label=label, style="-" if number else ":")
    _zoom_to(axes, np.array(drawn), image.shape)
    axes.legend(loc="upper right", fontsize=8)


def _draw_bands(
    axes: Axes, box: NDArray[np.floating], deviations: NDArray[np.floating], colour: NDArray[np.float64]
) -> None:
    """One standard deviation to either side of every edge: box [4] xyxy, deviations [4], in pixels."""
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
    wanted: float | None,
) -> None:
    """[L, N] over the bins, which are drawn side by side although they widen outwards; `wanted` leads to the true edge."""
    places = np.arange(len(offsets))
    for row, shade in zip(probabilities, shades, strict=True):
        axes.plot(places, row, color=shade, lw=1.5)
    if wanted is not None:
        axes.axvline(float(np.interp(wanted, offsets, places)), color="limegreen", ls="--", lw=1.5)
    marked = np.unique(np.linspace(0, len(offsets) - 1, 9).round().astype(int))
    axes.set_xticks(marked, [f"{offsets[place]:+.3g}" for place in marked], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(0)


def sample_pictures(
    detector: nn.Module, shards: ShardSet, *, device: torch.device, count: int = 8, seed: int = 0
) -> Iterator[tuple[str, Figure]]:
    """Pictures of the same `count` images at every call: "pictures/<image id>", and "refinement/<image id>" of the box
    that the detector is surest of."""
    config: ModelConfig = detector.config  # type: ignore[assignment]
    bins: Tensor = detector.decoder.bins  # type: ignore[union-attr,assignment]
    names = [category.name for category in shards.manifest.categories]
    for record in _chosen_records(shards, count, seed):
        seen = _seen_by(detector, config, record, device)
        image = decode_rgb(record.image, record.width, record.height)
        yield f"pictures/{record.image_id}", picture(image, seen.true_boxes, seen.true_labels, seen.detections, names)
        if seen.predictions.edge_logits is None:
            continue
        logits = seen.predictions.logits[-1, 0]
        query, label = divmod(int(logits.flatten().argmax()), config.num_classes)
        box = seen.predictions.boxes[-1, 0, query].cpu()
        yield (
            f"refinement/{record.image_id}",
            refinement_view(
                image,
                seen.predictions,
                index=0,
                query=query,
                bins=bins,
                reg_scale=config.reg_scale,
                title=f"{names[label]} {float(logits[query, label].sigmoid()):.2f}",
                true_box=_nearest(box, seen.normalised_boxes),
            ),
        )


@dataclass(frozen=True)
class _Seen:
    true_boxes: NDArray[np.float32]  # [G, 4] xyxy in pixels, without crowd regions
    true_labels: NDArray[np.int32]  # [G]
    normalised_boxes: Tensor  # [G', 4] cxcywh of those that can be seen
    predictions: QueryPredictions
    detections: DetectionTable


def _seen_by(detector: nn.Module, config: ModelConfig, record: ImageRecord, device: torch.device) -> _Seen:
    boxes, labels = record.boxes[~record.crowd], record.labels[~record.crowd]
    sample = plain_sample(without_crowd(record), canvas=config.input_size)
    pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None].to(device)
    size = torch.tensor([[record.width, record.height]], device=device)
    with evaluation_mode(detector), torch.no_grad(), torch.autocast(device.type, enabled=False):
        detections, output = predict_batch(detector, pixels, size, every_layer=True)
    assert output.matching is not None
    table = DetectionTable.from_batch(detections, torch.tensor([record.image_id]), padding=[False])
    return _Seen(boxes, labels, torch.from_numpy(sample.boxes).reshape(-1, 4), output.matching, table)


def _chosen_records(shards: ShardSet, count: int, seed: int) -> Iterator[ImageRecord]:
    source = locate_row_groups(shards)
    begins = np.cumsum(source.rows) - source.rows
    images = int(source.rows.sum())
    for number in np.sort(np.random.default_rng(seed).choice(images, min(count, images), replace=False)):
        group = int(np.searchsorted(begins, number, side="right")) - 1
        yield from records_from_table(read_row_groups(source, [group])[group].slice(number - begins[group], 1))


def _nearest(box: Tensor, candidates: Tensor) -> Tensor | None:
    """The true box that a box overlaps most, None if it overlaps none: cxcywh."""
    if len(candidates) == 0:
        return None
    overlaps = iou(cxcywh_to_xyxy(candidates), cxcywh_to_xyxy(box))
    return candidates[overlaps.argmax()] if overlaps.max() > 0 else None


def _iou(a: Tensor, b: Tensor) -> float:
    return float(iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)))


def _beside_each_other(image: NDArray[np.uint8]) -> tuple[Figure, Sequence[Axes]]:
    height, width = image.shape[:2]
    panel = 6.0 if width >= height else max(3.0, 6.0 * width / height)
    figure = Figure(figsize=(2 * panel + 0.2, panel * height / width + 0.5), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    for axes in panels:
        _show(axes, image)
    return figure, panels


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))  # corners of pixels at whole numbers, as boxes have them
    axes.axis("off")


def _draw_box(
    axes: Axes,
    box: NDArray[np.floating],
    colour: str | tuple[float, float, float] | NDArray[np.float64],
    name: str = "",
    *,
    label: str | None = None,
    style: str = "-",
    width: float = 1.6,
) -> None:
    left, top, right, bottom = box.tolist()
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=width, ls=style, label=label)
    )
    if name:
        patch = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        side = "bottom" if top > 0.05 * axes.get_ylim()[0] else "top"  # within the picture
        x, y = max(left, 0), max(top, 0)
        axes.text(x, y, name, fontsize=7, color="white", va=side, bbox=patch, clip_on=True, parse_math=False)


def _zoom_to(axes: Axes, boxes: NDArray[np.floating], shape: Iterable[int]) -> None:
    height, width, *_ = shape
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    room = 0.6 * np.maximum(high - low, 8)
    (left, top), (right, bottom) = np.maximum(low - room, 0), np.minimum(high + room, [width, height])
    if right > left and bottom > top:
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)


def _colour(label: int) -> tuple[float, float, float]:
    red, green, blue = hsv_to_rgb((label * HUE_STEP % 1, 0.9, 0.8))
    return float(red), float(green), float(blue)
