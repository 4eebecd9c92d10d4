"""Which weights are the best, and when stage two goes back to those of stage one, as released.

Stage one trains with strong augmentation, stage two without. Stage two starts from the best weights of stage one. Whenever an
evaluation in it is not better than the best since the last such restart, it starts from them again; so it is a sequence of
short runs from one place, of which the best is kept.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The record of a run; AP in 0..1, steps count those done when it was evaluated."""

    best_ap: float | None = None
    best_step: int | None = None
    stage_one_step: int | None = None  # of the best evaluation of stage one
    since_restart: float | None = None  # best AP since the last restart; None directly after one
    evaluated: tuple[tuple[int, float], ...] = ()  # every (step, AP) of this line of weights
    pending_step: int | None = None  # of weights that are being evaluated beside the training


def after_evaluation(standing: Standing, *, ap: float, step: int, stage_one: bool) -> Standing:
    """The new record; in stage two, no better than since the last restart means that there will be another one."""
    new = replace(standing, evaluated=(*standing.evaluated, (step, ap)))
    if standing.best_ap is None or ap > standing.best_ap:
        new = replace(new, best_ap=ap, best_step=step)
        if stage_one:
            new = replace(new, stage_one_step=step)
    if standing.since_restart is None or ap > standing.since_restart:
        return replace(new, since_restart=ap)
    return new if stage_one else replace(new, since_restart=None)


def goes_back(standing: Standing, step: int, stage_two_step: int | None) -> bool:
    """Whether a run that has done `step` steps continues from the best weights of stage one instead of its own."""
    if standing.stage_one_step is None or stage_two_step is None:
        return False
    restarts = standing.since_restart is None and standing.evaluated[-1][0] == step
    return step == stage_two_step or (step > stage_two_step and restarts)
