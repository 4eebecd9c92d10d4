"""The folder of a run: its files, and whether a start may continue it.

<storage>/<name>/
    run.json        experiment and data digests at the first start
    driver.json     host, process and heartbeat of the driver, see `driver_lock`
    checkpoints/    evaluation/    non_finite/    tracking/    ray/
    exchange/       files between the workers of an evaluation, while it lasts
    unrecorded.json machine and folder of the outbox, from the end of the run until MLflow has everything
    result.json     once the run is finished
"""

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import ConfigError, Experiment
from pipeline.config_files import dump_shareable, flatten
from pipeline.redaction import redact_values
from pipeline.training import checkpoint
from pipeline.training.context import ResolvedData

RUN_START = "run.json"
SWEEP_START = "sweep.json"  # in the folder of a sweep
RESULT = "result.json"
UNRECORDED = "unrecorded.json"
# Settings that do not change the result.
NEUTRAL = (
    "storage",
    "tracking.",
    "checkpoints.",
    "evaluation.num_images",
    "evaluation.before_training",
    "evaluation.asynchronous",
    "evaluation.latency",
    "evaluation.wanted_precision",
    "data.decode_in",
    "data.prefetch",
    "non_finite.",
)
# Compared by digest.
PATHS = ("data.train", "data.val", "teacher.features.model", "teacher.detector.weights", "teacher.boxes.folder")


class RunFinishedError(ConfigError):
    """A finished run that is started again."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class RunStart:
    """Facts of an existing run that a continuing start takes over."""

    tracking_key: str  # finds the MLflow run
    micro_batch_size: int | None  # as in the newest checkpoint; None at the first start
    notice: str | None = None  # run.json was damaged


def begin_or_continue(
    run: str,
    experiment: Experiment,
    data: ResolvedData,
    *,
    tracking_key: str,
    allow_changes: bool,
) -> RunStart:
    """Write the start of a new run, or check that an existing one may continue.

    Raises:
        RunFinishedError: the name belongs to a finished run.
        ConfigError: it belongs to one with another experiment or other data.
    """
    now = _start_of(experiment, data)
    path = storage.join(run, RUN_START)
    if not storage.exists(path) and not checkpoint.steps_in(storage.join(run, "checkpoints")):
        storage.write_atomic(path, json.dumps({**now, "tracking_key": tracking_key}, indent=1).encode())
        return RunStart(tracking_key, micro_batch_size=None)
    # An existing run continues only with the settings and data that it was started with.
    before, notice = _read_start(run, now)
    changes = differences(before, now)
    name = experiment.name
    if changes and not allow_changes:
        listed = "".join(f"\n  {line}" for line in changes)
        raise ConfigError(
            f"run {name!r} was started with other settings:{listed}\nGive another --name, or --allow-changes to continue with"
            " these"
        )
    if not changes and is_finished(run):
        raise RunFinishedError(
            f"run {name!r} is finished, see {storage.join(run, RESULT)}: give another --name, or a longer schedule with"
            " --allow-changes to continue",
            storage.read_json(storage.join(run, RESULT)),
        )
    if changes:
        storage.remove_file(storage.join(run, RESULT))  # it belongs to the shorter run
        storage.write_atomic(path, json.dumps({**now, "tracking_key": before["tracking_key"]}, indent=1).encode())
    return RunStart(before["tracking_key"], micro_batch_size=_last_micro_batch(run), notice=notice)


def result_of(run: str, experiment: Experiment, data: ResolvedData) -> dict[str, Any] | None:
    """Result of a finished run; None if it is not finished.

    Raises:
        ConfigError: it is finished, and was started with other settings or data.
    """
    path = storage.join(run, RESULT)
    if not storage.exists(path):
        return None
    before = storage.read_json(storage.join(run, RUN_START), "experiment", "data")
    if changes := differences(before, _start_of(experiment, data)):
        listed = "".join(f"\n  {line}" for line in changes)
        raise ConfigError(f"run {experiment.name!r} is finished, and was started with other settings:{listed}")
    result: dict[str, Any] = storage.read_json(path, "numbers")
    return result


def is_finished(run: str) -> bool:
    """Whether a run has its result."""
    return storage.exists(storage.join(run, RESULT))


def note_unrecorded(run: str, outbox: Path) -> None:
    """Note in the run's folder that MLflow may lack events, and where they wait; other machines do not see that folder."""
    content = {"host": socket.gethostname(), "outbox": str(outbox)}
    storage.write_atomic(storage.join(run, UNRECORDED), json.dumps(content).encode())


def note_recorded(run: str) -> None:
    """Note that MLflow has everything."""
    storage.remove_file(storage.join(run, UNRECORDED))


def waits_elsewhere(run: str) -> str | None:
    """Machine and folder of events that MLflow lacks, where no outbox of this machine holds them; None if it has all."""
    path = storage.join(run, UNRECORDED)
    if not storage.exists(path):
        return None
    noted = storage.read_json(path, "host", "outbox")
    return f"{noted['outbox']} on {noted['host']}"


def _read_start(run: str, now: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Content of run.json, and a notice where it was lost or damaged: it is written again.

    It comes from the newest checkpoint whose experiment can be read. Without one the run starts with `now`.
    """
    path = storage.join(run, RUN_START)
    try:
        start: dict[str, Any] = storage.read_json(path, "experiment", "data", "tracking_key")
        if all(isinstance(start[part], dict) for part in ("experiment", "data")):
            return start, None
        problem = f"{path}: damaged, it holds no experiment"
    except storage.StorageError as error:
        problem = f"{error}"
    except FileNotFoundError:
        problem = f"{path}: is missing"
    saved = _start_in_checkpoint(run, now)
    source = "there is no checkpoint to lose" if saved is None else "it is taken from the newest checkpoint"
    key = (saved or {}).get("tracking_key") or _key_in(path) or uuid.uuid4().hex
    start = {**(saved or now), "tracking_key": key}
    storage.write_atomic(path, json.dumps(start, indent=1).encode())
    return start, f"{problem}; {source}"


def _start_in_checkpoint(run: str, now: dict[str, Any]) -> dict[str, Any] | None:
    """Start of a run as its newest intact checkpoint has it; its `init` is a copy, so the present one counts."""
    folder = storage.join(run, "checkpoints")
    for step in reversed(checkpoint.steps_in(folder)):
        uri = storage.join(folder, checkpoint.step_folder(step))
        try:
            metadata = checkpoint.read_metadata(uri)
            experiment = checkpoint.read_experiment(uri, metadata)
        except checkpoint.CheckpointError:
            continue
        experiment["init"] = now["experiment"].get("init")
        if now["experiment"]["model"].get("activation") is None:  # settled at the start, after this comparison
            experiment["model"]["activation"] = None
        return {"experiment": experiment, "data": {"val": None, **metadata.data}, "tracking_key": metadata.tracking_key}
    return None


def _key_in(path: str) -> str | None:
    """Tracking key of a run.json that has nothing else; None if that is damaged too."""
    with suppress(storage.StorageError, FileNotFoundError):
        return str(storage.read_json(path, "tracking_key")["tracking_key"])
    return None


def _start_of(experiment: Experiment, data: ResolvedData) -> dict[str, Any]:
    return {"experiment": dump_shareable(experiment), "data": {"val": None, **data.digests()}}


def get_or_make_key(folder: str) -> str:
    """Tracking key of a run's or chain's folder; made at the first call."""
    if (key := key_of(folder)) is None:
        key = uuid.uuid4().hex
        storage.write_atomic(storage.join(folder, RUN_START), json.dumps({"tracking_key": key}).encode())
    return key


def outbox_folder(run: str, key: str) -> Path:
    """Local folder of the tracking outbox: inside the run's folder, or in the cache where that is an object store."""
    if "://" not in run:
        return Path(run) / "tracking"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ray-dfine" / key


def key_of(run: str) -> str | None:
    """Tracking key of the folder of a run, chain or sweep; None if it is none of these."""
    for start in (RUN_START, SWEEP_START):
        if storage.exists(path := storage.join(run, start)):
            key: str = storage.read_json(path, "tracking_key")["tracking_key"]
            return key
    return None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare two starts: one line for each setting or data set whose change alters the result."""
    # Secrets are hidden in what is stored, so they are left out of the comparison.
    old, new = (flatten(redact_values(start["experiment"])) for start in (before, now))
    lines = [
        f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(NEUTRAL) and key not in PATHS
    ]
    mixed, mixed_now = (_mixture(start["experiment"]) for start in (before, now))
    if mixed != mixed_now:
        lines.append(f"data.train: sets as {mixed} before, {mixed_now} now")
    for use, digest in now["data"].items():
        if before["data"].get(use) != digest and not (use == "train" and mixed != mixed_now):
            key = use if "." in use else f"data.{use}"
            lines.append(
                f"{key}: other data, digest {str(before['data'].get(use))[:12]} before, {str(digest)[:12]} now"
            )
    return lines


def _mixture(experiment: dict[str, Any]) -> list[tuple[float, dict[str, str]]]:
    """Weight and renamed classes of every set of the training."""
    sets = experiment["data"]["train"]
    return [(1.0, {})] if isinstance(sets, str) else [(each["weight"], each["classes"]) for each in sets]


def _last_micro_batch(run: str) -> int | None:
    folder = storage.join(run, "checkpoints")
    for step in reversed(checkpoint.steps_in(folder)):
        try:
            return checkpoint.read_metadata(storage.join(folder, checkpoint.step_folder(step))).micro_batch_size
        except checkpoint.CheckpointError:
            continue
    return None
