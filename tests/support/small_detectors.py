"""Untrained detectors whose scores lie on both sides of any threshold, and whose edges are uncertain."""

from collections.abc import Sequence
from typing import Any

import torch

from dfine_core import Detector, LoadedDetector, ModelConfig
from dfine_core.inference import build
from pipeline.data.sources.synthetic import CLASSES


def small_detector(
    names: Sequence[str] = CLASSES, *, seed: int = 0, input_size: tuple[int, int] = (64, 64), **settings: Any
) -> LoadedDetector:
    torch.manual_seed(seed)
    config = ModelConfig.variant("n", num_classes=len(names), input_size=input_size, num_queries=20, **settings)
    detector = Detector(config)
    with torch.no_grad():
        for head in detector.decoder.dec_score_head:
            head.weight *= 3
            head.bias += 4.4
        for head in detector.decoder.dec_bbox_head:
            head.layers[2].weight.normal_(0, 0.2)
    return build(config, detector.state_dict(), list(enumerate(names, start=11)), "small", "cpu")
