"""Products on oneDNN: equal to PyTorch's own up to rounding, and never part of a graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dfine_core import Detector, ModelConfig
from dfine_core.model import products
from dfine_core.model.products import Conv2d, Linear, linear, on_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)


def random(*shape: int, gradient: bool = True) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=gradient)


def assert_close(actual: Tensor | None, exact: Tensor) -> None:
    assert actual is not None
    assert (actual.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (1, 12), (2, 3, 4, 12), (2, 0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients_equal_those_in_double_precision(shape: tuple[int, ...], bias: bool) -> None:
    inputs = [random(*shape), random(20, 12), *([random(20)] if bias else [])]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gradient = random(*shape[:-1], 20, gradient=False)
    output = linear(*inputs)
    output.backward(gradient)
    expected = F.linear(*exact)
    expected.backward(gradient.double())
    if output.numel():
        assert type(output.grad_fn).__name__ == "_ProductBackward"
        assert_close(output, expected)
        for tensor, other in zip(inputs, exact, strict=True):
            assert other.grad is not None
            assert_close(tensor.grad, other.grad)
    assert output.shape == expected.shape


def test_gradients_arrive_through_transposed_and_broadcast_tensors() -> None:
    x, weight = random(6, 4, 12), random(20, 12)
    linear(x.transpose(0, 1), weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(6, 4, -1))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(20, -1))


def test_frozen_weights_get_no_gradient() -> None:
    layer = Linear(12, 20).requires_grad_(False)
    x = random(3, 12)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_single_points_equals_the_ordinary_one(layout: torch.memory_format, stride: int) -> None:
    layer = Conv2d(12, 20, 1, stride, bias=False)
    x = random(2, 12, 9, 7).detach().contiguous(memory_format=layout).requires_grad_()
    output = layer(x)
    expected = F.conv2d(x.double(), layer.weight.double(), stride=stride)
    assert output.shape == expected.shape
    assert_close(output, expected)
    gradient = random(*output.shape, gradient=False)
    actual = torch.autograd.grad(output, (x, layer.weight), gradient)
    exact = torch.autograd.grad(expected, (x, layer.weight), gradient.double())
    for one, other in zip(actual, exact, strict=True):
        assert_close(one, other.double())


def test_other_precisions_graphs_and_autocast_are_left_to_pytorch() -> None:
    x = random(3, 12)
    assert on_onednn(x)
    assert not on_onednn(x.double())
    assert not on_onednn(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not on_onednn(x)
    program = torch.export.export(Linear(12, 20), (x.detach(),))
    assert "mkldnn" not in str(program.graph)
    assert "linear" in str(program.graph)


def test_operations_are_counted_forward_and_backward() -> None:
    with FlopCounterMode(display=False) as counter:
        linear(random(3, 5, 12), random(20, 12), random(20)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 15 * 12 * 20


def test_every_linear_layer_and_convolution_of_the_network_takes_the_faster_product() -> None:
    detector = Detector(ModelConfig.variant("n", num_classes=3, input_size=(64, 64), num_queries=20))
    layers = [m for m in detector.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(layers) > 50
    assert [layer for layer in layers if not isinstance(layer, Linear | Conv2d)] == []
