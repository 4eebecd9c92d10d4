"""Match predictions to targets and compute the weighted training losses, as a dict of named terms.

Every stage (decoder layers, initial box, encoder) is matched on its own. Its class scores are trained on its own matches; its
boxes and distributions on the GO union of all stages' matches, so that all layers pull the same queries to the same boxes.
That agreement is what makes GO-LSD sound: the last layer's distributions are then worth imitating by every earlier layer.
Denoising queries need no matching: each was made from a known box.

| term             | which outputs              | which pairs             | divided by                             |
|------------------|----------------------------|-------------------------|----------------------------------------|
| vfl or mal       | all                        | the stage's own matches | boxes of the batch                     |
| bbox (L1), giou  | all                        | GO union                | pairs of the union                     |
| fgl              | decoder layers             | GO union                | pairs of the union                     |
| ddf              | decoder layers but the last | GO union and the rest  | its own averages                       |
| *_dn             | as above, denoising layers | positive slots          | boxes of the batch x denoising groups  |

Matching and denoising queries of all stages go through each loss together, in few launches; only the sums are apart. Counts are
averaged over all workers; boxes of unequal worth count by their weights, see `worth.py`. Names follow the released logs: no
suffix for the last layer, then _aux_0.., _pre, _enc_0, _dn_0.., _dn_pre.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dfine_core.boxes import cxcywh_to_xyxy, iou_and_giou
from dfine_core.config import ModelConfig
from dfine_core.loss import losses
from dfine_core.loss.matching import ClassGroups, Matches, Pairs, match, matching_cost
from dfine_core.loss.padding import Padding, distillation_factors
from dfine_core.loss.worth import amounts, weigh_scores
from dfine_core.model.distribution import true_offsets, weighting_function
from dfine_core.structures import DenoisingQueries, DetectorOutput, QueryPredictions, Targets


@dataclass(frozen=True)
class Normalizers:
    """Divisors of the sums over pairs, tensors [] averaged over the workers and at least 1."""

    boxes: Tensor  # true boxes
    pairs: Tensor  # pairs of the GO union


@dataclass(frozen=True)
class Stages:
    """Predictions of all S stages side by side: the L decoder layers, the initial box, the encoder. Denoising queries come first.

    The encoder has none of these; zeros stand for them, and no term uses them.
    """

    queries: QueryPredictions
    class_groups: ClassGroups  # logits [S_i, B, Q, C_i] of stages that share a set of classes, with labels
    boxes: Tensor  # [S, B, Q, 4]
    noised: int  # denoising queries per image


@dataclass(frozen=True)
class ComparedPairs:
    """Pairs that losses compare, [S, P]: the GO union, then the positive denoising slots, then each stage's own matches.

    The first two are the same in all stages, and train boxes and distributions; the last two train class scores.
    """

    stage: Tensor  # [S, 1]
    image: Tensor
    query: Tensor  # denoising queries are counted too
    target: Tensor
    union: int  # number of pairs of the GO union
    positive: int  # and of positive slots
    real: Tensor | None  # [P] 1, or 0 for a pair that only pads; None: all are real

    @classmethod
    def of(
        cls, matches: Matches, noised: DenoisingQueries | None, stages: Stages, padding: Padding | None = None
    ) -> Self:
        """Lay the three kinds of pairs side by side."""
        own, union, count = matches.own, matches.union, len(stages.boxes)
        slots = (
            Pairs(noised.positive_image, noised.positive_query, noised.positive_target)
            if noised is not None
            else Pairs(*(index[:0] for index in (union.image, union.query, union.target)))
        )

        def join(of_union: Tensor, of_slots: Tensor, of_own: Tensor) -> Tensor:
            shared = torch.cat([of_union, of_slots])
            return torch.cat([shared.expand(count, -1), of_own], dim=1)

        return cls(
            stage=torch.arange(count, device=own.image.device).unsqueeze(1),
            image=join(union.image, slots.image, own.image),
            query=join(union.query + stages.noised, slots.query, own.query + stages.noised),
            target=join(union.target, slots.target, own.target),
            union=len(union),
            positive=len(slots),
            real=None if padding is None else torch.cat([padding.union, padding.positive, padding.own]),
        )

    @property
    def shared(self) -> int:
        """Number of pairs that are the same in all stages; they come first."""
        return self.union + self.positive


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
        padding: Padding | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms, whose plain sum is the loss. One device-to-host copy; the same collectives on every rank.

        Args:
            matches: from `match`, if they are known already; then nothing is copied to the host.
            normalizers: from `count`, where a step has more images than these; else those of this batch over all workers.
            padding: from `padding_of`, where targets, denoising queries and matches are padded; needs the two before.

        Raises:
            ValueError: for targets that cannot be trained on, or an output of evaluation.
        """
        device = output.boxes.device
        if self.bins.device != device:
            self.bins = self.bins.to(device)
        with torch.autocast(device.type, enabled=False):
            packed = Targets.pack(targets, self.config.num_classes, device)
            return self._terms(output, packed, matches, normalizers, padding)

    def match(self, output: DetectorOutput, targets: Sequence[Mapping[str, Tensor]] | Targets) -> Matches:
        """Assign queries to boxes, in every stage and in their union."""
        device = output.boxes.device
        with torch.autocast(device.type, enabled=False):
            packed = Targets.pack(targets, self.config.num_classes, device)
            return self._match(self._stages(output, packed), packed)

    def matching_cost(self, output: DetectorOutput, targets: Targets) -> Tensor:
        """Costs [S, T, Q] from which `matching.assign` makes the matches: a graph without any count."""
        with torch.autocast(output.boxes.device.type, enabled=False):
            groups, boxes = self._matched(self._stages(output, targets))
            return matching_cost(groups, boxes, targets, self.config.loss)

    def _match(self, stages: Stages, targets: Targets) -> Matches:
        groups, boxes = self._matched(stages)
        return match(groups, boxes, targets, self.config.loss)

    def _matched(self, stages: Stages) -> tuple[ClassGroups, Tensor]:
        matching = slice(stages.noised, None)
        return [(logits[:, :, matching], labels) for logits, labels in stages.class_groups], stages.boxes[
            :, :, matching
        ]

    def _stages(self, output: DetectorOutput, targets: Targets) -> Stages:
        queries = output.all_queries()
        if queries is None or output.encoder_logits is None or output.encoder_boxes is None:
            raise ValueError("the loss needs the output of a detector in training mode: call detector.train() first")
        noised = queries.boxes.shape[2] - output.encoder_boxes.shape[1]
        padding = (0, 0, noised, 0)
        encoder_logits = F.pad(output.encoder_logits, padding)[None]
        encoder_boxes = F.pad(output.encoder_boxes, padding)[None]
        logits = [queries.logits, queries.initial_logits[None]]
        if self.config.query_selection == "agnostic":
            class_groups = [
                (self._precise(torch.cat(logits)), targets.labels),
                (self._precise(encoder_logits), torch.zeros_like(targets.labels)),
            ]
        else:
            class_groups = [(self._precise(torch.cat([*logits, encoder_logits])), targets.labels)]
        boxes = torch.cat([queries.boxes, queries.initial_boxes[None], encoder_boxes])
        return Stages(queries, class_groups, boxes, noised)

    def _terms(
        self,
        output: DetectorOutput,
        targets: Targets,
        matches: Matches | None,
        normalizers: Normalizers | None,
        padding: Padding | None,
    ) -> dict[str, Tensor]:
        stages = self._stages(output, targets)
        matches = matches or self._match(stages, targets)
        normalizers = normalizers or count(*amounts(targets, matches), stages.boxes.device)
        noised = output.denoising_queries
        pairs = ComparedPairs.of(matches, noised, stages, padding)
        if padding is not None and (targets.weights is not None or targets.ignored is not None):
            raise ValueError("boxes of unequal worth cannot be padded: compile neither the detector nor the losses")

        predicted = stages.boxes[pairs.stage, pairs.image, pairs.query]  # [S, P, 4]
        true_xyxy = targets.boxes_xyxy
        ious, gious = iou_and_giou(cxcywh_to_xyxy(predicted), true_xyxy[pairs.target])
        ious = ious.detach()

        # Each is a pair of sums: of the matching queries, and of the denoising ones.
        scores = self._score_losses(stages, pairs, ious, targets, padding)
        edges = self._box_and_edge_losses(stages, pairs, predicted, targets, gious, ious)
        ddf = self._distillation_losses(stages, pairs, ious, padding)

        layers = len(stages.queries.logits)
        suffixes: list[str | None] = [*(f"_aux_{i}" for i in range(layers - 1)), "", "_pre", "_enc_0"]
        classification = self.config.loss.classification
        terms = _named([classification], scores[0] / normalizers.boxes, suffixes)
        terms |= _named(["bbox", "giou", "fgl"], edges[0] / normalizers.pairs, suffixes)
        terms |= _named(["ddf"], ddf[0], suffixes[: layers - 1])
        if noised is None:
            return terms
        norm = normalizers.boxes * (noised.groups if padding is None else padding.groups)
        suffixes = [*(f"_dn_{i}" for i in range(layers)), "_dn_pre", None]
        terms |= _named([classification], scores[1] / norm, suffixes)
        terms |= _named(["bbox", "giou", "fgl"], edges[1] / norm, suffixes)
        terms |= _named(["ddf"], ddf[1], suffixes[: layers - 1])
        # The last layer is its own teacher: the released log of D-FINE lists it as 0, that of DEIM leaves it out.
        if stages.queries.edge_logits is not None and classification == "vfl":
            terms[f"loss_ddf_dn_{layers - 1}"] = torch.zeros_like(norm)
        return terms

    def _score_losses(
        self, stages: Stages, pairs: ComparedPairs, ious: Tensor, targets: Targets, padding: Padding | None
    ) -> tuple[Tensor, Tensor]:
        """VFL or MAL of every stage on its own matches, [S]; groups of stages may differ in their classes."""
        weights = self.config.loss
        first = 0
        sums: list[tuple[Tensor, Tensor]] = []
        for logits, labels in stages.class_groups:
            rows, columns = slice(first, first + len(logits)), slice(pairs.union, None)
            first += len(logits)
            target = pairs.target[rows, columns]
            index = (pairs.stage[: len(logits)], pairs.image[rows, columns], pairs.query[rows, columns], labels[target])
            real = None if pairs.real is None else pairs.real[columns]
            entries, hits = losses.classification_loss(logits, index, ious[rows, columns], weights, real)
            entries, hits = weigh_scores(entries, hits, stages.boxes[rows], index[:3], target, targets)
            of_noised = entries[:, :, : stages.noised]
            if padding is not None:
                of_noised = of_noised * padding.slots
            sums.append(
                (
                    entries[:, :, stages.noised :].sum((1, 2)) - hits[:, pairs.positive :].sum(1),
                    of_noised.sum((1, 2)) - hits[:, : pairs.positive].sum(1),
                )
            )
        matching, noised = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*sums, strict=True))
        weight = weights.vfl if weights.classification == "vfl" else weights.mal
        return _weighted(matching, weight), _weighted(noised, weight)

    def _box_and_edge_losses(
        self, stages: Stages, pairs: ComparedPairs, predicted: Tensor, targets: Targets, gious: Tensor, ious: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L1 and GIoU of every stage and, after them, FGL of every layer: [2 S + L]."""
        weights, shared = self.config.loss, slice(pairs.shared)
        target = pairs.target[0, shared]
        true_boxes = targets.boxes[target]
        l1 = (predicted[:, shared] - true_boxes).abs().sum(-1)
        rows = [l1 * weights.bbox, (1 - gious[:, shared]) * weights.giou]
        edge_logits, start = stages.queries.edge_logits, stages.queries.initial_boxes.detach()
        if edge_logits is not None:
            image, query = pairs.image[0, shared], pairs.query[0, shared]
            offsets = true_offsets(start[image, query], cxcywh_to_xyxy(true_boxes), self.config.reg_scale)
            fgl = losses.fine_grained_localization_loss(
                self._precise(edge_logits)[:, image, query], offsets, self.bins, ious[: len(edge_logits), shared]
            )
            rows.append(fgl * weights.fgl)
        per_pair = torch.cat(rows)
        if pairs.real is not None:
            per_pair = per_pair * pairs.real[shared]
        if targets.weights is not None:
            per_pair = per_pair * targets.weights[target]
        return per_pair[:, : pairs.union].sum(1), per_pair[:, pairs.union :].sum(1)

    def _distillation_losses(
        self, stages: Stages, pairs: ComparedPairs, ious: Tensor, padding: Padding | None
    ) -> tuple[Tensor, Tensor]:
        """DDF of every layer but the last, which is the teacher: [L - 1]; nothing with direct regression."""
        edge_logits = stages.queries.edge_logits
        if edge_logits is None:
            return ious.new_zeros(0), ious.new_zeros(0)
        weights, noised = self.config.loss, stages.noised
        students = len(edge_logits) - 1
        batch, queries = edge_logits.shape[1:3]
        factors: Sequence[float] | Sequence[Tensor]
        if padding is None:
            factors = distillation_factors(
                pairs.union, pairs.positive, batch * (queries - noised), batch * noised, weight=weights.ddf
            )
        else:
            factors = padding.distillation.unbind()

        # How much a query matters: the IoU of its box where it is matched, else the teacher's confidence.
        factor = self._precise(stages.queries.logits[-1].detach()).amax(-1).sigmoid()  # [B, Q]
        factor[:, noised:].mul_(factors[2])
        factor[:, :noised].mul_(factors[3] if padding is None else factors[3] * padding.slots)
        factor = factor.repeat(students, 1, 1)
        image, query = pairs.image[0, : pairs.shared], pairs.query[0, : pairs.shared]
        matched = ious[:students, : pairs.union] * factors[0], ious[:students, pairs.union : pairs.shared] * factors[1]
        value = torch.cat(matched, dim=1).to(factor.dtype)
        if pairs.real is not None:  # without any box, pads have nothing to repeat
            value = torch.where(pairs.real.amax() > 0, value, factor[:, image, query])
        factor[:, image, query] = value

        divergence = losses.edge_divergence(self._precise(edge_logits), weights.ddf_temperature)  # [L - 1, B, Q]
        of_noised, of_matching = (divergence * factor).split((noised, queries - noised), dim=2)
        return of_matching.sum((1, 2)), of_noised.sum((1, 2))

    def _precise(self, x: Tensor) -> Tensor:
        return x.float() if self.config.numerics == "float32" else x


def count(boxes: float | Tensor, pairs: float | Tensor, device: torch.device, micro_batches: float = 1) -> Normalizers:
    """Average the two counts over all micro-batches of a step; at least 1.

    Args:
        boxes, pairs: see `worth.amounts`; [] tensors on the device where boxes have weights.
        micro_batches: number per worker; a fraction where workers have different numbers.
    """
    shared, workers = dist.is_available() and dist.is_initialized(), 1
    if not (shared or isinstance(boxes, Tensor) or isinstance(pairs, Tensor)):
        return Normalizers(*(torch.full((), max(1.0, n / micro_batches), device=device) for n in (boxes, pairs)))
    counts = torch.cat([_as_vector(n, device) for n in (boxes, pairs)])
    if shared:
        dist.all_reduce(counts)
        workers = dist.get_world_size()
    counts = (counts / (micro_batches * workers)).clamp(min=1)
    return Normalizers(boxes=counts[0], pairs=counts[1])


def _as_vector(number: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.reshape(1)
    return torch.full((1,), number, dtype=torch.float32, device=device)


def _weighted(values: Tensor, weight: float) -> Tensor:
    return values if weight == 1 else values * weight


def _named(names: Sequence[str], values: Tensor, suffixes: Sequence[str | None]) -> dict[str, Tensor]:
    """Name values of several losses, laid end to end; stages without a suffix are left out.

    A loss that comes last may have values for the first stages alone.
    """
    keys = [(name, suffix) for name in names for suffix in suffixes]
    return {
        f"loss_{name}{suffix}": value
        for (name, suffix), value in zip(keys, values.unbind(), strict=False)
        if suffix is not None
    }
