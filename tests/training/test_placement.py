"""A training step on a GPU, as far as it can be shown without one: where tensors lie, in which precision, and what would wait."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from dfine_core.loss.matching import matching_cost
from dfine_core.model.postprocess import postprocess
from dfine_core.model.sampling import deformable_sampling_backward
from pipeline.data.augment.photometric import photometric_distort, resize_images
from pipeline.data.augment.photometric_parameters import Photometric
from pipeline.training.state import AUTOCAST, Precision
from tests.support.fake_gpu import BATCH, GPU, HostCopyError, fake_gpu, gpu_state, gpu_step, gpu_targets

# Copying a module looks at the addresses of its tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")

HALF = {"fp32": torch.float32, **AUTOCAST}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", ["n", *(pytest.param(v, marks=pytest.mark.slow) for v in "slx")])
def test_a_training_step_stays_on_the_device(variant: str, precision: Precision) -> None:
    with fake_gpu() as mode:
        state = gpu_state(variant, precision)
        maps: list[torch.Tensor] = []
        state.detector.encoder.register_forward_hook(lambda module, inputs, output: maps.extend(output))
        result = gpu_step(state, mode)
    # The last one is the map after the attention, whose norm computes in float32.
    assert {m.dtype for m in maps[:-1]} == {HALF[precision]}  # activations are not widened on their way
    for tensor in (result.terms, result.loss, result.grad_norm, result.finite, result.directive):
        assert tensor.device == GPU
    assert result.terms.dtype == torch.float32
    moments = [t for state_of in state.optimizer.state.values() for t in state_of.values()]
    assert moments
    assert all(t.device == GPU and t.dtype == torch.float32 for t in moments)
    assert all(p.dtype == torch.float32 for p in state.detector.parameters())


def test_fused_operators_are_chosen_on_a_gpu_and_their_gradients_stay_there() -> None:
    pytest.importorskip("triton")
    called: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with fake_gpu() as mode:
        state = gpu_state("n", "bf16")
        with Seen():  # type: ignore[no-untyped-call]
            gpu_step(state, mode)
            photometric_distort(torch.rand(BATCH, 3, 64, 64, device=GPU), torch.zeros(BATCH, 13, device=GPU))
        tokens = torch.rand(BATCH, 20, 16, device=GPU, dtype=torch.bfloat16)
        locations, weights = torch.rand(BATCH, 3, 2, 4, 2, device=GPU), torch.rand(BATCH, 3, 2, 4, device=GPU)
        gradients = deformable_sampling_backward(
            torch.rand(BATCH, 3, 16, device=GPU), tokens, locations, weights, (4, 4, 2, 2), (3, 1)
        )
    assert called.count("dfine::deformable_sampling") == state.detector.config.num_layers
    assert called.count("dfine::photometric_distort") == 1
    assert not any("grid_sampler" in name for name in called)
    for found, tensor in zip(gradients, (tokens, locations, weights), strict=True):
        assert (found.device, found.dtype, found.shape) == (GPU, tensor.dtype, tensor.shape)


def test_augmentation_matching_costs_and_detections_stay_on_the_device() -> None:
    with fake_gpu():
        parameters = torch.zeros(BATCH, len(Photometric), device=GPU)
        images = resize_images(photometric_distort(torch.rand(BATCH, 3, 640, 640, device=GPU), parameters), (320, 320))
        detector = gpu_state("n", "fp32").averaged_detector.eval()
        output = detector(images)
        found = postprocess(output.logits, output.boxes, torch.ones(BATCH, 2, device=GPU))
        targets = gpu_targets()
        groups = [(output.logits[None], targets.labels)]
        cost = matching_cost(groups, output.boxes[None], targets, detector.config.loss)
    assert images.device == GPU
    assert cost.device == GPU
    assert all(tensor.device == GPU for tensor in vars(found).values())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda x: x + torch.ones(x.shape[1], 1, 1), RuntimeError),  # on the host
        (lambda x: x * x.mean().item(), DataDependentOutputException),
        (lambda x: x if x.sum() > 0 else -x, DataDependentOutputException),
        (lambda x: x * x[x > 0].mean(), DynamicOutputShapeException),
        (lambda x: x * x.mean().cpu(), HostCopyError),
    ],
    ids=["other device", "item", "branch", "boolean mask", "copy to the host"],
)
def test_what_a_gpu_would_refuse_or_wait_for_is_found(fault: Any, error: type[Exception]) -> None:
    with fake_gpu() as mode:
        state = gpu_state("n", "bf16")
        state.detector.backbone.stem.register_forward_hook(lambda module, inputs, output: fault(output))
        with pytest.raises(error):
            gpu_step(state, mode)
