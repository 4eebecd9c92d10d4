"""Each loss against plain loops written from its formula, and its gradient against finite differences."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.loss.losses import (
    box_losses,
    decoupled_distillation_focal_loss,
    fine_grained_localization_loss,
    varifocal_loss,
)
from dfine_core.model.distribution import weighting_function


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    torch.testing.assert_close(varifocal_loss(logits, VFL_INDEX, ious, 0.75, 2.0), torch.tensor(expected).double())


def test_varifocal_gradient_treats_weights_as_constants() -> None:
    logits, ious = numbers(2, 2, 4, 5).requires_grad_(), numbers(2, 3, seed=1).sigmoid()
    varifocal_loss(logits, VFL_INDEX, ious, 0.75, 2.0).sum().backward()
    iou_target = torch.zeros_like(logits)
    iou_target[VFL_INDEX] = ious
    p = logits.detach().sigmoid()
    weight = torch.where(iou_target > 0, iou_target, 0.75 * p**2)
    torch.testing.assert_close(logits.grad, weight * (p - iou_target))


def test_fine_grained_localization_equals_the_bins_own_cross_entropy() -> None:
    bins = weighting_function(8, 0.5, 4).double()
    edge_logits, ious = numbers(2, 3, 4, 9), numbers(2, 3, seed=2).sigmoid()
    offsets = numbers(3, 4, seed=3) * 3  # some beyond the outermost bins
    expected = torch.zeros(2, dtype=torch.float64)
    for stage in range(2):
        for pair in range(3):
            for edge in range(4):
                offset = min(max(float(offsets[pair, edge]), float(bins[0])), float(bins[-1]))
                n = max(i for i in range(8) if bins[i] <= offset)
                right = (offset - float(bins[n])) / float(bins[n + 1] - bins[n])
                nll = -F.log_softmax(edge_logits[stage, pair, edge], -1)
                expected[stage] += ious[stage, pair] * ((1 - right) * nll[n] + right * nll[n + 1])
    torch.testing.assert_close(fine_grained_localization_loss(edge_logits, offsets, bins, ious), expected)


def test_distillation_equals_two_averages_of_kl_divergence() -> None:
    student, teacher = numbers(2, 2, 3, 4, 9), numbers(2, 3, 4, 9, seed=4)
    weights = numbers(2, 2, 3, seed=5).sigmoid()
    matched = torch.tensor([[True, False, False], [False, True, False]])
    near, far, temperature = math.sqrt(2), math.sqrt(4), 5.0
    for stage, value in enumerate(
        decoupled_distillation_focal_loss(student, teacher, weights, matched, (near, far), temperature)
    ):
        divergence = F.kl_div(
            F.log_softmax(student[stage] / temperature, -1),
            F.softmax(teacher / temperature, -1),
            reduction="none",
        ).sum(-1)
        element = divergence * temperature**2 * weights[stage].unsqueeze(-1)
        inside, outside = element[matched].mean(), element[~matched].mean()
        torch.testing.assert_close(value, (inside * near + outside * far) / (near + far))


def test_gradients_agree_with_finite_differences() -> None:
    bins = weighting_function(6, 0.5, 4).double()
    offsets, ious = numbers(2, 4, seed=1), numbers(2, 2, seed=2).sigmoid()
    edge_logits = numbers(2, 2, 4, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fine_grained_localization_loss(x, offsets, bins, ious), edge_logits)

    teacher, weights = numbers(1, 2, 4, 7, seed=3), numbers(2, 1, 2, seed=4).sigmoid()
    students = numbers(2, 1, 2, 4, 7, seed=5).requires_grad_()
    matched = torch.tensor([[True, False]])
    assert torch.autograd.gradcheck(
        lambda x: decoupled_distillation_focal_loss(x, teacher, weights, matched, (1.0, 2.0), 5.0), students
    )

    boxes = (numbers(2, 3, 4, seed=6).sigmoid() * 0.4 + 0.2).requires_grad_()
    target_boxes = numbers(3, 4, seed=7).sigmoid() * 0.4 + 0.2
    assert torch.autograd.gradcheck(lambda x: torch.stack(box_losses(x, target_boxes)), boxes)


def test_a_student_that_equals_its_teacher_costs_and_learns_nothing() -> None:
    logits = numbers(1, 2, 3, 4, 9).requires_grad_()
    matched = torch.zeros(2, 3, dtype=torch.bool)
    weights = torch.ones(1, 2, 3, dtype=torch.float64)
    loss = decoupled_distillation_focal_loss(logits, logits[0], weights, matched, (0.0, 1.0), 5.0)
    loss.sum().backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15
