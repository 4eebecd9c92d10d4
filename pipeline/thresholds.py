"""Thresholds of stored detectors: those that a command asks for, and measured ones written beside the weights."""

import json

from dfine_core.checkpoints.folder import (
    DESCRIPTION,
    METADATA,
    THRESHOLDS,
    TRANSFORMERS_CONFIG,
    LoadError,
    read_metadata,
    sealed_metadata,
)
from dfine_core.inference import LoadedDetector
from dfine_core.thresholds import ClassThresholds, Threshold
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.mlflow_access import is_mlflow_uri
from pipeline.open_detector import STORED
from pipeline.pretrained import is_published

KEEPERS = (
    METADATA,
    DESCRIPTION,
    TRANSFORMERS_CONFIG,
)  # files that hold thresholds, as `dfine_core.load` looks for them


def refuse_unmeasured(loaded: LoadedDetector, threshold: Threshold | None) -> None:
    """Check that the detector has the scores that a threshold asks for.

    Raises:
        ConfigError: it is a precision that nothing was measured for.
    """
    try:
        loaded.least_scores(threshold)
    except ValueError as error:
        raise ConfigError(f"--threshold {threshold}: {error}") from None


def refuse_without_intervals(loaded: LoadedDetector, coverage: float | None, joint: bool = False) -> None:
    """Check that the detector has intervals of edges, if any are asked for.

    Raises:
        ConfigError: it regresses boxes directly, the coverage lies outside (0, 1), or joint intervals are not calibrated.
    """
    if coverage is None:
        if joint:
            raise ConfigError("--joint says what --coverage counts: give --coverage 0.9, too, or leave --joint out")
        return
    try:
        loaded.edges().kind(coverage, joint)
    except ValueError as error:
        raise ConfigError(f"--coverage {coverage:g}{' --joint' if joint else ''}: {error}") from None


def thresholds_file(source: str, loaded: LoadedDetector) -> str:
    """File that holds the thresholds of a detector, and can be written.

    Args:
        source: the detector was opened from it.

    Raises:
        ConfigError: there is no such file: weights alone, or a copy that is not the user's.
    """
    if is_published(source) or is_mlflow_uri(source):
        raise ConfigError(
            f"{source}: thresholds can be written to folders alone, and this is none: export it with"
            f" dfine export {source} --to safetensors --out FOLDER first"
        )
    try:
        names = set(STORED.list_folder(loaded.origin))
    except NotADirectoryError:
        raise ConfigError(
            f"{loaded.origin}: a file of weights has no place for thresholds: export it with"
            f" dfine export {source} --to safetensors --out FOLDER first"
        ) from None
    return storage.join(loaded.origin, next(name for name in KEEPERS if name in names))


def write_thresholds(file: str, thresholds: ClassThresholds) -> None:
    """Replace the thresholds in a file of `KEEPERS`; whoever reads it meanwhile gets the old or the new ones.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    folder, _, name = file.rpartition("/")
    try:
        content = read_metadata(folder, STORED) if name == METADATA else storage.read_json(file)
    except LoadError as error:
        raise ConfigError(f"{error}") from None
    content[THRESHOLDS] = thresholds.to_plain()
    storage.write_atomic(file, sealed_metadata(content) if name == METADATA else json.dumps(content, indent=1).encode())
