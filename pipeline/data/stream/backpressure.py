"""How far the data tasks may run ahead of the training.

Ray Data's own answers do not fit a training stream: its reservation runs one decode task at a time on few cores, gives
half of them to a stream that merely waits, and otherwise fills half of the object store; without reservation, reading is
held back only while decoding is busy, so a slow training step would let it read all there is. Here an operator starts no
task while the blocks that it has made and that are still in use, wherever they are, reach a bound.
"""

import time

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    ConcurrencyCapBackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.data._internal.execution.streaming_executor_state import Topology

BOUNDS = "bounds_of_living_outputs"
SHORTEST_PAUSE, LONGEST_PAUSE = 0.005, 0.25  # seconds


class BoundedOutputs(BackpressurePolicy):
    """Only the start of tasks is held back, never their output: the task at the head of the order can always deliver."""

    def __init__(self, data_context: DataContext, topology: Topology, resource_manager: ResourceManager) -> None:
        super().__init__(data_context, topology, resource_manager)
        self._bounds: dict[str, int] = data_context.get_config(BOUNDS)
        if missing := self._bounds.keys() - {op.name for op in topology}:
            raise ValueError(f"there is no operator {missing} to bound, only {[op.name for op in topology]}")
        self._pauses: dict[str, float] = {}  # the next one, by operator that is held back

    def can_add_input(self, op: PhysicalOperator) -> bool:
        bound = self._bounds.get(op.name)
        if bound is None:
            return True
        if op.estimate_object_store_usage() < bound:
            self._pauses.pop(op.name, None)
            return True
        # With no task running there is nothing that Ray Data's scheduling loop would wait for, and it would ask again at once,
        # for ever: most of a core. There are batches ready when an operator is held back, so nobody waits for this one. A
        # pause is about as long as the wait so far: what is freed every second is noticed within one.
        pause = self._pauses.get(op.name, SHORTEST_PAUSE)
        time.sleep(pause)
        self._pauses[op.name] = min(2 * pause, LONGEST_PAUSE)
        return False


def bound_living_outputs(context: DataContext, bounds: dict[str, int]) -> None:
    """Replace Ray Data's ways to hold back operators, except for the sizes of task pools.

    Args:
        bounds: bytes of living blocks, by name of the operator.
    """
    context.op_resource_reservation_enabled = False
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [ConcurrencyCapBackpressurePolicy, BoundedOutputs])
    context.set_config(BOUNDS, bounds)
