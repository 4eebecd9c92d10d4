"""The fused sampling operator against the plain path of the same attention. Run by `test_sampling.py`, under the interpreter."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfine_core import Detector, ModelConfig
from dfine_core.model import sampling
from dfine_core.model.attention import DeformableAttention, Levels, split_levels
from dfine_core.model.sampling import deformable_sampling

HEADS, WIDTH = 2, 3  # channels of a head: no power of two
SHAPES, POINTS = ((5, 4), (1, 3), (2, 2)), (2, 1, 1)
SIZES = [side for shape in SHAPES for side in shape]
TOKENS = sum(h * w for h, w in SHAPES)
Arguments = tuple[Tensor, Tensor, Tensor]  # tokens, locations, weights


def arguments(seed: int, *, batch: int = 1, queries: int = 5, spread: float = 1.0) -> Arguments:
    """Random tokens and weights, and locations in and around the maps."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, TOKENS, HEADS * WIDTH, generator=generator)
    locations = 0.5 + spread * (torch.rand(batch, queries, HEADS, sum(POINTS), 2, generator=generator) - 0.5)
    weights = torch.rand(batch, queries, HEADS, sum(POINTS), generator=generator) - 0.3
    return tokens, locations, weights


def plain(tokens: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    attention = DeformableAttention(HEADS * WIDTH, HEADS, POINTS)
    maps = split_levels(tokens, SHAPES, HEADS).maps
    assert maps is not None
    return attention._sample(maps, locations, weights)


def fused(tokens: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return deformable_sampling(tokens, locations, weights, SIZES, POINTS)


def with_gradients(sample, inputs: Arguments) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = sample(*leaves)
    outwards = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * outwards).sum(), leaves)]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 3), spread=st.sampled_from([0.2, 1.0, 3.0]))
def test_values_and_gradients_are_those_of_the_plain_path(seed: int, batch: int, spread: float) -> None:
    inputs = arguments(seed, batch=batch, queries=13, spread=spread)  # more rows than a program has, with 3 images
    for ours, theirs in zip(with_gradients(fused, inputs), with_gradients(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("place", [0.0, 1.0, -0.125, 1.125, -7.0, 1e6, 1e30])
def test_borders_and_what_lies_outside(place: float) -> None:
    tokens, locations, weights = arguments(3, queries=2)
    locations[:, 0] = place
    locations[:, 1, :, :, 0] = place
    ours, theirs = fused(tokens, locations, weights), plain(tokens, locations, weights)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    if abs(place) > 2:
        found = with_gradients(fused, (tokens, locations, weights))
        assert all((x == 0).all() for x in found)


def test_cell_centres_give_their_tokens() -> None:
    tokens, locations, weights = arguments(4, queries=1)
    weights[...] = 0
    weights[..., 0] = 1  # the first point of the first level
    locations[0, 0, 0, 0] = torch.tensor([(2 + 0.5) / 4, (3 + 0.5) / 5])  # row 3, column 2 of 5 x 4
    locations[0, 0, 1, 0] = torch.tensor([(0 + 0.5) / 4, (1 + 0.5) / 5])
    out = fused(tokens, locations, weights)[0, 0]
    torch.testing.assert_close(out, torch.cat([tokens[0, 14, :WIDTH], tokens[0, 4, WIDTH:]]))


def test_not_a_number_is_not_hidden() -> None:
    tokens, locations, weights = arguments(5)
    locations[0, 2, 1, 0, 0] = math.nan
    assert fused(tokens, locations, weights)[0, 2, WIDTH:].isnan().all()
    assert fused(tokens, locations, weights)[0, :2].isfinite().all()


def test_no_queries_no_launch() -> None:
    out, *gradients = with_gradients(fused, arguments(6, queries=0))
    assert out.shape == (1, 0, HEADS * WIDTH)
    assert gradients[0].shape == (1, TOKENS, HEADS * WIDTH)
    assert (gradients[0] == 0).all()


def test_half_precision_tokens_are_summed_in_float32() -> None:
    tokens, locations, weights = arguments(7)
    halved = tokens.bfloat16()
    out, to_tokens, *_ = with_gradients(fused, (halved, locations, weights))
    exact, expected, *_ = with_gradients(fused, (halved.float(), locations, weights))
    assert (out.dtype, to_tokens.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(out, exact)
    assert torch.equal(to_tokens, expected.bfloat16())
    assert fused(halved, locations, weights.bfloat16()).dtype == torch.bfloat16


def test_deterministic_gradients_do_not_depend_on_the_order_of_queries() -> None:
    tokens, locations, weights = arguments(8, batch=1, queries=40, spread=0.3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))

    def gradient(rows: Tensor) -> Tensor:
        leaf = tokens.clone().requires_grad_()
        out = fused(leaf, locations[:, rows], weights[:, rows])
        return torch.autograd.grad((out * torch.linspace(0.1, 3, 40)[rows].view(1, -1, 1)).sum(), leaf)[0]

    usual = [gradient(torch.arange(40)), gradient(order)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradient(torch.arange(40)), gradient(order)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert not torch.equal(*usual)  # sums of floats have an order
    torch.testing.assert_close(first, usual[0], atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, for the interpreter
def test_deterministic_gradients_do_not_hide_what_is_not_finite() -> None:
    tokens, locations, weights = arguments(9, queries=2)
    weights[0, 0, 0, 0] = math.inf
    torch.use_deterministic_algorithms(True)
    try:
        _, to_tokens, *_ = with_gradients(fused, (tokens, locations, weights))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not to_tokens.isfinite().any()


def test_the_operator_is_registered_for_autograd_and_fake_tensors() -> None:
    inputs = tuple(x.requires_grad_() for x in arguments(10, queries=2))
    torch.library.opcheck(
        deformable_sampling,
        (*inputs, SIZES, POINTS),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_detector_detects_the_same_and_is_one_graph() -> None:
    torch.manual_seed(0)
    config = ModelConfig.variant("n", num_classes=3, input_size=(32, 64), num_queries=4, num_layers=2)
    detector = Detector(config).eval()
    images = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        expected = detector(images)
        with patch.object(sampling, "usable", lambda tokens, levels: True):
            found = detector(images)
            compiled = torch.compile(detector, backend="aot_eager", fullgraph=True)(images)
    for output in (found, compiled):
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.boxes, expected.boxes, atol=1e-5, rtol=1e-5)


def test_fused_levels_are_tokens_alone() -> None:
    tokens = arguments(11)[0]
    assert split_levels(tokens, SHAPES, HEADS, fused=True) == Levels(tokens, SHAPES, None)
