"""Detections of many images as columns, gathered from all workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.model.postprocess import Detections
from pipeline.data.shards.manifest import Category

ROW = np.dtype(
    [("image_id", "<i8"), ("label", "<i4"), ("score", "<f4"), ("box", "<f4", (4,))]
)  # format between workers


@dataclass(frozen=True)
class DetectionTable:
    """D detections; those of one image are adjacent, best first."""

    image_id: NDArray[np.int64]  # [D]
    label: NDArray[np.int32]  # [D] 0..K-1
    score: NDArray[np.float32]  # [D] in [0, 1]
    box: NDArray[np.float32]  # [D, 4] xyxy, pixels of the original image

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Self:
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
    rows = [np.zeros(0, ROW), *(_packed(table) for table in tables)]
    return _unpacked(np.concatenate(rows))


def gather(table: DetectionTable, rank: int, world_size: int) -> DetectionTable | None:
    """Gather the tables of all workers on rank 0; None on the others. Collective, over the default process group."""
    if world_size == 1:
        return table
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    counts = torch.zeros(world_size, dtype=torch.int64, device=device)
    counts[rank] = len(table)
    dist.all_reduce(counts)
    rows = torch.zeros((int(counts.max()), ROW.itemsize), dtype=torch.uint8)  # the same number from every worker
    rows[: len(table)] = torch.from_numpy(_packed(table).view(np.uint8).reshape(-1, ROW.itemsize))
    rows = rows.to(device)
    parts = [torch.empty_like(rows) for _ in range(world_size)] if rank == 0 else None
    dist.gather(rows, parts, dst=0)
    if parts is None:
        return None
    filled = [part[:count].cpu().numpy() for part, count in zip(parts, counts.tolist(), strict=True)]
    return _unpacked(np.concatenate(filled).reshape(-1).view(ROW))


def to_coco_json(table: DetectionTable, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Convert to rows of a COCO result file, with the data set's own category ids."""
    original_id = [category.original_id for category in categories]
    boxes_xywh = np.concatenate([table.box[:, :2], table.box[:, 2:] - table.box[:, :2]], axis=1)
    columns = table.image_id.tolist(), table.label.tolist(), boxes_xywh.tolist(), table.score.tolist()
    return [
        {"image_id": image_id, "category_id": original_id[label], "bbox": box, "score": score}
        for image_id, label, box, score in zip(*columns, strict=True)
    ]


def _packed(table: DetectionTable) -> NDArray[np.void]:
    rows = np.empty(len(table), ROW)
    for name in ROW.names or ():
        rows[name] = getattr(table, name)
    return rows


def _unpacked(rows: NDArray[np.void]) -> DetectionTable:
    return DetectionTable(**{name: np.ascontiguousarray(rows[name]) for name in ROW.names or ()})
