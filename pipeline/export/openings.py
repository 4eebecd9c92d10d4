"""Opened files as functions of pixels and sizes: programs of any runtime, and weights that PyTorch computes with here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.checkpoints.weights import read_checkpoint
from dfine_core.inference import LoadedDetector, build, load
from dfine_core.model.postprocess import Detections
from pipeline.evaluation.detections import DetectionTable
from pipeline.export.check_images import CheckBatch

DetectFunction = Callable[[Tensor, Tensor], Detections]  # takes pixels [B, 3, H, W] uint8, sizes [B, 2] (width, height)


def open_released(path: Path, model: LoadedDetector) -> DetectFunction:
    """Open a file in the released layout, with the exported configuration because the layout has none."""
    categories = list(zip(model.category_ids, model.names, strict=True))
    return build(model.config, read_checkpoint(path), categories, str(path), "cpu").detect


def open_huggingface(path: Path, _: LoadedDetector) -> DetectFunction:
    """Open a folder with Transformers."""
    from pipeline.export.huggingface import open_transformers

    return open_transformers(path)


def open_safetensors(path: Path, _: LoadedDetector) -> DetectFunction:
    """Open a folder with `dfine_core.load`."""
    return load(path, "cpu").detect


def detect_function(program: Callable[[NDArray[np.float32], NDArray[np.int64]], Any]) -> DetectFunction:
    """Function of pixels and sizes for a program of arrays."""

    def detect(pixels: Tensor, sizes: Tensor) -> Detections:
        labels, boxes, scores = (torch.from_numpy(array) for array in program(scaled(pixels), sizes.numpy()))
        return Detections(labels=labels, boxes=boxes, scores=scores)

    return detect


def scaled(pixels: Tensor) -> NDArray[np.float32]:
    """Images in 0..1 as exported files take them, from pixels [B, 3, H, W] uint8."""
    images: NDArray[np.float32] = (pixels.float() / 255).numpy()
    return images


def table(detections: Detections, batch: CheckBatch) -> DetectionTable:
    """Detections for COCO's metrics."""
    return DetectionTable.from_batch(detections, batch.image_id, [False] * len(batch.image_id))
