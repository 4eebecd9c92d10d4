"""The stream inside Ray Train, which starts its workers anew for every number of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer

from pipeline.data.shards.manifest import load_shards
from pipeline.data.stream.stream import training_stream
from pipeline.ray_cluster import start_ray
from tests.support.streams import SETTINGS, planned, seen
from tests.support.synthetic_shards import synthetic_records, write_shards

pytestmark = [
    pytest.mark.slow,
    # Ray's DataContext sets fields of its own that Ray has deprecated.
    pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning:ray\.data\.context"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(num_cpus=2, dashboard=True)
    yield
    ray.shutdown()


def train_worker(config: dict[str, Any]) -> None:
    rank = get_context().get_world_rank()
    batches = training_stream(
        load_shards(config["shards"]),
        SETTINGS,
        start_step=config["start_step"],
        stop_step=config["stop_step"],
        rank=rank,
        world_size=get_context().get_world_size(),
        broadcast=broadcast_from_rank_zero,
    )
    path = Path(config["out"]) / f"{config['start_step']}-{rank}.json"
    path.write_text(json.dumps([seen(batch) for batch in batches]))


def test_two_workers_then_one_then_two_see_one_sequence(cluster: None, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(150))
    for world_size, start_step, stop_step in ((2, 0, 5), (1, 5, 13), (2, 13, 20)):
        TorchTrainer(
            train_worker,
            train_loop_config={
                "shards": shards.uri,
                "start_step": start_step,
                "stop_step": stop_step,
                "out": str(tmp_path),
            },
            scaling_config=ScalingConfig(num_workers=world_size, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(name=f"from-{start_step}", storage_path=str(tmp_path / "runs")),
        ).fit()
    files = list(tmp_path.glob("*.json"))
    assert len(files) == 5
    received = [tuple(batch) for path in files for batch in json.loads(path.read_text())]
    assert sorted(received) == planned(shards, 0, 20)
