"""What one trial does: a training run of its own on Ray Train, which tells Ray Tune of every evaluation.

Tune runs this in a process that only drives. A trial that Tune has seen before, in an earlier start of the sweep, first
tells again what it told then, in no time: so scheduler and searcher learn what they knew, through the ordinary door.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline.config import Cluster, Experiment
from pipeline.config_files import check, with_values
from pipeline.data.shards.manifest import load_shards
from pipeline.training.launch import launch
from pipeline.training.schedule import derive
from pipeline.tuning.curves import (
    EVALUATION,
    Curve,
    TrialSettings,
    costs_per_second,
    read_curve,
    runs_folder,
    write_curve,
)
from pipeline.tuning.records import Reading
from pipeline.tuning.sweep import LATENCY, Trial, experiment_of

# Of the process that drives a trial and of Ray Train's controller, which stays beside it. Tune takes no zero; without the memory
# Ray would put all of them on one node.
DRIVER = {"CPU": 0.01, "memory": 1.0 * 2**30}


def run_trial(config: dict[str, Any], settings: TrialSettings) -> None:
    """
    Args:
        config: {"trial": fields of `Trial`, "ended": whether it has come to its end before}.
    """
    trial = Trial(**config["trial"])
    experiment = experiment_of_trial(settings, trial)
    total = evaluations_in(experiment, settings.cluster)
    known = read_curve(settings.folder, trial)
    for number, reading in enumerate(known.readings, start=1):
        if number < total:
            tune.report({**reading.metrics, EVALUATION: number})
    if config["ended"]:
        return
    os.environ["MLFLOW_TRACKING_URI"] = settings.tracking_uri
    started_at = time.time()
    report = Report(settings, trial, total, started_at)
    with _console_in(settings.folder, trial):
        launch(experiment, settings.cluster, parent_run_id=settings.parent_run_id, callbacks=[report])
    last = read_curve(settings.folder, trial)
    write_curve(settings.folder, trial, Curve(last.readings, known.seconds + time.time() - started_at))


class Report(TuneReportCallback):
    """In Ray Train's controller: every evaluation to the trial's file, and to Tune.

    Tune does not hear of the last one: it could only stop a trial that is about to be finished.
    """

    def __init__(self, settings: TrialSettings, trial: Trial, total: int, started_at: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._settings, self._trial, self._total, self._started_at = settings, trial, total, started_at
        self._before = read_curve(settings.folder, trial)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        numbers = {name: value for name, value in metrics[0].items() if name not in ("step", "epoch")}
        seconds = self._before.seconds + time.time() - self._started_at
        cost = seconds * sum(costs_per_second(self._settings.cluster).values())
        reading = Reading(int(metrics[0]["step"]), metrics[0]["epoch"], numbers, cost)
        earlier = read_curve(self._settings.folder, self._trial).readings
        if earlier and earlier[-1].step >= reading.step:
            return  # repeated after a restart
        readings = (*earlier, reading)
        write_curve(self._settings.folder, self._trial, Curve(readings, seconds))
        if len(readings) < self._total:
            super().after_report(run_context, [{**numbers, EVALUATION: len(readings)}], checkpoint)


def experiment_of_trial(settings: TrialSettings, trial: Trial) -> Experiment:
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


def evaluations_in(experiment: Experiment, cluster: Cluster) -> int:
    """Of a whole run."""
    workers = cluster.workers if isinstance(cluster.workers, int) else 1
    schedule = derive(experiment, images=load_shards(experiment.data.train).manifest.images, workers=workers)
    return -(-schedule.steps // schedule.evaluation_steps)


@contextlib.contextmanager
def _console_in(folder: str, trial: Trial) -> Iterator[None]:
    """What a training says goes to a file of its own; many at once would not be read."""
    path = f"{trial.id}.log" if "://" in folder else f"{folder}/logs/{trial.id}.log"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield
