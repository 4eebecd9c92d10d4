"""What a dry run checks beyond the plan: initial weights, tracking URI, storage and disk space, with nothing written."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from pyarrow import fs

from dfine_core import Detector, ModelConfig
from pipeline import storage
from pipeline.config import ConfigError, Experiment
from pipeline.errors import UserError
from pipeline.mlflow_access import is_mlflow_uri
from pipeline.pretrained import is_published
from pipeline.tracking.settings import TrackingSettings
from pipeline.training.context import ResolvedData
from pipeline.training.init_weights import load_initial

CHECKPOINT_VALUES = 4  # per parameter: value, two moments, averaged value
FLOAT_BYTES = 4
BEST = 2  # checkpoints kept besides the latest: the best ones of both stages


def refuse_failing_start(experiment: Experiment, data: ResolvedData, config: ModelConfig) -> list[str]:
    """Check what a start would find; return lines about what it would use.

    Raises:
        ConfigError: names every problem, not the first alone.
    """
    problems = [*_init_problems(experiment, data, config), *_tracking_problems(experiment)]
    free, storage_problems = _free_bytes(experiment.storage)
    problems += storage_problems
    needed = checkpoint_bytes(config, experiment.checkpoints.keep)
    if free is not None and free < needed:
        problems.append(
            f"storage: {experiment.storage} has {_size(free)} left, the checkpoints take {_size(needed)}: free disk space,"
            " name another folder, or lower checkpoints.keep"
        )
    if problems:
        raise ConfigError("\n  ".join(["the start would fail:", *problems]))
    left = "" if free is None else f", {_size(free)} free"
    return [f"checkpoints in {experiment.storage}: {_size(needed)} at most{left}"]


def checkpoint_bytes(config: ModelConfig, keep: int) -> int:
    """Disk space of the checkpoints of a run, with the one that is being written."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Detector(config).parameters())
    return (keep + BEST + 1) * parameters * CHECKPOINT_VALUES * FLOAT_BYTES


def _init_problems(experiment: Experiment, data: ResolvedData, config: ModelConfig) -> Iterator[str]:
    init = experiment.init
    if not init or is_published(init) or is_mlflow_uri(init):
        return  # a dry run fetches nothing
    try:
        load_initial(Detector(config), init, data.train.names)
    except UserError as error:
        yield f"{error}"


def _tracking_problems(experiment: Experiment) -> Iterator[str]:
    try:
        TrackingSettings.resolve(
            experiment.storage,
            experiment=experiment.tracking.experiment,
            run_name=experiment.name or "run",
            uri=experiment.tracking.uri,
        )
    except UserError as error:
        yield f"{error}"


def _free_bytes(uri: str) -> tuple[int | None, list[str]]:
    """Free space where checkpoints would lie, None on an object store; and why nothing can be written there."""
    try:
        filesystem, path = storage.resolve(uri)
        if not isinstance(filesystem, fs.LocalFileSystem):
            filesystem.get_file_info(path)
            return None, []
        folder = next(parent for parent in (Path(path), *Path(path).parents) if parent.exists())
        with NamedTemporaryFile(dir=folder):  # permissions alone do not show a read-only disk
            return shutil.disk_usage(folder).free, []
    except (UserError, OSError) as error:
        return None, [f"storage: {uri} cannot be written: {error}"]


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
