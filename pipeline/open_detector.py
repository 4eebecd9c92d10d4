"""Trained detectors by path, URI or published name: `dfine_core.load` with more places to read from."""

import os
import posixpath
import tempfile
from dataclasses import replace
from pathlib import Path

from pyarrow import fs

from dfine_core.checkpoints.folder import DESCRIPTION, FileReader, LoadError
from dfine_core.inference import LoadedDetector, load
from dfine_core.runtimes.files import PROGRAM_SUFFIXES
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.mlflow_access import RUN_SCHEME, TRACKING_URI, import_mlflow, is_mlflow_uri
from pipeline.pretrained import fetch, is_published
from pipeline.redaction import redact

LOGGED_NAME = "detector"  # name of the model that a training run logs


def open_detector(
    source: str, device: str | None = "cpu", activation: str | None = None, *, exported: bool = False
) -> LoadedDetector:
    """Open a trained detector, with its averaged weights and in eval mode.

    Args:
        source: folder or URI of a checkpoint, of a run (its best weights), of an exported detector or of an MLflow model;
            `runs:/RUN_ID`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`; a released `.pth` file; a published name or
            `hf://ORG/NAME[@REVISION]`, which are fetched into the hub's cache.
        device: None takes a GPU if there is one.
        activation: of a weights file that does not name it, see `load`.
        exported: also open exported files, which return detections and have no weights to train or to look into.

    Raises:
        ConfigError: there is no detector at `source`, or it is damaged.
        PretrainedError: published weights cannot be fetched.
    """
    if source.endswith(PROGRAM_SUFFIXES):
        if not exported:
            raise ConfigError(
                f"{source}: an exported file, which predict, serve, benchmark and check-engine take; give the detector that it"
                " was made of"
            )
        if "://" in source:
            raise ConfigError(f"{source}: runtimes open files on this machine alone; copy it to a disk")
    try:
        if is_mlflow_uri(source):
            return _from_mlflow(source, device, activation)
        if is_published(source):
            fetched = fetch(source)
            return replace(load(fetched.folder, device, activation=activation), origin=fetched.origin)
        return load(source, device, activation=activation, files=STORED)
    except (LoadError, storage.StorageError) as error:
        raise ConfigError(f"{error}") from None


def _from_mlflow(source: str, device: str | None, activation: str | None) -> LoadedDetector:
    if not os.environ.get(TRACKING_URI):
        raise LoadError(f"{source}: set {TRACKING_URI} to the server or database that has it")
    import_mlflow()
    import mlflow.artifacts  # slow to import, and seldom needed
    from mlflow.exceptions import MlflowException

    uri = (
        f"{source}/{LOGGED_NAME}"
        if source.startswith(RUN_SCHEME) and "/" not in source.removeprefix(RUN_SCHEME)
        else source
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            downloaded = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        except (MlflowException, OSError) as error:
            raise LoadError(f"{source}: {redact(str(error))}") from None
        described = next(Path(downloaded).rglob(DESCRIPTION), None)
        if described is None:
            raise LoadError(f"{source}: holds no detector of this project")
        loaded = load(described.parent, device, activation=activation)
    return replace(loaded, origin=source, path=None)  # its files are deleted with the temporary folder


def _list_folder(folder: str) -> list[str]:
    filesystem, path = storage.resolve(folder)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise FileNotFoundError(folder)
    if kind != fs.FileType.Directory:
        raise NotADirectoryError(folder)
    return [posixpath.basename(info.path) for info in filesystem.get_file_info(fs.FileSelector(path))]


STORED = FileReader(read=storage.read_bytes, list_folder=_list_folder)  # local paths and object stores
