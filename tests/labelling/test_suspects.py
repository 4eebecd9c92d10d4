"""Likely label errors: planted ones are found, right labels are left alone, and reports hold the same list."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.label_errors import hits, plant
from dfine_core.uncertainty import DetectedBoxes, EdgeCalibration, ScoreCalibration
from dfine_core.uncertainty.detector_calibration import LEVELS, DetectorCalibration
from jobs import doctor
from pipeline.calibration.measure import MASSES, MeasuredDetections
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.labelling.suspects import KINDS, Suspect, find_suspects
from pipeline.labelling.suspects_report import LabelReport, report_page, trained_on
from tests.support.small_detectors import small_detector
from tests.support.synthetic_scenes import ground_truth_of
from tests.support.synthetic_shards import synthetic_records, write_shards

Box = tuple[float, float, float, float]
STD, REACH = 1.0, 3.0  # px; of the detections' edges, and half of their 99 % interval


def measured_of(*rows: tuple[int, int, float, Box]) -> MeasuredDetections:
    """Detections as (image, label, score, box), whose intervals grow linearly with their mass up to REACH."""
    images, labels, scores, boxes = (torch.tensor(column) for column in zip(*rows, strict=True))
    boxes = boxes.float()
    half = torch.tensor([REACH * mass / MASSES[-1] for mass in MASSES]).reshape(1, -1, 1)
    intervals = torch.stack([boxes.unsqueeze(1) - half, boxes.unsqueeze(1) + half], -1)
    initial = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], -1)
    std = torch.full((len(rows), 4), STD)
    return MeasuredDetections(DetectedBoxes(images, boxes, labels, scores.float()), initial, std, intervals)


def kinds(suspects: list[Suspect]) -> list[tuple[str, int, int | None]]:
    return [(suspect.kind, suspect.number, suspect.box) for suspect in suspects]


A, B, C = (10.0, 10.0, 60.0, 60.0), (100.0, 20.0, 160.0, 90.0), (20.0, 100.0, 50.0, 150.0)


def test_every_kind_is_found_with_its_place() -> None:
    truth = ground_truth_of(
        [(0, A), (1, B)],  # both right
        [(0, A)],  # B is missing
        [(0, A), (1, B)],  # B has nothing under it
        [(0, A), (2, B)],  # B is of class 1
        [(0, A), (1, (100.0, 20.0, 175.0, 90.0))],  # its right edge is 15 px off
        *[[(1, B)] for _ in range(8)],  # boxes like B are mostly found
    )
    measured = measured_of(
        *((image, 0, 0.9, A) for image in range(5)),
        *((image, 1, 0.9, B) for image in (0, 1, 3, 4, *range(5, 13))),
    )
    found = find_suspects(measured, truth)
    assert kinds(found) == [("missing", 1, None), ("class", 3, 1), ("edges", 4, 1), ("extra", 2, 1)]
    missing, swapped, edges, extra = found
    assert missing.suggested == B
    assert missing.confidence == pytest.approx(0.9)
    assert (swapped.labelled, swapped.detected) == (truth.names[2], truth.names[1])
    assert swapped.confidence == pytest.approx(0.9 * 1)
    assert extra.confidence == pytest.approx(
        (10 + 1) / (11 + 2), abs=1e-4
    )  # nothing found, times the recall of its like
    assert edges.confidence == pytest.approx(0.9 * (1 - (REACH / 15) ** 2), abs=1e-4)
    assert "right edge 15.0 px" in edges.detail
    assert [suspect.confidence for suspect in found] == sorted((s.confidence for s in found), reverse=True)


def test_an_object_that_was_found_twice_is_missing_once_and_weak_detections_say_nothing() -> None:
    truth = ground_truth_of([(0, A)])
    shifted = (102.0, 20.0, 162.0, 90.0)
    measured = measured_of((0, 0, 0.9, A), (0, 1, 0.8, B), (0, 2, 0.7, shifted), (0, 1, 0.3, C))
    assert [(s.kind, s.suggested) for s in find_suspects(measured, truth)] == [("missing", B)]


def test_regions_of_a_crowd_are_neither_extra_nor_missing() -> None:
    truth = ground_truth_of([(0, A), (1, (90.0, 10.0, 300.0, 300.0))], crowd=[1])
    measured = measured_of((0, 0, 0.9, A), (0, 1, 0.9, B))
    assert find_suspects(measured, truth) == []


def test_a_class_that_the_detector_rarely_finds_has_no_extra_boxes() -> None:
    truth = ground_truth_of(*[[(0, A)] for _ in range(6)])
    assert find_suspects(measured_of((0, 0, 0.9, A)), truth) == []


def test_a_calibration_changes_scores_and_intervals() -> None:
    truth = ground_truth_of([(0, A)], [(0, (10.0, 10.0, 66.0, 60.0))])
    measured = measured_of((0, 0, 0.9, A), (1, 0, 0.9, A))
    assert find_suspects(measured, truth, least=0.3) != []

    def calibration(factor: float, slope: float) -> DetectorCalibration:
        edges = tuple(EdgeCalibration(factor, level, joint=False, objects=100) for level in LEVELS)
        return DetectorCalibration(edges, edges, ScoreCalibration("temperature", slope), 10, None)

    # 6 px off: within 3.2 std times the growth of the interval from 95 % to 99 %, if that is wide enough.
    (narrow,) = find_suspects(measured, truth, calibration(3.2, 1.0), least=0.3)
    reach = 3.2 * STD * MASSES[-1] / 0.95
    assert narrow.confidence == pytest.approx(0.9 * (1 - (reach / 6) ** 2), abs=1e-3)
    assert find_suspects(measured, truth, calibration(6.0, 1.0), least=0.3) == []
    # Scores that promise too much: 0.9 becomes 0.75, and with it the confidence.
    (milder,) = find_suspects(measured, truth, calibration(3.2, 0.5), least=0.3)
    assert milder.confidence == pytest.approx(0.75 * (1 - (reach / 6) ** 2), abs=1e-3)


def test_edges_that_people_draw_alike_are_left_alone() -> None:
    truth = ground_truth_of([(0, (10.0, 10.0, 61.4, 60.0))])
    sharp = measured_of((0, 0, 0.95, A))
    sharp = replace(sharp, intervals=sharp.found.boxes[:, None, :, None].expand(1, len(MASSES), 4, 2))
    assert find_suspects(sharp, truth, least=0.05) == []
    (moved,) = find_suspects(sharp, ground_truth_of([(0, (10.0, 10.0, 62.0, 60.0))]), least=0.05)
    assert moved.kind == "edges"


# Planted errors, as the benchmark plants them


def drawn_truth(images: int) -> GroundTruth:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(images):
        places = [(10 + 100 * column, 10 + 100 * line) for column in range(3) for line in range(3)]
        chosen = rng.permutation(9)[:4]
        sides = rng.uniform(40, 80, (4, 2))
        rows.append(
            [
                (int(rng.integers(3)), (float(x), float(y), float(x + w), float(y + h)))
                for (x, y), (w, h) in zip((places[n] for n in chosen), sides, strict=True)
            ]
        )
    return ground_truth_of(*rows)


def test_a_good_detector_finds_nearly_all_planted_errors_and_little_else() -> None:
    truth = drawn_truth(60)
    rng = np.random.default_rng(1)
    rows = [
        (int(image), int(label), float(rng.uniform(0.8, 0.95)), tuple((box + rng.normal(0, STD, 4)).tolist()))
        for image, label, box in zip(truth.image, truth.label, truth.box, strict=True)
        if rng.random() < 0.97
    ]
    rows += [(int(rng.integers(60)), 0, 0.3, (200.0, 200.0, 220.0, 230.0)) for _ in range(20)]
    measured = measured_of(*rows)
    planted = plant(truth, 0.05, seed=3)
    assert {kind: len(errors) for kind, errors in planted.errors.items()} == dict.fromkeys(KINDS, 12)
    right, listed, caught, total = hits(planted, find_suspects(measured, planted.truth), KINDS)
    assert total == 48
    assert caught / total >= 0.9
    assert right / listed >= 0.8


def test_planted_errors_are_where_they_are_said_to_be() -> None:
    truth = drawn_truth(20)
    planted = plant(truth, 0.05, seed=0)
    changed = planted.truth
    boxes = {
        (int(i), tuple(box)): int(label)
        for i, box, label in zip(truth.image, truth.box.tolist(), truth.label, strict=True)
    }
    first = np.searchsorted(changed.image, np.arange(20))
    assert (np.diff(changed.image) >= 0).all()
    unknown = set()
    for row, (image, box, label) in enumerate(zip(changed.image, changed.box.tolist(), changed.label, strict=True)):
        if boxes.get((int(image), tuple(box))) != int(label):
            unknown.add((int(image), row - int(first[image])))
    assert unknown == {place for kind in ("extra", "class", "edges") for place in planted.errors[kind]}
    kept = {(int(image), tuple(box)) for image, box in zip(changed.image, changed.box.tolist(), strict=True)}
    assert all((image, tuple(box.tolist())) not in kept for image, box in planted.errors["missing"])


# Reports


def test_the_command_prints_and_writes_one_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, shards = small_detector(), write_shards(tmp_path / "shards", synthetic_records(6, longest_side=64))
    words = [str(shards.uri), "--model", str(loaded.save(tmp_path / "detector")), "--confidence", "0.3"]
    files = ["--csv", str(tmp_path / "labels.csv"), "--html", str(tmp_path / "labels.html")]
    assert doctor.main([*words, "--json", *files]) == 0
    content = json.loads(capsys.readouterr().out)
    suspects = content["suspects"]
    assert len(suspects) > 10  # an untrained detector agrees with nobody
    assert (content["images"], content["memorised"], content["calibrated"]) == (6, False, False)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "labels.csv").read_text())))
    assert [float(row["confidence"]) for row in rows] == [suspect["confidence"] for suspect in suspects]
    assert [row["kind"] for row in rows] == [suspect["kind"] for suspect in suspects]
    page = (tmp_path / "labels.html").read_text()
    assert len(re.findall("<article", page)) == min(200, len(suspects))
    assert len(re.findall('<image href="data:image/jpeg', page)) == min(200, len(suspects))
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    # Its own files are replaced, those of others are not.
    assert doctor.main([*words, *files]) == 0
    assert "likely label errors among" in capsys.readouterr().out
    (tmp_path / "labels.csv").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        doctor.main([*words, *files])
    assert (tmp_path / "labels.csv").read_text() == "mine"


def test_a_detector_that_was_trained_on_the_images_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", synthetic_records(2))
    weights = str(tmp_path / "ema.safetensors")
    assert not trained_on(weights, shards)
    (tmp_path / "metadata.json").write_text(json.dumps({"data": {"train": "another"}}))
    assert not trained_on(weights, shards)
    (tmp_path / "metadata.json").write_text(json.dumps({"data": {"train": shards.manifest.digest}}))
    assert trained_on(weights, shards)
    report = LabelReport("runs/mine", shards.uri, "digest", 2, 5, False, True, ())
    assert "repeats their errors" in report.lines()[2]
    assert "Nothing is suspected" in report_page(report, shards)
