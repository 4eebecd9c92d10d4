"""What two finished runs must have in common: weights bit for bit, and each metric once."""

import sqlite3
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.training import checkpoint

REPEATABLE = ("accuracy/", "train/", "val/", "final/")
OF_THE_MACHINE = ("seconds", "speed", "latency")


def tensors_of(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, averages, optimiser."""
    place = run / "checkpoints" / checkpoint.step_folder(step)
    return {f"{file}/{k}": v for file in checkpoint.FILES for k, v in load_file(place / f"{file}.safetensors").items()}


def metrics_of(database: Path, name: str, *, at_least: int = 50) -> list[tuple[str, int, float]]:
    """Metrics of the only run of this name, which is finished; speeds and loads differ from run to run."""
    with sqlite3.connect(database) as rows:
        ((run, status),) = rows.execute("select run_uuid, status from runs where name = ?", (name,)).fetchall()
        assert status == "FINISHED"
        found = rows.execute(
            "select key, step, value from metrics where run_uuid = ? order by rowid", (run,)
        ).fetchall()
    kept = [
        row for row in found if row[0].startswith(REPEATABLE) and not any(word in row[0] for word in OF_THE_MACHINE)
    ]
    assert len({row[:2] for row in kept}) == len(kept) >= at_least
    for key in {row[0] for row in kept}:
        steps = [row[1] for row in kept if row[0] == key]
        assert steps == sorted(steps), f"{key} came out of order"
    return sorted(kept)


def assert_equal_runs(runs: Path, one: str, other: str, *, step: int, database: Path | None = None) -> None:
    """Compare two runs below one storage, whose database is there too.

    Args:
        database: of the other run, if it has another.
    """
    assert_equal_weights(runs / one, runs / other, step=step)
    default = runs / "mlflow.db"
    assert metrics_of(default, one) == metrics_of(database or default, other)


def assert_equal_weights(one: Path, other: Path, *, step: int) -> None:
    """Compare a checkpoint of two runs bit by bit."""
    ours, theirs = tensors_of(one, step), tensors_of(other, step)
    assert len(ours) > 1000
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
