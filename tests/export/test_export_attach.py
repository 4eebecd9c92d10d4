"""Exported files attached to an MLflow run: artifacts, metrics, and tags of the model version."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import export as export_job
from pipeline.export.source import ExportSource
from pipeline.export.writers import write_safetensors
from pipeline.tracking.client import ResolvedUri, RunLookupError, find_target
from tests.support.varied_detectors import loaded, small

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    folder = tmp_path_factory.mktemp("mlflow")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db", registry_uri=f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("shapes", artifact_location=f"file://{folder}/artifacts")
    client.create_registered_model("shapes")
    return client


@pytest.fixture
def version(server: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> ResolvedUri:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.tracking_uri)
    experiment = server.get_experiment_by_name("shapes")
    assert experiment is not None
    run = server.create_run(experiment.experiment_id)
    made = server.create_model_version("shapes", f"{run.info.artifact_uri}/detector", run.info.run_id)
    server.set_registered_model_alias("shapes", "champion", made.version)
    return ResolvedUri(run.info.run_id, "shapes", str(made.version))


def test_a_run_a_version_and_an_alias_lead_to_the_same_run(version: ResolvedUri) -> None:
    assert find_target(f"models:/shapes/{version.version}") == version
    assert find_target("models:/shapes@champion") == version
    assert find_target(f"runs:/{version.run_id}") == find_target(f"runs:/{version.run_id}/detector")
    assert find_target(f"runs:/{version.run_id}") == ResolvedUri(version.run_id)


@pytest.mark.usefixtures("version")
def test_a_missing_run_or_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for source, message in (
        ("runs:/none", "runs:/none"),
        ("models:/shapes@nobody", "nobody"),
        ("models:/shapes", "which version"),
        ("exported/folder", "name a run"),
    ):
        with pytest.raises(RunLookupError, match=message):
            find_target(source)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(RunLookupError, match="set MLFLOW_TRACKING_URI"):
        find_target("models:/shapes@champion")


def test_accepted_files_metrics_and_tags_are_attached_and_refused_files_are_not(
    version: ResolvedUri, server: MlflowClient, tmp_path: Path
) -> None:
    stored, out = tmp_path / "stored", tmp_path / "out"
    write_safetensors(ExportSource(loaded(small(input_size=(64, 96)))), stored)
    with pytest.raises(SystemExit) as ended:  # Transformers cannot express this size
        export_job.main(
            [
                *(str(stored), "--to", "released", "safetensors", "huggingface", "--out", str(out)),
                *("--num-images", "2", "--attach", "models:/shapes@champion"),
            ]
        )
    assert ended.value.code == 1
    assert version.name is not None
    assert version.version is not None
    artifacts = {file.path for file in server.list_artifacts(version.run_id, "export")}
    assert artifacts == {"export/detector.pth", "export/safetensors", "export/export.json"}
    report = json.loads((out / "export.json").read_text())
    digest = report["formats"]["released"]["files"][0]["sha256"]
    run = server.get_run(version.run_id).data
    tags = server.get_model_version(version.name, version.version).tags
    for attached in (run.tags, tags):
        assert attached["dfine.export.released"] == f"accepted: detector.pth sha256:{digest}"
        assert attached["dfine.export.huggingface"].startswith("refused: cannot be written")
    assert run.metrics["export/released/agreeing"] == 1
    assert "export/huggingface/agreeing" not in run.metrics
