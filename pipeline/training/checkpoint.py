"""A checkpoint: a folder of tensors and text from which a run goes on as if nothing had happened.

    checkpoints/step-00001300/
        model.safetensors       weights as trained
        ema.safetensors         averaged weights: what is evaluated and shipped
        optimizer.safetensors   moments and step counts by parameter name, and the loss scale
        experiment.yaml         every value of the experiment, for people: a run continues with its own `run.json`
        metadata.json           written last; a folder without it does not count

It holds no random state: whatever is drawn in a run is keyed by its seed and its place (step, image, micro-batch), so the
same draws come again on any number of workers.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from pipeline import storage
from pipeline.data.shards.manifest import Category
from pipeline.errors import UserError
from pipeline.training.stage_two import Standing
from pipeline.training.step import Learner

FORMAT_VERSION = 1
METADATA = "metadata.json"
EXPERIMENT = "experiment.yaml"
FILES = ("model", "ema", "optimizer")


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing, damaged or does not fit."""


class Metadata(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    run: str
    step: int  # optimiser steps done
    epoch: int
    stage: Literal[1, 2]
    standing: Standing
    global_batch: int
    micro_batch: int
    workers: int
    skipped_steps: int  # not finite
    model: dict[str, Any]  # the detector's whole configuration
    categories: tuple[Category, ...]
    data: dict[str, str]  # digest of each manifest, by its use: train, val
    tracking_key: str | None = None  # under which the MLflow run is found
    parent: dict[str, str] = {}  # where the first weights came from
    versions: dict[str, str] = {}
    commit: str | None = None
    sha256: dict[str, str] = {}  # of each tensor file


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, copied: training may go on while it is written."""

    metadata: Metadata
    experiment: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # by file


def take_snapshot(learner: Learner, metadata: Metadata, experiment: dict[str, Any]) -> Snapshot:
    average = learner.average
    tensors = {
        "model": learner.detector.state_dict(),
        "ema": average.module.state_dict(),
        "optimizer": {
            **_optimizer_tensors(learner),
            "loss_scale": learner.loss_scale.scale,
            "finite_steps": learner.loss_scale.finite_steps,
            "ema_updates": average.updates,
        },
    }
    copied = {file: {key: _copied(tensor) for key, tensor in group.items()} for file, group in tensors.items()}
    return Snapshot(metadata, experiment, copied)


def restore(learner: Learner, uri: str) -> Metadata:
    """Bring a learner to the state in a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    metadata = read_metadata(uri)
    tensors = {file: read_tensors(uri, file, metadata) for file in FILES}
    try:
        learner.detector.load_state_dict(tensors["model"])
        learner.average.module.load_state_dict(tensors["ema"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{uri}: of another model: {error}") from None
    optimizer = tensors["optimizer"]
    learner.loss_scale.scale.copy_(optimizer.pop("loss_scale"))
    learner.loss_scale.finite_steps.copy_(optimizer.pop("finite_steps"))
    learner.average.updates.copy_(optimizer.pop("ema_updates"))
    _load_optimizer(learner, optimizer, uri)
    return metadata


def weights_as_bytes(module: nn.Module) -> bytes:
    """The state dict as a safetensors file; tensors that the module shares among its parts are written twice."""
    return tensors_to_bytes({key: _copied(tensor) for key, tensor in module.state_dict().items()})


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _names(learner: Learner) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in learner.detector.named_parameters()}


def _optimizer_tensors(learner: Learner) -> dict[str, Tensor]:
    names = _names(learner)
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in learner.optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizer(learner: Learner, tensors: Mapping[str, Tensor], uri: str) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        states.setdefault(name, {})[kind] = tensor
    names = _names(learner)
    ours = [names[p] for group in learner.optimizer.param_groups for p in group["params"]]
    if states and set(ours) != set(states):
        raise CheckpointError(f"{uri}: its optimiser has other parameters than this run: {set(ours) ^ set(states)}")
    saved = learner.optimizer.state_dict()
    saved["state"] = {number: states[name] for number, name in enumerate(ours)} if states else {}
    learner.optimizer.load_state_dict(saved)


# Files


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def write(snapshot: Snapshot, folder: str) -> str:
    """Write a checkpoint below `folder`; it appears there whole or not at all."""
    filesystem, _ = storage.resolve(folder)
    target = storage.join(folder, folder_name(snapshot.metadata.step))
    on_disk = isinstance(filesystem, fs.LocalFileSystem)
    aside = storage.join(folder, f".{folder_name(snapshot.metadata.step)}.partial") if on_disk else target
    hashes = {}
    for file, tensors in snapshot.tensors.items():
        content = tensors_to_bytes(tensors)
        hashes[file] = hashlib.sha256(content).hexdigest()
        storage.write_atomic(storage.join(aside, f"{file}.safetensors"), content)
    storage.write_atomic(storage.join(aside, EXPERIMENT), yaml.safe_dump(snapshot.experiment, sort_keys=False).encode())
    metadata = snapshot.metadata.model_copy(update={"sha256": hashes})
    storage.write_atomic(storage.join(aside, METADATA), metadata.model_dump_json(indent=1).encode())
    if on_disk:
        if storage.exists(target):  # written by a run that was rewound to before it
            storage.remove_folder(target)
        Path(storage.resolve(aside)[1]).rename(storage.resolve(target)[1])
    return target


def read_metadata(uri: str) -> Metadata:
    path = storage.join(uri, METADATA)
    try:
        return Metadata.model_validate(json.loads(storage.read_bytes(path)))
    except FileNotFoundError:
        raise CheckpointError(f"{uri}: not a checkpoint, it has no {METADATA}") from None
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def read_tensors(uri: str, file: str, metadata: Metadata) -> dict[str, Tensor]:
    content = read_file(uri, file, metadata)
    try:
        return tensors_from_bytes(content)
    except SafetensorError as error:
        raise CheckpointError(f"{uri}: {file} is damaged: {error}") from None


def read_file(uri: str, file: str, metadata: Metadata) -> bytes:
    """The safetensors file of this name, as it was written.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = storage.join(uri, f"{file}.safetensors")
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    if hashlib.sha256(content).hexdigest() != metadata.sha256.get(file):
        raise CheckpointError(f"{path}: is damaged: not what was written (SHA-256)")
    return content


def steps_in(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a folder, in order."""
    filesystem, path = storage.resolve(folder)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = [
        info.base_name for info in found if info.type == fs.FileType.Directory and info.base_name.startswith("step-")
    ]
    complete = [name for name in names if storage.exists(storage.join(storage.join(folder, name), METADATA))]
    return sorted(int(name.removeprefix("step-")) for name in complete)


def remove_superseded(folder: str, *, keep: int, standing: Standing) -> None:
    """Leave the last `keep` checkpoints, the best ones of both stages, and the one that is being evaluated."""
    steps = steps_in(folder)
    kept = {*steps[-keep:], standing.best_step, standing.stage_one_step, standing.pending_step}
    for step in steps:
        if step not in kept:
            storage.remove_folder(storage.join(folder, folder_name(step)))


class Writer:
    """Writes snapshots in the background, in order, and removes those that are superseded."""

    def __init__(self, folder: str, *, keep: int, on_written: Callable[[str], None] = lambda uri: None) -> None:
        self.folder = folder
        self._keep = keep
        self._on_written = on_written
        self._waiting: queue.Queue[Snapshot | None] = queue.Queue(maxsize=1)  # a second one waits: memory is bounded
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
        self._thread.start()

    def write(self, snapshot: Snapshot) -> None:
        self._raise_failure()
        self._waiting.put(snapshot)

    def wait(self) -> None:
        """Until all that was handed over is in its place.

        Raises:
            Exception: of the first write that failed.
        """
        self._waiting.join()
        self._raise_failure()

    def _work(self) -> None:
        while (snapshot := self._waiting.get()) is not None:
            try:
                uri = write(snapshot, self.folder)
                remove_superseded(self.folder, keep=self._keep, standing=snapshot.metadata.standing)
                self._on_written(uri)
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                self._waiting.task_done()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
