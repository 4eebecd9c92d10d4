"""Statistics over the rows of shards, which can be added up over parts."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.shards.manifest import BoxesPerImage, BoxSizes, CrowdedImage, PixelRange, Statistics

MEDIUM_PX2, LARGE_PX2 = 32**2, 96**2  # lower limits of COCO's medium and large boxes


def count_rows(rows: pa.Table, num_classes: int) -> Statistics:
    """Compute statistics of at least one row of `SHARD_SCHEMA`; the image column is not needed."""
    boxes_of_image = pc.list_value_length(rows["labels"]).to_numpy()  # [I]
    labels, areas, crowd = (pc.list_flatten(rows[name]).to_numpy() for name in ("labels", "areas", "crowd"))
    image = np.repeat(np.arange(rows.num_rows), boxes_of_image)  # [G] image of each box
    counts = np.bincount(image[~crowd], minlength=rows.num_rows)  # [I]
    sizes = np.bincount(np.digitize(areas[~crowd], (MEDIUM_PX2, LARGE_PX2)), minlength=3).tolist()
    fullest = int(counts.argmax())
    widths, heights = rows["width"].to_numpy(), rows["height"].to_numpy()
    return Statistics(
        boxes_per_image=_per_image(np.bincount(counts)),
        box_sizes=BoxSizes(small=sizes[0], medium=sizes[1], large=sizes[2]),
        class_counts=tuple(np.bincount(labels[~crowd], minlength=num_classes).tolist()),
        images_without_boxes=int((counts == 0).sum()),
        crowd_boxes=int(crowd.sum()),
        width=PixelRange(min=int(widths.min()), max=int(widths.max())),
        height=PixelRange(min=int(heights.min()), max=int(heights.max())),
        most_crowded=CrowdedImage(
            image_id=rows["image_id"][fullest].as_py(),
            file_name=rows["file_name"][fullest].as_py(),
            boxes=int(counts[fullest]),
        ),
    )


def add_up(parts: Sequence[Statistics]) -> Statistics:
    """Add up the statistics of at least one part."""
    longest = max(len(part.boxes_per_image.histogram) for part in parts)
    histogram = np.zeros(longest, np.int64)
    for part in parts:
        histogram[: len(part.boxes_per_image.histogram)] += part.boxes_per_image.histogram
    return Statistics(
        boxes_per_image=_per_image(histogram),
        box_sizes=BoxSizes(
            small=sum(part.box_sizes.small for part in parts),
            medium=sum(part.box_sizes.medium for part in parts),
            large=sum(part.box_sizes.large for part in parts),
        ),
        class_counts=tuple(sum(counts) for counts in zip(*(part.class_counts for part in parts), strict=True)),
        images_without_boxes=sum(part.images_without_boxes for part in parts),
        crowd_boxes=sum(part.crowd_boxes for part in parts),
        width=_enclosing([part.width for part in parts]),
        height=_enclosing([part.height for part in parts]),
        most_crowded=max((part.most_crowded for part in parts), key=lambda image: image.boxes),
    )


def _per_image(histogram: np.ndarray) -> BoxesPerImage:
    boxes = int(histogram @ np.arange(len(histogram)))
    return BoxesPerImage(mean=boxes / int(histogram.sum()), max=len(histogram) - 1, histogram=tuple(histogram.tolist()))


def _enclosing(ranges: Sequence[PixelRange]) -> PixelRange:
    return PixelRange(min=min(part.min for part in ranges), max=max(part.max for part in ranges))
