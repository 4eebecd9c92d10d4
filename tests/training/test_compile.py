"""Compiled parts of the network at the sizes of multi-scale training, with Inductor for real."""

import copy

import pytest
import torch

from dfine_core import Detector, ModelConfig
from pipeline.training.state import compile_parts


@pytest.mark.slow  # half a minute of CPU for each size
def test_the_encoder_is_compiled_for_every_size_and_computes_what_an_eager_one_does() -> None:
    """Forward only: on a CPU, Inductor of torch 2.14 computes wrong gradients, so no training compiles there."""
    torch.manual_seed(0)
    detector = Detector(ModelConfig.variant("n", num_classes=4, input_size=(320, 320))).train()
    eager = copy.deepcopy(detector.encoder)
    compile_parts(detector, sizes=2)
    for side in (320, 384):
        maps = [
            torch.rand(1, channels, side // s, side // s) for channels, s in zip((512, 1024), (16, 32), strict=True)
        ]
        found = detector.encoder([m.requires_grad_() for m in maps])  # with gradients, or another graph would be built
        for expected, output in zip(eager(maps), found, strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        torch.stack([m.sum() for m in found]).sum().backward()
