"""Gate of the export: a file is accepted if its own runtime reproduces the detector's detections on real images.

Every file is opened the way its users open it, and runs on the same pixels as the detector. Detections are matched before
they are compared, because queries of nearly equal scores swap ranks between runtimes. A few may differ entirely, if two
candidates for the last query were almost tied. A tolerance therefore has three parts: the largest difference of a score,
that of a corner, and the share of detections that must keep to both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.agreement import COMPARED_DETECTIONS, FULL, HALF, Tolerance, differences, summarize
from dfine_core.checkpoints.weights import read_checkpoint
from dfine_core.inference import LoadedDetector, build, load
from dfine_core.model.postprocess import Detections
from pipeline.evaluation.coco_metrics import coco_numbers
from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.export.check_images import CheckBatch, CheckSet, split_first_batch
from pipeline.exported_files import open_exported
from pipeline.progress import Progress

DetectFunction = Callable[[Tensor, Tensor], Detections]  # takes pixels [B, 3, H, W] uint8, sizes [B, 2] (width, height)


TOLERANCES = {
    "onnx": FULL,
    "onnx-fp16": HALF,
    "torch-export": FULL,
    "released": FULL,
    "huggingface": FULL,
    "safetensors": FULL,
}


def open_program(path: Path, _: LoadedDetector) -> DetectFunction:
    """Open an ONNX or `.pt2` file."""
    opened = open_exported(path, torch.device("cpu"))

    def detect(pixels: Tensor, sizes: Tensor) -> Detections:
        labels, boxes, scores = (torch.as_tensor(output) for output in opened.run(pixels.float() / 255, sizes))
        return Detections(labels=labels, boxes=boxes, scores=scores)

    return detect


def open_released(path: Path, model: LoadedDetector) -> DetectFunction:
    """Open a file in the released layout, with the exported configuration because the layout has none."""
    categories = list(zip(model.category_ids, model.names, strict=True))
    return build(model.config, read_checkpoint(path), categories, str(path), "cpu").detect


def open_huggingface(path: Path, _: LoadedDetector) -> DetectFunction:
    """Open a folder with Transformers."""
    from pipeline.export.huggingface import open_transformers

    return open_transformers(path)


def open_safetensors(path: Path, _: LoadedDetector) -> DetectFunction:
    """Open a folder with `dfine_core.load`."""
    return load(path, "cpu").detect


OPENERS: dict[str, Callable[[Path, LoadedDetector], DetectFunction]] = {
    "onnx": open_program,
    "onnx-fp16": open_program,
    "torch-export": open_program,
    "released": open_released,
    "huggingface": open_huggingface,
    "safetensors": open_safetensors,
}


@dataclass(frozen=True)
class GateVerdict:
    """Decision of the gate about one file."""

    format: str
    tolerance: Tolerance
    reason: str | None  # reason of the refusal; None if accepted
    measured: dict[str, float] = field(default_factory=dict)  # see `summarize`; both APs if ground truth is known

    @property
    def accepted(self) -> bool:
        """True if the file agrees with the detector."""
        return self.reason is None


@dataclass
class _Candidate:
    """File in the gate, with the measurements so far."""

    detect: DetectFunction | None = None
    failure: str | None = None
    differences: list[NDArray[np.float64]] = field(default_factory=list)
    tables: list[DetectionTable] = field(default_factory=list)


def check_files(model: LoadedDetector, files: Mapping[str, Path], check_set: CheckSet) -> dict[str, GateVerdict]:
    """Compare each file, given by its format, with the detector. The detector runs once per image for all files."""
    candidates = {name: _open_candidate(name, path, model) for name, path in files.items()}
    tables = []
    with Progress("checking", total=check_set.images, unit="image") as progress:
        for batch in split_first_batch(check_set.batches(model.config.input_size)):
            expected = model.detect(batch.pixels, batch.sizes)
            tables.append(_table(expected, batch))
            for candidate in candidates.values():
                _compare(candidate, expected, batch, model)
            progress.advance(len(batch.image_id))
    ap = _ap(tables, check_set.ground_truth)
    return {name: _verdict(name, candidate, ap, check_set.ground_truth) for name, candidate in candidates.items()}


def _open_candidate(name: str, path: Path, model: LoadedDetector) -> _Candidate:
    try:
        return _Candidate(detect=OPENERS[name](path, model))
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        return _Candidate(failure=f"cannot be opened: {_first_line(error)}")


def _compare(candidate: _Candidate, expected: Detections, batch: CheckBatch, model: LoadedDetector) -> None:
    """Run the file on a batch and add its differences; the first failure ends its check."""
    if candidate.detect is None or candidate.failure:
        return
    number = min(COMPARED_DETECTIONS, expected.scores.shape[1], model.config.num_queries)
    try:
        actual = candidate.detect(batch.pixels, batch.sizes)
        candidate.tables.append(_table(actual, batch))
        candidate.differences.append(differences(expected, actual, batch.sizes, number))
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        candidate.failure = f"fails on a batch of {len(batch.image_id)}: {_first_line(error)}"


def _verdict(name: str, candidate: _Candidate, ap: float | None, ground_truth: GroundTruth | None) -> GateVerdict:
    """Decide about a file; `ap` is that of the detector."""
    tolerance = TOLERANCES[name]
    if candidate.failure:
        return GateVerdict(name, tolerance, candidate.failure)

    # 1. Share of single detections that agree in score and box.
    measured = summarize(np.concatenate([np.zeros((0, 2)), *candidate.differences]), tolerance)
    reason = None
    if measured["agreeing"] < tolerance.share:
        reason = (
            f"{measured['agreeing']:.1%} of its detections agree with the detector's within {tolerance.score:g} of the score"
            f" and {tolerance.box:g} of the image side; at least {tolerance.share:.0%} must"
        )

    # 2. Average precision, if there is ground truth. A systematic error may hide within the tolerances above.
    exported_ap = _ap(candidate.tables, ground_truth)
    if ap is not None and exported_ap is not None:
        measured |= {"AP_pytorch": ap, "AP_exported": exported_ap}
        if abs(ap - exported_ap) > tolerance.ap:
            reason = reason or (
                f"its AP is {exported_ap:.4f}, the detector's {ap:.4f}; they may differ by at most {tolerance.ap:g}"
            )
    return GateVerdict(name, tolerance, reason, measured)


def _ap(tables: list[DetectionTable], ground_truth: GroundTruth | None) -> float | None:
    """Average precision, or None without ground truth boxes."""
    if ground_truth is None or not ground_truth.boxes_of_class.any():
        return None
    return coco_numbers(ground_truth, concatenate(tables)).numbers["AP"]


def _table(detections: Detections, batch: CheckBatch) -> DetectionTable:
    return DetectionTable.from_batch(detections, batch.image_id, [False] * len(batch.image_id))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
