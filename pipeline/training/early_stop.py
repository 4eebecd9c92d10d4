"""When a stage of training ends early: its evaluations no longer improve by more than their own noise.

Both functions depend on the steps and the AP of past evaluations alone, so a run that resumes decides as the undisturbed one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.training.schedule import Schedule
from pipeline.training.stage_two import EvaluationHistory

LEAST_IMPROVEMENT = 0.001  # of AP; what is less counts as none, however quiet the curve
EVALUATIONS_FOR_NOISE = 5  # fewer do not show it
STD_OF_MEDIAN = 1.4826  # standard deviation / median of absolute deviations, of a normal distribution


@dataclass(frozen=True)
class EarlyEnd:
    """End of a stage before its last step."""

    step: int  # where training continues: the first step of stage two, or the end of the run
    reason: str


def early_end(history: EvaluationHistory, step: int, schedule: Schedule, patience: int | None) -> EarlyEnd | None:
    """Tell whether the current stage ends after `step` steps.

    Stage one continues with stage two, which is trained as long as planned, at the learning rates planned for it. Stage two, or
    stage one of a run without a second, ends the training.

    Args:
        patience: evaluations in a row without an improvement that end a stage; None: it never ends early.
    """
    if patience is None or step >= schedule.steps or not schedule.evaluates_after(step):
        return None
    begin = 0 if schedule.is_strong(step) else schedule.stage_two_step or 0
    curve = [ap for evaluated_step, ap in history.evaluated if evaluated_step > begin]
    noise = max(LEAST_IMPROVEMENT, noise_of([ap for _, ap in history.evaluated]))
    if (idle := evaluations_without_improvement(curve, noise)) < patience:
        return None
    then = (
        schedule.stage_two_step if schedule.is_strong(step) and schedule.stage_two_step is not None else schedule.steps
    )
    return EarlyEnd(
        then,
        f"{idle} evaluations without an improvement of AP by more than {noise:.4f} (best {max(curve):.4f}):"
        f" {then - step} steps are left out, "
        + ("the run ends here" if then == schedule.steps else f"stage two begins, as step {then}"),
    )


def evaluations_without_improvement(curve: Sequence[float], noise: float) -> int:
    """Count the evaluations since AP last rose by more than `noise` above where it had risen before.

    Slow progress adds up: what rises by half the noise each time counts at every third evaluation. While AP has never been above
    the noise, training has hardly begun, and none counts.
    """
    reached, idle = 0.0, 0
    for ap in curve:
        if ap > reached + noise:
            reached, idle = ap, 0
        elif reached:
            idle += 1
    return idle


def noise_of(curve: Sequence[float]) -> float:
    """Estimate the standard deviation of a curve around its trend, from its second differences; 0 for a short curve."""
    if len(curve) < EVALUATIONS_FOR_NOISE:
        return 0.0
    second_differences = np.diff(np.asarray(curve, float), n=2)
    return float(STD_OF_MEDIAN * np.median(np.abs(second_differences)) / np.sqrt(6))
