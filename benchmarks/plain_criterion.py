"""Training loss written plainly from its published definition: layer by layer, image by image.

Reference for the numbers and the speed of the batched criterion. It shares only structures and settings with it: overlaps
come from torchvision's pairwise matrices, the GO union is a loop over counted pairs, every layer is matched separately.
One process only: counts are not averaged over workers.

Source: D-FINE, arXiv:2410.13842, and its released code.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from dfine_core.config import LossConfig, ModelConfig
from dfine_core.structures import DetectorOutput, QueryPredictions

Target = Mapping[str, Tensor]  # {"labels": (G,), "boxes": (G, 4) cxcywh} of one image
Pairs = tuple[Tensor, Tensor]  # query and box indices of one image, [M] each


@dataclass(frozen=True)
class Layer:
    """Predictions of one layer, with their targets."""

    suffix: str
    logits: Tensor  # [B, Q, C]
    boxes: Tensor  # [B, Q, 4] cxcywh
    edge_logits: Tensor | None  # [B, Q, 4, N]
    targets: Sequence[Target]
    ious: Sequence[Tensor]  # [Q, G] for every image, without gradient


def plain_criterion(config: ModelConfig, output: DetectorOutput, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Compute the weighted terms of `Criterion(config)(output, targets)`, for one worker."""
    queries, encoder_logits, encoder_boxes = output.matching, output.encoder_logits, output.encoder_boxes
    assert queries is not None
    assert encoder_logits is not None
    assert encoder_boxes is not None
    agnostic = config.query_selection == "agnostic"
    of_one_class = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    decoder = decoder_layers(queries, targets, [f"_aux_{i}" for i in range(len(queries.logits) - 1)] + [""])
    layers = [
        *decoder,
        make_layer("_pre", queries.initial_logits, queries.initial_boxes, None, targets),
        make_layer("_enc_0", encoder_logits, encoder_boxes, None, of_one_class if agnostic else targets),
    ]

    images = range(len(targets))
    own = [[match(layer, image, config.loss) for image in images] for layer in layers]
    union = [global_optimal_pairs([pairs[image] for pairs in own]) for image in images]
    num_boxes = max(1, sum(len(target["labels"]) for target in targets))
    num_pairs = sum(len(query) for query, _ in union)
    balance = math.sqrt(num_pairs), math.sqrt(queries.initial_boxes[..., 0].numel() - num_pairs)

    terms: dict[str, Tensor] = {}
    for layer, pairs in zip(layers, own, strict=True):
        terms |= class_term(layer, pairs, num_boxes, config.loss)
        terms |= box_terms(layer, union, max(1, num_pairs), config.loss)
    if queries.edge_logits is not None:
        for layer in decoder:
            terms |= fgl_term(layer, queries.initial_boxes, union, max(1, num_pairs), config)
        for layer in decoder[:-1]:
            terms |= ddf_term(layer, decoder[-1], union, balance, config.loss)
    if output.denoising is None or output.denoising_queries is None:
        return terms
    groups = output.denoising_queries.groups
    return terms | denoising_terms(config, output.denoising, groups, targets, num_boxes, balance)


def denoising_terms(
    config: ModelConfig,
    queries: QueryPredictions,
    groups: int,
    targets: Sequence[Target],
    num_boxes: int,
    balance: tuple[float, float],
) -> dict[str, Tensor]:
    """Compute the denoising losses: with at most G boxes in an image, slot 2 r G + j is assigned to box j."""
    most = max(len(target["labels"]) for target in targets)
    pairs = []
    for target in targets:
        count = len(target["labels"])
        query = [2 * r * most + j for r in range(groups) for j in range(count)]
        pairs.append(as_pairs(query, list(range(count)) * groups, queries.boxes.device))
    norm = max(1, num_boxes * groups)
    decoder = decoder_layers(queries, targets, [f"_dn_{i}" for i in range(len(queries.logits))])

    terms: dict[str, Tensor] = {}
    for layer in [*decoder, make_layer("_dn_pre", queries.initial_logits, queries.initial_boxes, None, targets)]:
        terms |= class_term(layer, pairs, norm, config.loss)
        terms |= box_terms(layer, pairs, norm, config.loss)
    if queries.edge_logits is not None:
        for layer in decoder:
            terms |= fgl_term(layer, queries.initial_boxes, pairs, norm, config)
            if config.loss.classification == "vfl" or layer is not decoder[-1]:  # DEIM's log lacks the last layer's 0
                terms |= ddf_term(layer, decoder[-1], pairs, balance, config.loss)
    return terms


def decoder_layers(queries: QueryPredictions, targets: Sequence[Target], suffixes: Sequence[str]) -> list[Layer]:
    edges = [None] * len(suffixes) if queries.edge_logits is None else queries.edge_logits.unbind()
    fields = zip(suffixes, queries.logits.unbind(), queries.boxes.unbind(), edges, strict=True)
    return [make_layer(*layer, targets) for layer in fields]


def make_layer(
    suffix: str, logits: Tensor, boxes: Tensor, edge_logits: Tensor | None, targets: Sequence[Target]
) -> Layer:
    found = to_xyxy(boxes.detach())
    ious = [box_iou(found[image], to_xyxy(target["boxes"])) for image, target in enumerate(targets)]
    return Layer(suffix, logits, boxes, edge_logits, targets, ious)


@torch.no_grad()
def match(layer: Layer, image: int, weights: LossConfig) -> Pairs:
    """Hungarian assignment of one layer's queries to the boxes of one image."""
    target = layer.targets[image]
    p = layer.logits[image].sigmoid()[:, target["labels"]]  # [Q, G]
    hit = weights.match_alpha * (1 - p) ** weights.match_gamma * -torch.log(p + 1e-8)
    miss = (1 - weights.match_alpha) * p**weights.match_gamma * -torch.log(1 - p + 1e-8)
    l1 = torch.cdist(layer.boxes[image], target["boxes"], p=1)
    giou = generalized_box_iou(to_xyxy(layer.boxes[image]), to_xyxy(target["boxes"]))
    cost = weights.match_class * (hit - miss) + weights.match_bbox * l1 - weights.match_giou * giou
    query, box = linear_sum_assignment(cost.nan_to_num(nan=1.0).cpu().numpy())
    return torch.from_numpy(query).to(p.device), torch.from_numpy(box).to(p.device)


def global_optimal_pairs(pairs: Sequence[Pairs]) -> Pairs:
    """GO union for one image: the most frequent pairs first, each query at most once."""
    votes = Counter((q, j) for query, box in pairs for q, j in zip(query.tolist(), box.tolist(), strict=True))
    box_of: dict[int, int] = {}
    for (q, j), _ in sorted(votes.items(), key=lambda item: (-item[1], item[0])):
        box_of.setdefault(q, j)
    return as_pairs(list(box_of.keys()), list(box_of.values()), pairs[0][0].device)


def as_pairs(query: list[int], box: list[int], device: torch.device) -> Pairs:
    query_index, box_index = torch.tensor([query, box], dtype=torch.int64, device=device)
    return query_index, box_index


def class_term(layer: Layer, pairs: Sequence[Pairs], norm: int, weights: LossConfig) -> dict[str, Tensor]:
    """Varifocal or matchability-aware loss of one layer."""
    mal = weights.classification == "mal"
    gamma, alpha, factor = (
        (weights.mal_gamma, weights.mal_alpha, weights.mal)
        if mal
        else (weights.vfl_gamma, weights.vfl_alpha, weights.vfl)
    )
    truth = torch.zeros_like(layer.logits)
    weight = (1 if alpha is None else alpha) * layer.logits.detach().sigmoid() ** gamma
    for image, (query, box) in enumerate(pairs):
        label = layer.targets[image]["labels"][box]
        iou = layer.ious[image][query, box]
        truth[image, query, label] = iou**gamma if mal else iou
        weight[image, query, label] = 1 if mal else iou
    loss = F.binary_cross_entropy_with_logits(layer.logits, truth, weight=weight, reduction="sum")
    return {f"loss_{weights.classification}{layer.suffix}": factor * loss / norm}


def box_terms(layer: Layer, pairs: Sequence[Pairs], norm: int, weights: LossConfig) -> dict[str, Tensor]:
    """L1 and GIoU of one layer."""
    l1 = giou = layer.boxes.sum() * 0
    for image, (query, box) in enumerate(pairs):
        found, true = layer.boxes[image, query], layer.targets[image]["boxes"][box]
        l1 = l1 + (found - true).abs().sum()
        giou = giou + (1 - generalized_box_iou(to_xyxy(found), to_xyxy(true)).diagonal()).sum()
    return {
        f"loss_bbox{layer.suffix}": weights.bbox * l1 / norm,
        f"loss_giou{layer.suffix}": weights.giou * giou / norm,
    }


def fgl_term(
    layer: Layer, initial_boxes: Tensor, pairs: Sequence[Pairs], norm: int, config: ModelConfig
) -> dict[str, Tensor]:
    """Fine-grained localisation of one layer: cross-entropy towards the two bins around every true offset."""
    assert layer.edge_logits is not None
    bins = weighting(config.reg_max, config.up, config.reg_scale).to(initial_boxes.device)
    loss = layer.edge_logits.sum() * 0
    for image, (query, box) in enumerate(pairs):
        x, y, w, h = initial_boxes[image, query].detach().unbind(-1)
        x1, y1, x2, y2 = to_xyxy(layer.targets[image]["boxes"][box]).unbind(-1)
        unit_x, unit_y = w / config.reg_scale + 1e-16, h / config.reg_scale + 1e-16
        distances = [(x - x1) / unit_x, (y - y1) / unit_y, (x2 - x) / unit_x, (y2 - y) / unit_y]
        offset = torch.stack(distances, dim=-1) - config.reg_scale / 2  # [M, 4]
        left = (bins <= offset.unsqueeze(-1)).sum(-1) - 1
        below, above = left < 0, left >= config.reg_max
        left = left.clamp(0, config.reg_max - 1)
        right_weight = (offset - bins[left]) / (bins[left + 1] - bins[left])
        right_weight = right_weight.masked_fill(below, 0).masked_fill(above, 1)
        logits = layer.edge_logits[image, query].movedim(-1, 1)  # [M, N, 4]
        per_edge = (1 - right_weight) * F.cross_entropy(logits, left, reduction="none")
        per_edge = per_edge + right_weight * F.cross_entropy(logits, left + 1, reduction="none")
        loss = loss + (per_edge.sum(-1) * layer.ious[image][query, box]).sum()
    return {f"loss_fgl{layer.suffix}": config.loss.fgl * loss / norm}


def ddf_term(
    layer: Layer, teacher: Layer, pairs: Sequence[Pairs], balance: tuple[float, float], weights: LossConfig
) -> dict[str, Tensor]:
    """Distillation of the last layer's distributions into one layer, separately for matched queries and the others."""
    assert layer.edge_logits is not None
    assert teacher.edge_logits is not None
    name = f"loss_ddf{layer.suffix}"
    if torch.equal(layer.edge_logits, teacher.edge_logits):
        return {name: 0 * layer.edge_logits.sum()}
    importance = teacher.logits.detach().sigmoid().amax(-1)  # [B, Q]
    matched = torch.zeros_like(importance, dtype=torch.bool)
    for image, (query, box) in enumerate(pairs):
        importance[image, query] = layer.ious[image][query, box]
        matched[image, query] = True
    soft = F.softmax(teacher.edge_logits.detach() / weights.ddf_temperature, dim=-1)
    student = F.log_softmax(layer.edge_logits / weights.ddf_temperature, dim=-1)
    divergence = F.kl_div(student, soft, reduction="none").sum(-1)  # [B, Q, 4]
    element = importance.unsqueeze(-1) * weights.ddf_temperature**2 * divergence
    nothing = 0 * element.sum()
    inside = element[matched].mean() if matched.any() else nothing
    outside = element[~matched].mean() if (~matched).any() else nothing
    near, far = balance
    return {name: weights.ddf * (inside * near + outside * far) / (near + far)}


def to_xyxy(boxes: Tensor) -> Tensor:
    x, y, w, h = boxes.unbind(-1)
    w, h = w.clamp(min=0), h.clamp(min=0)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


def weighting(reg_max: int, up: float, reg_scale: float) -> Tensor:
    """W(n), bin by bin."""
    reach = up * reg_scale
    growth = (reach + 1) ** (2 / (reg_max - 2))
    half = reg_max // 2
    left = [1 - growth ** (half - n) for n in range(1, half)]
    right = [growth ** (n - half) - 1 for n in range(half + 1, reg_max)]
    return torch.tensor([-2 * reach, *left, 0.0, *right, 2 * reach])
