"""Agreement of two sets of detections in the same images.

Detections are paired before they are compared, because queries of nearly equal scores swap ranks between runtimes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.model.postprocess import Detections

COMPARED_DETECTIONS = 100  # per image, best first; COCO's own limit
MISMATCH = 1.0  # difference if a detection is missing or has another class


@dataclass(frozen=True)
class Tolerance:
    """Limits that a file has to keep to."""

    score: float  # largest difference of a score
    box: float  # largest difference of a corner, as a fraction of the image's width or height
    share: float  # fraction of the detections that must agree in score and box
    ap: float = 0.001  # largest difference of AP; 0.001 is 0.1 points
    typical: float | None = None  # largest median of both differences; None: not limited
    noise: bool = True  # compare images of noise; False: ranges measured on real images do not hold them


# Rounding in float32 leaves medians of 1e-7; one softmax in half precision, in the midst of float32, leaves 2e-6 to 4e-6.
FULL = Tolerance(score=1e-4, box=1e-4, share=0.99, typical=1e-6)
HALF = Tolerance(score=2e-2, box=1e-2, share=0.9)
INT8 = Tolerance(score=0.1, box=0.05, share=0.8, ap=0.005, noise=False)


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
    from scipy.optimize import linear_sum_assignment  # half a second of CPU

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


def _arrays(detections: Detections, number: int | None) -> Iterator[NDArray[Any]]:
    for tensor in (detections.labels, detections.boxes.double(), detections.scores.double()):
        yield tensor[:, :number].cpu().numpy()
