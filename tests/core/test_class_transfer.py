"""Class heads carried over by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.class_transfer import (
    coco_categories,
    coco_names,
    match_classes,
    objects365_names,
    synonym_groups,
    transfer_classes,
)
from dfine_core.checkpoints.weights import load_weights

# For each COCO class in order, the 0-based index of the Objects365 category that published fine-tuning takes it from.
# fmt: off
COCO_IN_OBJECTS365 = [
    0, 46, 5, 58, 114, 55, 116, 65, 21, 40, 176, 127, 249, 24, 56, 139, 92, 78, 99, 96,
    144, 295, 178, 180, 38, 39, 13, 43, 120, 219, 148, 173, 165, 154, 137, 113, 145, 146, 204, 8,
    35, 10, 88, 84, 93, 26, 112, 82, 265, 104, 141, 152, 234, 143, 150, 97, 2, 50, 25, 75,
    98, 153, 37, 73, 115, 132, 106, 61, 163, 134, 277, 81, 133, 18, 94, 30, 169, 70, 328, 226,
]
VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on


def config(num_classes: int, **settings: str) -> ModelConfig:
    return ModelConfig.variant("n", num_classes=num_classes, input_size=(256, 256), num_queries=50, **settings)


def test_every_coco_class_comes_from_the_published_objects365_row() -> None:
    match = match_classes(objects365_names(), coco_names())
    assert [row.source for row in match.rows] == [index + 1 for index in COCO_IN_OBJECTS365]


def test_the_synonyms_work_backwards() -> None:
    match = match_classes(coco_names(), [name for name in objects365_names() if name])
    sources = {row: entry.source for row, entry in enumerate(match.rows) if entry.source is not None}
    assert sources == {index: coco for coco, index in enumerate(COCO_IN_OBJECTS365)}


def test_coco_ids_are_the_80_of_its_91_that_are_in_use() -> None:
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    assert [category for category, _ in coco_categories()] == sorted(set(range(1, 92)) - unused)


def test_objects365_has_a_blank_row_and_365_names() -> None:
    first, *names = objects365_names()
    assert first is None
    assert len(set(names)) == 365


def test_every_voc_class_is_among_coco() -> None:
    match = match_classes(coco_names(), VOC)
    assert not match.new
    assert coco_names()[match.rows[VOC.index("tvmonitor")].source or 0] == "tv"


@pytest.mark.parametrize(
    ("source", "target", "how"),
    [
        ("traffic light", "traffic light", "exact"),
        ("traffic light", "Traffic_Light", "normalised"),
        ("T-shirt", "tshirt", "normalised"),
        ("café table", "CAFÉ  TABLE", "normalised"),
        ("car", "Cars", "plural"),
        ("Buses", "bus", "plural"),
        ("wine glasses", "wine glass", "plural"),
        ("cookie", "cookies", "plural"),
        ("berries", "berry", "plural"),
        ("potato", "potatoes", "plural"),
        ("shoe", "shoes", "plural"),
        ("couch", "sofas", "synonym"),
        ("Wild Bird", "bird", "synonym"),
        ("Bowl/Basin", "bowls", "part"),
        ("tv", "Monitor/TV", "part"),
        ("television", "Moniter/TV", "part"),
    ],
)
def test_names_are_found(source: str, target: str, how: str) -> None:
    (row,) = match_classes([None, "drone", source], [target]).rows
    assert (row.source, row.source_name, row.how) == (2, source, how)


@pytest.mark.parametrize(
    ("source", "target"),
    [("glass", "gas"), ("bus", "bu"), ("car", "care"), ("cap", "cape"), ("baseball bat", "baseball"), ("cat", "猫")],
)
def test_names_that_differ_are_not_confused(source: str, target: str) -> None:
    match = match_classes([source, "anchor"], [target, "anchor"])
    assert match.new == (target,)


def test_a_stricter_comparison_wins() -> None:
    names = ["sofa", "couches", "Couch", "couch"]
    assert [match_classes(names[:n], ["couch"]).rows[0].source for n in (4, 3, 2, 1)] == [3, 2, 1, 0]


def test_among_equal_matches_the_lowest_row_wins_and_the_report_names_the_others() -> None:
    match = match_classes(["Cup/Mug", "Mug/Jar"], ["mug"])
    (row,) = [row for row in match.rows if row.passed_over]
    assert (row.source, row.passed_over) == (0, ("Mug/Jar",))
    assert "mug <- Cup/Mug (part), rather than Mug/Jar" in str(match)


def test_own_synonyms_extend_the_table() -> None:
    assert match_classes(["truck", "car"], ["juggernaut", "car"]).new == ("juggernaut",)
    own = [*synonym_groups(), ("juggernaut", "truck")]
    assert match_classes(["truck", "car"], ["juggernaut", "car"], synonyms=own).rows[0].how == "synonym"


def test_the_report_names_new_and_unused_classes() -> None:
    match = match_classes(["person", "Couch", "kite"], ["person", "sofa", "drone"])
    assert match.new == ("drone",)
    assert match.unused == ("kite",)
    assert str(match).splitlines() == [
        "2 of 3 classes carried over (1 exact, 1 synonym)",
        "  sofa <- Couch (synonym)",
        "  new: drone",
        "  unused: kite",
    ]


def test_no_match_at_all_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"no class of the target \(drone\) is among those of the source \(person, cat\)"
    ):
        match_classes([None, "person", "cat", " "], ["drone"])


@given(st.permutations(range(80)), st.integers(1, 80))
def test_a_shuffled_selection_finds_its_way_back(order: list[int], count: int) -> None:
    some = order[:count]
    match = match_classes(coco_names(), [coco_names()[i].upper() for i in some])
    assert [row.source for row in match.rows] == some


def test_rows_travel_with_their_class_and_new_ones_start_fresh() -> None:
    torch.manual_seed(0)
    source, target = Detector(config(4)), Detector(config(3))
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    fresh = target.state_dict()
    match = match_classes([None, "Person", "sofa", "kite"], ["couch", "drone", "people"])
    weights = transfer_classes(source.state_dict(), fresh, match)

    heads = [f"decoder.dec_score_head.{layer}" for layer in range(3)] + ["decoder.enc_score_head"]
    for key in [f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")]:
        assert torch.equal(weights[key], torch.stack([before[key][2], fresh[key][1], before[key][1]]))
    key = "decoder.denoising_class_embed.weight"
    assert torch.equal(weights[key], torch.stack([before[key][2], fresh[key][1], before[key][1], torch.zeros(128)]))
    others = [key for key in before if "score_head" not in key and "class_embed" not in key]
    assert all(torch.equal(weights[key], before[key]) for key in others)
    assert all(torch.equal(source.state_dict()[key], before[key]) for key in before)
    load_weights(target, weights)


def test_reordered_classes_predict_the_same_in_the_new_order() -> None:
    torch.manual_seed(0)
    source, target = Detector(config(3)).eval(), Detector(config(3)).eval()
    names = ["person", "cat", "dog"]
    match = match_classes(names, ["Dogs", "person", "cat"])
    load_weights(target, transfer_classes(source.state_dict(), target.state_dict(), match))
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = source(image), target(image)
    torch.testing.assert_close(found.logits, expected.logits[..., [2, 0, 1]])
    torch.testing.assert_close(found.boxes, expected.boxes)


def test_a_class_agnostic_encoder_head_is_kept() -> None:
    source, target = (Detector(config(count, query_selection="agnostic")) for count in (3, 2))
    match = match_classes(["person", "cat", "dog"], ["dog", "cat"])
    weights = transfer_classes(source.state_dict(), target.state_dict(), match)
    key = "decoder.enc_score_head.weight"
    assert torch.equal(weights[key], source.state_dict()[key])
    load_weights(target, weights)


def test_a_name_for_every_row_is_demanded() -> None:
    source, target = (Detector(config(count)).state_dict() for count in (3, 2))
    match = match_classes(["cat", "dog"], ["dog", "cat"])
    with pytest.raises(ValueError, match="has 3 classes in the source and 2 in the target, but 2 and 2 were named"):
        transfer_classes(source, target, match)
