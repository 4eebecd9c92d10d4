"""Partners of mosaics: arithmetic on the plan, the same for any workers, and read with the window."""

from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import Rows, locate_row_groups
from pipeline.data.stream.batch import Batch, batches_from_arrow
from pipeline.data.stream.partners import draw_partners, partner_pools, with_partners
from pipeline.data.stream.plan import BatchPlan
from pipeline.data.stream.stream import training_plan, training_stream
from pipeline.data.stream.tasks import Augmentation, DecodeSettings, decode_block, read_window
from tests.support.streams import SETTINGS, Seen, seen
from tests.support.synthetic_shards import synthetic_records, write_shards

DENSE = AugmentSettings(mosaic_probability=0.5, mixup_probability=0.5)
STAGES = Stages(dense=1, ordinary=3, clean=4)
MIXING = replace(SETTINGS, augment=DENSE, stages=STAGES, decode_in="inline")
EPOCH_STEPS = 18


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("drawn") / "train", synthetic_records(150))


def streamed(shards: ShardSet, start: int, stop: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    return list(training_stream(shards, MIXING, start_step=start, stop_step=stop, rank=rank, world_size=world_size))


def prints(batches: list[Batch]) -> list[tuple[Seen, object]]:
    return [(seen(batch), (batch.blend, batch.counts)) for batch in batches]


@pytest.mark.parametrize("world_size", [2, 4])
def test_samples_are_the_same_for_any_number_of_workers(shards: ShardSet, world_size: int) -> None:
    alone = prints(streamed(shards, 16, 30))
    for rank in range(world_size):
        assert prints(streamed(shards, 16, 30, rank, world_size)) == [
            each for each in alone if each[0][1] % world_size == rank
        ]


@pytest.mark.parametrize("start", [19, 21, 35])
def test_samples_are_the_same_wherever_the_stream_is_entered(shards: ShardSet, start: int) -> None:
    whole = prints(streamed(shards, 18, 38))
    assert prints(streamed(shards, start, 38)) == [each for each in whole if each[0][0] >= start]


def test_a_read_task_that_is_retried_yields_the_same(shards: ShardSet) -> None:
    plan, source = training_plan(shards, MIXING), locate_row_groups(shards)
    (window, *_) = plan.windows(20, 24)
    item = pa.Table.from_pylist([asdict(window)])

    def read() -> list[pa.Table]:
        lanes = [(0, 1), (2, 3)]
        augmentation = Augmentation(MIXING.seed, DENSE, STAGES)
        return list(
            read_window(item, source, plan, lanes=lanes, block_steps=4, start_step=0, augmentation=augmentation)
        )

    first, again = read(), read()
    assert len(first) == len(again) > 3
    assert all(one.equals(other) for one, other in zip(first, again, strict=True))


def test_the_stages_begin_and_end_with_their_epochs(shards: ShardSet) -> None:
    """Encoded blocks say which samples are mosaics, decoded ones which micro-batches are mixed up."""
    plan, source = training_plan(shards, MIXING), locate_row_groups(shards)
    augmentation = Augmentation(MIXING.seed, replace(DENSE, copy_paste_probability=0.9), STAGES)
    decoding = DecodeSettings(MIXING.canvas, MIXING.micro_batch_size, augmentation)
    for epoch in range(6):
        mosaics, mixed, pasted, batches = 0, 0, 0, 0
        for window in plan.windows(epoch * EPOCH_STEPS, (epoch + 1) * EPOCH_STEPS):
            item = pa.Table.from_pylist([asdict(window)])
            for block in read_window(
                item, source, plan, lanes=[(0, 1, 2, 3)], block_steps=9, start_step=0, augmentation=augmentation
            ):
                partners = block["partners"][0].values.to_numpy().reshape(-1, 3)
                mosaics += int((partners[:, 0] >= 0).sum())
                for batch in batches_from_arrow(decode_block(block, decoding), decoding.canvas):
                    batches += 1
                    mixed += batch.blend.ratio < 1 and not batch.blend.pastes
                    pasted += bool(batch.blend.pastes)
        assert batches == 72
        if epoch in (1, 2):
            assert abs(mosaics - 72) < 3 * np.sqrt(144 / 4)
            assert abs(mixed - 36) < 3 * np.sqrt(72 / 4)
        else:
            assert (mosaics, mixed) == (0, 0)
        assert (pasted > 0) == (epoch in (1, 2, 3))


def test_dense_epochs_have_nearly_four_times_the_boxes(shards: ShardSet) -> None:
    """With a map that leaves everything in the picture, as boxes outside are lost: (0.5 * 4 + 0.5) * 1.5 = 3.75 times."""
    still = replace(DENSE, mosaic_rotation=0, mosaic_translation=0, mosaic_scale=(1, 1), min_box_size=0)
    still = replace(still, zoom_out_probability=0, iou_crop_probability=0)
    settings = replace(MIXING, augment=still, stages=Stages(1, 9, 9))
    stop = 9 * EPOCH_STEPS
    batches = list(training_stream(shards, settings, start_step=0, stop_step=stop))
    usual = np.mean([sum(batch.counts) for batch in batches if batch.step < EPOCH_STEPS])
    dense = np.mean([sum(batch.counts) for batch in batches if batch.step >= EPOCH_STEPS])
    assert dense / usual == pytest.approx(3.75, rel=0.08)  # 1,152 samples, a deviation of 2 %


def test_the_rate_of_mosaics_and_the_spread_of_partners() -> None:
    count, pool = 4000, 100
    drawn = draw_partners(np.arange(count), pool, seed=3, epoch=2, probability=0.5)
    mosaics = drawn[drawn[:, 0] >= 0]
    assert abs(len(mosaics) - count / 2) < 3 * np.sqrt(count / 4)
    assert mosaics.min() == 0
    assert mosaics.max() == pool - 1
    frequencies = np.bincount(mosaics.ravel(), minlength=pool)
    expected = mosaics.size / pool
    assert ((frequencies - expected) ** 2 / expected).sum() < pool + 4 * np.sqrt(2 * pool)  # chi-squared
    assert (draw_partners(np.arange(9), pool, seed=3, epoch=2, probability=0) == -1).all()
    backwards = draw_partners(np.arange(count)[::-1], pool, seed=3, epoch=2, probability=0.5)
    np.testing.assert_array_equal(backwards[::-1], drawn)


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    groups = draw(st.lists(st.integers(1, 9), min_size=4, max_size=30))
    micro_batch, lanes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    global_batch = micro_batch * lanes
    if sum(groups) < global_batch:
        groups.append(global_batch)
    window_rows = draw(st.integers(1, 60))
    return BatchPlan(
        np.array(groups), global_batch, micro_batch, seed=draw(st.integers(0, 99)), window_rows=window_rows
    )


@settings(deadline=None)
@given(plan=plans(), data=st.data())
def test_a_pool_is_a_window_of_the_lane_wherever_the_stream_is_entered(plan: BatchPlan, data: st.DataObject) -> None:
    epoch = data.draw(st.integers(0, 2))
    lanes = list(range(plan.lanes))
    first = epoch * plan.steps_per_epoch
    orders = plan.lane_orders(epoch, lanes)
    for window in plan.windows(first, first + plan.steps_per_epoch):
        pools = partner_pools(plan, window, lanes)
        step = data.draw(st.integers(window.first_step, window.stop_step - 1))
        (entered,) = plan.windows(step, window.stop_step)
        for pool, same, own, order in zip(
            pools, partner_pools(plan, entered, lanes), plan.rows(window, lanes), orders, strict=True
        ):
            assert pairs(pool) == pairs(same)
            assert set(pairs(own)) <= set(pairs(pool))
            assert len(set(pairs(pool))) == len(pool)
            if plan.num_rows <= plan.window_rows:
                assert len(pool) == plan.num_rows
            else:
                assert len(pool) == min(plan.steps_per_window * plan.micro_batch_size, len(order))
                assert set(pairs(pool)) <= set(pairs(order.rows(0, len(order))))


def pairs(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.group.tolist(), rows.row.tolist(), strict=True))


def test_each_row_is_carried_once() -> None:
    own = Rows(group=np.array([0, 2]), row=np.array([1, 0]))
    pool = Rows(group=np.array([0, 1, 2, 3]), row=np.array([1, 0, 0, 5]))
    rows, index = with_partners(own, pool, np.array([[3, 0, 1], [-1, -1, -1]]))
    assert pairs(rows) == [(0, 1), (2, 0), (3, 5), (1, 0)]
    assert index.tolist() == [[2, 0, 3], [-1, -1, -1]]
