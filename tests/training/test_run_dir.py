"""Names that are taken, runs that changed, drivers that died, workers that are silent."""

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Experiment
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.training_set import TrainingSet
from pipeline.training import heartbeat, run_dir
from pipeline.training.context import ResolvedData
from pipeline.training.driver_lock import DRIVER, driver_lock
from pipeline.training.preflight import Request, leaves_cpu, name_problem, refuse_what_never_fits, waiting_line
from pipeline.training.run_dir import begin_or_continue
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.training_runs import experiment


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards") / "train", synthetic_records(8))


def begin(folder: Path, setting: Experiment, shards: ShardSet, *, allow: bool = False) -> run_dir.RunStart:
    return begin_or_continue(
        str(folder / "run"),
        setting,
        ResolvedData(TrainingSet.alone(shards), None),
        tracking_key=f"key-{time.time_ns()}",
        allow_changes=allow,
    )


def test_the_same_run_continues_under_its_first_tracking_key(shards: ShardSet, tmp_path: Path) -> None:
    setting = experiment(tmp_path, {"train": shards.uri})
    first = begin(tmp_path, setting, shards)
    assert begin(tmp_path, setting, shards) == first


def test_what_changed_is_listed_and_refused_unless_allowed(shards: ShardSet, tmp_path: Path) -> None:
    first = begin(tmp_path, experiment(tmp_path, {"train": shards.uri}), shards)
    other_data = write_shards(tmp_path / "other", synthetic_records(9))
    changed = experiment(tmp_path, {"train": other_data.uri}, seed=3, optimizer={"lr": 0.5}, loss={"ddf": 0.0})
    with pytest.raises(ConfigError) as raised:
        begin(tmp_path, changed, other_data)
    for line in (
        "seed: 0 before, 3 now",
        "optimizer.lr: None before, 0.5 now",
        "loss.ddf: 1.5 before, 0.0 now",
        "data.train: other",
    ):
        assert line in str(raised.value)
    assert begin(tmp_path, changed, other_data, allow=True) == first
    assert begin(tmp_path, changed, other_data) == first  # from now on it is what the run is


def test_what_does_not_change_the_result_may_change(shards: ShardSet, tmp_path: Path) -> None:
    first = begin(tmp_path, experiment(tmp_path, {"train": shards.uri}), shards)
    moved = write_shards(tmp_path / "moved", synthetic_records(8))
    setting = experiment(tmp_path, {"train": moved.uri, "decode_in": "task"}, checkpoints={"keep": 7})
    assert begin(tmp_path, setting, moved) == first


def test_secrets_are_not_stored_and_a_run_with_them_continues(shards: ShardSet, tmp_path: Path) -> None:
    def setting(password: str, tag: str) -> Experiment:
        uri = f"postgresql://me:{password}@db/mlflow?sslpassword={password}"
        init = f"s3://KEY:{password}@bucket/weights.pth"
        tracking = {"uri": uri, "tags": {"source": f"https://host/x?token={password}", "kind": tag}}
        return experiment(tmp_path, {"train": shards.uri}, tracking=tracking, init=init)

    first = begin(tmp_path, setting("hunter2", "a"), shards)
    stored = (tmp_path / "run" / "run.json").read_text()
    assert "hunter2" not in stored
    assert "postgresql://***@db/mlflow" in stored
    assert begin(tmp_path, setting("hunter2", "a"), shards) == first
    assert begin(tmp_path, setting("changed", "b"), shards) == first  # the password of the same place
    other = setting("hunter2", "a").model_copy(update={"init": "s3://KEY:hunter2@bucket/other.pth"})
    with pytest.raises(ConfigError, match=r"init: 's3://\*\*\*@bucket/weights.pth' before") as raised:
        begin(tmp_path, other, shards)
    assert "hunter2" not in str(raised.value)


def test_a_run_whose_start_was_stored_with_a_password_continues(shards: ShardSet, tmp_path: Path) -> None:
    setting = experiment(tmp_path, {"train": shards.uri}, init="s3://KEY:word@bucket/weights.pth")
    first = begin(tmp_path, setting, shards)
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    content["experiment"]["init"] = setting.init
    path.write_text(json.dumps(content))
    assert begin(tmp_path, setting, shards) == first


def test_a_finished_run_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    setting = experiment(tmp_path, {"train": shards.uri})
    begin(tmp_path, setting, shards)
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="is finished"):
        begin(tmp_path, setting, shards)


def test_a_finished_run_that_is_continued_is_unfinished_until_its_new_end(shards: ShardSet, tmp_path: Path) -> None:
    begin(tmp_path, experiment(tmp_path, {"train": shards.uri}), shards)
    (tmp_path / "run" / "result.json").write_text("{}")
    longer = experiment(tmp_path, {"train": shards.uri}, schedule={"steps": 60})
    with pytest.raises(ConfigError, match="--allow-changes"):
        begin(tmp_path, longer, shards)
    assert run_dir.is_finished(str(tmp_path / "run"))
    begin(tmp_path, longer, shards, allow=True)
    assert not run_dir.is_finished(str(tmp_path / "run"))
    begin(tmp_path, longer, shards)  # the same command again, after a kill


def test_a_run_belongs_to_one_living_driver(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    parent = {"host": socket.gethostname(), "pid": os.getppid(), "at": time.time()}
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / DRIVER
    path.write_text(json.dumps(parent))
    with pytest.raises(ConfigError, match=f"is being trained by process {os.getppid()}"), driver_lock(run):
        pass
    for gone in ({**parent, "pid": 2**22 + 1}, {**parent, "at": time.time() - 1000}, {**parent, "host": "x", "at": 0}):
        path.write_text(json.dumps(gone))
        with driver_lock(run):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text(json.dumps({**parent, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match="on elsewhere"), driver_lock(run):
        pass


@pytest.mark.parametrize("content", [b"", b'{"host": ', b"null", b"[" * 200_000, b'{"host": 1, "pid": 2, "at": "x"}'])
def test_a_damaged_driver_file_does_not_hold_the_run(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run" / DRIVER
    path.parent.mkdir()
    path.write_bytes(content)
    with driver_lock(str(path.parent)):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b'{"experiment": {"na', b"[" * 200_000, b'{"tracking_key": "first"}', None])
def test_a_damaged_run_file_without_a_checkpoint_begins_again(
    shards: ShardSet, tmp_path: Path, content: bytes | None
) -> None:
    setting = experiment(tmp_path, {"train": shards.uri})
    path = tmp_path / "run" / run_dir.RUN_START
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    start = begin(tmp_path, setting, shards)
    assert (start.notice is None) == (content is None)
    if content == b'{"tracking_key": "first"}':
        assert start.tracking_key == "first"
    assert replace(begin(tmp_path, setting, shards), notice=start.notice) == start


def test_requests_that_never_fit_are_refused_with_every_reason() -> None:
    request = Request(least=4, most=4, gpus=1, per_worker={"CPU": 2, "GPU": 1, "lake": 1})
    nodes = [{"CPU": 4.0, "GPU": 8.0}, {"CPU": 4.0}]
    with pytest.raises(ConfigError) as raised:
        refuse_what_never_fits(request, {"CPU": 8.0, "GPU": 8.0}, nodes, decodes=True)
    assert "CPU: 4 x 2 and 1 for decoding are requested, the cluster has 8" in str(raised.value)
    assert "lake: 4 x 1 are requested, the cluster has 0" in str(raised.value)
    assert "GPU" not in str(raised.value)
    refuse_what_never_fits(Request(4, 4, 1, {"CPU": 1, "GPU": 1}), {"CPU": 8.0, "GPU": 8.0}, nodes, decodes=True)
    with pytest.raises(ConfigError, match="no node has that much"):
        refuse_what_never_fits(Request(1, 1, 0, {"CPU": 6}), {"CPU": 8.0}, nodes, decodes=False)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "spread", "fits"),
    [
        ([2.0], 2, 0.5, False, True),  # one CPU is left
        ([2.0], 3, 0.5, False, False),  # half of one
        ([1.0, 1.0], 2, 0.5, False, True),  # both workers on one node
        ([1.0, 1.0], 2, 0.5, True, False),  # half a CPU is left on each
        ([1.0, 1.0, 1.0], 2, 0.5, True, True),  # the third node is free
        ([4.0, 0.0], 3, 1.0, False, True),  # a head node without CPUs
    ],
)
def test_decode_tasks_need_a_whole_cpu_of_one_node(
    nodes: list[float], workers: int, cpus: float, spread: bool, fits: bool
) -> None:
    request = Request(workers, workers, 0, {"CPU": cpus}, spread=spread)
    resources = [{"CPU": amount} for amount in nodes]
    assert leaves_cpu(request, resources) == fits
    if not fits and sum(nodes) >= workers * cpus + 1:
        with pytest.raises(ConfigError, match=f"once {workers} workers are placed, no node has 1 left for decoding"):
            refuse_what_never_fits(request, {"CPU": sum(nodes)}, resources, decodes=True)
    refuse_what_never_fits(request, {"CPU": sum(nodes)}, resources, decodes=False)


def test_a_start_that_waits_for_nodes_is_explained() -> None:
    request = Request(2, 3, 1, {"CPU": 2, "GPU": 1})
    nodes = [{"CPU": 0.0}, {"CPU": 8.0, "GPU": 1.0}]
    line = waiting_line(request, nodes, {"CPU": 6.0}, started=True)
    assert line == (
        "waiting for 2 to 3 workers, each with 2 CPU, 1 GPU: 2 live nodes, with room for 1; free now: 6 CPU, 0 GPU"
    )
    roomy = [*nodes, {"CPU": 4.0, "GPU": 4.0}]
    assert waiting_line(request, roomy, {}, started=True) is None  # they start
    assert "with room for 3" in (waiting_line(request, roomy, {}, started=False) or "")  # something else holds the GPUs


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(heartbeat.time, "time", lambda: seconds)


@pytest.mark.parametrize(
    ("name", "address", "said"),
    [
        ("localhost", "127.0.0.1", ("host name localhost resolves to 127.0.0.1", "GLOO_SOCKET_IFNAME=lo ")),
        ("n7.invalid", "192.0.2.7", ("n7.invalid does not resolve", "GLOO_SOCKET_IFNAME=<interface of 192.0.2.7> ")),
        ("192.0.2.7", "192.0.2.7", ()),
    ],
)
def test_a_node_that_others_cannot_reach_by_its_name_is_named(name: str, address: str, said: tuple[str, ...]) -> None:
    problem = name_problem(name, address, {})
    assert (problem is None) == (not said)
    assert all(part in (problem or "") for part in said), problem
    assert name_problem(name, address, {"GLOO_SOCKET_IFNAME": "eth0"}) is None
