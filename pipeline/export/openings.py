"""Openers of formats that are weights, and whose runtime is this PyTorch: functions of pixels and sizes."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dfine_core.checkpoints.weights import read_checkpoint
from dfine_core.inference import LoadedDetector, build, load
from dfine_core.model.postprocess import Detections

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
