"""A sweep from its file to its verdict: the default, a search that stops what is bad, then chosen points at full length.

<storage>/<name>/
    run.json      what the sweep began with
    trials/       one record per trial, see `Ledger`
    curves/       evaluations of each, written by the trials
    runs/         the trials' own folders, as of any training
    logs/         what each trial said
    report.html   records.json   promoted.yaml
"""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from pipeline import storage
from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.config_files import check, dump, flatten, load_cluster
from pipeline.data.shards.manifest import load_shards
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.errors import UserError
from pipeline.evaluation.figures import png
from pipeline.open_detector import open_detector
from pipeline.ray_cluster import start_ray
from pipeline.ray_job import submitted_job
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.training.init_weights import materialize_init
from pipeline.training.preflight import DECODING_CPUS
from pipeline.training.run_log import dataset_input
from pipeline.tuning.analysis.sweep_report import BINS, SweepReport, as_html, draw, make_report, table
from pipeline.tuning.analysis.verdict import as_text, top_points
from pipeline.tuning.callbacks import Closing
from pipeline.tuning.curves import ENDED, EVALUATION, TrialSettings, saying_why
from pipeline.tuning.resources import place
from pipeline.tuning.searcher import Listed, Points
from pipeline.tuning.space import grid_size
from pipeline.tuning.sweep import LATENCY, Sweep, confirm_trials, default_point, replicate_trials, tracking_of
from pipeline.tuning.trial import DRIVER, evaluations_in, run_trial
from pipeline.tuning.trial_store import Ledger
from pipeline.tuning.watcher import Watcher

SOURCE = "jobs/tune.py"
REACHED_WITHIN_S = 30.0  # MLflow, to give the sweep's run an id that its trials can name as their parent
CLOSING_S = 30.0  # given to the last processes of stopped trials, and to MLflow to hear of them
# What may change between two starts: how long, how much beside each other, where it is recorded.
NEUTRAL = ("storage", "trials", "hours", "together", "confirm", "replicates", "cluster", "tracking", "base.tracking")
REPORT = "report.html"
# The ledger keeps and shows. A trial ends without a metric when its last evaluation is its first: the ledger has it.
QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SweepInterruptedError(UserError):
    """The sweep was stopped before its end; its folder is whole."""

    exit_code = 130


@dataclass(frozen=True)
class SweepOutcome:
    folder: str
    report: SweepReport
    tracking: TrackingSettings

    def summary(self) -> str:
        lines = [as_text(self.report.verdict), f"report: {storage.join(self.folder, REPORT)}"]
        return "\n".join([*lines, f"record: {self.tracking.shown_uri}, run {self.report.sweep.name}"])


def run_sweep(sweep: Sweep, trainable: Callable[..., None] = run_trial) -> SweepOutcome:
    """Do what is not done yet.

    Args:
        trainable: what a trial does; simulations put something shorter here.

    Raises:
        ConfigError: it cannot run, or was begun as another sweep.
        SweepInterruptedError: by Ctrl-C or SIGTERM.
    """
    tracking = TrackingSettings.resolve(
        sweep.storage,
        experiment=tracking_of(sweep).experiment,
        run_name=sweep.name or "sweep",
        uri=tracking_of(sweep).uri,
    )
    for use in ("train", "val"):
        refuse_changed_files(load_shards(sweep.base["data"][use]))
    start_ray(dashboard=True)
    cluster, together = placed(sweep)
    folder = storage.join(sweep.storage, sweep.name or "sweep")
    with run_dir.driver_lock(folder):
        key = _begin_or_continue(folder, sweep)
        tracking = replace(tracking, run_key=key)
        with Tracker(run_dir.outbox_folder(folder, key), tracking) as tracker:
            _begin_record(tracker, sweep, folder)
            begun = as_trials_see_it(sweep, folder, tracking.uri)
            settings = TrialSettings(begun, folder, cluster, tracking.uri, tracker.wait_for_run_id(REACHED_WITHIN_S))
            ledger = Ledger(settings)
            closing = Closing(ledger)
            try:
                _search(settings, ledger, closing, together, trainable)
                _confirm(settings, ledger, closing, together, trainable)
            except BaseException as error:
                tracker.finish("KILLED" if isinstance(error, SweepInterruptedError | KeyboardInterrupt) else "FAILED")
                raise
            finally:
                closing.finish(CLOSING_S)
                report = make_report(sweep, ledger.ordered(), _bins(begun.init))
                _write(report, ledger, tracker)
            tracker.finish("FINISHED")
    return SweepOutcome(folder, report, tracking)


def placed(sweep: Sweep) -> tuple[Cluster, int]:
    """The cluster as one trial may use it, and how many trials run at once."""
    cluster = load_cluster(sweep.cluster)
    decodes = sweep.base.get("data", {}).get("decode_in", "task") == "task"
    placement = place(
        sweep,
        cluster,
        ray.cluster_resources(),  # type: ignore[no-untyped-call]
        [node["Resources"] for node in ray.nodes() if node["Alive"]],  # type: ignore[no-untyped-call]
        driver=DRIVER,
        decoding_cpus=DECODING_CPUS if decodes else 0.0,
    )
    if placement.message:
        print(placement.message, flush=True)
    of_trial = cluster.model_copy(
        update={
            "workers": placement.workers,
            "cpus_per_worker": placement.per_worker.get("CPU", 0.0),
            "gpus_per_worker": placement.per_worker.get("GPU", 0.0),
            "threads_per_worker": cluster.threads_per_worker or _threads(placement.together * placement.workers),
        }
    )
    return of_trial, placement.together


def _threads(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


# Phases


def _search(
    settings: TrialSettings, ledger: Ledger, closing: Closing, together: int, trainable: Callable[..., None]
) -> None:
    sweep = settings.sweep
    ends_at = _began_at(settings.folder) + 3600 * sweep.hours if sweep.hours else float("inf")
    default = replicate_trials(sweep)[:1]  # one is enough to compare with; several would crowd points out of the rungs
    searcher = Points(sweep, default, ledger.ordered(), ledger.settle, ends_at)
    points = sweep.trials or (grid_size(sweep.space) if sweep.searcher.kind == "grid" else None)
    total = f"{points * sweep.seeds_per_point + len(default)}" if points else f"{sweep.hours:g} h of trials"
    _fit(
        settings, ledger, closing, trainable, searcher, scheduler_of(settings), together, f"{total} before confirmation"
    )


def _confirm(
    settings: TrialSettings, ledger: Ledger, closing: Closing, together: int, trainable: Callable[..., None]
) -> None:
    """The default and the points that looked best, at full length and with seeds that chose nothing."""
    sweep = settings.sweep
    best = top_points(
        ledger.ordered(),
        default_point(sweep),
        sweep.metric,
        count=sweep.confirm.top,
        mode=sweep.mode,
        latency=LATENCY in sweep.objectives,
    )
    records = ledger.records
    left = [
        trial
        for trial in [*replicate_trials(sweep), *confirm_trials(sweep, best)]
        if trial.id not in records or records[trial.id].status not in ENDED
    ]
    if left:
        total = f"{len(ledger.records) + len(left)}"
        _fit(settings, ledger, closing, trainable, Listed(left, ledger.settle), FIFOScheduler(), together, total)  # type: ignore[no-untyped-call]


def _fit(
    settings: TrialSettings,
    ledger: Ledger,
    closing: Closing,
    trainable: Callable[..., None],
    searcher: Points | Listed,
    scheduler: TrialScheduler,
    together: int,
    total: str,
) -> None:
    os.environ.update(QUIET_TUNE)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(saying_why, work=trainable, settings=settings), DRIVER),
        tune_config=tune.TuneConfig(
            metric=settings.sweep.metric,
            mode=settings.sweep.mode,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # until the searcher has no more
            max_concurrent_trials=together,
            reuse_actors=False,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),  # what is continued are the trials' own folders
            storage_path=storage.join(settings.folder, "ray"),
            callbacks=[Watcher(ledger, closing, total)],
            failure_config=tune.FailureConfig(max_failures=0),  # a training has restarts of its own
            verbose=0,
        ),
    )
    tuner.fit()
    if ledger.interrupt() or not searcher.exhausted:
        raise SweepInterruptedError(f"{settings.folder} is whole: give the same command again to go on")


def scheduler_of(settings: TrialSettings) -> TrialScheduler:
    scheduler = settings.sweep.scheduler
    experiment = check(Experiment, settings.sweep.base, source=settings.sweep.experiment)
    total = evaluations_in(experiment, settings.cluster)
    if scheduler.kind == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    if scheduler.kind == "median":
        return SparingMedian(time_attr=EVALUATION, grace_period=scheduler.grace, min_samples_required=3)
    return SparingASHA(
        time_attr=EVALUATION,
        max_t=max(total, scheduler.grace),  # reached by nobody: the last evaluation is not told
        grace_period=scheduler.grace,
        reduction_factor=scheduler.reduction,
        brackets=3 if scheduler.kind == "hyperband" else 1,
    )


class SparingASHA(ASHAScheduler):
    """Replicates of the default are compared with, and never stopped."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return _spared(trial, super().on_trial_result(tune_controller, trial, result))


class SparingMedian(MedianStoppingRule):
    """Likewise."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return _spared(trial, super().on_trial_result(tune_controller, trial, result))


def _spared(trial: Any, action: str) -> str:
    return TrialScheduler.CONTINUE if trial.config["trial"]["phase"] == "replicate" else action


# The record


def _begin_or_continue(folder: str, sweep: Sweep) -> str:
    """The key under which MLflow knows the sweep.

    Raises:
        ConfigError: another sweep has this name.
    """
    uses = {use: sweep.base["data"][use] for use in ("train", "val")}
    now = {"sweep": dump(sweep), "data": {use: load_shards(uri).manifest.digest for use, uri in uses.items()}}
    path = storage.join(folder, run_dir.RUN_START)
    if not storage.exists(path):
        key = run_dir.get_or_make_key(folder)
        storage.write_atomic(path, json.dumps({**now, "tracking_key": key, "began_at": time.time()}, indent=1).encode())
        return key
    began = storage.read_json(path, "sweep", "data", "tracking_key")
    before, after = (flatten(content["sweep"]) | flatten(content["data"]) for content in (began, now))
    places = tuple(f"base.data.{use}" for use in uses)
    changes = [
        f"{name}: {before.get(name)!r} before, {after.get(name)!r} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith((*NEUTRAL, *places))
    ]
    if changes:
        listed = "".join(f"\n  {line}" for line in changes)
        raise ConfigError(f"sweep {sweep.name!r} began as another one:{listed}\nGive another name: --set name=...")
    key = began["tracking_key"]
    return str(key)


def _began_at(folder: str) -> float:
    return float(storage.read_json(storage.join(folder, run_dir.RUN_START), "began_at")["began_at"])


def _begin_record(tracker: Tracker, sweep: Sweep, folder: str) -> None:
    uses: tuple[tuple[str, Any], ...] = (("train", "training"), ("val", "validation"))
    datasets = [dataset_input(load_shards(sweep.base["data"][use]), context) for use, context in uses]
    job = {"ray.job": name} if (name := submitted_job()) else {}
    params = flatten({name: value for name, value in dump(sweep).items() if name != "base"})
    tracker.begin(params, {"run_folder": folder, "sweep": sweep.name or "", **job}, datasets, SOURCE)


def _write(report: SweepReport, ledger: Ledger, tracker: Tracker) -> None:
    folder, drawn = ledger.settings.folder, draw(report)
    page = as_html(report, drawn).encode()
    records = storage.read_bytes(ledger.write())
    storage.write_atomic(storage.join(folder, REPORT), page)
    tracker.artifact(page, f"sweep/{REPORT}")
    tracker.artifact(records, "sweep/records.json")
    tracker.text(as_text(report.verdict), "sweep/verdict.txt")
    for name, figure in drawn.items():
        tracker.artifact(png(figure), f"sweep/{name}.png")
    if report.records:
        tracker.table(table(report), "sweep/trials.json")
        counts = dict.fromkeys(("finished", "pruned", "failed"), 0.0)
        for record in report.records:
            counts[record.status] = counts.get(record.status, 0.0) + 1
        cost = {"cost_s": sum(record.cost_s for record in report.records)}
        tracker.metrics({f"sweep/{name}": value for name, value in (counts | cost).items()}, len(report.records))


def as_trials_see_it(sweep: Sweep, folder: str, tracking_uri: str) -> Sweep:
    """The same from every working directory, and the same tomorrow: aliases move, so what MLflow knows is copied once."""
    data = {**sweep.base["data"], **{use: storage.absolute(sweep.base["data"][use]) for use in ("train", "val")}}
    init = sweep.init and materialize_init(sweep.init, folder, tracking_uri)
    return sweep.model_copy(update={"base": {**sweep.base, "data": data}, "init": init})


def _bins(init: str | None) -> dict[str, float] | None:
    """Of the detector that all trials start from, if it is one."""
    if init is None:
        return None
    try:
        config = open_detector(init).config
    except ConfigError:  # a backbone alone
        return None
    return {name: getattr(config, name) for name in BINS}
