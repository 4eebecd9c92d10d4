"""The batched criterion against a plain one that was written from the published definition alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.criterion import gradients, random_example
from benchmarks.plain_criterion import global_optimal_pairs, plain_criterion
from dfine_core import Criterion, LossConfig, ModelConfig
from dfine_core.loss.matching import go_union, match
from dfine_core.structures import Targets

CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "two images": ([5, 9], {}),
    "an image without boxes": ([4, 0, 11], {}),
    "the first image without boxes": ([0, 3], {}),
    "a batch without boxes": ([0, 0], {}),
    "more boxes than queries": ([120, 2], {}),
    "one class": ([5, 9], {"num_classes": 1}),
    "366 classes": ([4, 7], {"num_classes": 366}),
    "one layer": ([3, 6], {"num_layers": 1}),
    "other bins": ([3, 6], {"reg_max": 16, "reg_scale": 8.0, "up": 0.25}),
    "class-agnostic queries": ([5, 9], {"query_selection": "agnostic"}),
    "direct regression": ([5, 9], {"regression": "direct"}),
    "matchability-aware loss": ([5, 0, 9], {"loss": LossConfig(classification="mal")}),
    "weighted matchability-aware loss": ([5, 9], {"loss": LossConfig(classification="mal", mal=0.7, mal_alpha=0.5)}),
}


@pytest.mark.parametrize("denoising", [True, False], ids=["denoising", "no denoising"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_plain_criterion(case: str, denoising: bool) -> None:
    counts, fields = CASES[case]
    config = ModelConfig.variant("s", **{"num_queries": 60, "num_classes": 20, **fields})
    example = random_example(config, counts, with_denoising=denoising, seed=len(case))

    terms, ours = gradients(example, lambda: Criterion(config)(example.output, example.targets))
    expected, plain = gradients(example, lambda: plain_criterion(config, example.output, example.targets))

    assert set(terms) == set(expected)
    for name, loss in expected.items():
        assert float(terms[name].detach()) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-7), name
    for leaf, gradient in plain.items():
        torch.testing.assert_close(ours[leaf], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


def test_layers_of_the_example_disagree_about_queries() -> None:
    """Otherwise the GO union would be one layer's matches, and the comparison above could not see it."""
    config = ModelConfig.variant("s", num_queries=60, num_classes=20)
    example = random_example(config, [9], with_denoising=False)
    queries = example.output.matching
    assert queries is not None
    targets = Targets.pack(example.targets, config.num_classes, torch.device("cpu"))
    found = match([(queries.logits, targets.labels)], queries.boxes, targets, config.loss)
    pairs = set(zip(found.own.query.flatten().tolist(), found.own.target.flatten().tolist(), strict=True))
    assert len(pairs) > len({query for query, _ in pairs}) > 9
    assert len(found.union) == len({query for query, _ in pairs})


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=5), min_size=1, max_size=6)
)
def test_the_union_equals_counting_pairs_in_a_loop(stages: list[list[tuple[int, int]]]) -> None:
    as_columns = [torch.tensor(stage).unbind(1) for stage in stages]
    query, box = global_optimal_pairs([(query, box) for query, box in as_columns])
    columns = np.concatenate([np.array(stage).T for stage in stages], axis=1)
    union = go_union(np.stack([np.zeros(columns.shape[1], dtype=np.int64), *columns]), queries=7, total=5)
    assert [tuple(pair) for pair in union[1:].T.tolist()] == sorted(zip(query.tolist(), box.tolist(), strict=True))
