"""Where a stream runs: each group's reads and its coordinator on the node of its workers."""

import json
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.stream.groups import GROUP_WORKERS, groups_of
from tests.support.streams import planned
from tests.support.synthetic_shards import synthetic_records, write_shards

# Two workers on two nodes, beside a head without CPUs that is not for work.
SCRIPT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import ray
from ray.cluster_utils import Cluster

from pipeline.data.shards.manifest import load_shards
from pipeline.data.stream import ray_executions
from pipeline.data.stream.stream import training_stream
from tests.support.streams import SETTINGS, seen

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8})
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=10**8)
ray.init(cluster.address)
cluster.wait_for_nodes()
head = ray.get_runtime_context().get_node_id()
nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU"))
assert len(nodes) == 2 and head not in nodes

read = ray_executions.read_window
coordinators, values, met = [], [None], Barrier(2)


def split(dataset, count, node, split_on_node=ray_executions.split_on_node):
    splits = split_on_node(dataset, count, node)
    here = splits[0]._coord_actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    coordinators.append((node, ray.get(here)))
    return splits


def read_window(item, **kwargs):
    with open(f"{folder}/reads", "a") as file:
        print(ray.get_runtime_context().get_node_id(), file=file)
    yield from read(item, **kwargs)


folder = sys.argv[2]
ray_executions.read_window = read_window
ray_executions.split_on_node = split
ray_executions.nodes_of_workers = lambda world_size: nodes


def worker(rank):
    def broadcast(value):
        if rank == 0:
            values[0] = value
        met.wait()
        received = values[0]
        met.wait()
        return received

    batches = training_stream(
        load_shards(sys.argv[1]), SETTINGS, start_step=0, stop_step=16, rank=rank, world_size=2, broadcast=broadcast
    )
    return [seen(batch) for batch in batches]


with ThreadPoolExecutor(2) as pool:
    seen_by = list(pool.map(worker, range(2)))
reads = open(f"{folder}/reads").read().split()
print(json.dumps({"seen": seen_by, "nodes": nodes, "coordinators": coordinators, "reads": reads}))
"""


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), min_size=1))
def test_groups_are_runs_of_workers_on_one_node(runs: list[tuple[str, int]]) -> None:
    nodes = [node for node, count in runs for _ in range(count)]
    groups = list(groups_of(nodes))
    assert list(chain.from_iterable(groups)) == list(range(len(nodes)))
    for group in groups:
        assert 1 <= len(group) <= GROUP_WORKERS
        assert len({nodes[rank] for rank in group}) == 1
    for before, after in pairwise(groups):
        assert len(before) == GROUP_WORKERS or nodes[before[0]] != nodes[after[0]]


def test_reads_and_coordinators_run_on_the_nodes_of_their_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(150))
    command = [sys.executable, "-c", SCRIPT, shards.uri, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [[list(batch) for batch in planned(shards, 0, 16)[rank::2]] for rank in range(2)]
    assert found["seen"] == expected
    assert found["coordinators"] == [[node, node] for node in found["nodes"]]
    assert set(found["reads"]) == set(found["nodes"])
