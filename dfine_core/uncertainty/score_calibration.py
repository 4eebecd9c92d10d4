"""Class scores as probabilities: a monotone map from the score of a detection to the chance that it is right."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

Method = Literal["temperature", "platt", "isotonic"]
EDGE = 1e-6  # scores are clipped to EDGE .. 1 - EDGE before their logit is taken


@dataclass(frozen=True)
class ScoreCalibration:
    """Map of scores; see `fit_score_calibration`."""

    method: Method
    slope: float = 1.0  # of the logit: 1 / temperature
    offset: float = 0.0  # added to the logit
    knots: tuple[tuple[float, float], ...] = ()  # of the isotonic map: (score, probability), linear between

    @property
    def temperature(self) -> float:
        """Number that logits are divided by."""
        return 1 / self.slope

    def __call__(self, score: Tensor) -> Tensor:
        """Probability that a detection with this score is right, in the shape and type of `score`."""
        if self.method == "isotonic":
            at, value = np.asarray(self.knots).T
            mapped = torch.as_tensor(np.interp(score.detach().double().cpu().numpy(), at, value))
        else:
            mapped = torch.sigmoid(self.slope * _logit(score) + self.offset)
        return mapped.to(score)

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "method": self.method,
            "slope": self.slope,
            "offset": self.offset,
            "knots": [list(knot) for knot in self.knots],
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Self:
        """Read plain values.

        Raises:
            ValueError: they are no score calibration.
        """
        try:
            knots = tuple((float(at), float(value)) for at, value in content["knots"])
            read = cls(content["method"], float(content["slope"]), float(content["offset"]), knots)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"score calibration cannot be read: {error!r}") from None
        numbers = (read.slope, read.offset, *(number for knot in knots for number in knot))
        whole = read.method in get_args(Method) and (bool(knots) == (read.method == "isotonic"))
        if not whole or read.slope <= 0 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"score calibration by {read.method!r} with slope {read.slope} and {len(knots)} knots")
        return read


def fit_score_calibration(score: Tensor, is_true: Tensor, method: Method = "temperature") -> ScoreCalibration:
    """Fit the map from score to the share of true detections.

    Temperature (one number, the safest with few detections) and Platt (two numbers) maximise the likelihood of `is_true`;
    isotonic regression is the best rising step function, for thousands of detections.

    Args:
        score: [M] in [0, 1]. Use *all* detections above some score: matched ones alone have no false ones among them.
        is_true: [M] bool, whether the detection was matched.

    Raises:
        ValueError: all detections are true, or all false, or an unknown method is named.
    """
    score, truth = score.double().flatten().cpu(), is_true.double().flatten().cpu()
    if method not in get_args(Method):
        raise ValueError(f"method ({method!r}) must be one of {', '.join(get_args(Method))}")
    if len(score) != len(truth):
        raise ValueError(f"{len(score)} scores and {len(truth)} truths")
    if not 0 < truth.sum() < len(truth):
        raise ValueError(f"{int(truth.sum())} of {len(truth)} detections are true: a map needs true and false ones")
    if method == "isotonic":
        return ScoreCalibration(method, knots=_isotonic(score.numpy(), truth.numpy()))

    logit = _logit(score).numpy()
    sign = 1 - 2 * truth.numpy()

    def negative_likelihood(parameters: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
        slope, offset = math.exp(parameters[0]), parameters[1] if len(parameters) > 1 else 0.0
        return float(np.logaddexp(0, sign * (slope * logit + offset)).mean())

    from scipy.optimize import minimize  # here: a prediction imports this package, and fits nothing

    start = np.zeros(1 if method == "temperature" else 2)
    fitted = minimize(negative_likelihood, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).x
    return ScoreCalibration(method, math.exp(fitted[0]), float(fitted[1]) if len(fitted) > 1 else 0.0)


def _logit(score: Tensor) -> Tensor:
    clipped = score.double().clamp(EDGE, 1 - EDGE)
    return torch.log(clipped) - torch.log1p(-clipped)


def _isotonic(
    score: "np.ndarray[Any, np.dtype[np.float64]]", truth: "np.ndarray[Any, np.dtype[np.float64]]"
) -> tuple[tuple[float, float], ...]:
    """Ends of the constant pieces of the rising step function; equal scores are one point."""
    from scipy.optimize import isotonic_regression

    at, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    share = np.bincount(inverse, truth) / count
    risen = isotonic_regression(share, weights=count).x
    ends = np.ones(len(at), bool)
    ends[1:-1] = (risen[1:-1] != risen[:-2]) | (risen[1:-1] != risen[2:])
    return tuple(zip(at[ends].tolist(), risen[ends].tolist(), strict=True))
