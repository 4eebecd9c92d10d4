"""Sizes of multi-scale training."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dfine_core import ModelConfig
from pipeline.training.multiscale import multiscale_side, multiscale_sides

SMALL = ModelConfig.variant("n", input_size=(320, 320))


def drawn(seed: int, sides: list[int], steps: int = 3000) -> list[int]:
    return [multiscale_side(seed, step, sides) for step in range(steps)]


def test_multiscale_sizes_are_those_of_the_release() -> None:
    options = multiscale_sides(ModelConfig.variant("s"), repeat=20)
    sampled = drawn(0, options)
    sides, counts = np.unique(sampled, return_counts=True)
    assert sides.tolist() == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    expected = np.array([1, 1, 1, 1, 1, 20, 1, 1, 1, 1, 1]) / 30 * len(sampled)
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    assert sampled[:50] == drawn(0, options, 50)
    assert sampled[:50] != drawn(1, options, 50)
    assert set(drawn(0, multiscale_sides(ModelConfig.variant("s", input_size=(512, 512)), 0))) == {512}


@pytest.mark.parametrize("queries", [100, 300, 400])
def test_a_side_with_fewer_positions_than_queries_is_never_drawn(queries: int) -> None:
    """At 224 px D-FINE-N has 14 x 14 + 7 x 7 = 245 positions, at 256 px 320, at 288 px 405."""
    sides = multiscale_sides(replace(SMALL, num_queries=queries), repeat=3)
    assert min(sides) == {100: 224, 300: 256, 400: 288}[queries]
    assert max(sides) == 384
    assert sides.count(320) == 3
