"""One trial: a training of its own on Ray Train that reports every evaluation to Ray Tune.

Tune runs this in a process that only drives. A trial that began in an earlier start of the sweep first reports its known
evaluations again, so that scheduler and searcher learn them the ordinary way.
"""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline.config import Cluster, Experiment
from pipeline.config_files import check, with_values
from pipeline.training import driver_lock
from pipeline.training.context import open_training_set
from pipeline.training.launch import launch
from pipeline.training.schedule import Schedule, derive
from pipeline.tuning.sweep import LATENCY, Trial, experiment_of
from pipeline.tuning.trial_files import (
    EVALUATION,
    TrialProgress,
    TrialSettings,
    costs_per_second,
    read_progress,
    runs_folder,
    write_progress,
)
from pipeline.tuning.trial_log import console_to_log, log_uri
from pipeline.tuning.trial_records import TrialEvaluation

# Resources of a trial's driver and of Ray Train's controller beside it. Tune does not accept zero CPUs. Without the memory
# Ray would put all drivers on one node.
T = TypeVar("T")
RETRY_S = 2.0  # between two attempts at a run whose last driver seems alive
DRIVER = {"CPU": 0.01, "memory": 1.0 * 2**30}


def run_trial(config: dict[str, Any], settings: TrialSettings) -> None:
    """Train one trial, or continue it.

    Args:
        config: {"trial": fields of `Trial`, "ended": True if the trial ended in an earlier start}.
    """
    trial = Trial(**config["trial"])
    experiment = experiment_of_trial(settings, trial)
    total = schedule_of(experiment, settings.cluster).evaluations

    # 1. Report what is known from earlier starts.
    known = read_progress(settings.folder, trial)
    for number, evaluation in enumerate(known.evaluations, start=1):
        if number < total:
            tune.report({**evaluation.metrics, EVALUATION: number})
    if config["ended"]:
        return

    # 2. Train; the callback writes and reports each new evaluation.
    os.environ["MLFLOW_TRACKING_URI"] = settings.tracking_uri
    started_at = time.time()
    report = TrialReport(settings, trial, total, started_at)
    with console_to_log(log_uri(settings.folder, trial.id)):
        when_free(
            lambda: launch(experiment, settings.cluster, parent_run_id=settings.parent_run_id, callbacks=[report])
        )

    # 3. The time after the last evaluation counts too.
    last = read_progress(settings.folder, trial)
    write_progress(settings.folder, trial, TrialProgress(last.evaluations, known.seconds + time.time() - started_at))


def when_free(start: Callable[[], T]) -> T:
    """Start a training, once no other driver holds it. One that died with its node seems to, until its heartbeat is stale.

    Raises:
        RunTakenError: the run has a driver that is alive.
    """
    until = time.monotonic() + driver_lock.STALE_SECONDS + driver_lock.HEARTBEAT_SECONDS
    while True:
        try:
            return start()
        except driver_lock.RunTakenError:
            if time.monotonic() > until:
                raise
        time.sleep(RETRY_S)


class TrialReport(TuneReportCallback):
    """Callback in Ray Train's controller that writes every evaluation to the trial's file, and reports it to Tune.

    The last evaluation is not reported: Tune could only stop a trial that is about to finish.
    """

    def __init__(self, settings: TrialSettings, trial: Trial, total: int, started_at: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._settings, self._trial, self._total, self._started_at = settings, trial, total, started_at
        self._before = read_progress(settings.folder, trial)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Handle one evaluation, reported by all workers."""
        numbers = {name: value for name, value in metrics[0].items() if name not in ("step", "epoch")}
        seconds = self._before.seconds + time.time() - self._started_at
        cost = seconds * sum(costs_per_second(self._settings.cluster).values())
        evaluation = TrialEvaluation(int(metrics[0]["step"]), metrics[0]["epoch"], numbers, cost)
        earlier = read_progress(self._settings.folder, self._trial).evaluations
        if earlier and earlier[-1].step >= evaluation.step:
            return  # repeated after a restart
        evaluations = (*earlier, evaluation)
        write_progress(self._settings.folder, self._trial, TrialProgress(evaluations, seconds))
        if len(evaluations) < self._total:
            super().after_report(run_context, [{**numbers, EVALUATION: len(evaluations)}], checkpoint)


def experiment_of_trial(settings: TrialSettings, trial: Trial) -> Experiment:
    """Checked experiment of a trial, with its folder, tags and the evaluations that the sweep needs."""
    sweep = settings.sweep
    content = experiment_of(sweep, trial.point, trial.seed)
    tags = {"sweep": sweep.name or "", "trial.phase": trial.phase, "trial.seed": str(trial.seed)}
    own = {
        "name": trial.id,
        "storage": runs_folder(settings.folder),
        "evaluation.before_training": sweep.init is not None,
        "evaluation.latency": LATENCY in sweep.objectives,
    }
    content = with_values(content, own)
    content["tracking"] = {**(content.get("tracking") or {}), "uri": None}
    content["tracking"]["tags"] = {**(content["tracking"].get("tags") or {}), **tags}
    return check(Experiment, content, source=trial.id)


def schedule_of(experiment: Experiment, cluster: Cluster) -> Schedule:
    """Schedule of a trial with this experiment. Opens its training data."""
    workers = cluster.workers if isinstance(cluster.workers, int) else 1
    return derive(experiment, images=open_training_set(experiment.data).images_in_epoch, workers=workers)
