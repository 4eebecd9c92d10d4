"""Work of a sweep's driver for a thousand trials on 256 GPUs, event by event.

    python -m benchmarks.sweep_scale --trials 1000 --places 256

Time is simulated, so that only the driver's work takes any: Optuna's next point, ASHA's decisions, records, the console,
MLflow, verdict and report, each as it is in a sweep. Trials and their processes are left out; see `benchmarks.sweep_processes`.
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
from pipeline.tuning.analysis.sweep_report import as_html, draw, make_report
from pipeline.tuning.callbacks import Closing
from pipeline.tuning.curves import EVALUATION, Curve, TrialSettings, read_curve, runs_folder, write_curve
from pipeline.tuning.driver import scheduler_of
from pipeline.tuning.load import load_sweep
from pipeline.tuning.records import Reading
from pipeline.tuning.searcher import Points
from pipeline.tuning.sweep import Trial, replicate_trials
from pipeline.tuning.trial_store import Ledger
from pipeline.tuning.watcher import Watcher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--places", type=int, default=256, help="trials at once")
    args = parser.parse_args()
    start_ray()  # some parts of Tune need a cluster
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(synthetic_source(8, longest_side=64), str(folder / "data"), split="train", options=PrepareOptions())
        sweep = load_sweep(sweep_file(folder, args.trials, gpus=1))
        store = f"sqlite:///{folder}/mlflow.db"
        settings = TrialSettings(sweep, str(folder / "sweep"), Cluster(workers=1, gpus_per_worker=1), store, None)
        ledger = Ledger(settings)
        closing = Closing(ledger)
        clock = Clock()
        simulate(settings, ledger, closing, args.places, clock)
        with clock.timed("MLflow is told what is left"):
            left = closing.finish(timeout=1800)
        with clock.timed("report: verdict"):
            report = make_report(sweep, ledger.ordered())
        with clock.timed("report: figures and page"):
            page = as_html(report, draw(report))
        client = MlflowClient(store, registry_uri=store)
        with clock.timed("MLflow lists all runs"):
            runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=50_000)
        for name, seconds in clock.seconds.items():
            print(
                f"{name:34}{len(seconds):7} times{1000 * np.median(seconds):9.1f} ms{1000 * max(seconds):10.1f} ms at most"
                f"{sum(seconds):9.1f} s in all"
            )
        print(
            f"{len(ledger.records)} trials, {len(runs)} runs in MLflow, {left} not told, report {len(page) / 1e6:.1f} MB"
        )


class Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started_at = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - started_at)


def simulate(settings: TrialSettings, ledger: Ledger, closing: Closing, places: int, clock: Clock) -> None:
    """Run the search with an event queue in place of Tune's loop."""
    points = Points(settings.sweep, replicate_trials(settings.sweep)[:1], [], ledger.settle, float("inf"))
    scheduler = scheduler_of(settings)
    scheduler.set_search_properties(settings.sweep.metric, settings.sweep.mode)
    watcher = Watcher(ledger, closing, str(settings.sweep.trials))
    waiting: list[tuple[float, str, SimpleNamespace]] = []  # time of the next evaluation of each trial

    def begin(now: float) -> None:
        name = uuid.uuid4().hex[:8]
        with clock.timed("next point"):
            config = points.suggest(name)
        if not isinstance(config, dict):
            return
        trial = SimpleNamespace(trial_id=name, config=config, evaluations=0)
        with clock.timed("a trial begins"):
            scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
            watcher.on_trial_start(0, [], trial)
        heapq.heappush(waiting, (now + 1, name, trial))

    for _ in range(places):
        begin(0.0)
    while waiting:
        now, name, trial = heapq.heappop(waiting)
        trial.evaluations += 1
        ap = trained(settings, Trial(**trial.config["trial"]), trial.evaluations)
        goes_on = trial.evaluations < EVALUATIONS
        if goes_on:
            result = {"AP": ap, EVALUATION: trial.evaluations, "training_iteration": trial.evaluations}
            with clock.timed("an evaluation"):
                watcher.on_trial_result(0, [], trial, result)
                goes_on = scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE  # type: ignore[arg-type]
        if goes_on:
            heapq.heappush(waiting, (now + np.random.default_rng(len(waiting)).uniform(0.8, 1.2), name, trial))
            continue
        with clock.timed("a trial ends"):
            points.on_trial_complete(name)
            watcher.on_trial_complete(0, [], trial)
        begin(now)


def trained(settings: TrialSettings, trial: Trial, evaluation: int) -> float:
    """Write the files of a training whose AP approaches a limit set by the learning rate, with noise of 0.01."""
    luck = np.random.default_rng([trial.seed, trial.index]).standard_normal()
    most = 0.5 - 0.1 * abs(np.log10(trial.point["optimizer.lr"] / 1e-3)) + 0.01 * luck
    ap = float(most * (1 - 0.5**evaluation))
    reading = Reading(evaluation, float(evaluation), {"AP": ap}, float(evaluation))
    write_curve(
        settings.folder, trial, Curve((*read_curve(settings.folder, trial).readings, reading), float(evaluation))
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
