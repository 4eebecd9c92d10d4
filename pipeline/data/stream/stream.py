"""The plan, carried out by Ray Data: each training worker receives the micro-batches of its lanes, in the plan's order.

Two kinds of tasks. A read task takes a window of the plan, reads its row groups and yields blocks of encoded images; a decode
task turns one block into pixels. They must stay two operators: fused, one task would decode a whole window on one core.

The workers of a node share a Ray Data execution, with a coordinator process of its own (`streaming_split`) on that node: no
process serves the whole cluster. Such a group reads only the lanes of its workers, on its own node. A block holds several
micro-batches of one lane, which divides the cost of a block's bookkeeping by their number; blocks are dealt to the workers of a
group in turn.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
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
from pipeline.data.stream.batch import Batch, batches_from_arrow
from pipeline.data.stream.groups import GROUP_WORKERS, groups_of, nodes_of_workers
from pipeline.data.stream.plan import BatchPlan, Window
from pipeline.data.stream.settings import DEFAULT_WINDOW_ROWS, MIN_LANE_ROWS, DecodeIn
from pipeline.data.stream.tasks import Augmentation, DecodeSettings, decode_block, read_window
from pipeline.ray_internals import NODE_ID_LABEL, split_on_node

T = TypeVar("T")
Broadcast = Callable[[Any], Any]  # gives rank 0's value to every rank, as `broadcast_from_rank_zero` of Ray Train does

MAX_WINDOW_BYTES = 1 << 30  # a read task holds its window in memory
BLOCK_BYTES = 32 << 20  # aimed at for a decoded block
BLOCK_STEPS = 32  # most steps of a block
EXECUTION_BLOCKS = 4000  # of one execution of a group: its bookkeeping grows with its blocks
READY_BATCHES = 3  # for each worker, beyond those that it has fetched
QUEUED_TASKS = (
    2  # decode tasks for each core: Ray Data learns of a finished task up to 0.1 s late, and the next one must not wait
)


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings of a training stream."""

    global_batch_size: int  # images per step, over all workers
    micro_batch_size: int  # images per worker and forward pass
    canvas: tuple[int, int]  # height, width
    augment: AugmentSettings
    augment_epochs: int | None = None  # strong augmentation ends before this epoch; None: never
    distort_on_device: bool = True  # colours; False: where images are decoded
    seed: int = 0
    window_rows: int | None = None  # rows that are shuffled together; default: see `training_plan`
    decode_in: DecodeIn = "task"
    prefetch: int = 2  # batches ready on each worker; with decode_in="worker" also its decoding threads, up to 4


def training_plan(shards: ShardSet, settings: StreamSettings) -> BatchPlan:
    """Plan of a training.

    Windows have 2,048 rows or 128 per lane unless the settings say otherwise. They are shortened where images are so large
    that one would take more than `MAX_WINDOW_BYTES`.
    """
    source = locate_row_groups(shards)
    lanes = settings.global_batch_size // max(1, settings.micro_batch_size)
    window_rows = settings.window_rows or max(DEFAULT_WINDOW_ROWS, MIN_LANE_ROWS * lanes)
    return BatchPlan(
        source.rows,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        window_rows=min(window_rows, int(MAX_WINDOW_BYTES / source.row_bytes)),
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

    The stream starts with this call. Each step is one batch of each of this worker's lanes. The call is
    collective, and so is a `next` now and then: all workers must consume their streams in step.
    """
    plan = training_plan(shards, settings)
    augmentation = Augmentation(
        settings.seed, settings.augment, settings.augment_epochs, distort=not settings.distort_on_device
    )
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
    prefetch: int  # micro-batches
    rank: int
    world_size: int
    broadcast: Broadcast

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Start the stream, and return its batches in the order of the plan."""
        self.plan.lanes_of(self.rank, self.world_size)  # raises if there are more workers than micro-batches
        blocks = self._decoded_here if self.decode_in == "inline" else self._decoded_by_ray
        return self._checked(self._step_by_step(blocks(start_step, stop_step)), start_step, stop_step)

    def _step_by_step(self, blocks: Iterator[list[Batch]]) -> Iterator[Batch]:
        """Order micro-batches by step: blocks of this worker's lanes come one lane after the other."""
        for first in blocks:
            together = [first, *(next(blocks) for _ in self._lanes[1:])]
            for of_step in zip(*together, strict=True):
                yield from of_step

    def _checked(self, batches: Iterator[Batch], start_step: int, stop_step: int) -> Iterator[Batch]:
        """Compare every batch with the plan: a wrong order would silently break exact resumes."""
        expected = ((step, lane) for step in range(start_step, stop_step) for lane in self._lanes)
        for (step, lane), batch in zip(expected, batches, strict=True):
            if (batch.step, batch.micro_batch) != (step, lane):
                raise RuntimeError(
                    f"rank {self.rank} of {self.world_size} received micro-batch {batch.micro_batch} of step {batch.step}"
                    f" where the plan has micro-batch {lane} of step {step}"
                )
            yield batch

    @property
    def _lanes(self) -> range:
        return self.plan.lanes_of(self.rank, self.world_size)

    @property
    def _block_steps(self) -> int:
        height, width = self.decoding.canvas
        return max(1, min(BLOCK_STEPS, BLOCK_BYTES // (self.plan.micro_batch_size * height * width * 3)))

    def _decoded_here(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        lanes = [(lane,) for lane in self._lanes]
        for window in self.plan.windows(start_step, stop_step):
            item = pa.Table.from_pylist([asdict(window)])
            read = partial(read_window, lanes=lanes, block_steps=1, start_step=start_step)
            for encoded in read(item, self.source, self.plan):
                yield batches_from_arrow(decode_block(encoded, self.decoding), self.decoding.canvas)

    # Executions of Ray Data

    def _decoded_by_ray(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Blocks of this worker, execution after execution.

        The first starts at once, each other when half of the one before is done: starting takes seconds, most of them for new
        processes. Until it is needed an execution holds a few blocks.
        """
        executions = self._executions(start_step, stop_step)
        nodes = nodes_of_workers(self.world_size)
        first = self._started(next(executions, []), nodes, start_step)

        def chained() -> Iterator[list[Batch]]:
            upcoming = first
            while upcoming is not None:
                (windows, blocks), upcoming = upcoming, None
                middle = (windows[0].first_step + windows[-1].stop_step) // 2
                asked = False
                for block in blocks:
                    if not asked and block[-1].step >= middle:
                        asked, upcoming = True, self._started(next(executions, []), nodes, start_step)
                    yield block

        return chained()

    def _executions(self, start_step: int, stop_step: int) -> Iterator[list[Window]]:
        """Windows of each execution; the same on all workers."""
        blocks_per_step = GROUP_WORKERS * len(self.plan.lanes_of(0, self.world_size)) / self._block_steps
        steps = max(1, int(EXECUTION_BLOCKS / blocks_per_step))
        execution: list[Window] = []
        for window in self.plan.windows(start_step, stop_step):
            if execution and window.stop_step - execution[0].first_step > steps:
                yield execution
                execution = []
            execution.append(window)
        if execution:
            yield execution

    def _started(
        self, windows: list[Window], nodes: Sequence[str], start_step: int
    ) -> tuple[list[Window], Iterator[list[Batch]]] | None:
        """Start an execution, and return its windows and this worker's blocks; None without windows. Collective."""
        if not windows:
            return None
        splits: list[DataIterator] | None = None
        if self.rank == 0:
            splits = []
            groups = list(groups_of(nodes))
            for workers in groups:
                node = nodes[workers[0]]
                dataset = self._dataset(windows, workers, node, len(groups), start_step)
                splits += split_on_node(dataset, len(workers), node)
        split: DataIterator = self.broadcast(splits)[self.rank]
        to_blocks = _ToBlock(self.decoding, decode=self.decode_in == "worker", pin=self._feeds_gpu)
        blocks = split.iter_torch_batches(
            batch_size=None, prefetch_batches=self._prefetched_blocks, collate_fn=to_blocks, device="cpu"
        )
        filled = (block.batches for block in cast(Iterator[_Block], iter(blocks)) if block.batches)
        return windows, _fetched_ahead(filled)

    def _dataset(
        self, windows: list[Window], workers: Sequence[int], node: str, groups: int, start_step: int
    ) -> Dataset:
        """Blocks of a group's lanes, one row each, in the order in which they are dealt to its workers.

        Reading stays on the group's node, and so off a head node that is not for work. Decoding goes wherever cores are free.
        """
        of_workers = [list(self.plan.lanes_of(rank, self.world_size)) for rank in workers]
        most = max(len(lanes) for lanes in of_workers)
        dealt = [[lanes[i] if i < len(lanes) else None for lanes in of_workers] for i in range(most)]

        dataset = ray.data.from_items([asdict(window) for window in windows], override_num_blocks=len(windows))
        self._configure(dataset.context, len(workers))
        encoded = dataset.map_batches(
            partial(
                read_window,
                source=self.source,
                plan=self.plan,
                lanes=dealt,
                block_steps=self._block_steps,
                start_step=start_step,
            ),
            num_cpus=0,  # it waits for storage; reserving a core would take it from decoding
            label_selector={NODE_ID_LABEL: node},
            compute=TaskPoolStrategy(size=min(self._reads, len(windows))),
            batch_size=None,
            batch_format="pyarrow",
        )
        if self.decode_in == "worker":
            return encoded
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        return encoded.map_batches(
            partial(decode_block, settings=self.decoding),
            num_cpus=1,
            compute=TaskPoolStrategy(size=-(-QUEUED_TASKS * cores // groups)),
            batch_size=None,
            batch_format="pyarrow",
        )

    def _configure(self, context: DataContext, workers: int) -> None:
        """Keep the order, one row per block, and bounds on what is read and decoded ahead."""
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # byte: every row becomes a block
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        lanes = workers * len(self.plan.lanes_of(0, self.world_size))
        window_bytes = self.source.row_bytes * self.plan.steps_per_window * self.plan.micro_batch_size * lanes
        height, width = self.decoding.canvas
        bounds = {"MapBatches(read_window)": int(self._reads * window_bytes / 2)}
        if self.decode_in == "task":
            ready = -(-READY_BATCHES // self._block_steps)
            blocks = workers * (self._prefetched_blocks + ready)
            block_bytes = self._block_steps * self.plan.micro_batch_size * height * width * 3
            bounds["MapBatches(decode_block)"] = blocks * block_bytes
        bound_outputs(context, bounds)

    @property
    def _prefetched_blocks(self) -> int:
        if self.decode_in == "worker":
            return self.prefetch  # also the number of decoding threads, up to 4
        return -(-self.prefetch // self._block_steps)

    @property
    def _feeds_gpu(self) -> bool:
        """Whether this worker has a GPU; one without may still see those of its node."""
        return torch.cuda.is_available() and bool(ray.get_gpu_ids())

    @property
    def _reads(self) -> int:
        """Windows that a group reads at the same time."""
        return 2


@dataclass(frozen=True)
class _Block:
    """Micro-batches of one lane; empty where a worker has fewer lanes than the others of its group."""

    batches: list[Batch]


class _ToBlock(ArrowBatchCollateFn):
    """Runs in the threads that fetch ahead, so that a GPU copies from page-locked memory and no step waits for it."""

    def __init__(self, decoding: DecodeSettings, decode: bool, pin: bool) -> None:
        self.decoding = decoding
        self.decode = decode
        self.pin = pin

    def __call__(self, block: pa.Table) -> _Block:  # type: ignore[override]  # Ray's types know tensors alone
        decoded = decode_block(block, self.decoding) if self.decode else block
        batches = batches_from_arrow(decoded, self.decoding.canvas)
        return _Block([batch.pin_memory() for batch in batches] if self.pin else batches)


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
