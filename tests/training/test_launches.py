"""Launches of a training step: few, and no change adds any by accident."""

import pytest

from benchmarks.launches import CASTS, count_fused, count_step, training_state
from dfine_core import ModelConfig
from pipeline.training.budget import kernels_per_micro_batch
from tests.support.processes import one_thread

# Of `python -m benchmarks.launches`; a change that adds more than a twentieth says why.
LAUNCHES = {"n": 1865, "s": 2023, "l": 2728, "x": 3040}
CAST = {"n": 63, "s": 75, "l": 132, "x": 132}  # of these, the casts
SLACK = 1.05


@pytest.mark.parametrize("variant", ["n", *(pytest.param(v, marks=pytest.mark.slow) for v in "slx")])
def test_a_step_launches_no_more_than_it_did(variant: str) -> None:
    with one_thread():
        counter = count_step(training_state(variant, "bf16"))
    assert counter.total <= LAUNCHES[variant] * SLACK, dict(counter.launches)
    assert sum(counter.by_name[name] for name in CASTS) <= CAST[variant] * SLACK


@pytest.mark.parametrize("variant", LAUNCHES)
def test_the_advice_before_a_training_knows_about_as_many(variant: str) -> None:
    config = ModelConfig.variant(variant, num_classes=80)
    assert kernels_per_micro_batch(config, boxes=7) == pytest.approx(LAUNCHES[variant], rel=0.15)


def test_a_launch_too_many_is_counted() -> None:
    state = training_state("n", "bf16")
    with one_thread():
        before = count_step(state)
        for module in state.detector.modules():
            module.register_forward_hook(lambda *args: args[2] if not hasattr(args[2], "mul") else args[2].mul(1))
        after = count_step(state)
    assert after.total > before.total * SLACK


def test_fused_kernels_take_the_place_of_many_launches() -> None:
    pytest.importorskip("triton")
    assert count_fused("photometric", True) == 1
    assert count_fused("photometric", False) > 30
    saved = count_fused("attention", False) - count_fused("attention", True)
    assert saved >= 10


@pytest.mark.parametrize("variant", ["n", *(pytest.param(v, marks=pytest.mark.slow) for v in "sl")])
def test_distributions_cost_few_launches(variant: str) -> None:
    """FDR and GO-LSD are claimed to cost at most 6 % of a step; a step of a GPU's host is its launches."""
    with one_thread():
        ours, direct = (
            count_step(training_state(variant, "bf16", regression=regression)).total for regression in ("fdr", "direct")
        )
    assert direct < ours <= 1.06 * direct
