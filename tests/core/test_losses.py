"""Each loss against plain loops written from its formula, and its gradient against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy, iou_and_giou
from dfine_core.loss.losses import (
    edge_divergence,
    fine_grained_localization_loss,
    matchability_aware_loss,
    varifocal_loss,
)
from dfine_core.model.distribution import weighting_function


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(parts: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of each stage, from the parts that `varifocal_loss` returns."""
    return parts[0].sum((1, 2)) - parts[1].sum(1)


VFL_INDEX = (
    torch.tensor([[0], [1]]),
    torch.tensor([[0, 1, 1], [0, 1, 1]]),
    torch.tensor([[2, 0, 3], [1, 0, 2]]),
    torch.tensor([[0, 4, 1], [0, 4, 1]]),
)


def test_varifocal_loss_equals_a_plain_loop() -> None:
    logits, ious = numbers(2, 2, 4, 5), numbers(2, 3, seed=1).sigmoid()
    iou_target = torch.zeros_like(logits)
    iou_target[VFL_INDEX] = ious
    expected = [0.0, 0.0]
    for stage in range(2):
        for z, y in zip(logits[stage].flatten().tolist(), iou_target[stage].flatten().tolist(), strict=True):
            p = 1 / (1 + math.exp(-z))
            cross_entropy = -y * math.log(p) - (1 - y) * math.log(1 - p)
            expected[stage] += (y if y > 0 else 0.75 * p**2) * cross_entropy
    found = total(varifocal_loss(logits, VFL_INDEX, ious, 0.75, 2.0))
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_varifocal_gradient_treats_weights_as_constants() -> None:
    logits, ious = numbers(2, 2, 4, 5).requires_grad_(), numbers(2, 3, seed=1).sigmoid()
    total(varifocal_loss(logits, VFL_INDEX, ious, 0.75, 2.0)).sum().backward()
    iou_target = torch.zeros_like(logits)
    iou_target[VFL_INDEX] = ious
    p = logits.detach().sigmoid()
    weight = torch.where(iou_target > 0, iou_target, 0.75 * p**2)
    torch.testing.assert_close(logits.grad, weight * (p - iou_target))


# Two images of four queries with the published value, and some of the published gradients, for each (gamma, alpha).
MAL_LOGITS = (
    ((-2, 0.5, 1), (0, -1, 2), (1.5, -0.5, -3), (-4, 0.25, 0.75)),
    ((0.3, 0.2, 0.1), (-1.2, 2.2, -0.7), (0, 0, 0), (3, -3, 1)),
)
MAL_PREDICTED = ((0.5, 0.5, 0.4, 0.4), (0.7, 0.6, 0.2, 0.3), (0.25, 0.25, 0.3, 0.3))  # the matched queries
MAL_TRUE = ((0.52, 0.5, 0.4, 0.36), (0.72, 0.6, 0.2, 0.3), (0.3, 0.25, 0.3, 0.3))
MAL_INDEX = (
    torch.tensor([[0]]),
    torch.tensor([[0, 0, 1]]),
    torch.tensor([[0, 2, 1]]),
    torch.tensor([[2, 0, 1]]),
)
PUBLISHED_MAL = {
    (1.5, None): (
        3.7482691,
        (
            (0.00163529, 0.10189579, -0.00300501),
            (0.05892557, 0.01250325, 0.24269921),
            (0.00859290, 0.09885597, 0.02114023),
        ),
        0.4947372,
    ),
    (1.5, 0.75): (
        2.9896584,
        (
            (0.00122647, 0.07642184, -0.00300501),
            (0.04419417, 0.00937744, 0.18202440),
            (0.00644468, 0.09885597, 0.01585517),
        ),
        0.3771626,
    ),
    (2.0, None): (
        3.4590416,
        (
            (0.00056460, 0.08039179, 0.02054558),
            (0.04166667, 0.00648413, 0.22777511),
            (0.00413421, 0.13001516, 0.01217744),
        ),
        0.4575594,
    ),
}


def mal_example() -> tuple[Tensor, Tensor]:
    """Logits [1, 2, 4, 3] and IoUs [1, 3] of the published example."""
    predicted, true = (cxcywh_to_xyxy(torch.tensor(boxes)) for boxes in (MAL_PREDICTED, MAL_TRUE))
    return torch.tensor([MAL_LOGITS], requires_grad=True), iou_and_giou(predicted, true)[0].unsqueeze(0)


@pytest.mark.parametrize(("gamma", "alpha"), list(PUBLISHED_MAL))
def test_matchability_aware_loss_has_the_published_value_and_gradient(gamma: float, alpha: float | None) -> None:
    logits, ious = mal_example()
    assert ious[0].tolist() == pytest.approx([0.8181821, 0.8181815, 0.7142857], abs=1e-6)
    loss = total(matchability_aware_loss(logits, MAL_INDEX, ious, alpha, gamma)).sum() / 3
    loss.backward()
    value, gradients, norm = PUBLISHED_MAL[gamma, alpha]
    assert loss.item() == pytest.approx(value, abs=2e-6)
    found = logits.grad[0][[0, 0, 1], [0, 1, 1]]
    torch.testing.assert_close(found, torch.tensor(gradients), rtol=0, atol=2e-7)
    assert logits.grad.norm().item() == pytest.approx(norm, abs=2e-7)


def test_varifocal_loss_of_the_same_example_is_the_published_one() -> None:
    logits, ious = mal_example()
    loss = total(varifocal_loss(logits, MAL_INDEX, ious, 0.75, 2.0)).sum() / 3
    assert loss.item() == pytest.approx(2.4023545, abs=2e-6)


def test_matchability_aware_loss_without_a_match_pushes_everything_down() -> None:
    logits = numbers(1, 2, 4, 5)
    none = tuple(torch.zeros(1, 0, dtype=torch.int64) for _ in range(4))
    found = total(matchability_aware_loss(logits, none, logits.new_zeros(1, 0), None, 1.5))
    torch.testing.assert_close(found, (logits.sigmoid() ** 1.5 * F.softplus(logits)).sum((1, 2, 3)))


def test_a_match_without_overlap_is_a_negative_of_full_weight() -> None:
    logits = numbers(1, 1, 2, 3).requires_grad_()
    index = tuple(torch.tensor([[position]]) for position in (0, 0, 1, 2))
    ious = torch.zeros(1, 1, dtype=torch.float64)
    total(matchability_aware_loss(logits, index, ious, None, 1.5)).sum().backward()
    assert logits.grad[0, 0, 1, 2].item() == pytest.approx(logits[0, 0, 1, 2].sigmoid().item())


def test_fine_grained_localization_equals_the_bins_own_cross_entropy() -> None:
    bins = weighting_function(8, 0.5, 4).double()
    edge_logits, ious = numbers(2, 3, 4, 9), numbers(2, 3, seed=2).sigmoid()
    offsets = numbers(3, 4, seed=3) * 3  # some beyond the outermost bins
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for stage in range(2):
        for pair in range(3):
            for edge in range(4):
                offset = min(max(float(offsets[pair, edge]), float(bins[0])), float(bins[-1]))
                n = max(i for i in range(8) if bins[i] <= offset)
                right = (offset - float(bins[n])) / float(bins[n + 1] - bins[n])
                nll = -F.log_softmax(edge_logits[stage, pair, edge], -1)
                expected[stage, pair] += ious[stage, pair] * ((1 - right) * nll[n] + right * nll[n + 1])
    torch.testing.assert_close(fine_grained_localization_loss(edge_logits, offsets, bins, ious), expected)


def test_divergence_is_that_of_softened_distributions_averaged_over_edges() -> None:
    edge_logits, temperature = numbers(3, 2, 3, 4, 9), 5.0
    for student, found in zip(edge_logits[:-1], edge_divergence(edge_logits, temperature), strict=True):
        divergence = F.kl_div(
            F.log_softmax(student / temperature, -1), F.softmax(edge_logits[-1] / temperature, -1), reduction="none"
        )
        torch.testing.assert_close(found, divergence.sum(-1).mean(-1) * temperature**2)


def test_gradients_agree_with_finite_differences() -> None:
    bins = weighting_function(6, 0.5, 4).double()
    offsets, ious = numbers(2, 4, seed=1), numbers(2, 2, seed=2).sigmoid()
    edge_logits = numbers(2, 2, 4, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fine_grained_localization_loss(x, offsets, bins, ious), edge_logits)

    layers = numbers(3, 1, 2, 4, 7, seed=5)
    students = layers[:-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: edge_divergence(torch.cat([x, layers[-1:]]), 5.0), students)


def test_a_student_that_equals_its_teacher_costs_and_learns_nothing() -> None:
    logits = numbers(1, 2, 3, 4, 9).expand(2, -1, -1, -1, -1).clone().requires_grad_()
    loss = edge_divergence(logits, 5.0)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15


def test_the_teacher_gets_no_gradient() -> None:
    logits = numbers(3, 2, 3, 4, 9).requires_grad_()
    edge_divergence(logits, 5.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad[-1].abs().max() == 0
    assert logits.grad[:-1].abs().max() > 0
