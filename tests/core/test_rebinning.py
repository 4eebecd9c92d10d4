"""Re-binned FDR heads: boxes stay, symmetry stays, and the map is the one that is derived."""

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.rebinning import Bins, RebinReport, bell_logits, logit_map, rebin
from dfine_core.checkpoints.weights import load_weights
from dfine_core.model import distribution
from dfine_core.model.decoder import QualityEstimator
from tests.support.recorded import fill

RELEASED = Bins(32, 4.0, 0.5)
TARGETS = [{"reg_max": 16}, {"reg_max": 24}, {"reg_max": 48}, {"reg_max": 64}, {"reg_scale": 8.0}]
every_bins = st.builds(
    Bins,
    st.integers(2, 24).map(lambda half: 2 * half),
    st.sampled_from([1.0, 3.7, 4.0, 8.0, 12.0]),
    st.sampled_from([0.25, 0.4, 0.5, 1.0]),
)
small = ModelConfig.variant("n", num_classes=2, input_size=(256, 256), num_queries=60)


@pytest.fixture(scope="module")
def detector() -> Detector:
    """Detector with random weights everywhere, so that distributions are far from uniform."""
    model = Detector(small).eval()
    fill(model, seed=0)
    return model


def shares(logits: Tensor, bins: Bins) -> Tensor:
    """Edge offsets in units of the box's size, from the spec's table of W(n) rather than from the code under test."""
    a = bins.up * bins.reg_scale
    half = bins.reg_max // 2
    growth = (a + 1) ** (2 / (bins.reg_max - 2))
    table = [0.0] * (bins.reg_max + 1)
    for k in range(1, half + 1):
        table[half + k] = 2 * a if k == half else growth**k - 1
        table[half - k] = -table[half + k]
    return logits.double().softmax(-1) @ torch.tensor(table, dtype=torch.float64) / bins.reg_scale


def boxes_and_edges(model: Detector) -> tuple[Tensor, Tensor]:
    """Boxes of the last layer and edge logits of every layer, for one fixed image."""
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(image, every_layer=True)
    return output.boxes, output.matching.edge_logits


@pytest.fixture(scope="module")
def before(detector: Detector) -> tuple[Tensor, Tensor]:
    return boxes_and_edges(detector)


def test_equal_bins_give_equal_weights(detector: Detector) -> None:
    before = detector.state_dict()
    after, report = rebin(before, reg_max=32, reg_scale=4.0, up=0.5)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert report.mean_shift == 0


def test_settings_that_single_precision_rounds_count_as_equal() -> None:
    model = Detector(small.with_(up=0.4, reg_scale=3.7))
    after, report = rebin(model.state_dict(), up=0.4, reg_scale=3.7)
    assert report.source == report.target
    assert torch.equal(after["decoder.up"], model.state_dict()["decoder.up"])


@given(bins=every_bins)
@settings(max_examples=20, deadline=None)
def test_the_map_between_equal_bins_is_the_identity(bins: Bins) -> None:
    matrix, constant = logit_map(bins, bins)
    torch.testing.assert_close(matrix, torch.eye(bins.reg_max + 1, dtype=torch.float64))
    torch.testing.assert_close(constant, torch.zeros(bins.reg_max + 1, dtype=torch.float64))


@given(source=every_bins, target=every_bins, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_symmetric_distributions_stay_symmetric(source: Bins, target: Bins, seed: int) -> None:
    """The uniform distribution of an untrained model above all: its boxes are the initial boxes, exactly."""
    matrix, constant = logit_map(source, target)
    logits = torch.randn(source.reg_max + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for symmetric in (torch.zeros_like(logits), logits + logits.flip(0)):
        converted = matrix @ symmetric + constant
        assert converted.isfinite().all()
        torch.testing.assert_close(converted, converted.flip(0), rtol=0, atol=1e-10)
        assert abs(shares(converted, target)) < 1e-12


@given(source=every_bins, target=every_bins, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_mirrored_distributions_move_edges_the_other_way(source: Bins, target: Bins, seed: int) -> None:
    matrix, constant = logit_map(source, target)
    logits = torch.randn(source.reg_max + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shift = shares(matrix @ logits + constant, target)
    mirrored = shares(matrix @ logits.flip(0) + constant, target)
    torch.testing.assert_close(mirrored, -shift, rtol=0, atol=1e-10)


@given(source=every_bins, target=every_bins)
@settings(max_examples=25, deadline=None)
def test_a_constant_added_to_all_logits_still_changes_nothing(source: Bins, target: Bins) -> None:
    matrix, _ = logit_map(source, target)
    torch.testing.assert_close(matrix.sum(1), torch.ones(target.reg_max + 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "percent"),
    [
        ({"reg_max": 16}, 0.5),
        ({"reg_max": 24}, 0.2),
        ({"reg_max": 48}, 0.05),
        ({"reg_max": 64}, 0.02),
        ({"reg_scale": 8.0}, 0.1),
    ],
)
def test_bell_shaped_distributions_keep_their_expectation(change: dict[str, float], percent: float) -> None:
    target = Bins(**{**vars(RELEASED), **change})
    matrix, constant = logit_map(RELEASED, target)
    logits = bell_logits(RELEASED)
    shift = (shares(logits @ matrix.T + constant, target) - shares(logits, RELEASED)).abs()
    assert 100 * shift.mean() < percent


@pytest.mark.parametrize("change", TARGETS, ids=str)
def test_boxes_stay_closer_than_by_interpolating_logits(
    detector: Detector, before: tuple[Tensor, Tensor], change: dict[str, float]
) -> None:
    boxes, edge_logits = before
    model = Detector(small.with_(**change)).eval()
    weights, report = rebin(detector.state_dict(), **change)  # type: ignore[arg-type]
    load_weights(model, weights)
    our_boxes, our_edge_logits = boxes_and_edges(model)
    load_weights(model, {key: naively(key, value, weights, report) for key, value in detector.state_dict().items()})
    naive_boxes, _ = boxes_and_edges(model)

    assert (our_boxes - boxes).abs().mean() < 0.75 * (naive_boxes - boxes).abs().mean()
    first_layer = shares(our_edge_logits[0], report.target) - shares(edge_logits[0], report.source)
    assert 100 * first_layer.abs().mean() < 0.5  # nothing before it has moved, so this is the map's own doing


def naively(key: str, tensor: Tensor, weights: dict[str, Tensor], report: RebinReport) -> Tensor:
    """Interpolate the last layers along their bins, by offset; all else as `rebin` leaves it."""
    if not (key.startswith("decoder.dec_bbox_head") and ".layers.2." in key):
        return weights[key]
    source, target = (bins.offsets for bins in (report.source, report.target))
    right = torch.searchsorted(source, target.contiguous()).clamp(1, len(source) - 1)
    share = ((target - source[right - 1]) / (source[right] - source[right - 1])).float()
    per_edge = tensor.reshape(4, len(source), -1)
    share = share.reshape(1, -1, 1)
    return (per_edge[:, right - 1] * (1 - share) + per_edge[:, right] * share).reshape(weights[key].shape)


def test_the_constant_enters_the_sum_of_layers_once(detector: Detector) -> None:
    weights, report = rebin(detector.state_dict(), reg_max=48)
    matrix, constant = logit_map(report.source, report.target)
    state_dict = detector.state_dict()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))

    def summed(weights: dict[str, Tensor]) -> Tensor:
        heads = [f"decoder.dec_bbox_head.{i}.layers.2" for i in range(small.num_layers)]
        return sum(x @ weights[f"{head}.weight"].T + weights[f"{head}.bias"] for head in heads).reshape(5, 4, -1)  # type: ignore[union-attr]

    expected = summed(state_dict).double() @ matrix.T + constant
    torch.testing.assert_close(summed(weights).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reg_max", [16, 64])
def test_quality_estimates_of_bell_shaped_distributions_stay_close(reg_max: int) -> None:
    """Finer bins halve the largest probabilities, which an estimator left alone reads as uncertainty."""
    torch.manual_seed(0)
    model = Detector(small)
    estimate = cast(QualityEstimator, model.decoder.decoder.lqe_layers[0])
    with torch.no_grad():  # surer of itself the larger the probabilities are, as training makes it
        for parameter in estimate.parameters():
            parameter.normal_().abs_()
    weights, report = rebin(model.state_dict(), reg_max=reg_max)
    prefix = "decoder.decoder.lqe_layers.0."
    converted = QualityEstimator("relu")
    converted.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})

    matrix, constant = logit_map(report.source, report.target)
    old = bell_logits(report.source)
    new = old @ matrix.T + constant
    edges = torch.randint(len(old), (1000, 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = estimate(old[edges].float().softmax(-1))
        left_alone = (estimate(new[edges].float().softmax(-1)) - expected).abs().mean()
        taken_along = (converted(new[edges].float().softmax(-1)) - expected).abs().mean()
    assert taken_along < 0.5 * left_alone


def test_re_binned_weights_carry_their_new_settings_and_load() -> None:
    config = small.with_(reg_max=20, reg_scale=5.3, up=0.35)
    weights, report = rebin(Detector(small).state_dict(), reg_max=20, reg_scale=5.3, up=0.35)
    assert float(weights["decoder.decoder.reg_scale"]) == pytest.approx(5.3)
    assert float(weights["decoder.up"]) == pytest.approx(0.35)
    model = Detector(config)
    load_weights(model, weights)
    bins = distribution.weighting_function(20, 0.35, 5.3)
    _, edge_logits = boxes_and_edges(model.eval())
    assert distribution.integral(edge_logits, bins).abs().max() < 1e-5  # untrained heads keep boxes where they are
    assert "reg_max 20, reg_scale 5.3, up 0.35" in str(report)


def test_distributions_reach_beyond_the_old_bins_only_faintly() -> None:
    """With a larger `up` there are bins where no old one was."""
    target = Bins(32, 4.0, 1.0)
    matrix, constant = logit_map(RELEASED, target)
    logits = bell_logits(RELEASED)
    new = (logits @ matrix.T + constant).softmax(-1)
    outside = target.offsets.abs() > RELEASED.offsets.max()
    assert outside.any()
    assert new[:, outside].sum(-1).mean() < 0.05


def test_weights_without_distributions_are_refused() -> None:
    direct = Detector(small.with_(regression="direct"))
    with pytest.raises(ValueError, match="no edge distributions"):
        rebin(direct.state_dict(), reg_max=16)


@pytest.mark.parametrize("change", [{"reg_max": 15}, {"reg_max": 2}, {"reg_scale": 0.0}, {"up": -1.0}], ids=str)
def test_impossible_bins_are_refused(detector: Detector, change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="reg_max must be even"):
        rebin(detector.state_dict(), **change)  # type: ignore[arg-type]
