"""Time to list the runs of a large sweep in MLflow, each with the params, metrics and tags of a real training.

    python -m benchmarks.list_children --children 1000

`dfine compare` does this to estimate the noise of a sweep's runs.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from pipeline.config import Experiment
from pipeline.config_files import check, dump, flatten
from pipeline.tracking.client import COMMIT, DIGEST, PARENT_RUN, VERSION, connect
from pipeline.tracking.run_facts import Runs
from pipeline.tracking.settings import MAX_PARAM, mlflow_value

METRICS = 150  # names of a training of S: losses, layers, speed, system, evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--children", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{Path(folder, 'mlflow.db')}"
        parent_id = write_sweep(connect(uri), args.children)
        runs = Runs(uri, folder)
        for attempt in ("first", "second"):
            started_at, cpu_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
            children = runs.children(parent_id)
            seconds = time.perf_counter() - started_at
            cpu = resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu_before
            print(
                f"{attempt} time: {len(children)} children in {seconds:.2f} s, {cpu:.2f} s of CPU (bar: 3 s for 1,000)"
            )


def write_sweep(client: MlflowClient, children: int) -> str:
    """Create a sweep and its children; the id of the sweep."""
    experiment_id = client.create_experiment("sweep")
    parent = client.create_run(experiment_id, run_name="sweep").info.run_id
    content = {"name": "child", "storage": "runs", "data": {"train": "train", "val": "val"}, "schedule": {"epochs": 72}}
    values = flatten(dump(check(Experiment, content, source="benchmark")))
    params = [Param(key, mlflow_value(value, MAX_PARAM)) for key, value in values.items()]
    tags = [RunTag(f"{VERSION}package{number}", "1.2.3") for number in range(8)]
    tags += [RunTag(f"{DIGEST}{use}", "0123456789abcdef") for use in ("train", "val")]
    tags += [RunTag(COMMIT, "0" * 40), RunTag(PARENT_RUN, parent), RunTag("run_folder", "s3://bucket/runs/child")]
    now = int(time.time() * 1000)
    metrics = [Metric(f"group/metric_{number}", 0.5, now, 100) for number in range(METRICS)] + [
        Metric(f"final/{name}", 0.5, now, 100) for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    ]
    for number in range(children):
        run_id = client.create_run(experiment_id, run_name=f"trial-{number}").info.run_id
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
        client.log_batch(run_id, metrics=metrics, tags=tags)
        client.set_terminated(run_id)
    print(f"{children} runs with {len(params)} params, {len(metrics)} metrics and {len(tags)} tags each")
    return parent


if __name__ == "__main__":
    main()
