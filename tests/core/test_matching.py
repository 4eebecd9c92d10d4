"""Matching against exhaustive search, and the GO union against a plain loop."""

from collections import Counter
from itertools import permutations

import numpy as np
import scipy.optimize  # noqa: F401 - imported by `match` at its first call, which no example should pay for
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfine_core.config import LossConfig
from dfine_core.loss.matching import go_union, match, solve
from dfine_core.structures import Targets


def loop_union(triples: list[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    """Pairs by votes, then query, then box; a pair stays if its query is free."""
    votes = Counter(triples)
    taken: dict[tuple[int, int], int] = {}
    for image, query, box in sorted(votes, key=lambda t: (-votes[t], t[1], t[2])):
        taken.setdefault((image, query), box)
    return {(image, query, box) for (image, query), box in taken.items()}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 4)), max_size=80))
def test_the_union_equals_a_plain_loop(triples: list[tuple[int, int, int]]) -> None:
    pairs = np.array(triples, dtype=np.int64).reshape(-1, 3).T
    union = go_union(pairs, queries=7, total=5)
    found = [(int(image), int(query), int(box)) for image, query, box in union.T]
    assert len(found) == len(set(found))
    assert set(found) == loop_union(triples)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 10_000))
def test_assignments_are_the_cheapest_of_all(counts: list[int], seed: int) -> None:
    stages, queries = 2, 5
    cost = np.random.default_rng(seed).random((stages, sum(counts), queries))
    chosen = solve(cost, counts)
    for stage in range(stages):
        for image, count in enumerate(counts):
            start = sum(counts[:image])
            rows = range(start, start + count)
            mine = sum(cost[stage, row, chosen[stage, row]] for row in rows)
            best = min(
                sum(cost[stage, row, query] for row, query in zip(rows, order, strict=True))
                for order in permutations(range(queries), count)
            )
            assert mine <= best + 1e-9


def test_threads_solve_what_a_loop_solves() -> None:
    cost = np.random.default_rng(0).random((8, 400, 300))
    counts = [50] * 8
    threaded = solve(cost, counts)  # large enough for the pool
    alone = np.concatenate([solve(cost[:, 50 * i : 50 * (i + 1)], [50]) for i in range(8)], axis=1)
    assert (threaded == alone).all()


def test_an_image_with_more_boxes_than_queries_leaves_some_out() -> None:
    queries, counts = 6, [9, 2]
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 2, queries, 4, generator=generator) * 0.5 + 0.2
    logits = torch.randn(3, 2, queries, 4, generator=generator)
    packed = Targets.pack(
        [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.full((n, 4), 0.4)} for n in counts],
        num_classes=4,
        device=torch.device("cpu"),
    )
    found = match([(logits, packed.labels)], boxes, packed, LossConfig())
    assert found.own.image.shape == (3, 6 + 2)
    for stage in range(3):
        slots = list(zip(found.own.image[stage].tolist(), found.own.query[stage].tolist(), strict=True))
        assert len(set(slots)) == len(slots)
        assert all(
            (target < 9) == (image == 0)
            for (image, _), target in zip(slots, found.own.target[stage].tolist(), strict=True)
        )


def test_confident_logits_do_not_beat_an_exact_box() -> None:
    """A far box with logit 9.0 must not beat the exact box with logit 8.9, as it does in half precision."""
    boxes = torch.tensor([[[[0.1, 0.1, 0.05, 0.05], [0.5, 0.5, 0.2, 0.2]]]])
    logits = torch.tensor([[[[9.0], [8.9]]]])
    packed = Targets.pack(
        [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}], 1, torch.device("cpu")
    )
    found = match([(logits, packed.labels)], boxes, packed, LossConfig())
    assert found.own.query.tolist() == [[1]]
