"""Expected error of an image, and the choice among images, against arithmetic by hand and plain loops."""

import math

import numpy as np
import pytest
import torch

from pipeline.data.prepare.split_off import near_groups
from pipeline.labelling.choose import LEAST_ERROR, choose
from pipeline.labelling.expected_error import doubtful_boxes, entropy


def test_entropy_is_one_bit_at_a_half_and_nothing_where_the_score_is_sure() -> None:
    found = entropy(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).tolist()
    tenth = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert found == pytest.approx([0, tenth, 1, tenth, 0], abs=1e-6)


def test_the_error_of_an_image_is_that_of_its_distinct_boxes() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9.5], [20, 20, 30, 30], [50, 50, 60, 60.0]])
    scores = torch.tensor([[0.5, 0.2], [0.4, 0.3], [0.1, 0.9], [0.05, 0.02]])
    widths = torch.tensor([[0.05] * 4, [0.4] * 4, [0.5] * 4, [0.9] * 4])
    found = doubtful_boxes(scores, boxes, widths)
    # The second repeats the first, the fourth is background; the third's edges are so wide that all of it may be wrong.
    assert found.query.tolist() == [2, 0]
    assert found.labels.tolist() == [1, 0]
    assert found.score_error.tolist() == pytest.approx([-(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)), 1.0], abs=1e-6)
    assert found.edge_error.tolist() == pytest.approx([0.9, 0.5 * 4 * 0.8 * 0.05], abs=1e-6)
    assert found.expected_error == pytest.approx(0.4690 + 1 + 0.9 + 0.08, abs=1e-3)


def test_an_image_without_boxes_has_no_error() -> None:
    found = doubtful_boxes(torch.full((3, 2), 0.01), torch.rand(3, 4), torch.rand(3, 4))
    assert found.expected_error == 0.0
    assert len(found.query) == 0


def test_the_choice_equals_a_plain_loop_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    error, features = rng.random(40).astype(np.float32), rng.normal(size=(40, 6)).astype(np.float32)
    labelled = rng.normal(size=(5, 6)).astype(np.float32)
    centre = np.concatenate([features, labelled]).mean(0)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - centre, b - centre
        return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected: list[int] = []
    for _ in range(8):
        known = [*labelled, *(features[index] for index in expected)]
        gains = {
            n: (error[n] + LEAST_ERROR) * min(distance(features[n], other) for other in known)
            for n in range(40)
            if n not in expected
        }
        expected.append(max(gains, key=lambda n: gains[n]))
    found = choose(error, features, [[n] for n in range(45)], 8, labelled=labelled)
    assert [image.index for image in found.images] == expected


def test_near_duplicates_of_chosen_and_of_labelled_images_are_left_out() -> None:
    error = np.array([5, 4, 3, 2, 1], np.float32)
    features = np.eye(5, 6, dtype=np.float32)
    groups = near_groups([0b1111, 0b0111, 2**40 - 1, 2**63 - 1, None, 2**63 - 1 - 8])
    assert groups == [[0, 1], [2], [3, 5], [4]]
    found = choose(error, features, groups, 5, labelled=np.eye(6, dtype=np.float32)[5:])
    assert [image.index for image in found.images] == [0, 2, 4]
    assert found.images[0].like_it == (1,)
    assert found.already_labelled == 1


def test_images_in_which_nothing_is_found_are_chosen_by_distance() -> None:
    features = np.array([[1, 0], [1, 0.01], [-1, 0], [0, 1]], np.float32)
    found = choose(np.zeros(4, np.float32), features, [[n] for n in range(4)], 3)
    assert {image.index for image in found.images} in ({0, 2, 3}, {1, 2, 3})
