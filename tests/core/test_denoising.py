"""Denoising queries: layout of the slots, distance that boxes moved, and attention mask."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from dfine_core.boxes import cxcywh_to_xyxy
from dfine_core.model.denoising import sample_queries
from dfine_core.structures import DenoisingQueries, Targets
from tests.support import recorded

CPU = torch.device("cpu")


def noised(counts: list[int], seed: int = 0, num_denoising: int = 100) -> tuple[Targets, DenoisingQueries]:
    packed = Targets.pack(recorded.targets(counts, 5, seed), 5, CPU)
    generator = torch.Generator().manual_seed(seed)
    group = sample_queries(
        packed,
        num_classes=5,
        num_queries=30,
        num_denoising=num_denoising,
        label_noise_ratio=0.5,
        box_noise_scale=1.0,
        generator=generator,
    )
    return packed, group


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
def test_slots_follow_the_published_layout(counts: list[int]) -> None:
    _, group = noised(counts)
    most = max(counts)
    assert group.groups == max(1, 100 // most)
    assert group.labels.shape == (len(counts), 2 * most * group.groups)
    for image, count in enumerate(counts):
        slot_in_half = torch.arange(group.labels.shape[1]) % most
        assert torch.equal(group.labels[image] == 5, slot_in_half >= count)  # padding beyond the image's boxes
    # Positive slots in the published order: group by group, box by box.
    for image, count in enumerate(counts):
        mine = group.positive_image == image
        expected = [r * 2 * most + j for r in range(group.groups) for j in range(count)]
        assert group.positive_query[mine].tolist() == expected
        first = sum(counts[:image])
        assert group.positive_target[mine].tolist() == [first + j for _ in range(group.groups) for j in range(count)]


def test_positive_corners_move_less_than_half_a_side_and_negative_ones_further() -> None:
    packed, group = noised([1], seed=3, num_denoising=400)
    true_corners = packed.boxes_xyxy[0]
    size = packed.boxes[0, 2:].repeat(2)
    moved = (cxcywh_to_xyxy(group.reference_logits[0].sigmoid()) - true_corners).abs() / size
    positive = torch.arange(len(moved)) % 2 == 0
    assert moved[positive].max() < 0.5 + 1e-3
    inside = (
        (true_corners - size > 0.01) & (true_corners + size < 0.99)
    ).all()  # clipping at the border shortens moves
    if inside:
        assert moved[~positive].max() > 0.9


def test_a_quarter_of_the_labels_is_redrawn() -> None:
    packed, group = noised([10], seed=1, num_denoising=4000)
    unchanged = (group.labels[0].reshape(-1, 10) == packed.labels).float().mean()
    assert abs(float(unchanged) - (0.75 + 0.25 / 5)) < 0.02


def test_attention_is_blocked_between_groups_and_towards_noise() -> None:
    _, group = noised([2, 1], num_denoising=6)  # 3 groups of 4 slots, 30 matching queries
    mask = group.attention_mask
    slots = 12
    for query in range(slots + 30):
        for key in range(slots + 30):
            if key >= slots:
                blocked = False  # everyone sees the matching queries
            elif query >= slots:
                blocked = True  # which see no noise
            else:
                blocked = query // 4 != key // 4
            assert bool(mask[query, key]) == blocked


def test_a_batch_without_boxes_has_a_group_of_nobody() -> None:
    group = noised([0, 0])[1]
    assert group.labels.shape == (2, 0)
    assert group.reference_logits.shape == (2, 0, 4)
    assert not group.attention_mask.any()


def test_a_published_group_has_our_layout() -> None:
    record = recorded.load("train_s_denoising")
    group = noised(record.case["counts"])[1]
    slots = group.labels.shape[1]
    assert torch.equal(group.attention_mask[:slots, :slots], record.tensor("dn.mask")[:slots, :slots])
    assert group.groups == int(record.arrays["dn.groups"])
    assert torch.equal(group.labels == 5, record.tensor("dn.class") == record.case["num_classes"])


def test_draws_have_the_published_distributions() -> None:
    """Against a plain simulation of the published formula: centres, sizes, labels, and edges that move independently."""
    images, groups, classes = 100, 100, 5
    box, label = (
        torch.tensor([[0.5, 0.45, 0.2, 0.1]]),
        torch.tensor([2]),
    )  # far from the border, where nothing is clipped
    packed = Targets.pack([{"labels": label, "boxes": box}] * images, classes, CPU)
    drawn = sample_queries(
        packed,
        num_classes=classes,
        num_queries=30,
        num_denoising=groups,
        label_noise_ratio=0.5,
        box_noise_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    boxes = (
        drawn.reference_logits.sigmoid().reshape(-1, 2, 4).double().numpy()
    )  # positive and negative slot of each group
    assert len(boxes) == images * groups

    stream = np.random.default_rng(1)
    x, y, w, h = box[0].double().tolist()
    corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    for negative in (0, 1):
        shape = (len(boxes), 4)
        moves = stream.choice([-1, 1], shape) * (stream.random(shape) + negative)
        moved = corners + moves * np.array([w, h, w, h]) / 2
        sides = np.abs(moved[:, 2:] - moved[:, :2])
        expected = np.concatenate([(moved[:, :2] + moved[:, 2:]) / 2, sides], axis=1)
        for column in range(4):
            assert ks_2samp(boxes[:, negative, column], expected[:, column]).pvalue > 1e-3
    positive = np.asarray(cxcywh_to_xyxy(torch.from_numpy(boxes[:, 0]))) - corners
    correlations = np.corrcoef(positive.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / len(boxes) ** 0.5

    counts = torch.bincount(drawn.labels.flatten(), minlength=classes).double() / drawn.labels.numel()
    redrawn = torch.full((classes,), 0.25 / classes, dtype=torch.float64)
    redrawn[2] += 0.75
    deviation = (redrawn * (1 - redrawn) / drawn.labels.numel()) ** 0.5
    assert ((counts - redrawn).abs() < 4 * deviation).all()
