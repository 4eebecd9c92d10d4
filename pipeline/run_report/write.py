"""Page of results of a run: one self-contained HTML file, for the person who trained and for their colleagues."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from dfine_core import __version__
from pipeline import html_pages, storage
from pipeline.data.augment.decode import decode_rgb
from pipeline.data.shards.manifest import ShardSet
from pipeline.evaluation.coco_metrics import ClassResult
from pipeline.evaluation.figures import format_number, png
from pipeline.evaluation.operating_points import OperatingPoint
from pipeline.evaluation.sample_images import (
    best_refinement,
    detect_record,
    ground_truth_and_detections,
    records_at,
)
from pipeline.redaction import redact
from pipeline.run_report.advice import advice_for
from pipeline.run_report.figures import curves_figure
from pipeline.run_report.results import ImageScore, RunResults, collect
from pipeline.wording import plural

EACH = 6  # best and worst images
EXPLAINED = 2  # of each, with the refinement of one box
MOST_ROWS = 100  # classes in the table
TITLES = {
    "errors": "What costs AP50",
    "confusion": "Which class is taken for which",
    "precision_recall": "Precision and recall",
    "per_class": "AP by class",
    "layers": "The decoder, layer by layer",
}
WIDE = ("precision_recall",)  # figures of two panels


@dataclass(frozen=True)
class PageImage:
    """An image of the page."""

    title: str
    source: str  # data URI


def write_report(run: str, out: str, *, val: ShardSet | None = None) -> str:
    """Write the page of a run, and return its path or URI; arguments and errors as those of `collect`."""
    storage.write_atomic(out, report_page(collect(run, val)).encode())
    return out


def report_page(results: RunResults) -> str:
    """Render the page."""
    best, worst = _extremes(results.images)
    figures = results.report.figures()
    curves = curves_figure(results.curves, results.metadata.history.best_step)
    refinements: list[PageImage] = []
    return html_pages.render(
        "pipeline.run_report",
        "report.html.j2",
        title=results.metadata.run,
        headline=_headline(results),
        numbers=_numbers(results),
        facts=_facts(results),
        advice=advice_for(results),
        curves=None if curves is None else _png_uri(png(curves)),
        panels=sum(bool(points) for points in results.curves.values()),
        notice=results.notice,
        figures=[
            (PageImage(TITLES[name], _png_uri(png(figures[name]))), name in WIDE) for name in TITLES if name in figures
        ],
        classes=_class_rows(results),
        wanted_precision=results.report.points.wanted_precision,
        worst=list(_images(results, worst, refinements)),
        best=list(_images(results, best, refinements)),
        refinements=refinements,
        number=format_number,
    )


def _headline(results: RunResults) -> str:
    report = results.report
    state = "" if results.finished else f" The training is unfinished, at step {results.metadata.step:,}."
    return (
        f"AP {format_number(report.numbers['AP'])} on {plural(report.images, 'validation image')} with"
        f" {plural(report.boxes, 'box')} of {plural(len(report.per_class), 'class')}.{state}"
    )


def _numbers(results: RunResults) -> list[tuple[str, str, str]]:
    """Name, value and meaning of the numbers on top."""
    numbers, mean_f1 = results.report.numbers, results.report.mean_f1
    return [
        ("AP", format_number(numbers["AP"]), "COCO's average precision over IoU 0.50 to 0.95"),
        ("AP50", format_number(numbers["AP50"]), "at IoU 0.50: the object is found"),
        ("AP75", format_number(numbers["AP75"]), "at IoU 0.75: its box is tight"),
        ("F1", format_number(mean_f1), "at the best threshold of each class, mean over classes"),
        ("AR", format_number(numbers["AR_100"]), "recall with 100 detections per image"),
    ]


def _facts(results: RunResults) -> list[tuple[str, str]]:
    config, metadata, schedule = results.loaded.config, results.metadata, results.experiment.get("schedule") or {}
    height, width = config.input_size
    variant = (results.experiment.get("model") or {}).get("variant", "?")
    parent = metadata.parent.get("path") or next(iter(metadata.parent.values()), None)
    return [
        ("run", results.run),
        ("weights", results.loaded.origin),
        ("detector", f"D-FINE-{str(variant).upper()}, {results.loaded.num_parameters / 1e6:.1f} million parameters"),
        ("input", f"{width} x {height} pixels"),
        ("started from", redact(str(parent)) if parent else "random weights"),
        (
            "trained",
            f"{metadata.step:,} steps of {plural(metadata.global_batch_size, 'image')}, {metadata.epoch} epochs",
        ),
        ("learning rate", f"{(results.experiment.get('optimizer') or {}).get('lr') or 'of the recipe'}"),
        ("schedule", ", ".join(f"{key} {value}" for key, value in schedule.items() if value is not None)),
        ("validation images", results.val.uri),
        ("thresholds", results.loaded.threshold_text()),
        ("made by", f"ray-dfine {__version__}"),
    ]


def _class_rows(results: RunResults) -> list[tuple[ClassResult, OperatingPoint | None, OperatingPoint | None]]:
    report = results.report
    rows = zip(report.per_class, report.points.best_f1, report.points.at_precision, strict=True)
    known = sorted(rows, key=lambda row: (math.isnan(row[0].ap), -row[0].ap))
    return list(known)[:MOST_ROWS]


def _extremes(images: Sequence[ImageScore]) -> tuple[list[ImageScore], list[ImageScore]]:
    """Best images with boxes, and worst ones; none is in both."""
    ordered = sorted(images, key=lambda image: (image.f1, -(image.missed + image.wrong)))
    worst = [image for image in ordered if image.f1 < 1][:EACH]
    rest = [image for image in images if image.found and image not in worst]
    best = sorted(rest, key=lambda image: (-image.f1, -image.found))[:EACH]
    return best, worst


def _images(results: RunResults, chosen: Sequence[ImageScore], refinements: list[PageImage]) -> Iterator[PageImage]:
    """Render images with ground truth and detections; of the first few also the refinement of a box, to `refinements`."""
    names = results.loaded.names
    records = records_at(results.val, [image.number for image in chosen])
    for index, (image, record) in enumerate(zip(chosen, records, strict=True)):
        output = detect_record(results.loaded.detector, record, results.loaded.device)
        pixels = decode_rgb(record.image, record.width, record.height)
        drawn = ground_truth_and_detections(
            pixels, output.true_boxes, output.true_labels, output.detections, names, results.thresholds
        )
        text = f"{record.file_name}: {image.found} found, {image.missed} missed, {image.wrong} wrong"
        yield PageImage(text, _jpeg_uri(drawn))
        if index < EXPLAINED and output.predictions.edge_logits is not None:
            figure = best_refinement(results.loaded.detector, pixels, output, names)
            refinements.append(PageImage(record.file_name, _png_uri(png(figure))))


def _png_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _jpeg_uri(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
