"""Padded steps against unpadded ones: the same losses and gradients, in few shapes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dfine_core import Criterion, Detector, ModelConfig, Targets
from dfine_core.loss.criterion import count
from dfine_core.loss.padding import pad_denoising, pad_matches, pad_targets, padded_size, padding_of
from dfine_core.model.denoising import sample_queries_for
from tests.support import recorded

CPU = torch.device("cpu")


def losses_and_gradients(config: ModelConfig, counts: list[int], *, padded: bool) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    detector, criterion = Detector(config).train(), Criterion(config)
    targets = Targets.pack(recorded.targets(counts, config.num_classes, 0), config.num_classes, CPU)
    denoising = sample_queries_for(config, targets, torch.Generator().manual_seed(0))
    if padded:
        targets, denoising = pad_targets(targets), None if denoising is None else pad_denoising(denoising, config)
    output = detector(recorded.images(len(counts), 96, 96, seed=1), targets, denoising or False)
    if padded:
        matches = criterion.match(output, targets)
        filled = pad_matches(matches, targets)
        padding = padding_of(matches, targets, denoising, config, filled)
        normalizers = count(targets.total, len(matches.union), CPU)
        terms = criterion(output, targets, filled, normalizers, padding)
    else:
        terms = criterion(output, targets)
    torch.stack(list(terms.values())).sum().backward()
    return terms, torch.cat([p.grad.flatten() for p in detector.parameters() if p.grad is not None])


@pytest.mark.parametrize("counts", [[3, 2], [0, 5], [0, 0], [45, 1]])
@pytest.mark.parametrize(
    "settings", [{}, {"num_denoising": 0}, {"regression": "direct"}, {"query_selection": "agnostic"}]
)
def test_a_padded_step_has_the_losses_and_gradients_of_an_unpadded_one(
    counts: list[int], settings: dict[str, Any]
) -> None:
    defaults = {"num_classes": 4, "input_size": (96, 96), "num_queries": 40, "num_denoising": 10}
    config = ModelConfig.variant("n", **{**defaults, **settings})
    expected, gradients = losses_and_gradients(config, counts, padded=False)
    found, padded_gradients = losses_and_gradients(config, counts, padded=True)
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.linalg.vector_norm(padded_gradients - gradients) <= 1e-5 * torch.linalg.vector_norm(gradients)


def test_batches_of_many_counts_have_few_shapes() -> None:
    config = ModelConfig.variant("n", num_classes=4, input_size=(640, 640))
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(100):
        counts = torch.randint(0, 40, (8,), generator=generator).tolist()
        targets = Targets.pack(recorded.targets(counts, 4, 0), 4, CPU)
        denoising = sample_queries_for(config, targets, generator)
        assert denoising is not None
        padded = pad_denoising(denoising, config)
        tensors = [value for value in vars(padded).values() if isinstance(value, Tensor)]
        tensors += [value for value in vars(pad_targets(targets)).values() if isinstance(value, Tensor)]
        shapes.add(tuple(tensor.shape for tensor in tensors))
        assert (padded.labels.shape[1] + config.num_queries) % 8 == 0
    assert len(shapes) <= 2


def test_sizes_are_doublings_of_the_smallest() -> None:
    assert [padded_size(n, 16) for n in (0, 16, 17, 33)] == [16, 16, 32, 64]
    assert padded_size(0, 0) == 1


def test_a_pair_that_is_not_masked_is_noticed() -> None:
    """The masks are what keeps pads out: with all of them 1, losses differ."""
    config = ModelConfig.variant("n", num_classes=4, input_size=(96, 96), num_queries=40, num_denoising=10)
    torch.manual_seed(0)
    detector, criterion = Detector(config).train(), Criterion(config)
    targets = pad_targets(Targets.pack(recorded.targets([3, 2], 4, 0), 4, CPU))
    output = detector(recorded.images(2, 96, 96, seed=1), targets, False)
    matches = criterion.match(output, targets)
    filled = pad_matches(matches, targets)
    padding = padding_of(matches, targets, None, config, filled)
    normalizers = count(targets.total, len(matches.union), CPU)
    right = criterion(output, targets, filled, normalizers, padding)
    for name in ("union", "own"):
        wrong = dataclasses.replace(padding, **{name: torch.ones_like(getattr(padding, name))})
        terms = criterion(output, targets, filled, normalizers, wrong)
        assert any(not torch.allclose(terms[key], right[key]) for key in right)
