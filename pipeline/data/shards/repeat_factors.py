"""Repeat factors: images with rare classes appear more often.

A class in a share f of the images has the factor max(1, sqrt(t / f)), with the threshold t. An image has the largest factor of
its classes.

Source: LVIS, arXiv:1908.03195.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.manifest import ManifestError, ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups

COLUMNS = ("labels", "crowd")
DRAWS = 1 << 32  # second word of the generator's counter: apart from those of the shuffles, which have 0
MOST_COPIES = 1000  # limit of an image's copies in a pass
START_BITS = 24  # bits of the random number that decides on copies; with fewer than 2^28 copies, sums of both are exact


@dataclass(frozen=True)
class RepeatFactors:
    """Factors of the classes."""

    threshold: float
    images: tuple[int, ...]  # [K] images with the class, over all sets, each counted once
    factors: tuple[float, ...]  # [K]


@dataclass(frozen=True)
class Copies:
    """Copies of every row in a pass: a whole number, and one more in the share of the epochs that its factor asks for.

    Which rows have one more is drawn by one number between 0 and 1 that an epoch adds to `more`: a row has it where the sum
    passes a whole number. The total of an epoch is then always the same.
    """

    least: NDArray[np.int64]  # [N]
    more: NDArray[np.float64]  # [N] cumulative sum of the shares; the last one is whole

    @classmethod
    def of_factors(cls, factors: NDArray[np.float64]) -> "Copies":
        """Copies by repeat factors of at least 1. Their fractions are lowered by less than one copy in all, to a whole sum."""
        least = np.floor(factors)
        more = np.cumsum(factors - least)
        whole, last = np.floor(more[-1]), more[-1]
        reached = more == last  # rows after the last fraction have its sum
        more = np.minimum(more * (whole / last if last else 0.0), whole)
        more[reached] = whole
        return cls(least.astype(np.int64), more)

    @property
    def total(self) -> int:
        """Copies of all rows in a pass."""
        return int(self.least.sum()) + int(self.more[-1])

    def of_epoch(self, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
        """Copies [N] of every row in the passes of an epoch.

        Args:
            number: of the set.
        """
        (word,) = np.random.Philox(
            key=np.array((seed, epoch), np.uint64), counter=[0, DRAWS + number, 1, 0]
        ).random_raw(1)
        start = (int(word) >> (64 - START_BITS)) / 2**START_BITS
        return self.least + np.diff(np.floor(self.more + start).astype(np.int64), prepend=0)


def repeat_factors(
    shard_sets: Sequence[ShardSet], weights: Sequence[float], threshold: float
) -> tuple[RepeatFactors, list[Copies | None]]:
    """Read the classes of all images, and compute the factors of classes and images.

    Crowd regions do not count: nothing is learned from them. An image of a set with weight w counts as w images.

    Args:
        threshold: share of the images.

    Raises:
        ManifestError: a class would be repeated more than `MOST_COPIES` times.

    Returns:
        The factors of the classes, and for each set the copies of its images; None where all factors are 1.
    """
    classes = len(shard_sets[0].categories)
    pairs = [_classes_of_images(shards) for shards in shard_sets]
    counts = [np.bincount(label, minlength=classes) for _, label in pairs]
    total = sum(weight * shards.manifest.images for weight, shards in zip(weights, shard_sets, strict=True))
    share = np.sum([weight * count for weight, count in zip(weights, counts, strict=True)], axis=0) / total  # [K]
    of_class = np.ones(classes)
    rare = (share > 0) & (share < threshold)
    of_class[rare] = np.sqrt(threshold / share[rare])
    if of_class.max(initial=1) > MOST_COPIES:
        raise ManifestError(
            f"data.repeat_factor_threshold ({threshold:g}): images with {shard_sets[0].categories[int(of_class.argmax())].name}"
            f" would be repeated {of_class.max():,.0f} times, and {MOST_COPIES:,} is the most: lower it"
        )

    of_images: list[Copies | None] = []
    for shards, (image, label) in zip(shard_sets, pairs, strict=True):
        factors = np.ones(shards.manifest.images)
        np.maximum.at(factors, image, of_class[label])
        of_images.append(Copies.of_factors(factors) if factors.max() > 1 else None)
    images = tuple(np.sum(counts, axis=0).tolist())
    return RepeatFactors(threshold, images, tuple(of_class.tolist())), of_images


def _classes_of_images(shards: ShardSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of an image, by its number in the set, and one of its classes, each once."""
    source = locate_row_groups(shards)
    first, image, label = 0, [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for table in read_row_groups(source, range(len(source.rows)), COLUMNS).values():
        counts = table["labels"].combine_chunks().value_lengths().to_numpy()
        own = np.repeat(np.arange(first, first + len(counts)), counts)
        learned = ~table["crowd"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        labels = table["labels"].combine_chunks().flatten().to_numpy()
        pairs = np.unique(np.stack([own[learned], labels[learned]]).astype(np.int64), axis=1)
        image.append(pairs[0])
        label.append(pairs[1])
        first += len(counts)
    return np.concatenate(image), np.concatenate(label)
