"""Evaluation in shards: the result is the same for any number of workers, and memory is bounded."""

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import storage
from pipeline.evaluation import class_shards, coco_metrics, image_shards
from pipeline.evaluation.class_shards import SAMPLE_IMAGES, class_ranges, exact_images
from pipeline.evaluation.coco_metrics import agreement, coco_numbers, difference
from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.evaluate import evaluate_detections
from pipeline.evaluation.exchange import (
    ClassFile,
    ClassWriter,
    await_files,
    exchange_folder,
    read_classes,
    write_arrays,
)
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.evaluation.report import EvaluationReport
from tests.support.s3_server import s3_bucket
from tests.support.synthetic_scenes import random_scene

ROW = np.dtype([("number", "<i4"), ("score", "<f4")])


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks per worker and several ranges of classes."""
    monkeypatch.setattr(image_shards, "CHUNK_DETECTIONS", 40)
    monkeypatch.setattr("pipeline.evaluation.evaluate.SHARD_DETECTIONS", 30)
    monkeypatch.setattr("pipeline.evaluation.evaluate.EXACT_SHARD_DETECTIONS", 30)


def by_image(
    truth: GroundTruth, table: DetectionTable, images: NDArray[np.int64], *, delay_s: float = 0.0
) -> Iterator[DetectionTable]:
    """One table for each of the images; empty for those without detections."""
    time.sleep(delay_s)
    for image_id in truth.image_id[images]:
        yield table[table.image_id == image_id]


def evaluated_by(
    workers: int,
    truth: GroundTruth,
    table: DetectionTable,
    folder: str | Path,
    owner: NDArray[np.int64],
    *,
    delay_s: float = 0.0,
) -> EvaluationReport:
    """Evaluate with workers as threads, each with the images that it owns. There is no process group.

    Args:
        delay_s: the last worker begins later.
    """
    barrier, shared = threading.Barrier(workers), storage.join(folder, "shared")

    def broadcast(_: Any) -> str:
        barrier.wait()
        return storage.join(shared, "one")

    def work(rank: int) -> EvaluationReport | None:
        own = np.flatnonzero(owner % workers == rank)
        tables = by_image(truth, table, own, delay_s=delay_s if rank == workers - 1 else 0.0)
        return evaluate_detections(tables, truth, rank=rank, world_size=workers, broadcast=broadcast, shared=shared)

    with ThreadPoolExecutor(workers) as pool:
        first, *others = pool.map(work, range(workers))
    assert first is not None
    assert others == [None] * (workers - 1)
    assert not storage.exists(shared)
    return first


def results_of(report: EvaluationReport) -> dict[str, Any]:
    return replace(report, seconds={}).as_json()


@pytest.mark.usefixtures("small_shards")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), images=st.integers(1, 30), classes=st.integers(2, 9))
def test_any_number_of_workers_and_shards_gives_the_same_report_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, images: int, classes: int
) -> None:
    truth, table = random_scene(seed, images=images, classes=classes)
    whole = coco_numbers(truth, table)
    owner = np.random.default_rng(seed).permutation(images)
    reports = [evaluated_by(n, truth, table, tmp_path_factory.mktemp("exchange"), owner) for n in (1, 2, 3)]
    assert results_of(reports[0]) == results_of(reports[1]) == results_of(reports[2])
    assert reports[2].numbers == pytest.approx(whole.numbers, abs=0, rel=0, nan_ok=True)
    assert np.array_equal(reports[2].curves.per_class, whole.precision[0].T, equal_nan=True)
    exact = coco_numbers(truth, table, evaluator="pycocotools")
    assert difference(exact, whole) < 1e-12
    assert reports[2].numbers == pytest.approx(exact.numbers, abs=1e-12, nan_ok=True)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("seed", range(3))
def test_shards_do_not_change_the_report_of_pycocotools(seed: int) -> None:
    truth, table = random_scene(seed)
    report = evaluate_detections(by_image(truth, table, np.arange(len(truth.image_id))), truth, final=True)
    expected = coco_numbers(truth, table, evaluator="pycocotools")
    assert report is not None
    assert report.evaluator == "pycocotools"
    assert report.numbers == pytest.approx(expected.numbers, abs=0, rel=0, nan_ok=True)
    assert report.agreement == agreement(truth, table) == 0
    assert report.agreement_images == report.images


def test_beyond_the_stated_size_pycocotools_sees_the_same_sample_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, table = random_scene(1, images=SAMPLE_IMAGES + 100)
    work = len(table) + len(truth.image_id) * len(truth.categories)
    monkeypatch.setattr(class_shards, "EXACT_WORK", work)
    assert exact_images(truth, len(table)) is truth
    monkeypatch.setattr(class_shards, "EXACT_WORK", work - 1)
    sample = exact_images(truth, len(table))
    assert len(sample.image_id) == SAMPLE_IMAGES
    assert np.array_equal(sample.image_id, exact_images(truth, len(table)).image_id)

    report = evaluate_detections([table], truth, final=True)
    assert report is not None
    assert report.evaluator == "hotcoco"
    assert report.numbers == coco_numbers(truth, table).numbers
    assert report.agreement == 0
    assert f"agree on a sample of {SAMPLE_IMAGES} images" in report.table()


def test_a_disagreement_on_the_sample_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, table = random_scene(1, images=SAMPLE_IMAGES + 100)
    monkeypatch.setattr(class_shards, "EXACT_WORK", 0)
    run = coco_metrics.run_pycocotools
    # As if hotcoco had found more than there is.
    monkeypatch.setattr(
        coco_metrics, "run_pycocotools", lambda truth, table, *args: run(truth, table[table.score > 0.5], *args)
    )
    report = evaluate_detections([table], truth, final=True)
    assert report is not None
    assert report.agreement is not None
    assert report.agreement > 0.01
    assert "DISAGREE: see the log on a sample" in report.table()


def test_workers_exchange_detections_through_an_object_store(small_shards: None) -> None:
    truth, table = random_scene(4)
    owner = np.arange(len(truth.image_id))
    with s3_bucket() as uri:
        report = evaluated_by(2, truth, table, f"{uri}/run/exchange", owner)
    assert report.numbers == coco_numbers(truth, table).numbers


def test_a_worker_waits_for_one_that_takes_longer(tmp_path: Path) -> None:
    truth, table = random_scene(2)
    started_at = time.perf_counter()
    report = evaluated_by(2, truth, table, tmp_path, np.arange(len(truth.image_id)), delay_s=1.5)
    assert time.perf_counter() - started_at > 1.5
    assert report.numbers == coco_numbers(truth, table).numbers


def test_a_worker_without_classes_that_reads_late_finds_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classes and three workers: rank 0 has its report before the last worker has begun to read."""
    truth, table = random_scene(1347, images=1, classes=2)
    reads, begun = image_shards.await_image_shards, threading.Lock()
    order: list[int] = []

    def late(folder: str, world_size: int) -> image_shards.ImageShards:
        with begun:
            order.append(len(order))
            last = len(order) == world_size
        time.sleep(1.0 if last else 0.0)
        return reads(folder, world_size)

    monkeypatch.setattr("pipeline.evaluation.evaluate.await_image_shards", late)
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(evaluated_by, 3, truth, table, tmp_path, np.arange(1)).result(timeout=60)
    assert report.numbers == pytest.approx(coco_numbers(truth, table).numbers, abs=0, rel=0, nan_ok=True)


@given(
    detections=st.lists(st.integers(0, 50), min_size=1, max_size=40),
    limit=st.integers(1, 200),
    workers=st.integers(1, 9),
    overhead=st.integers(1, 100),
)
def test_every_class_is_in_one_range(detections: list[int], limit: int, workers: int, overhead: int) -> None:
    ranges = class_ranges(np.array(detections), limit, workers, overhead=overhead)
    assert [label for classes in ranges for label in classes] == list(range(len(detections)))


def test_ranges_are_small_enough_and_as_many_for_every_worker() -> None:
    detections = np.random.default_rng(0).integers(0, 1000, 300)
    ranges = class_ranges(detections, 10_000, 4)
    assert len(ranges) == 16
    assert max(int(detections[classes.start : classes.stop].sum()) for classes in ranges) <= 11_000
    huge = class_ranges(np.array([10, 10, 90_000, 10, 10]), 10_000, 1)
    assert range(2, 3) in huge


def test_rows_come_back_class_by_class_in_their_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = [random.integers(0, 5, size).astype(np.int32) for size in (30, 0, 12)]
    rows = [np.array([(n, random.random()) for n in range(len(label))], ROW) for label in labels]
    stream = io.BytesIO()
    writer = ClassWriter(stream, 5)
    for label, chunk in zip(labels, rows, strict=True):
        writer.write(label, chunk)
    (tmp_path / "rows").write_bytes(stream.getvalue())
    file = ClassFile(str(tmp_path / "rows"), ROW, writer.counts)
    for classes in (range(5), range(1, 3), range(4, 5)):
        label, found = read_classes([file, file], classes)
        for one in classes:
            expected = np.concatenate([chunk[own == one] for own, chunk in zip(labels, rows, strict=True)] * 2)
            assert np.array_equal(found[label == one], expected)
        assert set(label.tolist()) <= set(classes)
    (tmp_path / "rows").write_bytes(stream.getvalue()[:-1])
    with pytest.raises(OSError, match="ends early: "):
        read_classes([file], range(5))


def test_a_folder_of_a_killed_evaluation_is_replaced(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "killed").mkdir(parents=True)
    (shared / "killed/images-00001.npz").write_bytes(b"old")
    with exchange_folder(str(shared), 0, 2, lambda value: value) as folder:
        assert not (shared / "killed").exists()
        write_arrays(folder, "images-00000.npz", numbers=np.arange(3))
        await_files(folder, ["images-00000.npz"])
        Path(folder, "left-00001").touch()  # by the other worker
    assert not shared.exists()


def test_a_failed_evaluation_leaves_no_shared_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"

    def fail() -> None:
        with exchange_folder(str(shared), 0, 2, lambda value: value) as folder:
            write_arrays(folder, "images-00000.npz", numbers=np.arange(3))
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        fail()
    assert not shared.exists()


def test_files_that_are_late_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.evaluation.exchange.NAMED_AFTER_SECONDS", 0.05)
    write_arrays(str(tmp_path), "images-00000.npz", numbers=np.arange(3))
    late = threading.Timer(0.5, lambda: write_arrays(str(tmp_path), "images-00001.npz", numbers=np.arange(3)))
    late.start()
    await_files(str(tmp_path), ["images-00000.npz", "images-00001.npz"])
    late.join()
    assert "waits for other workers to write images-00001.npz" in caplog.text
    assert "images-00000.npz" not in caplog.text


def test_several_workers_need_a_shared_folder() -> None:
    with pytest.raises(ValueError, match="needs a folder that all of them can read"), exchange_folder(None, 0, 2, str):
        pass


def test_a_worker_alone_leaves_nothing_on_its_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    truth, table = random_scene(0)
    assert evaluate_detections([table], truth) is not None
    with pytest.raises(ValueError, match="is not among the images"):
        evaluate_detections([concatenate([table, replace(table, image_id=table.image_id + 1)])], truth)
    assert list(tmp_path.iterdir()) == []
