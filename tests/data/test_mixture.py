"""Rows of several sets and repeated rows in the plan: exact counts, the same for any workers and after any resume."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shards.repeat_factors import Copies
from pipeline.data.stream.mixture import COPY_BITS, Mixture, SetRows
from pipeline.data.stream.plan import BatchPlan, Rows

WEIGHTS = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.floats(0.05, 4))


def copies_of(rows: int, rng: np.random.Generator) -> Copies:
    """Factors like those of a set with rare classes: most are 1."""
    return Copies.of_factors(np.where(rng.random(rows) < 0.7, 1.0, 1 + 3 * rng.random(rows)))


@st.composite
def mixtures(draw: st.DrawFn, repeats: bool = True) -> Mixture:
    sets = []
    for _ in range(draw(st.integers(1, 3))):
        groups = np.array(draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)))
        rows = int(groups.sum())
        repeated = repeats and draw(st.booleans())
        copies = copies_of(rows, np.random.default_rng(draw(st.integers(0, 99)))) if repeated else None
        shown = max(1, int(draw(WEIGHTS) * (copies.total if copies else rows) + 0.5))
        sets.append(SetRows(groups, shown, copies))
    return Mixture(tuple(sets))


@st.composite
def mixed_plans(draw: st.DrawFn) -> BatchPlan:
    mixture = draw(mixtures())
    micro_batch = draw(st.integers(1, 3))
    lanes = draw(st.integers(1, 4))
    if mixture.rows_per_epoch < micro_batch * lanes:
        micro_batch = lanes = 1
    groups = np.concatenate([each.row_groups for each in mixture.sets])
    seed, window_rows = draw(st.integers(0, 2**40)), draw(st.integers(1, 60))
    return BatchPlan(groups, micro_batch * lanes, micro_batch, seed, window_rows, mixture)


def numbered(rows: Rows, row_groups: np.ndarray) -> list[int]:
    """Rows as their index in all sets together."""
    first = np.cumsum(row_groups) - row_groups
    assert (rows.row >= 0).all()
    assert (rows.row < row_groups[rows.group]).all()
    return [int(index) for index in first[rows.group] + rows.row]


def counts_by_set(mixture: Mixture, shown: list[int]) -> list[list[int]]:
    """How often each row of each set is among the shown ones."""
    counted, first, found = Counter(shown), 0, []
    for each in mixture.sets:
        rows = int(each.row_groups.sum())
        found.append([counted[first + row] for row in range(rows)])
        first += rows
    assert sum(map(sum, found)) == len(shown)
    return found


def epoch_rows(plan: BatchPlan, epoch: int) -> Rows:
    return plan.stretches(epoch).all_rows()


def steps_between(plan: BatchPlan, start: int, stop: int, rank: int = 0, workers: int = 1) -> list[tuple[object, ...]]:
    """Micro-batches of a worker, step after step: (step, lane, rows, showings)."""
    size, batches = plan.micro_batch_size, []
    for window in plan.windows(start, stop):
        lanes = plan.lanes_of(rank, workers)
        for lane, rows in zip(lanes, plan.rows(window, lanes), strict=True):
            assert rows.showing is not None
            for step in range(window.first_step, window.stop_step):
                part = rows[(step - window.first_step) * size :][:size]
                assert part.showing is not None
                batches.append((step, lane, tuple(numbered(part, plan.row_groups)), tuple(part.showing.tolist())))
    return sorted(batches)


@settings(deadline=None, max_examples=40)
@given(plan=mixed_plans(), epochs=st.integers(1, 6))
def test_every_epoch_has_exactly_the_rows_of_its_weights(plan: BatchPlan, epochs: int) -> None:
    """Against the definition: whole passes show every copy, and a rest some of them; all epochs are equally long."""
    assert plan.mixture is not None
    for epoch in range(epochs):
        shown = numbered(epoch_rows(plan, epoch), plan.row_groups)
        for number, (each, counts) in enumerate(
            zip(plan.mixture.sets, counts_by_set(plan.mixture, shown), strict=True)
        ):
            assert sum(counts) == each.shown
            copies = (
                each.copies.of_epoch(plan.seed or 0, epoch, number) if each.copies else np.ones(len(counts), np.int64)
            )
            assert copies.sum() == each.pass_rows
            passes, rest = divmod(each.shown, each.pass_rows)
            over = np.array(counts) - passes * copies
            assert (over >= 0).all()
            assert (over <= (copies if rest else 0)).all()


@settings(deadline=None)
@given(mixture=mixtures(repeats=False), seed=st.integers(0, 99))
def test_after_any_number_of_epochs_no_row_of_a_set_is_two_showings_ahead(mixture: Mixture, seed: int) -> None:
    groups = np.concatenate([each.row_groups for each in mixture.sets])
    shown: list[int] = []
    for epoch in range(12):
        shown += numbered(mixture.stretches(seed, epoch).all_rows(), groups)
        for counts in counts_by_set(mixture, shown):
            assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=40)
@given(plan=mixed_plans(), epoch=st.integers(0, 3), workers=st.integers(1, 4))
def test_the_workers_together_have_the_epoch_but_for_a_tail_shorter_than_a_step(
    plan: BatchPlan, epoch: int, workers: int
) -> None:
    workers = min(workers, plan.lanes)
    first = epoch * plan.steps_per_epoch
    alone = steps_between(plan, first, first + plan.steps_per_epoch)
    together = [
        batch
        for rank in range(workers)
        for batch in steps_between(plan, first, first + plan.steps_per_epoch, rank, workers)
    ]
    assert sorted(together) == alone
    rows = epoch_rows(plan, epoch)
    assert rows.showing is not None
    every = Counter(zip(numbered(rows, plan.row_groups), rows.showing.tolist(), strict=True))
    trained = Counter(pair for _, _, shown, numbers in together for pair in zip(shown, numbers, strict=True))  # type: ignore[call-overload]
    assert max(every.values()) == 1  # no two showings of a row have the same number
    assert not trained - every
    assert (every - trained).total() == plan.num_rows % plan.global_batch_size


@settings(deadline=None, max_examples=15)
@given(plan=mixed_plans(), data=st.data())
def test_a_resume_at_any_step_goes_on_with_the_same_rows(plan: BatchPlan, data: st.DataObject) -> None:
    stop = 3 * plan.steps_per_epoch
    whole = steps_between(plan, 0, stop)
    start = data.draw(st.integers(0, stop))
    assert steps_between(plan, start, stop) == [batch for batch in whole if batch[0] >= start]  # type: ignore[operator]


@given(seed=st.integers(0, 2**40), groups=st.lists(st.integers(1, 9), min_size=1, max_size=30), epoch=st.integers(0, 3))
def test_one_set_of_weight_1_has_the_order_of_that_set_alone(seed: int, groups: list[int], epoch: int) -> None:
    row_groups = np.array(groups)
    alone = BatchPlan(row_groups, 1, 1, seed, window_rows=7)
    mixed = replace(alone, mixture=Mixture((SetRows(row_groups, shown=sum(groups)),)))
    first = epoch * alone.steps_per_epoch
    assert steps_between(mixed, first, first + sum(groups)) == steps_between(alone, first, first + sum(groups))
    assert (epoch_rows(mixed, epoch).showing == 0).all()  # type: ignore[union-attr]


@given(
    factors=st.lists(st.one_of(st.just(1.0), st.floats(1, 9)), min_size=1, max_size=40),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_copies_are_the_factors_rounded_down_or_up_with_one_sum(factors: list[float], seed: int, epoch: int) -> None:
    """Against a loop that walks along the fractions and takes one copy more wherever it passes a whole number."""
    copies = Copies.of_factors(np.array(factors))
    assert copies.total == sum(int(f) for f in factors) + int(np.floor(np.cumsum([f % 1 for f in factors])[-1]))
    found = copies.of_epoch(seed, epoch, 0)
    assert found.sum() == copies.total
    (word,) = np.random.Philox(key=np.array((seed, epoch), np.uint64), counter=[0, 1 << 32, 1, 0]).random_raw(1)
    walked = (int(word) >> 40) / 2**24
    for factor, until, before, count in zip(
        factors, copies.more, [0.0, *copies.more[:-1]], found.tolist(), strict=True
    ):
        assert 0 <= until - before <= factor % 1 + 1e-9
        assert count == int(factor) + int(np.floor(until + walked) - np.floor(before + walked))
        assert int(factor) <= count <= int(np.ceil(factor))


def test_a_row_is_copied_as_often_as_its_factor_says_on_average() -> None:
    factors = np.array([1, 1.25, 2.5, 1, 3.75, 1.1, 1.4])  # the fractions add up to 2
    copies = Copies.of_factors(factors)
    mean = np.mean([copies.of_epoch(3, epoch, 0) for epoch in range(4000)], axis=0)
    np.testing.assert_allclose(mean, factors, atol=4 * 0.5 / np.sqrt(4000))
    assert mean[0] == mean[3] == 1


def test_the_order_of_two_sets_is_the_one_written_down() -> None:
    """Set 0: groups 0 (3 rows) and 1 (2 rows), weight 1.4: a pass and two rows more. Set 1: group 2 (4 rows), weight 0.5."""
    mixture = Mixture((SetRows(np.array([3, 2]), 7), SetRows(np.array([4]), 2)))
    plan = BatchPlan(np.array([3, 2, 4]), 3, 3, seed=7, window_rows=6, mixture=mixture)
    shown = [numbered(epoch_rows(plan, epoch), plan.row_groups) for epoch in range(3)]
    assert [rows[:5] for rows in shown] == [[0, 1, 2, 3, 4]] * 3
    assert [rows[7:] for rows in shown] == [[5, 6], [7, 8], [5, 6]]
    rests = [rows[5:7] for rows in shown]
    assert rests == [[0, 1], [2, 3], [4, 0]]  # around the set
    second = epoch_rows(plan, 0).showing
    assert second is not None
    assert second.tolist() == [0] * 5 + [1 << COPY_BITS] * 2 + [1 << 24] * 2


@settings(deadline=None)
@given(plan=mixed_plans())
def test_a_window_reads_little_more_than_it_shows(plan: BatchPlan) -> None:
    """Rows of the groups that a lane's window reads: those it shows, and parts of groups at its ends and at ends of rests."""
    assert plan.mixture is not None
    largest = int(plan.row_groups.max())
    rests = 2 * sum(1 for each in plan.mixture.sets if each.shown % each.pass_rows)
    for order in plan.lane_orders(0, range(plan.lanes)):
        for start in range(0, len(order), order.window_rows):
            rows = order.rows(start, min(start + order.window_rows, len(order)))
            read = int(plan.row_groups[np.unique(rows.group)].sum())
            assert read <= len(rows) + (2 + rests) * largest


def test_a_plan_of_two_million_rows_is_made_in_a_moment() -> None:
    """The rows of a window are found by arithmetic over the rows of the sets: no list of all showings is shuffled."""
    rows, rng = 2_000_000, np.random.default_rng(0)
    copies = copies_of(rows, rng)
    mixture = Mixture((SetRows(np.full(rows // 32, 32), 2 * copies.total, copies), SetRows(np.array([32] * 10), 1000)))
    plan = BatchPlan(np.concatenate([each.row_groups for each in mixture.sets]), 32, 32, seed=0, mixture=mixture)
    *_, last = plan.windows(0, plan.steps_per_epoch)
    (shown,) = plan.rows(last, [0])
    assert len(shown) == (last.stop_step - last.first_step) * 32
    assert len(np.unique(shown.group)) < 200


@pytest.mark.parametrize("epoch", [0, 1])
def test_copies_of_a_row_lie_in_passes_apart_or_side_by_side(epoch: int) -> None:
    """Weight 3 lays the groups three times, in one shuffled order; a factor of 3 lays a row three times in its group."""
    groups = np.full(100, 4)
    weighted = BatchPlan(groups, 4, 4, seed=1, mixture=Mixture((SetRows(groups, 1200),)))
    (order,) = weighted.lane_orders(epoch, [0])
    assert Counter(order.stretches.group.tolist()) == dict.fromkeys(range(100), 3)
    apart = np.diff(np.sort(np.flatnonzero(order.stretches.group == 17)))
    assert apart.min() > 1
    factors = np.ones(400)
    factors[7] = 3
    repeated = BatchPlan(groups, 4, 4, seed=1, mixture=Mixture((SetRows(groups, 402, Copies.of_factors(factors)),)))
    rows = epoch_rows(repeated, epoch)
    assert numbered(rows, groups)[6:11] == [6, 7, 7, 7, 8]
    assert rows.showing is not None
    assert rows.showing[6:11].tolist() == [0, 0, 1, 2, 0]
