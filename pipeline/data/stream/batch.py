"""A micro-batch as tensors, built from its Arrow form without a copy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
import torch.utils.dlpack
from torch import Tensor

from pipeline.data.augment.blend import Blend, Paste


@dataclass(frozen=True)
class Replacement:
    """An image that could not be decoded: replaced by the next one of its micro-batch, or left black in a mosaic."""

    image_id: int
    reason: str  # goes on after "image 7 is "


@dataclass(frozen=True)
class Batch:
    """B images of one worker. Read only: the pixels may be in memory shared between processes."""

    step: int  # global step, over all epochs
    micro_batch: int  # index within the step, over all workers
    images: Tensor  # [B, 3, H, W] uint8, channels last in memory
    photometric: Tensor  # [B, P] float32, for `photometric_distort`
    blend: Blend  # for `blend_images`, once the colours are final; boxes and labels are those after it
    boxes: Tensor  # [T, 4] float32 cxcywh, normalised to the canvas, image after image
    labels: Tensor  # [T] int64
    counts: tuple[int, ...]  # [B] boxes per image, on the host: reading them needs no synchronisation
    image_id: Tensor  # [B] int64
    orig_size: Tensor  # [B, 2] int64 width, height before any resizing
    padding: tuple[bool, ...]  # [B] True for the padding of evaluation's last batches, which must not be counted
    replaced: tuple[Replacement, ...]
    # Boxes of a teacher, laid out as the true ones
    teacher_boxes: Tensor
    teacher_labels: Tensor
    teacher_scores: Tensor  # float32
    teacher_counts: tuple[int, ...]
    # Labels of unequal worth
    weights: Tensor | None = None  # [T] float32; None: all 1
    ignored_boxes: Tensor | None = None  # [I, 4] regions to ignore, laid out as the true boxes; None without any
    ignored_counts: tuple[int, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Move all tensors to a device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which `to(device, non_blocking=True)` is asynchronous."""
        return self._with_tensors(Tensor.pin_memory)

    def targets(self) -> list[dict[str, Tensor]]:
        """Targets [B] of {"labels": [G] int64, "boxes": [G, 4] cxcywh}, as views of the flat tensors.

        Where labels are of unequal worth, with {"weights": [G], "ignored": [I, 4] cxcywh} too.
        """
        targets = _targets(self.labels, self.boxes, self.counts)
        if self.weights is not None:
            for target, weights in zip(targets, self.weights.split(list(self.counts)), strict=True):
                target["weights"] = weights
        if self.ignored_boxes is not None:
            for target, ignored in zip(targets, self.ignored_boxes.split(list(self.ignored_counts)), strict=True):
                target["ignored"] = ignored
        return targets

    def teacher_targets(self) -> list[dict[str, Tensor]]:
        """Boxes of a teacher in the same form; their scores are `teacher_scores`, image after image."""
        return _targets(self.teacher_labels, self.teacher_boxes, self.teacher_counts)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def _targets(labels: Tensor, boxes: Tensor, counts: Sequence[int]) -> list[dict[str, Tensor]]:
    split = zip(torch.split(labels, list(counts)), torch.split(boxes, list(counts)), strict=True)
    return [{"labels": label, "boxes": box} for label, box in split]


def batches_from_arrow(decoded: pa.Table, canvas: tuple[int, int]) -> list[Batch]:
    """Slice a decoded block into its micro-batches; their tensors share the block's memory.

    Args:
        decoded: one row of `tasks.DECODED_SCHEMA`.
        canvas: height and width.
    """
    block = {name: _only_value(decoded, name) for name in decoded.column_names}
    real: list[int] = block["real"].to_pylist()
    if not real:
        return []
    height, width = canvas
    images = _tensor(block["images"]).view(len(real), -1, height, width, 3)
    size = images.shape[1]
    photometric = _tensor(block["photometric"]).view(len(real), size, -1)
    counts: list[int] = block["counts"].to_pylist()
    boxes, labels = _tensor(block["boxes"]).view(-1, 4), _tensor(block["labels"])
    teacher_counts: list[int] = block["teacher_counts"].to_pylist()
    teacher_boxes, teacher_labels = _tensor(block["teacher_boxes"]).view(-1, 4), _tensor(block["teacher_labels"])
    teacher_scores = _tensor(block["teacher_scores"])
    weights = _tensor(block["weights"])
    ignored_counts: list[int] = block["ignored_counts"].to_pylist()
    ignored_boxes = _tensor(block["ignored_boxes"]).view(-1, 4)
    ratios: list[float] = block["blend_ratio"].to_pylist()
    pastes = block["pastes"].to_numpy().reshape(-1, 1 + len(Paste._fields)).tolist()
    image_id, orig_size = _tensor(block["image_id"]), _tensor(block["orig_size"]).view(-1, 2)
    replaced = list(zip(*(block[f"replaced_{name}"].to_pylist() for name in ("in", "id", "why")), strict=True))

    batches, image, box, ignored, taught = [], 0, 0, 0, 0
    for k, here in enumerate(real):
        of_images = slice(image, image + here)
        boxes_here = sum(counts[of_images])
        of_boxes = slice(box, box + boxes_here)
        ignored_here = sum(ignored_counts[of_images])
        taught_here = sum(teacher_counts[of_images])
        of_teacher = slice(taught, taught + taught_here)
        batches.append(
            Batch(
                step=block["step"].as_py() + k,
                micro_batch=block["micro_batch"].as_py(),
                images=images[k].permute(0, 3, 1, 2),
                photometric=photometric[k],
                blend=Blend(ratios[k], tuple(Paste(*paste) for within, *paste in pastes if within == k)),
                boxes=boxes[of_boxes],
                labels=labels[of_boxes],
                counts=(*counts[of_images], *[0] * (size - here)),
                image_id=_padded(image_id[of_images], size, -1),
                orig_size=_padded(orig_size[of_images], size, 1),
                padding=(*[False] * here, *[True] * (size - here)),
                replaced=tuple(Replacement(lost, reason) for i, lost, reason in replaced if i == k),
                teacher_boxes=teacher_boxes[of_teacher],
                teacher_labels=teacher_labels[of_teacher],
                teacher_scores=teacher_scores[of_teacher],
                teacher_counts=(*teacher_counts[of_images], *[0] * (size - here)),
                weights=weights[of_boxes] if len(weights) else None,
                ignored_boxes=ignored_boxes[ignored : ignored + ignored_here] if ignored_here else None,
                ignored_counts=(*ignored_counts[of_images], *[0] * (size - here)),
            )
        )
        image, box, ignored, taught = image + here, box + boxes_here, ignored + ignored_here, taught + taught_here
    return batches


def _padded(values: Tensor, size: int, fill: int) -> Tensor:
    if len(values) == size:
        return values
    return torch.cat([values, values.new_full((size - len(values), *values.shape[1:]), fill)])


def _only_value(table: pa.Table, name: str) -> Any:
    """The value in a table of one row: a scalar, or for a list column the array of items."""
    column = table.column(name).chunk(0)  # not combine_chunks, which copies even one
    return column.flatten() if pa.types.is_list(column.type) else column[0]


def _tensor(values: pa.Array) -> Tensor:
    return torch.utils.dlpack.from_dlpack(values)
