"""Whole evaluations of small shard sets: nothing lost, nothing twice, for any number of workers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.image import imread
from torch import Tensor, nn

from dfine_core import Detector, DetectorOutput, ModelConfig
from dfine_core.structures import QueryPredictions
from pipeline.data.shards.classes import with_classes_of
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.data.shards.records import ImageRecord
from pipeline.data.sources.synthetic import CLASSES
from pipeline.evaluation import coco_metrics
from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.evaluate import evaluate, evaluate_detections
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.evaluation.report import EvaluationReport
from pipeline.evaluation.sample_images import sample_images
from tests.support import recorded
from tests.support.synthetic_scenes import BOX, detections_of, ground_truth_of, random_scene
from tests.support.synthetic_shards import synthetic_records, write_shards

IMAGES = 19  # in micro-batches of 4: a last one of 3, and for two workers one of nothing but padding
CONFIG = ModelConfig.variant("n", num_classes=len(CLASSES), input_size=(64, 64), num_queries=20)
CPU = torch.device("cpu")
LAYERS = {"layers/iou_initial": 0.5, "layers/iou_0": 0.6, "layers/entropy_0": 1.5, "layers/entropy_share_0": 0.4}


@pytest.fixture(scope="module")
def records() -> list[ImageRecord]:
    return synthetic_records(IMAGES, longest_side=96)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, records: list[ImageRecord]) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("drawn") / "val", records)


def detector() -> Detector:
    made = Detector(CONFIG)
    recorded.fill(made, seed=3)
    return made


class Oracle(nn.Module):
    """Detector that returns the true boxes of images, which must come in the order of the shards."""

    def __init__(self, records: list[ImageRecord]):
        super().__init__()
        self.config = CONFIG
        self._rest = list(records)

    def forward(self, images: Tensor, every_layer: bool) -> DetectorOutput:
        logits = torch.full((len(images), CONFIG.num_queries, CONFIG.num_classes), -9.0)
        boxes = torch.full((len(images), CONFIG.num_queries, 4), 0.5)
        for index, record in enumerate(self._rest[: len(images)]):
            corners = torch.from_numpy(record.boxes) / torch.tensor([record.width, record.height] * 2)
            count = len(record.labels)
            boxes[index, :count] = (
                torch.cat([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1) / 2
            )
            logits[index, range(count), record.labels.tolist()] = 9.0
        del self._rest[: len(images)]
        every = (CONFIG.num_layers, -1, -1, -1)
        layers = QueryPredictions(logits.expand(every), boxes.expand(every), None, logits, boxes)
        return DetectorOutput(logits, boxes, layers)


def test_a_detector_that_returns_the_ground_truth_scores_one(records: list[ImageRecord], shards: ShardSet) -> None:
    report = evaluate(Oracle(records), shards, device=CPU, micro_batch_size=4, decode_in="inline", final=True)
    assert report is not None
    assert report.images == IMAGES
    assert report.boxes == sum(int((~record.crowd).sum()) for record in records) > 0
    metrics = report.metrics()
    assert metrics["accuracy/AP"] == pytest.approx(1)
    assert metrics["val/AR_100"] == pytest.approx(1)
    assert metrics["val/evaluators_differ_by"] < 1e-9
    assert report.evaluator == "pycocotools"


def test_a_shard_set_with_classes_in_another_order_scores_the_same(records: list[ImageRecord], tmp_path: Path) -> None:
    order = list(reversed(CLASSES))
    last = len(CLASSES) - 1
    reversed_labels = [replace(record, labels=(last - record.labels).astype(np.int32)) for record in records]
    val = write_shards(tmp_path / "val", reversed_labels)
    categories = tuple(
        category.model_copy(update={"name": name}) for category, name in zip(val.categories, order, strict=True)
    )
    val = replace(val, manifest=val.manifest.model_copy(update={"categories": categories}))
    mapped = with_classes_of(val, list(CLASSES), "the detector")
    report = evaluate(Oracle(records), mapped, device=CPU, micro_batch_size=4, decode_in="inline", final=True)
    assert report is not None
    assert report.metrics()["accuracy/AP"] == pytest.approx(1)
    unmapped = evaluate(Oracle(records), val, device=CPU, micro_batch_size=4, decode_in="inline", final=True)
    assert unmapped is not None
    assert unmapped.metrics()["accuracy/AP"] < 0.2


def _evaluate_on_rank(rank: int, world_size: int, folder: str, uri: str) -> None:
    torch.set_num_threads(1)

    def broadcast(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    tables: list[DetectionTable] = []
    report = evaluate(
        detector(),
        load_shards(uri),
        device=CPU,
        rank=rank,
        world_size=world_size,
        broadcast=broadcast,
        shared=f"{folder}/exchange",
        micro_batch_size=4,
        decode_in="inline",
        final=True,
        on_detections=tables.append,
    )
    np.savez(Path(folder) / f"of_{world_size}-{rank}.npz", **vars(concatenate(tables)))
    assert (report is None) == (rank > 0)
    if report is not None:
        (Path(folder) / f"of_{world_size}.json").write_text(json.dumps(report.metrics()))
    assert not Path(folder, "exchange").exists() or rank > 0
    if world_size > 1:
        dist.destroy_process_group()


def test_two_workers_find_what_one_finds(shards: ShardSet, records: list[ImageRecord], tmp_path: Path) -> None:
    _evaluate_on_rank(0, 1, str(tmp_path), shards.uri)
    mp.spawn(_evaluate_on_rank, args=(2, str(tmp_path), shards.uri), nprocs=2)
    one, *two = ([np.load(tmp_path / f"of_{n}-{rank}.npz") for rank in range(n)] for n in (1, 2))
    each = CONFIG.num_queries * CONFIG.num_classes
    assert one[0]["image_id"].tolist() == [record.image_id for record in records for _ in range(each)]
    for name in ("image_id", "label", "score", "box"):  # each worker has one half of the images, in their order
        together = np.concatenate([part[name] for part in two[0]])
        np.testing.assert_allclose(one[0][name], together, rtol=1e-5, atol=1e-4)
    alone, together = (json.loads((tmp_path / f"of_{n}.json").read_text()) for n in (1, 2))
    for metrics in (alone, together):
        for name in [name for name in metrics if "seconds" in name]:
            del metrics[name]
    assert alone["val/layers/iou_0"] > 0
    assert together == pytest.approx(alone, abs=1e-6)


def test_every_part_is_afterwards_in_its_former_mode(shards: ShardSet) -> None:
    model = detector().train()
    model.backbone.eval()
    before = [part.training for part in model.modules()]
    evaluate(model, shards, device=CPU, micro_batch_size=8, decode_in="inline")
    assert [part.training for part in model.modules()] == before
    assert len(set(before)) == 2


def report_of(**changes: Any) -> EvaluationReport:
    truth, table = random_scene(0)
    return report_on(truth, table, **changes)


def report_on(truth: GroundTruth, table: DetectionTable, **changes: Any) -> EvaluationReport:
    report = evaluate_detections([table], truth, **changes)
    assert report is not None
    return replace(report, layers=LAYERS)


def test_a_disagreement_of_the_evaluators_is_reported_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "agree, largest difference" in report_of(final=True).table()
    assert not caplog.records
    truth, table = random_scene(0)
    run = coco_metrics.run_hotcoco
    # As if hotcoco had lost detections.
    monkeypatch.setattr(
        coco_metrics, "run_hotcoco", lambda truth, table, *args: run(truth, table[table.score > 0.5], *args)
    )
    report = report_of(final=True)
    assert report.numbers == coco_metrics.coco_numbers(truth, table, evaluator="pycocotools").numbers
    assert "DISAGREE" in report.table()
    assert "disagree" in caplog.text


def test_metrics_are_flat_and_finite() -> None:
    metrics = report_of().metrics()
    assert {"accuracy/AP", "accuracy/AP50", "val/AR_100", "val/layers/iou_0", "val/errors/localisation"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    without_boxes = replace(report_on(ground_truth_of([]), detections_of()), layers={"layers/iou_initial": math.nan})
    assert not {"accuracy/AP", "val/layers/iou_initial"} & set(without_boxes.metrics())
    assert "AP      -" in without_boxes.table()


def test_a_report_is_written_as_files(tmp_path: Path) -> None:
    report = report_of()
    report.write(tmp_path / "report")
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert content["numbers"]["AP"] == pytest.approx(report.numbers["AP"])
    assert content["per_class"][-1]["ap"] is None
    lines = (tmp_path / "report/per_class.csv").read_text().splitlines()
    assert len(lines) == 1 + len(report.per_class)
    assert lines[1].startswith("7,class 0,")
    assert lines[0].startswith(
        "category_id,name,boxes,AP,AP50,best_F1_score,best_F1_precision,best_F1_recall,precision_0.9_score"
    )
    assert lines[-1] == f"57,class 5,0,,{',' * 6}"
    figures = sorted(path.stem for path in (tmp_path / "report").glob("*.png"))
    assert figures == ["confusion", "errors", "layers", "per_class", "precision_recall"]
    assert imread(tmp_path / "report/confusion.png").shape[0] > 100


@pytest.mark.parametrize("classes", [1, 100])
def test_figures_can_be_rendered_without_boxes_and_of_many_classes(classes: int, tmp_path: Path) -> None:
    boxes = [] if classes == 1 else [(label, BOX) for label in range(classes)]
    truth = ground_truth_of(boxes, classes=classes)
    report = replace(report_on(truth, detections_of()), layers={"layers/iou_initial": math.nan})
    report.write(tmp_path)
    assert (tmp_path / "per_class.png").exists()
    assert not (tmp_path / "layers.png").exists()


def test_the_same_images_are_sampled_every_time(shards: ShardSet) -> None:
    model = detector().train()
    first, again = ([name for name, _ in sample_images(model, shards, device=CPU, count=2)] for _ in range(2))
    assert first == again
    assert [name.split("/")[0] for name in first] == ["images", "refinement"] * 2
    assert model.training
    other = [name for name, _ in sample_images(model, shards, device=CPU, count=2, seed=1)]
    assert other != first


def test_a_detector_that_regresses_directly_has_no_refinement_to_show(shards: ShardSet) -> None:
    model = Detector(CONFIG.with_(regression="direct"))
    report = evaluate(model, shards, device=CPU, micro_batch_size=8, decode_in="inline")
    assert report is not None
    assert "layers" in report.figures()
    assert [name.split("/")[0] for name, _ in sample_images(model, shards, device=CPU, count=2)] == ["images"] * 2
