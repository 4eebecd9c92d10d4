"""Drift: whether the detections of new images are distributed as those of the calibration images.

Detections of one image depend on each other, so every image counts once: by the mean score of its detections, by the median
width of their edges, and by their number. Each is compared by the two-sample Kolmogorov-Smirnov test. The level is that of all
tests together (Bonferroni): under no drift, at most this share of comparisons reports one, if images are independent. Frames of
one video are not; they report a drift more often.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

MOST_IMAGES = 2000  # that a reference holds; more are sampled, so that its file stays small
LEAST_IMAGES = 20  # on either side of a test
LEVEL = 0.01  # share of false alarms, all tests together
DIGITS = 4  # of stored values


class ImageValues(NamedTuple):
    """Summary of the detections of one image whose score reaches a limit; NaN without any."""

    score: float  # mean of the raw scores
    width: float  # median over all edges: standard deviation over the side of the box
    number: float


NAMES = ImageValues._fields


@dataclass(frozen=True)
class DriftReference:
    """Values of the calibration images, in any order."""

    least_score: float  # raw score from which a detection counts
    images: tuple[ImageValues, ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: [_shortened(row[index]) for row in self.images] for index, name in enumerate(NAMES)}
        return {"least_score": self.least_score, **values}

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Self:
        """Read plain values.

        Raises:
            ValueError: they are no reference.
        """
        try:
            rows = zip(*(content[name] for name in NAMES), strict=True)
            images = tuple(ImageValues(*(math.nan if v is None else float(v) for v in row)) for row in rows)
            return cls(float(content["least_score"]), images)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"reference of drift cannot be read: {error!r}") from None


@dataclass(frozen=True)
class DriftTest:
    """Comparison of one value between the reference and new images."""

    name: str  # one of NAMES
    images: tuple[int, int]  # with a value: reference, new ones
    medians: tuple[float, float]
    distance: float  # largest difference of the two distribution functions; NaN if there are too few images
    p_value: float
    moved: bool


def image_values(scores: Tensor, std: Tensor, sides: Tensor, least_score: float) -> ImageValues:
    """Summarise the detections of one image.

    Args:
        scores: [K] raw.
        std: [K, 4] of the edges.
        sides: [K, 4] sides of the initial boxes across each edge, in the same unit.
    """
    counted = scores >= least_score
    count = int(counted.sum())
    if not count:
        return ImageValues(math.nan, math.nan, 0.0)
    widths = std[counted] / sides[counted].clamp(min=1e-9)
    return ImageValues(float(scores[counted].double().mean()), float(widths.double().median()), float(count))


def make_reference(images: Sequence[ImageValues], least_score: float, seed: int = 0) -> DriftReference:
    """Keep the values of all images, or of `MOST_IMAGES` sampled ones."""
    if len(images) <= MOST_IMAGES:
        return DriftReference(least_score, tuple(images))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:MOST_IMAGES]
    return DriftReference(least_score, tuple(images[index] for index in sorted(chosen.tolist())))


def drift_tests(reference: Sequence[ImageValues], new: Sequence[ImageValues], level: float = LEVEL) -> list[DriftTest]:
    """Compare each value of the images by a two-sample Kolmogorov-Smirnov test.

    Args:
        level: share of false alarms of all tests together, at most.
    """
    from scipy.stats import ks_2samp  # slow to import, and most predictions need none of it

    tests = []
    for index, name in enumerate(NAMES):
        # Both with the digits that the reference is stored with: otherwise equal images would differ.
        columns = ([_shortened(row[index]) for row in rows] for rows in (reference, new))
        old, now = ([value for value in column if value is not None] for column in columns)
        distance = p_value = math.nan
        if min(len(old), len(now)) >= LEAST_IMAGES:
            distance, p_value = (float(value) for value in ks_2samp(old, now)[:2])
        tests.append(
            DriftTest(
                name=name,
                images=(len(old), len(now)),
                medians=(_median(old), _median(now)),
                distance=distance,
                p_value=p_value,
                moved=p_value < level / len(NAMES),
            )
        )
    return tests


def _shortened(value: float) -> float | None:
    """A value with the digits that are stored; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).median()) if values else math.nan
