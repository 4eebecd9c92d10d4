"""The plan, carried out: each training worker receives the micro-batches of its lanes, in the plan's order.

Images are decoded by Ray Data (`ray_executions.py`), or in this process, a few batches ahead of the training; Ray is then not
even imported.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

import pyarrow as pa

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import WHOLLY_DENSE, Stages
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups
from pipeline.data.shards.training_set import TrainingSet
from pipeline.data.stream.ahead import ahead
from pipeline.data.stream.batch import Batch, batches_from_arrow
from pipeline.data.stream.mixture import Mixture, SetRows
from pipeline.data.stream.partners import MIN_POOL_ROWS
from pipeline.data.stream.plan import BatchPlan
from pipeline.data.stream.settings import DEFAULT_WINDOW_ROWS, MIN_LANE_ROWS, DecodeIn
from pipeline.data.stream.share import Broadcast, WorkerShare
from pipeline.data.stream.tasks import Augmentation, DecodeSettings, decode_block, read_window

T = TypeVar("T")

MAX_WINDOW_BYTES = 1 << 30  # a read task holds its window in memory


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings of a training stream."""

    global_batch_size: int  # images per step, over all workers
    micro_batch_size: int  # images per worker and forward pass
    canvas: tuple[int, int]  # height, width
    augment: AugmentSettings
    stages: Stages = WHOLLY_DENSE  # epochs in which parts of `augment` act
    distort_on_device: bool = True  # colours; False: where images are decoded
    seed: int = 0
    window_rows: int | None = None  # rows that are shuffled together; default: see `training_plan`
    decode_in: DecodeIn = "task"
    prefetch: int = 2  # batches ready on each worker; with decode_in="worker" also its decoding threads, up to 4


def training_plan(data: ShardSet | TrainingSet, settings: StreamSettings) -> BatchPlan:
    """Plan of a training on several sets, or one.

    Windows have 2,048 rows or 128 per lane unless the settings say otherwise; with mosaics 512 per lane, as a lane's window
    holds the partners. They are shortened where images are so large that one would take more than `MAX_WINDOW_BYTES`.
    """
    train = TrainingSet.alone(data) if isinstance(data, ShardSet) else data
    source = train.row_groups()
    lanes = settings.global_batch_size // max(1, settings.micro_batch_size)
    lane_rows = MIN_POOL_ROWS if settings.augment.mosaic_probability else MIN_LANE_ROWS
    window_rows = settings.window_rows or max(DEFAULT_WINDOW_ROWS, lane_rows * lanes)
    return BatchPlan(
        source.rows,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        window_rows=min(window_rows, int(MAX_WINDOW_BYTES / source.row_bytes)),
        mixture=None if train.is_plain else mixture_of(train),
    )


def mixture_of(train: TrainingSet) -> Mixture:
    """How often an epoch shows the rows of each set."""
    return Mixture(
        tuple(SetRows(locate_row_groups(each.shards).rows, each.images_in_epoch, each.copies) for each in train.sets)
    )


def _no_broadcast(value: T) -> T:
    """Broadcast of a single worker."""
    return value


def training_stream(
    data: ShardSet | TrainingSet,
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
    train = TrainingSet.alone(data) if isinstance(data, ShardSet) else data
    plan = training_plan(train, settings)
    augmentation = Augmentation(
        settings.seed, settings.augment, settings.stages, distort=not settings.distort_on_device
    )
    decoding = DecodeSettings(settings.canvas, settings.micro_batch_size, augmentation)
    share = WorkerShare(
        train.row_groups(), plan, decoding, settings.decode_in, settings.prefetch, rank, world_size, broadcast
    )
    return _batches(share, start_step, stop_step)


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
    share = WorkerShare(source, plan, decoding, decode_in, prefetch, rank, world_size, broadcast)
    return _batches(share, 0, plan.steps_per_epoch)


def _batches(share: WorkerShare, start_step: int, stop_step: int) -> Iterator[Batch]:
    """Start the stream of a worker, and return its batches in the order of the plan."""
    lanes = share.lanes  # raises if there are more workers than micro-batches
    if share.decode_in == "inline":
        blocks = ahead(_decoded_here(share, start_step, stop_step), max(1, share.prefetch) * len(lanes))
    else:
        from pipeline.data.stream.ray_executions import RayExecutions  # here: a process alone does without Ray

        blocks = RayExecutions(share).blocks(start_step, stop_step)
    return _checked(share, _step_by_step(blocks, len(lanes)), start_step, stop_step)


def _decoded_here(share: WorkerShare, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
    """Blocks of one micro-batch, read and decoded by whoever asks for them."""
    lanes = [(lane,) for lane in share.lanes]
    for window in share.plan.windows(start_step, stop_step):
        item = pa.Table.from_pylist([asdict(window)])
        encoded = read_window(
            item,
            share.source,
            share.plan,
            lanes=lanes,
            block_steps=1,
            start_step=start_step,
            augmentation=share.decoding.augmentation,
        )
        for block in encoded:
            yield batches_from_arrow(decode_block(block, share.decoding), share.decoding.canvas)


def _step_by_step(blocks: Iterator[list[Batch]], lanes: int) -> Iterator[Batch]:
    """Order micro-batches by step: blocks of a worker's lanes come one lane after the other."""
    for first in blocks:
        together = [first, *(next(blocks) for _ in range(lanes - 1))]
        for of_step in zip(*together, strict=True):
            yield from of_step


def _checked(share: WorkerShare, batches: Iterator[Batch], start_step: int, stop_step: int) -> Iterator[Batch]:
    """Compare every batch with the plan: a wrong order would silently break exact resumes."""
    expected = ((step, lane) for step in range(start_step, stop_step) for lane in share.lanes)
    for (step, lane), batch in zip(expected, batches, strict=True):
        if (batch.step, batch.micro_batch) != (step, lane):
            raise RuntimeError(
                f"rank {share.rank} of {share.world_size} received micro-batch {batch.micro_batch} of step {batch.step}"
                f" where the plan has micro-batch {lane} of step {step}"
            )
        yield batch
