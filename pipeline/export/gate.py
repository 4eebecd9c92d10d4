"""The gate: an exported file is accepted when its own runtime finds in real images what the detector finds.

Every file is opened as its users will open it and run on the same pixels as the detector. Detections are matched before
they are compared, for queries of nearly equal scores change places from one program to the next; and a few may differ
altogether, where two candidates for the last query were as good as tied. Hence a tolerance has three parts: how far a
score and a corner may be off, and what share of the detections has to keep to that.
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
from pipeline.export.check_images import CheckSet, Pictures, ragged
from pipeline.exported_files import open_exported
from pipeline.progress import Progress

COMPARED = 100  # best detections of an image, as many as COCO counts
UNLIKE = 1.0  # difference of two detections of which one is missing, or that name other classes

Detect = Callable[[Tensor, Tensor], Detections]  # of pixels [B, 3, H, W] uint8 and sizes [B, 2] (width, height)


@dataclass(frozen=True)
class Tolerance:
    score: float  # largest difference
    box: float  # largest difference of a corner, over the width or height of the image
    share: float  # of the detections that must agree in both
    ap: float = 0.001  # largest difference: 0.1 point


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


def open_program(path: Path, model: LoadedDetector) -> Detect:
    opened = open_exported(path, torch.device("cpu"))

    def detect(pixels: Tensor, sizes: Tensor) -> Detections:
        labels, boxes, scores = (torch.as_tensor(output) for output in opened.run(pixels.float() / 255, sizes))
        return Detections(labels=labels, boxes=boxes, scores=scores)

    return detect


def open_released(path: Path, model: LoadedDetector) -> Detect:
    """With the exported configuration: the layout itself has none."""
    categories = list(zip(model.category_ids, model.names, strict=True))
    return build(model.config, read_checkpoint(path), categories, str(path), "cpu").detect


def open_huggingface(path: Path, model: LoadedDetector) -> Detect:
    from pipeline.export.huggingface import open_transformers

    return open_transformers(path)


def open_safetensors(path: Path, model: LoadedDetector) -> Detect:
    return load(path, "cpu").detect


OPENERS: dict[str, Callable[[Path, LoadedDetector], Detect]] = {
    "onnx": open_program,
    "onnx-fp16": open_program,
    "torch-export": open_program,
    "released": open_released,
    "huggingface": open_huggingface,
    "safetensors": open_safetensors,
}


@dataclass(frozen=True)
class Verdict:
    format: str
    tolerance: Tolerance
    reason: str | None  # of its refusal; None: accepted
    measured: dict[str, float] = field(default_factory=dict)  # see `summary`; AP of both, where truth is known

    @property
    def accepted(self) -> bool:
        return self.reason is None


@dataclass
class _Candidate:
    """One file on its way through the gate."""

    detect: Detect | None = None
    failure: str | None = None
    differences: list[NDArray[np.float64]] = field(default_factory=list)
    tables: list[DetectionTable] = field(default_factory=list)


def judge_files(model: LoadedDetector, files: Mapping[str, Path], checked: CheckSet) -> dict[str, Verdict]:
    """What each file, by its format, is worth; `model` computes every picture once for all of them."""
    candidates = {name: _opened(name, path, model) for name, path in files.items()}
    tables = []
    with Progress("checking", total=checked.images, unit="image") as progress:
        for pictures in ragged(checked.batches(model.config.input_size)):
            expected = model.detect(pictures.pixels, pictures.sizes)
            tables.append(_table(expected, pictures))
            for candidate in candidates.values():
                _compare(candidate, expected, pictures, model)
            progress.advance(len(pictures.image_id))
    ap = _ap(tables, checked.truth)
    return {name: _verdict(name, candidate, ap, checked.truth) for name, candidate in candidates.items()}


def differences(expected: Detections, given: Detections, sizes: Tensor, number: int) -> NDArray[np.float64]:
    """How far off the given detections are from each of the `number` best expected ones of every image.

    Returns:
        [B * number, 2] of the score, and of the worst corner over the image's width or height.
    """
    images = zip(*_arrays(expected, number), *_arrays(given, None), sizes.double().repeat(1, 2).numpy(), strict=True)
    return np.concatenate([_differences_in_image(*image) for image in images])


def _differences_in_image(
    labels: NDArray[np.int64],
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    given_labels: NDArray[np.int64],
    given_boxes: NDArray[np.float64],
    given_scores: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The pairing of least total difference; [n, 2] for n expected detections, 1 where nothing is left to pair with."""
    score = np.abs(scores[:, None] - given_scores)
    box = (np.abs(boxes[:, None] - given_boxes) / scale).max(-1)
    pair = np.stack([score, box], axis=-1)
    pair[~np.isfinite(pair).all(-1) | (labels[:, None] != given_labels)] = UNLIKE
    pair = pair.clip(max=UNLIKE)
    result = np.full((len(labels), 2), UNLIKE)
    rows, columns = linear_sum_assignment(pair.sum(-1))
    result[rows] = pair[rows, columns]
    return result


def summary(off: NDArray[np.float64], tolerance: Tolerance) -> dict[str, float]:
    """Of differences [D, 2]: how many agree, the largest among these, and the quantiles of all."""
    agree = (off[:, 0] <= tolerance.score) & (off[:, 1] <= tolerance.box)
    numbers: dict[str, float] = {"detections": len(off), "agreeing": float(agree.mean()) if len(off) else 0.0}
    for column, name in enumerate(("score", "box")):
        numbers[f"{name}_median"] = float(np.quantile(off[:, column], 0.5)) if len(off) else float("nan")
        numbers[f"{name}_99"] = float(np.quantile(off[:, column], 0.99)) if len(off) else float("nan")
        numbers[f"{name}_largest_agreeing"] = float(off[agree, column].max(initial=0.0))
    return numbers


def _opened(name: str, path: Path, model: LoadedDetector) -> _Candidate:
    try:
        return _Candidate(detect=OPENERS[name](path, model))
    except Exception as error:  # each runtime raises errors of its own
        return _Candidate(failure=f"cannot be opened: {_first_line(error)}")


def _compare(candidate: _Candidate, expected: Detections, pictures: Pictures, model: LoadedDetector) -> None:
    if candidate.detect is None or candidate.failure:
        return
    number = min(COMPARED, expected.scores.shape[1], model.config.num_queries)
    try:
        given = candidate.detect(pictures.pixels, pictures.sizes)
        candidate.tables.append(_table(given, pictures))
        candidate.differences.append(differences(expected, given, pictures.sizes, number))
    except Exception as error:  # each runtime raises errors of its own
        candidate.failure = f"fails on a batch of {len(pictures.image_id)}: {_first_line(error)}"


def _verdict(name: str, candidate: _Candidate, ap: float | None, truth: GroundTruth | None) -> Verdict:
    tolerance = TOLERANCES[name]
    if candidate.failure:
        return Verdict(name, tolerance, candidate.failure)
    measured = summary(np.concatenate([np.zeros((0, 2)), *candidate.differences]), tolerance)
    reason = None
    if measured["agreeing"] < tolerance.share:
        reason = (
            f"{measured['agreeing']:.1%} of its detections agree with the detector's within {tolerance.score:g} of the score"
            f" and {tolerance.box:g} of the image's side; {tolerance.share:.0%} must"
        )
    theirs = _ap(candidate.tables, truth)
    if ap is not None and theirs is not None:
        measured |= {"AP_pytorch": ap, "AP_exported": theirs}
        if abs(ap - theirs) > tolerance.ap:
            reason = reason or f"its AP is {theirs:.4f}, the detector's {ap:.4f}; {tolerance.ap:g} apart is the limit"
    return Verdict(name, tolerance, reason, measured)


def _ap(tables: list[DetectionTable], truth: GroundTruth | None) -> float | None:
    """None where there is nothing to be found."""
    if truth is None or not truth.boxes_of_class.any():
        return None
    return coco_numbers(truth, concatenate(tables)).numbers["AP"]


def _table(found: Detections, pictures: Pictures) -> DetectionTable:
    return DetectionTable.from_batch(found, pictures.image_id, [False] * len(pictures.image_id))


def _arrays(found: Detections, number: int | None) -> Iterator[NDArray[Any]]:
    for tensor in (found.labels, found.boxes.double(), found.scores.double()):
        yield tensor[:, :number].cpu().numpy()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'without a word'}"
