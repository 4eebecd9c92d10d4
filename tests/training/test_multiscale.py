"""Sizes of multi-scale training."""

import numpy as np
from scipy import stats

from pipeline.training.multiscale import multiscale_size


def test_multiscale_sizes_are_those_of_the_release() -> None:
    sampled = [multiscale_size(0, step, base=640, repeat=20) for step in range(3000)]
    sides, counts = np.unique(sampled, return_counts=True)
    assert sides.tolist() == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    expected = np.array([1, 1, 1, 1, 1, 20, 1, 1, 1, 1, 1]) / 30 * len(sampled)
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    assert sampled[:50] == [multiscale_size(0, step, base=640, repeat=20) for step in range(50)]
    assert sampled[:50] != [multiscale_size(1, step, base=640, repeat=20) for step in range(50)]
    assert {multiscale_size(0, step, base=512, repeat=0) for step in range(50)} == {512}
