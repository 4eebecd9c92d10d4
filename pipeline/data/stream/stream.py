"""Execute the batch plan with Ray Data: micro-batches in the plan's order, distributed over the training workers.

There are two kinds of tasks. A read task takes a window of the plan, reads its row groups and yields one block of encoded
images per micro-batch. A decode task turns one block into pixels. They must stay two operators: fused, one task would decode a
whole window on one core. Every block is one row, so `streaming_split` distributes micro-batches in turn: worker r of n gets r,
r + n, r + 2n and so on.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray
import torch
from ray.data import DataContext, DataIterator, Dataset, TaskPoolStrategy
from ray.data.collate_fn import ArrowBatchCollateFn

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import RowGroups, locate_row_groups
from pipeline.data.stream.backpressure import bound_outputs
from pipeline.data.stream.batch import Batch, batch_from_arrow
from pipeline.data.stream.plan import BatchPlan, Window
from pipeline.data.stream.settings import DEFAULT_WINDOW_ROWS, DecodeIn
from pipeline.data.stream.tasks import Augmentation, DecodeSettings, decode_micro_batch, read_window

T = TypeVar("T")
Broadcast = Callable[
    [Any], Any
]  # returns rank 0's value on every rank: `ray.train.collective.broadcast_from_rank_zero`

MAX_WINDOW_BYTES = 1 << 30  # a read task holds its window in memory
SEGMENT_MICRO_BATCHES = 1000  # per Ray Data execution, over all workers: its overhead grows with the number of blocks
READY_BATCHES = 3  # per worker, beyond the ones it has fetched


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings of a training stream."""

    global_batch_size: int  # images per step, over all workers
    micro_batch_size: int  # images per worker and forward pass
    canvas: tuple[int, int]  # height, width
    augment: AugmentSettings
    augment_epochs: int | None = None  # strong augmentation ends before this epoch; None: never
    seed: int = 0
    window_rows: int = DEFAULT_WINDOW_ROWS  # rows are shuffled within windows of about this length
    decode_in: DecodeIn = "task"
    prefetch: int = 2  # batches ready on each worker; with decode_in="worker" also its decoding threads, up to 4


def training_plan(shards: ShardSet, settings: StreamSettings) -> BatchPlan:
    """Plan the batches of a training; windows are shortened to `MAX_WINDOW_BYTES` where images are large."""
    source = locate_row_groups(shards)
    return BatchPlan(
        source.rows,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        window_rows=min(settings.window_rows, int(MAX_WINDOW_BYTES / source.row_bytes)),
    )


def _no_broadcast(value: T) -> T:
    """Broadcast of a single worker."""
    return value


def training_stream(
    shards: ShardSet,
    settings: StreamSettings,
    *,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Broadcast = _no_broadcast,
) -> Iterator[Batch]:
    """Stream the micro-batches of worker `rank` for global steps start to stop, over as many epochs as needed.

    Reading starts with this call. Each step is `global_batch_size / micro_batch_size / world_size` batches. This
    call is collective, and so are some calls of `next`: all workers must go through their streams in step.
    """
    plan = training_plan(shards, settings)
    augmentation = Augmentation(settings.seed, settings.augment, settings.augment_epochs)
    decoding = DecodeSettings(settings.canvas, settings.micro_batch_size, augmentation)
    run = _WorkerStream(
        locate_row_groups(shards), plan, decoding, settings.decode_in, settings.prefetch, rank, world_size, broadcast
    )
    return run.batches(start_step, stop_step)


def evaluation_stream(
    shards: ShardSet,
    *,
    canvas: tuple[int, int],
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Broadcast = _no_broadcast,
    decode_in: DecodeIn = "task",
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Stream every image once over all workers, unaugmented; each worker gets the same number of batches, the last ones padded.

    Raises:
        UndecodableImageError: names the image. Skipping it would change the result silently.
    """
    source = locate_row_groups(shards)
    plan = BatchPlan(
        source.rows, global_batch_size=micro_batch_size * world_size, micro_batch_size=micro_batch_size, seed=None
    )
    decoding = DecodeSettings(canvas, micro_batch_size, augmentation=None)
    run = _WorkerStream(source, plan, decoding, decode_in, prefetch, rank, world_size, broadcast)
    return run.batches(0, plan.steps_per_epoch)


@dataclass(frozen=True)
class _WorkerStream:
    """One worker's share of a plan."""

    source: RowGroups
    plan: BatchPlan
    decoding: DecodeSettings
    decode_in: DecodeIn
    prefetch: int
    rank: int
    world_size: int
    broadcast: Broadcast

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Start the stream, and return its batches in the order of the plan."""
        self.plan.accumulation(self.world_size)  # raises if the workers cannot share a step
        decoded = self._decoded_inline if self.decode_in == "inline" else self._decoded_by_ray
        return self._checked(decoded(start_step, stop_step), start_step, stop_step)

    def _checked(self, batches: Iterator[Batch], start_step: int, stop_step: int) -> Iterator[Batch]:
        """Compare every batch with the plan; a wrong order would silently break exact resumes."""
        own = range(self.rank, self.plan.micro_batches, self.world_size)
        planned = ((step, micro_batch) for step in range(start_step, stop_step) for micro_batch in own)
        for (step, micro_batch), batch in zip(planned, batches, strict=True):
            if (batch.step, batch.micro_batch) != (step, micro_batch):
                raise RuntimeError(
                    f"rank {self.rank} of {self.world_size} received micro-batch {batch.micro_batch} of step {batch.step}"
                    f" where the plan has micro-batch {micro_batch} of step {step}"
                )
            yield batch

    def _decoded_inline(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        for window in self.plan.windows(start_step, stop_step):
            item = pa.Table.from_pylist([asdict(window)])
            for encoded in islice(read_window(item, self.source, self.plan), self.rank, None, self.world_size):
                yield batch_from_arrow(decode_micro_batch(encoded, self.decoding), self.decoding.canvas)

    def _decoded_by_ray(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Chain segments: the first starts at once, each later one when half of its predecessor is consumed.

        Starting takes seconds, most of them for new processes. A segment that is not consumed yet holds only a few batches.
        """
        segments = self._segments(start_step, stop_step)
        first = self._started(next(segments, []))

        def chained() -> Iterator[Batch]:
            upcoming = first
            while upcoming is not None:
                (length, batches), upcoming = upcoming, None
                for number, batch in enumerate(batches):
                    if number == length // 2:
                        upcoming = self._started(next(segments, []))
                    yield batch

        return chained()

    def _segments(self, start_step: int, stop_step: int) -> Iterator[list[Window]]:
        """Cut the windows into segments, each one Ray Data execution."""
        steps = SEGMENT_MICRO_BATCHES // self.plan.micro_batches
        segment: list[Window] = []
        for window in self.plan.windows(start_step, stop_step):
            if segment and window.stop_step - segment[0].first_step > steps:
                yield segment
                segment = []
            segment.append(window)
        if segment:
            yield segment

    def _started(self, windows: list[Window]) -> tuple[int, Iterator[Batch]] | None:
        """Start a segment; return the number of this worker's batches and their iterator, or None without windows."""
        if not windows:
            return None
        splits = self._dataset(windows).streaming_split(self.world_size, equal=True) if self.rank == 0 else None
        split: DataIterator = self.broadcast(splits)[self.rank]
        to_batch = _ToBatch(self.decoding, decode=self.decode_in == "worker", pin=self._feeds_gpu)
        batches = split.iter_torch_batches(
            batch_size=None, prefetch_batches=self.prefetch, collate_fn=to_batch, device="cpu"
        )
        steps = windows[-1].stop_step - windows[0].first_step
        return steps * self.plan.accumulation(self.world_size), _fetched_ahead(cast(Iterator[Batch], iter(batches)))

    def _dataset(self, windows: list[Window]) -> Dataset:
        """Build the Ray Data pipeline: one row and one block per micro-batch, in order."""
        dataset = ray.data.from_items([asdict(window) for window in windows], override_num_blocks=len(windows))
        self._configure(dataset.context)
        encoded = dataset.map_batches(
            partial(read_window, source=self.source, plan=self.plan),
            num_cpus=0,  # it waits for storage; reserving a core would take it from decoding
            compute=TaskPoolStrategy(size=min(self._reads, len(windows))),
            batch_size=None,
            batch_format="pyarrow",
        )
        if self.decode_in == "worker":
            return encoded
        micro_batches = self.plan.micro_batches * (windows[-1].stop_step - windows[0].first_step)
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        return encoded.map_batches(
            partial(decode_micro_batch, settings=self.decoding),
            num_cpus=1,
            compute=TaskPoolStrategy(size=min(cores, micro_batches)),
            batch_size=None,
            batch_format="pyarrow",
        )

    def _configure(self, context: DataContext) -> None:
        """Keep the order, one row per block, and bounds on what is read and decoded ahead."""
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # byte: every row becomes a block
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        window_bytes = self.source.row_bytes * self.plan.steps_per_window * self.plan.global_batch_size
        height, width = self.decoding.canvas
        bounds = {"MapBatches(read_window)": int(self._reads * window_bytes / 2)}
        if self.decode_in == "task":
            in_workers = self.world_size * (self.prefetch + READY_BATCHES)
            bounds["MapBatches(decode_micro_batch)"] = in_workers * self.plan.micro_batch_size * height * width * 3
        bound_outputs(context, bounds)

    @property
    def _feeds_gpu(self) -> bool:
        """True if this worker has a GPU of its own; it may also see other GPUs of its node."""
        return torch.cuda.is_available() and bool(ray.get_gpu_ids())

    @property
    def _reads(self) -> int:
        """Number of windows that are read concurrently."""
        return max(2, self.world_size // 4)


class _ToBatch(ArrowBatchCollateFn):
    """Convert blocks in the prefetching threads, so that copies to a GPU start from page-locked memory and delay no step."""

    def __init__(self, decoding: DecodeSettings, decode: bool, pin: bool) -> None:
        self.decoding = decoding
        self.decode = decode
        self.pin = pin

    def __call__(self, block: pa.Table) -> Batch:  # type: ignore[override]  # Ray's types allow tensors only
        decoded = decode_micro_batch(block, self.decoding) if self.decode else block
        batch = batch_from_arrow(decoded, self.decoding.canvas)
        return batch.pin_memory() if self.pin else batch


def _fetched_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; fetching the first one starts now, in the background."""
    first: Future[T] = Future()

    def fetch() -> None:
        try:
            first.set_result(next(items))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            first.set_exception(error)

    threading.Thread(target=fetch, daemon=True).start()

    def rest() -> Iterator[T]:
        yield first.result()
        yield from items

    return rest()
