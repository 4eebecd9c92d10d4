"""Order of samples as arithmetic on the row counts of a manifest: which rows make which micro-batch of which step.

One epoch is a pure function of (row groups, seed, epoch). Whole row groups are shuffled and their rows laid end to end; where
images of several sets are mixed or repeated, those that `mixture.py` counts out for the epoch. That sequence is cut into as many
equal lanes as a step has micro-batches: lane m supplies micro-batch m of every step. Each lane is cut into windows, and the rows
of each window are shuffled. A tail of the epoch shorter than a step is dropped.

Worker r of n takes lanes r, r + n, ...: its reads are its own, and the order does not depend on the number of workers. A step
mixes rows from as many distant regions of the sequence as it has lanes. A window ignores the ends of row groups, so it shares
at most one group with each neighbour; planning it costs O(rows of the window).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.reader import Rows
from pipeline.data.stream.mixture import Mixture, Stretches, permutation
from pipeline.data.stream.settings import DEFAULT_WINDOW_ROWS
from pipeline.errors import UserError


@dataclass(frozen=True)
class RowOrder:
    """A stretch of the sequence of laid-out rows, shuffled within windows; any part is computed without the rest."""

    stretches: Stretches  # [P] row groups, or parts of them, in the order in which they are laid end to end
    ends: NDArray[np.int64]  # [P] position after the last row of each
    start: int  # position of the stretch's first row
    length: int
    window_rows: int
    key: tuple[int, int] | None  # key of the shuffle within windows; None leaves the rows in order
    lane: int = 0

    def __len__(self) -> int:
        return self.length

    def rows(self, start: int, stop: int) -> Rows:
        """Rows at positions start to stop of the stretch."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start} to {stop} do not lie within the {len(self)} rows of the epoch")
        first, last = start // self.window_rows, -(-stop // self.window_rows)
        laid = np.concatenate([self._window(w) for w in range(first, last)] or [np.zeros(0, np.int64)])
        offset = first * self.window_rows
        laid = laid[start - offset : stop - offset] + self.start
        index = np.searchsorted(self.ends, laid, side="right")
        starts = np.concatenate([[0], self.ends[:-1]])
        return self.stretches.rows(index, laid - starts[index])

    def _window(self, window: int) -> NDArray[np.int64]:
        start = window * self.window_rows
        laid = np.arange(start, min(start + self.window_rows, len(self)), dtype=np.int64)
        if self.key is None:
            return laid
        return laid[permutation(len(laid), self.key, (0, self.lane, 1 + window))]


@dataclass(frozen=True)
class Window:
    """Steps of one epoch that are shuffled together, lane by lane, and read by one task."""

    epoch: int
    first_step: int  # global step, counted from the start of the training
    stop_step: int


class PlanError(UserError, ValueError):
    """Batch sizes that do not fit the number of images or workers."""

    recurs = True


@dataclass(frozen=True)
class BatchPlan:
    """Steps cut into micro-batches, one per lane; lane m belongs to worker m % world_size."""

    row_groups: NDArray[np.int64]  # [G] rows per row group
    global_batch_size: int  # images per step, over all workers
    micro_batch_size: int  # images that a worker holds at a time
    seed: int | None  # draws the shuffle; None, for evaluation: file order, and an incomplete last step is kept
    window_rows: int = DEFAULT_WINDOW_ROWS  # rows of a window, over all lanes
    mixture: Mixture | None = None  # None: an epoch shows every row once

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.global_batch_size < 1 or self.global_batch_size % self.micro_batch_size:
            raise PlanError(
                f"global_batch_size={self.global_batch_size} must be a multiple of"
                f" micro_batch_size={self.micro_batch_size}, both > 0"
            )
        if self.seed is not None and self.seed < 0:
            raise PlanError(f"seed={self.seed} must not be negative")
        if self.steps_per_epoch == 0:
            raise PlanError(
                f"an epoch of {self.num_rows} images has no step of global_batch_size={self.global_batch_size}:"
                " choose a smaller one"
            )

    @property
    def num_rows(self) -> int:
        """Images of an epoch, with repetitions."""
        return int(self.row_groups.sum()) if self.mixture is None else self.mixture.rows_per_epoch

    @property
    def lanes(self) -> int:
        """Number of lanes: micro-batches of one step, over all workers."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def lane_rows(self) -> int:
        """Rows of one lane in an epoch; in evaluation the last lanes may have fewer."""
        if self.seed is None:
            return -(-self.num_rows // self.lanes)
        return self.num_rows // self.global_batch_size * self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return -(-self.lane_rows // self.micro_batch_size)

    @property
    def steps_per_window(self) -> int:
        """Whole steps per shuffling window."""
        return max(1, round(self.window_rows / self.global_batch_size))

    def lanes_of(self, rank: int, world_size: int) -> range:
        """Lanes of one worker; the first workers have one more where lanes cannot be shared evenly.

        Raises:
            PlanError: there are more workers than lanes.
        """
        if world_size > self.lanes:
            raise PlanError(
                f"{world_size} workers cannot share the {self.lanes} micro-batches of a step"
                f" (global_batch_size={self.global_batch_size}, micro_batch_size={self.micro_batch_size}): take fewer"
                " workers, or a smaller micro-batch"
            )
        return range(rank, self.lanes, world_size)

    def stretches(self, epoch: int) -> Stretches:
        """Stretches of rows of an epoch, before they are shuffled."""
        if self.mixture is not None:
            return self.mixture.stretches(self.seed or 0, epoch)
        none = np.zeros(len(self.row_groups), np.int64)
        return Stretches(np.arange(len(self.row_groups)), skipped=none, length=self.row_groups, showing=none)

    def lane_orders(self, epoch: int, lanes: Sequence[int]) -> list[RowOrder]:
        """Row orders of some lanes in an epoch."""
        stretches, key = self.stretches(epoch), None
        if self.seed is not None:
            key = (self.seed, epoch)
            stretches = stretches.ordered(permutation(len(stretches.length), key, (0, 0, 0)))
        ends = np.cumsum(stretches.length)
        window_rows = self.steps_per_window * self.micro_batch_size  # whole steps, so that no step needs two windows
        orders = []
        for lane in lanes:
            start = min(lane * self.lane_rows, self.num_rows)
            length = min(self.lane_rows, self.num_rows - start)
            orders.append(RowOrder(stretches, ends, start, length, window_rows, key, lane))
        return orders

    def windows(self, start_step: int, stop_step: int) -> Iterator[Window]:
        """Cut steps start to stop where a window or an epoch ends."""
        step = start_step
        while step < stop_step:
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            window_end = step - step_of_epoch % self.steps_per_window + self.steps_per_window
            stop = min(window_end, (epoch + 1) * self.steps_per_epoch, stop_step)
            yield Window(epoch, step, stop)
            step = stop

    def rows(self, window: Window, lanes: Sequence[int]) -> list[Rows]:
        """Rows of a window in some lanes: [steps * micro_batch_size] each, fewer at the end of an evaluation."""
        first_of_epoch = window.epoch * self.steps_per_epoch
        start = (window.first_step - first_of_epoch) * self.micro_batch_size
        stop = (window.stop_step - first_of_epoch) * self.micro_batch_size
        orders = self.lane_orders(window.epoch, lanes)
        return [order.rows(min(start, len(order)), min(stop, len(order))) for order in orders]
