"""Sweep of many trials that sleep instead of training: cost of starting them, and idle time of free slots.

    python -m benchmarks.sweep_processes --trials 200 --gpus 256 --gpus-per-trial 8 --seconds 20

Everything except the training is real: Optuna, ASHA, Tune's loop, one process per trial, records, MLflow, verdict, report. GPUs
are only numbers to Ray here. The processes of the trials, which a cluster spreads over its nodes, share this machine's cores.
So their start-up is measured apart from the driver. `benchmarks.sweep_scale` measures the driver alone.
"""

import argparse
import json
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import yaml
from mlflow import MlflowClient
from ray import tune

from pipeline import storage
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.sources.synthetic import synthetic_source
from pipeline.ray_cluster import LOCAL_ENVIRONMENT, QUIET_ENVIRONMENT, private_cluster
from pipeline.training.run_dir import RESULT, RUN_START
from pipeline.tuning.driver import SweepInterruptedError, run_sweep
from pipeline.tuning.load import load_sweep
from pipeline.tuning.sweep import Trial
from pipeline.tuning.trial_files import (
    EVALUATION,
    TrialProgress,
    TrialSettings,
    read_progress,
    runs_folder,
    write_progress,
)
from pipeline.tuning.trial_records import TrialEvaluation

EVALUATIONS = 9
SECONDS = "SWEEP_SCALE_SECONDS"  # duration of a whole trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=256)
    parser.add_argument("--gpus-per-trial", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=40.0, help="duration of a whole trial")
    args = parser.parse_args()
    os.environ.update(QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT | {SECONDS: str(args.seconds)})
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        memory = args.gpus * 2**30
        with private_cluster(root):
            ray.init("local", num_cpus=4, num_gpus=args.gpus, _memory=memory, log_to_driver=False)
        prepare(synthetic_source(8, longest_side=64), str(folder / "data"), split="train", options=PrepareOptions())
        sweep = load_sweep(sweep_file(folder, args.trials, args.gpus_per_trial))
        began = time.time()
        try:
            print(run_sweep(sweep, sleeping).summary())
        except SweepInterruptedError:
            print("interrupted: the numbers cover what was done")
        ended = time.time()
        spent = cpu_seconds()
        ray.shutdown()
        times = [json.loads(path.read_text()) for path in (folder / "runs/sweep/times").iterdir()]
        slots = args.gpus // args.gpus_per_trial
        for line in (
            *slot_lines(times, slots),
            *driver_lines(spent, len(times)),
            *mlflow_lines(folder, times, ended),
        ):
            print(line)
        print(f"{'the whole sweep':48}{(ended - began) / 60:9.1f} min")


def sweep_file(folder: Path, trials: int, gpus: int) -> Path:
    data = str(folder / "data")
    experiment = {
        "data": {"train": data, "val": data, "decode_in": "worker"},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20},
        "schedule": {"steps": EVALUATIONS, "global_batch_size": 8},
        "evaluation": {"every_steps": 1},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    sweep = {
        "name": "sweep",
        "storage": str(folder / "runs"),
        "experiment": "experiment.yaml",
        "space": {
            "model.reg_max": {"integer": [8, 64, 2]},
            "loss.ddf": {"uniform": [0, 5]},
            "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
        },
        "trials": trials,
        "workers_per_trial": gpus,
        "gpus_per_worker": 1,
        "cpus_per_worker": 0,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder / "sweep.yaml"


def sleeping(config: dict[str, Any], settings: TrialSettings) -> None:
    """Trial whose AP grows to a limit set by the learning rate, with noise of 0.01."""
    trial = Trial(**config["trial"])
    run = storage.join(runs_folder(settings.folder), trial.id)
    storage.write_atomic(
        storage.join(run, RUN_START), json.dumps({"tracking_key": uuid.uuid4().hex}).encode()
    )  # for MLflow
    times: dict[str, Any] = {
        "process": psutil.Process().create_time(),
        "began": time.time(),
        "cpu": time.process_time(),
    }
    luck = np.random.default_rng([trial.seed, trial.index])
    most = 0.5 - 0.1 * abs(np.log10(trial.point["optimizer.lr"] / 1e-3)) + 0.01 * luck.standard_normal()
    each = float(os.environ[SECONDS]) / EVALUATIONS * luck.uniform(0.8, 1.2)
    for number in range(1, EVALUATIONS + 1):
        time.sleep(each)
        reading = TrialEvaluation(number, float(number), {"AP": float(most * (1 - 0.5**number))}, each * number)
        evaluations = (*read_progress(settings.folder, trial).evaluations, reading)
        write_progress(settings.folder, trial, TrialProgress(evaluations, each * number))
        times |= {"ended": time.time(), "memory": psutil.Process().memory_full_info().uss}
        storage.write_atomic(storage.join(settings.folder, f"times/{trial.id}.json"), json.dumps(times).encode())
        if number < EVALUATIONS:
            tune.report({"AP": reading.metrics["AP"], EVALUATION: number})
    result = {"numbers": evaluations[-1].metrics, "latency_ms": 5.0}
    storage.write_atomic(storage.join(run, RESULT), json.dumps(result).encode())


def slot_lines(times: list[dict[str, float]], slots: int) -> list[str]:
    """Idle time of slots between the first start and the last start of a trial; later, no trial is left to start."""
    begins = np.sort([trial["began"] for trial in times])
    ends = np.sort([trial["ended"] for trial in times])
    until = begins[-1]
    worked = sum(min(trial["ended"], until) - trial["began"] for trial in times)
    empty = slots * (until - begins[0]) - worked
    starting = np.array([trial["began"] - trial["process"] for trial in times])
    waits = begins[slots:] - ends[: len(begins) - slots]  # the k-th later trial takes the k-th slot that becomes free
    return [
        f"{'trials':48}{len(times):9}",
        f"{'at once':48}{slots:9}",
        f"{'a free slot waits, median':48}{np.median(waits):9.1f} s",
        f"{'  95 %':48}{np.quantile(waits, 0.95):9.1f} s",
        f"{'a process starts and imports, median':48}{np.median(starting):9.1f} s",
        f"{'CPU of a process before it trains, median':48}{np.median([trial['cpu'] for trial in times]):9.1f} s",
        f"{'memory of a process alone, median':48}{np.median([trial['memory'] for trial in times]) / 2**20:9.0f} MiB",
        f"{'slots empty':48}{100 * empty / (slots * (until - begins[0])):9.1f} % of the time",
    ]


def cpu_seconds() -> dict[str, float]:
    """CPU seconds of the driver and of Ray's own processes, which must still be running."""
    mine = psutil.Process()
    spent = {"driver": sum(mine.cpu_times()[:2])}
    for process in mine.children(recursive=True):
        try:
            name, used = process.name(), sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
        if name in ("gcs_server", "raylet"):
            spent[name] = spent.get(name, 0.0) + used
    return spent


def driver_lines(spent: dict[str, float], trials: int) -> list[str]:
    return [
        f"{f'CPU of {name}':48}{used:9.1f} s, {1000 * used / trials:.0f} ms a trial" for name, used in spent.items()
    ]


def mlflow_lines(folder: Path, times: list[dict[str, float]], ended: float) -> list[str]:
    store = f"sqlite:///{folder}/runs/mlflow.db"
    client = MlflowClient(store, registry_uri=store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    started = time.time()
    runs = client.search_runs(experiments, max_results=50_000)
    searched = time.time() - started
    closed = sum(run.info.status != "RUNNING" for run in runs)
    last = max(trial["ended"] for trial in times)
    return [
        f"{'runs in MLflow, of which closed':48}{len(runs):9} {closed}",
        f"{'MLflow lists all runs in':48}{searched:9.1f} s",
        f"{'from the last trial to the report':48}{ended - last:9.1f} s",
        f"{'size of the report':48}{(folder / 'runs/sweep/report.html').stat().st_size / 2**20:9.1f} MiB",
    ]


if __name__ == "__main__":
    main()
