"""Promotion of a sweep's best point to an experiment file and a registered model."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus

from pipeline.config import ConfigError
from pipeline.config_files import dump, load_experiment
from pipeline.training.run_dir import SWEEP_START
from pipeline.tuning.promote import PROMOTED, promote
from pipeline.tuning.space import Point
from pipeline.tuning.sweep import Sweep
from pipeline.tuning.trial_records import TrialRecord, write_records
from pipeline.tuning.trial_store import RECORDS
from tests.support.simulated_sweeps import loaded, simulated

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
BEST = {"model.reg_max": 16, "loss.ddf": 0.5}
RESULTS = (0.46, 0.41, 0.44)  # results of its confirmation


def true_mean(point: Point) -> float:
    return 0.4 + 0.05 * float(point == BEST)


@dataclass(frozen=True)
class Ended:
    folder: Path
    sweep: Sweep
    client: MlflowClient
    confirmed: dict[float, str]  # MLflow run by result, for the best point


def ended(root: Path, **changes: Any) -> Ended:
    """Folder of an ended sweep, with the models of the confirmed runs in MLflow."""
    uri = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.create_experiment("sweeps", artifact_location=f"file://{root}/artifacts")
    sweep = loaded(root, name="bins", searcher={"kind": "grid"}, trials=None, tracking={"uri": uri}, **changes)
    confirmed: dict[float, str] = {}
    records: list[TrialRecord] = []
    for record in simulated(sweep, true_mean, sd=0.002):
        if record.phase == "confirm" and record.point == BEST and len(confirmed) < len(RESULTS):
            result = RESULTS[len(confirmed)]
            confirmed[result] = run_with_model(client, experiment)
            record = replace(record, final={"AP": result}, run_id=confirmed[result])
        records.append(record)
    folder = root / "runs" / "bins"
    folder.mkdir(parents=True)
    (folder / SWEEP_START).write_text(json.dumps({"sweep": dump(sweep)}))
    write_records(folder / RECORDS, records)
    return Ended(folder, sweep, client, confirmed)


def run_with_model(client: MlflowClient, experiment: str) -> str:
    run_id = str(client.create_run(experiment).info.run_id)
    model = client.create_logged_model(experiment, name="detector", source_run_id=run_id)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return run_id


def test_the_best_point_becomes_an_experiment_and_its_median_run_a_model_version(tmp_path: Path) -> None:
    found = ended(tmp_path, set={"schedule.steps": 500})
    summary = promote(f"{found.folder}/", registered_model_name="cells")
    assert "AP 0.4367 over 3 runs" in summary
    assert "better" in summary.splitlines()[0]

    experiment = load_experiment(found.folder / PROMOTED)
    assert (experiment.model.reg_max, experiment.loss.ddf, experiment.schedule.steps) == (16, 0.5, 500)
    assert experiment.name == "bins-promoted"
    assert experiment.model.num_queries == 50  # from the experiment's file
    assert Path(experiment.data.train).is_absolute()

    version = found.client.get_model_version("cells", "1")
    assert version.run_id == found.confirmed[0.44]
    assert promote(str(found.folder), registered_model_name="cells") == summary
    assert [v.version for v in found.client.search_model_versions("name = 'cells'")] == [1]


def test_without_a_model_the_experiment_is_still_written(tmp_path: Path) -> None:
    found = ended(tmp_path)
    path = found.folder / RECORDS
    unknown = [{**record, "run_id": None} for record in json.loads(path.read_text())]
    path.write_text(json.dumps(unknown))
    assert "model: not registered, the runs are not in MLflow" in promote(str(found.folder))
    assert load_experiment(found.folder / PROMOTED).model.reg_max == 16


def test_a_server_whose_password_is_not_stored_is_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ended(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    start = {"sweep": dump(result.sweep)}
    start["sweep"]["tracking"]["uri"] = "postgresql://***@db/mlflow"  # as stored
    (result.folder / SWEEP_START).write_text(json.dumps(start))
    assert "models:/shapes/1" in promote(str(result.folder), registered_model_name="shapes")
    assert load_experiment(result.folder / PROMOTED).tracking.uri is None


def test_without_a_confirmed_point_nothing_is_promoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a sweep"):
        promote(str(tmp_path))
    found = ended(tmp_path, confirm={"top": 0})
    with pytest.raises(ConfigError, match=r"no point was confirmed; finish the sweep with confirm\.top above 0"):
        promote(str(found.folder))
