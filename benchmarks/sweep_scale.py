"""Cost of each event in the driver of a sweep with a thousand trials on 256 GPUs.

    python -m benchmarks.sweep_scale --trials 1000 --slots 256

Time is simulated, so only the driver's own work takes time: Optuna's next point, ASHA's decisions, records, console, MLflow,
verdict and report, each as in a real sweep. There are no trial processes; `benchmarks.sweep_processes` has them.
"""

import argparse
import heapq
import json
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from mlflow import MlflowClient
from ray.tune.schedulers import TrialScheduler

from benchmarks.sweep_processes import EVALUATIONS, sweep_file
from pipeline import storage
from pipeline.config import Cluster
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.sources.synthetic import synthetic_source
from pipeline.ray_cluster import start_ray
from pipeline.training.run_dir import RESULT, RUN_START
from pipeline.tuning.analysis.sweep_report import draw_figures, make_report, report_page
from pipeline.tuning.callbacks import ProgressCallback, TrialStatusReporter
from pipeline.tuning.load import load_sweep
from pipeline.tuning.schedulers import make_scheduler
from pipeline.tuning.searcher import SpaceSearcher
from pipeline.tuning.sweep import Trial, replicate_trials
from pipeline.tuning.trial_files import (
    EVALUATION,
    TrialProgress,
    TrialSettings,
    read_progress,
    runs_folder,
    write_progress,
)
from pipeline.tuning.trial_records import TrialEvaluation
from pipeline.tuning.trial_store import TrialStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=256, help="trials at once")
    args = parser.parse_args()
    start_ray()  # for parts of Tune that ask for a cluster
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        prepare(synthetic_source(8, longest_side=64), str(folder / "data"), split="train", options=PrepareOptions())
        sweep = load_sweep(sweep_file(folder, args.trials, gpus=1))
        tracking_uri = f"sqlite:///{folder}/mlflow.db"
        settings = TrialSettings(
            sweep, str(folder / "sweep"), Cluster(workers=1, gpus_per_worker=1), tracking_uri, None
        )
        store = TrialStore(settings)
        reporter = TrialStatusReporter(store)
        clock = Clock()
        simulate(settings, store, reporter, args.slots, clock)
        with clock.timed("MLflow receives what is left"):
            left = reporter.drain(timeout=1800)
        with clock.timed("report: verdict"):
            report = make_report(sweep, store.ordered())
        with clock.timed("report: figures and page"):
            page = report_page(report, draw_figures(report))
        client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        with clock.timed("MLflow lists all runs"):
            runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=50_000)
        for name, seconds in clock.seconds.items():
            print(
                f"{name:34}{len(seconds):7} times{1000 * np.median(seconds):9.1f} ms{1000 * max(seconds):10.1f} ms at most"
                f"{sum(seconds):9.1f} s in all"
            )
        print(
            f"{len(store.records)} trials, {len(runs)} runs in MLflow, {left} without a final status there,"
            f" report {len(page) / 1e6:.1f} MB"
        )


class Clock:
    """Durations by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the block."""
        started_at = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - started_at)


def simulate(
    settings: TrialSettings, store: TrialStore, reporter: TrialStatusReporter, slots: int, clock: Clock
) -> None:
    """Run the search, with a queue of events instead of Tune's loop."""
    searcher = SpaceSearcher(settings.sweep, replicate_trials(settings.sweep)[:1], [], store.finish, float("inf"))
    scheduler = make_scheduler(settings)
    scheduler.set_search_properties(settings.sweep.metric, settings.sweep.mode)
    callback = ProgressCallback(store, reporter, str(settings.sweep.trials))
    waiting: list[tuple[float, str, SimpleNamespace]] = []  # time of a trial's next evaluation

    def begin(now: float) -> None:
        name = uuid.uuid4().hex[:8]
        with clock.timed("next point"):
            config = searcher.suggest(name)
        if not isinstance(config, dict):
            return
        trial = SimpleNamespace(trial_id=name, config=config, evaluations=0)
        with clock.timed("a trial begins"):
            scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
            callback.on_trial_start(0, [], trial)
        heapq.heappush(waiting, (now + 1, name, trial))

    for _ in range(slots):
        begin(0.0)
    while waiting:
        now, name, trial = heapq.heappop(waiting)
        trial.evaluations += 1
        ap = trained(settings, Trial(**trial.config["trial"]), trial.evaluations)
        goes_on = trial.evaluations < EVALUATIONS
        if goes_on:
            result = {"AP": ap, EVALUATION: trial.evaluations, "training_iteration": trial.evaluations}
            with clock.timed("an evaluation"):
                callback.on_trial_result(0, [], trial, result)
                goes_on = scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE  # type: ignore[arg-type]
        if goes_on:
            heapq.heappush(waiting, (now + np.random.default_rng(len(waiting)).uniform(0.8, 1.2), name, trial))
            continue
        with clock.timed("a trial ends"):
            searcher.on_trial_complete(name)
            callback.on_trial_complete(0, [], trial)
        begin(now)


def trained(settings: TrialSettings, trial: Trial, evaluation: int) -> float:
    """AP of a simulated trial, written to the files of a real one; it grows to a limit set by the learning rate, with noise."""
    luck = np.random.default_rng([trial.seed, trial.index]).standard_normal()
    most = 0.5 - 0.1 * abs(np.log10(trial.point["optimizer.lr"] / 1e-3)) + 0.01 * luck
    ap = float(most * (1 - 0.5**evaluation))
    reading = TrialEvaluation(evaluation, float(evaluation), {"AP": ap}, float(evaluation))
    write_progress(
        settings.folder,
        trial,
        TrialProgress((*read_progress(settings.folder, trial).evaluations, reading), float(evaluation)),
    )
    run = storage.join(runs_folder(settings.folder), trial.id)
    if evaluation == 1:
        storage.write_atomic(storage.join(run, RUN_START), json.dumps({"tracking_key": uuid.uuid4().hex}).encode())
    if evaluation == EVALUATIONS:
        result = {"numbers": reading.metrics, "latency_ms": 5.0}
        storage.write_atomic(storage.join(run, RESULT), json.dumps(result).encode())
    return ap


if __name__ == "__main__":
    main()
