"""Weights cast once a step, against autocast, which casts them where they are used."""

from typing import Any

import pytest
import torch
from torch import nn

from dfine_core import Criterion, Detector, ModelConfig
from pipeline.training.low_precision import CastDetector
from tests.support import recorded


def detector(**settings: Any) -> Detector:
    torch.manual_seed(0)
    config = ModelConfig.variant("n", num_classes=4, input_size=(96, 96), num_queries=20, num_denoising=8, **settings)
    return Detector(config).train()


def gradients(model: nn.Module, inner: Detector) -> dict[str, torch.Tensor]:
    targets = recorded.targets([3, 2], 4, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(recorded.images(2, 96, 96, seed=1), targets, generator=torch.Generator().manual_seed(0))
    torch.stack(list(Criterion(inner.config)(output, targets).values())).sum().backward()
    return {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [{}, {"freeze_at": 0, "freeze_norm": True}])
def test_gradients_equal_those_of_autocast_to_the_bit(frozen: dict[str, Any]) -> None:
    plain, inner = detector(**frozen), detector(**frozen)
    expected, found = gradients(plain, plain), gradients(CastDetector(inner, torch.bfloat16), inner)
    assert found.keys() == expected.keys()
    assert len(found) == sum(p.requires_grad for p in inner.parameters())
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_casts_of_every_step_lie_where_those_of_the_first_did() -> None:
    plain, inner = detector(), detector()
    model = CastDetector(inner, torch.bfloat16, in_place=True)
    seen: list[int] = []
    inner.decoder.register_forward_pre_hook(lambda *_: seen.append(inner.backbone.stem.stem1.conv.weight.data_ptr()))
    for step in range(2):
        expected, found = gradients(plain, plain), gradients(model, inner)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items()), step
        for network in (plain, inner):
            with torch.no_grad():
                for weight in network.parameters():
                    weight.mul_(1.01)
            network.zero_grad()
    assert seen == [seen[0]] * 2
    assert inner.backbone.stem.stem1.conv.weight.dtype == torch.float32


def test_frozen_weights_get_no_gradient_and_cost_none() -> None:
    inner = detector(freeze_at=0)
    seen: list[bool] = []
    stem = inner.backbone.stem.stem1.conv
    stem.register_forward_pre_hook(lambda module, _: seen.append(module.weight.requires_grad))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        CastDetector(inner, torch.bfloat16)(recorded.images(2, 96, 96, seed=1), recorded.targets([3, 2], 4, 0))
    assert seen == [False]


def test_the_weights_are_back_after_an_error() -> None:
    inner = detector()
    before = dict(inner.named_parameters())
    with pytest.raises(ValueError, match="multiple"):
        CastDetector(inner, torch.bfloat16)(torch.zeros(1, 3, 97, 97))
    after = dict(inner.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is weight for name, weight in before.items())
