"""The COCO numbers: against arithmetic by hand, and against pycocotools fed with files."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dfine_core.model.postprocess import Detections
from pipeline.evaluation.coco_metrics import NUMBERS, agreement, coco_numbers, difference
from pipeline.evaluation.detections import DetectionTable, coco_json_writer, concatenate, to_coco_json
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from tests.support.synthetic_scenes import AWAY, BOX, detections_of, ground_truth_of, random_scene
from tests.support.synthetic_shards import synthetic_records, write_shards


def numbers_from_files(folder: Path, truth: GroundTruth, table: DetectionTable) -> list[float]:
    """pycocotools on an annotation file and a result file, with the category ids of the source."""
    ids = [category.original_id for category in truth.categories]
    annotations = [
        {
            "id": number + 1,
            "image_id": int(truth.image_id[truth.image[number]]),
            "category_id": ids[truth.label[number]],
            "bbox": [*map(float, (*box[:2], box[2] - box[0], box[3] - box[1]))],
            "area": float(truth.area[number]),
            "iscrowd": int(truth.crowd[number]),
        }
        for number, box in enumerate(truth.box.astype(np.float64))
    ]
    content = {
        "images": [{"id": int(image_id)} for image_id in truth.image_id],
        "categories": [{"id": c.original_id, "name": c.name} for c in truth.categories],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(to_coco_json(table, truth.categories)))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        run = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats]


def ap(truth: GroundTruth, table: DetectionTable, name: str = "AP") -> float:
    return coco_numbers(truth, table).numbers[name]


@pytest.mark.parametrize("seed", range(4))
def test_the_twelve_numbers_are_those_of_pycocotools_on_files(seed: int, tmp_path: Path) -> None:
    truth, table = random_scene(seed)
    assert truth.crowd.any()
    expected = numbers_from_files(tmp_path, truth, table)
    for evaluator in ("hotcoco", "pycocotools"):
        result = coco_numbers(truth, table, evaluator=evaluator)  # type: ignore[arg-type]
        assert result.evaluator == evaluator
        assert list(result.numbers) == list(NUMBERS)
        assert list(result.numbers.values()) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 40), classes=st.integers(2, 9))
def test_the_two_programs_agree_to_the_last_class(seed: int, images: int, classes: int) -> None:
    assert agreement(*random_scene(seed, images=images, classes=classes)) < 1e-12


def test_more_than_a_hundred_detections_of_a_class_change_nothing() -> None:
    truth = ground_truth_of([(0, BOX)])
    crowd_of_them = [(100, 0, 0.9, AWAY)] * 100
    assert ap(truth, detections_of(*crowd_of_them, (100, 0, 0.1, BOX))) == 0
    assert ap(truth, detections_of(*crowd_of_them[1:], (100, 0, 0.1, BOX))) == pytest.approx(0.01)


def test_one_box_counts_at_the_thresholds_that_it_reaches() -> None:
    table = detections_of((100, 0, 0.8, (10, 10, 50, 39)))  # IoU 29 / 40 = 0.725: over 0.50, 0.55, ..., 0.70
    numbers = coco_numbers(ground_truth_of([(0, BOX)]), table).numbers
    assert numbers["AP"] == pytest.approx(5 / 10)
    assert (numbers["AP50"], numbers["AP75"]) == pytest.approx((1, 0))
    assert numbers["AR_100"] == pytest.approx(5 / 10)


def test_a_false_detection_between_two_true_ones_costs_precision_beyond_half_the_recall() -> None:
    truth = ground_truth_of([(0, BOX)], [(0, BOX)])
    table = detections_of((100, 0, 0.9, BOX), (100, 0, 0.8, AWAY), (101, 0, 0.7, BOX))
    assert ap(truth, table) == pytest.approx((51 + 50 * 2 / 3) / 101)  # recalls 0 .. 0.50, then 0.51 .. 1


def test_detections_equal_to_the_ground_truth_score_one() -> None:
    truth, _ = random_scene(0)
    number = np.arange(len(truth.box), dtype=np.float32)
    table = DetectionTable(truth.image_id[truth.image], truth.label, 1 - number / len(number), truth.box)
    result = coco_numbers(truth, table)
    assert ap(truth, table) == pytest.approx(1)
    assert [c.ap for c in result.per_class[:-1]] == pytest.approx([1] * 5)


def test_a_class_without_true_boxes_is_nan_and_left_out_of_the_mean() -> None:
    truth = ground_truth_of([(0, BOX), (1, AWAY)])
    result = coco_numbers(truth, detections_of((100, 0, 0.9, BOX), (100, 2, 0.9, BOX)))
    assert result.numbers["AP"] == pytest.approx(0.5)
    assert [c.ap for c in result.per_class] == pytest.approx([1, 0, np.nan], nan_ok=True)
    assert [c.boxes for c in result.per_class] == [1, 1, 0]
    assert [c.original_id for c in result.per_class] == [7, 17, 27]


def test_detections_in_a_crowd_region_are_neither_right_nor_wrong() -> None:
    truth = ground_truth_of([(0, BOX), (0, (100, 100, 300, 300))], crowd=[1])
    inside = [(100, 0, 0.95, AWAY)] * 5
    assert ap(truth, detections_of(*inside, (100, 0, 0.9, BOX))) == pytest.approx(1)
    assert coco_numbers(truth, detections_of(*inside)).per_class[0].boxes == 1


def test_sizes_are_those_of_the_annotated_area() -> None:
    truth = ground_truth_of([(0, (0, 0, 100, 100))])
    thin = replace(truth, area=np.array([500], np.float32))  # the mask of something thin
    numbers = coco_numbers(thin, detections_of((100, 0, 0.9, (0, 0, 100, 100)))).numbers
    assert numbers["AP_small"] == pytest.approx(1)
    assert np.isnan(numbers["AP_large"])


NOTHING = detections_of()


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize(
    ("truth", "table", "expected"),
    [
        (ground_truth_of([(0, BOX)], []), NOTHING, 0.0),
        (ground_truth_of([], []), detections_of((100, 0, 0.9, BOX)), np.nan),
        (ground_truth_of([], []), NOTHING, np.nan),
        (ground_truth_of([(0, BOX)], crowd=[0]), detections_of((100, 0, 0.9, BOX)), np.nan),
    ],
    ids=["no detections", "no true boxes", "neither", "crowd regions alone"],
)
def test_empty_inputs_are_an_ordinary_case(
    truth: GroundTruth, table: DetectionTable, expected: float, evaluator: Any
) -> None:
    result = coco_numbers(truth, table, evaluator=evaluator)
    assert result.numbers["AP"] == pytest.approx(expected, nan_ok=True)
    assert difference(result, coco_numbers(truth, table)) == 0


def test_image_ids_can_be_any_64_bit_numbers_in_any_order() -> None:
    truth, table = random_scene(3)
    strange = np.array([-3, 2**62 + 1, 2**62, 5, *range(100, 96 + len(truth.image_id))])
    renamed = replace(truth, image_id=strange)
    result = coco_numbers(truth, table)
    moved = replace(table, image_id=strange[np.searchsorted(truth.image_id, table.image_id)])
    assert coco_numbers(renamed, moved).numbers == pytest.approx(result.numbers, abs=1e-3)  # ties fall otherwise
    assert agreement(renamed, moved) < 1e-9


def test_detections_of_another_set_are_refused() -> None:
    with pytest.raises(ValueError, match="image 102 is not among the images"):
        coco_numbers(ground_truth_of([(0, BOX)], []), detections_of((100, 0, 0.5, BOX), (102, 0, 0.5, BOX)))


def test_nan_differs_infinitely_from_a_number() -> None:
    truth, table = random_scene(0)
    result = coco_numbers(truth, table)
    unknown = replace(result, numbers={**result.numbers, "AP": float("nan")})
    assert difference(result, unknown) == float("inf")
    assert difference(result, replace(result, numbers={**result.numbers, "AP": 0.5})) == pytest.approx(
        abs(result.numbers["AP"] - 0.5)
    )


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    agreement(*random_scene(0))
    assert capfd.readouterr() == ("", "")


def test_the_ground_truth_equals_the_records_in_the_shards(tmp_path: Path) -> None:
    records = synthetic_records(45)
    truth = read_ground_truth(write_shards(tmp_path / "val", records))
    assert any(record.crowd.any() for record in records)
    assert any(len(record.labels) == 0 for record in records)
    assert truth.image_id.tolist() == [record.image_id for record in records]
    assert list(zip(truth.width, truth.height, strict=True)) == [(r.width, r.height) for r in records]
    assert truth.file_name == tuple(record.file_name for record in records)
    for number, record in enumerate(records):
        mine = truth.image == number
        assert np.array_equal(truth.box[mine], record.boxes)
        assert np.array_equal(truth.label[mine], record.labels)
        assert np.array_equal(truth.area[mine], record.areas)
        assert np.array_equal(truth.crowd[mine], record.crowd)
    assert truth.names[0] == "circle"


def test_the_ground_truth_of_selected_images_is_theirs_alone() -> None:
    whole = ground_truth_of([(0, BOX), (1, AWAY)], [(2, BOX)], [(1, BOX)], crowd=[3])
    part = whole.of_images(np.array([100, 102]))
    assert part.image_id.tolist() == [100, 102]
    assert part.image.tolist() == [0, 0, 1]
    assert part.label.tolist() == [0, 1, 1]
    assert part.crowd.tolist() == [False, False, True]
    assert part.file_name == ("0.jpg", "2.jpg")


def batch_of(scores: list[list[float]]) -> Detections:
    shape = len(scores), len(scores[0])
    return Detections(
        labels=torch.arange(shape[0] * shape[1]).view(shape),
        boxes=torch.arange(4.0 * shape[0] * shape[1]).view(*shape, 4),
        scores=torch.tensor(scores),
    )


def test_padding_yields_no_detections() -> None:
    table = DetectionTable.from_batch(
        batch_of([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4]]), torch.tensor([5, -1, 3]), [False, True, False]
    )
    assert table.image_id.tolist() == [5, 5, 3, 3]
    assert table.score.tolist() == pytest.approx([0.9, 0.8, 0.5, 0.4])
    assert table.label.tolist() == [0, 1, 4, 5]
    assert table.box[2].tolist() == [16, 17, 18, 19]


def test_detections_that_are_not_finite_are_refused_naming_the_image() -> None:
    with pytest.raises(ValueError, match="image 3: its detections are not finite"):
        DetectionTable.from_batch(batch_of([[0.9], [float("nan")]]), torch.tensor([5, 3]), [False, False])


def test_tables_are_joined_in_order() -> None:
    one, two = detections_of((1, 0, 0.5, BOX)), detections_of((2, 1, 0.25, AWAY), (1, 2, 0.75, BOX))
    joined = concatenate([one, two])
    assert joined.image_id.tolist() == [1, 2, 1]
    assert joined.box.tolist() == [list(BOX), list(AWAY), list(BOX)]
    assert len(concatenate([])) == 0


@pytest.mark.parametrize("tables", [(), (0,), (2,), (1, 0, 2)])
def test_a_result_file_is_written_table_after_table(tables: Sequence[int]) -> None:
    categories, stream = ground_truth_of([]).categories, io.BytesIO()
    made = [detections_of(*[(number, 1, 0.5, BOX)] * count) for number, count in enumerate(tables)]
    with coco_json_writer(stream, categories) as write:
        for table in made:
            write(table)
    assert json.loads(stream.getvalue()) == to_coco_json(concatenate(made), categories)


def test_result_rows_have_the_ids_of_the_source() -> None:
    rows = to_coco_json(detections_of((101, 2, 0.5, (10, 20, 40, 60))), ground_truth_of([]).categories)
    assert rows == [{"image_id": 101, "category_id": 27, "bbox": [10, 20, 30, 40], "score": 0.5}]
