"""Tiles of an image that is larger than a detector sees sharply: where they lie. No torch: data tasks import this module.

Tiles stand on a grid, row by row. The last tile of a row or a column is moved inward, so that all are equally large; an image
that is smaller than a tile, along one axis or both, is taken as it is along that axis.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

if TYPE_CHECKING:  # commands read the limits, and need no image
    from dfine_core.images import OpenedImage

SMALLEST_TILE, LARGEST_OVERLAP = 64, 0.75  # px and share; with these an image has at most some hundred thousand tiles
DEFAULT_OVERLAP = 0.2

T = TypeVar("T")


class Tile(NamedTuple):
    """Part of an image in whole pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top

    def inner(self, size: tuple[int, int]) -> tuple[bool, bool, bool, bool]:
        """Whether the image goes on beyond each border: left, top, right, bottom.

        Args:
            size: width and height of the image.
        """
        return self.left > 0, self.top > 0, self.right < size[0], self.bottom < size[1]

    def cut(self, image: "OpenedImage") -> "OpenedImage":
        """Pixels of the tile; the image itself where the tile covers it."""
        return image if self.size == image.size else image.crop(self)


@dataclass(frozen=True)
class Tiling:
    """Side of the tiles in pixels, and the share of it by which neighbours overlap.

    Raises:
        ValueError: one of them is out of range.
    """

    side: int
    overlap: float = DEFAULT_OVERLAP

    def __post_init__(self) -> None:
        if self.side < SMALLEST_TILE:
            raise ValueError(f"tile ({self.side}) must be at least {SMALLEST_TILE} pixels")
        if not 0 <= self.overlap <= LARGEST_OVERLAP:
            raise ValueError(
                f"overlap ({self.overlap:g}) must lie in 0..{LARGEST_OVERLAP:g}: it is a share of the tile"
            )

    @classmethod
    def given(cls, side: int | None, overlap: float | None) -> Self | None:
        """Tiles as a caller asks for them: None without a side, which an overlap alone cannot replace.

        Raises:
            ValueError: an overlap without a side, or a value out of range.
        """
        if side is None:
            if overlap is not None:
                raise ValueError(f"overlap ({overlap:g}) needs the side of the tiles: give tile, such as 640")
            return None
        return cls(side, DEFAULT_OVERLAP if overlap is None else overlap)

    def tiles(self, size: tuple[int, int]) -> list[Tile]:
        """Tiles of an image of this width and height, row by row."""
        width, height = size
        return [
            Tile(left, top, min(left + self.side, width), min(top + self.side, height))
            for top in self._starts(height)
            for left in self._starts(width)
        ]

    def _starts(self, length: int) -> list[int]:
        if length <= self.side:
            return [0]
        stride = self.side - round(self.overlap * self.side)
        last = length - self.side
        return [min(number * stride, last) for number in range(ceil(last / stride) + 1)]


def tiles_of(size: tuple[int, int], tiling: Tiling | None) -> list[Tile]:
    """Tiles of an image; the whole image without a tiling."""
    return [Tile(0, 0, *size)] if tiling is None else tiling.tiles(size)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, and a shorter one at the end."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
