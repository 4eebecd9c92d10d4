"""A trained detector as an MLflow model: a folder that predicts wherever MLflow and torch are installed, without this project.

It holds the weights as safetensors, the configuration and category names as JSON, `served_detector.py` and `dfine_core`
as source, a signature and an example. Nothing in it is pickled.
"""

import base64
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import dfine_core
from dfine_core import ModelConfig
from dfine_core.checkpoints.folder import make_description
from dfine_core.thresholds import ClassThresholds
from pipeline.mlflow_access import configure_mlflow, import_lock
from pipeline.tracking.tracker import DatasetInput, Tracker

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

REQUIREMENTS = ("torch", "torchvision", "scipy", "numpy", "pandas", "safetensors", "pillow")


def save_detector(
    folder: Path,
    *,
    config: ModelConfig,
    weights: Path,
    categories: Sequence[str],
    example: bytes,
    thresholds: ClassThresholds | None = None,
) -> None:
    """Write the MLflow model into `folder`, which must not exist. No server is needed.

    Args:
        weights: safetensors file of the detector's state dict, from before `deploy()`.
        categories: names by label.
        example: an encoded image that the UI and `mlflow models serve` display as input.
    """
    configure_mlflow()
    with import_lock, warnings.catch_warnings():  # on import, MLflow warns about type hints of its own
        warnings.simplefilter("ignore")
        import mlflow.pyfunc
    if len(categories) != config.num_classes:
        raise ValueError(f"{len(categories)} categories for a detector of num_classes {config.num_classes}")
    with tempfile.TemporaryDirectory() as temporary:
        description = Path(temporary, "detector.json")
        description.write_bytes(make_description(config, categories, range(len(categories)), thresholds))
        # Copied, because MLflow records where the files were, and packs everything in their folder.
        served = Path(shutil.copy(Path(__file__).with_name("served_detector.py"), temporary))
        package = Path(temporary, "dfine_core")
        shutil.copytree(
            Path(dfine_core.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "py.typed")
        )
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(served),
            artifacts={"weights": str(weights), "description": str(description)},
            code_paths=[str(package)],
            pip_requirements=[f"mlflow=={mlflow.__version__}"] + [f"{name}=={_public(name)}" for name in REQUIREMENTS],
            signature=_signature(),
            input_example=[{"image": base64.b64encode(example).decode()}],
        )


def log_detector(
    tracker: Tracker,
    *,
    config: ModelConfig,
    weights: Path,
    categories: Sequence[str],
    metrics: Mapping[str, float],
    example: bytes,
    step: int,
    name: str = "detector",
    dataset: DatasetInput | None = None,
    thresholds: ClassThresholds | None = None,
    registered_model_name: str | None = None,
    alias: str | None = None,
) -> None:
    """Log the detector as a model of the tracker's run; see `save_detector` and `Tracker.model`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save_detector(
            folder, config=config, weights=weights, categories=categories, example=example, thresholds=thresholds
        )
        tracker.model(
            folder,
            name=name,
            step=step,
            metrics=metrics,
            dataset=dataset,
            registered_model_name=registered_model_name,
            alias=alias,
        )


def _signature() -> "ModelSignature":
    """Signature of the model; its one column holds images as paths, bytes, base64 text or arrays."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array

    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "image")]),
        outputs=Schema(
            [
                ColSpec(Array(Array(DataType.double)), "boxes"),
                ColSpec(Array(DataType.double), "scores"),
                ColSpec(Array(DataType.long), "labels"),
                ColSpec(Array(DataType.string), "names"),
            ]
        ),
        params=ParamSchema([ParamSpec("threshold", DataType.double, None)]),
    )


def _public(package: str) -> str:
    """Version of a package without the part that names a build, such as +cu130."""
    return version(package).split("+")[0]
