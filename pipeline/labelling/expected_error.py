"""Expected error of a detector in an image, from its own doubts: unsure scores and wide edges."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

LEAST_SCORE = 0.1  # weaker queries are background: there are hundreds of them in every image
SAME_OBJECT = 0.6  # IoU from which the weaker of two queries is a repetition, whatever its class
ERROR_PER_STD = 0.8  # mean |error| of an edge, by its standard deviation: sqrt(2 / pi) of a normal one


@dataclass(frozen=True)
class DoubtfulBoxes:
    """K distinct boxes of one image, best first, and how wrong each one may be."""

    query: Tensor  # [K] int64
    labels: Tensor  # [K] int64
    scores: Tensor  # [K]
    score_error: Tensor  # [K] entropy of the score in bits: 1 at 0.5, 0 at 0 and 1
    edge_error: Tensor  # [K] IoU that a right box is expected to lose by its edges, times the score

    @property
    def expected_error(self) -> float:
        """Boxes of the image that are expected to be wrong, or badly placed."""
        return float((self.score_error + self.edge_error).sum())


def doubtful_boxes(scores: Tensor, boxes: Tensor, relative_std: Tensor) -> DoubtfulBoxes:
    """Find the distinct boxes of one image.

    Args:
        scores: [Q, C] of every query and class, in [0, 1].
        boxes: [Q, 4] xyxy.
        relative_std: [Q, 4] standard deviation of every edge over the side that it bounds.
    """
    best, labels = scores.max(-1)
    query = (best >= LEAST_SCORE).nonzero().squeeze(1)
    query = query[nms(boxes[query].float(), best[query].float(), SAME_OBJECT)]  # best first
    kept = best[query]
    lost = (ERROR_PER_STD * relative_std[query].sum(-1)).clamp(max=1)
    return DoubtfulBoxes(query, labels[query], kept, entropy(kept), kept * lost)


def entropy(score: Tensor) -> Tensor:
    """Entropy of a yes-or-no question with this probability, in bits."""
    return (torch.special.entr(score) + torch.special.entr(1 - score)) / torch.log(torch.tensor(2.0))
