"""Trained detectors, opened from their files and called with images.

detector = load("runs/mine")    # or a checkpoint, an exported folder, one of Transformers or of MLflow, a released .pth
for found in detector(["a.jpg", "b.jpg"], threshold=0.5):
    print(found.boxes, found.scores, found.names)
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from dfine_core.checkpoints.calibration_file import read_calibration
from dfine_core.checkpoints.folder import (
    DESCRIPTION,
    ON_DISK,
    WEIGHTS,
    FileReader,
    LoadError,
    StoredDetector,
    make_description,
    parse_description,
    read_detector,
    tensors_from_bytes,
    tensors_to_bytes,
)
from dfine_core.checkpoints.released import read_released
from dfine_core.checkpoints.weights import load_weights
from dfine_core.config import ModelConfig
from dfine_core.detected_edges import DetectedEdges
from dfine_core.image_detections import ImageDetections, RawDetections
from dfine_core.images import ImageSource, OpenedImage, as_list, read_image, stretch_image
from dfine_core.model.detector import Detector
from dfine_core.model.postprocess import MAX_DETECTIONS, Detections, postprocess
from dfine_core.precision import AUTO, PRECISIONS
from dfine_core.runtimes.files import PROGRAM_SUFFIXES
from dfine_core.structures import DetectorOutput
from dfine_core.thresholds import NO_SCORE, ClassThresholds, Threshold, wanted_precision
from dfine_core.tile_merging import merge_tiles
from dfine_core.tiles import Tiling, batched, tiles_of
from dfine_core.uncertainty.detector_calibration import FILE as CALIBRATION
from dfine_core.uncertainty.detector_calibration import DetectorCalibration

DEFAULT_THRESHOLD = 0.4  # least score of a detection, unless the caller or the detector has one
SHOWN_NAMES = 8  # class names that printing a detector shows
MLFLOW_SCHEMES = ("runs:/", "models:/")
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class LoadedDetector:
    """A trained detector that takes images and returns named boxes; `print` shows what it is."""

    detector: Detector  # averaged weights, in eval mode
    names: tuple[str, ...]  # class names, by label
    category_ids: tuple[int, ...]  # by label: id of the class in a COCO result file
    origin: str  # folder, file or URI that was really read
    device: torch.device
    path: str | None = None  # file of the weights; None if it is gone or there never was one
    thresholds: ClassThresholds | None = None  # measured at the end of its training; None if they are not known
    precision: str = "fp32"  # one of PRECISIONS; see `with_precision`
    sha256: str | None = None  # content of the weights' file; None if it is not known
    calibration: DetectorCalibration | None = None  # of scores and edges, from its folder; None: scores stay raw

    @property
    def config(self) -> ModelConfig:
        """Configuration of the network."""
        return self.detector.config

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.detector.parameters())

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that it can compute in; see `with_precision`."""
        return tuple(PRECISIONS)

    @property
    def size_bytes(self) -> int:
        """Size of the weights in memory, buffers included."""
        return sum(tensor.nbytes for tensor in self.detector.state_dict().values())

    def __repr__(self) -> str:
        height, width = self.config.input_size
        more = f", and {len(self.names) - SHOWN_NAMES} more" if len(self.names) > SHOWN_NAMES else ""
        lines = [
            f"detector from {self.origin}",
            f"  file        {self.path or 'none'}",
            f"  classes     {len(self.names)}: {', '.join(self.names[:SHOWN_NAMES])}{more}",
            f"  input       {width} x {height} pixels",
            f"  threshold   {self.threshold_text()}",
            *([] if self.calibration is None else [f"  calibrated  {self.calibration_text()}"]),
            f"  parameters  {self.num_parameters / 1e6:.2f} million, {self.size_bytes / 1e6:.1f} MB",
            f"  device      {self.device}",
        ]
        return "\n".join(lines)

    def least_scores(self, threshold: Threshold | None = None) -> tuple[float, ...]:
        """Least score of a detection by label: `threshold`, else that of the best F1, else the default.

        They are compared with the scores that a caller receives. Where these are calibrated, so are the scores that were measured
        on validation images, and the default: calibration alone changes no detection that is kept.

        Args:
            threshold: a score, or "precision=0.9": the lowest scores that reached it. A class that never did keeps nothing.

        Raises:
            ValueError: the threshold lies outside 0..1, or is a precision that was not measured.
        """
        if threshold is not None and (wanted := wanted_precision(threshold)) is not None:
            return tuple(NO_SCORE if score is None else self._as_shown(score) for score in self._scores_at(wanted))
        if threshold is not None:
            return (float(threshold),) * len(self.names)
        own = (None,) * len(self.names) if self.thresholds is None else self.thresholds.best_f1
        return tuple(self._as_shown(DEFAULT_THRESHOLD if score is None else score) for score in own)

    def calibrated(self, scores: Tensor) -> Tensor:
        """Scores as callers receive them: the chance that a detection is right, if there is a calibration."""
        return scores if self.calibration is None else self.calibration.scores(scores)

    def _as_shown(self, score: float) -> float:
        """A raw score on the scale of `calibrated`, rounded as scores of detections are."""
        return score if self.calibration is None else float(self.calibrated(torch.tensor(score)))

    def _scores_at(self, precision: float) -> tuple[float | None, ...]:
        measured = None if self.thresholds is None else self.thresholds.precision
        if self.thresholds is None or not math.isclose(precision, self.thresholds.precision):
            known = "none" if measured is None else f"those of precision {measured:g} alone"
            raise ValueError(
                f"no scores were measured for precision {precision:g}, the detector has {known}; measure them by"
                f" dfine evaluate DETECTOR SHARDS --precision {precision:g} --write-thresholds"
            )
        return self.thresholds.at_precision

    def threshold_text(self, threshold: Threshold | None = None) -> str:
        """Least scores as text, with their origin."""
        wanted = None if threshold is None else wanted_precision(threshold)
        if threshold is not None and wanted is None:
            return f"{threshold:g}, as given"
        calibrated = "" if self.calibration is None else ", as calibrated scores"
        if wanted is None and (self.thresholds is None or not any(self.thresholds.best_f1)):
            if not calibrated:
                return f"{DEFAULT_THRESHOLD:g}, the default"
            return f"{self._as_shown(DEFAULT_THRESHOLD):.2f}, the default of {DEFAULT_THRESHOLD:g} calibrated"
        scores = self.least_scores(threshold)
        known = [(name, score) for name, score in zip(self.names, scores, strict=True) if score != NO_SCORE]
        never = [name for name, score in zip(self.names, scores, strict=True) if score == NO_SCORE]
        parts = [", ".join(f"{name} {score:.2f}" for name, score in known[:SHOWN_NAMES])] if known else []
        if len(known) > SHOWN_NAMES:
            kept = [score for _, score in known]
            parts.append(f"{min(kept):.2f} to {max(kept):.2f} over all")
        if never:
            more = f" and {len(never) - SHOWN_NAMES} more" if len(never) > SHOWN_NAMES else ""
            parts.append(f"nothing of {', '.join(never[:SHOWN_NAMES])}{more}, which never reached it")
        title = "best F1" if wanted is None else f"precision {wanted:g}"
        return f"{title} on the validation images{calibrated}: {', '.join(parts)}"

    def calibration_text(self) -> str:
        """Number of images that scores are calibrated on, as text; "no" without a calibration."""
        return "no" if self.calibration is None else f"on {self.calibration.images} images"

    def edges(self) -> DetectedEdges:
        """Reader of the edges of detections.

        Raises:
            ValueError: the detector regresses boxes directly.
        """
        if self.config.regression != "fdr":
            raise ValueError(f"{self.origin}: it regresses boxes directly, so its edges have no distributions")
        return DetectedEdges(self.detector.decoder.bins, self.config.reg_scale, self.calibration)

    def __call__(
        self,
        images: Sequence[ImageSource] | ImageSource,
        threshold: Threshold | None = None,
        batch_size: int = 8,
        *,
        coverage: float | None = None,
        tile: int | None = None,
        overlap: float | None = None,
        joint: bool = False,
    ) -> list[ImageDetections]:
        """Detect objects: one `ImageDetections` per image, in a list even for a single image.

        Args:
            threshold: least score of all classes, in 0..1, or "precision=0.9"; see `least_scores`.
            batch_size: images, or tiles of them, that go through the network at once.
            coverage: wanted share of true edges inside the intervals of `ImageDetections`; see `DetectedEdges.kind`.
            tile: side in pixels of the tiles that larger images are cut into; None: images are taken whole. `merge_tiles` has
                the rules by which their detections become those of the image.
            overlap: share of the side by which neighbouring tiles overlap; 0.2 if there are tiles.
            joint: the coverage is that of boxes with all four edges inside, which takes a calibration.

        Raises:
            ValueError: an image cannot be read, `least_scores` refuses the threshold, `DetectedEdges.kind` the coverage, or
                `Tiling` the tiles.
        """
        least, tiling = torch.tensor(self.least_scores(threshold)), Tiling.given(tile, overlap)
        opened = (_read_numbered(index, source) for index, source in enumerate(as_list(images)))
        cut = ((image, part) for image in opened for part in tiles_of(image.size, tiling))
        results: list[ImageDetections] = []
        found: list[ImageDetections] = []  # in tiles of the image whose last tile comes
        for batch in batched(cut, batch_size):
            pixels = [part.cut(image) for image, part in batch]
            raw = self.find(prepare(pixels, self.config.input_size), image_sizes(pixels))
            for (image, part), each in zip(batch, raw, strict=True):
                found.append(self.keep(each, least, coverage=coverage, joint=joint))
                tiles = tiles_of(image.size, tiling)
                if part == tiles[-1]:
                    results.append(merge_tiles(found, tiles, image.size))
                    found = []
        return results

    def find(self, pixels: Tensor, sizes: Tensor) -> list[RawDetections]:
        """Return everything that was detected, by image; arguments as in `predict`."""
        detections, output = self.predict(pixels, sizes)
        boxes, scores, labels = detections.boxes.cpu(), detections.scores.cpu(), detections.labels.cpu()
        return [
            RawDetections(
                boxes=boxes[index],
                scores=scores[index],
                labels=labels[index],
                size=sizes[index].cpu(),
                queries=None if detections.queries is None else detections.queries[index],
                edge_logits=None if output.edge_logits is None else output.edge_logits[index],
                initial_boxes=None if output.initial_boxes is None else output.initial_boxes[index],
            )
            for index in range(len(sizes))
        ]

    def keep(
        self,
        raw: RawDetections,
        least: Tensor,
        *,
        coverage: float | None = None,
        joint: bool = False,
        limit: int | None = None,
        measured: bool = False,
    ) -> ImageDetections:
        """Calibrate scores, drop detections below the least ones, and measure the edges of the others.

        Args:
            least: [C], see `least_scores`.
            coverage, joint: as in `__call__`.
            limit: most detections; the best ones are kept.
            measured: `edge_std_px` even without coverage and calibration.

        Raises:
            ValueError: `joint` without a coverage, or as of `DetectedEdges.kind`.
        """
        if joint and coverage is None:
            raise ValueError("joint says what a coverage counts: give coverage=0.9, too, or leave joint out")
        scores = self.calibrated(raw.scores)
        kept = (scores >= least[raw.labels]).nonzero().squeeze(1)[:limit]
        labels, boxes = raw.labels[kept], raw.boxes[kept].float()
        std, intervals, kind = None, None, None
        if coverage is not None or (raw.edge_logits is not None and (measured or self.calibration is not None)):
            std, intervals, kind = self.edges().measure(raw, kept, coverage, joint)
        return ImageDetections(
            boxes=boxes,
            scores=scores[kept],
            labels=labels,
            names=tuple(self.names[label] for label in labels.tolist()),
            edge_std_px=std,
            edge_intervals=intervals,
            intervals=kind,
        )

    def detect(self, pixels: Tensor, sizes: Tensor) -> Detections:
        """Return all detections, on the detector's device; arguments as in `predict`."""
        return self.predict(pixels, sizes)[0]

    @torch.no_grad()
    def predict(self, pixels: Tensor, sizes: Tensor, *, every_layer: bool = False) -> tuple[Detections, DetectorOutput]:
        """Return all detections, in float32, and the network's output; both on the detector's device.

        Args:
            pixels: [B, 3, H, W] uint8, see `prepare`.
            sizes: [B, 2] (width, height) of the images before they were stretched.
            every_layer: needs the detector as it was before `deploy()`.
        """
        arithmetic = PRECISIONS[self.precision]
        images = arithmetic.arrange(pixels.to(self.device))
        with arithmetic.autocast(self.device):
            return predict_batch(self.detector, images, sizes.to(self.device), every_layer=every_layer)

    def to(self, device: str | torch.device) -> "LoadedDetector":
        """Move the network to another device; the original moves with it, as modules do."""
        return replace(self, detector=self.detector.to(device), device=torch.device(device))

    def with_precision(self, name: str) -> "LoadedDetector":
        """Compute in another precision: a name of PRECISIONS, or "auto" for the fastest one on this CPU, which takes seconds.

        The layout of the original's weights changes, too, but not their values.

        Raises:
            ValueError: there is no such precision.
        """
        if name == AUTO:
            from dfine_core.precision_choice import choose_precision

            name = choose_precision(self).name
        if name not in PRECISIONS:
            raise ValueError(f"unknown precision {name!r}: choose {AUTO} or one of {', '.join(PRECISIONS)}")
        self.detector.to(memory_format=PRECISIONS[name].layout)
        return replace(self, precision=name)

    def deploy(self) -> Self:
        """Fuse what can be fused, in place: faster, equal up to rounding, and no longer to be trained, saved or looked into."""
        self.detector.deploy()
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `detector.json` and the weights into a folder that `load` opens, and return it.

        Raises:
            ValueError: the detector was deployed, so its weights fit no other one.
            FileExistsError: the folder holds other files.
        """
        weights = self.detector.state_dict()
        if any("conv_bn_fused" in key for key in weights):
            raise ValueError(f"{os.fspath(folder)}: a detector cannot be saved after deploy(); save it before")
        description = make_description(self.config, self.names, self.category_ids, self.thresholds)
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        written = {WEIGHTS: tensors_to_bytes(weights, self.config.activation)}
        if self.calibration is not None:
            written[CALIBRATION] = self.calibration.bound_to(written[WEIGHTS]).to_json()
        written[DESCRIPTION] = description  # last: without it the folder is not opened
        others = {path.name for path in target.iterdir()} - written.keys()
        if others:
            raise FileExistsError(f"{target} holds other files ({', '.join(sorted(others)[:3])}); give a new folder")
        for name, content in written.items():
            partial = target / f".{name}.{os.getpid()}.partial"
            partial.write_bytes(content)
            partial.replace(target / name)
        return target


def predict_batch(
    detector: nn.Module, images: Tensor, sizes: Tensor, *, every_layer: bool = False
) -> tuple[Detections, DetectorOutput]:
    """Run pixels through network and postprocessing: the one path of evaluation, prediction, serving, benchmarks and export.

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
    """Stretch whole RGB images to the input size and stack them, [B, 3, H, W] uint8.

    Args:
        input_size: (height, width).
    """
    pixels = (
        np.stack([stretch_image(image, input_size) for image in images]) if images else np.zeros((0, *input_size, 3))
    )
    return torch.from_numpy(pixels.astype(np.uint8, copy=False).transpose(0, 3, 1, 2).copy())


def image_sizes(images: Sequence[OpenedImage]) -> Tensor:
    """Sizes (width, height) in pixels, [B, 2] int64."""
    return torch.tensor([image.size for image in images], dtype=torch.int64).reshape(-1, 2)


def _read_numbered(index: int, source: ImageSource) -> OpenedImage:
    try:
        return read_image(source)
    except ValueError as error:
        raise ValueError(f"image {index}: {error}") from error


def load(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    activation: str | None = None,
    files: FileReader = ON_DISK,
) -> LoadedDetector:
    """Open a trained detector.

    Args:
        source: folder of an exported detector, of a checkpoint, of a run (its best weights), of Transformers or of an MLflow
            model; or a released `.pth` file or bare `.safetensors`, whose configuration is read off the shapes; or an exported
            file, which gives a `LoadedProgram`.
        device: a GPU if there is one, unless given.
        activation: of a file that does not name it: DEIM's is "silu". Default: as recognised, else D-FINE's with a warning.

    Raises:
        LoadError: with what was found instead, and the way out; also for another activation than is named.
    """
    path = os.fspath(source)
    if path.startswith(MLFLOW_SCHEMES):
        raise LoadError(f"{path}: pipeline.open_detector.open_detector opens runs:/ and models:/ URIs")
    if path.endswith(PROGRAM_SUFFIXES):
        from dfine_core.runtimes.loaded_program import load_program

        return load_program(path, device)
    if path.endswith((".pth", ".pt", ".safetensors")):
        return _build_stored(read_released(path, activation), device)
    stored = read_detector(path.rstrip("/") or path, files)
    if activation not in (None, stored.config.activation):
        raise LoadError(f"{path}: its weights were trained with {stored.config.activation}, not {activation}")
    return replace(_build_stored(stored, device), calibration=read_calibration(stored, files))


def build(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    categories: Sequence[tuple[int, str]],
    origin: str,
    device: str | torch.device | None = None,
    *,
    thresholds: ClassThresholds | None = None,
) -> LoadedDetector:
    """Build a detector from its parts.

    Args:
        categories: COCO id and name of each class, by label.

    Raises:
        LoadError: the three do not fit each other.
    """
    if len(categories) != config.num_classes:
        raise LoadError(f"{origin}: {len(categories)} categories for a detector of num_classes {config.num_classes}")
    detector = Detector(config)
    try:
        note = load_weights(detector, weights)
    except ValueError as error:
        raise LoadError(f"{origin}: {error}") from None
    if note:
        log.warning("%s: %s", origin, note)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedDetector(
        detector=detector.eval().to(chosen),
        names=tuple(name for _, name in categories),
        category_ids=tuple(number for number, _ in categories),
        origin=origin,
        device=chosen,
        thresholds=thresholds,
    )


def from_description(
    description: bytes,
    weights: bytes,
    origin: str,
    device: str | torch.device | None = None,
) -> LoadedDetector:
    """Build a detector from the content of a `detector.json` and of a safetensors file.

    Without "category_ids" in the description, classes have their labels as ids.
    """
    described = parse_description(description, origin)
    return build(
        described.config,
        tensors_from_bytes(weights, origin),
        described.categories,
        origin,
        device,
        thresholds=described.thresholds,
    )


def _build_stored(stored: StoredDetector, device: str | torch.device | None) -> LoadedDetector:
    loaded = build(
        stored.config, stored.weights, stored.categories, stored.folder, device, thresholds=stored.thresholds
    )
    return replace(loaded, path=stored.path, sha256=stored.sha256)
