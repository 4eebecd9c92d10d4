"""Hungarian matching of all layers in one pass, and the union of their matches that GO-LSD teaches over.

A *stage* is one set of predictions that is matched on its own: every decoder layer, the initial box, the encoder's choice.
Costs of all stages and images are one tensor, which travels to the host once; assignments are solved there,
and every index that the losses need goes back to the device in one tensor.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy, giou
from dfine_core.config import LossConfig
from dfine_core.cpu import available_cores
from dfine_core.structures import Targets

THREADS = min(8, available_cores())  # solve assignments of large batches

Indices = NDArray[np.int64]


# Class logits [S_i, B, Q, C_i] of stages that share a set of classes, with the labels [T] of the true boxes in these classes.
ClassGroups = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pairs:
    """Assignment of queries to boxes: index tensors [M], or [S, M] where stages differ."""

    image: Tensor
    query: Tensor
    target: Tensor  # into the batch's boxes

    def __len__(self) -> int:
        return self.image.shape[-1]

    def expand(self, stages: int) -> "Pairs":
        """Repeat the pairs for each of several stages, [stages, M]."""
        return Pairs(*(index.expand(stages, -1) for index in (self.image, self.query, self.target)))


@dataclass(frozen=True)
class Matches:
    """Pairs of all stages, and the set that boxes and distributions are trained on."""

    own: Pairs  # [S, M] each stage's own assignment
    union: Pairs  # [M'] the GO union, the same for all stages; a query occurs at most once


def match(class_groups: ClassGroups, boxes: Tensor, targets: Targets, config: LossConfig) -> Matches:
    """Match every stage, and form the GO union.

    Args:
        class_groups: their stages add up to S.
        boxes: [S, B, Q, 4] cxcywh.
    """
    return assign(matching_cost(class_groups, boxes, targets, config), targets)


def assign(cost: Tensor, targets: Targets) -> Matches:
    """Solve the assignments of all stages from their costs [S, T, Q], and form the GO union."""
    stages, _, queries = cost.shape
    query_of = solve(cost.cpu().numpy(), targets.counts)  # the step's one device-to-host copy
    stage, target = np.nonzero(query_of >= 0)
    image = np.repeat(np.arange(len(targets.counts)), targets.counts)[target]
    own = np.stack([image, query_of[stage, target], target])
    union = go_union(own, queries, targets.total)

    indices = torch.from_numpy(np.concatenate([own, union], axis=1))
    if cost.is_cuda:
        indices = indices.pin_memory()
    indices = indices.to(cost.device, non_blocking=True)
    # Every stage matches min(G, Q) boxes of an image, so its pairs are as many as any other's.
    return Matches(
        own=Pairs(*indices[:, : own.shape[1]].reshape(3, stages, -1)),
        union=Pairs(*indices[:, own.shape[1] :]),
    )


@torch.no_grad()
def matching_cost(class_groups: ClassGroups, boxes: Tensor, targets: Targets, config: LossConfig) -> Tensor:
    """Matching cost of every (target, query) pair, [S, T, Q], finite; arguments as of `match`."""

    def of_own_image(x: Tensor) -> Tensor:
        """Repeat [S, B, Q, 4] per target, [S, T, Q, 4], each coordinate in a plane of its own for fast elementwise work."""
        return x.movedim(-1, 0).index_select(2, targets.image).movedim(0, -1)

    # Probabilities of each box's class [S, T, Q]; indices on both sides of a slice put T first.
    probability = torch.cat(
        [logits[:, targets.image, :, labels].sigmoid().transpose(0, 1) for logits, labels in class_groups]
    )
    cost = _class_cost(probability, config)
    l1 = (of_own_image(boxes) - targets.boxes.unsqueeze(1)).abs().sum(-1)
    overlap = giou(of_own_image(cxcywh_to_xyxy(boxes)), targets.boxes_xyxy.unsqueeze(1))
    cost = torch.add(cost, l1, alpha=config.match_bbox).sub_(overlap, alpha=config.match_giou)
    return cost.nan_to_num_(nan=1.0)


def _class_cost(p: Tensor, config: LossConfig) -> Tensor:
    """Focal cost of calling a query by a box's class, from the probability of that class."""
    q = 1 - p
    hit = (p + 1e-8).log() * q**config.match_gamma * (-config.match_class * config.match_alpha)
    miss = (q + 1e-8).log() * p**config.match_gamma * (-config.match_class * (1 - config.match_alpha))
    return hit - miss


def solve(cost: NDArray[np.floating], counts: Sequence[int]) -> Indices:
    """Assign queries to boxes at the least total cost, for each stage and image on its own.

    Args:
        cost: [S, T, Q].
        counts: boxes of each image, adding up to T.

    Returns:
        [S, T] the query of each box; -1 for a box without one, where an image has more boxes than queries.
    """
    from scipy.optimize import linear_sum_assignment  # a driver or a detection never needs it: half a second of CPU

    query_of = np.full(cost.shape[:2], -1, dtype=np.int64)
    ends = np.cumsum(counts)
    blocks = [(s, end - n, end) for s in range(len(cost)) for n, end in zip(counts, ends, strict=True) if n]

    def assign(some: Sequence[tuple[int, int, int]]) -> None:
        for s, start, end in some:
            box, query = linear_sum_assignment(cost[s, start:end])
            query_of[s, start + box] = query

    if cost.size < 500_000:  # handing out work would cost more than it saves
        assign(blocks)
    else:  # SciPy lets go of the interpreter lock while it solves
        list(_threads().map(assign, [blocks[i::THREADS] for i in range(THREADS)]))
    return query_of


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="matching")


def go_union(pairs: Indices, queries: int, total: int) -> Indices:
    """Global-optimal (GO) set of (query, box) pairs over all stages.

    Stages often disagree on which query should take a box. The union lets every query that some stage chose learn that box,
    so that layers are trained towards the same boxes; where stages give one query different boxes, the
    pair that most stages agree on wins, and among equals the box that comes first.

    Args:
        pairs: [3, M] image, query and target of every stage's pairs.
        queries: number per image.
        total: number of boxes in the batch.

    Returns:
        [3, M'] distinct pairs, sorted by image and query; each query at most once, a box any number of times.
    """
    image, query, target = pairs
    slot_and_box, votes = np.unique((image * queries + query) * total + target, return_counts=True)
    slot, box = np.divmod(slot_and_box, max(total, 1))
    order = np.lexsort((box, -votes, slot))
    slot, box = slot[order], box[order]
    best = np.ones(len(slot), dtype=bool)
    best[1:] = slot[1:] != slot[:-1]
    slot, box = slot[best], box[best]
    return np.stack([slot // queries, slot % queries, box])
