"""The parts of tracking that need no MLflow server: settings, names, metrics of the node."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import LoggedModelOutput
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from pipeline import mlflow_access
from pipeline.config import Tracking
from pipeline.config_files import flatten
from pipeline.tracking.client import PARENT_RUN, RunLookupError, connect, find_run, find_run_by_key, resolve
from pipeline.tracking.mlflow_writer import MlflowWriter
from pipeline.tracking.model_registry import register
from pipeline.tracking.run_facts import Runs
from pipeline.tracking.settings import RUN_KEY, TrackingError, TrackingSettings, mlflow_key, mlflow_value
from pipeline.tracking.system import system_metrics

ROOT = Path(__file__).parents[2]

# MLflow's database layer uses options that SQLAlchemy 2.1 has deprecated; this project does not call SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# Settings


@pytest.mark.parametrize("name", ["a%20b", "50%", "really?"])
def test_a_storage_that_mlflow_would_misread_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrackingError, match="would write it elsewhere: choose another storage folder"):
        TrackingSettings.resolve(tmp_path / name, experiment="e", run_name="r", uri=None)
    named = TrackingSettings.resolve(tmp_path / name, experiment="e", run_name="r", uri="http://host:5000")
    assert named.uri == "http://host:5000"


def test_the_default_store_is_a_database_in_the_storage() -> None:
    settings = TrackingSettings.resolve("some/folder", experiment="dfine/coco", run_name="r")
    assert settings.uri == f"sqlite:///{Path.cwd()}/some/folder/mlflow.db"
    assert settings.artifact_location == f"file://{Path.cwd()}/some/folder/mlartifacts/dfine%2Fcoco"


def test_an_argument_takes_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert TrackingSettings.resolve("s3://b/x", experiment="e", run_name="r").uri == "http://environment:5000"
    named = TrackingSettings.resolve("s3://b/x", experiment="e", run_name="r", uri="http://argument:5000")
    assert named.uri == "http://argument:5000"
    assert named.artifact_location is None


def test_remote_storage_needs_a_server() -> None:
    with pytest.raises(ValueError, match=r"s3://b/x cannot hold.*MLFLOW_TRACKING_URI"):
        TrackingSettings.resolve("s3://b/x", experiment="e", run_name="r")


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "htp://x"])
def test_an_unusable_tracking_uri_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ValueError, match="name a server"):
        TrackingSettings.resolve(tmp_path, experiment="e", run_name="r", uri=uri)


# Names


@given(st.text(max_size=300))
def test_every_name_becomes_one_that_mlflow_accepts(name: str) -> None:
    key = mlflow_key(name)
    _validate_metric_name(key)
    _validate_param_name(key)
    assert mlflow_key(key) == key


def test_a_long_value_ends_in_an_ellipsis() -> None:
    assert mlflow_value("abcdef", 4) == "abc…"


def test_settings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": None}) == {"a.b.c": 1, "d": "[1, 2]", "e": None}


def test_the_node_is_measured() -> None:
    system_metrics()
    metrics = system_metrics()
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100
    # The same number from an independent source.
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert metrics["system/process_memory_usage_megabytes"] == pytest.approx(resident, rel=0.1)


# MLflow's settings


def test_importing_tracking_loads_no_mlflow_and_changes_no_environment() -> None:
    modules = ("client", "lineage", "model", "model_registry", "outbox", "settings", "tracker", "uploader")
    imports = "; ".join(f"import pipeline.tracking.{name}" for name in modules)
    code = f"""
import os, sys
before = dict(os.environ)
{imports}
assert "mlflow" not in sys.modules
changed = {{name for name in os.environ if name.startswith("MLFLOW") and os.environ[name] != before.get(name)}}
assert not changed, changed
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Environment without settings of MLflow, as in a new process; restored afterwards."""
    for name in (*mlflow_access.SETTINGS, mlflow_access.RETRIES):
        monkeypatch.setenv(name, "")  # so that the present value is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(mlflow_access, "_set_here", {})
    return monkeypatch


def test_lookups_retry_and_uploads_do_not(environment: pytest.MonkeyPatch) -> None:
    mlflow_access.configure_mlflow()
    assert int(os.environ[RETRIES]) > 0
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    mlflow_access.configure_mlflow(retries=0)
    assert os.environ[RETRIES] == "0"
    mlflow_access.configure_mlflow()
    assert os.environ[RETRIES] == "0", "a lookup made the uploads of this process retry"


def test_settings_of_the_user_win(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(RETRIES, "5")
    environment.setenv("MLFLOW_LOGGING_LEVEL", "DEBUG")
    mlflow_access.configure_mlflow(retries=0)
    assert (os.environ[RETRIES], os.environ["MLFLOW_LOGGING_LEVEL"]) == ("5", "DEBUG")


# Lookups


def test_a_run_is_found_by_id_name_key_and_model(tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("e")
    first, second, twin = (
        client.create_run(experiment, run_name=name, tags={RUN_KEY: f"key-{name}"}).info.run_id
        for name in ("first", "second", "second")
    )
    client.create_registered_model("shapes")
    client.create_model_version("shapes", "file:///somewhere", first)
    client.set_registered_model_alias("shapes", "champion", "1")
    for named in (
        "first",
        first,
        f"runs:/{first}",
        f"runs:/{first}/detector",
        "models:/shapes/1",
        "models:/shapes@champion",
    ):
        assert find_run(client, named).info.run_id == first, named
    by_key = find_run_by_key(client, "key-second")
    assert by_key is not None
    assert by_key.info.start_time == min(client.get_run(run).info.start_time for run in (second, twin))
    assert find_run_by_key(client, "key-third") is None
    for named, message in (("second", "2 runs"), ("third", "0 runs"), ("models:/shapes", "which version")):
        with pytest.raises(RunLookupError, match=message):
            find_run(client, named)


def test_mlflow_takes_every_name_that_a_config_takes(tmp_path: Path) -> None:
    names = Tracking(
        experiment='it\'s "mine" \\ 100 %', registered_model_name="Größe (a, b) `c` 100 % ; --", alias="best_one-2"
    )
    assert names.registered_model_name is not None
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = TrackingSettings.resolve(tmp_path, experiment=names.experiment, run_name="it's", uri=uri)
    writer = MlflowWriter(settings, run_key="key", started_at=0, content_of=lambda _: tmp_path)
    run_id = writer.open_run(None)
    client = connect(uri)
    model = client.create_logged_model(client.get_run(run_id).info.experiment_id, "detector", run_id)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 1)])
    for _ in range(2):
        version = register(uri, run_id, names.registered_model_name, names.alias)
        assert version == f"{names.registered_model_name}/1"
    assert resolve(client, f"models:/{names.registered_model_name}@{names.alias}").run_id == run_id


def test_a_model_is_registered_once_however_often(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    experiment = client.create_experiment("e", artifact_location=f"file://{tmp_path}/artifacts")
    run_id = client.create_run(experiment).info.run_id
    with pytest.raises(RunLookupError, match="logged no model"):
        register(uri, run_id, "shapes")
    model = client.create_logged_model(experiment, "detector", run_id)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 1)])
    assert register(uri, run_id, "shapes") == "shapes/1"
    assert register(uri, run_id, "shapes", alias="champion") == "shapes/1"
    resolved = resolve(client, "models:/shapes@champion")
    assert (resolved.run_id, resolved.name, resolved.version) == (run_id, "shapes", "1")
    assert resolve(client, f"models:/{model.model_id}").run_id == run_id
    assert resolve(client, f"runs:/{run_id}").model_id == model.model_id


def test_listing_children_leaves_the_garbage_collector_as_it_was(tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    experiment_id = client.create_experiment("sweep")
    made = {client.create_run(experiment_id, tags={PARENT_RUN: "the sweep"}).info.run_id for _ in range(3)}
    client.create_run(experiment_id, tags={PARENT_RUN: "another"})
    runs = Runs(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    for was_enabled in (True, False):
        (gc.enable if was_enabled else gc.disable)()
        try:
            assert {child.run_id for child in runs.children("the sweep")} == made
            with pytest.raises(RunLookupError, match="quotes"):
                runs.children("it's")
            assert gc.isenabled() == was_enabled
        finally:
            gc.enable()


IMPORT_IN_TWO_THREADS = """
import threading
from pipeline.mlflow_access import import_mlflow
from pipeline.tracking.uploader import import_writer

errors = []

def run(load):
    together.wait()
    try:
        load()
    except Exception as error:
        errors.append(error)

together = threading.Barrier(2)
threads = [threading.Thread(target=run, args=(load,)) for load in (import_writer, import_mlflow)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
"""


def test_two_threads_may_import_mlflow_at_once() -> None:
    """Without the lock both fail in the circles of its modules."""
    done = subprocess.run([sys.executable, "-c", IMPORT_IN_TWO_THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
