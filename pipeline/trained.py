"""A trained detector from wherever it lies, object stores included. `dfine_core.loading` knows the forms that it comes in."""

import posixpath

from pyarrow import fs

from dfine_core.loading import Files, LoadedDetector, LoadError, load
from pipeline.config import ConfigError
from pipeline.data import storage

Trained = LoadedDetector  # its averaged weights, in eval mode


def open_trained(source: str, device: str = "cpu") -> Trained:
    """
    Args:
        source: folder or URI of a checkpoint, of a run (its best weights), of an exported detector or of an MLflow model;
            `runs:/RUN_ID`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`; a released `.pth` file.

    Raises:
        ConfigError: there is no detector at `source`, or it is damaged.
    """
    try:
        return load(source, device, files=STORED)
    except (LoadError, storage.StorageError) as error:
        raise ConfigError(f"{error}") from None


def _names(folder: str) -> list[str]:
    filesystem, path = storage.resolve(folder)
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        return []
    return [posixpath.basename(info.path) for info in filesystem.get_file_info(fs.FileSelector(path))]


STORED = Files(read=storage.read_bytes, names=_names)
