"""Batch plan: the rows of every step, computed from the row counts of a manifest.

One epoch is a pure function of (row groups, seed, epoch). Whole row groups are shuffled and concatenated; that sequence is cut
into windows, and the rows of each window are shuffled. Global step k of the epoch is the rows at positions
k * global_batch_size to (k + 1) * global_batch_size; the remainder after the last whole step is dropped.

Windows ignore the borders of row groups, so a window shares at most one group with each neighbour: reading it touches about
window_rows / group_rows + 1 groups. Nothing depends on the number of workers; a window costs O(window_rows).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.reader import Rows
from pipeline.data.stream.settings import DEFAULT_WINDOW_ROWS
from pipeline.errors import UserError


@dataclass(frozen=True)
class RowOrder:
    """A permutation of all rows; any part can be computed without the rest."""

    groups: NDArray[np.int64]  # [G] row groups, in the order of concatenation
    ends: NDArray[np.int64]  # [G] position after the last row of each group
    window_rows: int
    key: tuple[int, int] | None  # seed of the shuffle within windows; None keeps the rows in order

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def rows(self, start: int, stop: int) -> Rows:
        """Compute the rows at positions start to stop."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start} to {stop} do not lie within the {len(self)} rows of the epoch")
        first, last = start // self.window_rows, -(-stop // self.window_rows)
        positions = np.concatenate([self._window(w) for w in range(first, last)] or [np.zeros(0, np.int64)])
        offset = first * self.window_rows
        positions = positions[start - offset : stop - offset]
        index = np.searchsorted(self.ends, positions, side="right")
        starts = np.concatenate([[0], self.ends[:-1]])
        return Rows(group=self.groups[index], row=positions - starts[index])

    def _window(self, window: int) -> NDArray[np.int64]:
        start = window * self.window_rows
        positions = np.arange(start, min(start + self.window_rows, len(self)), dtype=np.int64)
        return positions if self.key is None else positions[_permutation(len(positions), self.key, stream=1 + window)]


def shuffled_order(
    row_groups: Sequence[int] | NDArray[np.int64], *, seed: int, epoch: int, window_rows: int
) -> RowOrder:
    """Order of one training epoch.

    Args:
        row_groups: [G] rows per row group, over all shards in the manifest's order.
        window_rows: length of the windows within which rows are shuffled.
    """
    counts = np.asarray(row_groups, np.int64)
    groups = _permutation(len(counts), (seed, epoch), stream=0)
    return RowOrder(groups, np.cumsum(counts[groups]), window_rows, key=(seed, epoch))


def file_order(row_groups: Sequence[int] | NDArray[np.int64], *, window_rows: int) -> RowOrder:
    """Order of the rows as stored."""
    counts = np.asarray(row_groups, np.int64)
    return RowOrder(np.arange(len(counts)), np.cumsum(counts), window_rows, key=None)


def _permutation(length: int, key: tuple[int, int], stream: int) -> NDArray[np.int64]:
    """Random permutation from the generator's raw words, which are stable between numpy versions, unlike `permutation`."""
    words = np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, 0, stream]).random_raw(length)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Window:
    """Steps that one task reads, all within one epoch and one shuffling window."""

    epoch: int
    first_step: int  # global step, counted from the start of the training
    stop_step: int


class PlanError(UserError, ValueError):
    """Batch sizes that do not fit the number of images or workers."""


@dataclass(frozen=True)
class BatchPlan:
    """Division of an epoch into steps and micro-batches; micro-batch m of a step belongs to worker m % world_size."""

    row_groups: NDArray[np.int64]  # [G] rows per row group
    global_batch_size: int  # images per step, over all workers
    micro_batch_size: int  # images per worker and forward pass
    seed: int | None  # None, for evaluation: stored order, and the incomplete last step is kept
    window_rows: int = DEFAULT_WINDOW_ROWS

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
        """Images of the shard set."""
        return int(self.row_groups.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        whole, remainder = divmod(self.num_rows, self.global_batch_size)
        return whole + (self.seed is None and remainder > 0)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step, over all workers."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def steps_per_window(self) -> int:
        """Whole steps per shuffling window."""
        return max(1, round(self.window_rows / self.global_batch_size))

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per step for each of `world_size` workers."""
        count, remainder = divmod(self.micro_batches, world_size)
        if remainder:
            raise PlanError(
                f"{world_size} workers cannot share the {self.micro_batches} micro-batches of a step evenly"
                f" (global_batch_size={self.global_batch_size}, micro_batch_size={self.micro_batch_size}): change one of"
                " these, or the number of workers"
            )
        return count

    def epoch_order(self, epoch: int) -> RowOrder:
        """Order of the rows in one epoch."""
        window_rows = self.steps_per_window * self.global_batch_size  # whole steps, so that no step needs two windows
        if self.seed is None:
            return file_order(self.row_groups, window_rows=window_rows)
        return shuffled_order(self.row_groups, seed=self.seed, epoch=epoch, window_rows=window_rows)

    def windows(self, start_step: int, stop_step: int) -> Iterator[Window]:
        """Split steps start to stop at the ends of windows and epochs."""
        step = start_step
        while step < stop_step:
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            window_end = step - step_of_epoch % self.steps_per_window + self.steps_per_window
            stop = min(window_end, (epoch + 1) * self.steps_per_epoch, stop_step)
            yield Window(epoch, step, stop)
            step = stop

    def rows(self, window: Window) -> Rows:
        """Rows [steps * global_batch_size] of a window; fewer where evaluation's last step is incomplete."""
        first_of_epoch = window.epoch * self.steps_per_epoch
        start = (window.first_step - first_of_epoch) * self.global_batch_size
        stop = (window.stop_step - first_of_epoch) * self.global_batch_size
        return self.epoch_order(window.epoch).rows(start, min(stop, self.num_rows))
