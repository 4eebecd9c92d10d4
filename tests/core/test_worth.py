"""Labels of unequal worth: weights in every term and count, and regions that teach nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfine_core import Criterion, Detector, LossConfig, ModelConfig
from dfine_core.boxes import cxcywh_to_xyxy
from dfine_core.loss.worth import mostly_ignored
from dfine_core.structures import DetectorOutput, Targets
from tests.support import recorded

CONFIG = ModelConfig.variant("n", num_classes=4, input_size=(96, 96), num_queries=30, num_denoising=10)
COUNTS = (3, 2)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(CONFIG).train()


def output_for(detector: Detector, targets: list[dict[str, Tensor]]) -> DetectorOutput:
    torch.manual_seed(1)  # denoising queries draw from it
    images = recorded.images(len(targets), *CONFIG.input_size, seed=1)
    output: DetectorOutput = detector(images, targets)
    return output


def truth() -> list[dict[str, Tensor]]:
    return recorded.targets(list(COUNTS), CONFIG.num_classes, 0)


def weighted(weights: list[float]) -> list[dict[str, Tensor]]:
    parts = torch.tensor(weights).split(list(COUNTS))
    return [{**target, "weights": part} for target, part in zip(truth(), parts, strict=True)]


@pytest.mark.parametrize("classification", ["vfl", "mal"])
def test_weights_of_one_change_no_term(detector: Detector, classification: str) -> None:
    config = CONFIG if classification == "vfl" else ModelConfig.variant(
        "n", num_classes=4, input_size=(96, 96), num_queries=30, num_denoising=10, loss=LossConfig(classification="mal")
    )  # fmt: skip
    output = output_for(detector, truth())
    plain = Criterion(config)(output, truth())
    ones = Criterion(config)(output, weighted([1.0] * 5))
    assert plain.keys() == ones.keys()
    for name, term in plain.items():
        assert ones[name].item() == pytest.approx(term.item(), rel=1e-6), name


def test_each_pair_counts_by_its_weight_in_sums_and_divisors(detector: Detector) -> None:
    """L1 and VFL of the last layer by a plain loop over the criterion's own matches."""
    weights = [1.0, 0.75, 0.5, 0.9, 0.3]
    targets = weighted(weights)
    output = output_for(detector, targets)
    criterion = Criterion(CONFIG)
    matches, terms = criterion.match(output, targets), criterion(output, targets)
    packed = Targets.pack(targets, CONFIG.num_classes, torch.device("cpu"))
    last = CONFIG.num_layers - 1
    logits, boxes = output.logits.detach(), output.boxes.detach()

    union = list(zip(*(index.tolist() for index in vars(matches.union).values()), strict=True))
    l1 = sum(weights[t] * float((boxes[b, q] - packed.boxes[t]).abs().sum()) for b, q, t in union)
    pairs = sum(weights[t] for *_, t in union)
    assert terms["loss_bbox"].item() == pytest.approx(CONFIG.loss.bbox * l1 / pairs, rel=1e-5)

    own = list(zip(*(index[last].tolist() for index in vars(matches.own).values()), strict=True))
    at = {(b, q): t for b, q, t in own}
    total = 0.0
    for b in range(len(COUNTS)):
        for q in range(CONFIG.num_queries):
            for c in range(CONFIG.num_classes):
                z = float(logits[b, q, c])
                p = 1 / (1 + math.exp(-z))
                t = at.get((b, q))
                if t is not None and int(packed.labels[t]) == c:
                    y = iou_by_hand(boxes[b, q].tolist(), packed.boxes[t].tolist())
                    total += weights[t] * y * (math.log1p(math.exp(z)) - y * z)
                else:
                    scale = CONFIG.loss.vfl_alpha * p**CONFIG.loss.vfl_gamma
                    total += (1.0 if t is None else weights[t]) * scale * math.log1p(math.exp(z))
    assert terms["loss_vfl"].item() == pytest.approx(CONFIG.loss.vfl * total / sum(weights), rel=1e-4)


def iou_by_hand(one: list[float], other: list[float]) -> float:
    corners = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (one, other)]
    width = min(corners[0][2], corners[1][2]) - max(corners[0][0], corners[1][0])
    height = min(corners[0][3], corners[1][3]) - max(corners[0][1], corners[1][1])
    common = max(width, 0) * max(height, 0)
    return common / (one[2] * one[3] + other[2] * other[3] - common)


def test_a_region_to_ignore_takes_the_score_gradient_of_unmatched_queries_inside_and_of_no_other(
    detector: Detector,
) -> None:
    region = torch.tensor([[0.5, 0.5, 0.6, 0.6]])
    targets = truth()
    ignoring = [{**targets[0], "ignored": region}, targets[1]]
    gradients = []
    for given_targets in (targets, ignoring):
        output = output_for(detector, targets)
        every = output.all_queries()
        assert every is not None
        every.logits.retain_grad()
        output.logits.retain_grad()
        scores = [every.logits, *([output.encoder_logits] if output.encoder_logits is not None else [])]
        criterion = Criterion(CONFIG)
        matches = criterion.match(output, targets)
        terms = criterion(output, given_targets, matches)
        loss = torch.stack([term for name, term in terms.items() if "vfl" in name]).sum()
        gradients.append(torch.autograd.grad(loss, scores, retain_graph=True))
    before, after = (each[0] for each in gradients)  # [L, B, Q, C], denoising queries first

    noised = output.denoising_queries
    assert noised is not None
    first = noised.labels.shape[1]
    taken = {(layer, b, q + first) for layer in range(len(before)) for b, q in zip(
        matches.own.image[layer].tolist(), matches.own.query[layer].tolist(), strict=True)}  # fmt: skip
    taken |= {
        (layer, b, q)
        for layer in range(len(before))
        for b, q in zip(noised.positive_image.tolist(), noised.positive_query.tolist(), strict=True)
    }
    silenced = 0
    corners = cxcywh_to_xyxy(every.boxes.detach())
    for layer in range(len(before)):
        for b in range(len(targets)):
            for q in range(before.shape[2]):
                left, top, right, bottom = corners[layer, b, q].tolist()
                shared = max(0, min(right, 0.8) - max(left, 0.2)) * max(0, min(bottom, 0.8) - max(top, 0.2))
                inside = b == 0 and shared >= 0.5 * (right - left) * (bottom - top)
                if inside and (layer, b, q) not in taken:
                    assert not after[layer, b, q].any()
                    assert before[layer, b, q].any()
                    silenced += 1
                else:
                    torch.testing.assert_close(after[layer, b, q], before[layer, b, q])
    assert silenced > 20
    assert after[:, 1].any()


BOXES = st.lists(st.tuples(*[st.floats(0.05, 1)] * 4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(boxes=BOXES, regions=BOXES, owner=st.lists(st.integers(0, 1), min_size=5, max_size=5))
def test_boxes_in_regions_are_those_of_a_plain_loop(
    boxes: list[tuple[float, ...]], regions: list[tuple[float, ...]], owner: list[int]
) -> None:
    image = torch.tensor(owner[: len(regions)])
    queries = torch.tensor(boxes).expand(3, 2, -1, -1)
    found = mostly_ignored(
        queries, Targets(torch.zeros(0), torch.zeros(0, 4), torch.zeros(0), (0, 0), None, torch.tensor(regions), image)
    )
    for b in range(2):
        for q, (x, y, w, h) in enumerate(boxes):
            shares = []
            for (rx, ry, rw, rh), own in zip(regions, image.tolist(), strict=True):
                across = min(x + w / 2, rx + rw / 2) - max(x - w / 2, rx - rw / 2)
                down = min(y + h / 2, ry + rh / 2) - max(y - h / 2, ry - rh / 2)
                shares.append(max(across, 0) * max(down, 0) / (w * h) if own == b else 0.0)
            if all(abs(share - 0.5) > 1e-5 for share in shares):
                assert found[:, b, q].tolist() == [max(shares) > 0.5] * 3


def test_targets_of_some_images_alone_may_have_weights() -> None:
    packed = Targets.pack([truth()[0], {**truth()[1], "weights": torch.tensor([0.5, 0.25])}], 4, torch.device("cpu"))
    assert packed.weights is not None
    assert packed.weights.tolist() == [1, 1, 1, 0.5, 0.25]
    assert packed.ignored is None
    plain = Targets.pack(truth(), 4, torch.device("cpu"))
    assert (plain.weights, plain.ignored, plain.ignored_image) == (None, None, None)
    with pytest.raises(ValueError, match="image 0 has 3 labels but 1 weights"):
        Targets.pack([{**truth()[0], "weights": torch.ones(1)}], 4, torch.device("cpu"))
