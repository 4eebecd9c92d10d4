"""Folders that hold a trained detector, read in one place and on any file system.

    runs/mine/checkpoints/step-00001300/    checkpoint of a run, written by `pipeline.training.checkpoint`
        ema.safetensors                     averaged weights; other tensor files lie beside them
        metadata.json                       written last: a folder without it is incomplete and ignored
    exported/mine/                          written by `LoadedDetector.save` and by exports
        detector.json                       {"config": ..., "categories": [names], "category_ids": [ids], "thresholds": ...}
        model.safetensors
    huggingface/mine/                       layout of Transformers, written by it or by exports
        config.json                         with class names; the input size is in preprocessor_config.json
        model.safetensors
    exported/                               `--out` of an export: one entry per accepted format
        export.json
        safetensors/, huggingface/          one of the two layouts above; the first that is there is read

The folder of a run stands for its best checkpoint; for the next best where that is damaged, and a warning names both. The folder
of an MLflow model stands for its artifacts. No code from a file is run.
safetensors is imported with the first file that needs it.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dfine_core.checkpoints.activation import STATED
from dfine_core.checkpoints.class_transfer import categories_of
from dfine_core.checkpoints.transformers_layout import (
    config_from_transformers,
    from_transformers,
    input_size_of_processor,
    labels_from_transformers,
)
from dfine_core.config import ModelConfig
from dfine_core.thresholds import ClassThresholds

METADATA = "metadata.json"
DIGEST = "digest"  # key of the metadata: SHA-256 of its other values, in canonical JSON
DESCRIPTION = "detector.json"
WEIGHTS = "model.safetensors"
THRESHOLDS = "thresholds"  # key in metadata.json, detector.json and Transformers' config.json
AVERAGED = "ema"  # tensor file of a checkpoint that is evaluated and shipped
CHECKPOINTS = "checkpoints"  # below the folder of a run
TRANSFORMERS_CONFIG, TRANSFORMERS_PROCESSOR = "config.json", "preprocessor_config.json"
EXPORT_REPORT = "export.json"
EXPORTED_FOLDERS = ("safetensors", "huggingface")  # folders of an export that hold a detector, exact weights first
PUBLISHED_SIZE = (640, 640)  # input of a folder of Transformers that does not name one
_STEP_FOLDER = re.compile(r"step-(\d+)")
_EXPECTED = (
    f"the folder of a run or of a checkpoint, of an exported detector ({DESCRIPTION} beside safetensors), of Transformers"
    f" ({TRANSFORMERS_CONFIG} beside safetensors), of an MLflow model, or a released .pth file"
)
log = logging.getLogger(__name__)


class LoadError(ValueError):
    """Error of opening a detector: there is none, it is damaged, or a library that reads it is missing."""


@dataclass(frozen=True)
class FileReader:
    """Access to files: on this disk, unless a program brings other means."""

    read: Callable[[str], bytes]  # FileNotFoundError if there is none
    list_folder: Callable[[str], Iterable[str]]  # names; FileNotFoundError or NotADirectoryError if it is no folder


ON_DISK = FileReader(read=lambda path: Path(path).read_bytes(), list_folder=os.listdir)


@dataclass(frozen=True, eq=False)
class StoredDetector:
    """Content of a checkpoint, an exported folder or a released file."""

    config: ModelConfig
    weights: dict[str, Tensor]
    categories: list[tuple[int, str]]  # COCO id and name of each class, by label
    folder: str  # the one really read; the file, if it was released
    path: str  # file of the weights
    sha256: str | None = None  # content of that file; None for a released one
    metadata: dict[str, Any] | None = None  # metadata.json of a checkpoint, as written
    named: bool = True  # False: nothing names the classes, the categories are guessed by their number
    thresholds: ClassThresholds | None = None


@dataclass(frozen=True)
class DetectorDescription:
    """Content of a `detector.json`."""

    config: ModelConfig
    categories: list[tuple[int, str]]  # COCO id and name of each class, by label
    thresholds: ClassThresholds | None


# Checkpoints of a run


def step_folder(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def complete_steps(checkpoints: str, files: FileReader = ON_DISK) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; none if there is no such folder."""
    matches = [match for name in _names_in(checkpoints, files) if (match := _STEP_FOLDER.fullmatch(name))]
    steps = [
        int(match[1]) for match in matches if match[0] == step_folder(int(match[1]))
    ]  # not a copy under another name
    return sorted(step for step in steps if METADATA in _names_in(f"{checkpoints}/{step_folder(step)}", files))


def checkpoints_by_rank(checkpoints: str, files: FileReader = ON_DISK) -> list[str]:
    """Folders of the complete checkpoints: the best one, others by their AP, then the newest.

    The newest metadata that can be read has the results of all evaluations; damaged ones after it are named in warnings.

    Raises:
        LoadError: no metadata can be read, though there are checkpoints; the message is about the newest.
    """
    steps = complete_steps(checkpoints, files)[::-1]
    errors: list[LoadError] = []
    for newest in steps:
        try:
            history = read_metadata(f"{checkpoints}/{step_folder(newest)}", files).get("history") or {}
        except LoadError as error:
            errors.append(error)
            log.warning("%s; trying the checkpoint before it", error)
            continue
        best = history.get("best_step")
        if best is not None and best not in steps:
            log.warning("%s: the best checkpoint, of step %s, is missing", checkpoints, best)
        evaluated = sorted(history.get("evaluated") or (), key=lambda pair: -pair[1])
        ranked = dict.fromkeys([best, *(step for step, _ in evaluated), newest, *steps])
        return [f"{checkpoints}/{step_folder(step)}" for step in ranked if step in steps]
    if errors:
        raise errors[0]
    return []


def read_metadata(folder: str, files: FileReader = ON_DISK) -> dict[str, Any]:
    """Read the metadata of a checkpoint; its values are compared with their digest, and its step with the folder's name.

    Raises:
        LoadError: the folder is not a checkpoint, or its metadata is no JSON object or was changed.
    """
    try:
        content = json.loads(files.read(f"{folder}/{METADATA}"))
    except FileNotFoundError:
        raise LoadError(f"{folder}: not a checkpoint, it has no {METADATA}") from None
    except (ValueError, OSError, RecursionError) as error:  # not JSON; a folder, or no permission; nested too deeply
        raise LoadError(f"{folder}/{METADATA}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{folder}/{METADATA}: cannot be read: it is not a JSON object")
    digest = content.pop(DIGEST, None)  # the first versions wrote none
    if digest is not None and digest != _digest(content):
        raise LoadError(f"{folder}/{METADATA}: is damaged: not what was written (SHA-256)")
    named = _STEP_FOLDER.fullmatch(folder.rstrip("/").rpartition("/")[2])
    if named and "step" in content and content["step"] != int(named[1]):
        raise LoadError(
            f"{folder}/{METADATA}: is damaged: it is of step {content['step']!r}, the folder of step {int(named[1])}"
        )
    return content


def sealed_metadata(content: Mapping[str, Any]) -> bytes:
    """Content of a `metadata.json` with its digest."""
    return json.dumps({**content, DIGEST: _digest(content)}, indent=1).encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_tensor_file(folder: str, file: str, sha256: str | None, files: FileReader = ON_DISK) -> bytes:
    """Read a tensor file of a checkpoint and compare it with the digest in the metadata.

    Args:
        file: its name without the ending.

    Raises:
        LoadError: the file is missing or damaged.
    """
    path = f"{folder}/{file}.safetensors"
    try:
        content = files.read(path)
    except FileNotFoundError:
        raise LoadError(f"{path}: is missing") from None
    except OSError as error:  # a folder in its place, no permission, a disk that fails
        raise LoadError(f"{path}: cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise LoadError(f"{path}: is damaged: not what was written (SHA-256)")
    return content


# Detectors


def read_detector(folder: str, files: FileReader = ON_DISK) -> StoredDetector:
    """Read the detector of a checkpoint, a run, an exported folder, a folder of Transformers or an MLflow model.

    Raises:
        LoadError: there is no detector, or it is damaged; the message names the content of the folder.
    """
    try:
        names = set(files.list_folder(folder))
    except FileNotFoundError:
        raise LoadError(f"{folder} does not exist") from None
    except NotADirectoryError:
        raise LoadError(f"{folder}: no detector, but a file; give {_EXPECTED}") from None
    if METADATA in names:
        return _from_checkpoint(folder, files)
    if DESCRIPTION in names:
        return _from_exported(folder, [name for name in names if name.endswith(".safetensors")], files)
    if TRANSFORMERS_CONFIG in names:
        return _from_transformers(folder, names, files)
    if "MLmodel" in names and "artifacts" in names:
        return read_detector(f"{folder}/artifacts", files)
    if EXPORT_REPORT in names:
        return _from_export(folder, names, files)
    if CHECKPOINTS in names and (ranked := checkpoints_by_rank(f"{folder}/{CHECKPOINTS}", files)):
        return _from_first_intact(ranked, files)
    content = f"it holds {', '.join(sorted(names)[:6])}" if names else "it is empty"
    raise LoadError(f"{folder}: no detector ({content}). Expected {_EXPECTED}")


def is_timm_folder(folder: str, files: FileReader = ON_DISK) -> bool:
    """Whether a folder has the layout of timm's models: a backbone, not a detector."""
    names = _names_in(folder, files)
    if not {TRANSFORMERS_CONFIG, WEIGHTS} <= names or names & {METADATA, DESCRIPTION}:
        return False
    try:
        content = json.loads(files.read(f"{folder}/{TRANSFORMERS_CONFIG}"))
    except ValueError:
        return False
    return isinstance(content, dict) and "architecture" in content and "model_type" not in content


def parse_description(description: bytes, origin: str) -> DetectorDescription:
    """Read configuration, categories and thresholds out of the content of a `detector.json`.

    Without "category_ids", classes have their labels as ids.
    """
    try:
        content = json.loads(description)
        config, names = ModelConfig.from_plain(content["config"]), content["categories"]
        ids = content.get("category_ids") or range(len(names))
        categories = [(int(number), str(name)) for number, name in zip(ids, names, strict=True)]
        return DetectorDescription(config, categories, _thresholds_in(content, len(categories)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{origin}: its {DESCRIPTION} cannot be read: {error!r}") from None


def make_description(
    config: ModelConfig, names: Sequence[str], category_ids: Sequence[int], thresholds: ClassThresholds | None = None
) -> bytes:
    """Content of a `detector.json`."""
    content = {"config": config.to_plain(), "categories": list(names), "category_ids": list(category_ids)}
    if thresholds is not None:
        content[THRESHOLDS] = thresholds.to_plain()
    return json.dumps(content, indent=1).encode()


def _thresholds_in(content: Mapping[str, Any], num_classes: int) -> ClassThresholds | None:
    """Thresholds of a description, of a checkpoint's metadata or of Transformers' configuration; None without them."""
    plain = content.get(THRESHOLDS)
    return None if plain is None else ClassThresholds.from_plain(plain, num_classes)


def tensors_from_bytes(content: bytes, origin: str) -> dict[str, Tensor]:
    """Parse a safetensors file.

    Raises:
        LoadError: the file is damaged, or safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError:
        raise LoadError(f"{origin}: its weights are safetensors; pip install safetensors") from None
    try:
        return load(content)
    except SafetensorError as error:
        raise LoadError(f"{origin}: its weights are damaged: {error}") from None


def tensors_to_bytes(tensors: Mapping[str, Tensor], activation: str | None = None) -> bytes:
    """Serialise as a safetensors file; tensors that share storage are written more than once.

    Args:
        activation: of the detector, stated in the file, for readers that get it without its description.
    """
    from safetensors.torch import save

    metadata = None if activation is None else {STATED: activation}
    return save({key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}, metadata)


def _from_checkpoint(folder: str, files: FileReader) -> StoredDetector:
    metadata = read_metadata(folder, files)
    try:
        config = ModelConfig.from_plain(metadata["model"])
        categories = [(int(category["original_id"]), str(category["name"])) for category in metadata["categories"]]
        sha256 = metadata["sha256"][AVERAGED]
        thresholds = _thresholds_in(metadata, len(categories))
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{folder}/{METADATA}: not the metadata of a checkpoint that this version reads: {error!r}"
        ) from None
    path = f"{folder}/{AVERAGED}.safetensors"
    weights = tensors_from_bytes(read_tensor_file(folder, AVERAGED, sha256, files), path)
    return StoredDetector(config, weights, categories, folder, path, sha256, metadata, thresholds=thresholds)


def _from_first_intact(folders: Sequence[str], files: FileReader) -> StoredDetector:
    errors: list[LoadError] = []
    for folder in folders:
        try:
            stored = _from_checkpoint(folder, files)
        except LoadError as error:
            errors.append(error)
            continue
        if errors:
            log.warning("%s: %s takes the place of the best checkpoint", errors[0], folder)
        return stored
    raise errors[0]


def _from_export(folder: str, names: Collection[str], files: FileReader) -> StoredDetector:
    for name in EXPORTED_FOLDERS:
        if name in names:
            return read_detector(f"{folder}/{name}", files)
    released = [f"{folder}/{name}" for name in sorted(names) if name.endswith(".pth")]
    way_out = f"give {released[0]}" if released else "export the detector with --to safetensors as well"
    others = ", ".join(sorted(set(names) - {EXPORT_REPORT})[:6]) or "no accepted file"
    raise LoadError(f"{folder}: an export that holds no folder of weights ({others}): {way_out}")


def _from_exported(folder: str, weights: Sequence[str], files: FileReader) -> StoredDetector:
    if len(weights) != 1:
        raise LoadError(f"{folder}: {len(weights)} safetensors files beside {DESCRIPTION}, expected one")
    path = f"{folder}/{weights[0]}"
    description, content = files.read(f"{folder}/{DESCRIPTION}"), files.read(path)
    described = parse_description(description, folder)
    sha256 = hashlib.sha256(content).hexdigest()
    tensors = tensors_from_bytes(content, folder)
    return StoredDetector(
        described.config, tensors, described.categories, folder, path, sha256, thresholds=described.thresholds
    )


def _from_transformers(folder: str, names: Collection[str], files: FileReader) -> StoredDetector:
    path = f"{folder}/{WEIGHTS}"
    if WEIGHTS not in names:
        raise LoadError(
            f"{folder}: no {WEIGHTS} beside {TRANSFORMERS_CONFIG}; save the model with safe_serialization=True"
        )
    try:
        content = json.loads(files.read(f"{folder}/{TRANSFORMERS_CONFIG}"))
        if is_timm_folder(folder, files):
            raise ValueError(
                f"it is timm's {content['architecture']}, a backbone, which only `init` of a training takes"
            )
        size = PUBLISHED_SIZE
        if TRANSFORMERS_PROCESSOR in names:
            size = input_size_of_processor(json.loads(files.read(f"{folder}/{TRANSFORMERS_PROCESSOR}")), size)
        stored = files.read(path)
        weights = from_transformers(tensors_from_bytes(stored, path))
        config = config_from_transformers(content, size, weights)
        labels = labels_from_transformers(content, config.num_classes)
        thresholds = _thresholds_in(content, config.num_classes)
    except LoadError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error}" if isinstance(error, ValueError) else repr(error)
        raise LoadError(f"{folder}: its {TRANSFORMERS_CONFIG} is no D-FINE that can be read: {reason}") from None
    categories = categories_of(config.num_classes, labels)
    sha256 = hashlib.sha256(stored).hexdigest()
    named = labels is not None
    return StoredDetector(config, weights, categories, folder, path, sha256, named=named, thresholds=thresholds)


def _names_in(folder: str, files: FileReader) -> set[str]:
    try:
        return set(files.list_folder(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
