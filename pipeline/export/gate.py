"""Gate of the export: a file is accepted if its own runtime reproduces the detector's detections on real images.

Every file is opened the way its users open it, and runs on the same pixels as the detector. Detections are matched before
they are compared, because queries of nearly equal scores swap ranks between runtimes. A few may differ entirely, if two
candidates for the last query were almost tied. A tolerance therefore has three parts: the largest difference of a score,
that of a corner, and the share of detections that must keep to both.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dfine_core.checkpoints.weights import read_checkpoint
from dfine_core.inference import LoadedDetector, build, load
from dfine_core.model.postprocess import Detections
from pipeline.evaluation.coco_metrics import coco_numbers
from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.export.check_images import CheckBatch, CheckSet, split_first_batch
from pipeline.exported_files import open_exported
from pipeline.progress import Progress

COMPARED_DETECTIONS = 100  # per image, best first; COCO's own limit
MISMATCH = 1.0  # difference if a detection is missing or has another class

DetectFunction = Callable[[Tensor, Tensor], Detections]  # takes pixels [B, 3, H, W] uint8, sizes [B, 2] (width, height)


@dataclass(frozen=True)
class Tolerance:
    """Limits that a file has to keep to."""

    score: float  # largest difference of a score
    box: float  # largest difference of a corner, as a fraction of the image's width or height
    share: float  # fraction of the detections that must agree in score and box
    ap: float = 0.001  # largest difference of AP; 0.001 is 0.1 points


FULL = Tolerance(score=1e-4, box=1e-4, share=0.99)
HALF = Tolerance(score=2e-2, box=1e-2, share=0.9)
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


def differences(expected: Detections, actual: Detections, sizes: Tensor, number: int) -> NDArray[np.float64]:
    """Match detections to the `number` best expected ones of every image and return their differences.

    Returns:
        [B * number, 2]: difference of the score, and of the worst corner as a fraction of the image's width or height.
    """
    images = zip(*_arrays(expected, number), *_arrays(actual, None), sizes.double().repeat(1, 2).numpy(), strict=True)
    return np.concatenate([_differences_in_image(*image) for image in images])


def _differences_in_image(
    labels: NDArray[np.int64],
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    actual_labels: NDArray[np.int64],
    actual_boxes: NDArray[np.float64],
    actual_scores: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Pair detections with least total difference: [n, 2] for n expected ones, `MISMATCH` for those without a partner."""
    score = np.abs(scores[:, None] - actual_scores)
    box = (np.abs(boxes[:, None] - actual_boxes) / scale).max(-1)
    pair = np.stack([score, box], axis=-1)
    pair[~np.isfinite(pair).all(-1) | (labels[:, None] != actual_labels)] = MISMATCH
    pair = pair.clip(max=MISMATCH)
    result = np.full((len(labels), 2), MISMATCH)
    rows, columns = linear_sum_assignment(pair.sum(-1))
    result[rows] = pair[rows, columns]
    return result


def summarize(off: NDArray[np.float64], tolerance: Tolerance) -> dict[str, float]:
    """Summarise differences [D, 2]: share that agrees, largest difference among these, quantiles over all."""
    agree = (off[:, 0] <= tolerance.score) & (off[:, 1] <= tolerance.box)
    numbers: dict[str, float] = {"detections": len(off), "agreeing": float(agree.mean()) if len(off) else 0.0}
    for column, name in enumerate(("score", "box")):
        numbers[f"{name}_median"] = float(np.quantile(off[:, column], 0.5)) if len(off) else float("nan")
        numbers[f"{name}_99"] = float(np.quantile(off[:, column], 0.99)) if len(off) else float("nan")
        numbers[f"{name}_largest_agreeing"] = float(off[agree, column].max(initial=0.0))
    return numbers


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


def _arrays(detections: Detections, number: int | None) -> Iterator[NDArray[Any]]:
    for tensor in (detections.labels, detections.boxes.double(), detections.scores.double()):
        yield tensor[:, :number].cpu().numpy()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
