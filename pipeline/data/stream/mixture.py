"""Rows that an epoch shows of several shard sets, by their weights and the repeat factors of their images.

A set of weight w is shown in w passes: whole ones, and a rest that is a share of a pass. The rests of consecutive epochs follow
each other around the set, so that after any number of epochs an image of the set has been in as many passes as any other, or in
one more. Passes go through whole row groups, so reading stays sequential, and the copies of an image lie apart. Within a pass an
image with a repeat factor has as many copies, side by side: they share a window.

Every number is a function of (manifests, weights, factors, seed, epoch), and all epochs are equally long.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.reader import Rows
from pipeline.data.shards.repeat_factors import DRAWS, Copies

# Bits of the number of a showing: of the set, the pass, and the copy within the pass.
PASS_BITS, COPY_BITS = 10, 14


@dataclass(frozen=True)
class SetRows:
    """Rows of one set and how often an epoch shows them."""

    row_groups: NDArray[np.int64]  # [G] rows per row group
    shown: int  # rows of an epoch
    copies: Copies | None = None  # in a pass; None: one of each row

    @property
    def pass_rows(self) -> int:
        """Rows of one pass; the same in every epoch."""
        return int(self.row_groups.sum()) if self.copies is None else self.copies.total


@dataclass(frozen=True)
class Stretches:
    """Stretches of rows, each within one row group, that are laid end to end."""

    group: NDArray[np.int64]  # [P]
    skipped: NDArray[np.int64]  # [P] copies of the group's rows before the stretch
    length: NDArray[np.int64]  # [P] copies
    showing: NDArray[np.int64]  # [P] number of the set and the pass
    # With several copies of rows, the number of copies before each row and after the last, and each group's first row.
    starts: NDArray[np.int64] | None = None  # [N + 1]
    first_rows: NDArray[np.int64] | None = None  # [G]

    def ordered(self, order: NDArray[np.int64]) -> "Stretches":
        """The same stretches in another order."""
        group, skipped, length, showing = (
            part[order] for part in (self.group, self.skipped, self.length, self.showing)
        )
        return replace(self, group=group, skipped=skipped, length=length, showing=showing)

    def rows(self, stretch: NDArray[np.int64], offset: NDArray[np.int64]) -> Rows:
        """Rows [n] by the numbers of their stretches, and their positions within these."""
        group, position, showing = self.group[stretch], self.skipped[stretch] + offset, self.showing[stretch]
        if self.starts is None or self.first_rows is None:
            return Rows(group, position, showing)
        first = self.first_rows[group]
        copy = self.starts[first] + position
        row = np.searchsorted(self.starts, copy, side="right") - 1
        return Rows(group, row - first, showing + copy - self.starts[row])

    def all_rows(self) -> Rows:
        """Rows of all stretches."""
        starts = np.cumsum(self.length) - self.length
        stretch = np.repeat(np.arange(len(self.length)), self.length)
        return self.rows(stretch, np.arange(len(stretch)) - starts[stretch])


@dataclass(frozen=True)
class Mixture:
    """Rows of several sets, and how often each is shown in an epoch.

    A showing has a number, 0 for those of the first set's first pass. It tells the copies of an image and the images of several
    sets apart where their augmentation is drawn.
    """

    sets: tuple[SetRows, ...]

    @property
    def rows_per_epoch(self) -> int:
        """Rows that every epoch shows, with repetitions."""
        return sum(each.shown for each in self.sets)

    def stretches(self, seed: int, epoch: int) -> Stretches:
        """Stretches of an epoch: set after set, pass after pass, in the order of the files."""
        parts: list[NDArray[np.int64]] = []  # [4, p] each
        row_groups = np.concatenate([each.row_groups for each in self.sets])
        copies = self._copies(seed, epoch)
        starts = None if copies is None else np.concatenate([[0], np.cumsum(copies)])
        first_rows = np.cumsum(row_groups) - row_groups
        lengths = row_groups if starts is None else starts[first_rows + row_groups] - starts[first_rows]
        first = 0
        for number, each in enumerate(self.sets):
            groups = np.arange(first, first + len(each.row_groups))
            passes, rest = divmod(each.shown, each.pass_rows)
            parts += [_numbered(groups, 0 * groups, lengths[groups], number, index) for index in range(passes)]
            if rest:
                order = groups[permutation(len(groups), (seed, 0), (DRAWS + number, 0, 0))]
                taken = _taken(order, lengths[order], epoch * rest % each.pass_rows, rest)
                parts.append(_numbered(*taken, number, passes))
            first += len(groups)
        group, skipped, length, showing = np.concatenate(parts, axis=1)
        return Stretches(group, skipped, length, showing, starts, None if starts is None else first_rows)

    def _copies(self, seed: int, epoch: int) -> NDArray[np.int64] | None:
        """Copies of each row in the passes of an epoch; None: one of each."""
        if all(each.copies is None for each in self.sets):
            return None
        return np.concatenate(
            [
                np.ones(each.pass_rows, np.int64) if each.copies is None else each.copies.of_epoch(seed, epoch, number)
                for number, each in enumerate(self.sets)
            ]
        )


def permutation(length: int, key: tuple[int, int], counter: tuple[int, int, int]) -> NDArray[np.int64]:
    """Permutation from the generator's raw words, which are stable between versions of numpy, unlike `permutation`."""
    words = np.random.Philox(key=np.array(key, np.uint64), counter=[0, *counter]).random_raw(length)
    return np.argsort(words, kind="stable")


def _numbered(
    group: NDArray[np.int64], skipped: NDArray[np.int64], length: NDArray[np.int64], number: int, index: int
) -> NDArray[np.int64]:
    """[4, p] stretches of pass `index` over set `number`."""
    showing = np.full(len(group), (number << (PASS_BITS + COPY_BITS)) | (index << COPY_BITS))
    return np.stack([group, skipped, length, showing])


def _taken(
    groups: NDArray[np.int64], lengths: NDArray[np.int64], start: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Groups, skipped copies and lengths of `count` copies from `start` on, around groups that are laid end to end."""
    ends = np.cumsum(lengths)
    begins, total = ends - lengths, int(ends[-1])
    found = []
    for low, high in ((start, min(start + count, total)), (0, start + count - total)):
        first, last = np.maximum(begins, low), np.minimum(ends, high)
        kept = last > first
        found.append((groups[kept], (first - begins)[kept], (last - first)[kept]))
    group, skipped, length = (np.concatenate(column) for column in zip(*found, strict=True))
    return group, skipped, length
