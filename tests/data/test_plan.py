"""The order of samples, checked against plain loops and arithmetic by hand."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.stream.plan import BatchPlan, RowOrder, Rows

row_group_counts = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def numbered(rows: Rows, row_groups: NDArray[np.int64] | list[int]) -> list[int]:
    """Rows as their index in the shard set."""
    first = np.concatenate([[0], np.cumsum(row_groups)])
    assert (rows.row < np.asarray(row_groups)[rows.group]).all()
    assert (rows.row >= 0).all()
    return [int(first[group] + row) for group, row in zip(rows.group, rows.row, strict=True)]


def one_lane(row_groups: NDArray[np.int64] | list[int], *, seed: int | None, epoch: int, window_rows: int) -> RowOrder:
    """Order of the whole epoch: a single lane takes all rows."""
    plan = BatchPlan(np.asarray(row_groups), 1, 1, seed, window_rows)
    (order,) = plan.lane_orders(epoch, [0])
    return order


def steps_of_epoch(plan: BatchPlan, epoch: int) -> list[list[int]]:
    first = epoch * plan.steps_per_epoch
    return steps_between(plan, first, first + plan.steps_per_epoch)


def steps_between(plan: BatchPlan, start: int, stop: int) -> list[list[int]]:
    """Rows of each step, lane after lane."""
    steps = []
    for window in plan.windows(start, stop):
        lanes = [numbered(rows, plan.row_groups) for rows in plan.rows(window, range(plan.lanes))]
        size = plan.micro_batch_size
        steps += [
            [row for lane in lanes for row in lane[step * size : (step + 1) * size]]
            for step in range(window.stop_step - window.first_step)
        ]
    return steps


@st.composite
def training_plans(draw: st.DrawFn) -> BatchPlan:
    row_groups = np.array(draw(row_group_counts))
    micro_batch_size = draw(st.integers(1, 4))
    micro_batches = draw(st.integers(1, max(1, int(row_groups.sum()) // micro_batch_size)))
    if row_groups.sum() < micro_batch_size:
        micro_batch_size = 1
    global_batch_size = micro_batch_size * min(micro_batches, int(row_groups.sum()) // micro_batch_size)
    seed, window_rows = draw(st.integers(0, 2**40)), draw(st.integers(1, 60))
    return BatchPlan(row_groups, global_batch_size, micro_batch_size, seed, window_rows)


@given(plan=training_plans(), epoch=st.integers(0, 3))
def test_an_epoch_has_every_row_once_but_for_a_tail_shorter_than_a_step(plan: BatchPlan, epoch: int) -> None:
    rows = [row for step in steps_of_epoch(plan, epoch) for row in step]
    assert len(set(rows)) == len(rows) == plan.num_rows - plan.num_rows % plan.global_batch_size


@given(row_groups=row_group_counts, seed=st.integers(0, 99), window_rows=st.integers(1, 50))
def test_any_stretch_of_the_order_is_that_stretch_of_the_whole(
    row_groups: list[int], seed: int, window_rows: int
) -> None:
    order = one_lane(row_groups, seed=seed, epoch=2, window_rows=window_rows)
    whole = numbered(order.rows(0, len(order)), row_groups)
    assert sorted(whole) == list(range(sum(row_groups)))
    rng = np.random.default_rng(seed)
    for _ in range(5):
        start, stop = sorted(rng.integers(0, len(order) + 1, 2).tolist())
        assert numbered(order.rows(start, stop), row_groups) == whole[start:stop]


@given(plan=training_plans(), data=st.data())
def test_a_window_has_its_steps_wherever_the_stream_was_resumed(plan: BatchPlan, data: st.DataObject) -> None:
    whole = [step for epoch in range(3) for step in steps_of_epoch(plan, epoch)]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert steps_between(plan, start, stop) == whole[start:stop]
    windows = list(plan.windows(start, stop))
    assert [step for w in windows for step in range(w.first_step, w.stop_step)] == list(range(start, stop))


@given(plan=training_plans(), epoch=st.integers(0, 2))
def test_lanes_are_equal_stretches_of_the_shuffled_row_groups(plan: BatchPlan, epoch: int) -> None:
    """Against the row groups laid end to end by hand: lane m holds the m-th stretch, each window of it in another order."""
    first_row = np.concatenate([[0], np.cumsum(plan.row_groups)])
    (order, *_) = plan.lane_orders(epoch, [0])
    laid = [int(first_row[g]) + r for g in order.stretches.group.tolist() for r in range(int(plan.row_groups[g]))]
    for lane, lane_order in enumerate(plan.lane_orders(epoch, range(plan.lanes))):
        rows = numbered(lane_order.rows(0, len(lane_order)), plan.row_groups)
        stretch = laid[lane * plan.lane_rows : (lane + 1) * plan.lane_rows]
        size = lane_order.window_rows
        for start in range(0, len(stretch), size):
            assert sorted(rows[start : start + size]) == sorted(stretch[start : start + size])


@given(plan=training_plans(), data=st.data())
def test_every_number_of_workers_reads_each_lane_once(plan: BatchPlan, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, plan.lanes))
    lanes = [lane for rank in range(world_size) for lane in plan.lanes_of(rank, world_size)]
    assert sorted(lanes) == list(range(plan.lanes))


@given(plan=training_plans())
def test_a_window_of_a_lane_shares_at_most_one_row_group_with_its_neighbour(plan: BatchPlan) -> None:
    for order in plan.lane_orders(0, range(plan.lanes)):
        size = order.window_rows
        windows = [set(order.rows(s, min(s + size, len(order))).group.tolist()) for s in range(0, len(order), size)]
        for groups, following in pairwise(windows):
            assert len(groups & following) <= 1
        read = sum(int(plan.row_groups[list(groups)].sum()) for groups in windows)
        assert read <= len(order) + (len(windows) + 1) * int(plan.row_groups.max())


@given(row_groups=row_group_counts, micro_batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
def test_evaluation_has_every_row_once_in_order_and_as_many_micro_batches_for_each_worker(
    row_groups: list[int], micro_batch_size: int, world_size: int
) -> None:
    plan = BatchPlan(np.array(row_groups), micro_batch_size * world_size, micro_batch_size, seed=None, window_rows=8)
    windows = list(plan.windows(0, plan.steps_per_epoch))
    lanes = [[r for w in windows for r in numbered(plan.rows(w, [lane])[0], row_groups)] for lane in range(world_size)]
    assert [row for lane in lanes for row in lane] == list(range(sum(row_groups)))
    longest = max(len(lane) for lane in lanes)
    assert plan.steps_per_epoch == -(-longest // micro_batch_size)
    assert longest == -(-sum(row_groups) // world_size)


def test_the_order_is_the_one_written_down() -> None:
    """Philox is specified bit by bit: a checkpoint continues in the same order under any version of numpy."""
    plan = BatchPlan(np.array([3, 2, 4, 1]), global_batch_size=2, micro_batch_size=2, seed=7, window_rows=4)
    assert plan.lane_orders(0, [0])[0].stretches.group.tolist() == [1, 3, 2, 0]  # so end to end 3 4 9 5 | 6 7 8 0 | 1 2
    assert steps_of_epoch(plan, 0) == [[9, 4], [5, 3], [0, 8], [7, 6], [1, 2]]
    two = BatchPlan(np.array([3, 2, 4, 1]), global_batch_size=2, micro_batch_size=1, seed=7, window_rows=4)
    lanes = list(zip(*steps_of_epoch(two, 0), strict=True))  # the lanes are 3 4 | 9 5 | 6 and 7 8 | 0 1 | 2
    assert [sorted(lane[:2]) for lane in lanes] == [[3, 4], [7, 8]]
    assert [sorted(lane[2:4]) for lane in lanes] == [[5, 9], [0, 1]]
    assert [lane[4] for lane in lanes] == [6, 2]
    assert steps_of_epoch(two, 0) == [[4, 7], [3, 8], [5, 0], [9, 1], [6, 2]]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    row_groups = [32] * 20
    orders = [
        tuple(numbered(one_lane(row_groups, seed=s, epoch=e, window_rows=128).rows(0, 640), row_groups))
        for s in range(3)
        for e in range(3)
    ]
    assert len(set(orders)) == 9


def test_micro_batches_belong_to_steps_whatever_the_number_of_workers() -> None:
    plan = BatchPlan(np.array([32] * 8), global_batch_size=24, micro_batch_size=4, seed=0)
    assert [len(plan.lanes_of(0, workers)) for workers in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert [list(plan.lanes_of(rank, 4)) for rank in range(4)] == [[0, 4], [1, 5], [2], [3]]
    with pytest.raises(ValueError, match="7 workers cannot share the 6 micro-batches"):
        plan.lanes_of(0, 7)


@pytest.mark.parametrize(
    ("global_batch_size", "micro_batch_size", "seed", "message"),
    [
        (10, 4, 0, "global_batch_size=10 must be a multiple of micro_batch_size=4"),
        (0, 1, 0, "both > 0"),
        (4, 4, -1, "seed=-1"),
        (64, 4, 0, "an epoch of 32 images has no step of global_batch_size=64"),
    ],
)
def test_a_plan_that_cannot_be_executed_is_refused(
    global_batch_size: int, micro_batch_size: int, seed: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(np.array([32]), global_batch_size, micro_batch_size, seed)


def test_a_window_of_an_epoch_of_1_8_million_rows_is_planned_without_shuffling_the_other_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = BatchPlan(np.full(56_250, 32), global_batch_size=128, micro_batch_size=32, seed=0)
    last = list(plan.windows(0, plan.steps_per_epoch))[-1]
    argsort, lengths = np.argsort, []

    def counted(values: NDArray[np.uint64], **settings: Any) -> NDArray[np.int64]:
        lengths.append(len(values))
        return argsort(values, **settings)

    monkeypatch.setattr(np, "argsort", counted)
    rows = plan.rows(last, range(4))
    planned = sum(map(len, rows))
    assert planned == (last.stop_step - last.first_step) * 128
    assert lengths[0] == 56_250  # the row groups
    assert planned <= sum(lengths[1:]) <= 128 * plan.steps_per_window < 50_000


def test_an_empty_stretch_has_no_rows_and_one_beyond_the_end_is_an_error() -> None:
    order = one_lane([3, 4], seed=None, epoch=0, window_rows=2)
    assert len(order.rows(5, 5)) == 0
    with pytest.raises(IndexError, match="positions 3 to 8 do not lie within the 7 rows"):
        order.rows(3, 8)


# How close to uniform


def same_group_pairs(plan: BatchPlan, epochs: int) -> float:
    """Mean number of pairs in a step whose rows come from one row group: neighbours in the source, so perhaps alike."""
    pairs, steps = 0, 0
    for window in plan.windows(0, epochs * plan.steps_per_epoch):
        lanes = [rows.group.reshape(-1, plan.micro_batch_size) for rows in plan.rows(window, range(plan.lanes))]
        for step in np.concatenate(lanes, axis=1):
            counts = np.bincount(step)
            pairs += int((counts * (counts - 1) // 2).sum())
            steps += 1
    return pairs / steps


def expected_same_group_pairs(batch: int, group_rows: int, drawn_from: int) -> float:
    """Expected number of pairs, if `batch` rows are drawn from `drawn_from` rows in groups of `group_rows`."""
    return batch * (batch - 1) / 2 * (group_rows - 1) / (drawn_from - 1)


def test_a_batch_mixes_its_window_as_a_uniform_shuffle_of_the_window_would() -> None:
    """Windows of 2048 rows, groups of 32: 7.5 of the 496 pairs in a batch of 32 are of one group; over the whole of a set
    of 16,384 rows it would be 0.94. The excess falls as 1 / window_rows."""
    row_groups = np.full(512, 32)
    for window_rows in (512, 2048, 16_384):
        plan = BatchPlan(row_groups, global_batch_size=32, micro_batch_size=32, seed=1, window_rows=window_rows)
        assert same_group_pairs(plan, epochs=2) == pytest.approx(
            expected_same_group_pairs(32, 32, window_rows), rel=0.05
        )


@pytest.mark.parametrize("micro_batch_size", [32, 8, 4, 1])
def test_lanes_mix_a_step_as_well_as_one_window_of_all_rows(micro_batch_size: int) -> None:
    """A step of 32 rows from M lanes with windows of 2048 / M rows each; without lanes it is one window of 2048 rows."""
    plan = BatchPlan(np.full(512, 32), 32, micro_batch_size, seed=1, window_rows=2048)
    assert same_group_pairs(plan, epochs=2) <= 1.05 * expected_same_group_pairs(32, 32, 2048)


def test_rows_travel_as_far_as_in_a_uniform_shuffle() -> None:
    """The mean distance between a row's position in the set and in the epoch is a third of the set under a uniform shuffle."""
    row_groups = [32] * 512
    distances = []
    for epoch in range(20):
        order = one_lane(row_groups, seed=3, epoch=epoch, window_rows=2048)
        places = np.array(numbered(order.rows(0, len(order)), row_groups))
        distances.append(np.abs(places - np.arange(len(places))).mean() / len(places))
    assert np.mean(distances) == pytest.approx(1 / 3, rel=0.02)


def test_every_position_in_the_epoch_is_equally_likely_for_a_row() -> None:
    """Row 0 of 32 over 3,200 epochs against its expected count: chi-square with 31 degrees of freedom, p = 0.001 at 61.1."""
    row_groups = [4] * 8
    where = np.zeros(32, np.int64)
    for epoch in range(3200):
        order = one_lane(row_groups, seed=5, epoch=epoch, window_rows=8)
        where[numbered(order.rows(0, 32), row_groups).index(0)] += 1
    assert ((where - 100) ** 2 / 100).sum() < 61.1
