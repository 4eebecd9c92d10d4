"""Ground truth of a shard set, read without the images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.manifest import Category, ShardSet
from pipeline.data.shards.reader import read_annotations


@dataclass(frozen=True)
class GroundTruth:
    """I images and T boxes as columns, in the order of the shards; with crowd regions and images without boxes."""

    image_id: NDArray[np.int64]  # [I]
    width: NDArray[np.int32]  # [I] px
    height: NDArray[np.int32]  # [I] px
    file_name: tuple[str, ...]  # [I]
    image: NDArray[np.int64]  # [T] index of the image of each box, ascending
    box: NDArray[np.float32]  # [T, 4] xyxy in pixels of the original image, as annotated
    label: NDArray[np.int32]  # [T]
    area: NDArray[np.float32]  # [T] px^2 as annotated: area of the mask where there is one
    crowd: NDArray[np.bool_]  # [T] regions in which detections are neither right nor wrong
    categories: tuple[Category, ...]  # by label

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by label."""
        return tuple(category.name for category in self.categories)

    @property
    def boxes_of_class(self) -> NDArray[np.int64]:
        """[K] number of true boxes per class, without crowd regions."""
        return np.bincount(self.label[~self.crowd], minlength=len(self.categories))


def read_ground_truth(shards: ShardSet) -> GroundTruth:
    """Read the annotations of a shard set.

    Raises:
        ValueError: a shard is not the one that the manifest describes.
    """
    table = read_annotations(shards)

    def flat(name: str, dtype: type[np.generic]) -> NDArray[Any]:
        return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)

    counts = table.column("labels").combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    return GroundTruth(
        image_id=table.column("image_id").to_numpy(),
        width=table.column("width").to_numpy(),
        height=table.column("height").to_numpy(),
        file_name=tuple(table.column("file_name").to_pylist()),
        image=np.repeat(np.arange(len(counts)), counts),
        box=flat("boxes", np.float32).reshape(-1, 4),
        label=flat("labels", np.int32),
        area=flat("areas", np.float32),
        crowd=flat("crowd", np.bool_),
        categories=shards.manifest.categories,
    )
