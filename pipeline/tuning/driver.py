"""The driver of a sweep: search with early stopping, confirmation of the best points at full length, report.

<storage>/<name>/
    sweep.json    the sweep and the digests of its data at the first start
    trials/       one record per trial, see `TrialStore`
    curves/       evaluations of each trial, written by the trial itself
    runs/         run folders of the trials, as of any training
    logs/         console output of each trial
    report.html   records.json   promoted.yaml
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from dfine_core.cpu import available_cores
from pipeline import storage
from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.config_files import check, dump, dump_shareable, flatten, load_cluster
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.errors import UserError
from pipeline.evaluation.figures import png
from pipeline.open_detector import open_detector
from pipeline.ray_cluster import start_ray
from pipeline.ray_job import submitted_job
from pipeline.redaction import redact_values
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.training.context import ResolvedData, resolve_data
from pipeline.training.driver_lock import driver_lock
from pipeline.training.init_weights import materialize_init
from pipeline.training.preflight import DECODING_CPUS
from pipeline.training.run_description import NOTE, dataset_input
from pipeline.tuning.analysis.sweep_report import BINS, SweepReport, draw_figures, make_report, report_page, trial_table
from pipeline.tuning.analysis.verdict import top_points, verdict_text
from pipeline.tuning.callbacks import ProgressCallback, TrialStatusReporter
from pipeline.tuning.locations import with_absolute_paths
from pipeline.tuning.resources import place_trials
from pipeline.tuning.schedulers import make_scheduler
from pipeline.tuning.searcher import FixedTrials, SpaceSearcher
from pipeline.tuning.space import grid_size
from pipeline.tuning.sweep import LATENCY, Sweep, confirm_trials, default_point, replicate_trials, tracking_of
from pipeline.tuning.trial import DRIVER, run_trial
from pipeline.tuning.trial_files import TrialSettings, record_failure
from pipeline.tuning.trial_records import ENDED
from pipeline.tuning.trial_store import TrialStore

SOURCE = "jobs/tune.py"
REPORT = "report.html"
RUN_ID_TIMEOUT_S = 30.0  # for MLflow to create the sweep's run, which the trials name as their parent
LOST_PROCESSES = 3  # per trial and start of the sweep; one more, and the trial has failed until the next start
DRAIN_TIMEOUT_S = 30.0  # for the last processes of stopped trials to end, and for MLflow to receive their status
# Keys that may change between two starts: budget, resources, tracking.
NEUTRAL = (
    *("storage", "trials", "hours", "max_concurrent_trials", "confirm", "replicates", "cluster"),
    *("tracking", "base.tracking"),
)
# Records and console are this project's own. A trial whose only evaluation is its last ends without a metric in Tune, which
# the strict check would not accept; `TrialStore` has its result.
QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SweepInterruptedError(UserError):
    """The sweep was stopped before its end; its folder is intact."""

    exit_code = 130


@dataclass(frozen=True)
class SweepResult:
    """A sweep that came to its end."""

    folder: str
    report: SweepReport

    def summary(self) -> str:
        """Verdict, path of the report, and the command for MLflow, for the console."""
        lines = [verdict_text(self.report.verdict), f"report: {storage.join(self.folder, REPORT)}"]
        return "\n".join([*lines, f"charts and images in MLflow: dfine ui {self.folder}"])


@dataclass(frozen=True)
class SweepContext:
    """State that the phases of a sweep share."""

    settings: TrialSettings
    store: TrialStore
    reporter: TrialStatusReporter
    trainable: Callable[..., None]
    max_concurrent_trials: int


def run_sweep(sweep: Sweep, trainable: Callable[..., None] = run_trial, *, verify_data: bool = False) -> SweepResult:
    """Run a sweep, or continue it: trials that have ended are not repeated.

    Args:
        trainable: the work of one trial; simulations pass a shorter one.
        verify_data: read all shards before the start, and compare their SHA-256 with the manifest.

    Raises:
        ConfigError: the sweep cannot run, or its name belongs to another sweep.
        SweepInterruptedError: Ctrl-C or SIGTERM.
    """
    # 1. Check tracking and data, before anything starts.
    tracking = TrackingSettings.resolve(
        sweep.storage,
        experiment=tracking_of(sweep).experiment,
        run_name=sweep.name or "sweep",
        uri=tracking_of(sweep).uri,
    )
    data = resolve_data(check(Experiment, sweep.base, source=sweep.experiment).data)
    for shards in data.shard_sets():
        refuse_changed_files(shards, contents=verify_data)
    for line in data.lines():
        print(line, flush=True)

    # 2. Decide how many trials run at once.
    start_ray(dashboard=True)
    cluster, max_concurrent_trials = plan_resources(sweep)

    # 3. Begin or continue, under the lock of the sweep's folder.
    folder = storage.join(sweep.storage, sweep.name or "sweep")
    with driver_lock(folder):
        key = _begin_or_continue(folder, sweep, data)
        tracking = replace(tracking, run_key=key)
        with Tracker(run_dir.outbox_folder(folder, key), tracking) as tracker:
            _begin_mlflow_run(tracker, sweep, data, folder)
            pinned = sweep_for_trials(sweep, folder, tracking.uri)
            parent_run_id = tracker.wait_for_run_id(RUN_ID_TIMEOUT_S)
            settings = TrialSettings(pinned, folder, cluster, tracking.uri, parent_run_id)
            store = TrialStore(settings)
            reporter = TrialStatusReporter(store)
            context = SweepContext(settings, store, reporter, trainable, max_concurrent_trials)

            # 4. Both phases. The report is written however they end.
            try:
                _search(context)
                _confirm(context)
            except BaseException as error:
                tracker.finish("KILLED" if isinstance(error, SweepInterruptedError | KeyboardInterrupt) else "FAILED")
                raise
            finally:
                reporter.drain(DRAIN_TIMEOUT_S)
                report = make_report(sweep, store.ordered(), _detector_bins(pinned.init))
                _write_report(report, store, tracker)
            tracker.finish("FINISHED")
    return SweepResult(folder, report)


def plan_resources(sweep: Sweep) -> tuple[Cluster, int]:
    """Cluster settings of one trial, and the number of trials that run at once."""
    cluster = load_cluster(sweep.cluster)
    decodes = sweep.base.get("data", {}).get("decode_in", "task") == "task"
    placement = place_trials(
        sweep,
        cluster,
        ray.cluster_resources(),  # type: ignore[no-untyped-call]
        [node["Resources"] for node in ray.nodes() if node["Alive"]],  # type: ignore[no-untyped-call]
        driver=DRIVER,
        decoding_cpus=DECODING_CPUS if decodes else 0.0,
    )
    if placement.message:
        print(placement.message, flush=True)
    workers = placement.max_concurrent_trials * placement.workers
    trial_cluster = cluster.model_copy(
        update={
            "workers": placement.workers,
            "cpus_per_worker": placement.per_worker.get("CPU", 0.0),
            "gpus_per_worker": placement.per_worker.get("GPU", 0.0),
            "threads_per_worker": cluster.threads_per_worker or max(1, available_cores() // workers),
        }
    )
    return trial_cluster, placement.max_concurrent_trials


# Phases


def _search(context: SweepContext) -> None:
    """Search the space, with early stopping."""
    sweep, store = context.settings.sweep, context.store
    ends_at = _began_at(context.settings.folder) + 3600 * sweep.hours if sweep.hours else float("inf")
    default = replicate_trials(sweep)[:1]  # one is enough to compare with; several would crowd points out of the rungs
    searcher = SpaceSearcher(sweep, default, store.ordered(), store.finish, ends_at)
    points = sweep.trials or (grid_size(sweep.space) if sweep.searcher.kind == "grid" else None)
    total = f"{points * sweep.seeds_per_point + len(default)}" if points else f"{sweep.hours:g} h of trials"
    _run_trials(context, searcher, make_scheduler(context.settings), f"{total} before confirmation")


def _confirm(context: SweepContext) -> None:
    """Train the default and the best points of the search at full length, with fresh seeds."""
    sweep, records = context.settings.sweep, context.store.records
    best = top_points(
        context.store.ordered(),
        default_point(sweep),
        sweep.metric,
        count=sweep.confirm.top,
        mode=sweep.mode,
        latency=LATENCY in sweep.objectives,
    )
    trials = [
        trial
        for trial in [*replicate_trials(sweep), *confirm_trials(sweep, best)]
        if trial.id not in records or records[trial.id].status not in ENDED
    ]
    if trials:
        scheduler = FIFOScheduler()  # type: ignore[no-untyped-call]
        total = f"{len(records) + len(trials)}"
        _run_trials(context, FixedTrials(trials, context.store.finish), scheduler, total)


def _run_trials(
    context: SweepContext, searcher: SpaceSearcher | FixedTrials, scheduler: TrialScheduler, total: str
) -> None:
    """Run trials with Ray Tune until the searcher has no more.

    Args:
        total: expected number of trials, for the console.

    Raises:
        SweepInterruptedError: Tune ended before the searcher.
    """
    settings = context.settings
    os.environ.update(QUIET_TUNE)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(record_failure, work=context.trainable, settings=settings),
            DRIVER,
        ),
        tune_config=tune.TuneConfig(
            metric=settings.sweep.metric,
            mode=settings.sweep.mode,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # until the searcher is exhausted
            max_concurrent_trials=context.max_concurrent_trials,
            reuse_actors=False,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),  # always a new name: trials continue from their own folders
            storage_path=storage.join(settings.folder, "ray"),
            callbacks=[ProgressCallback(context.store, context.reporter, total)],
            # Of the trial's own process; each training restarts its workers by itself.
            failure_config=tune.FailureConfig(max_failures=LOST_PROCESSES),
            verbose=0,
        ),
    )
    tuner.fit()
    if context.store.interrupt() or not searcher.exhausted:
        raise SweepInterruptedError(f"interrupted; {settings.folder} is intact: run the same command again to continue")


# Start


def _begin_or_continue(folder: str, sweep: Sweep, data: ResolvedData) -> str:
    """Write the start of a new sweep, or check that an existing one may continue; returns its tracking key.

    Raises:
        ConfigError: the name belongs to another sweep.
    """
    now = {"sweep": dump_shareable(sweep), "data": data.digests()}
    path = storage.join(folder, run_dir.SWEEP_START)
    if not storage.exists(path):
        key = uuid.uuid4().hex
        storage.write_atomic(path, json.dumps({**now, "tracking_key": key, "began_at": time.time()}, indent=1).encode())
        return key
    start = storage.read_json(path, "sweep", "data", "tracking_key")
    before, after = (flatten(redact_values(content["sweep"])) | flatten(content["data"]) for content in (start, now))
    paths = tuple(f"base.data.{use}" for use in now["data"])  # data are compared by their digests
    changes = [
        f"{name}: {before.get(name)!r} before, {after.get(name)!r} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith((*NEUTRAL, *paths))
    ]
    if changes:
        lines = "".join(f"\n  {line}" for line in changes)
        raise ConfigError(
            f"sweep {sweep.name!r} was started with other settings:{lines}\nGive another name: --set name=..."
        )
    return str(start["tracking_key"])


def _began_at(folder: str) -> float:
    return float(storage.read_json(storage.join(folder, run_dir.SWEEP_START), "began_at")["began_at"])


def _begin_mlflow_run(tracker: Tracker, sweep: Sweep, data: ResolvedData, folder: str) -> None:
    assert data.val is not None  # `load_sweep` requires it
    datasets = [dataset_input(each.shards, "training") for each in data.train.sets]
    datasets.append(dataset_input(data.val, "validation"))
    job = {"ray.job": name} if (name := submitted_job()) else {}
    params = flatten({name: value for name, value in dump(sweep).items() if name != "base"})
    tracker.begin(params, {"run_folder": folder, "sweep": sweep.name or "", **job}, datasets, SOURCE)


def sweep_for_trials(sweep: Sweep, folder: str, tracking_uri: str) -> Sweep:
    """Copy of the sweep that means the same in every working directory and at any time.

    Paths become absolute. Initial weights in MLflow are copied once, because aliases move.
    """
    init = sweep.init and materialize_init(sweep.init, folder, tracking_uri)
    return sweep.model_copy(update={"base": with_absolute_paths(sweep.base), "init": init})


# Report


def _write_report(report: SweepReport, store: TrialStore, tracker: Tracker) -> None:
    """Write records and report to the sweep's folder and to MLflow."""
    folder, figures = store.settings.folder, draw_figures(report)
    page = report_page(report, figures).encode()
    records = storage.read_bytes(store.write())
    storage.write_atomic(storage.join(folder, REPORT), page)
    tracker.artifact(page, f"sweep/{REPORT}")
    tracker.artifact(records, "sweep/records.json")
    verdict = verdict_text(report.verdict)
    tracker.text(verdict, "sweep/verdict.txt")
    tracker.tags(
        {NOTE: f"Sweep with {len(report.records)} trials: `sweep/{REPORT}` among the artifacts\n\n```\n{verdict}\n```"}
    )
    for name, figure in figures.items():
        tracker.artifact(png(figure), f"sweep/{name}.png")
    if report.records:
        tracker.table(trial_table(report), "sweep/trials.json")
        counts = dict.fromkeys(("finished", "pruned", "failed"), 0.0)
        for record in report.records:
            counts[record.status] = counts.get(record.status, 0.0) + 1
        cost = {"cost_s": sum(record.cost_s for record in report.records)}
        tracker.metrics({f"sweep/{name}": value for name, value in (counts | cost).items()}, len(report.records))


def _detector_bins(init: str | None) -> dict[str, float] | None:
    """Bins of the detector that all trials start from; None if there is no such detector."""
    if init is None:
        return None
    try:
        config = open_detector(init).config
    except ConfigError:  # a backbone alone
        return None
    return {name: getattr(config, name) for name in BINS}
