"""FDR arithmetic against the published tables, against hand-made loops and against its own inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfine_core.model.distribution import bracketing_bins, decode_boxes, integral, true_offsets, weighting_function

# Right half of W(n) for reg_max = 32, up = 0.5, as printed in the specification.
PUBLISHED = {
    4.0: "0 .0760 .1578 .2457 .3404 .4422 .5518 .6698 .7967 .9332 1.0801 1.2381 1.4082 1.5912 1.7881 2 4",
    8.0: "0 .1133 .2394 .3797 .5360 .7100 .9037 1.1193 1.3593 1.6265 1.9240 2.2552 2.6239 3.0344 3.4913 4 8",
}


@pytest.mark.parametrize("reg_scale", list(PUBLISHED))
def test_the_weighting_function_is_the_published_one(reg_scale: float) -> None:
    bins = weighting_function(32, 0.5, reg_scale)
    torch.testing.assert_close(
        bins[16:], torch.tensor([float(w) for w in PUBLISHED[reg_scale].split()]), atol=1e-4, rtol=0
    )
    assert torch.equal(bins, -bins.flip(0))


@given(reg_max=st.integers(2, 40).map(lambda n: 2 * n), up=st.floats(0.05, 2), reg_scale=st.floats(0.5, 16))
def test_bins_ascend_for_any_setting(reg_max: int, up: float, reg_scale: float) -> None:
    bins = weighting_function(reg_max, up, reg_scale)
    assert len(bins) == reg_max + 1
    assert (bins.diff() > 0).all()
    assert bins[-1] == pytest.approx(2 * up * reg_scale, rel=1e-5)
    assert bins[-2] == pytest.approx(up * reg_scale, rel=1e-5)


def test_equal_logits_leave_a_box_where_it_is() -> None:
    bins = weighting_function(32, 0.5, 4)
    offsets = integral(torch.zeros(7, 4, 33), bins)
    torch.testing.assert_close(offsets, torch.zeros(7, 4), atol=1e-6, rtol=0)
    boxes = torch.rand(7, 4)
    torch.testing.assert_close(decode_boxes(boxes, torch.zeros(7, 4), 4.0), boxes)


def test_one_edge_moves_by_its_share_of_the_box() -> None:
    box = torch.tensor([0.5, 0.5, 0.2, 0.4])  # left 0.4, top 0.3, right 0.6, bottom 0.7
    moved = decode_boxes(box, torch.tensor([2.0, 0, 0, 0]), reg_scale=4.0)  # left edge out by 2/4 of the width
    torch.testing.assert_close(moved, torch.tensor([0.45, 0.5, 0.3, 0.4]))


@given(seed=st.integers(0, 1000), reg_scale=st.floats(1, 16))
def test_true_offsets_decode_to_the_target(seed: int, reg_scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    initial, target = (torch.rand(20, 4, generator=generator, dtype=torch.float64) * 0.8 + 0.1 for _ in range(2))
    target_xyxy = torch.cat([target[:, :2] - target[:, 2:] / 2, target[:, :2] + target[:, 2:] / 2], -1)
    offsets = true_offsets(initial, target_xyxy, reg_scale)
    torch.testing.assert_close(decode_boxes(initial, offsets, reg_scale), target)


def test_an_empty_initial_box_has_finite_bins() -> None:
    bins = weighting_function(32, 0.5, 4)
    offsets = true_offsets(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.1, 0.5, 0.9, 0.9]]), 4.0)
    bracket, share = bracketing_bins(offsets, bins)
    assert torch.isfinite(share).all()
    assert bracket.min() >= 0
    assert bracket.max() <= 32


@given(offset=st.floats(-20, 20), reg_max=st.sampled_from([4, 8, 32, 64]))
def test_bracketing_bins_average_to_the_offset(offset: float, reg_max: int) -> None:
    bins = weighting_function(reg_max, 0.5, 4).double()
    bracket, share = bracketing_bins(torch.tensor([offset], dtype=torch.float64), bins)
    mean = (bins[bracket] * share).sum()
    clamped = min(max(offset, float(bins[0])), float(bins[-1]))
    assert float(mean) == pytest.approx(clamped, abs=1e-9)
    assert float(share.sum()) == 1
    inside = sum(1 for b in bins.tolist() if b <= offset) - 1  # the specification's rule, by counting
    left = min(max(inside, 0), reg_max - 1)
    assert bracket.tolist() == [[left, left + 1]]
