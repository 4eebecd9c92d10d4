"""Initial weights of a run (`init`): another run, a model version, a released file or a backbone, fitted by names and bins.

The driver copies a model of MLflow, and what it fetches from the hub, into the run's folder (`materialize_init`): workers need
no server, and an alias or revision that moves on does not change the start of the run. A detector that teaches is copied alike.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfine_core import Detector
from dfine_core.checkpoints.activation import recognise_activation, stated_in_safetensors
from dfine_core.checkpoints.backbones import backbone_of, load_backbone
from dfine_core.checkpoints.class_transfer import coco_names, match_classes, objects365_names, transfer_classes
from dfine_core.checkpoints.folder import (
    DESCRIPTION,
    WEIGHTS,
    StoredDetector,
    is_timm_folder,
    make_description,
    read_detector,
    tensors_from_bytes,
)
from dfine_core.checkpoints.rebinning import rebin
from dfine_core.checkpoints.transformers_layout import from_transformers, is_transformers
from dfine_core.checkpoints.weights import load_weights, read_checkpoint_content, restore_constants
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.mlflow_access import TRACKING_URI, is_mlflow_uri
from pipeline.open_detector import STORED, open_detector
from pipeline.pretrained import Fetched, fetch, is_published
from pipeline.training import checkpoint

INIT, TEACHER = "init", "teacher"  # folders of copies in the folder of a run
ORIGIN = "origin.json"  # lies beside DESCRIPTION and WEIGHTS
CLASS_ROWS = "decoder.denoising_class_embed.weight"  # one row per class, and one for padding
SCALE = "decoder.reg_scale"


@dataclass(frozen=True)
class Origin:
    """Source of the loaded weights: lines for the log, and facts for checkpoints and MLflow."""

    lines: tuple[str, ...]
    parent: dict[str, str]


def materialize_init(source: str, run: str, tracking_uri: str, name: str = INIT) -> str:
    """Path of weights for the workers: a model of MLflow or of the hub is copied into the run's folder, once.

    Args:
        name: of the copy, INIT or TEACHER.

    Raises:
        ConfigError: MLflow does not know it.
        PretrainedError: the hub does not hand it out.
    """
    if not is_fetched(source):
        return source
    folder = storage.join(run, name)
    if _is_copied(run, name):
        return folder
    if is_published(source):
        _copy_fetched(fetch(source), folder)
        return folder
    from pipeline.tracking.client import connect, resolve  # here: workers need no MLflow client

    with default_server(tracking_uri):
        trained = open_detector(source)
    weights = checkpoint.weights_as_bytes(trained.detector)
    parent = {"source": source} | resolve(connect(tracking_uri), source).as_parent()
    parent["sha256"] = hashlib.sha256(weights).hexdigest()
    description = make_description(trained.config, trained.names, trained.category_ids)
    storage.write_atomic(storage.join(folder, WEIGHTS), weights)
    storage.write_atomic(storage.join(folder, DESCRIPTION), description)
    storage.write_atomic(storage.join(folder, ORIGIN), json.dumps(parent, indent=1).encode())  # last: complete with it
    return folder


def copied_or_given(source: str, run: str, name: str) -> str:
    """Path of the copy in the folder of a run that has one, else `source`."""
    return storage.join(run, name) if is_fetched(source) and _is_copied(run, name) else source


def is_fetched(source: str) -> bool:
    """Whether weights come from MLflow or the hub, and so are copied into the run's folder."""
    return is_mlflow_uri(source) or is_published(source)


def _is_copied(run: str, name: str) -> bool:
    return storage.exists(storage.join(run, name, ORIGIN))


def _copy_fetched(fetched: Fetched, folder: str) -> None:
    """Copy weights and their description out of the hub's cache."""
    published = fetched.published
    for name in fetched.files:
        storage.write_atomic(storage.join(folder, name), (fetched.folder / name).read_bytes())
    parent = {
        "source": f"{published.name} (hf://{published.repo}@{fetched.commit})",
        "repository": published.repo,
        "revision": fetched.commit,
        "licence": published.licence,
        "sha256": fetched.sha256,
    }
    storage.write_atomic(storage.join(folder, ORIGIN), json.dumps(parent, indent=1).encode())  # last: complete with it


def refuse_unreadable_weights(init: str | None, resume: str | None, run: str) -> None:
    """Read the initial weights on the driver, so that a damaged file fails once and not on every worker.

    Args:
        run: folder of the run, which may have its copy already.

    Raises:
        ConfigError: the weights of `init` are missing or damaged.
        PretrainedError: the hub does not hand them out.
        CheckpointError: `resume` is not a checkpoint.
    """
    if init and not is_mlflow_uri(init):
        folder = init
        if is_published(init):
            folder = copied_or_given(init, run, INIT)
            folder = str(fetch(init).folder) if folder == init else folder
        with _named_in_errors(init):
            _read(folder)
    if resume:
        checkpoint.read_metadata(resume)


@contextmanager
def default_server(tracking_uri: str) -> Iterator[None]:
    """Resolve MLflow URIs at the server of this run, unless the environment names another one."""
    if os.environ.get(TRACKING_URI):
        yield
        return
    os.environ[TRACKING_URI] = tracking_uri
    try:
        yield
    finally:
        del os.environ[TRACKING_URI]


def load_initial(detector: Detector, source: str, names: Sequence[str]) -> Origin:
    """Load the weights at `source` into a freshly built detector.

    Args:
        names: of the detector's classes.

    Raises:
        ConfigError: for weights that are missing, damaged or cannot be made to fit.
    """
    with _named_in_errors(source):
        initial = _read(source)
        if (backbone := backbone_of(initial.weights)) is not None:
            return _fit_backbone(detector, backbone, initial.parent, source)
        return _fit(detector, initial, names, source)


def activation_of(source: str) -> tuple[bool, str | None]:
    """Read whether the weights at `source` are a detector's, and the activation that they were trained with.

    Returns:
        False for a backbone. The activation is None where nothing names it.

    Raises:
        ConfigError: for weights that are missing or damaged.
    """
    with _named_in_errors(source):
        initial = _read(source)
    return backbone_of(initial.weights) is None, initial.activation


@contextmanager
def _named_in_errors(source: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"init: {source} does not exist") from None
    except (ValueError, OSError) as error:
        reason = f"{error}"
        raise ConfigError(f"init: {reason}" if reason.startswith(source) else f"init: {source}: {reason}") from None


@dataclass(frozen=True)
class _InitWeights:
    weights: dict[str, Tensor]
    names: Sequence[str | None] | None  # class names; None: the file does not contain them
    parent: dict[str, str]
    activation: str | None = None  # None: the file holds weights alone, of D-FINE or of DEIM


def _read(source: str) -> _InitWeights:
    try:
        STORED.list_folder(source)
    except NotADirectoryError:
        return _read_file(source)
    if is_timm_folder(source, STORED):
        read = _read_file(storage.join(source, WEIGHTS))
        return replace(read, parent=_recorded_origin(source, read.parent["sha256"]) or read.parent)
    stored = read_detector(source, STORED)
    names = [name for _, name in stored.categories] if stored.named else None
    return _InitWeights(stored.weights, names, _parent(stored), stored.config.activation)


def _read_file(path: str) -> _InitWeights:
    """Read a safetensors file, a released file or a backbone."""
    content = storage.read_bytes(path)
    parent = {"file": path, "sha256": hashlib.sha256(content).hexdigest()}
    if path.endswith(".safetensors"):
        tensors, stated = tensors_from_bytes(content, path), stated_in_safetensors(content)
        if is_transformers(tensors):
            return _InitWeights(from_transformers(tensors), None, parent, activation="relu")  # it has no other one
    else:
        stream = io.BytesIO(content)
        try:
            tensors, stated = read_checkpoint_content(stream)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(str(error).replace(str(stream), "it")) from None
    return _InitWeights(tensors, None, parent, activation=recognise_activation(tensors, path, stated))


def _parent(stored: StoredDetector) -> dict[str, str]:
    """Facts about a stored detector, for the checkpoints that descend from it."""
    sha256 = stored.sha256 or ""
    if stored.metadata is not None:
        metadata = checkpoint.Metadata.model_validate(stored.metadata)
        parent = {"checkpoint": stored.folder, "run": metadata.run, "step": str(metadata.step), "sha256": sha256}
        return parent | ({"run_key": metadata.tracking_key} if metadata.tracking_key else {})
    return _recorded_origin(stored.folder, sha256) or {"folder": stored.folder, "sha256": sha256}


def _recorded_origin(folder: str, sha256: str) -> dict[str, str] | None:
    """Origin of weights that were copied into a run's folder; None for a folder of another kind."""
    if not storage.exists(storage.join(folder, ORIGIN)):
        return None
    origin: dict[str, str] = storage.read_json(storage.join(folder, ORIGIN), "sha256")
    if origin["sha256"] != sha256:
        raise ValueError(f"{WEIGHTS} is damaged: not what was written (SHA-256)")
    return origin


def _fit_backbone(detector: Detector, weights: Mapping[str, Tensor], parent: dict[str, str], source: str) -> Origin:
    random = load_backbone(detector.backbone, weights)
    if not random:
        return Origin((f"backbone from {source}",), parent)
    blocks, total = ", ".join(random), sum(p.numel() for p in detector.backbone.parameters())
    count = sum(p.numel() for block in random for p in detector.backbone.get_submodule(block).parameters())
    line = f"backbone from {source}; it lacks {blocks}, which stay random: {count:,} of {total:,} parameters"
    return Origin((line,), parent | {"random": blocks})


def _fit(detector: Detector, initial: _InitWeights, names: Sequence[str], source: str) -> Origin:
    config, lines = detector.config, [f"weights from {source}"]
    # Constants first: bins that averaging has moved are no other bins.
    fitted, note = restore_constants(initial.weights, detector.state_dict())
    lines += [note] if note else []
    # Distributions over other bins are re-binned; boxes stay where they were.
    if config.regression == "fdr" and SCALE in fitted:
        fitted, report = rebin(fitted, reg_max=config.reg_max, reg_scale=config.reg_scale, up=config.up)
        if report.source != report.target:
            lines.append(str(report))
    # Class heads are carried over by name.
    rows = len(fitted[CLASS_ROWS]) - 1 if CLASS_ROWS in fitted else 0
    known = initial.names or _names_of(rows, names)
    if known is not None and list(known) != list(names):
        match = match_classes(known, names)
        fitted = transfer_classes(fitted, detector.state_dict(), match)
        lines.append(str(match))
    load_weights(detector, fitted)
    if not all(torch.isfinite(p).all() for p in detector.parameters()):
        raise ValueError("holds values that are not finite")
    return Origin(tuple(lines), initial.parent)


def _names_of(rows: int, names: Sequence[str]) -> Sequence[str | None] | None:
    """Class names of a file that does not contain them, by their number."""
    if rows == len(coco_names()):
        return coco_names()
    if rows == len(objects365_names()):
        return objects365_names()
    if rows != len(names):
        raise ValueError(
            f"it has {rows} classes without names, the data has {len(names)}: only files with 80 (COCO) or 366 (Objects365)"
            " classes, or with as many as the data, can be taken without names; a checkpoint folder of this project names them"
        )
    return None  # as many: taken in order
