"""The stream against the plan: the same batches in the same order, whoever decodes them and for however many workers."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import ray

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_annotations
from pipeline.data.shards.training_set import TrainingSet, join_sets
from pipeline.data.sources.synthetic import CLASSES
from pipeline.data.stream import ray_executions, stream
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.ray_executions import RayExecutions
from pipeline.data.stream.settings import DecodeIn
from pipeline.data.stream.share import Broadcast, WorkerShare
from pipeline.data.stream.stream import StreamSettings, evaluation_stream, training_plan, training_stream
from pipeline.data.stream.tasks import DecodeSettings
from pipeline.ray_cluster import start_ray
from tests.data.test_classes import renamed
from tests.support.streams import SETTINGS, Seen, planned, planned_batches, seen
from tests.support.synthetic_shards import stored_rows, synthetic_records, write_shards

# Ray's DataContext sets fields of its own that Ray has deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning:ray\.data\.context")

T = TypeVar("T")
ROWS = 150


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("drawn") / "train", synthetic_records(ROWS))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(num_cpus=2)
    yield
    ray.shutdown()


def on_workers(world_size: int, work: Callable[[int, Broadcast], T]) -> list[T]:
    """Each worker in a thread of its own, with a broadcast like that of Ray Train."""
    met = threading.Barrier(world_size, timeout=60)
    values: list[Any] = [None]

    def broadcast(rank: int, value: Any) -> Any:
        if rank == 0:
            values[0] = value
        met.wait()
        received = values[0]
        met.wait()
        return received

    def worker(rank: int) -> T:
        try:
            return work(rank, partial(broadcast, rank))
        except BaseException:
            met.abort()  # so that the others do not wait for this one
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(worker, range(world_size)))


def streamed(
    shards: ShardSet | TrainingSet,
    world_size: int,
    start_step: int,
    stop_step: int,
    settings: StreamSettings = SETTINGS,
) -> list[list[Seen]]:
    """Batches of each worker."""

    def work(rank: int, broadcast: Broadcast) -> list[Seen]:
        batches = training_stream(
            shards,
            settings,
            start_step=start_step,
            stop_step=stop_step,
            rank=rank,
            world_size=world_size,
            broadcast=broadcast,
        )
        return [seen(batch) for batch in batches]

    return on_workers(world_size, work)


def test_batches_are_the_rows_of_the_plan(shards: ShardSet) -> None:
    plan = training_plan(shards, SETTINGS)
    first_row = np.concatenate([[0], np.cumsum(plan.row_groups)])
    image_ids = stored_rows(shards).column("image_id").to_numpy()
    expected = []
    for window in plan.windows(3, 40):
        lanes = [image_ids[first_row[rows.group] + rows.row] for rows in plan.rows(window, range(plan.lanes))]
        expected += np.stack([lane.reshape(-1, 2) for lane in lanes], axis=1).reshape(-1).tolist()
    batches = planned(shards, 3, 40)
    assert [(step, micro_batch) for step, micro_batch, *_ in batches] == [
        (s, m) for s in range(3, 40) for m in range(4)
    ]
    assert [image_id for _, _, ids, *_ in batches for image_id in ids] == expected


@pytest.mark.parametrize(("world_size", "decode_in"), [(1, "worker"), (2, "task")])
def test_ray_brings_each_worker_its_micro_batches_in_order(
    shards: ShardSet, cluster: None, world_size: int, decode_in: DecodeIn
) -> None:
    """From within an epoch into the next, where strong augmentation has ended."""
    expected = planned(shards, 11, 27)
    received = streamed(shards, world_size, 11, 27, replace(SETTINGS, decode_in=decode_in))
    for rank in range(world_size):
        assert received[rank] == expected[rank::world_size]


def test_ray_brings_mosaics_and_their_partners(shards: ShardSet, cluster: None) -> None:
    """From within an epoch, whose pool begins before the first step, into the next."""
    augment = AugmentSettings(mosaic_probability=0.5, mixup_probability=0.5)
    dense = replace(SETTINGS, augment=augment, stages=Stages(0, 9, None))
    here = training_stream(shards, replace(dense, decode_in="inline"), start_step=11, stop_step=27)
    expected = [seen(batch) for batch in here]
    assert expected != planned(shards, 11, 27)
    received = streamed(shards, 2, 11, 27, dense)
    assert [received[rank] for rank in range(2)] == [expected[rank::2] for rank in range(2)]


def test_ray_brings_the_rows_of_several_sets(shards: ShardSet, tmp_path: Path, cluster: None) -> None:
    """Mapped labels, whole and broken weights and repeated images, with mosaics; from within an epoch into the next."""
    other = renamed(write_shards(tmp_path / "other", synthetic_records(40, seed=3)), [*CLASSES[:7], "zebra"])
    train = join_sets([shards, other], [0.3, 2], [{}, {"zebra": CLASSES[7], CLASSES[0]: "thing"}], repeat_threshold=0.3)
    plan = training_plan(train, SETTINGS)
    assert train.images_in_epoch > 45 + 80
    dense = replace(SETTINGS, augment=AugmentSettings(mosaic_probability=0.5), stages=Stages(0, 9, None))
    start, stop = plan.steps_per_epoch - 5, plan.steps_per_epoch + 5
    here = training_stream(train, replace(dense, decode_in="inline"), start_step=start, stop_step=stop)
    expected = [seen(batch) for batch in here]
    received = streamed(train, 2, start, stop, dense)
    assert [received[rank] for rank in range(2)] == [expected[rank::2] for rank in range(2)]


def test_other_numbers_of_workers_continue_the_same_sequence(shards: ShardSet, cluster: None) -> None:
    steps: dict[int, list[Seen]] = {}
    for world_size, start, stop in ((2, 0, 5), (1, 5, 9), (2, 9, 20)):
        for received in streamed(shards, world_size, start, stop):
            for batch in received:
                steps.setdefault(batch[0], []).append(batch)
    assert [batch for step in sorted(steps) for batch in sorted(steps[step])] == planned(shards, 0, 20)


def test_segments_follow_each_other_without_a_seam(
    shards: ShardSet, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executions, "BLOCK_STEPS", 2)
    monkeypatch.setattr(ray_executions, "EXECUTION_BLOCKS", 64)  # of 8 in a step of a group with room for eight workers
    started: list[int] = []  # windows of each
    start = RayExecutions._started
    monkeypatch.setattr(
        RayExecutions,
        "_started",
        lambda run, windows, *given: started.append(len(windows)) or start(run, windows, *given),
    )
    assert sorted(b for received in streamed(shards, 2, 2, 20) for b in received) == planned(shards, 2, 20)
    assert started == [2, 2, 2, 2, 2, 2, 0, 0]


def test_evaluation_has_every_image_once_and_as_many_batches_for_each_worker(shards: ShardSet, cluster: None) -> None:
    def work(rank: int, broadcast: Broadcast) -> list[Batch]:
        return list(
            evaluation_stream(shards, canvas=(32, 32), micro_batch_size=8, rank=rank, world_size=2, broadcast=broadcast)
        )

    workers = on_workers(2, work)
    assert [len(batches) for batches in workers] == [10, 10]  # 150 images are 18.75 batches of 8
    kept = [
        image_id
        for batches in workers
        for batch in batches
        for image_id, padding in zip(batch.image_id.tolist(), batch.padding, strict=True)
        if not padding
    ]
    assert kept == stored_rows(shards).column("image_id").to_pylist()
    here = evaluation_stream(shards, canvas=(32, 32), micro_batch_size=8, world_size=2, decode_in="inline")
    assert [seen(batch) for batch in workers[0]] == [seen(batch) for batch in here]


def test_resuming_reads_nothing_from_before_the_window_of_that_step(tmp_path: Path, cluster: None) -> None:
    """Shown by taking away every shard that the remaining windows do not need."""
    shards = write_shards(tmp_path / "train", synthetic_records(ROWS), shard_rows=8)
    plan = training_plan(shards, SETTINGS)
    expected = planned(shards, 10, 18)
    needed = {int(g) for w in plan.windows(10, 18) for rows in plan.rows(w, range(plan.lanes)) for g in rows.group}
    unneeded = [Path(shards.shard_uri(g)) for g in range(len(plan.row_groups)) if g not in needed]
    assert len(unneeded) >= 5
    for path in unneeded:
        path.unlink()
    assert streamed(shards, 1, 10, 18) == [expected]
    with pytest.raises(FileNotFoundError):
        planned(shards, 0, 18)


def test_a_worker_that_receives_the_batches_of_another_one_fails(shards: ShardSet, cluster: None) -> None:
    def work(rank: int, broadcast: Broadcast) -> None:
        def swapped(value: Any) -> Any:
            return broadcast(value)[::-1]

        with pytest.raises(RuntimeError, match=f"rank {rank} of 2 received micro-batch {1 - rank} of step 0 where"):
            next(
                training_stream(shards, SETTINGS, start_step=0, stop_step=2, rank=rank, world_size=2, broadcast=swapped)
            )

    on_workers(2, work)


def test_workers_that_cannot_share_a_step_are_refused_before_anything_starts(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="5 workers cannot share the 4 micro-batches of a step"):
        training_stream(shards, SETTINGS, start_step=0, stop_step=1, world_size=5)


def test_a_broken_image_is_replaced_in_training_and_stops_an_evaluation(tmp_path: Path, cluster: None) -> None:
    records = synthetic_records(16)
    records[5] = replace(records[5], image=b"no image at all")
    shards = write_shards(tmp_path / "train", records)
    batches = planned_batches(shards, 0, 2)
    (replacement,) = (r for batch in batches for r in batch.replaced)
    assert replacement.image_id == records[5].image_id
    assert records[5].file_name in replacement.reason
    assert sum(len(batch.image_id) for batch in batches) == 16
    with pytest.raises(ray.exceptions.RayTaskError, match=f"image {records[5].image_id}, {records[5].file_name}"):
        list(evaluation_stream(shards, canvas=(32, 32), micro_batch_size=4))


def test_a_shard_that_changed_since_its_manifest_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(32))
    other = write_shards(tmp_path / "other", synthetic_records(32), group_rows=4)
    Path(shards.shard_uri(0)).write_bytes(Path(other.shard_uri(0)).read_bytes())
    with pytest.raises(ValueError, match="row group 0 does not have the 8 rows"):
        planned(shards, 0, 1)


def test_annotations_are_read_without_images(shards: ShardSet) -> None:
    assert read_annotations(shards).equals(stored_rows(shards).drop_columns(["image"]))


def test_windows_of_large_images_are_shortened(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_per_image = sum(shard.bytes for shard in shards.manifest.shards) / ROWS
    monkeypatch.setattr(stream, "MAX_WINDOW_BYTES", int(bytes_per_image * 20))
    assert training_plan(shards, SETTINGS).window_rows == 19


# Bounds


def pipeline_of(shards: ShardSet, settings: StreamSettings) -> Any:
    plan = training_plan(shards, settings)
    share = WorkerShare(
        locate_row_groups(shards),
        plan,
        DecodeSettings(settings.canvas, settings.micro_batch_size, augmentation=None),
        settings.decode_in,
        settings.prefetch,
        rank=0,
        world_size=1,
        broadcast=lambda value: value,
    )
    node = ray.get_runtime_context().get_node_id()
    return RayExecutions(share)._dataset(
        list(plan.windows(0, plan.steps_per_epoch)), range(1), node, groups=1, start_step=0
    )


def test_reading_and_decoding_stay_two_operators_with_one_row_per_block(shards: ShardSet, cluster: None) -> None:
    """18 steps of four lanes in windows of 4 steps: blocks of 1, 1 and 2 steps at the start, then of 4 and at last of 2."""
    dataset = pipeline_of(shards, SETTINGS)
    assert sum(1 for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow")) == 28
    stats = dataset.stats()
    assert re.search(r"MapBatches\(read_window\): (\d+) tasks executed, 28 blocks produced", stats), stats
    assert re.search(r"MapBatches\(decode_block\): 28 tasks executed, 28 blocks produced", stats), stats
    assert "->" not in stats


def test_a_process_in_the_cluster_that_looks_up_the_cluster_finds_this_one(cluster: None) -> None:
    """Holds while other clusters run on the machine, or have left their address behind."""

    def found() -> str:
        from ray._private.services import canonicalize_bootstrap_address_or_die

        address: str = canonicalize_bootstrap_address_or_die(None)
        return address

    other = "import ray, time; ray.init('local', num_cpus=1, include_dashboard=False); print('up', flush=True); time.sleep(99)"
    with (
        tempfile.TemporaryDirectory(
            prefix="other-", ignore_cleanup_errors=True
        ) as folder,  # short enough for Ray's sockets
        subprocess.Popen(
            [sys.executable, "-c", other],
            env={**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdout is not None
        while process.stdout.readline().strip() != b"up":
            assert process.poll() is None
        try:
            assert ray.get(ray.remote(num_cpus=0)(found).remote()) == ray.get_runtime_context().gcs_address
        finally:
            process.terminate()


def object_store() -> tuple[float, bool]:
    """MiB in use, and whether anything has been spilled to disk."""
    from ray._private.internal_api import memory_summary

    summary = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
    used = re.search(r"Plasma memory usage (\d+) MiB", summary)
    assert used, summary
    return float(used.group(1)), "Spilled" in summary


def test_a_slow_worker_holds_up_the_stream_instead_of_filling_the_object_store(shards: ShardSet, cluster: None) -> None:
    """72 batches of 6.3 MB in blocks of ten; 453 MB if all of them were decoded at once."""
    settings = replace(SETTINGS, canvas=(512, 512), global_batch_size=8, micro_batch_size=8)
    mebibytes = 8 * 512 * 512 * 3 / 2**20
    most = 0.0
    for batch in training_stream(shards, settings, start_step=0, stop_step=72):
        assert batch.images.shape == (8, 3, 512, 512)
        time.sleep(0.1)
        used, spilled = object_store()
        most = max(most, used)
        assert not spilled
    block = 10 * mebibytes
    assert block < most < 6.5 * block  # in use, fetched, two ready, and one in progress on each of two cores
