"""The folder of a run: whose it is, what it began with, and whether it may be continued.

<storage>/<name>/
    run.json        what the run began with
    driver.json     who trains it now
    checkpoints/    evaluation/    not_finite/    tracking/    ray/
    result.json     when it is finished
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import ConfigError, Experiment
from pipeline.config_files import dump
from pipeline.data.shards.manifest import ShardSet
from pipeline.tracking.names import flatten
from pipeline.training import checkpoint

BEGAN = "run.json"
DRIVER = "driver.json"
RESULT = "result.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # a driver on another machine that has not been heard of for so long is gone
# What may change without changing what is learnt.
NEUTRAL = (
    "storage",
    "tracking.",
    "checkpoints.",
    "evaluation.pictures",
    "evaluation.before_training",
    "evaluation.beside",
    "evaluation.latency",
    "data.decode_in",
    "data.prefetch",
    "not_finite.",
)
PLACES = ("data.train", "data.val")  # compared by digest


@dataclass(frozen=True)
class Began:
    tracking_key: str
    micro_batch: int | None  # of the newest checkpoint; None at the first start


def begin_or_continue(
    run: str,
    experiment: Experiment,
    shards: ShardSet,
    val: ShardSet | None,
    *,
    tracking_key: str,
    allow_changes: bool,
) -> Began:
    """Note what a new run begins with, or check that a known one may go on.

    Raises:
        ConfigError: the name belongs to a finished run, or to one that began with something else.
    """
    now = _beginning(experiment, shards, val)
    path = storage.join(run, BEGAN)
    if not storage.exists(path):
        storage.write_atomic(path, json.dumps({**now, "tracking_key": tracking_key}, indent=1).encode())
        return Began(tracking_key, micro_batch=None)
    began = storage.read_json(path, "experiment", "data", "tracking_key")
    changes = differences(began, now)
    name = experiment.name
    if changes and not allow_changes:
        listed = "".join(f"\n  {line}" for line in changes)
        raise ConfigError(
            f"run {name!r} began with something else:{listed}\nGive another --name, or --allow-changes to go on with these"
        )
    if not changes and storage.exists(storage.join(run, RESULT)):
        raise ConfigError(
            f"run {name!r} is finished, see {storage.join(run, RESULT)}: give another --name, or a longer schedule with"
            " --allow-changes to go on"
        )
    if changes:
        storage.write_atomic(path, json.dumps({**now, "tracking_key": began["tracking_key"]}, indent=1).encode())
    return Began(began["tracking_key"], micro_batch=_last_micro_batch(run))


def result_of(run: str, experiment: Experiment, shards: ShardSet, val: ShardSet | None) -> dict[str, Any] | None:
    """What a finished run came to; None if it is not finished.

    Raises:
        ConfigError: it is finished, and began with something else.
    """
    path = storage.join(run, RESULT)
    if not storage.exists(path):
        return None
    began = storage.read_json(storage.join(run, BEGAN), "experiment", "data")
    if changes := differences(began, _beginning(experiment, shards, val)):
        listed = "".join(f"\n  {line}" for line in changes)
        raise ConfigError(f"run {experiment.name!r} is finished, and began with something else:{listed}")
    result: dict[str, Any] = storage.read_json(path, "numbers")
    return result


def _beginning(experiment: Experiment, shards: ShardSet, val: ShardSet | None) -> dict[str, Any]:
    data = {"train": shards.manifest.digest, "val": val.manifest.digest if val else None}
    return {"experiment": dump(experiment), "data": data}


def key_made_once(folder: str) -> str:
    """The key under which MLflow knows what this folder is of; drawn when it is first asked for."""
    if (key := key_of(folder)) is None:
        key = uuid.uuid4().hex
        storage.write_atomic(storage.join(folder, BEGAN), json.dumps({"tracking_key": key}).encode())
    return key


def queue_folder(run: str, key: str) -> Path:
    """Where its record waits for MLflow: in the run's folder, or on this machine's disk where that is an object store."""
    if "://" not in run:
        return Path(run) / "tracking"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ray-dfine" / key


def key_of(run: str) -> str | None:
    """Under which MLflow knows the run of this folder; None if it is no run's folder."""
    path = storage.join(run, BEGAN)
    return storage.read_json(path, "tracking_key")["tracking_key"] if storage.exists(path) else None


def differences(began: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key whose change means another result."""
    before, after = flatten(began["experiment"]), flatten(now["experiment"])
    lines = [
        f"{key}: {before.get(key)!r} before, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(NEUTRAL) and key not in PLACES
    ]
    for use, digest in now["data"].items():
        if began["data"].get(use) != digest:
            lines.append(
                f"data.{use}: other data, digest {str(began['data'].get(use))[:12]} before, {str(digest)[:12]} now"
            )
    return lines


def _last_micro_batch(run: str) -> int | None:
    folder = storage.join(run, "checkpoints")
    for step in reversed(checkpoint.steps_in(folder)):
        try:
            return checkpoint.read_metadata(storage.join(folder, checkpoint.folder_name(step))).micro_batch
        except checkpoint.CheckpointError:
            continue
    return None


@contextmanager
def claimed(run: str) -> Iterator[None]:
    """The run belongs to this process while the block runs.

    Raises:
        ConfigError: it belongs to another one that is alive.
    """
    path = storage.join(run, DRIVER)
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    if storage.exists(path):
        other = storage.read_json(path, "host", "pid", "at")
        if _lives(other, me):
            raise ConfigError(
                f"{run} is being trained by process {other['pid']} on {other['host']}: wait for it, stop it, or give"
                " another --name"
            )
    ended = threading.Event()

    def write(at: float) -> None:
        storage.write_atomic(path, json.dumps({**me, "at": at}).encode())

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            write(time.time())

    write(time.time())
    thread = threading.Thread(target=beat, daemon=True, name="claim")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write(0)


def _lives(other: dict[str, Any], me: dict[str, Any]) -> bool:
    if time.time() - other["at"] > STALE_SECONDS:
        return False
    here = other["host"] == me["host"]
    return not here or (other["pid"] != me["pid"] and os.path.exists(f"/proc/{other['pid']}"))
