"""Widths of edges: against distributions with known truth, plain loops, and a trained detector's outputs on COCO.

`golden/fdr_real.npz` has 220 images of COCO val2017 (annotations CC BY 4.0, Lin et al.) with the detections of DEIMv2-Femto
(Apache-2.0) at 416 px: those scored 0.2 and more, and edge distributions of matched ones from 0.3.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm, spearmanr
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy
from dfine_core.model.distribution import decode_boxes, integral, weighting_function
from dfine_core.uncertainty import (
    EdgeCalibration,
    edge_errors,
    edge_interval,
    edge_std,
    fit_edge_calibration,
    interval_coverage,
    rank_correlation,
    width_calibration_error,
)
from tests.support.real_edges import RealEdges, real_edges

REG_SCALE = 4.0
BINS = weighting_function(32, 0.5, REG_SCALE)


@pytest.fixture(scope="module")
def real() -> RealEdges:
    return real_edges()


def test_the_deviation_of_an_edge_is_that_of_its_distribution() -> None:
    bins = torch.tensor([-2.0, 0.0, 1.0])
    certain, uniform, bimodal = [0.0, 1, 0], [1 / 3] * 3, [0.5, 0, 0.5]
    probabilities = torch.tensor([[certain, uniform, bimodal, certain]])
    box = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    uniform_deviation = ((4 + 0 + 1) / 3 - (-1 / 3) ** 2) ** 0.5
    expected = [0.0, uniform_deviation * 0.4 / 4, 1.5 * 0.2 / 4, 0.0]
    assert edge_std(probabilities, bins, box, 4.0)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_an_interval_by_hand() -> None:
    """F is .125 at -2, .5 at 0 and .875 at 1; 60 % lie between the offsets where it is .2 and .8."""
    bins = torch.tensor([-2.0, 0.0, 1.0])
    probabilities = torch.tensor([0.25, 0.5, 0.25]).expand(4, 3)
    box = torch.tensor([10.0, 20.0, 4.0, 8.0])  # one unit of an offset is 1 wide, 2 high
    low, high = -2 + 2 * (0.2 - 0.125) / 0.375, (0.8 - 0.5) / 0.375
    x1 = (10 - (2 + high), 10 - (2 + low))  # the left edge moves left with its offset
    y1 = (20 - 2 * (2 + high), 20 - 2 * (2 + low))
    x2, y2 = (10 + 2 + low, 10 + 2 + high), (20 + 2 * (2 + low), 20 + 2 * (2 + high))
    interval = edge_interval(probabilities, bins, box, REG_SCALE, mass=0.6)
    assert interval.flatten().tolist() == pytest.approx([*x1, *y1, *x2, *y2], abs=1e-5)


def plain_quantile(probabilities: NDArray[np.float64], level: float) -> float:
    """Offset at a level of the distribution function, by a loop over bins."""
    below = 0.0
    previous: tuple[float, float] | None = None
    for probability, offset in zip(probabilities, BINS.tolist(), strict=True):
        here = below + probability / 2
        if here >= level:
            if previous is None:
                return offset
            at, before = previous
            return before + (offset - before) * (level - at) / (here - at)
        previous, below = (here, offset), below + probability
    return float(BINS[-1])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sharpness=st.floats(0.0, 30.0),
    mass=st.sampled_from([0.01, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999]),
)
def test_intervals_equal_a_loop_over_bins(seed: int, sharpness: float, mass: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (sharpness * torch.randn(3, 4, 33, generator=generator, dtype=torch.float64)).softmax(-1)
    boxes = torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.1
    interval = edge_interval(probabilities, BINS, boxes, REG_SCALE, mass)
    assert (interval[..., 0] <= interval[..., 1]).all()

    offsets = [
        torch.tensor([[plain_quantile(p, level) for p in box] for box in probabilities.numpy()], dtype=torch.float64)
        for level in ((1 - mass) / 2, (1 + mass) / 2)
    ]
    low, high = (cxcywh_to_xyxy_signed(decode_boxes(boxes, offset, REG_SCALE)) for offset in offsets)
    torch.testing.assert_close(
        interval[..., :2, 0], high[..., :2]
    )  # left and top: a large offset is a small coordinate
    torch.testing.assert_close(interval[..., 2:, 1], high[..., 2:])
    torch.testing.assert_close(interval[..., :2, 1], low[..., :2])
    torch.testing.assert_close(interval[..., 2:, 0], low[..., 2:])


def cxcywh_to_xyxy_signed(boxes: Tensor) -> Tensor:
    """Corners of boxes that may be inside out."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_distribution_gives_nan_and_the_width_grows_with_the_mass(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    certain = torch.zeros(4, 33)
    certain[torch.arange(4), torch.randint(0, 33, (4,), generator=generator)] = 1.0
    box = torch.rand(4, generator=generator)
    widths = [edge_interval(certain, BINS, box, REG_SCALE, mass).diff(dim=-1) for mass in (0.1, 0.5, 0.9, 0.999)]
    assert all(torch.isfinite(width).all() and (width >= 0).all() for width in widths)
    assert all((wide >= narrow - 1e-6).all() for narrow, wide in itertools.pairwise(widths))
    assert edge_std(certain, BINS, box, REG_SCALE).tolist() == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("mass", [0.0, 1.0, 90.0])
def test_a_mass_that_is_no_probability_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        edge_interval(torch.ones(4, 33) / 33, BINS, torch.ones(4), REG_SCALE, mass)


def test_half_precision_is_widened() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(50, 4, 33, generator=generator).softmax(-1)
    boxes = torch.rand(50, 4, generator=generator)
    stored = exact.half()
    torch.testing.assert_close(
        edge_std(stored, BINS, boxes, REG_SCALE), edge_std(exact, BINS, boxes, REG_SCALE), rtol=2e-3, atol=1e-4
    )
    assert edge_std(stored, BINS, boxes, REG_SCALE).dtype == torch.float32


def test_intervals_of_synthetic_edges_hold_their_mass() -> None:
    """True edges are drawn from the predicted distributions themselves, as mass spread between the bins."""
    generator = torch.Generator().manual_seed(1)
    count = 4000
    centre = torch.empty(count, 4, 1).uniform_(-0.6, 0.6, generator=generator)
    width = torch.empty(count, 4, 1).uniform_(0.1, 0.5, generator=generator)
    probabilities = (-((BINS - centre) ** 2) / (2 * width**2)).softmax(-1)
    boxes = torch.rand(count, 4, generator=generator) * 100 + 20
    levels = torch.rand(count, 4, generator=generator)
    cumulative = probabilities.cumsum(-1) - probabilities / 2
    drawn = torch.tensor(
        [
            [np.interp(level, f, BINS.numpy()) for level, f in zip(row, fs, strict=True)]
            for row, fs in zip(levels.numpy(), cumulative.numpy(), strict=True)
        ]
    ).float()
    true = cxcywh_to_xyxy_signed(decode_boxes(boxes, drawn, REG_SCALE))
    for mass in (0.5, 0.8, 0.9, 0.95, 0.99):
        held = float(interval_coverage(edge_interval(probabilities, BINS, boxes, REG_SCALE, mass), true).mean())
        assert held == pytest.approx(mass, abs=4 * (mass * (1 - mass) / (4 * count)) ** 0.5)


# A trained detector


def test_real_distributions_decode_to_the_recorded_boxes(real: RealEdges) -> None:
    logits = real.probabilities.float().clamp(min=1e-8).log()
    boxes = decode_boxes(real.reference_boxes, integral(logits, real.bins), REG_SCALE)
    away = (cxcywh_to_xyxy(boxes) - real.boxes).abs()
    assert float(away.max()) < 0.25  # probabilities are stored in half precision
    assert float(away.median()) < 0.01


@pytest.mark.parametrize(("mass", "held"), [(0.5, 0.474), (0.8, 0.772), (0.9, 0.900), (0.95, 0.947), (0.99, 0.985)])
def test_real_intervals_hold_what_they_promise(real: RealEdges, mass: float, held: float) -> None:
    """`held` is the share over all 1,000 images; these are the first 220."""
    interval = edge_interval(real.probabilities, real.bins, real.reference_boxes, REG_SCALE, mass)
    edges = 4 * len(real.boxes)
    deviation = (held * (1 - held) / edges) ** 0.5
    assert float(interval_coverage(interval, real.true_boxes).mean()) == pytest.approx(held, abs=4 * deviation)


def test_real_widths_tell_small_errors_from_large_ones(real: RealEdges) -> None:
    std, error = real.std, edge_errors(real.boxes, real.true_boxes)
    side = torch.cat([real.reference_boxes[:, 2:]] * 2, -1)
    assert rank_correlation(std, error) == pytest.approx(0.333, abs=0.05)
    assert rank_correlation(std / side, error / side) == pytest.approx(0.548, abs=0.05)
    assert rank_correlation(std, error) == pytest.approx(
        float(spearmanr(std.flatten(), error.flatten()).statistic), abs=1e-9
    )
    shuffled = std[torch.randperm(len(std), generator=torch.Generator().manual_seed(0))]
    assert width_calibration_error(std, error)[0] < 0.2 < width_calibration_error(shuffled, error)[0]


# Conformal calibration


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_conformal_half_widths_hold_on_the_other_half_of_real_images(
    real: RealEdges, coverage: float, joint: bool
) -> None:
    std, error = real.std, edge_errors(real.boxes, real.true_boxes)
    fitted = fit_edge_calibration(std[::2], error[::2], coverage, joint)
    inside = error[1::2] <= fitted.half_width(std[1::2])
    held = float((inside.all(-1) if joint else inside).double().mean())
    objects = len(std) // 2  # edges of one object err together
    assert held == pytest.approx(coverage, abs=4 * (2 * coverage * (1 - coverage) / objects) ** 0.5)


def test_the_factor_is_the_finite_sample_quantile() -> None:
    error = torch.arange(1.0, 10).unsqueeze(-1).expand(9, 4)
    ones = torch.ones(9, 4)
    assert fit_edge_calibration(ones, error, 0.9, joint=True).factor == 9.0  # the 9th of 9: ceil(10 * .9)
    assert fit_edge_calibration(ones, -error, 0.5, joint=True).factor == 5.0
    assert fit_edge_calibration(2 * ones, error, 0.5).factor == 2.5  # the 19th of 36
    with pytest.raises(ValueError, match=r"9 values are too few for a coverage of 0\.95: it takes at least 19"):
        fit_edge_calibration(ones, error, 0.95, joint=True)


@pytest.mark.parametrize("count", [19, 50, 200])
def test_coverage_over_many_draws_is_at_least_the_wanted_one(count: int) -> None:
    """Joint scores are exchangeable: the mean coverage over calibration sets is ceil((n + 1) c) / (n + 1)."""
    generator = torch.Generator().manual_seed(count)
    held = []
    for _ in range(400):
        std = torch.rand(count, 4, generator=generator) + 0.1
        error = std * torch.randn(count, 4, generator=generator)
        factor = fit_edge_calibration(std, error, 0.9, joint=True).factor
        held.append((2 * norm.cdf(factor) - 1) ** 4)
    exact = np.ceil(round((count + 1) * 0.9, 9)) / (count + 1)
    assert np.mean(held) == pytest.approx(exact, abs=4 * np.std(held) / 20)


def test_classes_with_objects_enough_have_their_own_factor() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.tensor([0] * 500 + [1] * 500 + [2] * 99)
    spread = torch.tensor([1.0, 3.0, 1.0])[labels].unsqueeze(-1)
    error = spread * torch.randn(len(labels), 4, generator=generator)
    fitted = fit_edge_calibration(torch.ones(len(labels), 4), error, 0.9, labels=labels)
    assert set(fitted.by_label) == {0, 1}
    assert fitted.by_label[0] == pytest.approx(1.645, abs=0.1)
    assert fitted.by_label[1] == pytest.approx(3 * 1.645, abs=0.3)
    widths = fitted.half_width(torch.ones(3, 4), torch.tensor([0, 1, 2]))
    assert widths[:, 0].tolist() == pytest.approx([fitted.by_label[0], fitted.by_label[1], fitted.factor])


def test_further_predictors_narrow_intervals_at_equal_coverage(real: RealEdges) -> None:
    std, error = real.std, edge_errors(real.boxes, real.true_boxes)
    side = torch.cat([real.reference_boxes[:, 2:]] * 2, -1)
    doubt = (1 - real.scores).unsqueeze(-1).expand_as(std)
    plain = fit_edge_calibration(std[::2], error[::2])
    fitted = fit_edge_calibration(std[::2], error[::2], predictors=[side[::2], doubt[::2]])
    width = fitted.half_width(std[1::2], predictors=[side[1::2], doubt[1::2]])
    assert float((error[1::2] <= width).double().mean()) == pytest.approx(0.9, abs=0.04)
    assert float(width.mean()) < 0.95 * float(plain.half_width(std[1::2]).mean())
    with pytest.raises(ValueError, match="0 predictors beside std, and the calibration was fitted with 2"):
        fitted.half_width(std)


def test_an_edge_calibration_travels_as_plain_values() -> None:
    fitted = EdgeCalibration(1.4, 0.9, joint=False, objects=500, by_label={3: 1.7}, exponents=(1.0, 0.5))
    assert EdgeCalibration.from_plain(fitted.to_plain()) == fitted
    for broken in ({"factor": float("nan")}, {"coverage": 1.0}, {"by_label": [1]}, {"objects": None}):
        with pytest.raises(ValueError, match="edge calibration"):
            EdgeCalibration.from_plain(fitted.to_plain() | broken)


@pytest.mark.parametrize(
    ("std", "error", "message"),
    [
        (torch.ones(3, 3), torch.ones(3, 3), r"must both be \[M, 4\]"),
        (torch.ones(3, 4), torch.ones(2, 4), r"must both be \[M, 4\]"),
        (torch.full((3, 4), torch.nan), torch.ones(3, 4), "must be finite"),
        (-torch.ones(3, 4), torch.ones(3, 4), "must be finite, and std at least 0"),
        (torch.zeros(0, 4), torch.zeros(0, 4), "0 values are too few"),
    ],
)
def test_values_that_cannot_be_fitted_are_refused(std: Tensor, error: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_edge_calibration(std, error)


def test_width_calibration_error_by_hand() -> None:
    std = torch.tensor([1.0, 1.0, 2.0, 2.0])
    error = torch.tensor([1.0, -1.0, 4.0, 0.0])
    value, table = width_calibration_error(std, error, bins=2)
    assert table.tolist() == [[1.0, 1.0], [2.0, pytest.approx(8**0.5)]]
    assert value == pytest.approx((0 + (8**0.5 - 2) / 2) / 2)
