"""Thresholds that `evaluate --write-thresholds` puts beside weights, and the precision that a command may ask for."""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dfine_core import LoadedDetector, load
from dfine_core.checkpoints.folder import sealed_metadata
from dfine_core.checkpoints.weights import save_released
from dfine_core.thresholds import ClassThresholds
from jobs import evaluate, predict
from pipeline.config import ConfigError
from pipeline.data.shards.records import ImageRecord
from pipeline.data.sources.synthetic import CLASSES
from pipeline.export.source import ExportSource
from pipeline.export.writers import write_huggingface, write_safetensors
from pipeline.open_detector import open_detector
from pipeline.serve.replica import ServeSettings
from pipeline.thresholds import refuse_unmeasured, thresholds_file, write_thresholds
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

MEASURED = ClassThresholds((0.3, None, 0.6), (0.8, None, 0.7), 0.9)


def found_as_truth(detector: LoadedDetector) -> list[ImageRecord]:
    """Images whose true boxes are the best detections of the detector, so that every class is found."""
    records = synthetic_records(6, longest_side=64)
    found = detector([record.image for record in records], threshold=0.0)
    return [
        replace(
            record,
            boxes=each.boxes[:5].clamp(0, 48).numpy(),
            labels=each.labels[:5].numpy().astype("int32"),
            areas=np.ones(5, np.float32),
            crowd=np.zeros(5, bool),
        )
        for record, each in zip(records, found, strict=True)
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Folder of a run with one checkpoint, as far as opening its detector needs it."""
    detector = small_detector(CLASSES[:3])
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    detector.save(folder)
    (folder / "detector.json").unlink()
    (folder / "model.safetensors").rename(folder / "ema.safetensors")
    content = {
        "step": 7,
        "model": detector.config.to_plain(),
        "categories": [{"original_id": n, "name": name} for n, name in enumerate(detector.names)],
        "sha256": {"ema": hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()},
        "other": [1.5],
    }
    (folder / "metadata.json").write_bytes(sealed_metadata(content))
    return tmp_path / "run"


def test_they_are_written_into_the_best_checkpoint_of_a_run_and_nothing_else_changes(checkpoint: Path) -> None:
    loaded = open_detector(str(checkpoint))
    assert loaded.thresholds is None
    file = thresholds_file(str(checkpoint), loaded)
    before = json.loads(Path(file).read_text())
    write_thresholds(file, MEASURED)
    assert open_detector(str(checkpoint)).thresholds == MEASURED  # its digest holds
    after = json.loads(Path(file).read_text())
    assert {key: value for key, value in after.items() if key not in ("thresholds", "digest")} == {
        key: value for key, value in before.items() if key != "digest"
    }


@pytest.mark.parametrize("write", [write_safetensors, write_huggingface])
def test_they_are_written_into_the_folders_of_an_export(
    write: Callable[[ExportSource, Path], None], tmp_path: Path
) -> None:
    detector = small_detector(CLASSES[:3])
    write(ExportSource(detector), tmp_path / "exported")
    source = str(tmp_path / "exported")
    write_thresholds(thresholds_file(source, open_detector(source)), MEASURED)
    again = load(source, "cpu")
    assert again.thresholds == MEASURED
    assert again.names == detector.names


def test_weights_without_a_folder_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    detector = small_detector(CLASSES)
    save_released(detector.detector.state_dict(), detector.config, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"weights\.pth: a file of weights has no place .* dfine export "):
        thresholds_file(str(tmp_path / "weights.pth"), replace(detector, origin=str(tmp_path / "weights.pth")))
    with pytest.raises(ConfigError, match="dfine-s-coco: thresholds can be written to folders alone"):
        thresholds_file("dfine-s-coco", detector)


def test_evaluate_measures_for_another_precision_and_predict_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = small_detector()
    folder = detector.save(tmp_path / "detector")
    records = found_as_truth(detector)
    shards = write_shards(tmp_path / "val", records)
    (tmp_path / "photo.jpg").write_bytes(records[0].image)
    asked = [str(folder), str(tmp_path / "photo.jpg"), "--threshold", "precision=0.75"]
    with pytest.raises(SystemExit, match=r"no scores were measured for precision 0.75, the detector has none; measure"):
        predict.main([*asked, "--out", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()

    out = tmp_path / "evaluation"
    written = ["--precision", "0.75", "--write-thresholds", "--num-images", "0", "--out", str(out)]
    evaluate.main([str(folder), shards.uri, *written])
    assert f"thresholds written: {folder}/detector.json" in capsys.readouterr().out
    thresholds = load(folder, "cpu").thresholds
    assert thresholds is not None
    assert thresholds.precision == 0.75
    assert any(thresholds.at_precision)
    with (out / "per_class.csv").open() as file:
        measured = [row["precision_0.75_score"] for row in csv.DictReader(file)]
    assert ["" if score is None else f"{score:.6g}" for score in thresholds.at_precision] == measured
    predict.main([*asked, "--out", str(tmp_path / "found")])
    assert "threshold: precision 0.75 on the validation images: " in capsys.readouterr().out


def test_a_server_takes_a_precision_and_refuses_other_texts() -> None:
    assert ServeSettings(source="x", threshold="precision=0.9").threshold == "precision=0.9"
    assert ServeSettings(source="x", threshold=0.25).threshold == 0.25
    for wrong in ("recall=0.9", "precision=1.5", 1.5):
        with pytest.raises(ValueError, match="threshold"):
            ServeSettings(source="x", threshold=wrong)
    measured = replace(small_detector(CLASSES[:3]), thresholds=MEASURED)
    refuse_unmeasured(measured, "precision=0.9")
    with pytest.raises(ConfigError, match=r"--threshold precision=0\.5: .* has those of precision 0\.9 alone"):
        refuse_unmeasured(measured, "precision=0.5")
