"""The images that a training learns from: one shard set, or several with weights and their classes joined by name."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.data.shards.classes import joined_classes
from pipeline.data.shards.manifest import Category, ManifestError, ShardSet, Statistics
from pipeline.data.shards.reader import RowGroups, joined_row_groups, locate_row_groups, refuse_changed_files
from pipeline.data.shards.repeat_factors import Copies, RepeatFactors, repeat_factors
from pipeline.data.shards.set_statistics import add_up


@dataclass(frozen=True)
class WeightedSet:
    """One shard set of a training."""

    shards: ShardSet  # its labels are mapped to those of the training
    weight: float = 1.0  # how often each image appears in an epoch, on average
    renamed: tuple[tuple[str, str], ...] = ()  # (name in the set, name in the training)
    copies: Copies | None = None  # by repeat factors; None: one of each image

    @property
    def images(self) -> int:
        """Images of the set, each counted once."""
        return self.shards.manifest.images

    @cached_property
    def images_in_pass(self) -> int:
        """Images with their repetitions by repeat factors."""
        return self.images if self.copies is None else self.copies.total

    @property
    def images_in_epoch(self) -> int:
        """Images that every epoch has of this set, with repetitions."""
        return int(self.weight * self.images_in_pass + 0.5)

    @property
    def statistics(self) -> Statistics:
        """Statistics of the set, with its boxes counted by class of the training."""
        given, labels = self.shards.manifest.statistics, self.shards.mapped_labels
        if labels is None:
            return given
        counts = np.zeros(len(self.shards.categories), np.int64)
        np.add.at(counts, np.array(labels, np.int64), given.class_counts)
        return given.model_copy(update={"class_counts": tuple(counts.tolist())})


@dataclass(frozen=True)
class TrainingSet:
    """One or several shard sets."""

    sets: tuple[WeightedSet, ...]
    repeats: RepeatFactors | None = None  # None: no class is repeated

    @classmethod
    def alone(cls, shards: ShardSet) -> "TrainingSet":
        """One set, every image of which an epoch has once."""
        return cls((WeightedSet(shards),))

    @property
    def categories(self) -> tuple[Category, ...]:
        """Classes that the training learns, by label."""
        return self.sets[0].shards.categories

    @property
    def names(self) -> list[str]:
        """Names of the classes, by label."""
        return [category.name for category in self.categories]

    @property
    def images(self) -> int:
        """Images of all sets, each counted once."""
        return sum(each.images for each in self.sets)

    @property
    def boxes(self) -> int:
        """Boxes of these images, crowd regions included."""
        return sum(each.shards.manifest.boxes for each in self.sets)

    @property
    def images_in_epoch(self) -> int:
        """Images of every epoch, with repetitions."""
        return sum(each.images_in_epoch for each in self.sets)

    @cached_property
    def statistics(self) -> Statistics:
        """Statistics over all images, each counted once."""
        return add_up([each.statistics for each in self.sets])

    @property
    def is_plain(self) -> bool:
        """Whether this is one shard set as it is."""
        (first, *others) = self.sets
        return not others and first.weight == 1 and not first.renamed and first.copies is None

    @property
    def weighted(self) -> bool:
        """Whether labels of any set are of unequal worth."""
        return any(each.shards.manifest.weighted for each in self.sets)

    @property
    def title(self) -> str:
        """The place of the only set, or `data.train`."""
        return self.sets[0].shards.uri if len(self.sets) == 1 else "data.train"

    @cached_property
    def digests(self) -> dict[str, str]:
        """Identity of the data: `train`; and where that is more than one manifest's digest, `data.train.1` and so on."""
        if len(self.sets) == 1 and self.sets[0].weight == 1 and not self.sets[0].renamed:
            return {"train": self.sets[0].shards.manifest.digest}
        content = [[each.shards.manifest.digest, each.weight, sorted(each.renamed)] for each in self.sets]
        joined = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
        return {"train": joined} | {
            f"{SET_DIGEST}{number}": each.shards.manifest.digest for number, each in enumerate(self.sets, start=1)
        }

    def row_groups(self) -> RowGroups:
        """Location of all row groups, set after set."""
        shares = [each.images_in_epoch / self.images_in_epoch for each in self.sets]
        return joined_row_groups([locate_row_groups(each.shards) for each in self.sets], shares)


SET_DIGEST = "data.train."  # first characters of the keys of single sets among the digests of a run


def trains_on(digests: Mapping[str, object], shard_set: str) -> bool:
    """Whether a run with these digests has learned from the shard set with the digest `shard_set`."""
    return any(digest == shard_set for use, digest in digests.items() if use == "train" or use.startswith(SET_DIGEST))


def join_sets(
    shard_sets: Sequence[ShardSet],
    weights: Sequence[float],
    renames: Sequence[Mapping[str, str]],
    repeat_threshold: float | None = None,
) -> TrainingSet:
    """Join shard sets to the data of a training.

    Args:
        weights: of each set.
        renames: of each set, names of its classes and those that they get.
        repeat_threshold: share of images below which a class is repeated; None: none is.

    Raises:
        ManifestError: classes cannot be joined, a weight leaves nothing, or an image would be repeated without end; names every
            problem.
        ShardError: files have changed, where repeat factors need them.
    """
    mapped = joined_classes(shard_sets, renames)
    sets = tuple(
        WeightedSet(shards, weight, tuple(renamed.items()))
        for shards, weight, renamed in zip(mapped, weights, renames, strict=True)
    )
    nothing = [each for each in sets if not each.images_in_epoch]
    if nothing:
        lines = [
            f"{each.shards.uri}: weight {each.weight:g} of its {each.images} images is no image in an epoch: give at least"
            f" {1 / max(1, each.images):.2g}, or leave the set out"
            for each in nothing
        ]
        raise ManifestError("; ".join(lines))
    if repeat_threshold is None:
        return TrainingSet(sets)
    for each in sets:
        refuse_changed_files(each.shards)  # they are read now
    repeats, copies = repeat_factors([each.shards for each in sets], weights, repeat_threshold)
    repeated = tuple(replace(each, copies=own) for each, own in zip(sets, copies, strict=True))
    return TrainingSet(repeated, repeats)
