"""D-FINE object detector in plain PyTorch: tensors in, tensors out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfine_core.checkpoints.folder import LoadError
    from dfine_core.config import VARIANTS, LossConfig, ModelConfig
    from dfine_core.image_detections import ImageDetections
    from dfine_core.inference import LoadedDetector, load
    from dfine_core.loss.criterion import Criterion
    from dfine_core.model.detector import Detector
    from dfine_core.structures import DenoisingQueries, DetectorOutput, Targets

    __version__: str

__all__ = [
    "VARIANTS",
    "Criterion",
    "DenoisingQueries",
    "Detector",
    "DetectorOutput",
    "ImageDetections",
    "LoadError",
    "LoadedDetector",
    "LossConfig",
    "ModelConfig",
    "Targets",
    "__version__",
    "load",
]
DISTRIBUTION = "ray-dfine"

# Lazy imports: `dfine_core.config` must be importable without loading PyTorch.
_HOMES = {
    "config": ("VARIANTS", "LossConfig", "ModelConfig"),
    "loss.criterion": ("Criterion",),
    "model.detector": ("Detector",),
    "checkpoints.folder": ("LoadError",),
    "image_detections": ("ImageDetections",),
    "inference": ("LoadedDetector", "load"),
    "structures": ("DenoisingQueries", "DetectorOutput", "Targets"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """Version of the installed distribution; "unknown" in a source tree alone, as in a submitted job."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
