"""Exported detector, opened in its runtime: images to detections, arrays in and out."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, DEFAULT = "f32", "default"  # precisions to open a file in; "default" leaves the choice to the runtime

Outputs = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]  # labels, boxes, scores
NUM_OUTPUTS = 3


@dataclass(frozen=True)
class OpenOptions:
    """Options of opening a file."""

    precision: str = F32  # arithmetic: F32, or DEFAULT for what the runtime chooses on this machine
    threads: int | None = None  # CPU threads; None: the runtime's own number
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Program:
    """Opened file. Calling it is the simple way; benchmarks place the inputs once and time `run`."""

    # Takes images [B, 3, H, W] float32 in 0..1 and sizes [B, 2] int64 (width, height), both as `place` returns them; returns
    # labels [B, R], boxes [B, R, 4] xyxy in pixels of the original images, and scores [B, R], best first.
    run: Callable[[Any, Any], Sequence[Any]]
    input_size: tuple[int | None, int | None]  # height, width; None: any
    runtime: str  # name and version
    description: Mapping[str, Any] = field(
        default_factory=dict
    )  # metadata of the file: names, input_size, thresholds, ...
    batch_size: int | None = None  # the only accepted one; None: any
    place: Callable[[NDArray[Any]], Any] = lambda array: array  # moves an input to where the runtime takes it
    wait: Callable[[], None] = lambda: None  # returns when the device has finished
    device: str = "cpu"  # that computes
    parameters: int | None = None

    def __call__(self, images: NDArray[np.float32], sizes: NDArray[np.int64]) -> Outputs:
        """Detect in any number of images; a file of one batch size runs several times, and its last batch is padded."""
        step = self.batch_size or len(images)
        parts = [self._run_padded(images[at : at + step], sizes[at : at + step]) for at in range(0, len(images), step)]
        labels, boxes, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
        return labels.astype(np.int64), boxes.astype(np.float32), scores.astype(np.float32)

    def _run_padded(self, images: NDArray[np.float32], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
        rows = len(images)
        if self.batch_size is not None and rows < self.batch_size:
            repeated = np.minimum(np.arange(self.batch_size), rows - 1)
            images, sizes = images[repeated], sizes[repeated]
        outputs = self.run(self.place(np.ascontiguousarray(images)), self.place(np.ascontiguousarray(sizes)))
        if len(outputs) != NUM_OUTPUTS:
            raise ValueError(f"{len(outputs)} outputs instead of labels, boxes and scores")
        arrays = [np.asarray(output.cpu() if hasattr(output, "cpu") else output) for output in outputs]
        short = [array.shape for array in arrays if len(array) != len(images)]
        if short:
            raise ValueError(f"an output of shape {short[0]} for {len(images)} images")
        return [array[:rows] for array in arrays]


def parsed_description(properties: Mapping[str, str]) -> dict[str, Any]:
    """Metadata from a file that stores text by key: JSON where it is JSON, and other text as it stands."""
    return {key: _parsed(value) for key, value in properties.items()}


def described_as_text(description: Mapping[str, Any]) -> dict[str, str]:
    """Text by key for files that store nothing else; `parsed_description` reads it."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
