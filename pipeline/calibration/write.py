"""Calibration of a detector: detect, fit, and write the file and its page."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from dfine_core import __version__
from dfine_core.inference import LoadedDetector
from dfine_core.thresholds import WANTED_PRECISION
from dfine_core.uncertainty.detector_calibration import FILE, DetectorCalibration
from dfine_core.uncertainty.drift import DriftReference, image_values, make_reference
from dfine_core.uncertainty.score_calibration import Method
from pipeline import html_pages, storage
from pipeline.calibration.figures import coverage_figure, score_figure, width_figure
from pipeline.calibration.fit import Reliability, fit
from pipeline.calibration.measure import MeasuredDetections, measure, true_boxes
from pipeline.calibration.recommended import ClassRecommendation, recommended
from pipeline.data.shards.manifest import ShardSet
from pipeline.errors import UserError
from pipeline.evaluation.figures import png
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.tracking.calibrated_model import CalibrationTarget, log_calibration
from pipeline.wording import plural

PAGE = "calibration.html"


@dataclass(frozen=True)
class Written:
    """Calibration with the files that hold it."""

    calibration: DetectorCalibration
    reliability: Reliability
    file: str
    page: str


def calibrate(
    loaded: LoadedDetector,
    shards: ShardSet,
    out: str | None,
    *,
    least_score: float,
    method: Method,
    batch_size: int,
) -> Written:
    """Calibrate a detector on a shard set.

    Args:
        out: folder of the files; None: that of the detector, beside its weights.
        least_score: of the detections that edges are calibrated for.

    Raises:
        UserError: it regresses boxes directly, has no folder of its own, or too few objects are found.
    """
    folder = folder_of(loaded) if out is None else out
    sha256 = loaded.sha256
    if sha256 is None and loaded.path is not None:
        sha256 = hashlib.sha256(storage.read_bytes(loaded.path)).hexdigest()
    truth = read_ground_truth(shards)
    measured = measure(loaded, shards, truth, batch_size=batch_size)
    calibration, reliability = fit(
        measured,
        true_boxes(truth),
        len(truth.image_id),
        least_score=least_score,
        method=method,
        sha256=sha256,
    )
    calibration = replace(calibration, reference=reference_of(measured, len(truth.image_id), least_score))
    file, page = storage.join(folder, FILE), storage.join(folder, PAGE)
    thresholds = recommended(measured, true_boxes(truth), calibration.scores, loaded.names)
    facts = {
        "measured": reliability.to_plain(),
        "recommended_thresholds": [asdict(each) for each in thresholds],
        "data": shards.uri,
        "least_score": least_score,
        "by": f"ray-dfine {__version__}",
    }
    storage.write_atomic(
        page, calibration_page(loaded, shards, calibration, reliability, least_score, thresholds).encode()
    )
    storage.write_atomic(file, calibration.to_json(**facts))
    return Written(calibration, reliability, file, page)


def reference_of(measured: MeasuredDetections, images: int, least_score: float) -> DriftReference:
    """Values of all images, which a prediction compares its own with."""
    order = measured.found.image.argsort(stable=True)
    counts = torch.bincount(measured.found.image, minlength=images)
    found = (measured[rows] for rows in torch.split(order, counts.tolist()))
    values = [image_values(each.found.scores, each.std, each.sides, least_score) for each in found]
    return make_reference(values, least_score)


def folder_of(loaded: LoadedDetector) -> str:
    """Folder that the detector was read from.

    Raises:
        UserError: it was a file, or came from MLflow or a hub.
    """
    folder = None if loaded.path is None else loaded.path.rpartition("/")[0]
    if not folder or folder.rstrip("/") != loaded.origin.rstrip("/"):
        raise UserError(f"{loaded.origin}: it is no folder that a calibration can be written to; name one with --out")
    return folder


def log_to_mlflow(target: CalibrationTarget, shards: ShardSet, written: Written) -> None:
    """Attach the files, tags and metrics of a calibration to the run of its detector, and the file to its model.

    Raises:
        RunLookupError: the server does not accept it.
    """
    measured = written.reliability
    log_calibration(
        target,
        {FILE: storage.read_bytes(written.file), PAGE: storage.read_bytes(written.page)},
        tags={
            "data": shards.uri,
            "digest": written.calibration.digest,
            "images": str(written.calibration.images),
            "scores": written.calibration.scores.method,
            "weights_sha256": written.calibration.sha256 or "unknown",
        },
        metrics={
            "calibration/score_error_raw": measured.score_error[0],
            "calibration/score_error": measured.score_error[1],
            "calibration/width_error": measured.width_error,
            **{f"calibration/coverage_{100 * level:g}": held for level, held in measured.conformal.items()},
            **{f"calibration/coverage_boxes_{100 * level:g}": held for level, held in measured.conformal_boxes.items()},
        },
    )


def summary(reliability: Reliability) -> list[str]:
    """Lines of the command's result; the first says whether widths can be believed."""
    own = {mass: sum(held) / 4 for mass, held in reliability.own_coverage.items()}
    width, side = (reliability.widths[name][0] for name in ("distribution", "side of the box"))
    verdict = (
        reliability.poor or f"widths follow the errors: {100 * reliability.width_error:.0f} % off on average (ENCE)"
    )
    return [
        verdict,
        f"measured on {plural(reliability.objects, 'matched object')} of {plural(reliability.images, 'image')}"
        " that nothing was fitted to",
        "own intervals of "
        + ", ".join(f"{100 * mass:g}" for mass in own)
        + " % hold "
        + ", ".join(f"{100 * held:.1f}" for held in own.values())
        + " % of the true edges",
        "conformal half-widths for "
        + ", ".join(f"{100 * level:g}" for level in reliability.conformal)
        + " % hold "
        + ", ".join(f"{100 * held:.1f}" for held in reliability.conformal.values())
        + " %; those for all four edges at once "
        + ", ".join(f"{100 * held:.1f}" for held in reliability.conformal_boxes.values())
        + " % of the boxes",
        f"mean half-width at 90 %: {width:.1f} px, {side:.1f} px if it is a share of the box's side",
        "scores: error {:.3f} raw, {:.3f} calibrated (D-ECE)".format(*reliability.score_error)
        + "; {:.3f} and {:.3f} with the fit of the boxes (LaECE)".format(*reliability.label_aware_error),
    ]


def calibration_page(
    loaded: LoadedDetector,
    shards: ShardSet,
    calibration: DetectorCalibration,
    reliability: Reliability,
    least_score: float,
    thresholds: Sequence[ClassRecommendation],
) -> str:
    """Render the page."""
    return html_pages.render(
        "pipeline.calibration",
        "calibration.html.j2",
        title=loaded.origin,
        lines=summary(reliability),
        poor=reliability.poor is not None,
        figures=[
            (
                "Widths of edges",
                _png_uri(width_figure(reliability)),
                "Each dot is a tenth of the edges. On the line, the error is as large as the predicted standard deviation.",
            ),
            (
                "Coverage",
                _png_uri(coverage_figure(reliability)),
                "Share of true edges inside. Own intervals are the distributions'; conformal ones are fitted to other images.",
            ),
            (
                "Scores",
                _png_uri(score_figure(reliability)),
                "On the line, a score is the chance that the detection is right. Larger dots stand for more detections.",
            ),
        ],
        rows=_coverage_rows(calibration, reliability),
        thresholds=thresholds,
        wanted_precision=WANTED_PRECISION,
        widths=list(reliability.widths.items()),
        correlation=list(reliability.correlation.items()),
        facts=[
            ("detector", loaded.origin),
            ("images", f"{shards.uri}, {calibration.images} for the fit, {reliability.images} for these numbers"),
            ("detections", f"matched at IoU 0.5, with a score of {least_score:g} and more"),
            (
                "scores",
                f"{calibration.scores.method}, logits divided by {calibration.scores.temperature:.3f}"
                if calibration.scores.method == "temperature"
                else calibration.scores.method,
            ),
            ("made by", f"ray-dfine {__version__}"),
        ],
    )


def _coverage_rows(calibration: DetectorCalibration, reliability: Reliability) -> list[dict[str, Any]]:
    own = reliability.own_coverage
    return [
        {
            "coverage": edges.coverage,
            "own": sum(own[edges.coverage]) / 4 if edges.coverage in own else None,
            "edges": (edges.factor, reliability.conformal[edges.coverage]),
            "boxes": (boxes.factor, reliability.conformal_boxes[boxes.coverage]),
        }
        for edges, boxes in zip(calibration.edges, calibration.boxes, strict=True)
    ]


def _png_uri(figure: Figure) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(figure)).decode()}"
