"""Shapes in few sizes: boxes, pairs and denoising slots of a step padded, so that its losses are a graph that can be replayed.

A padded pair repeats the first pair of its kind and weighs nothing, a padded slot belongs to no group and weighs nothing:
losses and gradients equal the unpadded ones up to rounding. Sizes are doublings of a smallest one that few batches exceed.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.config import ModelConfig
from dfine_core.loss.matching import Matches, Pairs
from dfine_core.model.denoising import attention_mask
from dfine_core.structures import DenoisingQueries, Targets

BOXES_PER_IMAGE = 16  # of the smallest size, and so the next two; more than most images have
PAIRS_PER_IMAGE = 32  # of the GO union
ALIGNMENT = 8  # attention over other numbers of queries copies its mask


@dataclass(frozen=True)
class Padding:
    """Masks of the real pairs and slots of a padded step, and counts that a graph of tensors cannot read from shapes."""

    union: Tensor  # [U] 1 for a real pair of the GO union, else 0
    positive: Tensor  # [P] of positive denoising slots
    own: Tensor  # [M] of each stage's own matches
    slots: Tensor  # [Q] of denoising queries
    groups: Tensor  # [] denoising groups
    distillation: Tensor  # [4] see `distillation_factors`


def padded_size(number: int, smallest: int) -> int:
    """Smallest doubling of `smallest` that holds `number`."""
    size = max(1, smallest)
    while size < number:
        size *= 2
    return size


def pad_targets(targets: Targets) -> Targets:
    """Add boxes of no image; the counts stay those of the real ones."""
    extra = padded_size(targets.total, BOXES_PER_IMAGE * len(targets.counts)) - targets.total
    whole_image = targets.boxes.new_tensor([0.5, 0.5, 1.0, 1.0]).expand(extra, 4)
    return Targets(
        labels=F.pad(targets.labels, (0, extra)),
        boxes=torch.cat([targets.boxes, whole_image]),
        image=F.pad(targets.image, (0, extra)),
        counts=targets.counts,
    )


def pad_denoising(queries: DenoisingQueries, config: ModelConfig) -> DenoisingQueries:
    """Add slots that nothing attends to, and pairs that repeat the first one."""
    batch, slots = queries.labels.shape
    size = padded_size(slots, 2 * config.num_denoising)
    size += -(size + config.num_queries) % ALIGNMENT
    pairs = padded_size(len(queries.positive_image), batch * config.num_denoising)
    return DenoisingQueries(
        labels=F.pad(queries.labels, (0, size - slots), value=config.num_classes),
        reference_logits=F.pad(queries.reference_logits, (0, 0, 0, size - slots)),
        attention_mask=attention_mask(
            size, config.num_queries, group_slots=max(1, slots // queries.groups), device=queries.labels.device
        ),
        groups=queries.groups,
        positive_image=_repeat_first(queries.positive_image, pairs),
        positive_query=_repeat_first(queries.positive_query, pairs),
        positive_target=_repeat_first(queries.positive_target, pairs),
    )


def pad_matches(matches: Matches, targets: Targets) -> Matches:
    """Add pairs that repeat the first one.

    Args:
        targets: from `pad_targets`.
    """
    union = padded_size(len(matches.union), PAIRS_PER_IMAGE * len(targets.counts))
    return Matches(own=_pad_pairs(matches.own, len(targets.labels)), union=_pad_pairs(matches.union, union))


def padding_of(
    matches: Matches, targets: Targets, denoising: DenoisingQueries | None, config: ModelConfig, padded: Matches
) -> Padding:
    """Masks and counts of a padded step, one copy to the device.

    Args:
        matches: before padding.
        targets: padded; their counts are real.
        denoising: padded.
        padded: the same matches after padding.
    """
    most = max(targets.counts, default=0)
    groups, slots, size, positive, pairs = 1, 0, 0, 0, 0
    if denoising is not None:
        groups, size, pairs = denoising.groups, denoising.labels.shape[1], len(denoising.positive_image)
        slots, positive = 2 * most * groups, groups * targets.total
    batch, union = len(targets.counts), len(matches.union)
    factors = distillation_factors(union, positive, batch * config.num_queries, batch * slots, weight=config.loss.ddf)
    parts = (
        (union, len(padded.union)),
        (positive, pairs),
        (len(matches.own), len(padded.own)),
        (slots, size),
    )
    masks = [(torch.arange(length) < real).float() for real, length in parts]
    values = torch.cat([*masks, torch.tensor([float(groups), *factors])])
    device = targets.boxes.device
    if device.type == "cuda":
        values = values.pin_memory()
    values = values.to(device, non_blocking=True)
    real_union, real_positive, real_own, real_slots, last = values.split([*(length for _, length in parts), 5])
    return Padding(real_union, real_positive, real_own, real_slots, groups=last[0], distillation=last[1:])


def distillation_factors(
    union: int, positive: int, matching: int, noised: int, *, weight: float
) -> tuple[float, float, float, float]:
    """Factors of a query in DDF: matched and positive denoising queries, then the other ones of both kinds.

    Averages are apart over the matched queries and the others; the roots of how many matching queries there are of each
    balance the two averages, for the denoising queries too.

    Args:
        union: pairs of the GO union. positive: positive denoising slots.
        matching: matching queries of the batch. noised: denoising ones.
    """
    near, far = math.sqrt(union), math.sqrt(matching - union)
    near, far = weight * near / (near + far), weight * far / (near + far)
    return (
        near / max(1, union),
        near / max(1, positive),
        far / max(1, matching - union),
        far / max(1, noised - positive),
    )


def _pad_pairs(pairs: Pairs, size: int) -> Pairs:
    return Pairs(*(_repeat_first(index, size) for index in (pairs.image, pairs.query, pairs.target)))


def _repeat_first(index: Tensor, size: int) -> Tensor:
    """Pad the last dimension with its first value; with 0 where there is none."""
    number = index.shape[-1]
    if number == 0:
        return F.pad(index, (0, size))
    return torch.cat([index, index[..., :1].expand(*index.shape[:-1], size - number)], dim=-1)
