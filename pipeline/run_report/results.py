"""Facts of a run that its page of results shows: curves, an evaluation of its best weights, the score of every image."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfine_core.inference import LoadedDetector
from pipeline import storage
from pipeline.data.shards.classes import with_classes_of
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.data_settings import Data
from pipeline.errors import ConfigError, UserError
from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.error_types import RELABELLED, RIGHT, find_errors, sorted_boxes
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.evaluation.report import EvaluationReport
from pipeline.open_detector import open_detector
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Metadata
from pipeline.training.context import open_training_set
from pipeline.training.run_dir import is_finished
from pipeline.training.tracked_run import tracking_of

BATCH_SIZE = 16
CURVES = {"loss": "train/loss", "learning rate": "train/lr", "AP": "accuracy/AP"}
Curve = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class ImageScore:
    """Detections of one image above their thresholds, compared with its boxes."""

    number: int  # in the order of the shards
    found: int  # true boxes
    missed: int
    wrong: int  # detections without a box

    @property
    def f1(self) -> float:
        """F1 of this image; 1 where there is nothing to find and nothing was found."""
        total = 2 * self.found + self.missed + self.wrong
        return 2 * self.found / total if total else 1.0


@dataclass(frozen=True)
class RunResults:
    """Everything that the page is made of."""

    run: str
    finished: bool
    loaded: LoadedDetector
    metadata: Metadata  # of the newest checkpoint
    experiment: dict[str, Any]
    val: ShardSet
    report: EvaluationReport
    thresholds: tuple[float, ...]  # used for images, by label
    images: tuple[ImageScore, ...]
    curves: dict[str, Curve]  # by `CURVES`; AP alone if MLflow cannot be read
    notice: str | None  # why curves are missing
    train_boxes: tuple[int, ...] | None  # by label; None if the training data are out of reach


def collect(run: str, val: ShardSet | None = None) -> RunResults:
    """Evaluate the best weights of a run on its validation images, and read its history.

    Args:
        run: folder or URI.
        val: other images; None for those of the run.

    Raises:
        UserError: it is no run with a checkpoint, or has no validation images.
    """
    # 1. The newest checkpoint has the settings, the best one the weights.
    folder = storage.join(run, "checkpoints")
    steps = checkpoint.steps_in(folder)
    if not steps:
        raise ConfigError(f"{run}: not the folder of a run with a checkpoint; give one that dfine train has written")
    newest = storage.join(folder, checkpoint.step_folder(steps[-1]))
    metadata = checkpoint.read_metadata(newest)
    experiment = checkpoint.read_experiment(newest, metadata)
    data = experiment.get("data") or {}
    if val is None:
        if not data.get("val"):
            raise ConfigError(f"{run}: it has no validation images (data.val); name some with --data")
        val = load_shards(data["val"])
    loaded = replace(open_detector(run, None), calibration=None)  # scores of an evaluation are raw
    val = with_classes_of(val, loaded.names, f"the detector {run}")

    # 2. Detections of all images: the evaluation, and what is right and wrong in each.
    truth, tables = read_ground_truth(val), list[DetectionTable]()
    report = evaluate(
        loaded.detector,
        val,
        truth,
        device=loaded.device,
        micro_batch_size=BATCH_SIZE,
        decode_in="inline",
        final=True,
        progress=True,
        on_detections=tables.append,
    )
    assert report is not None  # it is the only rank
    thresholds = loaded.least_scores()
    curves, notice = _curves(run, metadata)
    return RunResults(
        run=run,
        finished=is_finished(run),
        loaded=loaded,
        metadata=metadata,
        experiment=experiment,
        val=val,
        report=report,
        thresholds=thresholds,
        images=image_scores(truth, concatenate(tables), thresholds),
        curves=curves,
        notice=notice,
        train_boxes=_train_boxes(data.get("train")),
    )


def image_scores(truth: GroundTruth, table: DetectionTable, thresholds: tuple[float, ...]) -> tuple[ImageScore, ...]:
    """Compare the detections above their thresholds with the boxes of every image, at IoU 0.5."""
    kept = table[table.score >= np.array(thresholds, np.float32)[table.label]]
    classes = len(truth.categories)
    rows = find_errors(sorted_boxes(truth), truth.indices_of(kept.image_id), kept, classes).rows
    order = truth.indices_of(truth.image_id)  # [I] index in the sorted ids of every image

    def per_image(index: NDArray[Any]) -> NDArray[np.int64]:
        return np.bincount(index, minlength=len(order))[order]

    found = per_image(rows["image"][rows["kind"] == RIGHT])
    all_kept = per_image(rows["image"][rows["kind"] != RELABELLED])
    boxes = np.bincount(truth.image[~truth.ignored], minlength=len(order))
    return tuple(
        ImageScore(number, right, true - right, detected - right)
        for number, (right, true, detected) in enumerate(
            zip(found.tolist(), boxes.tolist(), all_kept.tolist(), strict=True)
        )
    )


def _curves(run: str, metadata: Metadata) -> tuple[dict[str, Curve], str | None]:
    """Curves from MLflow; the AP of the checkpoint's history where that cannot be read."""
    own: dict[str, Curve] = {"AP": list(metadata.history.evaluated)}
    try:
        from pipeline.tracking.client import find_tracked_run, metric_histories

        settings, key = tracking_of(run)
        client, found = find_tracked_run(settings, run, key)
        histories = metric_histories(client, found.info.run_id, list(CURVES.values()))
    except (UserError, OSError) as error:
        return own, f"losses and rates are missing: {error}"
    return {name: histories[metric] for name, metric in CURVES.items()} | own, None


def _train_boxes(train: Any) -> tuple[int, ...] | None:
    try:
        return open_training_set(Data.model_validate({"train": train})).statistics.class_counts
    except (UserError, OSError, ValueError):
        return None
