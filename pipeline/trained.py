"""A trained detector, from wherever it lies: a checkpoint, a run's folder, an MLflow run or a model version."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
from safetensors.torch import load_file
from torch import Tensor

from dfine_core import Detector, LossConfig, ModelConfig
from dfine_core.weights import load_weights
from pipeline.config import ConfigError
from pipeline.data import storage
from pipeline.training import checkpoint

RUN, MODEL = "runs:/", "models:/"
LOGGED_NAME = "detector"  # of the model that a training logs


@dataclass(frozen=True)
class Trained:
    detector: Detector  # averaged weights, in eval mode
    names: tuple[str, ...]  # of the classes, by label
    origin: str  # what was really taken


def open_trained(source: str) -> Trained:
    """
    Args:
        source: folder or URI of a checkpoint or of a run (its best weights), `runs:/RUN_ID`, `models:/NAME@ALIAS` or
            `models:/NAME/VERSION`.

    Raises:
        ConfigError: there is no detector at `source`, or it is damaged.
    """
    try:
        if source.startswith((RUN, MODEL)):
            return _from_mlflow(source)
        return _from_checkpoint(_best_of_run(source) or source)
    except (checkpoint.CheckpointError, mlflow.MlflowException) as error:
        raise ConfigError(f"{source}: {error}") from None


def model_config(plain: dict[str, Any]) -> ModelConfig:
    """From its JSON form, where tuples are lists."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
    values["loss"] = LossConfig(**plain["loss"])
    return ModelConfig(**values)


def _best_of_run(folder: str) -> str | None:
    """The best checkpoint of a run's folder, the newest where nothing was evaluated; None if it is not one."""
    checkpoints = storage.join(folder, "checkpoints")
    steps = checkpoint.steps_in(checkpoints)
    if not steps:
        return None
    newest = storage.join(checkpoints, checkpoint.folder_name(steps[-1]))
    best = checkpoint.read_metadata(newest).standing.best_step
    return newest if best is None else storage.join(checkpoints, checkpoint.folder_name(best))


def _from_checkpoint(uri: str) -> Trained:
    metadata = checkpoint.read_metadata(uri)
    weights = checkpoint.read_tensors(uri, "ema", metadata)
    return _built(model_config(metadata.model), weights, [category.name for category in metadata.categories], uri)


def _from_mlflow(source: str) -> Trained:
    """Raises: ConfigError, if no tracking server is named, or the run has logged no detector."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(f"{source}: set MLFLOW_TRACKING_URI to the server or database that knows it")
    uri = source
    if source.startswith(RUN) and "/" not in source.removeprefix(RUN):
        uri = f"{source}/{LOGGED_NAME}"
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    weights = next(folder.rglob("*.safetensors"), None)
    description = next(folder.rglob("detector.json"), None)
    if weights is None or description is None:
        raise ConfigError(f"{source}: holds no detector of this project")
    content = json.loads(description.read_text())
    return _built(model_config(content["config"]), load_file(weights), content["categories"], source)


def _built(config: ModelConfig, weights: dict[str, Tensor], names: list[str], origin: str) -> Trained:
    detector = Detector(config)
    load_weights(detector, weights)
    return Trained(detector.eval(), tuple(names), origin)
