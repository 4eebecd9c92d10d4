"""The server at which a run was tracked, found from its folder."""

import json
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.settings import TrackingError, TrackingSettings
from pipeline.training.tracked_run import tracking_of


@pytest.fixture(autouse=True)
def _no_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _run_tracked_at(uri: str | None, folder: Path) -> Path:
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"experiment": {}, "data": {}, "tracking_key": "key"}))
    settings = TrackingSettings.resolve(folder, experiment="tests", run_name="run", run_key="key", uri=uri)
    Outbox(run / "tracking", "key", settings.to_note())
    return run


def test_the_server_of_the_experiment_file_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run_tracked_at("http://mlflow.example:5000", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another.example:5000")
    settings, key = tracking_of(str(run))
    assert (settings.uri, key) == ("http://mlflow.example:5000", "key")


def test_the_database_beside_a_moved_folder_is_taken(tmp_path: Path) -> None:
    run = _run_tracked_at(None, tmp_path / "before")
    (tmp_path / "before/mlflow.db").touch()
    assert tracking_of(str(run))[0].uri == f"sqlite:///{tmp_path}/before/mlflow.db"
    (tmp_path / "before").rename(tmp_path / "after")
    settings, key = tracking_of(str(tmp_path / "after/run"))
    assert (settings.uri, key) == (f"sqlite:///{tmp_path}/after/mlflow.db", "key")


def test_a_password_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run_tracked_at("postgresql://me:secret@host/db", tmp_path)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        tracking_of(str(run))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    assert tracking_of(str(run))[0].uri == "postgresql://me:secret@host/db"


def test_a_name_without_a_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        tracking_of(str(tmp_path / "absent"))
