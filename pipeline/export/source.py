"""Detector to be exported, traced once for all formats that need its graph."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dfine_core import DISTRIBUTION, Detector, __version__
from dfine_core.checkpoints.folder import THRESHOLDS
from dfine_core.inference import LoadedDetector, predict_batch
from dfine_core.model.attention import DeformableAttention
from pipeline.redaction import redact

if TYPE_CHECKING:
    from pipeline.export.check_images import Calibration

INPUT_NAMES, OUTPUT_NAMES = ("images", "orig_target_sizes"), ("labels", "boxes", "scores")
NORMALISATION = "RGB divided by 255, no mean or deviation; resized to the input size without keeping the aspect ratio"
LICENSE = "code and network: Apache-2.0; the weights are their owner's"
T = TypeVar("T")


class EndToEnd(nn.Module):
    """Network of ONNX and torch.export files: images and their original sizes to detections in pixels."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, orig_target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect in a batch.

        Args:
            images: [B, 3, H, W] float32 in 0..1, resized to the input size.
            orig_target_sizes: [B, 2] int64 (width, height) of the original images.

        Returns:
            labels [B, R] int64, boxes [B, R, 4] xyxy in pixels of the original images, scores [B, R]; best first.
        """
        detections, _ = predict_batch(self.detector, images, orig_target_sizes)
        return detections.labels, detections.boxes, detections.scores


@dataclass(frozen=True)
class ExportNote:
    """Facts about one written file that its verdict does not have."""

    facts: Mapping[str, Any]  # for export.json
    lines: tuple[str, ...] = ()  # for the console


@dataclass(frozen=True, eq=False)
class ExportSource:
    """Detector to be exported: on the CPU, not deployed yet, at the input size of the export."""

    model: LoadedDetector
    batch_size: int | None = None  # the only one that exported programs accept; None: any
    calibration: "Calibration | None" = None  # images for formats of integers
    notes: dict[str, ExportNote] = field(default_factory=dict, repr=False)  # by format
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and values of all weights; equal for every format and input size."""
        hashed = hashlib.sha256()
        for key, tensor in sorted(self.model.detector.state_dict().items()):
            hashed.update(key.encode())
            hashed.update(tensor.contiguous().numpy().tobytes())
        return hashed.hexdigest()

    @cached_property
    def description(self) -> dict[str, Any]:
        """Metadata stored in every exported file."""
        thresholds = self.model.thresholds
        return {
            "names": list(self.model.names),
            "category_ids": list(self.model.category_ids),
            "input_size": list(self.model.config.input_size),
            "normalisation": NORMALISATION,
            "config": self.model.config.to_plain(),
            "license": LICENSE,
            "parameters": self.model.num_parameters,
            "source": redact(self.model.origin),
            "weights_sha256": self.digest,
            "made_by": f"{DISTRIBUTION} {__version__}",
            **({} if thresholds is None else {THRESHOLDS: thresholds.to_plain()}),
            **({} if self.model.calibration is None else {"calibration": self.model.calibration.metadata()}),
        }

    @property
    def program(self) -> torch.export.ExportedProgram:
        """Traced program as PyTorch runs it best."""
        return self.traced(gathers=False, batch_size=self.batch_size)

    def traced(self, *, gathers: bool, batch_size: int | None) -> torch.export.ExportedProgram:
        """Trace the network from images to detections, at one input size; every variant is traced once.

        Args:
            gathers: sample feature maps by plain gathers, for runtimes without grid sampling.
            batch_size: None for any.
        """
        return self.once(("traced", gathers, batch_size), lambda: self._trace(gathers, batch_size))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` has returned for this key: formats share what is slow to make."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def _trace(self, gathers: bool, batch_size: int | None) -> torch.export.ExportedProgram:
        # The same arithmetic in float32, but the graph gets no autocast regions.
        detector = Detector(self.model.config.with_(numerics="released"))
        detector.load_state_dict(self.model.detector.state_dict())
        for module in detector.modules():
            if isinstance(module, DeformableAttention):
                module.gathers = gathers
        rows = batch_size or 2  # tracing takes a size of 1 for fixed
        images = torch.zeros(rows, 3, *self.model.config.input_size)
        sizes = torch.tensor([[640, 480], [480, 640]] * rows)[:rows]
        batch = None if batch_size else {0: torch.export.Dim("batch")}
        with silenced_exporters():
            return torch.export.export(
                EndToEnd(detector.deploy()).eval(), (images, sizes), dynamic_shapes=batch and (batch, batch)
            )


def at_input_size(model: LoadedDetector, input_size: tuple[int, int]) -> LoadedDetector:
    """Copy the detector with another input size (height, width) and the same weights, but no calibration for it.

    Raises:
        ValueError: the detector does not support this size.
    """
    detector = Detector(model.config.with_(input_size=input_size))
    detector.load_state_dict(model.detector.state_dict())
    same = input_size == model.config.input_size
    return replace(model, detector=detector.eval(), calibration=model.calibration if same else None)


@contextmanager
def silenced_exporters() -> Iterator[None]:
    """Silence the progress messages and deprecation warnings of the exporters."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "torch.export", "onnxscript")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
