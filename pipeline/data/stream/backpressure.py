"""Bound on how far the data tasks may run ahead of the training.

Ray Data's own backpressure does not fit a training stream. Its reservation runs one decode task at a time on few cores, gives
half of them to a stream that merely waits, and otherwise fills half of the object store. Without reservation, reading is held
back only while decoding is busy, so a slow training step would let it read everything. Here an operator starts no task while
the blocks that it has produced and that are still in use, anywhere in the cluster, reach a bound.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ray.data import DataContext

from pipeline.ray_internals import use_admission

SHORTEST_PAUSE, LONGEST_PAUSE = 0.005, 0.25  # seconds


class OutputBounds:
    """Upper bounds on the stored output of some operators.

    Args:
        operators: names of all operators of the pipeline.
        bounds: bytes, by name of the operator.
    """

    def __init__(self, operators: Sequence[str], bounds: Mapping[str, int]) -> None:
        if missing := bounds.keys() - set(operators):
            raise ValueError(f"there is no operator {missing} to bound, only {list(operators)}")
        self._bounds = bounds
        self._pauses: dict[str, float] = {}  # seconds until the next check, by operator that is held back

    def may_start_task(self, operator: str, stored_bytes: Callable[[], int], idle: Callable[[], bool]) -> bool:
        """Hold the operator back while its bound is reached; see `ray_internals.Admission`."""
        bound = self._bounds.get(operator)
        if bound is None:
            return True
        if stored_bytes() < bound:
            self._pauses.pop(operator, None)
            return True
        # With no task running, Ray Data's scheduling loop has nothing to wait for and would call this again at once, for ever:
        # most of a core. Batches are ready then, so a pause delays nobody. Each pause is about as long as the wait so far:
        # output that is freed every second is noticed within one. While a task is running, a pause would delay its output.
        if not idle():
            return False
        pause = self._pauses.get(operator, SHORTEST_PAUSE)
        time.sleep(pause)
        self._pauses[operator] = min(2 * pause, LONGEST_PAUSE)
        return False


def bound_outputs(context: DataContext, bounds: Mapping[str, int]) -> None:
    """Bound the stored output of operators, in place of Ray Data's own backpressure.

    Args:
        bounds: bytes, by name of the operator.
    """
    use_admission(context, partial(OutputBounds, bounds=dict(bounds)))
