"""Plain data that travels through the detector: tensors under names.

Letters: B images, Q queries, C classes, L decoder layers, N = reg_max + 1 bins, G boxes of one image, T boxes of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy


@dataclass(frozen=True)
class Targets:
    """Ground-truth boxes of a batch, laid end to end in image order."""

    labels: Tensor  # [T] int64
    boxes: Tensor  # [T, 4] float32 cxcywh, normalised to the image
    image: Tensor  # [T] int64, index of the image that a box belongs to
    counts: tuple[int, ...]  # boxes per image, known without reading from the device
    # Where labels are of unequal worth, as those that another detector has found; None otherwise
    weights: Tensor | None = None  # [T] float32, how much a box counts
    ignored: Tensor | None = None  # [I, 4] cxcywh regions that teach neither object nor background
    ignored_image: Tensor | None = None  # [I] int64

    @classmethod
    def pack(
        cls, targets: "Sequence[Mapping[str, Tensor]] | Targets", num_classes: int, device: torch.device
    ) -> "Targets":
        """Pack one {"labels": (G,), "boxes": (G, 4)} per image; "weights" (G,) and "ignored" (I, 4) are optional.

        Values are checked while they lie on the CPU; targets that already lie on an accelerator are taken as they are, since
        a check would stall it.

        Raises:
            ValueError: naming every image whose labels or boxes cannot be trained on.
        """
        if isinstance(targets, Targets):
            return targets
        problems = [p for i, target in enumerate(targets) for p in _problems(i, target, num_classes)]
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise ValueError("targets cannot be trained on: " + "; ".join(problems[:5]) + more)
        counts = tuple(len(target["labels"]) for target in targets)
        labels = torch.cat([target["labels"] for target in targets]) if targets else torch.zeros(0)
        boxes = torch.cat([target["boxes"].reshape(-1, 4) for target in targets]) if targets else torch.zeros(0, 4)
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        return cls(
            labels=labels.to(device, torch.int64, non_blocking=True),
            boxes=boxes.to(device, torch.float32, non_blocking=True),
            image=image.to(device, non_blocking=True),
            counts=counts,
            **_worth(targets, device),
        )

    @property
    def boxes_xyxy(self) -> Tensor:
        """Boxes as corners, [T, 4]."""
        return cxcywh_to_xyxy(self.boxes)

    @property
    def total(self) -> int:
        """Number of boxes in the batch, T."""
        return sum(self.counts)


def _worth(targets: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Weights and regions to ignore, if some target has them."""
    packed: dict[str, Tensor] = {}
    if any("weights" in target for target in targets):
        weights = [target.get("weights", torch.ones(len(target["labels"]))) for target in targets]
        packed["weights"] = torch.cat(weights).to(device, torch.float32, non_blocking=True)
    ignored = [target.get("ignored", torch.zeros(0, 4)) for target in targets]
    counts = torch.tensor([len(regions) for regions in ignored], dtype=torch.int64)
    if counts.any():
        packed["ignored"] = torch.cat(ignored).to(device, torch.float32, non_blocking=True)
        packed["ignored_image"] = torch.arange(len(ignored)).repeat_interleave(counts).to(device, non_blocking=True)
    return packed


def _problems(image: int, target: Mapping[str, Tensor], num_classes: int) -> list[str]:
    labels, boxes = target["labels"], target["boxes"]
    if boxes.numel() != 4 * labels.numel():
        return [f"image {image} has {labels.numel()} labels but boxes of shape {tuple(boxes.shape)}"]
    if "weights" in target and len(target["weights"]) != len(labels):
        return [f"image {image} has {len(labels)} labels but {len(target['weights'])} weights"]
    if labels.device.type != "cpu" or boxes.device.type != "cpu" or labels.numel() == 0:
        return []
    problems = []
    if labels.min() < 0 or labels.max() >= num_classes:
        bad = labels[(labels < 0) | (labels >= num_classes)][0].item()
        problems.append(
            f"image {image} has label {bad}, outside 0..{num_classes - 1}: give contiguous labels or raise num_classes"
        )
    if not torch.isfinite(boxes).all():
        row = int((~torch.isfinite(boxes)).reshape(-1, 4).any(-1).nonzero()[0])
        problems.append(
            f"image {image} has box {row} = {boxes.reshape(-1, 4)[row].tolist()}, which is not finite: drop it"
        )
    return problems


@dataclass(frozen=True)
class QueryPredictions:
    """Predictions of every decoder layer for one set of queries (the matching ones, or the denoising ones)."""

    logits: Tensor  # [L, B, Q, C]
    boxes: Tensor  # [L, B, Q, 4] cxcywh
    edge_logits: Tensor | None  # [L, B, Q, 4, N]; None with direct regression
    initial_logits: Tensor  # [B, Q, C] scores of the initial box, before any distribution
    initial_boxes: Tensor  # [B, Q, 4], with its gradient; the layers moved its detached value

    def split(self, first: int) -> "tuple[QueryPredictions, QueryPredictions]":
        """Split into the first `first` queries and the rest."""
        edges = self.edge_logits
        parts = [
            QueryPredictions(
                logits=self.logits[:, :, part],
                boxes=self.boxes[:, :, part],
                edge_logits=None if edges is None else edges[:, :, part],
                initial_logits=self.initial_logits[:, part],
                initial_boxes=self.initial_boxes[:, part],
            )
            for part in (slice(None, first), slice(first, None))
        ]
        return parts[0], parts[1]

    def followed_by(self, other: "QueryPredictions") -> "QueryPredictions":
        """Put other queries after these."""
        edges = [p.edge_logits for p in (self, other) if p.edge_logits is not None]
        return QueryPredictions(
            logits=torch.cat([self.logits, other.logits], dim=2),
            boxes=torch.cat([self.boxes, other.boxes], dim=2),
            edge_logits=torch.cat(edges, dim=2) if edges else None,
            initial_logits=torch.cat([self.initial_logits, other.initial_logits], dim=1),
            initial_boxes=torch.cat([self.initial_boxes, other.initial_boxes], dim=1),
        )


@dataclass(frozen=True)
class DenoisingQueries:
    """Queries made from true boxes by adding noise; the decoder learns to undo it. See `denoising.sample_queries`.

    Laid out per image as `groups` groups of 2 x G slots, G = most boxes of any image: first G near copies (positive), then G
    far ones (negative). Slot j holds box j; slots beyond an image's boxes are padding.
    """

    labels: Tensor  # [B, Q] int64; num_classes in padding slots
    reference_logits: Tensor  # [B, Q, 4] logit of noised cxcywh
    attention_mask: Tensor  # [Q + num_queries] square, True = must not attend
    groups: int
    # Box of every positive slot, [P] each
    positive_image: Tensor
    positive_query: Tensor
    positive_target: Tensor  # index into the batch's boxes


@dataclass(frozen=True)
class DetectorOutput:
    """Detections, and in training the further predictions that the loss needs."""

    logits: Tensor  # [B, Q, C], last layer
    boxes: Tensor  # [B, Q, 4] cxcywh, last layer, normalised to the image
    # In training only:
    matching: QueryPredictions | None = None
    denoising: QueryPredictions | None = None  # None if switched off
    denoising_queries: DenoisingQueries | None = None
    encoder_logits: Tensor | None = None  # [B, Q, C], or [B, Q, 1] with class-agnostic selection
    encoder_boxes: Tensor | None = None  # [B, Q, 4]
    joined: QueryPredictions | None = None  # denoising and matching queries side by side, as the decoder made them
    encoder_map: Tensor | None = (
        None  # [B, D, H / 32, W / 32] coarsest map after the encoder's attention; with every layer
    )
    # In evaluation only:
    edge_logits: Tensor | None = None  # [B, Q, 4, N], last layer; None with direct regression
    initial_boxes: Tensor | None = None  # [B, Q, 4] cxcywh, which the offsets refer to

    def all_queries(self) -> QueryPredictions | None:
        """Predictions for the denoising queries, if there are any, and after them for the matching ones."""
        if self.denoising is None or self.matching is None:
            return self.matching
        return self.joined or self.denoising.followed_by(self.matching)
