"""Each loss against plain loops written from its formula, and its gradient against finite differences."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.loss.losses import edge_divergence, fine_grained_localization_loss, varifocal_loss
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
