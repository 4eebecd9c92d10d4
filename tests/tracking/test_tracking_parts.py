"""The parts of tracking that need no MLflow store: settings, names, the file of events, the node's own numbers."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from pipeline.redaction import redact
from pipeline.tracking.event_log import EventLog
from pipeline.tracking.names import flatten, mlflow_key, mlflow_value
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.system import system_metrics


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# Settings


def test_the_default_store_is_a_database_in_the_storage() -> None:
    settings = TrackingSettings.resolve("some/place", experiment="dfine/coco", run_name="r")
    assert settings.uri == f"sqlite:///{Path.cwd()}/some/place/mlflow.db"
    assert settings.artifact_location == f"file://{Path.cwd()}/some/place/mlartifacts/dfine%2Fcoco"


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:word@host:5000/path", "http://***@host:5000/path"),
        ("failed: https://u:p@ss@host/x and more", "failed: https://***@host/x and more"),
        ("postgresql://u:word@db/mlflow", "postgresql://***@db/mlflow"),
        ("http://token@host/x", "http://***@host/x"),
        ("http://host/x?at=a@b:c", "http://host/x?at=a@b:c"),
        ("mail me@home", "mail me@home"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


# Names


@given(st.text(max_size=300))
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    key = mlflow_key(name)
    _validate_metric_name(key)
    _validate_param_name(key)
    assert mlflow_key(key) == key


def test_a_long_value_says_that_it_was_cut() -> None:
    assert mlflow_value("abcdef", 4) == "abc…"


def test_settings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": None}) == {"a.b.c": 1, "d": "[1, 2]", "e": None}


# The file of events


def test_a_torn_last_line_was_never_an_event(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(path, 0)
    log.append({"n": 1})
    log.append({"n": 2})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"n": 3, "text": "' + b"x" * 200_000)  # longer than what is looked at in one go
    log = EventLog(path, 0)
    assert log.pending == 2
    log.append({"n": 4})
    assert [event["n"] for event, _ in log.read(10)] == [1, 2, 4]
    log.close()


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.text(max_size=5)),
    st.tuples(st.just("read"), st.integers(1, 3)),
    st.tuples(st.just("reopen"), st.binary(max_size=8)),  # behind a line that the bytes are the torn rest of
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPERATIONS, max_size=12))
def test_a_log_reads_back_what_was_written_wherever_it_was_cut_and_reopened(
    tmp_path: Path, operations: list[tuple[str, Any]]
) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    log, written, taken, offset = EventLog(path, 0), [], [], 0
    for kind, value in operations:
        if kind == "append":
            log.append({"text": value})
            written.append({"text": value})
        elif kind == "read":
            for event, offset in log.read(value):  # noqa: B007  # of the last one
                taken.append(event)
            log.passed(len(taken) - (len(written) - log.pending), offset)
        else:
            log.close()
            with path.open("ab") as file:
                file.write(value.replace(b"\n", b""))
            log = EventLog(path, offset)
        assert log.pending == len(written) - len(taken)
    rest = [event for event, _ in log.read(100)]
    log.close()
    assert taken + rest == written


def test_the_node_is_measured() -> None:
    system_metrics()
    metrics = system_metrics()
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100
    # An independent look at the same number.
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert metrics["system/process_memory_usage_megabytes"] == pytest.approx(resident, rel=0.1)
