"""Contrastive denoising: extra training queries, made from true boxes, that the decoder learns to correct.

Positive slots hold a box whose corners moved by less than half of its side: they must find back to it. Negative slots
moved further: they must be rejected. Groups are independent of each other and invisible to the matching queries, so inference
is untouched.

Source: DINO, arXiv:2203.03605.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from dfine_core.config import ModelConfig
from dfine_core.structures import DenoisingQueries, Targets


def sample_queries(
    targets: Targets,
    *,
    num_classes: int,
    num_queries: int,
    num_denoising: int,
    label_noise_ratio: float,
    box_noise_scale: float,
    generator: torch.Generator | None = None,
) -> DenoisingQueries:
    """Make noised copies of the true boxes; no queries if no image has a box.

    Random numbers come in a fixed order from `generator`, or from the global state of the targets' device.
    """
    most = max(targets.counts, default=0)
    device = targets.boxes.device
    groups = max(1, num_denoising // max(1, most))
    batch, slots = len(targets.counts), 2 * most * groups

    # Every box goes to slot j of both halves of every group.
    image, query, target = (t.to(device, non_blocking=True) for t in positive_slots(targets.counts, groups))
    labels = torch.full((batch, slots), num_classes, dtype=torch.int64, device=device)
    boxes = torch.zeros(batch, slots, 4, device=device)
    for half in (query, query + most):
        labels[image, half] = targets.labels[target]
        boxes[image, half] = targets.boxes[target]
    real = labels != num_classes
    negative = (torch.arange(slots, device=device) // max(1, most)) % 2 == 1

    # Noise: some labels become random ones, and corners move by a share of the box's side, further in negative slots.
    flip = torch.rand(labels.shape, generator=generator, device=device) < label_noise_ratio * 0.5
    other = torch.randint(0, num_classes, labels.shape, generator=generator, device=device, dtype=torch.int32)
    labels = torch.where(flip & real, other.long(), labels)
    sign = torch.randint(0, 2, boxes.shape, generator=generator, device=device, dtype=torch.float32) * 2 - 1
    amount = torch.rand(boxes.shape, generator=generator, device=device) + negative[:, None].float()

    half_size = boxes[..., 2:].repeat(1, 1, 2) / 2
    corners = (cxcywh_to_xyxy(boxes) + sign * amount * half_size * box_noise_scale).clamp(0, 1)
    noised = xyxy_to_cxcywh(corners).abs()  # corners that crossed over make a box of negative size

    return DenoisingQueries(
        labels=labels,
        reference_logits=inverse_sigmoid(noised),
        attention_mask=attention_mask(slots, num_queries, group_slots=max(1, 2 * most), device=device),
        groups=groups,
        positive_image=image,
        positive_query=query,
        positive_target=target,
    )


def sample_queries_for(
    config: ModelConfig, targets: Targets, generator: torch.Generator | None = None
) -> DenoisingQueries | None:
    """Make the queries that a detector of this configuration trains on; None if it has denoising switched off."""
    if config.num_denoising == 0:
        return None
    return sample_queries(
        targets,
        num_classes=config.num_classes,
        num_queries=config.num_queries,
        num_denoising=config.num_denoising,
        label_noise_ratio=config.label_noise_ratio,
        box_noise_scale=config.box_noise_scale,
        generator=generator,
    )


def positive_slots(counts: Sequence[int], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of image, slot and box of every positive denoising slot: [groups * T] int64 each, on the CPU."""
    per_image = torch.tensor(counts, dtype=torch.int64)
    most = max(counts, default=0)
    image = torch.arange(len(counts)).repeat_interleave(per_image)
    first = per_image.cumsum(0) - per_image
    target = torch.arange(int(per_image.sum()))
    slot = target - first[image]  # index of the box within its image
    query = (torch.arange(groups) * 2 * most).unsqueeze(1) + slot  # [groups, T]
    return image.repeat(groups), query.flatten(), target.repeat(groups)


def attention_mask(slots: int, num_queries: int, *, group_slots: int, device: torch.device) -> Tensor:
    """Attention mask over all queries, [slots + num_queries] square, True = must not attend.

    Denoising queries attend to their own group and the matching queries; matching queries only to each other.
    """
    group = torch.arange(slots + num_queries, device=device) // group_slots
    group = torch.where(torch.arange(slots + num_queries, device=device) < slots, group, -1)
    return (group.unsqueeze(1) != group.unsqueeze(0)) & (group.unsqueeze(0) >= 0)
