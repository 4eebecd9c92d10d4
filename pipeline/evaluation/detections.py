"""Detections of many images as columns."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.model.postprocess import Detections
from pipeline.data.shards.manifest import Category


@dataclass(frozen=True)
class DetectionTable:
    """D detections; those of one image are adjacent, best first."""

    image_id: NDArray[np.int64]  # [D]
    label: NDArray[np.int32]  # [D] 0..K-1
    score: NDArray[np.float32]  # [D] in [0, 1]
    box: NDArray[np.float32]  # [D, 4] xyxy, pixels of the original image

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Self:
        return type(self)(self.image_id[chosen], self.label[chosen], self.score[chosen], self.box[chosen])

    @classmethod
    def from_batch(cls, detections: Detections, image_id: Tensor, padding: Sequence[bool]) -> Self:
        """Convert the detections of a batch, from any device.

        Args:
            image_id: [B].
            padding: [B] True for batch entries without an image.

        Raises:
            ValueError: a score or a box is not a finite number.
        """
        real = torch.tensor([not empty for empty in padding])
        scores, boxes = detections.scores.cpu()[real], detections.boxes.cpu()[real]
        ids = image_id.cpu()[real]
        broken = ~(torch.isfinite(scores).all(1) & torch.isfinite(boxes).flatten(1).all(1))
        if broken.any():
            raise ValueError(
                f"image {int(ids[broken][0])}: its detections are not finite numbers; the weights have diverged,"
                " go back to an earlier checkpoint"
            )
        return cls(
            image_id=ids.repeat_interleave(scores.shape[1]).numpy(),
            label=detections.labels.cpu()[real].flatten().to(torch.int32).numpy(),
            score=scores.flatten().numpy(),
            box=boxes.reshape(-1, 4).numpy(),
        )


def concatenate(tables: Sequence[DetectionTable]) -> DetectionTable:
    """Concatenate the rows of all tables; without tables the result is empty."""
    return DetectionTable(
        image_id=np.concatenate([np.zeros(0, np.int64), *(table.image_id for table in tables)]),
        label=np.concatenate([np.zeros(0, np.int32), *(table.label for table in tables)]),
        score=np.concatenate([np.zeros(0, np.float32), *(table.score for table in tables)]),
        box=np.concatenate([np.zeros((0, 4), np.float32), *(table.box for table in tables)]),
    )


def to_coco_json(table: DetectionTable, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Convert to rows of a COCO result file, with the data set's own category ids."""
    original_id = [category.original_id for category in categories]
    boxes_xywh = np.concatenate([table.box[:, :2], table.box[:, 2:] - table.box[:, :2]], axis=1)
    columns = table.image_id.tolist(), table.label.tolist(), boxes_xywh.tolist(), table.score.tolist()
    return [
        {"image_id": image_id, "category_id": original_id[label], "bbox": box, "score": score}
        for image_id, label, box, score in zip(*columns, strict=True)
    ]


@contextmanager
def coco_json_writer(stream: IO[bytes], categories: Sequence[Category]) -> Iterator[Callable[[DetectionTable], None]]:
    """Write a COCO result file, table after table, by the function that the block receives."""
    separator = b""

    def write(table: DetectionTable) -> None:
        nonlocal separator
        rows = json.dumps(to_coco_json(table, categories))[1:-1].encode()
        if rows:
            stream.write(separator + rows)
            separator = b", "

    stream.write(b"[")
    yield write
    stream.write(b"]")
