"""Split conformal prediction for edges: half-widths that hold the true edge at a chosen rate.

The guarantee: if new objects come from the source of the fitted ones (exchangeable data), the interval edge +- half-width holds
the true edge with at least the wanted probability, on average over objects. It is a statement about *matched* objects: detections
that found something at the IoU of the match. It says nothing about objects that were missed, nor about one class or one size by
itself, and it is weaker for edges at the border of the image: there widths are far larger than errors, so that other edges
have less than their share.

Source: Vovk et al., Algorithmic Learning in a Random World; Lei et al., arXiv:1604.04173 (errors scaled by a predicted width).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

LEAST_OF_A_CLASS = 100  # matched objects from which a class gets its own factor
SMALLEST = 1e-9  # widths below are taken as this one, so that a certain and wrong edge has a finite score


@dataclass(frozen=True)
class EdgeCalibration:
    """Factor between predicted widths and half-widths that hold the true edge; see `fit_edge_calibration`."""

    factor: float
    coverage: float  # wanted, in (0, 1)
    joint: bool  # the coverage is that of all four edges of a box together, instead of each one
    objects: int  # matched objects that the factors come from
    by_label: Mapping[int, float] = field(default_factory=dict)  # factors of classes with objects enough
    exponents: tuple[float, ...] = (1.0,)  # width = product of std and the further predictors, each to its power

    def half_width(self, std: Tensor, labels: Tensor | None = None, predictors: Sequence[Tensor] = ()) -> Tensor:
        """Half-width of the interval around every edge, [..., 4], in the unit of `std`.

        Args:
            std: [..., 4], see `edge_std`.
            labels: [...] classes; without them the factor of all classes is used.
            predictors: those that the calibration was fitted with.

        Raises:
            ValueError: other predictors than in the fit.
        """
        width = predicted_width(std, predictors, self.exponents)
        if labels is None or not self.by_label:
            return self.factor * width
        factors = torch.full(labels.shape, self.factor, dtype=width.dtype, device=width.device)
        for label, factor in self.by_label.items():
            factors = torch.where(labels == label, factor, factors)
        return factors.unsqueeze(-1) * width

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "factor": self.factor,
            "coverage": self.coverage,
            "joint": self.joint,
            "objects": self.objects,
            "by_label": {str(label): factor for label, factor in self.by_label.items()},
            "exponents": list(self.exponents),
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Self:
        """Read plain values.

        Raises:
            ValueError: they are no edge calibration.
        """
        try:
            factors = {int(label): float(factor) for label, factor in content["by_label"].items()}
            read = cls(
                factor=float(content["factor"]),
                coverage=float(content["coverage"]),
                joint=bool(content["joint"]),
                objects=int(content["objects"]),
                by_label=factors,
                exponents=tuple(map(float, content["exponents"])),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"edge calibration cannot be read: {error!r}") from None
        numbers = (read.factor, *read.by_label.values())
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or not 0 < read.coverage < 1:
            raise ValueError(f"edge calibration with factor {read.factor} for coverage {read.coverage}")
        return read


def fit_edge_calibration(
    std: Tensor,
    error: Tensor,
    coverage: float = 0.9,
    joint: bool = False,
    *,
    labels: Tensor | None = None,
    predictors: Sequence[Tensor] = (),
) -> EdgeCalibration:
    """Find the factor from which std times factor holds the error at the wanted rate, in finite samples.

    The module says what is guaranteed, and what is not.

    Args:
        std: [M, 4] predicted standard deviations of the edges of M matched detections.
        error: [M, 4] errors of these edges, in the same unit; the sign does not matter.
        coverage: wanted share, in (0, 1).
        joint: the four edges of a box together, instead of each edge by itself.
        labels: [M] classes; every class with 100 objects and more gets its own factor.
        predictors: further positive values [M, 4] that the error may grow with, such as the box's side or 1 - score. The width is
            then a product of powers, fitted to every second object; the factor comes from the others.

    Raises:
        ValueError: values are not finite, shapes differ, or there are too few objects for the coverage.
    """
    std, error = std.double(), error.double().abs()
    if std.ndim != 2 or std.shape[-1] != 4 or std.shape != error.shape:
        raise ValueError(f"std {tuple(std.shape)} and error {tuple(error.shape)} must both be [M, 4]")
    if not (torch.isfinite(std).all() and torch.isfinite(error).all()) or (std < 0).any():
        raise ValueError("std and error must be finite, and std at least 0")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage ({coverage}) must lie between 0 and 1: it is the share of edges inside")

    exponents: tuple[float, ...] = (1.0,)
    if predictors:
        exponents = _exponents(std[::2], error[::2], [values[::2] for values in predictors])
        std, error, predictors = std[1::2], error[1::2], [values[1::2] for values in predictors]
        labels = None if labels is None else labels[1::2]
    score = error / predicted_width(std, predictors, exponents)
    score = score.amax(-1, keepdim=True) if joint else score  # [M, 1] or [M, 4]

    by_label = {}
    if labels is not None:
        for label in labels.unique().tolist():
            own = score[labels == label]
            if len(own) >= LEAST_OF_A_CLASS:
                by_label[int(label)] = conformal_quantile(own.flatten(), coverage)
    return EdgeCalibration(
        factor=conformal_quantile(score.flatten(), coverage),
        coverage=coverage,
        joint=joint,
        objects=len(score),
        by_label=by_label,
        exponents=exponents,
    )


def conformal_quantile(score: Tensor, coverage: float) -> float:
    """Score that a new one does not exceed with probability `coverage`: the ceil((n + 1) coverage)-th smallest of n.

    Raises:
        ValueError: n is too small for it.
    """
    rank = math.ceil(round((len(score) + 1) * coverage, 9))  # 0.9 * 10 is no more than 9
    if rank > len(score):
        needed = math.ceil(coverage / (1 - coverage))
        raise ValueError(f"{len(score)} values are too few for a coverage of {coverage:g}: it takes at least {needed}")
    return float(score.sort().values[rank - 1])


def predicted_width(std: Tensor, predictors: Sequence[Tensor], exponents: Sequence[float]) -> Tensor:
    """Product of the standard deviation and further predictors, each to its power."""
    if len(predictors) + 1 != len(exponents):
        raise ValueError(
            f"{len(predictors)} predictors beside std, and the calibration was fitted with {len(exponents) - 1}"
        )
    width = std.clamp(min=SMALLEST) if exponents[0] == 1 else std.clamp(min=SMALLEST) ** exponents[0]
    for values, exponent in zip(predictors, exponents[1:], strict=True):
        width = width * values.to(width).clamp(min=SMALLEST) ** exponent
    return width


def _exponents(std: Tensor, error: Tensor, predictors: Sequence[Tensor]) -> tuple[float, ...]:
    """Powers by least squares of the logarithms."""
    columns = [std, *(values.double() for values in predictors)]
    design = torch.stack([values.clamp(min=SMALLEST).log().flatten() for values in columns], -1)
    design = torch.cat([torch.ones_like(design[:, :1]), design], -1)
    target = torch.maximum(error, std / 100).clamp(min=SMALLEST).log().flatten()  # an error of 0 is below a hundredth
    solution = torch.linalg.lstsq(design, target.unsqueeze(-1), driver="gelsd").solution
    return tuple(solution[1:, 0].tolist())
