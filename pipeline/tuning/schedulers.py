"""Ray Tune's schedulers for a sweep: which trials are stopped early. Replicates of the default never are."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from pipeline.config import Experiment
from pipeline.config_files import check
from pipeline.tuning.trial import schedule_of
from pipeline.tuning.trial_files import EVALUATION, TrialSettings


def make_scheduler(settings: TrialSettings) -> TrialScheduler:
    """Scheduler that the sweep file asks for. Its unit of time is one evaluation."""
    scheduler = settings.sweep.scheduler
    if scheduler.kind == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    if scheduler.kind == "median":
        return SparingMedian(time_attr=EVALUATION, grace_period=scheduler.grace, min_samples_required=3)
    experiment = check(Experiment, settings.sweep.base, source=settings.sweep.experiment)
    evaluations = schedule_of(experiment, settings.cluster).evaluations
    return SparingASHA(
        time_attr=EVALUATION,
        max_t=max(evaluations, scheduler.grace),  # never reached: a trial does not report its last evaluation
        grace_period=scheduler.grace,
        reduction_factor=scheduler.reduction,
        brackets=3 if scheduler.kind == "hyperband" else 1,
    )


class SparingASHA(ASHAScheduler):
    """ASHA that counts replicates of the default in its rungs, and never stops them."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial continues."""
        return _spare_replicates(trial, super().on_trial_result(tune_controller, trial, result))


class SparingMedian(MedianStoppingRule):
    """Median stopping rule that counts replicates of the default, and never stops them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._counted: dict[str, int] = {}  # evaluations by Tune's trial id

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial continues."""
        # A trial whose process was lost reports its evaluations again; in a mean they would count twice. ASHA takes each once.
        if result[EVALUATION] <= self._counted.get(trial.trial_id, 0):
            return TrialScheduler.CONTINUE
        self._counted[trial.trial_id] = result[EVALUATION]
        return _spare_replicates(trial, super().on_trial_result(tune_controller, trial, result))


def _spare_replicates(trial: Any, action: str) -> str:
    return TrialScheduler.CONTINUE if trial.config["trial"]["phase"] == "replicate" else action
