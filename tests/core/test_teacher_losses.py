"""Losses towards a teacher: published numbers of the feature loss and the weight, arithmetic by hand for edges and boxes."""

import pytest
import torch
from torch import Tensor

from dfine_core import Criterion, Detector, ModelConfig
from dfine_core.boxes import xyxy_to_cxcywh
from dfine_core.loss.teacher_boxes import teacher_box_losses
from dfine_core.loss.teachers import adapted_weight, edge_imitation, edge_loss, feature_loss, moved_distribution
from dfine_core.model.distribution import decode_boxes, expectation, weighting_function
from dfine_core.structures import DetectorOutput, QueryPredictions, Targets

BINS = weighting_function(32, 0.5, 4.0)
CONFIG = ModelConfig.variant("n", num_classes=3, input_size=(64, 64), num_queries=20)


def student_map() -> Tensor:
    return ((torch.arange(24.0) - 11) / 7).view(2, 3, 2, 2).requires_grad_()


def test_the_feature_loss_has_the_published_values() -> None:
    student = student_map()
    loss = feature_loss(student, torch.arange(24.0).sin().view(2, 3, 2, 2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(1.0937746, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.norm()) == pytest.approx(0.2001819, abs=1e-6)
    resized = feature_loss(student_map(), torch.arange(96.0).sin().view(2, 3, 4, 4))
    assert float(resized.detach()) == pytest.approx(1.0955285, abs=1e-6)


@pytest.mark.parametrize(
    ("percent", "weight", "wanted", "tolerance", "default", "expected"),
    [
        (1.0, 15, 2, 0.1, 15, 31.853933),
        (2.05, 15, 2, 0.1, 15, 15),
        (3.0, 15, 2, 0.1, 15, 9.393476),
        (0, 15, 2, 0.1, 15, 15),
        (12.5, 5, 11, 1, 20, 3.888889),
        (8.0, 5, 11, 1, 20, 7.840909),
        (0.01, 20, 2, 0.25, 20, 200),
        (60, 20, 2, 0.25, 20, 2),
    ],
)
def test_a_weight_is_adapted_to_the_published_values(
    percent: float, weight: float, wanted: float, tolerance: float, default: float, expected: float
) -> None:
    goal = {"wanted": wanted / 100, "tolerance": tolerance / 100, "default": default}
    assert adapted_weight(weight, percent / 100, **goal) == pytest.approx(expected, rel=1e-6)
    assert adapted_weight(weight, percent / 100, clean=True, **goal) == default


def test_a_share_beyond_all_gradients_lowers_the_weight_as_far_as_one_epoch_may() -> None:
    assert adapted_weight(10, 1.0, wanted=0.02, tolerance=0.001, default=15) == pytest.approx(1)


# Edges


def edges(seed: int, pairs: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    initial = torch.cat(
        [0.3 + 0.4 * torch.rand(pairs, 2, generator=generator), 0.2 + 0.2 * torch.rand(pairs, 2, generator=generator)],
        1,
    )
    return torch.randn(pairs, 4, 33, generator=generator), initial


def test_edges_of_the_same_initial_box_are_compared_bin_by_bin() -> None:
    (student, initial), (teacher, _) = edges(0), edges(1)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean(-1)
    found = edge_imitation(student, initial, teacher, initial, BINS, 4.0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
    assert edge_imitation(teacher, initial, teacher, initial, BINS, 4.0).abs().max() < 1e-4


def test_an_expected_edge_stays_where_it_is_when_another_box_looks_at_it() -> None:
    """The reach of the other box is wide enough: the outermost bins are left without mass."""
    logits, first = edges(2)
    probabilities = logits.softmax(-1)
    probabilities[..., :6] = probabilities[..., -6:] = 0
    probabilities /= probabilities.sum(-1, keepdim=True)
    second = first * torch.tensor([1.02, 0.98, 1.1, 1.15])
    moved = moved_distribution(probabilities, first, second, BINS, 4.0)
    before = decode_boxes(first, expectation(probabilities, BINS), 4.0)
    after = decode_boxes(second, expectation(moved, BINS), 4.0)
    torch.testing.assert_close(moved.sum(-1), torch.ones(5, 4))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved, probabilities, atol=1e-2)


def targets_of(*boxes: list[float], labels: list[int] | None = None, images: int = 1) -> Targets:
    one = {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels or [0] * len(boxes))}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return Targets.pack([one, *[empty] * (images - 1)], CONFIG.num_classes, torch.device("cpu"))


def test_edges_of_a_detector_teach_the_decoder_and_its_own_copy_has_nothing_to_teach() -> None:
    torch.manual_seed(0)
    student = Detector(CONFIG).train()
    images = torch.rand(1, 3, 64, 64)
    targets = targets_of([0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2], labels=[1, 2])
    output = student(images, targets, False)
    same = edge_loss(output, output, targets, BINS, torch.tensor(2.0), CONFIG)
    assert float(same.detach()) == pytest.approx(0, abs=1e-4)

    torch.manual_seed(1)
    teacher = Detector(CONFIG).eval()
    with torch.no_grad():
        for head in teacher.decoder.dec_bbox_head:
            head.layers[2].weight.normal_(0, 0.2)  # type: ignore[union-attr]
        taught = teacher(images, every_layer=True)
    loss = edge_loss(output, taught, targets, BINS, torch.tensor(2.0), CONFIG)
    assert float(loss.detach()) > 1e-3
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in teacher.parameters())
    assert student.decoder.dec_bbox_head[-1].layers[2].weight.grad.abs().sum() > 0  # type: ignore[union-attr]


# Boxes as a second target set


def training_output(seed: int = 0, images: int = 2) -> DetectorOutput:
    torch.manual_seed(seed)
    output: DetectorOutput = Detector(CONFIG).train()(torch.rand(images, 3, 64, 64), targets_of(images=images), False)
    return output


def losses_of(output: DetectorOutput, targets: Targets, scores: Tensor, unmatched: float = 0.5) -> dict[str, Tensor]:
    return teacher_box_losses(
        output, targets, scores, BINS, torch.tensor(float(max(1, targets.total))), CONFIG, unmatched
    )


def test_true_boxes_as_a_teacher_are_scored_as_the_truth_to_the_bit() -> None:
    """Scores alone: boxes and edges of the truth are trained on the union of all stages' matches."""
    output = training_output()
    targets = targets_of([0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2], labels=[1, 2], images=2)
    truth = Criterion(CONFIG)(output, targets)
    ones = torch.ones(2)
    found = losses_of(output, targets, ones, unmatched=1)
    stages = [value for name, value in truth.items() if name.startswith("loss_vfl")]
    assert len(stages) == CONFIG.num_layers + 2
    assert float(found["vfl"].detach()) == pytest.approx(float(torch.stack(stages).sum().detach()), rel=1e-6)
    assert float(losses_of(output, targets, ones)["vfl"].detach()) < float(found["vfl"].detach())


def test_a_box_without_a_score_costs_nothing_but_the_confidence_of_the_others() -> None:
    output = training_output()
    targets = targets_of([0.5, 0.5, 0.4, 0.4], images=2)
    found = losses_of(output, targets, torch.zeros(1))
    assert all(float(found[name].detach()) == 0 for name in ("bbox", "giou", "fgl"))
    assert float(found["vfl"].detach()) > 0
    silent = losses_of(output, targets, torch.zeros(1), unmatched=0)
    assert all(float(value.detach()) == 0 for value in silent.values())


def one_query(box: list[float]) -> DetectorOutput:
    """Output of a decoder of one layer with a single query, and the same box in every stage."""
    boxes = torch.tensor([[box]], requires_grad=True)
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    matching = QueryPredictions(logits[None], boxes[None], None, logits, boxes)
    return DetectorOutput(logits, boxes, matching, None, None, logits, boxes)


def test_l1_and_giou_of_a_box_are_those_by_hand() -> None:
    """Query .5 .5 .2 .2, teacher .5 .5 .2 .1 with score .4: L1 .04 and GIoU .2 in each of three stages."""
    output = one_query([0.5, 0.5, 0.2, 0.2])
    found = losses_of(output, targets_of([0.5, 0.5, 0.2, 0.1]), torch.tensor([0.4]))
    assert float(found["bbox"].detach()) == pytest.approx(3 * CONFIG.loss.bbox * 0.04, rel=1e-5)
    assert float(found["giou"].detach()) == pytest.approx(3 * CONFIG.loss.giou * 0.2, rel=1e-5)
    # Scores: one matched row of weight p. The IoU .5 is the target of its class, and the weight of the others is alpha s^2.
    softplus = torch.nn.functional.softplus(torch.tensor(0.0))
    row = 0.5 * softplus + 2 * 0.75 * 0.25 * softplus
    assert float(found["vfl"].detach()) == pytest.approx(3 * 0.4 * float(row), rel=1e-5)
    found["giou"].backward()  # type: ignore[no-untyped-call]


def test_an_image_without_boxes_of_a_teacher_is_ordinary() -> None:
    found = losses_of(training_output(), targets_of(images=2), torch.zeros(0))
    assert float(found["bbox"].detach()) == 0
    assert float(found["vfl"].detach()) > 0


def test_more_boxes_than_queries_are_matched_as_far_as_there_are_queries() -> None:
    corners = torch.rand(40, 2) * 0.5
    boxes = xyxy_to_cxcywh(torch.cat([corners, corners + 0.2], 1))
    found = losses_of(training_output(), targets_of(*boxes.tolist(), images=2), torch.full((40,), 0.5))
    assert all(value.isfinite() for value in found.values())
