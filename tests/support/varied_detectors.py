"""Small detectors that were not trained but behave like it: no weight is at its neutral start, so a layer that is left out,
swapped or rounded away shows."""

import torch

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.weights import CONSTANT_LEAVES
from dfine_core.inference import LoadedDetector
from pipeline.data.sources.synthetic import CLASSES


def varied_detector(config: ModelConfig, *, seed: int = 0) -> Detector:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # so that it is the same detector in every process
        torch.manual_seed(seed)
        detector = Detector(config)
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if name.rsplit(".", 1)[-1] in (*CONSTANT_LEAVES, "num_batches_tracked"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() * 0.2 + 0.8)
            elif tensor.ndim > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(noise / fan_in**0.5)
            else:
                tensor.add_(noise * 0.1)
        for head in detector.decoder.dec_score_head:  # some hundreds of scores between 0.05 and 0.95
            head.bias.add_(3.0)
    return detector.eval()


def loaded(config: ModelConfig, *, seed: int = 0) -> LoadedDetector:
    """Detector of the classes that synthetic images show."""
    names = CLASSES[: config.num_classes]
    detector = varied_detector(config, seed=seed)
    return LoadedDetector(detector, names, tuple(range(len(names))), "varied", torch.device("cpu"))


def small(**settings: object) -> ModelConfig:
    """D-FINE-N for 64 px, shortened: tracing and exporting take time by the operation."""
    short = {"num_classes": len(CLASSES), "input_size": (64, 64), "num_queries": 20, "num_layers": 2, "depth": 0.34}
    return ModelConfig.variant("n", **{**short, **settings})
