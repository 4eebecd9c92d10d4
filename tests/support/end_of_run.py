"""The end of a run in a process that is killed at a chosen point, and what MLflow has of it afterwards."""

import os
import signal
import sqlite3
from collections.abc import Callable
from functools import wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from PIL import Image

from pipeline import storage
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.training.recording import deliver_run

KEY = "key-of-the-run"
STEPS = 5
# Everything that lasts longer than its process: transactions, content, files of the run, requests.
LASTING: dict[Any, tuple[str, ...]] = {
    Outbox: ("begin", "finish", "append", "store_content", "note_run_id", "remove"),
    storage: ("write_atomic", "remove_file"),
    MlflowClient: (
        *("create_run", "log_batch", "log_inputs", "log_outputs", "log_artifact", "log_artifacts", "set_tag"),
        *("create_logged_model", "log_model_artifacts", "finalize_logged_model", "set_terminated", "update_run"),
        *("create_registered_model", "create_model_version", "set_registered_model_alias"),
    ),
}


def tracking_at(uri: str, run: Path) -> TrackingSettings:
    return TrackingSettings.resolve(run.parent, experiment="e", run_name="r", uri=uri, run_key=KEY)


def end(run: Path, uri: str, model: Path, patience: float = 60.0) -> None:
    """Log the last steps and the end of a run in the order of `RunLog`, as the first start of a command or a later one."""
    if run_dir.is_finished(str(run)):
        deliver_run(str(run), uri)
        return
    if run_dir.key_of(str(run)) is None:
        storage.write_atomic(run / run_dir.RUN_START, f'{{"tracking_key": "{KEY}"}}'.encode())
    tracker = Tracker(run_dir.outbox_folder(str(run), KEY), tracking_at(uri, run))
    tracker.begin({"lr": 0.1}, {"variant": "n"})
    for step in range(1, STEPS + 1):
        tracker.metrics({"train/loss": float(step)}, step)
    tracker.metrics({"final/AP": 0.5}, STEPS)
    tracker.image("final/images", Image.new("RGB", (8, 8)), STEPS)
    tracker.text("report", "report.txt")
    tracker.model(
        model, name="detector", step=STEPS, metrics={"final/AP": 0.5}, registered_model_name="shapes", alias="champion"
    )
    tracker.finish("FINISHED")
    run_dir.note_unrecorded(str(run), tracker.folder)
    storage.write_atomic(run / run_dir.RESULT, b"{}")
    left = tracker.deliver(patience)
    if not left.events:
        run_dir.note_recorded(str(run))
    tracker.stop()


def end_killed_at(point: int, run: Path, uri: str, model: Path) -> int:
    """Exit code of a process that is killed before its lasting operation number `point`; 0 if it had fewer."""
    child = get_context("forkserver").Process(target=_end_and_die, args=(point, run, uri, model))
    child.start()
    child.join()
    return child.exitcode or 0


def preload() -> None:
    """Import everything once, in the process that the others are forked from."""
    get_context("forkserver").set_forkserver_preload([__name__, "pipeline.tracking.mlflow_writer"])


def _end_and_die(point: int, run: Path, uri: str, model: Path) -> None:
    count = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def die_or_do(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return die_or_do

    for owner, names in LASTING.items():
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))
    end(run, uri, model)


def assert_recorded_once(run: Path, database: Path) -> None:
    """Check that MLflow has every event of `end`, once."""
    with sqlite3.connect(database) as rows:
        ((run_id, status, end_time),) = rows.execute("select run_uuid, status, end_time from runs").fetchall()
        losses = rows.execute("select step, value from metrics where key = 'train/loss' order by rowid").fetchall()
        final = rows.execute("select value from metrics where key = 'final/AP' and run_uuid = ?", (run_id,)).fetchall()
        models = rows.execute("select model_id, status from logged_models").fetchall()
        versions = rows.execute("select version, run_id from model_versions").fetchall()
        aliases = rows.execute("select alias, version from registered_model_aliases").fetchall()
    assert (status, end_time > 0) == ("FINISHED", True)
    assert losses == [(step, float(step)) for step in range(1, STEPS + 1)]
    assert final == [(0.5,)]
    assert [ready for _, ready in models] == [2]  # READY
    assert versions == [(1, run_id)]
    assert aliases == [("champion", 1)]
    client = MlflowClient(f"sqlite:///{database}")
    assert len(client.list_artifacts(run_id, "images")) == 2  # the image and its thumbnail
    assert [file.path for file in client.list_artifacts(run_id) if not file.is_dir] == ["report.txt"]
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [models[0][0]]
    outbox = Outbox(run_dir.outbox_folder(str(run), KEY), None)
    assert outbox.pending().events == 0
    assert outbox.rejected() == []
    assert run_dir.is_finished(str(run))
    assert not (run / run_dir.UNRECORDED).exists()
