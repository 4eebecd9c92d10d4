"""Box arithmetic against torchvision, and cases that torchvision does not define."""

import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from dfine_core.boxes import cxcywh_to_xyxy, giou, inverse_sigmoid, iou, xyxy_to_cxcywh


def random_boxes(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 4, generator=generator) * torch.tensor([1, 1, 0.6, 0.6]) + torch.tensor([0, 0, 0.01, 0.01])


def test_formats_agree_with_torchvision() -> None:
    boxes = random_boxes(50)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), corners)
    torch.testing.assert_close(xyxy_to_cxcywh(corners), boxes)


def test_elementwise_overlaps_are_the_diagonal_of_torchvisions() -> None:
    a, b = cxcywh_to_xyxy(random_boxes(60)), cxcywh_to_xyxy(random_boxes(60).flip(0))
    torch.testing.assert_close(iou(a, b), box_iou(a, b).diagonal())
    torch.testing.assert_close(giou(a, b), generalized_box_iou(a, b).diagonal())
    torch.testing.assert_close(giou(a[:, None], b), generalized_box_iou(a, b))  # pairwise by broadcasting


def test_empty_boxes_overlap_nothing_and_stay_finite() -> None:
    point = torch.tensor([[0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    value = giou(point, torch.tensor([[0.3, 0.3, 0.3, 0.3]]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert point.grad is not None
    assert torch.isfinite(point.grad).all()


def test_a_negative_size_counts_as_empty() -> None:
    corners = cxcywh_to_xyxy(torch.tensor([0.5, 0.5, -0.2, 0.2]))
    torch.testing.assert_close(corners, torch.tensor([0.5, 0.4, 0.5, 0.6]))


def test_inverse_sigmoid_undoes_sigmoid_and_is_bounded() -> None:
    logits = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(logits.sigmoid()), logits)
    assert torch.isfinite(inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))).all()
