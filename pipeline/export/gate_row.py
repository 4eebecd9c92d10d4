"""One opened file in the gate: what it is asked, and what that shows."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.agreement import COMPARED_DETECTIONS, Tolerance, differences, summarize
from dfine_core.inference import LoadedDetector
from dfine_core.model.postprocess import Detections
from dfine_core.runtimes.program import OpenOptions
from dfine_core.runtimes.worker import one_line
from pipeline.evaluation.detections import DetectionTable
from pipeline.export.check_images import CheckBatch
from pipeline.export.formats import Opening
from pipeline.export.isolated import IsolatedProgram, Limits, ProgramError
from pipeline.export.openings import DetectFunction, detect_function, scaled, table
from pipeline.export.probes import COMPARED, Probe, joined, pieces
from pipeline.wording import plural

PROBE_SLACK = 0.04  # of the share that must agree: a probe has few detections, and one tie counts more


@dataclass(eq=False)
class GateRow:
    """Opened file with its measurements so far. The first failure ends its check."""

    opening: Opening
    tolerance: Tolerance
    compared: int  # detections per image whose boxes are compared, best first
    detect: DetectFunction | None = None
    program: IsolatedProgram | None = None  # None: runs in this process
    path: Path | None = None
    limit: int | None = None  # most detections of an image that the runtime keeps; None: as many as the detector
    threads: int = 1
    failure: str | None = None
    differences: list[NDArray[np.float64]] = field(default_factory=list)  # [D, 2] of the check images
    scores: list[NDArray[np.float64]] = field(default_factory=list)  # differences of sorted scores, over all detections
    tables: list[DetectionTable] = field(default_factory=list)
    probed: dict[str, float] = field(default_factory=dict)  # share that agrees, by probe
    seconds: list[NDArray[np.float64]] = field(default_factory=list)  # of calls with one image

    @property
    def runtime(self) -> str:
        """Name and version of the runtime."""
        return self.program.runtime if self.program else self.opening.runtime

    @property
    def free_size(self) -> bool:
        """True if the file takes images of any size."""
        return self.program is not None and None in self.program.input_size

    def compare(self, expected: Detections, batch: CheckBatch) -> None:
        """Run the file on check images and keep the differences."""
        expected = self._limited(expected)
        actual = self._run([(batch.pixels, batch.sizes)], expected)
        if actual is None:
            return
        self.tables.append(table(actual, batch))
        self.differences.append(differences(expected, actual, batch.sizes, self.compared))
        self.scores.append(_sorted_scores(expected, actual))

    def probe(self, probe: Probe) -> None:
        """Run the file on a probe and keep the share of its detections that agree."""
        if probe.noise and not self.tolerance.noise:
            return
        expected = self._limited(probe.expected)
        actual = self._run(list(pieces(probe)), expected, probe.name)
        if actual is None:
            return
        if probe.scores_alone:
            share = float((_sorted_scores(expected, actual) <= self.tolerance.score).mean())
        else:
            off = differences(expected, actual, probe.sizes, self.compared)
            share = summarize(off, self.tolerance)["agreeing"]
        self.probed[probe.name] = share

    def probe_threads(self, probe: Probe, limits: Limits) -> None:
        """Open the file again with another number of threads, which must agree with the detector too."""
        if self.failure or self.program is None or self.path is None:
            return
        assert isinstance(self.opening.opener, str)
        other = 2 if self.threads == 1 else 1
        options = OpenOptions(precision=self.opening.precision, threads=other)
        try:
            with IsolatedProgram(self.opening.opener, self.path, options, limits) as again:
                first, self.detect = self.detect, detect_function(again)
                self.probe(replace(probe, name=f"{plural(other, 'thread')} instead of {self.threads}"))
                self.detect = first
        except ProgramError as failure:
            self.failure = f"fails with {plural(other, 'thread')}: {failure}"

    def time(self, pixels: Tensor, sizes: Tensor, calls: int) -> None:
        """Time calls with the first image, in the process of the runtime."""
        if self.failure or self.program is None:
            return
        rows = self.program.batch_size or 1
        images, originals = scaled(pixels[:1]).repeat(rows, 0), sizes[:1].numpy().repeat(rows, 0)
        try:
            self.seconds.append(self.program.seconds(images, originals, calls))
        except ProgramError as failure:
            self.failure = f"fails when it is timed: {failure}"

    def reason(self) -> str | None:
        """Reason of the refusal, without AP; None if the file agrees so far."""
        if self.failure:
            return self.failure
        tolerance = self.tolerance
        measured = self.measured()
        if measured["agreeing"] < tolerance.share:
            return (
                f"{measured['agreeing']:.1%} of its detections agree with the detector's within {tolerance.score:g} of the"
                f" score and {tolerance.box:g} of the image side; at least {tolerance.share:.0%} must"
            )
        typical = max(measured["score_median"], measured["box_median"])
        if tolerance.typical is not None and typical > tolerance.typical:
            return (
                f"half of its detections differ by more than {typical:.1e}, in score or box; float32 stays below"
                f" {tolerance.typical:g}, so a part of it is computed in a lower precision"
            )
        if measured["scores_agreeing"] < tolerance.share:
            share = measured["scores_agreeing"]
            return f"{share:.1%} of all its scores agree, rank by rank; at least {tolerance.share:.0%} must"
        for name, share in self.probed.items():
            if share < tolerance.share - PROBE_SLACK:
                return (
                    f"{share:.1%} of its detections agree on {name}; at least {tolerance.share - PROBE_SLACK:.0%} must"
                )
        return None

    def measured(self) -> dict[str, float]:
        """Numbers for the report."""
        numbers = summarize(np.concatenate([np.zeros((0, 2)), *self.differences]), self.tolerance)
        scores = np.concatenate([np.zeros(0), *self.scores])
        numbers["scores_agreeing"] = float((scores <= self.tolerance.score).mean()) if len(scores) else 0.0
        numbers |= {f"agreeing on {name}": share for name, share in self.probed.items()}
        if self.seconds:
            numbers |= {f"ms_{name}": value for name, value in latency(np.concatenate(self.seconds)).items()}
        return numbers

    def _limited(self, expected: Detections) -> Detections:
        return Detections(**{name: getattr(expected, name)[:, : self.limit] for name in COMPARED})

    def _run(
        self, calls: list[tuple[Tensor, Tensor]], expected: Detections, name: str | None = None
    ) -> Detections | None:
        """Detections of all calls end to end; None after a failure, which is kept."""
        if self.detect is None or self.failure:
            return None
        where = f"on {name}" if name else f"on a batch of {len(calls[0][0])}"
        try:
            actual = joined([self.detect(pixels, sizes) for pixels, sizes in calls])
        except Exception as error:  # noqa: BLE001 - a runtime may raise anything
            self.failure = f"fails {where}: {_text(error)}"
            return None
        if actual.boxes.shape != expected.boxes.shape:
            self.failure = f"returns boxes of shape {_shape(actual.boxes)} {where} instead of {_shape(expected.boxes)}"
        elif not (actual.boxes.isfinite().all() and actual.scores.isfinite().all()):
            self.failure = f"returns numbers that are not finite {where}"
        return None if self.failure else actual


def open_row(
    opening: Opening,
    path: Path,
    model: LoadedDetector,
    tolerance: Tolerance,
    stack: ExitStack,
    *,
    threads: int,
    limits: Limits,
) -> GateRow:
    """Open a file, in a process of its own if the opening says so, which ends with the stack."""
    compared = min(COMPARED_DETECTIONS, model.config.num_queries)
    limit = model.config.num_queries if opening.one_per_query else None
    row = GateRow(opening, tolerance, compared, path=path, limit=limit, threads=threads)
    try:
        if isinstance(opening.opener, str):
            options = OpenOptions(precision=opening.precision, threads=threads)
            row.program = stack.enter_context(IsolatedProgram(opening.opener, path, options, limits))
            row.detect = detect_function(row.program)
        else:
            row.detect = opening.opener(path, model)
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        row.failure = f"cannot be opened: {_text(error)}"
    return row


def latency(seconds: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    return {f"p{part}": 1e3 * float(np.percentile(seconds, part)) for part in (50, 99)}


def _sorted_scores(expected: Detections, actual: Detections) -> NDArray[np.float64]:
    """Differences of the scores by rank, over all detections of all images."""
    ours, theirs = (found.scores.double().sort(dim=1, descending=True).values for found in (expected, actual))
    return (ours - theirs).abs().flatten().numpy()


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ProgramError) else one_line(error)
