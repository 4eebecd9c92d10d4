"""Checkpoint format: a folder of tensors and text from which a run resumes bitwise.

    checkpoints/step-00001300/
        model.safetensors       weights as trained
        ema.safetensors         averaged weights, evaluated and shipped
        optimizer.safetensors   moments and step counts by parameter name, the loss scale, and what teachers train and adapt
        experiment.yaml         every value of the experiment, for people; a run resumes from its `run.json`
        metadata.json           written last, with a digest of its own; a folder without it is incomplete and ignored

It holds no random state: every random draw of a run is keyed by its seed and by step, image or micro-batch, so it repeats on
any number of workers.
"""

import hashlib
import json
import queue
import threading
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from dfine_core.checkpoints import folder as checkpoint_folder
from dfine_core.checkpoints.folder import METADATA as METADATA
from dfine_core.checkpoints.folder import LoadError
from dfine_core.checkpoints.folder import step_folder as step_folder
from dfine_core.parts import part_of
from pipeline import storage
from pipeline.data.shards.manifest import Category
from pipeline.errors import UserError
from pipeline.open_detector import STORED
from pipeline.text_files import load_yaml, text_of
from pipeline.training.stage_two import EvaluationHistory
from pipeline.training.state import TrainState

FORMAT_VERSION = 1
EXPERIMENT = "experiment.yaml"
FILES = ("model", "ema", "optimizer")


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged, or of another model."""


class Metadata(BaseModel):
    """Content of metadata.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    run: str
    step: int  # optimiser steps done
    epoch: int
    stage: Literal[1, 2]
    history: EvaluationHistory
    global_batch_size: int
    micro_batch_size: int
    workers: int
    skipped_steps: int  # non-finite
    model: dict[str, Any]  # complete ModelConfig
    categories: tuple[Category, ...]
    data: dict[str, str]  # manifest digest by use: train, val
    tracking_key: str | None = None  # finds the MLflow run
    parent: dict[str, str] = {}  # source of the initial weights
    versions: dict[str, str] = {}
    commit: str | None = None
    sha256: dict[str, str] = {}  # by tensor file, and of experiment.yaml
    thresholds: dict[str, Any] | None = None  # of the best weights, once the run has evaluated them at its end


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint, copied to the host: training continues while it is written."""

    metadata: Metadata
    experiment: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # by file and key


def take_snapshot(state: TrainState, metadata: Metadata, experiment: dict[str, Any]) -> Snapshot:
    """Copy the state to the host."""
    tensors = {
        "model": state.detector.state_dict(),
        "ema": state.ema.module.state_dict(),
        "optimizer": {
            **_optimizer_tensors(state),
            "loss_scale": state.loss_scale.scale,
            "finite_steps": state.loss_scale.finite_steps,
            "ema_updates": state.ema.updates,
            **({} if state.teachers is None else state.teachers.tensors()),
        },
    }
    copied = {file: {key: _copied(tensor) for key, tensor in group.items()} for file, group in tensors.items()}
    return Snapshot(metadata, experiment, copied)


def load_tensors(state: TrainState, uri: str) -> Metadata:
    """Load weights, EMA, optimiser and loss scale of a checkpoint into `state`; its step and history stay as they are.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    metadata = read_metadata(uri)
    tensors = {file: read_tensors(uri, file, metadata) for file in FILES}
    try:
        state.detector.load_state_dict(tensors["model"])
        state.ema.module.load_state_dict(tensors["ema"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{uri}: of another model: {error}") from None
    optimizer = tensors["optimizer"]
    state.loss_scale.scale.copy_(optimizer.pop("loss_scale"))
    state.loss_scale.finite_steps.copy_(optimizer.pop("finite_steps"))
    state.ema.updates.copy_(optimizer.pop("ema_updates"))
    taught = {name: optimizer.pop(name) for name in list(optimizer) if _is_of_teachers(name)}
    try:
        if state.teachers is not None:
            state.teachers.load(taught)
        elif taught:
            raise ValueError("saved with teachers, and this run has none")
    except ValueError as error:
        raise CheckpointError(f"{uri}: {error}") from None
    _load_optimizer(state, optimizer, uri, frozen=state.freezing.at(metadata.step))
    return metadata


def _is_of_teachers(name: str) -> bool:
    """Whether a tensor is a teacher's own; the moments of its parameters have names with a slash."""
    return name.startswith("teachers.") and "/" not in name


def restore(state: TrainState, uri: str) -> Metadata:
    """Bring `state` to the checkpoint, its step and history included.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    metadata = load_tensors(state, uri)
    state.step, state.history = metadata.step, metadata.history
    state.skipped_steps, state.parent = metadata.skipped_steps, metadata.parent
    return metadata


def weights_as_bytes(module: nn.Module) -> bytes:
    """Serialise a state dict as safetensors; tensors shared by several submodules are written more than once."""
    return tensors_to_bytes({key: _copied(tensor) for key, tensor in module.state_dict().items()})


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _names(state: TrainState) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in state.named_parameters().items()}


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = _names(state)
    return {
        f"{names[parameter]}/{key}": value
        for parameter, moments in state.optimizer.state.items()
        for key, value in moments.items()
    }


def _load_optimizer(state: TrainState, tensors: Mapping[str, Tensor], uri: str, *, frozen: Collection[str]) -> None:
    """Load the moments of all parameters that have been trained.

    Args:
        frozen: parts that are frozen at the checkpoint's step. They have no moments; those of a run without this are left out.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        states.setdefault(name, {})[kind] = tensor
    names = _names(state)
    ours = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    begins_later = {name for name in ours if part_of(name) in state.freezing.parts}
    if states and (different := (set(ours) ^ set(states)) - (begins_later - set(states))):
        raise CheckpointError(
            f"{uri}: its optimiser has other parameters than this run: {different}; it was trained with other frozen parts"
            " (optimizer.freeze, model.freeze_at): set them as there, or begin with its weights alone (init)"
        )
    # The optimiser numbers its parameters in the order of its groups.
    saved = state.optimizer.state_dict()
    trained = {name for name in states if part_of(name) not in frozen}
    saved["state"] = {number: states[name] for number, name in enumerate(ours) if name in trained}
    state.optimizer.load_state_dict(saved)
    # Fused Adam on a CPU walks through memory without regard to strides, and files hold moments in plain order.
    for parameter, moments in state.optimizer.state.items():
        for key, value in moments.items():
            if value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter).copy_(value)


# Files


def write(snapshot: Snapshot, folder: str) -> str:
    """Write a checkpoint below `folder`, complete or not at all, and return its URI."""
    filesystem, _ = storage.resolve(folder)
    target = storage.join(folder, step_folder(snapshot.metadata.step))
    on_disk = isinstance(filesystem, fs.LocalFileSystem)
    aside = storage.join(folder, f".{step_folder(snapshot.metadata.step)}.partial") if on_disk else target
    if on_disk:
        _set_stray_file_aside(aside)
    # Tensors first, then the experiment; the metadata with their hashes completes the checkpoint.
    hashes = {}
    for file, tensors in snapshot.tensors.items():
        content = tensors_to_bytes(tensors)
        hashes[file] = hashlib.sha256(content).hexdigest()
        storage.write_atomic(storage.join(aside, f"{file}.safetensors"), content)
    experiment = yaml.safe_dump(snapshot.experiment, sort_keys=False).encode()
    hashes["experiment"] = hashlib.sha256(experiment).hexdigest()
    storage.write_atomic(storage.join(aside, EXPERIMENT), experiment)
    _write_metadata(aside, snapshot.metadata.model_copy(update={"sha256": hashes}))
    # On a disk the whole folder appears at once.
    if on_disk:
        _set_stray_file_aside(target)
        if storage.exists(target):  # the run was rewound to an earlier step since
            storage.remove_folder(target)
        Path(storage.resolve(aside)[1]).rename(storage.resolve(target)[1])
    return target


def _set_stray_file_aside(folder: str) -> None:
    """Rename a file that lies where a checkpoint's folder goes; nothing of others is deleted."""
    path = Path(storage.resolve(folder)[1])
    if path.is_file():
        path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.stray"))


def _write_metadata(uri: str, metadata: Metadata) -> None:
    sealed = checkpoint_folder.sealed_metadata(json.loads(metadata.model_dump_json()))
    storage.write_atomic(storage.join(uri, METADATA), sealed)


def read_metadata(uri: str) -> Metadata:
    """Read and check the metadata of a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or its metadata is damaged.
    """
    try:
        return Metadata.model_validate(checkpoint_folder.read_metadata(uri, STORED))
    except LoadError as error:
        raise CheckpointError(f"{error}") from None
    except ValidationError as error:
        raise CheckpointError(f"{storage.join(uri, METADATA)}: cannot be read: {error}") from None


def read_experiment(uri: str, metadata: Metadata) -> dict[str, Any]:
    """Read the values of the experiment that a checkpoint belongs to, and check their SHA-256.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = storage.join(uri, EXPERIMENT)
    try:
        data = storage.read_bytes(path)
        content = load_yaml(text_of(data))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: cannot be read: it holds no keys with values")
    if metadata.sha256.get("experiment") not in (None, hashlib.sha256(data).hexdigest()):
        raise CheckpointError(f"{path}: is damaged: not what was written (SHA-256)")
    return content


def read_tensors(uri: str, file: str, metadata: Metadata) -> dict[str, Tensor]:
    """Read the tensors of one file of a checkpoint; arguments and errors as in `read_file`."""
    content = read_file(uri, file, metadata)
    try:
        return checkpoint_folder.tensors_from_bytes(content, f"{uri}: {file}")
    except LoadError as error:
        raise CheckpointError(f"{error}") from None


def read_file(uri: str, file: str, metadata: Metadata) -> bytes:
    """Read a safetensors file of a checkpoint and check its SHA-256.

    Args:
        file: one of `FILES`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return checkpoint_folder.read_tensor_file(uri, file, metadata.sha256.get(file), STORED)
    except LoadError as error:
        raise CheckpointError(f"{error}") from None


def steps_in(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return checkpoint_folder.complete_steps(folder, STORED)


def problem_of(uri: str) -> str | None:
    """Why a checkpoint cannot be restored; None if all its files are as they were written."""
    try:
        metadata = read_metadata(uri)
        for file in FILES:
            read_file(uri, file, metadata)
    except CheckpointError as error:
        return f"{error}"
    return None


def remove_superseded(folder: str, newest: Metadata, *, keep: int, damaged: Collection[int] = ()) -> None:
    """Keep the last `keep` checkpoints, the best ones of both stages, and the one under evaluation; remove earlier ones.

    Args:
        newest: of the checkpoint that was just written. Later ones stay, and do not count: the run could not resume from them.
        damaged: steps that do not count either.
    """
    history = newest.history
    steps = [step for step in steps_in(folder) if step <= newest.step]
    intact = [step for step in steps if step not in damaged]
    kept = {*intact[-keep:], history.best_step, history.stage_one_step, history.pending_step}
    for step in steps:
        if step not in kept:
            storage.remove_folder(storage.join(folder, step_folder(step)))


class CheckpointWriter:
    """Background thread that writes snapshots in order and removes superseded checkpoints."""

    def __init__(self, folder: str, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._damaged: set[int] = set()
        self._queue: queue.Queue[Snapshot | None] = queue.Queue(maxsize=1)  # bounds memory: a second snapshot waits
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
        self._thread.start()

    def write(self, snapshot: Snapshot) -> None:
        """Queue a snapshot; blocks while another one waits."""
        self._raise_failure()
        self._queue.put(snapshot)

    def discount(self, step: int) -> None:
        """Count the checkpoint of a step no more among those that are kept: it is damaged."""
        self._damaged.add(step)

    def wait(self) -> None:
        """Block until every snapshot is written.

        Raises:
            Exception: the first write that failed.
        """
        self._queue.join()
        self._raise_failure()

    def _work(self) -> None:
        while (snapshot := self._queue.get()) is not None:
            try:
                write(snapshot, self._folder)
                self._damaged.discard(snapshot.metadata.step)
                remove_superseded(self._folder, snapshot.metadata, keep=self._keep, damaged=self._damaged)
            except BaseException as error:  # noqa: BLE001 - raised again in the training thread
                self._failure = self._failure or error
            finally:
                self._queue.task_done()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
