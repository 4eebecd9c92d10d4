"""The best evaluation of a run, and when stage two restarts from the best weights of stage one, as released.

Stage one trains with strong augmentation, stage two without. Stage two starts from the best weights of stage one, and starts
again from them whenever an evaluation does not improve on the best since the last restart. It is thus a sequence of short
runs from one point, of which the best is kept.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class EvaluationHistory:
    """Evaluations of a run and the best among them; AP in 0..1, steps as counted at the evaluation."""

    best_ap: float | None = None
    best_step: int | None = None
    stage_one_step: int | None = None  # best evaluation of stage one
    since_restart: float | None = None  # best AP since the last restart; None right after one
    evaluated: tuple[tuple[int, float], ...] = ()  # every (step, AP), in order
    pending_step: int | None = None  # weights under asynchronous evaluation


def with_evaluation(history: EvaluationHistory, *, ap: float, step: int, stage_one: bool) -> EvaluationHistory:
    """Add an evaluation; in stage two, one without improvement since the last restart causes another restart."""
    new = replace(history, evaluated=(*history.evaluated, (step, ap)))
    if history.best_ap is None or ap > history.best_ap:
        new = replace(new, best_ap=ap, best_step=step)
        if stage_one:
            new = replace(new, stage_one_step=step)
    if history.since_restart is None or ap > history.since_restart:
        return replace(new, since_restart=ap)
    return new if stage_one else replace(new, since_restart=None)


def restarts(history: EvaluationHistory, step: int, stage_two_step: int | None) -> bool:
    """Whether training continues from the best weights of stage one after `step` steps, instead of its own."""
    if history.stage_one_step is None or stage_two_step is None:
        return False
    restart_due = history.since_restart is None and history.evaluated[-1][0] == step
    return step == stage_two_step or (step > stage_two_step and restart_due)
