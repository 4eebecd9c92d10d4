"""Figures of an evaluation report. They are rendered without pyplot, which would keep them in memory."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipeline.evaluation.analysis import Confusion, Curves
from pipeline.evaluation.coco_metrics import ClassResult
from pipeline.evaluation.decoder_layers import by_layer
from pipeline.evaluation.error_types import Errors

DPI = 110
NAMED_CURVES = 10  # with more classes the curves have no names and colours
MOST_CLASSES = 80  # per figure
NUMBERED_CELLS = 20  # with more classes the confusion matrix has no numbers
BLUE, GREY = "#2a6fbb", "#9aa3ad"


def png(figure: Figure) -> bytes:
    """Encode a figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def precision_recall_figure(curves: Curves, names: Sequence[str]) -> Figure:
    """Plot precision over recall: left the mean over classes at several IoU thresholds, right every class at IoU 0.5."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    mean, classes = figure.subplots(1, 2, sharey=True)
    for row in (0, 5, 8):
        shade = colormaps["viridis"](row / 10)
        title = f"IoU {curves.iou[row]:.2f}: AP {format_number(curves.mean[row].mean())}"
        mean.plot(curves.recall, curves.mean[row], color=shade, lw=2, label=title)
    mean.set_title("mean over classes")
    mean.legend()
    few = len(names) <= NAMED_CURVES
    for label, curve in enumerate(curves.per_class):
        name = f"{names[label]}: {format_number(curve.mean())}" if few else None
        classes.plot(curves.recall, curve, lw=1.5 if few else 0.6, color=f"C{label}" if few else GREY, label=name)
    classes.set_title("every class at IoU 0.50")
    if few:
        _plain_text(classes.legend(fontsize=8).get_texts())
    else:
        classes.plot(curves.recall, curves.mean[0], color=BLUE, lw=2.5, label="mean")
        classes.legend()
    for axes in (mean, classes):
        axes.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    mean.set_ylabel("precision")
    return figure


def confusion_figure(confusion: Confusion, names: Sequence[str]) -> Figure:
    """Plot the confusion matrix; rows are true classes and add up to one. At most `MOST_CLASSES`, those with the most errors."""
    counts = confusion.matrix
    classes = len(names)
    errors = counts.sum(0)[:-1] + counts.sum(1)[:-1] - 2 * np.diag(counts)[:-1]
    chosen = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES])
    rows = np.append(chosen, classes)  # background last
    part = counts[np.ix_(rows, rows)]
    share = part / np.maximum(counts.sum(1)[rows, None], 1)
    labels = [*(names[label] for label in chosen), "background"]

    side = float(np.clip(2.5 + 0.17 * len(rows), 5, 17))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))  # makes a few percent visible
    size = 9 if len(rows) <= 25 else 6.5
    axes.set_xticks(range(len(rows)), labels, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(rows)), labels, fontsize=size, parse_math=False)
    axes.set_xlabel(f"detected class, scores of at least {confusion.score:g}")
    axes.set_ylabel(f"true class, matched at IoU {confusion.iou:g}")
    for edge in (axes.axhline, axes.axvline):
        edge(len(chosen) - 0.5, color=GREY, lw=0.8)
    if len(rows) <= NUMBERED_CELLS:
        for (row, column), count in np.ndenumerate(part):
            colour = "white" if share[row, column] > 0.35 else "black"
            axes.text(column, row, f"{count}" if count else "", ha="center", va="center", fontsize=8, color=colour)
    left_out = f"; the {len(chosen)} of {classes} classes with the most errors" if len(chosen) < classes else ""
    axes.set_title(f"fraction of each true class (background row: of all false detections){left_out}", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.5, aspect=30)
    return figure


def errors_figure(errors: Errors) -> Figure:
    """Plot the AP50 that each kind of error costs, with the number of errors."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(errors.gain)
    gains = [100 * errors.gain[name] for name in names]
    bars = axes.barh(names, gains, color=BLUE)
    axes.bar_label(
        bars, [f"{gain:.1f}  ({errors.count[name]:,})" for name, gain in zip(names, gains, strict=True)], padding=4
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max([*gains, 1]))
    axes.set_xlabel("points of AP50 gained by correcting this kind of error alone (number of errors)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def layers_figure(layers: dict[str, float]) -> Figure:
    """Plot the diagnostics over the decoder layers; only the first panel for a detector that regresses boxes directly."""
    panels = {
        "iou": "IoU with the true box",
        "entropy": "entropy of the edge distributions, nats",
        "end_mass": "probability in the two end bins",
        "divergence": "divergence of the last layer from this one, nats",
    }
    plotted = {title: values for measure, title in panels.items() if (values := by_layer(layers, measure))}
    figure = Figure(figsize=(9, 6) if len(plotted) > 1 else (5, 3.4), layout="constrained")
    panel_axes: list[Axes] = np.ravel(figure.subplots(*((2, 2) if len(plotted) > 1 else (1, 1)))).tolist()
    for axes in panel_axes[len(plotted) :]:
        axes.remove()
    for axes, (title, values) in zip(panel_axes, plotted.items(), strict=False):
        axes.plot(range(len(values)), list(values.values()), "o-", color=BLUE)
        axes.set_xticks(range(len(values)), list(values))
        low, high = min(values.values()), max(values.values())
        reach = 0.7 * (max(high - low, 0.1 * high) or 1)  # a difference of a percent must look small
        axes.set_ylim(max(0, (low + high) / 2 - reach), (low + high) / 2 + reach)
        for x, value in enumerate(values.values()):
            axes.annotate(f"{value:.3g}", (x, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("decoder layer")
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)
    return figure


def per_class_figure(per_class: Sequence[ClassResult]) -> Figure:
    """Plot AP and AP50 of every class with true boxes, best first; of more than `MOST_CLASSES`, the best and the worst."""
    known = sorted((result for result in per_class if not math.isnan(result.ap)), key=lambda r: (-r.ap, r.name))
    half = MOST_CLASSES // 2
    kept = known if len(known) <= MOST_CLASSES else known[:half] + known[-half:]
    figure = Figure(figsize=(7, 1.6 + 0.19 * max(len(kept), 3)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(kept))
    axes.barh(rows, [result.ap50 for result in kept], color=GREY, alpha=0.5, label="AP50")
    axes.barh(rows, [result.ap for result in kept], color=BLUE, height=0.5, label="AP")
    labels = [f"{result.name} ({result.boxes:,})" for result in kept]
    axes.set_yticks(rows, labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(kept) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("AP per class (number of true boxes)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    missing = len(per_class) - len(known)
    between = f"best and worst {half} of {len(known)} classes" if len(kept) < len(known) else f"{len(known)} classes"
    axes.set_title(between + (f"; {missing} more have no true boxes" if missing else ""), fontsize=9)
    return figure


def format_number(value: float) -> str:
    """Format a number with three decimals; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def _plain_text(texts: Sequence[Text]) -> None:
    """Render names as text, even with a $ in them."""
    for text in texts:
        text.set_parse_math(False)
