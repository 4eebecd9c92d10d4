"""Drift: values of images by plain loops, false alarms without drift, and power with one."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from dfine_core.uncertainty.drift import (
    LEAST_IMAGES,
    LEVEL,
    MOST_IMAGES,
    DriftReference,
    ImageValues,
    drift_tests,
    image_values,
    make_reference,
)
from tests.support.real_edges import real_detections, real_edges


def real_values() -> list[ImageValues]:
    """Values of the images of a trained detector, from its recorded detections."""
    found, _, _ = real_detections()
    edges = real_edges()
    width = (edges.std / torch.cat([edges.reference_boxes[:, 2:]] * 2, -1)).median(-1).values
    order = torch.randperm(len(width), generator=torch.Generator().manual_seed(0))
    values = []
    for number, image in enumerate(found.image.unique().tolist()):
        scores = found.scores[found.image == image]
        scores = scores[scores >= 0.3]
        if len(scores):
            values.append(ImageValues(float(scores.mean()), float(width[order[number]]), float(len(scores))))
    return values


def test_values_of_an_image_equal_a_loop() -> None:
    scores = torch.tensor([0.9, 0.5, 0.2])
    std = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [100.0] * 4])
    sides = torch.tensor([[10.0, 20.0, 10.0, 20.0], [50.0, 60.0, 50.0, 60.0], [1.0] * 4])
    widths = sorted(std[row, edge].item() / sides[row, edge].item() for row in range(2) for edge in range(4))
    found = image_values(scores, std, sides, 0.5)
    assert found.score == pytest.approx(0.7)
    assert found.width == pytest.approx(widths[3])  # the lower of the two in the middle
    assert found.number == 2
    nothing = image_values(scores, std, sides, 0.95)
    assert nothing.number == 0
    assert math.isnan(nothing.score)
    assert math.isnan(nothing.width)


def test_the_distance_equals_a_loop_over_the_distribution_functions() -> None:
    generator = np.random.default_rng(0)
    old = [ImageValues(*row) for row in generator.random((40, 3)).round(4)]
    new = [ImageValues(*row) for row in (generator.random((30, 3)) ** 1.5).round(4)]
    for index, test in enumerate(drift_tests(old, new)):
        points = [row[index] for row in (*old, *new)]
        shares = [[sum(row[index] <= at for row in rows) / len(rows) for rows in (old, new)] for at in points]
        assert test.distance == pytest.approx(max(abs(a - b) for a, b in shares))


def test_a_reference_travels_as_json_and_a_large_one_is_sampled() -> None:
    images = [ImageValues(0.5, 0.25, 3.0), ImageValues(math.nan, math.nan, 0.0)]
    plain = make_reference(images, 0.3).to_plain()
    assert plain == {"least_score": 0.3, "score": [0.5, None], "width": [0.25, None], "number": [3.0, 0.0]}
    read = DriftReference.from_plain(plain)
    assert read.images[0] == images[0]
    assert math.isnan(read.images[1].score)
    many = make_reference([ImageValues(n / 5000, 0.1, 1.0) for n in range(5000)], 0.3)
    assert len(many.images) == MOST_IMAGES == len(set(many.images))
    assert DriftReference.from_plain(make_reference([], 0.3).to_plain()).images == ()
    for broken in ({}, plain | {"score": [0.5]}, plain | {"least_score": "x"}, plain | {"number": 3}):
        with pytest.raises(ValueError, match="reference of drift cannot be read"):
            DriftReference.from_plain(broken)


def test_few_images_give_no_verdict() -> None:
    values = [ImageValues(0.5, 0.1, 1.0)] * LEAST_IMAGES
    for test in drift_tests(values, values[:-1]):
        assert not test.moved
        assert math.isnan(test.p_value)
    assert [test.p_value for test in drift_tests(values, values)] == [1.0, 1.0, 1.0]


def test_false_alarms_stay_at_the_level_when_halves_of_the_same_images_are_compared() -> None:
    values = real_values()
    assert len(values) > 200
    generator = np.random.default_rng(0)
    repeats, level, alarms = 400, 0.05, 0
    for _ in range(repeats):
        order = generator.permutation(len(values))
        old, new = ([values[index] for index in half] for half in np.array_split(order, 2))
        alarms += any(test.moved for test in drift_tests(old, new, level))
    assert 0 < alarms <= binom.ppf(0.999, repeats, level)


def test_a_shift_of_any_value_is_found() -> None:
    values = real_values()
    old, new = values[::2], values[1::2]
    assert not any(test.moved for test in drift_tests(old, new))
    shifts = {
        "score": [row._replace(score=0.9 * row.score) for row in new],
        "width": [row._replace(width=1.3 * row.width) for row in new],
        "number": [row._replace(number=4 * row.number) for row in new],
    }
    for name, shifted in shifts.items():
        moved = [test for test in drift_tests(old, shifted) if test.moved]
        assert [test.name for test in moved] == [name]
        assert moved[0].p_value < LEVEL / 3
        assert moved[0].medians[0] != moved[0].medians[1]
