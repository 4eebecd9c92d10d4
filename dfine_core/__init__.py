"""D-FINE, the detector: plain PyTorch, tensors in, tensors out."""

from dfine_core.config import VARIANTS, LossConfig, ModelConfig
from dfine_core.criterion import Criterion
from dfine_core.detector import Detector
from dfine_core.loading import Found, LoadedDetector, load
from dfine_core.structures import DenoisingQueries, DetectorOutput, Targets

__all__ = [
    "VARIANTS",
    "Criterion",
    "DenoisingQueries",
    "Detector",
    "DetectorOutput",
    "Found",
    "LoadedDetector",
    "LossConfig",
    "ModelConfig",
    "Targets",
    "load",
]
