"""The main jobs on three machines, submitted from outside; run by `make test-cluster`."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.tracking import MlflowClient
from safetensors.torch import load
from torch import Tensor

from pipeline import storage
from pipeline.training import checkpoint
from tests.cluster.nodes import OUTSIDE, Nodes, cluster
from tests.support.processes import wait_until

pytestmark = [
    pytest.mark.skipif(
        "DFINE_TEST_CLUSTER" not in os.environ, reason="needs root and namespaces of its own: make test-cluster"
    ),
    pytest.mark.timeout(900),
]
BUCKET, STEPS = "s3://bucket", 40
EXPERIMENT = {
    "storage": f"{BUCKET}/runs",
    "data": {"train": f"{BUCKET}/shards", "val": f"{BUCKET}/shards"},
    "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
    "schedule": {"steps": STEPS, "global_batch_size": 6, "no_aug_epochs": 0, "micro_batch_size": 2},
    "evaluation": {"every_steps": 1000, "num_images": 1},
    "checkpoints": {"every_steps": 4},
    "tracking": {"every_steps": 1},
}
WORKERS = {"gpus_per_worker": 0, "cpus_per_worker": 0.5, "threads_per_worker": 1, "placement": "SPREAD"}
SWEEP = {
    "experiment": "experiment.yaml",
    "name": "sweep",
    "storage": f"{BUCKET}/sweeps",
    "set": {"schedule.steps": 8, "evaluation.every_steps": 4},
    "space": {"loss.ddf": {"grid": [1.0, 2.0]}},
    "searcher": {"kind": "grid"},
    "max_concurrent_trials": 2,
    "cpus_per_worker": 0.9,
    "replicates": 0,
    "confirm": {"top": 0},
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        files: dict[str, Any] = {"experiment": EXPERIMENT, "sweep": SWEEP}
        files |= {f"workers-{count}": {"workers": count, **WORKERS} for count in (1, 2, 3)}
        files["one-per-node"] = {"workers": 2, **WORKERS, "cpus_per_worker": 2}
        for name, content in files.items():
            (nodes.working_dir / f"{name}.yaml").write_text(yaml.safe_dump(content))
        yield nodes


@pytest.fixture(scope="module")
def shards(nodes: Nodes) -> str:
    """Shard set that a job has prepared."""
    arguments = ["--images", "48", "--image-side", "64", "--max-shapes", "3", "--split", "drawn"]
    nodes.submit("jobs.prepare", "synthetic", *arguments, "--out", f"{BUCKET}/shards")
    return f"{BUCKET}/shards"


@pytest.fixture(scope="module")
def trained(nodes: Nodes, shards: str) -> str:
    """Run of two workers, on two nodes, that nothing disturbs."""
    _, seen = nodes.submit(*training("two", 2))
    assert seen == {1, 2}  # and none on the head
    return f"{BUCKET}/runs/two"


def training(name: str, workers: int) -> list[str]:
    return ["jobs.train", "experiment.yaml", "--cluster", f"workers-{workers}.yaml", "--name", name]


def losses(name: str) -> list[tuple[int, float]]:
    """Every loss that the MLflow server has of a run, in the order of steps."""
    run_id, client = mlflow_run(name).info.run_id, MlflowClient(f"http://{OUTSIDE}:5000")
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, "train/loss"))


def mlflow_run(name: str) -> Any:
    client = MlflowClient(f"http://{OUTSIDE}:5000")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    return run


def tensors(name: str) -> dict[str, Tensor]:
    """Everything that the last checkpoint of a run holds."""
    folder = storage.join(BUCKET, "runs", name, "checkpoints", checkpoint.step_folder(STEPS))
    files = {file: load(storage.read_bytes(storage.join(folder, f"{file}.safetensors"))) for file in checkpoint.FILES}
    return {f"{file}/{key}": value for file, content in files.items() for key, value in content.items()}


def reached(name: str, step: int) -> bool:
    return any(known >= step for known in checkpoint.steps_in(storage.join(BUCKET, "runs", name, "checkpoints")))


def assert_equal_to_the_bit(name: str, other: str) -> None:
    first, second = tensors(name), tensors(other)
    assert len(first) > 500
    assert first.keys() == second.keys()
    assert [key for key in first if not first[key].equal(second[key])] == []
    assert losses(name) == losses(other)


def test_one_and_three_workers_train_what_two_train(nodes: Nodes, trained: str) -> None:
    nodes.submit(*training("one", 1))
    _, seen = nodes.submit(*training("three", 3))
    assert seen == {1, 2}
    expected = losses("two")
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    for name in ("one", "three"):
        # Sums in another order differ in the last bits, and each step carries the difference on.
        assert losses(name)[:8] == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected[:8]]
        assert losses(name) == [(step, pytest.approx(loss, rel=0.05)) for step, loss in expected]


def test_an_evaluation_finds_the_numbers_of_the_training(nodes: Nodes, trained: str, shards: str) -> None:
    nodes.submit("jobs.evaluate", trained, shards, "--out", f"{BUCKET}/report", "--num-images", "1")
    found = storage.read_json(f"{BUCKET}/report/report.json")
    expected = storage.read_json(f"{trained}/result.json")["numbers"]
    assert found["numbers"]["AP"] == pytest.approx(expected["AP"], abs=1e-4)


def test_a_prediction_is_shared_by_the_nodes(nodes: Nodes, trained: str, shards: str) -> None:
    out = f"{BUCKET}/found"
    arguments = ["--workers", "2", "--part-size", "8", "--threshold", "0", "--num-images", "2"]
    _, seen = nodes.submit("jobs.predict", trained, shards, "--out", out, *arguments, watch="ray::PartWriter")
    assert seen == {1, 2}
    parts = [storage.join(out, "parts", name) for name in storage.names(storage.join(out, "parts"))]
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(part))) for part in parts]
    assert sum(table.num_rows for table in tables) == 48
    assert len(tables) == 6


def test_two_trials_run_on_two_nodes(nodes: Nodes, shards: str) -> None:
    output, seen = nodes.submit("jobs.tune", "sweep.yaml")
    assert seen == {1, 2}
    folder = f"{BUCKET}/sweeps/sweep"
    logs = storage.sizes(f"{folder}/logs")
    assert len(logs) == 2, output[-4000:]
    for name in logs:
        assert b"8/8, 100%" in storage.read_bytes(f"{folder}/logs/{name}")
    assert storage.exists(f"{folder}/report.html")


def test_a_lost_node_is_waited_for_and_costs_nothing(nodes: Nodes, trained: str) -> None:
    """A node dies, no other has room for its worker, and a third machine takes its place."""
    job = nodes.begin("jobs.train", "experiment.yaml", "--cluster", "one-per-node.yaml", "--name", "node-lost")
    wait_until(lambda: reached("node-lost", 8), 300)
    assert not reached("node-lost", STEPS)
    nodes.kill(2)
    job.wait_for("waiting for 2 workers, each with 2 CPU: 2 live nodes, with room for 1")  # the head is the second
    nodes.join(3)
    wait_until(lambda: nodes.with_process("RayTrainWorker") == {1, 3}, 200)
    assert job.process.wait(timeout=400) == 0, job.output()[-6000:]
    assert re.search(r"continuing at step \d+", job.output())
    assert_equal_to_the_bit("node-lost", "two")


def test_a_stopped_job_is_recorded_as_killed(nodes: Nodes, shards: str) -> None:
    job = nodes.begin(*training("stopped", 1))
    wait_until(lambda: reached("stopped", 4), 300)
    nodes.stop(job)
    job.process.wait(timeout=120)
    wait_until(lambda: mlflow_run("stopped").info.status == "KILLED", 60)


def test_a_job_needs_no_path_of_the_machine_that_submits(nodes: Nodes, trained: str) -> None:
    """Nothing of the nodes' disks, nor of this one, stands in what others will read."""
    for name in ("run.json", "result.json"):
        content = storage.read_bytes(f"{trained}/{name}").decode()
        assert str(Path.home()) not in content
        assert "/mnt/" not in content
