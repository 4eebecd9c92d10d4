"""Match predictions to targets and compute the weighted training losses, as a dict of named terms.

Every stage (decoder layers, initial box, encoder) is matched on its own. Its class scores are trained on its own matches; its
boxes and distributions on the GO union of all stages' matches, so that all layers pull the same queries to the same boxes.
That agreement is what makes GO-LSD sound: the last layer's distributions are then worth imitating by every earlier layer.
Denoising queries need no matching: each was made from a known box.

| term             | which outputs              | which pairs             | divided by                             |
|------------------|----------------------------|-------------------------|----------------------------------------|
| vfl              | all                        | the stage's own matches | boxes of the batch                     |
| bbox (L1), giou  | all                        | GO union                | pairs of the union                     |
| fgl              | decoder layers             | GO union                | pairs of the union                     |
| ddf              | decoder layers but the last | GO union and the rest  | its own averages                       |
| *_dn             | as above, denoising layers | positive slots          | boxes of the batch x denoising groups  |

Counts are averaged over all workers. Names follow the released logs: no suffix for the last layer, then _aux_0.., _pre, _enc_0,
_dn_0.., _dn_pre.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfine_core.boxes import cxcywh_to_xyxy, iou
from dfine_core.config import ModelConfig
from dfine_core.loss import losses
from dfine_core.loss.matching import ClassGroups, Matches, Pairs, match
from dfine_core.model.distribution import true_offsets, weighting_function
from dfine_core.structures import DenoisingQueries, DetectorOutput, QueryPredictions, Targets


@dataclass(frozen=True)
class Normalizers:
    """Divisors of the sums over pairs, tensors [] averaged over the workers and at least 1."""

    boxes: Tensor  # true boxes
    pairs: Tensor  # pairs of the GO union


class Criterion(nn.Module):
    """Training loss of one configuration; it has no trained weights."""

    bins: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        bins = weighting_function(config.reg_max, config.up, config.reg_scale)
        self.register_buffer("bins", bins, persistent=False)

    def forward(
        self,
        output: DetectorOutput,
        targets: Sequence[Mapping[str, Tensor]] | Targets,
        matches: Matches | None = None,
        normalizers: Normalizers | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms, whose plain sum is the loss. One device-to-host copy; the same collectives on every rank.

        Args:
            matches: from `match`, if they are known already; then nothing is copied to the host.
            normalizers: from `count`, where a step has more images than these; else those of this batch over all workers.

        Raises:
            ValueError: for targets that cannot be trained on, or an output of evaluation.
        """
        device = output.boxes.device
        self.bins = self.bins.to(device)
        with torch.autocast(device.type, enabled=False):
            return self._terms(output, Targets.pack(targets, self.config.num_classes, device), matches, normalizers)

    def match(self, output: DetectorOutput, targets: Sequence[Mapping[str, Tensor]] | Targets) -> Matches:
        """Assign queries to boxes, in every stage and in their union."""
        device = output.boxes.device
        with torch.autocast(device.type, enabled=False):
            packed = Targets.pack(targets, self.config.num_classes, device)
            class_groups, boxes, _ = self._to_match(output, packed)
            return match(class_groups, boxes, packed, self.config.loss)

    def _to_match(self, output: DetectorOutput, targets: Targets) -> tuple[ClassGroups, Tensor, QueryPredictions]:
        """Class logits and boxes [S, B, Q, 4] of the layers, the initial box and the encoder; predictions of the layers."""
        queries = output.matching
        if queries is None or output.encoder_logits is None or output.encoder_boxes is None:
            raise ValueError("the loss needs the output of a detector in training mode: call detector.train() first")
        logits, boxes = self._stages(queries)
        encoder_logits = self._precise(output.encoder_logits)[None]
        agnostic = self.config.query_selection == "agnostic"
        class_groups = [
            (logits, targets.labels),
            (encoder_logits, torch.zeros_like(targets.labels) if agnostic else targets.labels),
        ]
        return class_groups, torch.cat([boxes, output.encoder_boxes[None]]), queries

    def _terms(
        self, output: DetectorOutput, targets: Targets, matches: Matches | None, normalizers: Normalizers | None
    ) -> dict[str, Tensor]:
        class_groups, boxes, queries = self._to_match(output, targets)
        matches = matches or match(class_groups, boxes, targets, self.config.loss)
        normalizers = normalizers or count(targets.total, len(matches.union), boxes.device)
        balance = _balance(queries, matches.union)

        layers = [f"_aux_{i}" for i in range(len(queries.logits) - 1)] + [""]
        stages = [*layers, "_pre", "_enc_0"]
        terms = self._class_terms(class_groups, boxes, targets, matches.own, normalizers.boxes, stages)
        terms |= self._box_terms(boxes, targets, matches.union, normalizers.pairs, stages)
        terms |= self._edge_terms(queries, targets, matches.union, normalizers.pairs, balance, layers)
        if output.denoising is None or output.denoising_queries is None:
            return terms
        return terms | self._denoising_terms(
            output.denoising, output.denoising_queries, targets, normalizers.boxes, balance
        )

    def _denoising_terms(
        self,
        queries: QueryPredictions,
        noised: DenoisingQueries,
        targets: Targets,
        num_boxes: Tensor,
        balance: tuple[float, float],
    ) -> dict[str, Tensor]:
        """Same losses on the denoising queries; all 0 when the batch has no box to make them from."""
        pairs = Pairs(noised.positive_image, noised.positive_query, noised.positive_target)
        norm = num_boxes * noised.groups
        logits, boxes = self._stages(queries)
        layers = [f"_dn_{i}" for i in range(len(queries.logits))]
        stages = [*layers, "_dn_pre"]
        terms = self._class_terms([(logits, targets.labels)], boxes, targets, pairs.expand(len(boxes)), norm, stages)
        terms |= self._box_terms(boxes, targets, pairs, norm, stages)
        terms |= self._edge_terms(queries, targets, pairs, norm, balance, layers)
        if queries.edge_logits is not None:  # the last layer is its own teacher: the released log lists it as 0
            terms[f"loss_ddf{layers[-1]}"] = torch.zeros_like(norm)
        return terms

    def _class_terms(
        self,
        class_groups: ClassGroups,
        boxes: Tensor,
        targets: Targets,
        own: Pairs,
        norm: Tensor,
        suffixes: Sequence[str],
    ) -> dict[str, Tensor]:
        """VFL of every stage on its own matches; groups of stages may differ in their classes."""
        weights = self.config.loss
        stage = torch.arange(len(boxes), device=boxes.device).unsqueeze(1)
        predicted = cxcywh_to_xyxy(boxes.detach()[stage, own.image, own.query])
        ious = iou(predicted, targets.boxes_xyxy[own.target])  # [S, M]
        sums: list[Tensor] = []
        for logits, labels in class_groups:
            rows = slice(len(sums), len(sums) + len(logits))
            index = (stage[: len(logits)], own.image[rows], own.query[rows], labels[own.target[rows]])
            sums += losses.varifocal_loss(logits, index, ious[rows], weights.vfl_alpha, weights.vfl_gamma)
        return _named("vfl", weights.vfl * torch.stack(sums) / norm, suffixes)

    def _box_terms(
        self, boxes: Tensor, targets: Targets, pairs: Pairs, norm: Tensor, suffixes: Sequence[str]
    ) -> dict[str, Tensor]:
        weights = self.config.loss
        predicted = boxes[:, pairs.image, pairs.query]  # [S, M, 4]
        l1, giou = losses.box_losses(predicted, targets.boxes[pairs.target])
        return _named("bbox", weights.bbox * l1 / norm, suffixes) | _named("giou", weights.giou * giou / norm, suffixes)

    def _edge_terms(
        self,
        queries: QueryPredictions,
        targets: Targets,
        pairs: Pairs,
        norm: Tensor,
        balance: tuple[float, float],
        suffixes: Sequence[str],
    ) -> dict[str, Tensor]:
        """FGL of every layer, and DDF of every layer but the last, which is the teacher."""
        if queries.edge_logits is None:
            return {}
        weights = self.config.loss
        edge_logits = self._precise(queries.edge_logits)  # [L, B, Q, 4, N]
        true_boxes = targets.boxes_xyxy[pairs.target]
        ious = iou(cxcywh_to_xyxy(queries.boxes.detach()[:, pairs.image, pairs.query]), true_boxes)  # [L, M]

        start = queries.initial_boxes.detach()[pairs.image, pairs.query]
        offsets = true_offsets(start, true_boxes, self.config.reg_scale)
        fgl = losses.fine_grained_localization_loss(edge_logits[:, pairs.image, pairs.query], offsets, self.bins, ious)

        confidence = self._precise(queries.logits[-1].detach()).sigmoid().amax(-1)  # teacher's scores, [B, Q]
        importance = confidence.repeat(len(edge_logits) - 1, 1, 1)
        importance[:, pairs.image, pairs.query] = ious[:-1].to(importance.dtype)
        matched = torch.zeros_like(confidence, dtype=torch.bool)
        matched[pairs.image, pairs.query] = True
        ddf = losses.decoupled_distillation_focal_loss(
            edge_logits[:-1], edge_logits[-1], importance, matched, balance, weights.ddf_temperature
        )
        return _named("fgl", weights.fgl * fgl / norm, suffixes) | _named("ddf", weights.ddf * ddf, suffixes[:-1])

    def _stages(self, queries: QueryPredictions) -> tuple[Tensor, Tensor]:
        """Class logits and boxes of the layers and, last, of the initial box: [L + 1, B, Q, C] and [L + 1, B, Q, 4]."""
        logits = torch.cat([queries.logits, queries.initial_logits[None]])
        return self._precise(logits), torch.cat([queries.boxes, queries.initial_boxes[None]])

    def _precise(self, x: Tensor) -> Tensor:
        return x.float() if self.config.numerics == "float32" else x


def count(boxes: int, pairs: int, device: torch.device, micro_batches: float = 1) -> Normalizers:
    """Average the two counts over all micro-batches of a step; at least 1.

    Args:
        micro_batches: number per worker; a fraction where workers have different numbers.
    """
    counts = torch.cat([torch.full((1,), n, dtype=torch.float32, device=device) for n in (boxes, pairs)])
    shared = micro_batches
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
        shared *= dist.get_world_size()
    counts /= shared
    counts = counts.clamp(min=1)
    return Normalizers(boxes=counts[0], pairs=counts[1])


def _balance(queries: QueryPredictions, union: Pairs) -> tuple[float, float]:
    """Weights of matched and unmatched queries in DDF: the roots of how many there are."""
    everyone = queries.initial_boxes.shape[0] * queries.initial_boxes.shape[1]
    return math.sqrt(len(union)), math.sqrt(everyone - len(union))


def _named(name: str, values: Tensor, suffixes: Sequence[str]) -> dict[str, Tensor]:
    return {f"loss_{name}{suffix}": value for suffix, value in zip(suffixes, values.unbind(), strict=True)}
