"""Diagnostics of the decoder layers against a plain loop over pairs, SciPy's entropies and torchvision's IoU."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import entropy
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dfine_core import Detector, DetectorOutput, ModelConfig, Targets
from dfine_core.loss.matching import match
from dfine_core.model.distribution import weighting_function
from dfine_core.structures import QueryPredictions
from pipeline.evaluation.decoder_layers import EDGE_NUMBERS, LayerDiagnostics, by_layer
from tests.support import recorded

LAYERS, QUERIES, CLASSES, BINS = 3, 6, 4, 9
CONFIG = ModelConfig.variant(
    "n", num_classes=CLASSES, input_size=(64, 64), num_queries=QUERIES, num_layers=LAYERS, reg_max=BINS - 1
)
CPU = torch.device("cpu")
W = weighting_function(CONFIG.reg_max, CONFIG.up, CONFIG.reg_scale).double().numpy()


def random_output(images: int, seed: int) -> DetectorOutput:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    layers = QueryPredictions(
        logits=draw(LAYERS, images, QUERIES, CLASSES) * 4 - 2,
        boxes=draw(LAYERS, images, QUERIES, 4) * 0.4 + 0.3,
        edge_logits=draw(LAYERS, images, QUERIES, 4, BINS) * 6 - 3,
        initial_logits=draw(images, QUERIES, CLASSES),
        initial_boxes=draw(images, QUERIES, 4) * 0.4 + 0.3,
    )
    return DetectorOutput(layers.logits[-1], layers.boxes[-1], layers)


def targets_of(counts: list[int], seed: int) -> Targets:
    return Targets.pack(recorded.targets(counts, CLASSES, seed), CLASSES, CPU)


def plain_numbers(batches: list[tuple[DetectorOutput, Targets]]) -> dict[str, float]:
    """The same by a loop over pairs."""
    sums: dict[str, float] = {}
    pairs_seen = 0

    def add(name: str, value: float) -> None:
        sums[name] = sums.get(name, 0) + value

    for output, targets in batches:
        layers = output.matching
        assert layers is not None
        assert layers.edge_logits is not None
        pairs = match([(output.logits[None], targets.labels)], output.boxes[None], targets, CONFIG.loss).own
        for image, query, target in zip(pairs.image[0], pairs.query[0], pairs.target[0], strict=True):
            pairs_seen += 1
            true_box = box_convert(targets.boxes[target][None], "cxcywh", "xyxy")
            boxes = {"initial": layers.initial_boxes, **{str(i): layers.boxes[i] for i in range(LAYERS)}}
            for name, box in boxes.items():
                corners = box_convert(box[image, query][None], "cxcywh", "xyxy")
                add(f"layers/iou_{name}", float(box_iou(corners, true_box)))
            for i in range(LAYERS):
                for edge in range(4):
                    logits, last = (layers.edge_logits[k, image, query, edge].double() for k in (i, -1))
                    p = logits.softmax(0).numpy()
                    add(f"layers/entropy_{i}", entropy(p) / 4)
                    add(f"layers/entropy_share_{i}", entropy(p) / math.log(BINS) / 4)
                    add(f"layers/end_mass_{i}", (p[0] + p[-1]) / 4)
                    if i < LAYERS - 1:
                        temperature = CONFIG.loss.ddf_temperature
                        soft, teacher = ((x / temperature).softmax(0).numpy() for x in (logits, last))
                        add(f"layers/divergence_{i}", entropy(teacher, soft) / 4)
    return {name: value / pairs_seen for name, value in sums.items()}


def interval_of(
    probabilities: NDArray[np.float64], box: NDArray[np.float64], edge: int, mass: float
) -> tuple[float, float]:
    """Coordinates of one edge's central interval, by numpy's own interpolation."""
    offsets = np.interp([(1 - mass) / 2, (1 + mass) / 2], probabilities.cumsum() - probabilities / 2, W)
    centre, size = box[edge % 2], box[2 + edge % 2]
    sign = -1 if edge < 2 else 1
    low, high = sorted(centre + sign * (0.5 + offsets / CONFIG.reg_scale) * size)
    return low, high


def test_edges_of_found_objects_equal_a_plain_loop() -> None:
    """Boxes are moved onto their targets for half of the pairs, so that these are found."""
    output, targets = random_output(3, seed=4), targets_of([4, 0, 6], 4)
    layers = output.matching
    assert layers is not None
    assert layers.edge_logits is not None
    boxes = layers.boxes.clone()
    for number, (image, box) in enumerate(zip(targets.image.tolist(), targets.boxes, strict=True)):
        if number % 2:
            boxes[-1, image, number % QUERIES] = box * 1.02
    output = replace(output, boxes=boxes[-1], matching=replace(layers, boxes=boxes))
    diagnostics = LayerDiagnostics(CONFIG, CPU)
    diagnostics.update(output, targets)

    pairs = match([(output.logits[None], targets.labels)], output.boxes[None], targets, CONFIG.loss).own
    inside: dict[tuple[int, float], list[bool]] = defaultdict(list)
    scores, errors = [], defaultdict(list)
    for image, query, target in zip(pairs.image[0], pairs.query[0], pairs.target[0], strict=True):
        true = box_convert(targets.boxes[target][None], "cxcywh", "xyxy")
        last = box_convert(boxes[-1, image, query][None], "cxcywh", "xyxy")
        if box_iou(last, true) < 0.5:
            continue
        initial = layers.initial_boxes[image, query].double().numpy()
        corners, sides = true[0].numpy(), (true[0, 2:] - true[0, :2]).repeat(2).numpy()
        for layer in range(LAYERS):
            for edge in range(4):
                p = layers.edge_logits[layer, image, query, edge].double().softmax(0).numpy()
                for mass in (0.5, 0.9):
                    low, high = interval_of(p, initial, edge, mass)
                    inside[layer, mass].append(bool(low <= corners[edge] <= high))
                if layer == LAYERS - 1:
                    missed = max(low - corners[edge], corners[edge] - high, 0)
                    scores.append((high - low + 20 * missed) / sides[edge])
                    std = np.sqrt(p @ (W - p @ W) ** 2) * initial[2 + edge % 2] / CONFIG.reg_scale
                    errors[int(2 * math.log2(std * 1024))].append((std**2, float(last[0, edge] - corners[edge]) ** 2))
    assert 8 <= len(scores) < 4 * len(pairs)
    bins = [np.sqrt(np.mean(rows, 0)) for rows in errors.values()]
    weights = [len(rows) for rows in errors.values()]
    expected = {
        **{f"layers/coverage_90_{layer}": np.mean(inside[layer, 0.9]) for layer in range(LAYERS)},
        "edges/coverage_50": np.mean(inside[LAYERS - 1, 0.5]),
        "edges/coverage_90": np.mean(inside[LAYERS - 1, 0.9]),
        "edges/interval_score": np.mean(scores),
        "edges/width_error": np.average([abs(std - error) / std for std, error in bins], weights=weights),
    }
    numbers = diagnostics.numbers()
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_states_of_workers_add_up() -> None:
    batches = [(random_output(2, seed=0), targets_of([3, 2], 0)), (random_output(1, seed=1), targets_of([8], 1))]
    together, apart = LayerDiagnostics(CONFIG, CPU), [LayerDiagnostics(CONFIG, CPU) for _ in batches]
    for (output, targets), worker in zip(batches, apart, strict=True):
        together.update(output, targets)
        worker.update(output, targets)
    summed = together.numbers(sum(worker.state() for worker in apart))
    assert summed == pytest.approx(together.numbers(), rel=1e-6, nan_ok=True)


def test_numbers_are_those_of_a_plain_loop() -> None:
    batches = [
        (random_output(2, seed=0), targets_of([3, 0], 0)),
        (random_output(1, seed=1), targets_of([8], 1)),  # more boxes than queries
        (random_output(3, seed=2), targets_of([0, 0, 0], 2)),
    ]
    diagnostics = LayerDiagnostics(CONFIG, CPU)
    for output, targets in batches:
        diagnostics.update(output, targets)
    expected = plain_numbers(batches)
    assert len(expected) == 1 + 4 * LAYERS + LAYERS - 1
    numbers = diagnostics.numbers()
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    edges = numbers.keys() - expected.keys()
    assert edges == {*EDGE_NUMBERS, *(f"layers/coverage_90_{layer}" for layer in range(LAYERS))}


def test_an_untrained_detector_has_the_greatest_entropy() -> None:
    config = ModelConfig.variant("n", num_classes=CLASSES, input_size=(64, 64), num_queries=QUERIES)
    torch.manual_seed(0)
    output = Detector(config).eval()(recorded.images(1, 64, 64, seed=0), every_layer=True)
    diagnostics = LayerDiagnostics(config, CPU)
    diagnostics.update(output, targets_of([2], 0))
    numbers = diagnostics.numbers()
    assert list(by_layer(numbers, "entropy_share").values()) == pytest.approx([1, 1, 1])
    assert list(by_layer(numbers, "entropy").values()) == pytest.approx([math.log(config.num_bins)] * 3)
    assert list(by_layer(numbers, "end_mass").values()) == pytest.approx([2 / config.num_bins] * 3)
    assert list(by_layer(numbers, "divergence").values()) == pytest.approx([0, 0], abs=1e-9)
    assert list(by_layer(numbers, "iou").values()) == pytest.approx([numbers["layers/iou_initial"]] * 4)


def test_direct_regression_has_ious_alone() -> None:
    config = ModelConfig.variant(
        "n", num_classes=CLASSES, input_size=(64, 64), num_queries=QUERIES, regression="direct"
    )
    output = Detector(config).eval()(recorded.images(1, 64, 64, seed=0), every_layer=True)
    diagnostics = LayerDiagnostics(config, CPU)
    diagnostics.update(output, targets_of([2], 0))
    assert list(diagnostics.numbers()) == ["layers/iou_initial", "layers/iou_0", "layers/iou_1", "layers/iou_2"]


def test_without_boxes_every_number_is_nan() -> None:
    diagnostics = LayerDiagnostics(CONFIG, CPU)
    diagnostics.update(random_output(1, seed=0), targets_of([0], 0))
    assert all(math.isnan(value) for value in diagnostics.numbers().values())


def test_an_output_of_the_last_layer_only_is_refused() -> None:
    output = random_output(1, seed=0)
    with pytest.raises(ValueError, match="every_layer=True"):
        LayerDiagnostics(CONFIG, CPU).update(DetectorOutput(output.logits, output.boxes), targets_of([1], 0))
