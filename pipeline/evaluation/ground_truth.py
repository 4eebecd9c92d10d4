"""Ground truth of a shard set, read without the images."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.manifest import Category, ShardSet
from pipeline.data.shards.reader import read_annotations

LARGEST_AREA = 1e10  # px^2; COCO ignores boxes whose area is not between 0 and this


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

    @property
    def ignored(self) -> NDArray[np.bool_]:
        """[T] boxes that no metric counts: crowd regions, and those of an area that COCO does not know."""
        return self.crowd | (self.area < 0) | (self.area > LARGEST_AREA)

    @property
    def counted_boxes_of_class(self) -> NDArray[np.int64]:
        """[K] number of true boxes per class that metrics count."""
        return np.bincount(self.label[~self.ignored], minlength=len(self.categories))

    @cached_property
    def ordered_ids(self) -> NDArray[np.int64]:
        """[I] image ids, sorted. Metrics know an image by its index here, which decides between equal scores."""
        return np.sort(self.image_id)

    def indices_of(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of image ids in `ordered_ids`.

        Raises:
            ValueError: an image is not in the ground truth.
        """
        ordered = self.ordered_ids
        indices = np.searchsorted(ordered, image_ids)
        known = (
            np.take(ordered, indices, mode="clip") == image_ids if len(ordered) else np.zeros(len(indices), np.bool_)
        )
        if not known.all():
            raise ValueError(
                f"image {image_ids[~known][0]} is not among the images of the ground truth: does it belong to another shard set?"
            )
        return indices

    def of_images(self, image_ids: NDArray[np.int64]) -> Self:
        """Ground truth limited to the given images."""
        kept = np.isin(self.image_id, image_ids)
        boxes = kept[self.image]
        return replace(
            self,
            image_id=self.image_id[kept],
            width=self.width[kept],
            height=self.height[kept],
            file_name=tuple(name for name, keep in zip(self.file_name, kept, strict=True) if keep),
            image=(np.cumsum(kept) - 1)[self.image[boxes]],
            **{name: getattr(self, name)[boxes] for name in ("box", "label", "area", "crowd")},
        )

    def of_classes(self, first: int, stop: int) -> Self:
        """All images with the boxes of the classes from `first` to before `stop`; labels stay."""
        boxes = (self.label >= first) & (self.label < stop)
        return replace(
            self, **{name: getattr(self, name)[boxes] for name in ("image", "box", "label", "area", "crowd")}
        )


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
        categories=shards.categories,
    )
