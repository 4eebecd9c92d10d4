"""Calibration of a tracked detector: at its run, in its logged model, and read from there."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from dfine_core.checkpoints.folder import sealed_metadata
from jobs import calibrate as calibrate_job
from pipeline.open_detector import open_detector
from pipeline.tracking.model import log_detector
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from tests.support.labelled_by_detector import labelled_by
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

with warnings.catch_warnings():  # on import, MLflow warns about type hints of its own
    warnings.simplefilter("ignore")
    from pipeline.tracking.served_detector import PythonModelContext, ServedDetector

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


def tracked_checkpoint(folder: Path) -> tuple[TrackingSettings, str]:
    """Run with one checkpoint and its logged model; returns the id at MLflow."""
    detector = small_detector()
    step = folder / "runs/mine/checkpoints/step-00000007"
    detector.save(step)
    (step / "detector.json").unlink()
    weights = (step / "model.safetensors").rename(step / "ema.safetensors")
    settings = TrackingSettings.resolve(folder / "runs", experiment="e", run_name="mine")
    with Tracker(folder / "outbox", settings) as tracker:
        tracker.begin({}, {})
        tracker.metrics({"val/AP": 0.5}, step=7)
        log_detector(
            tracker,
            config=detector.config,
            weights=weights,
            categories=detector.names,
            metrics={"val/AP": 0.5},
            example=synthetic_records(1)[0].image,
            step=7,
        )
        tracker.finish("FINISHED")
        assert tracker.flush(300)
        run_id, key = tracker.run_id, tracker.run_key
    assert run_id is not None
    content = {
        "step": 7,
        "model": detector.config.to_plain(),
        "categories": [{"original_id": n, "name": name} for n, name in enumerate(detector.names)],
        "sha256": {"ema": hashlib.sha256(weights.read_bytes()).hexdigest()},
        "tracking_key": key,
    }
    (step / "metadata.json").write_bytes(sealed_metadata(content))
    return settings, run_id


def test_a_calibration_reaches_the_run_and_its_model_and_is_read_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings, run_id = tracked_checkpoint(tmp_path)
    write_shards(tmp_path / "shards", labelled_by(small_detector(), 60))
    run = str(tmp_path / "runs/mine")

    # By the folder of the run, whose database lies beside it.
    calibrate_job.main([run, str(tmp_path / "shards")])
    assert f"attached to run {run_id}" in capsys.readouterr().out
    client = MlflowClient(settings.uri)
    found = client.get_run(run_id)
    assert {artifact.path for artifact in client.list_artifacts(run_id, "calibration")} == {
        *("calibration/calibration.html", "calibration/calibration.json")
    }
    local = open_detector(run).calibration
    assert local is not None
    assert found.data.tags["dfine.calibration.digest"] == local.digest
    assert found.data.tags["dfine.calibration.images"] == "30"
    written = json.loads((tmp_path / "runs/mine/checkpoints/step-00000007/calibration.json").read_text())
    assert found.data.metrics["calibration/coverage_90"] == written["measured"]["conformal"]["0.9"]
    assert found.data.metrics["calibration/coverage_boxes_90"] == written["measured"]["conformal_boxes"]["0.9"]
    assert found.data.metrics["calibration/score_error"] == written["measured"]["score_error"][1]

    # Whoever opens the logged model has it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.uri)
    from_run = open_detector(f"runs:/{run_id}")
    assert from_run.calibration == local
    model_id = found.outputs.model_outputs[0].model_id
    assert client.get_logged_model(model_id).tags["dfine.calibration.digest"] == local.digest
    (image,) = (record.image for record in synthetic_records(1))
    assert served_scores(client, model_id, image, tmp_path) == pytest.approx(
        from_run(image)[0].scores.tolist(), rel=1e-3
    )

    # By the URI, which has no folder: the model gets the new one.
    calibrate_job.main([f"runs:/{run_id}", str(tmp_path / "shards"), "--scores", "platt"])
    again = open_detector(f"runs:/{run_id}").calibration
    assert again is not None
    assert again.scores.method == "platt"
    assert open_detector(run).calibration == local


def served_scores(client: MlflowClient, model_id: str, image: bytes, folder: Path) -> Any:
    """Scores of the detector as MLflow serves it, from the downloaded artifacts of its model."""
    import mlflow

    downloaded = Path(
        mlflow.artifacts.download_artifacts(
            artifact_uri=f"models:/{model_id}", dst_path=str(folder / "m"), tracking_uri=client.tracking_uri
        )
    )
    artifacts = {
        "description": str(next(downloaded.rglob("detector.json"))),
        "weights": str(next(downloaded.rglob("*.safetensors"))),
    }
    served = ServedDetector()
    context = PythonModelContext(artifacts=artifacts, model_config={})
    served.load_context(context)
    (answer,) = served.predict(context, pd.DataFrame({"image": [image]}))
    return answer["scores"]


def test_a_detector_that_was_never_tracked_is_calibrated_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = small_detector().save(tmp_path / "detector")
    write_shards(tmp_path / "shards", labelled_by(small_detector(), 60))
    with pytest.raises(SystemExit, match="MLFLOW_TRACKING_URI"):
        calibrate_job.main([str(folder), str(tmp_path / "shards"), "--attach", "runs:/0123"])
    assert not (folder / "calibration.json").exists()
    calibrate_job.main([str(folder), str(tmp_path / "shards")])
    assert "attached" not in capsys.readouterr().out
    assert open_detector(str(folder)).calibration is not None
