"""A small stream of synthetic shards, and fingerprints of its batches."""

import zlib
from dataclasses import replace

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.stream import StreamSettings, training_stream

Seen = tuple[int, int, list[int], int, int]
SETTINGS = StreamSettings(
    global_batch_size=8,
    micro_batch_size=2,
    canvas=(32, 32),
    augment=AugmentSettings(),
    stages=Stages(0, 1, 1),
    seed=4,
    window_rows=32,
)  # 18 steps of 4 micro-batches an epoch, 4 steps a window, 6 rows dropped


def seen(batch: Batch) -> Seen:
    """Fingerprint of a batch: its position, images, pixels and boxes."""
    pixels, boxes = (zlib.crc32(tensor.contiguous().numpy().tobytes()) for tensor in (batch.images, batch.boxes))
    return batch.step, batch.micro_batch, batch.image_id.tolist(), pixels, boxes


def planned_batches(shards: ShardSet, start_step: int, stop_step: int) -> list[Batch]:
    inline = replace(SETTINGS, decode_in="inline")
    return list(training_stream(shards, inline, start_step=start_step, stop_step=stop_step))


def planned(shards: ShardSet, start_step: int, stop_step: int) -> list[Seen]:
    return [seen(batch) for batch in planned_batches(shards, start_step, stop_step)]
