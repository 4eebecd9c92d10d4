"""Gate of the export: which differences count, and which files are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dfine_core.agreement import FULL, MISMATCH, Tolerance, differences, summarize
from dfine_core.images import read_image
from dfine_core.inference import prepare
from dfine_core.model.postprocess import Detections
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.export.check_images import (
    CheckBatch,
    CheckSet,
    from_files,
    from_shards,
    from_synthetic_images,
    split_first_batch,
)
from pipeline.export.formats import Opening
from pipeline.export.gate import GateSubject, GateVerdict, check_subjects
from pipeline.export.openings import DetectFunction
from tests.support.synthetic_scenes import AWAY, BOX
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.varied_detectors import loaded, small

SIZE = torch.tensor([[100, 50]])  # width, height


def detections(*rows: tuple[int, float, tuple[float, float, float, float]]) -> Detections:
    """Detections of one image from rows of label, score and box."""
    return Detections(
        labels=torch.tensor([[row[0] for row in rows]]),
        scores=torch.tensor([[row[1] for row in rows]]),
        boxes=torch.tensor([[row[2] for row in rows]]),
    )


def test_tied_detections_that_swapped_ranks_do_not_differ() -> None:
    one = detections((0, 0.9, BOX), (0, 0.9, AWAY), (1, 0.5, BOX))
    other = detections((0, 0.9, AWAY), (1, 0.5, BOX), (0, 0.9, BOX))
    assert differences(one, other, SIZE, 3).max() == 0


def test_a_corner_counts_over_the_side_of_the_image() -> None:
    one, other = detections((0, 0.9, (10, 10, 50, 40))), detections((0, 0.8, (12, 10, 50, 39)))
    # The first corner is off by 2 of 100 px, the other one by 1 of 50.
    assert differences(one, other, SIZE, 1) == pytest.approx(np.array([[0.1, 2 / 100]]))


def test_another_class_a_missing_detection_and_nan_are_mismatches() -> None:
    one = detections((0, 0.9, BOX), (1, 0.5, BOX))
    assert differences(one, detections((2, 0.9, BOX), (1, 0.5, BOX)), SIZE, 2).tolist() == [
        [MISMATCH, MISMATCH],
        [0, 0],
    ]
    assert differences(one, detections((0, 0.9, BOX)), SIZE, 2).tolist() == [[0, 0], [MISMATCH, MISMATCH]]
    assert differences(one, detections((0, float("nan"), BOX), (1, 0.5, BOX)), SIZE, 2)[0].tolist() == [
        MISMATCH,
        MISMATCH,
    ]


def test_only_the_best_are_compared_with_all_detections_of_the_file() -> None:
    one = detections((0, 0.9, BOX), (1, 0.5, BOX))
    other = detections((1, 0.7, AWAY), (0, 0.9, BOX))
    assert differences(one, other, SIZE, 1).tolist() == [[0, 0]]


def test_the_summary_counts_what_agrees_in_score_and_box() -> None:
    off = np.array([[0.0, 0.0], [0.05, 0.0], [0.0, 0.05], [0.01, 0.01]])
    numbers = summarize(off, Tolerance(score=0.02, box=0.02, share=1.0))
    assert numbers["detections"] == 4
    assert numbers["agreeing"] == 0.5
    assert numbers["score_largest_agreeing"] == numbers["box_largest_agreeing"] == 0.01


def test_images_of_a_shard_set_come_in_order_with_their_ground_truth(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "val", synthetic_records(9, longest_side=64))
    check_set = from_shards(shards, 5)
    batches = list(split_first_batch(check_set.batches((64, 96))))
    assert [tuple(batch.pixels.shape) for batch in batches] == [(count, 3, 64, 96) for count in (1, 2, 2)]
    ids = torch.cat([batch.image_id for batch in batches]).numpy()
    assert check_set.ground_truth is not None
    assert ids.tolist() == check_set.ground_truth.image_id.tolist() == read_ground_truth(shards).image_id[:5].tolist()
    sizes = torch.cat([batch.sizes for batch in batches]).numpy()
    assert sizes.tolist() == np.stack([check_set.ground_truth.width, check_set.ground_truth.height], 1).tolist()
    assert from_shards(shards, 100).images == 9


def test_image_files_are_read_as_everywhere(tmp_path: Path) -> None:
    record = synthetic_records(1, longest_side=64)[0]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jpg").write_bytes(record.image)
    (tmp_path / "notes.txt").write_text("no image")
    check_set = from_files([tmp_path], 10)
    (batch,) = check_set.batches((64, 64))
    assert torch.equal(batch.pixels, prepare([read_image(record.image)], (64, 64)))
    assert batch.sizes.tolist() == [[record.width, record.height]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        from_files([tmp_path / "empty"], 10)


def test_broken_images_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = synthetic_records(3, longest_side=64)
    (tmp_path / "a.jpg").write_bytes(records[0].image)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    (tmp_path / "c.jpg").write_bytes(records[1].image[:100])
    (tmp_path / "d.jpg").write_bytes(records[2].image)
    check_set = from_files([tmp_path, tmp_path / "gone.jpg"], 10)
    assert check_set.description == "2 given images, 3 broken ones left out"
    (batch,) = check_set.batches((64, 64))
    expected = prepare([read_image(records[0].image), read_image(records[2].image)], (64, 64))
    assert check_set.images == len(batch.pixels) == 2
    assert torch.equal(batch.pixels, expected)
    for name in ("b.jpg", "c.jpg", "gone.jpg"):
        assert f"left out: {tmp_path / name}: " in caplog.text
    assert from_files([tmp_path], 1).description == "1 given image"
    with pytest.raises(ValueError, match=r"none of 1 image can be read, such as .*b\.jpg: "):
        from_files([tmp_path / "b.jpg"], 10)


MODEL = loaded(small())


def verdict_after(change: object, check_set: CheckSet | None = None, tolerance: Tolerance = FULL) -> GateVerdict:
    """Verdict about a file that returns the detector's detections after `change`."""

    def opened(_: Path, __: object) -> DetectFunction:
        return lambda pixels, sizes: change(MODEL.detect(pixels, sizes))  # type: ignore[operator]

    subject = GateSubject(Path("none"), (Opening("changed", opened),), tolerance)
    images = check_set or from_synthetic_images(4, longest_side=64)
    return check_subjects(MODEL, {"file": subject}, images)["file"]


def with_(found: Detections, **values: Tensor) -> Detections:
    return Detections(**{**vars(found), **values})


def test_equal_detections_are_accepted() -> None:
    verdict = verdict_after(lambda found: found)
    assert verdict.accepted
    assert verdict.measured["detections"] == 4 * 20
    assert verdict.measured["agreeing"] == 1
    assert "AP_exported" not in verdict.measured


def test_scores_beyond_the_tolerance_are_refused() -> None:
    assert FULL.typical is not None
    within = FULL.typical / 2
    assert verdict_after(lambda found: with_(found, scores=found.scores * (1 - within))).accepted
    verdict = verdict_after(lambda found: with_(found, scores=found.scores * (1 - FULL.score / 2)))
    assert "half of its detections differ by more than" in str(verdict.reason)
    verdict = verdict_after(lambda found: with_(found, scores=found.scores - 3 * FULL.score))
    assert "0.0% of its detections agree" in str(verdict.reason)


def test_a_file_that_fails_on_one_batch_size_is_refused() -> None:
    def only_single(found: Detections) -> Detections:
        if len(found.scores) > 1:
            raise RuntimeError("Got: 2 Expected: 1\nmore")
        return found

    verdict = verdict_after(only_single)
    assert verdict.reason == "fails on a batch of 2: RuntimeError: Got: 2 Expected: 1"


def test_detections_that_are_not_finite_are_refused() -> None:
    verdict = verdict_after(lambda found: with_(found, scores=found.scores * torch.nan))
    assert "not finite" in str(verdict.reason)


def test_an_average_precision_that_fell_is_refused_although_the_detections_agree(
    tmp_path: Path,
) -> None:
    """Ground truth is the best detection of each image; the file scores exactly these lowest."""
    shards = write_shards(tmp_path / "val", synthetic_records(6, longest_side=64))
    check_set = from_shards(shards, 6)
    assert check_set.ground_truth is not None
    tolerant = Tolerance(score=1.0, box=1.0, share=0.0, ap=0.001)
    found = [MODEL.detect(batch.pixels, batch.sizes) for batch in check_set.batches((64, 64))]
    best = torch.cat([part.boxes[:, 0] for part in found]).numpy()
    labels = torch.cat([part.labels[:, 0] for part in found]).numpy()
    ground_truth = ground_truth_with(check_set, best, labels)
    check_set = CheckSet(check_set.description, check_set.images, check_set.batches, ground_truth)
    same = verdict_after(lambda found: found, check_set, tolerant)
    assert same.accepted
    assert same.measured["AP_pytorch"] == same.measured["AP_exported"] > 0.2
    worse = verdict_after(lambda found: with_(found, scores=1 - found.scores), check_set, tolerant)
    assert "its AP is" in str(worse.reason)


def ground_truth_with(check_set: CheckSet, boxes: np.ndarray, labels: np.ndarray) -> object:
    assert check_set.ground_truth is not None
    count = len(labels)
    return replace(
        check_set.ground_truth,
        image=np.arange(count),
        box=boxes.astype(np.float32),
        label=labels.astype(np.int32),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(1).astype(np.float32),
        crowd=np.zeros(count, np.bool_),
    )


def test_the_first_image_comes_alone() -> None:
    batch = CheckBatch(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.ones(3, 2, dtype=torch.int64), torch.arange(3))
    assert [part.image_id.tolist() for part in split_first_batch(iter([batch, batch]))] == [[0], [1, 2], [0, 1, 2]]
