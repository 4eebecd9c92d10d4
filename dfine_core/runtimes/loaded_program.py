"""Exported files that are called like any other detector: images to named boxes, by the same path."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dfine_core.checkpoints.folder import LoadError, parse_description
from dfine_core.detected_edges import DetectedEdges
from dfine_core.inference import LoadedDetector
from dfine_core.model.detector import Detector
from dfine_core.model.postprocess import Detections
from dfine_core.precision import AUTO
from dfine_core.runtimes.files import RuntimeFileError, open_program
from dfine_core.runtimes.program import OpenOptions, Program
from dfine_core.structures import DetectorOutput
from dfine_core.uncertainty.detector_calibration import DetectorCalibration

ONLY_PRECISION = "fp32"  # the name stands for the precision of the file
NEEDED = ("names", "config")  # metadata without which a file is no detector of this project


class NoNetwork(nn.Module):
    """Stands for the network of an exported file, which cannot be looked into; it knows the configuration alone."""

    def __init__(self, described: Any, origin: str) -> None:
        super().__init__()
        self.config = described
        self.origin = origin

    def forward(self, *_: object) -> None:
        """Refuse to compute: the detector's `detect` does."""
        raise LoadError(
            f"{self.origin}: an exported file returns detections alone; load the detector that it was made of"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            message = (
                f"{self.__dict__.get('origin')}: an exported file has no {name}; load the detector that it was made of"
            )
            raise AttributeError(message) from None


@dataclass(frozen=True, eq=False, repr=False)
class LoadedProgram(LoadedDetector):
    """Exported file in its runtime. It has no network to train, to save or to look into; pixels and detections are on the CPU."""

    program: Program = field(kw_only=True)

    @property
    def num_parameters(self) -> int:
        """Parameters of the detector that it was made of."""
        return int(self.program.description.get("parameters", 0))

    @property
    def size_bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in _files_of(str(self.path)))

    @property
    def precisions(self) -> tuple[str, ...]:
        """One: that of the file."""
        return (ONLY_PRECISION,)

    def predict(self, pixels: Tensor, sizes: Tensor, *, every_layer: bool = False) -> tuple[Detections, DetectorOutput]:
        """Return all detections, and an output without queries; arguments as of `LoadedDetector.predict`.

        Raises:
            ValueError: `every_layer`, which no exported file returns.
        """
        if every_layer:
            raise LoadError(f"{self.path}: an exported file returns no layers; load the detector that it was made of")
        images = (pixels.cpu().float() / 255).numpy()
        labels, boxes, scores = (torch.from_numpy(array) for array in self.program(images, sizes.cpu().numpy()))
        nothing = DetectorOutput(
            logits=torch.empty(len(pixels), 0, self.config.num_classes), boxes=torch.empty(len(pixels), 0, 4)
        )
        return Detections(labels=labels, boxes=boxes, scores=scores), nothing

    def edges(self) -> DetectedEdges:
        """Refuse: an exported file returns no distributions.

        Raises:
            ValueError: always.
        """
        raise LoadError(
            f"{self.path}: an exported file has no distributions of edges; load the detector that it was made of"
        )

    def to(self, device: str | torch.device) -> "LoadedProgram":
        """Open the file again for another device."""
        return replace(self, program=load_program(str(self.path), device).program)

    def with_precision(self, name: str) -> "LoadedProgram":
        """Keep the precision of the file.

        Raises:
            ValueError: another one is asked for.
        """
        if name not in (AUTO, ONLY_PRECISION):
            raise ValueError(f"{self.path}: the precision of an exported file is fixed; leave {name} out")
        return self

    def deploy(self) -> Self:
        """Change nothing: exported files are fused."""
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Refuse: the weights of the file are those of its runtime.

        Raises:
            ValueError: always.
        """
        raise LoadError(f"{os.fspath(folder)}: {self.path} is an exported file; save the detector that it was made of")

    def digest(self) -> str:
        """SHA-256 over all files."""
        hashed = hashlib.sha256()
        for file in _files_of(str(self.path)):
            hashed.update(file.name.encode() + file.read_bytes())
        return hashed.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A runtime cannot be pickled: another process opens the file again, by its path.
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("detector", "program")}
        return _reopened, (str(self.path), self.program.device, own)


def load_program(path: str, device: str | torch.device | None = None) -> LoadedProgram:
    """Open an exported file as a detector.

    Args:
        device: of the runtime; a GPU if there is one and the runtime has it, unless given.

    Raises:
        LoadError: the file is missing or broken, its runtime is not installed, or it is no detector of this project.
    """
    path = os.path.abspath(path)
    chosen = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        program = open_program(path, OpenOptions(threads=torch.get_num_threads(), device=chosen))
    except RuntimeFileError as error:
        raise LoadError(f"{error}") from None
    description = program.description
    if missing := [key for key in NEEDED if key not in description]:
        raise LoadError(
            f"{path}: its metadata has no {' and no '.join(missing)}, so it was not exported by this version of the project;"
            " export it again (dfine check-engine compares any file with its detector)"
        )
    described = parse_description(json.dumps({**description, "categories": description["names"]}).encode(), path)
    return LoadedProgram(
        detector=cast(Detector, NoNetwork(described.config, path)),
        names=tuple(name for _, name in described.categories),
        category_ids=tuple(number for number, _ in described.categories),
        origin=path,
        device=torch.device("cpu"),
        path=path,
        thresholds=described.thresholds,
        calibration=_calibration_in(description, path),
        program=program,
    )


def _calibration_in(description: Mapping[str, Any], path: str) -> DetectorCalibration | None:
    """Calibration in the metadata of a file, which cannot be of other weights.

    Raises:
        LoadError: it is damaged.
    """
    if (content := description.get("calibration")) is None:
        return None
    try:
        return DetectorCalibration.from_json(json.dumps({"sha256": None, **content}).encode())
    except (TypeError, ValueError) as error:
        raise LoadError(f"{path}: the calibration in its metadata cannot be read: {error}; export it again") from None


def _reopened(path: str, device: str, own: dict[str, Any]) -> LoadedProgram:
    return replace(load_program(path, device), **own)


def _files_of(path: str) -> list[Path]:
    """Files of a program: the one that is opened, and those of the same name beside it."""
    opened = Path(path)
    if opened.is_dir():
        return sorted(file for file in opened.rglob("*") if file.is_file())
    return [opened, *([opened.with_suffix(".bin")] if opened.suffix == ".xml" else [])]
