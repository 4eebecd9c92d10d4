"""Losses as functions of tensors; the criterion decides which prediction is compared with which box.

Letters: S stages (or layers) side by side, M pairs, Q queries, N bins. A loss that is computed for S stages at once returns [S].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.config import LossConfig
from dfine_core.model.distribution import bracketing_bins


def classification_loss(
    logits: Tensor,
    index: tuple[Tensor, Tensor, Tensor, Tensor],
    ious: Tensor,
    config: LossConfig,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """VFL or MAL, as configured; arguments and result are those of `varifocal_loss`."""
    if config.classification == "vfl":
        return varifocal_loss(logits, index, ious, config.vfl_alpha, config.vfl_gamma, real)
    return matchability_aware_loss(logits, index, ious, config.mal_alpha, config.mal_gamma, real)


def varifocal_loss(
    logits: Tensor,
    index: tuple[Tensor, Tensor, Tensor, Tensor],
    ious: Tensor,
    alpha: float,
    gamma: float,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """VFL: scores learn to predict the IoU of their box.

    A matched entry is pulled towards the IoU of its box and weighs as much; every other entry is pulled towards 0 and
    weighs alpha * score ** gamma, so that only confident mistakes count.

    Args:
        logits: [S, B, Q, C].
        index: stage, image, query and class of the matched entries, broadcasting to [S, M]; none twice.
        ious: [S, M] of predicted and true box; a target, so no gradient flows through it.
        real: [M] 1, or 0 for an entry that only pads: it repeats another one, or all are pads.

    Returns:
        Two parts, for sums over any queries: the loss is the sum of the first, [S, B, Q], less that of the second, [S, M].

    Source: Zhang et al., arXiv:2008.13367.
    """
    target = ious.detach().to(logits.dtype)
    weight = alpha * logits.detach().sigmoid() ** gamma
    weight[index] = target if real is None else torch.where(real.amax() > 0, target, weight[index])
    # The cross-entropy of z towards y is softplus(z) - y z, and y is 0 almost everywhere.
    hits = target**2 * logits[index]
    return (weight * F.softplus(logits)).sum(-1), hits if real is None else hits * real


def matchability_aware_loss(
    logits: Tensor,
    index: tuple[Tensor, Tensor, Tensor, Tensor],
    ious: Tensor,
    alpha: float | None,
    gamma: float,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MAL: scores learn to predict a power of the IoU of their box, and poor matches count in full.

    A matched entry is pulled towards IoU ** gamma with a weight of 1, where VFL's weight vanishes with the IoU; every other
    entry is pulled towards 0 and weighs alpha * score ** gamma. Arguments and result are those of `varifocal_loss`.

    Args:
        alpha: None stands for 1.

    Source: DEIM, arXiv:2412.04234, equation 3.
    """
    target = (ious.detach() ** gamma).to(logits.dtype)
    weight = logits.detach().sigmoid() ** gamma
    if alpha is not None:
        weight = alpha * weight
    weight[index] = 1 if real is None else torch.where(real.amax() > 0, 1, weight[index])
    hits = target * logits[index]
    return (weight * F.softplus(logits)).sum(-1), hits if real is None else hits * real


def fine_grained_localization_loss(edge_logits: Tensor, target_offsets: Tensor, bins: Tensor, ious: Tensor) -> Tensor:
    """FGL, [S, M] summed over edges: cross-entropy towards the two bins around each true edge, weighted by IoU.

    The two bins share the target by their distance to the true offset, so the least loss is at a distribution whose
    expectation is that offset. Boxes that already fit weigh more: fine-grained steps are theirs to learn.

    Args:
        edge_logits: [S, M, 4, N] distributions over offsets of the left, top, right, bottom edge.
        target_offsets: [M, 4] true offsets, in units of W(n); clamped to the range of `bins`.
        bins: [N] ascending values of W(n).
        ious: [S, M] of predicted and true box; a weight, so no gradient flows through it.

    Source: D-FINE, arXiv:2410.13842, equation 6.
    """
    bracket, share = bracketing_bins(target_offsets, bins)  # [M, 4, 2]
    bracket = bracket.expand(*edge_logits.shape[:-1], 2)
    log_likelihood = (F.log_softmax(edge_logits, dim=-1).gather(-1, bracket) * share).sum((-1, -2))  # [S, M]
    return log_likelihood * -ious.detach()


def edge_divergence(edge_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of every layer's edge distributions from the last layer's, which DDF, the loss of GO-LSD, lets them learn.

    Both are softened by the temperature; mean over the four edges.

    Args:
        edge_logits: [L, B, Q, 4, N]; no gradient flows into the last layer.

    Returns:
        [L - 1, B, Q].

    Source: D-FINE, arXiv:2410.13842, equations 7-8.
    """
    divergence: Tensor = _EdgeDivergence.apply(edge_logits, temperature)
    return divergence


class _EdgeDivergence(torch.autograd.Function):
    """`edge_divergence`, whose gradient is the difference of two distributions.

    It keeps the logits alone, which exist anyway; autograd would keep the distributions of every layer too.
    """

    @staticmethod
    def forward(ctx: Any, edge_logits: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(edge_logits)
        ctx.temperature = temperature
        log_probabilities = F.log_softmax(edge_logits / temperature, dim=-1)
        student, teacher = log_probabilities[:-1], log_probabilities[-1]
        return (teacher.exp() * (teacher - student)).sum((-1, -2)) * (temperature**2 / 4)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (edge_logits,), temperature = ctx.saved_tensors, ctx.temperature
        probabilities = F.softmax(edge_logits / temperature, dim=-1)
        scale = (gradients[0] * (temperature / 4)).unsqueeze(-1).unsqueeze(-1)
        learned = probabilities - probabilities[-1]  # 0 in the last layer, the teacher
        learned[:-1].mul_(scale)
        return learned, None
