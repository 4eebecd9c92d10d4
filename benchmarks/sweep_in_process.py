"""The trials of a grid, trained one after another in this process and judged by the verdict of a sweep.

    python -m benchmarks.sweep_in_process configs/sweeps/small_set.yaml --out found --set name=small-set-bccd
    ... --points 2       part of the grid, to see that it runs

`dfine tune` trains the same trials on Ray, where every one of them starts processes of its own. For trials of a minute on two
cores that is most of the time. The same command continues; trials that have ended are not repeated.
"""

import argparse
import time
from pathlib import Path

from pipeline import storage
from pipeline.config import Cluster
from pipeline.config_files import parse_overrides
from pipeline.training.launch import launch
from pipeline.tuning.analysis.sweep_report import make_report, report_page
from pipeline.tuning.analysis.verdict import top_points, verdict_text
from pipeline.tuning.load import load_sweep
from pipeline.tuning.space import grid_points
from pipeline.tuning.sweep import Sweep, Trial, confirm_trials, default_point, replicate_trials, search_trials
from pipeline.tuning.trial import experiment_of_trial
from pipeline.tuning.trial_files import TrialSettings
from pipeline.tuning.trial_records import ENDED
from pipeline.tuning.trial_store import TrialStore


def main() -> None:
    """Train the trials, write the sweep's report, and print its verdict."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("sweep", type=Path, help="YAML file with a grid")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--points", type=int, help="first points of the grid alone")
    args = parser.parse_args()

    sweep = load_sweep(args.sweep, parse_overrides(args.set))
    folder = str(args.out.resolve())
    settings = TrialSettings(
        sweep, folder, Cluster(workers=1, cpus_per_worker=1), f"sqlite:///{folder}/mlflow.db", None
    )
    store = TrialStore(settings)
    points = grid_points(sweep.space)[: args.points]
    searched = [trial for index, point in enumerate(points) for trial in search_trials(sweep, point, index)]
    train([*replicate_trials(sweep), *searched], settings, store)
    train(confirm_trials(sweep, best_points(sweep, store)), settings, store)

    report = make_report(sweep, store.ordered(), None)
    storage.write_atomic(f"{folder}/report.html", report_page(report).encode())
    print(verdict_text(report.verdict))


def train(trials: list[Trial], settings: TrialSettings, store: TrialStore) -> None:
    """Train those of `trials` that have not ended."""
    for number, trial in enumerate(trials, start=1):
        if trial.id in store.records and store.records[trial.id].status in ENDED:
            continue
        store.begin(trial)
        started, cpu = time.time(), time.process_time()
        launch(experiment_of_trial(settings, trial))
        record = store.finish(trial, failed=False)
        store.write()
        metric = settings.sweep.metric
        print(
            f"{number} of {len(trials)}, {trial.phase}, seed {trial.seed}, {trial.point}: {metric} {record.result(metric)},"
            f" AP {record.result('AP')}, {time.process_time() - cpu:.0f} CPU s, {time.time() - started:.0f} s",
            flush=True,
        )


def best_points(sweep: Sweep, store: TrialStore) -> list[dict[str, object]]:
    """Points that are trained again with fresh seeds."""
    return top_points(
        store.ordered(), default_point(sweep), sweep.metric, count=sweep.confirm.top, mode=sweep.mode, latency=False
    )


if __name__ == "__main__":
    main()
