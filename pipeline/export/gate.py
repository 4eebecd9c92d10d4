"""Gate of the export: a file is accepted if its own runtime reproduces the detector's detections on real images.

Every file is opened the way its users open it, in a process of its own, and runs on the same pixels as the detector. Detections
are matched before they are compared, because queries of nearly equal scores swap ranks between runtimes. A few may differ
entirely, if two candidates for the last query were almost tied. A tolerance therefore has three parts: the largest difference of
a score, that of a corner, and the share of detections that must keep to both.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dfine_core.agreement import Tolerance
from dfine_core.inference import LoadedDetector
from pipeline.evaluation.coco_metrics import coco_numbers
from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.export.check_images import CheckSet, split_first_batch
from pipeline.export.formats import FORMATS, Opening
from pipeline.export.gate_row import GateRow, latency, open_row
from pipeline.export.isolated import LIMITS, Limits
from pipeline.export.openings import table
from pipeline.export.probes import other_sizes, probes
from pipeline.progress import Progress


@dataclass(frozen=True)
class RowVerdict:
    """Decision about one opening of a file."""

    opening: Opening
    runtime: str  # name and version
    reason: str | None  # reason of the refusal; None if accepted
    measured: dict[str, float] = field(
        default_factory=dict
    )  # see `GateRow.measured`; both APs if ground truth is known

    @property
    def accepted(self) -> bool:
        """True if the file agrees with the detector."""
        return self.reason is None


@dataclass(frozen=True)
class GateVerdict:
    """Decision of the gate about one file."""

    format: str
    tolerance: Tolerance
    reason: str | None  # reason of the refusal; None if accepted
    rows: tuple[RowVerdict, ...] = ()  # one per opening; none if it could not be written

    @property
    def accepted(self) -> bool:
        """True if every opening that decides agrees with the detector."""
        return self.reason is None

    @property
    def measured(self) -> dict[str, float]:
        """Numbers of the first opening."""
        return self.rows[0].measured if self.rows else {}


@dataclass(frozen=True)
class GateSubject:
    """Written file for the gate."""

    path: Path
    openings: Sequence[Opening]
    tolerance: Tolerance


@dataclass(frozen=True)
class Timing:
    """Measurement of latencies: every file and the detector in turns, so that other load affects all alike."""

    rounds: int = 3
    calls: int = 10  # per round


def check_files(
    model: LoadedDetector, files: Mapping[str, Path], check_set: CheckSet, timing: Timing | None = None
) -> dict[str, GateVerdict]:
    """Compare each file, given by its format, with the detector."""
    subjects = {
        name: GateSubject(FORMATS[name].opened_path(path), FORMATS[name].openings, FORMATS[name].tolerance)
        for name, path in files.items()
    }
    return check_subjects(model, subjects, check_set, timing)


def check_subjects(
    model: LoadedDetector,
    subjects: Mapping[str, GateSubject],
    check_set: CheckSet,
    timing: Timing | None = None,
    limits: Limits = LIMITS,
) -> dict[str, GateVerdict]:
    """Compare opened files with the detector, which runs once per image for all of them.

    Args:
        timing: None measures no latencies.
    """
    with ExitStack() as stack:
        # 1. Open every file in every way.
        threads = torch.get_num_threads()
        opened = {
            name: [
                open_row(opening, one.path, model, one.tolerance, stack, threads=threads, limits=limits)
                for opening in one.openings
            ]
            for name, one in subjects.items()
        }
        rows = [row for of_file in opened.values() for row in of_file]

        # 2. The check images, the first one alone.
        tables = []
        with Progress("checking", total=check_set.images, unit="image") as progress:
            for batch in split_first_batch(check_set.batches(model.config.input_size)):
                expected = model.detect(batch.pixels, batch.sizes)
                tables.append(table(expected, batch))
                for row in rows:
                    row.compare(expected, batch)
                progress.advance(len(batch.image_id))

        # 3. Inputs on which known faults show.
        if any(not row.failure for row in rows):
            plain, *more = probes(model, check_set)
            for row in rows:
                for probe in (plain, *more, *other_sizes(model, plain, row.free_size)):
                    row.probe(probe)
                row.probe_threads(plain, limits)

        # 4. Latencies, once nothing else is to be found out.
        eager = _time(model, rows, check_set, timing) if timing else {}
    ap = _ap(tables, check_set.ground_truth)
    verdicts = {
        name: [_row_verdict(row, ap, check_set.ground_truth, eager) for row in of_file]
        for name, of_file in opened.items()
    }
    return {name: _verdict(name, subjects[name].tolerance, of_file) for name, of_file in verdicts.items()}


def _verdict(name: str, tolerance: Tolerance, rows: Sequence[RowVerdict]) -> GateVerdict:
    refused = [row for row in rows if row.opening.decides and not row.accepted]
    reason = None
    if refused:
        where = f"{refused[0].opening.runtime}: " if len(rows) > 1 else ""
        reason = f"{where}{refused[0].reason}"
    return GateVerdict(name, tolerance, reason, tuple(rows))


def _time(model: LoadedDetector, rows: Sequence[GateRow], check_set: CheckSet, timing: Timing) -> dict[str, float]:
    """Time the rows and the deployed detector in turns; returns percentiles of the detector's latency in milliseconds."""
    deployed = replace(model, detector=copy.deepcopy(model.detector)).deploy()
    batch = next(check_set.batches(model.config.input_size))[:1]
    pixels, sizes = batch.pixels, batch.sizes
    eager = []
    for _ in range(timing.rounds):
        deployed.detect(pixels, sizes)
        for _ in range(timing.calls):
            started_at = time.perf_counter()
            deployed.detect(pixels, sizes)
            eager.append(time.perf_counter() - started_at)
        for row in rows:
            row.time(pixels, sizes, timing.calls)
    return {f"ms_pytorch_{name}": value for name, value in latency(eager).items()}


def _row_verdict(
    row: GateRow, ap: float | None, ground_truth: GroundTruth | None, eager: Mapping[str, float]
) -> RowVerdict:
    """Decide about one opening; `ap` is that of the detector, `eager` its latency."""
    measured = {} if row.failure else row.measured()
    if row.seconds and not row.failure:
        measured |= {**eager, "threads": row.threads}
    reason = row.reason()
    # A systematic error may hide within the tolerances of single detections.
    exported_ap = None if row.failure else _ap(row.tables, ground_truth)
    if ap is not None and exported_ap is not None:
        measured |= {"AP_pytorch": ap, "AP_exported": exported_ap}
        if abs(ap - exported_ap) > row.tolerance.ap:
            reason = reason or (
                f"its AP is {exported_ap:.4f}, the detector's {ap:.4f}; they may differ by at most {row.tolerance.ap:g}"
            )
    return RowVerdict(row.opening, row.runtime, reason, measured)


def _ap(tables: list[DetectionTable], ground_truth: GroundTruth | None) -> float | None:
    """Average precision, or None without ground truth boxes."""
    if ground_truth is None or not ground_truth.boxes_of_class.any():
        return None
    return coco_numbers(ground_truth, concatenate(tables)).numbers["AP"]
