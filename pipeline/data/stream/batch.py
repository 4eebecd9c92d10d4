"""A micro-batch as tensors, built from its Arrow form without a copy."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
import torch.utils.dlpack
from torch import Tensor


@dataclass(frozen=True)
class Replacement:
    """An image that could not be decoded and was replaced by the next one of its micro-batch."""

    image_id: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """B images of one worker. Read only: the pixels may be in memory shared between processes."""

    step: int  # global step, over all epochs
    micro_batch: int  # index within the step, over all workers
    images: Tensor  # [B, 3, H, W] uint8, channels last in memory
    photometric: Tensor  # [B, P] float32, for `photometric_distort`
    boxes: Tensor  # [T, 4] float32 cxcywh, normalised to the canvas, image after image
    labels: Tensor  # [T] int64
    counts: tuple[int, ...]  # [B] boxes per image, on the host: reading them needs no synchronisation
    image_id: Tensor  # [B] int64
    orig_size: Tensor  # [B, 2] int64 width, height before any resizing
    padding: tuple[bool, ...]  # [B] True for the padding of evaluation's last batches, which must not be counted
    replaced: tuple[Replacement, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Move all tensors to a device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which `to(device, non_blocking=True)` is asynchronous."""
        return self._with_tensors(Tensor.pin_memory)

    def targets(self) -> list[dict[str, Tensor]]:
        """Targets [B] of {"labels": [G] int64, "boxes": [G, 4] cxcywh}, as views of the flat tensors."""
        counts = list(self.counts)
        labels, boxes = torch.split(self.labels, counts), torch.split(self.boxes, counts)
        return [{"labels": label, "boxes": box} for label, box in zip(labels, boxes, strict=True)]

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def batch_from_arrow(decoded: pa.Table, canvas: tuple[int, int]) -> Batch:
    """Convert one row of `tasks.DECODED_SCHEMA` to tensors that share its memory."""
    height, width = canvas
    row = {name: _only_value(decoded, name) for name in decoded.column_names}
    images = _tensor(row["images"]).view(-1, height, width, 3)
    real, size = len(row["image_id"]), len(images)

    def padded(values: pa.Array, shape: tuple[int, ...], fill: int) -> Tensor:
        tensor = _tensor(values).view(real, *shape)
        if real == size:
            return tensor
        return torch.cat([tensor, tensor.new_full((size - real, *shape), fill)])

    return Batch(
        step=row["step"].as_py(),
        micro_batch=row["micro_batch"].as_py(),
        images=images.permute(0, 3, 1, 2),
        photometric=_tensor(row["photometric"]).view(size, -1),
        boxes=_tensor(row["boxes"]).view(-1, 4),
        labels=_tensor(row["labels"]),
        counts=(*row["counts"].to_pylist(), *[0] * (size - real)),
        image_id=padded(row["image_id"], (), -1),
        orig_size=padded(row["orig_size"], (2,), 1),
        padding=(*[False] * real, *[True] * (size - real)),
        replaced=tuple(
            Replacement(image_id, reason)
            for image_id, reason in zip(row["replaced_id"].to_pylist(), row["replaced_why"].to_pylist(), strict=True)
        ),
    )


def _only_value(table: pa.Table, name: str) -> Any:
    """The value in a table of one row: a scalar, or for a list column the array of items."""
    column = table.column(name).chunk(0)  # not combine_chunks, which copies even one
    return column.flatten() if pa.types.is_list(column.type) else column[0]


def _tensor(values: pa.Array) -> Tensor:
    return torch.utils.dlpack.from_dlpack(values)
