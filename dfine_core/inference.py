"""Trained detectors: opened from their files, and called with images.

    detector = load("runs/mine")    # or a checkpoint, an exported folder, an MLflow model's folder, a released .pth
    for found in detector(["a.jpg", "b.jpg"], threshold=0.5):
        print(found.boxes, found.scores, found.names)

No code from a file is run. All but released files need safetensors, which is imported with the first of them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from dfine_core.checkpoints.released import read_released
from dfine_core.checkpoints.weights import load_weights
from dfine_core.config import ModelConfig
from dfine_core.images import ImageSource, OpenedImage, listed, read_image, stretched
from dfine_core.model.detector import Detector
from dfine_core.model.postprocess import MAX_DETECTIONS, Detections, postprocess
from dfine_core.structures import DetectorOutput

DEFAULT_THRESHOLD = 0.4  # least score of a detection, unless the caller gives one
DESCRIPTION = "detector.json"  # {"config": ..., "categories": [names]}, beside the weights as safetensors
METADATA = "metadata.json"  # of a checkpoint
MLFLOW_SCHEMES = ("runs:/", "models:/")


class LoadError(ValueError):
    """There is no detector, it is damaged, or something that opens it is missing."""


@dataclass(frozen=True)
class Files:
    """How files are reached: on this disk, unless a program brings other means."""

    read: Callable[[str], bytes]  # FileNotFoundError if there is none
    names: Callable[[str], Iterable[str]]  # of what lies directly in a folder; none if there is no such folder


def _names(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


ON_DISK = Files(read=lambda path: Path(path).read_bytes(), names=_names)


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """Detections of one image, best first; on the CPU."""

    boxes: Tensor  # [K, 4] float32 xyxy in pixels of the image as it is stored; may reach over its border
    scores: Tensor  # [K] in [0, 1]
    labels: Tensor  # [K] int64
    names: tuple[str, ...]  # [K]


@dataclass(frozen=True, eq=False)
class LoadedDetector:
    detector: Detector  # averaged weights, in eval mode
    names: tuple[str, ...]  # of the classes, by label
    category_ids: tuple[int, ...]  # by label: what a COCO result file calls the class
    origin: str  # what was really taken
    device: torch.device

    @property
    def config(self) -> ModelConfig:
        return self.detector.config

    def __call__(
        self, images: Sequence[ImageSource] | ImageSource, threshold: float = DEFAULT_THRESHOLD, batch: int = 8
    ) -> list[ImageDetections]:
        """One `ImageDetections` per image, for a single image too.

        Args:
            threshold: least score.
            batch: images at once.

        Raises:
            ValueError: naming an image that cannot be read.
        """
        sources = listed(images)
        found: list[ImageDetections] = []
        for start in range(0, len(sources), batch):
            opened = [_opened(number, sources[number]) for number in range(start, min(start + batch, len(sources)))]
            detections = self.detect(prepare(opened, self.config.input_size), sizes_of(opened))
            found += [self._of_image(detections, place, threshold) for place in range(len(opened))]
        return found

    def detect(self, pixels: Tensor, sizes: Tensor) -> Detections:
        """All detections, on the detector's device; arguments as in `predict`."""
        return self.predict(pixels, sizes)[0]

    @torch.no_grad()
    def predict(self, pixels: Tensor, sizes: Tensor, *, every_layer: bool = False) -> tuple[Detections, DetectorOutput]:
        """All detections and the network's output, on the detector's device and in float32.

        Args:
            pixels: [B, 3, H, W] uint8, see `prepare`.
            sizes: [B, 2] (width, height) of the images before they were stretched.
            every_layer: needs the detector as it was before `deploy()`.
        """
        with torch.autocast(self.device.type, enabled=False):
            return predict_batch(self.detector, pixels.to(self.device), sizes.to(self.device), every_layer=every_layer)

    def to(self, device: str | torch.device) -> "LoadedDetector":
        """On another device; the network itself moves, as modules do."""
        return replace(self, detector=self.detector.to(device), device=torch.device(device))

    def deploy(self) -> Self:
        """Fuse what can be fused, in place: faster, equal up to rounding, and no longer to be trained or looked into."""
        self.detector.deploy()
        return self

    def _of_image(self, detections: Detections, place: int, threshold: float) -> ImageDetections:
        scores = detections.scores[place].cpu()
        kept = scores >= threshold
        labels = detections.labels[place].cpu()[kept]
        return ImageDetections(
            boxes=detections.boxes[place].cpu()[kept].float(),
            scores=scores[kept],
            labels=labels,
            names=tuple(self.names[label] for label in labels.tolist()),
        )


def predict_batch(
    detector: nn.Module, images: Tensor, sizes: Tensor, *, every_layer: bool = False
) -> tuple[Detections, DetectorOutput]:
    """Pixels to network to detections: the one path of evaluation, prediction, serving, benchmarks and export.

    Gradients, autocast and eval mode are the caller's, so that the function can be traced too.

    Args:
        detector: a `Detector` in eval mode, on the device of both tensors.
        images: [B, 3, H, W] stretched to the input size; uint8, or floating in 0..1.
        sizes: [B, 2] (width, height) of the images before that.
        every_layer: also return the queries of every decoder layer, see `Detector.forward`.
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255
    output: DetectorOutput = detector(images, every_layer=True) if every_layer else detector(images)
    _, queries, classes = output.logits.shape
    return postprocess(output.logits, output.boxes, sizes, min(MAX_DETECTIONS, queries * classes)), output


def prepare(images: Sequence[OpenedImage], input_size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] uint8: whole RGB images, stretched.

    Args:
        input_size: (height, width).
    """
    pixels = np.stack([stretched(image, input_size) for image in images]) if images else np.zeros((0, *input_size, 3))
    return torch.from_numpy(pixels.astype(np.uint8, copy=False).transpose(0, 3, 1, 2).copy())


def sizes_of(images: Sequence[OpenedImage]) -> Tensor:
    """[B, 2] (width, height) in pixels, int64."""
    return torch.tensor([image.size for image in images], dtype=torch.int64).reshape(-1, 2)


def _opened(number: int, source: ImageSource) -> OpenedImage:
    try:
        return read_image(source)
    except ValueError as error:
        raise ValueError(f"image {number}: {error}") from error


def load(
    source: str | os.PathLike[str], device: str | torch.device | None = None, *, files: Files = ON_DISK
) -> LoadedDetector:
    """Open a trained detector.

    Args:
        source: folder of an exported detector, of a checkpoint, of a run (its best weights) or of an MLflow model; or a
            released `.pth` file.
        device: a GPU if there is one, unless given.

    Raises:
        LoadError: with what was found instead, and the way out.
    """
    place = os.fspath(source)
    if place.startswith(MLFLOW_SCHEMES):
        raise LoadError(f"{place}: pipeline.open_detector.open_detector opens what only MLflow knows")
    if place.endswith((".pth", ".pt")):
        try:
            released = read_released(place)
        except ValueError as error:
            raise LoadError(f"{error}") from None
        return build(released.config, released.weights, released.categories, place, device)
    return _from_folder(place.rstrip("/") or place, device, files)


def build(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    categories: Sequence[tuple[int, str]],
    origin: str,
    device: str | torch.device | None = None,
) -> LoadedDetector:
    """
    Args:
        categories: COCO id and name of each class, by label.

    Raises:
        LoadError: the three do not fit each other.
    """
    if len(categories) != config.num_classes:
        raise LoadError(f"{origin}: {len(categories)} categories for a detector of num_classes {config.num_classes}")
    detector = Detector(config)
    try:
        load_weights(detector, weights)
    except ValueError as error:
        raise LoadError(f"{origin}: {error}") from None
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedDetector(
        detector=detector.eval().to(place),
        names=tuple(name for _, name in categories),
        category_ids=tuple(number for number, _ in categories),
        origin=origin,
        device=place,
    )


def from_description(
    description: bytes,
    weights: bytes,
    origin: str,
    device: str | torch.device | None = None,
) -> LoadedDetector:
    """From the content of a `detector.json` and of a safetensors file.

    Without "category_ids" in the description, classes have their labels as ids.
    """
    try:
        content = json.loads(description)
        config, names = ModelConfig.from_plain(content["config"]), content["categories"]
        ids = content.get("category_ids") or range(len(names))
        categories = [(int(number), str(name)) for number, name in zip(ids, names, strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{origin}: its {DESCRIPTION} cannot be read: {error!r}") from None
    return build(config, _tensors(weights, origin), categories, origin, device)


def _from_folder(folder: str, device: str | torch.device | None, files: Files) -> LoadedDetector:
    names = set(files.names(folder))
    if METADATA in names:
        return _from_checkpoint(folder, device, files)
    if DESCRIPTION in names:
        weights = [name for name in names if name.endswith(".safetensors")]
        if len(weights) != 1:
            raise LoadError(f"{folder}: {len(weights)} safetensors files beside {DESCRIPTION}, expected one")
        description, tensors = (files.read(f"{folder}/{name}") for name in (DESCRIPTION, weights[0]))
        return from_description(description, tensors, folder, device)
    if "MLmodel" in names and "artifacts" in names:
        return _from_folder(f"{folder}/artifacts", device, files)
    if "checkpoints" in names and (best := best_of_run(f"{folder}/checkpoints", files)):
        return _from_checkpoint(best, device, files)
    held = f"it holds {', '.join(sorted(names)[:6])}" if names else "it is empty or does not exist"
    raise LoadError(
        f"{folder}: no detector ({held}). Expected the folder of a run or of a checkpoint, of an exported detector"
        f" ({DESCRIPTION} beside safetensors), of an MLflow model, or a released .pth file"
    )


def best_of_run(folder: str, files: Files) -> str | None:
    """The best checkpoint, the newest where nothing was evaluated; None if there is no complete one."""
    complete = sorted(
        name for name in files.names(folder) if name.startswith("step-") and METADATA in files.names(f"{folder}/{name}")
    )
    if not complete:
        return None
    best = _json(f"{folder}/{complete[-1]}/{METADATA}", files).get("history", {}).get("best_step")
    return f"{folder}/{complete[-1]}" if best is None else f"{folder}/step-{best:08d}"


def _from_checkpoint(folder: str, device: str | torch.device | None, files: Files) -> LoadedDetector:
    """Of the averaged weights."""
    metadata = _json(f"{folder}/{METADATA}", files)
    try:
        config = ModelConfig.from_plain(metadata["model"])
        categories = [(int(category["original_id"]), str(category["name"])) for category in metadata["categories"]]
        written = metadata["sha256"]["ema"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{folder}/{METADATA}: not of a checkpoint that this version reads: {error!r}") from None
    path = f"{folder}/ema.safetensors"
    try:
        content = files.read(path)
    except FileNotFoundError:
        raise LoadError(f"{path}: is missing") from None
    if hashlib.sha256(content).hexdigest() != written:
        raise LoadError(f"{path}: is damaged: not what was written (SHA-256)")
    return build(config, _tensors(content, path), categories, folder, device)


def _json(path: str, files: Files) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(files.read(path))
    except FileNotFoundError:
        raise LoadError(f"{path}: is missing") from None
    except ValueError as error:
        raise LoadError(f"{path}: cannot be read: {error}") from None
    return content


def _tensors(content: bytes, origin: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load as tensors_from_bytes
    except ImportError:
        raise LoadError(f"{origin}: its weights are safetensors; pip install safetensors") from None
    try:
        return tensors_from_bytes(content)
    except SafetensorError as error:
        raise LoadError(f"{origin}: its weights are damaged: {error}") from None
