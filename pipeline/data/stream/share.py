"""One worker's share of a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.data.shards.reader import RowGroups
from pipeline.data.stream.plan import BatchPlan
from pipeline.data.stream.settings import DecodeIn
from pipeline.data.stream.tasks import DecodeSettings

Broadcast = Callable[[Any], Any]  # gives rank 0's value to every rank, as `broadcast_from_rank_zero` of Ray Train does


@dataclass(frozen=True)
class WorkerShare:
    """Part of a plan that one worker takes, and the way in which it is decoded."""

    source: RowGroups
    plan: BatchPlan
    decoding: DecodeSettings
    decode_in: DecodeIn
    prefetch: int  # micro-batches
    rank: int
    world_size: int
    broadcast: Broadcast

    @property
    def lanes(self) -> range:
        """Lanes of this worker.

        Raises:
            ValueError: there are more workers than micro-batches in a step.
        """
        return self.plan.lanes_of(self.rank, self.world_size)
