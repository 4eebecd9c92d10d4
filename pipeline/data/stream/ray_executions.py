"""Executions of Ray Data that read and decode for the workers.

Two kinds of tasks. A read task takes a window of the plan, reads its row groups and yields blocks of encoded images; a decode
task turns one block into pixels. They must stay two operators: fused, one task would decode a whole window on one core.

The workers of a node share an execution, with a coordinator process of its own (`streaming_split`) on that node: no process
serves the whole cluster. Such a group reads only the lanes of its workers, on its own node. A block holds several
micro-batches of one lane, which divides the cost of a block's bookkeeping by their number; blocks are dealt to the workers of a
group in turn.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar, cast

import pyarrow as pa
import ray
import torch
from ray.data import DataContext, DataIterator, Dataset, TaskPoolStrategy
from ray.data.collate_fn import ArrowBatchCollateFn

from pipeline.data.stream.backpressure import bound_outputs
from pipeline.data.stream.batch import Batch, batches_from_arrow
from pipeline.data.stream.groups import GROUP_WORKERS, groups_of, nodes_of_workers
from pipeline.data.stream.partners import PARTNERS
from pipeline.data.stream.plan import Window
from pipeline.data.stream.share import WorkerShare
from pipeline.data.stream.tasks import DecodeSettings, decode_block, read_window
from pipeline.ray_internals import NODE_ID_LABEL, split_on_node

T = TypeVar("T")

BLOCK_BYTES = 64 << 20  # aimed at for a decoded block
BLOCK_STEPS = 64  # most steps of a block
EXECUTION_BLOCKS = 4000  # of one execution of a group: its bookkeeping grows with its blocks
READY_BATCHES = 3  # for each worker, beyond those that it has fetched
# Decode tasks for each core: Ray Data notices the end of a task up to 0.1 s late, and its core must not wait.
QUEUED_TASKS = 2


@dataclass(frozen=True)
class RayExecutions:
    """The executions that one worker takes part in."""

    share: WorkerShare

    def blocks(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Blocks of this worker, execution after execution.

        The first starts at once, each other when half of the one before is done: starting takes seconds, most of them for new
        processes. Until it is needed an execution holds a few blocks.
        """
        executions = self._executions(start_step, stop_step)
        nodes = nodes_of_workers(self.share.world_size)
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
        blocks_per_step = GROUP_WORKERS * len(self.share.plan.lanes_of(0, self.share.world_size)) / self._block_steps
        steps = max(1, int(EXECUTION_BLOCKS / blocks_per_step))
        execution: list[Window] = []
        for window in self.share.plan.windows(start_step, stop_step):
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
        if self.share.rank == 0:
            splits = []
            groups = list(groups_of(nodes))
            for workers in groups:
                node = nodes[workers[0]]
                dataset = self._dataset(windows, workers, node, len(groups), start_step)
                splits += split_on_node(dataset, len(workers), node)
        split: DataIterator = self.share.broadcast(splits)[self.share.rank]
        to_blocks = _ToBlock(self.share.decoding, decode=self.share.decode_in == "worker", pin=self._feeds_gpu)
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
        of_workers = [list(self.share.plan.lanes_of(rank, self.share.world_size)) for rank in workers]
        most = max(len(lanes) for lanes in of_workers)
        dealt = [[lanes[i] if i < len(lanes) else None for lanes in of_workers] for i in range(most)]

        dataset = ray.data.from_items([asdict(window) for window in windows], override_num_blocks=len(windows))
        self._configure(dataset.context, len(workers))
        encoded = dataset.map_batches(
            partial(
                read_window,
                source=self.share.source,
                plan=self.share.plan,
                lanes=dealt,
                block_steps=self._block_steps,
                start_step=start_step,
                augmentation=self.share.decoding.augmentation,
            ),
            num_cpus=0,  # it waits for storage; reserving a core would take it from decoding
            label_selector={NODE_ID_LABEL: node},
            compute=TaskPoolStrategy(size=min(self._reads, len(windows))),
            batch_size=None,
            batch_format="pyarrow",
        )
        if self.share.decode_in == "worker":
            return encoded
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        return encoded.map_batches(
            partial(decode_block, settings=self.share.decoding),
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
        lanes = workers * len(self.share.plan.lanes_of(0, self.share.world_size))
        window_bytes = (
            self.share.source.row_bytes * self.share.plan.steps_per_window * self.share.plan.micro_batch_size * lanes
        )
        height, width = self.share.decoding.canvas
        bounds = {"MapBatches(read_window)": int(self._reads * window_bytes * self._rows_per_image / 2)}
        if self.share.decode_in == "task":
            in_use, ready = 1, max(2, -(-READY_BATCHES // self._block_steps))  # a bound without the block in use stalls
            blocks = workers * (in_use + self._prefetched_blocks + ready)
            block_bytes = self._block_steps * self.share.plan.micro_batch_size * height * width * 3
            bounds["MapBatches(decode_block)"] = blocks * block_bytes
        bound_outputs(context, bounds)

    @property
    def _prefetched_blocks(self) -> int:
        if self.share.decode_in == "worker":
            return self.share.prefetch  # also the number of decoding threads, up to 4
        return -(-self.share.prefetch // self._block_steps)

    @property
    def _feeds_gpu(self) -> bool:
        """Whether this worker has a GPU; one without may still see those of its node."""
        return torch.cuda.is_available() and bool(ray.get_gpu_ids())

    @property
    def _rows_per_image(self) -> float:
        """Rows that a block carries for each image, at most: a mosaic needs those of its partners."""
        augmentation = self.share.decoding.augmentation
        return 1 + PARTNERS * (augmentation.settings.mosaic_probability if augmentation else 0)

    @property
    def _reads(self) -> int:
        """Windows that a group reads at the same time."""
        return 2

    @property
    def _block_steps(self) -> int:
        height, width = self.share.decoding.canvas
        return max(1, min(BLOCK_STEPS, BLOCK_BYTES // (self.share.plan.micro_batch_size * height * width * 3)))


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
    """Yield the same items; fetching the first one starts now, in the background.

    No other item is fetched before it is asked for, as `ahead` would: blocks that wait take memory of the object store.
    """
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
