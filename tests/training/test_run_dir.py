"""Names that are taken, runs that changed, drivers that died; and what the driver says of silent workers."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.data.shards.manifest import ShardSet
from pipeline.training import run_dir
from pipeline.training.heartbeat import Beat, Mailbox, silent_workers
from pipeline.training.preflight import Request, refuse_what_never_fits
from pipeline.training.run_dir import begin_or_continue, claimed
from tests.support.drawn_shards import drawn_records, write_shards
from tests.support.training_runs import experiment


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards") / "train", drawn_records(8))


def begin(folder: Path, setting: Experiment, shards: ShardSet, *, allow: bool = False) -> run_dir.Began:
    return begin_or_continue(
        str(folder / "run"), setting, shards, None, tracking_key=f"key-{time.time_ns()}", allow_changes=allow
    )


def test_the_same_run_continues_under_its_first_tracking_key(shards: ShardSet, tmp_path: Path) -> None:
    setting = experiment(tmp_path, {"train": shards.uri})
    first = begin(tmp_path, setting, shards)
    assert begin(tmp_path, setting, shards) == first


def test_what_changed_is_listed_and_refused_unless_allowed(shards: ShardSet, tmp_path: Path) -> None:
    first = begin(tmp_path, experiment(tmp_path, {"train": shards.uri}), shards)
    other_data = write_shards(tmp_path / "other", drawn_records(9))
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
    moved = write_shards(tmp_path / "moved", drawn_records(8))
    setting = experiment(tmp_path, {"train": moved.uri, "decode_in": "task"}, checkpoints={"keep": 7})
    assert begin(tmp_path, setting, moved) == first


def test_a_finished_run_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    setting = experiment(tmp_path, {"train": shards.uri})
    begin(tmp_path, setting, shards)
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="is finished"):
        begin(tmp_path, setting, shards)


def test_a_run_belongs_to_one_living_driver(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    parent = {"host": socket.gethostname(), "pid": os.getppid(), "at": time.time()}
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / run_dir.DRIVER
    path.write_text(json.dumps(parent))
    with pytest.raises(ConfigError, match=f"is being trained by process {os.getppid()}"), claimed(run):
        pass
    for gone in ({**parent, "pid": 2**22 + 1}, {**parent, "at": time.time() - 1000}, {**parent, "host": "x", "at": 0}):
        path.write_text(json.dumps(gone))
        with claimed(run):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text(json.dumps({**parent, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match="on elsewhere"), claimed(run):
        pass


def test_requests_that_never_fit_are_refused_with_every_reason() -> None:
    request = Request(least=4, most=4, gpus=1, per_worker={"CPU": 2, "GPU": 1, "lake": 1})
    nodes = [{"CPU": 4.0, "GPU": 8.0}, {"CPU": 4.0}]
    with pytest.raises(ConfigError) as raised:
        refuse_what_never_fits(request, {"CPU": 8.0, "GPU": 8.0}, nodes, decodes=True)
    assert "CPU: 4 x 2 and 1 for decoding are asked for, the cluster has 8" in str(raised.value)
    assert "lake: 4 x 1 are asked for, the cluster has 0" in str(raised.value)
    assert "GPU" not in str(raised.value)
    refuse_what_never_fits(Request(4, 4, 1, {"CPU": 1, "GPU": 1}), {"CPU": 8.0, "GPU": 8.0}, nodes, decodes=True)
    with pytest.raises(ConfigError, match="no node has so much"):
        refuse_what_never_fits(Request(1, 1, 0, {"CPU": 6}), {"CPU": 8.0}, nodes, decodes=False)


def test_elastic_workers_get_a_micro_batch_that_all_their_numbers_share(tmp_path: Path) -> None:
    setting = experiment(tmp_path, {"train": "x"}, schedule={"global_batch": 24})
    assert Request(2, 4, 0, {}).micro_batch(setting) == 2  # 24 = 12 micro-batches of 2: for 2, 3 and 4 workers
    with pytest.raises(ConfigError, match="every number of workers from 2 to 5"):
        Request(2, 5, 0, {}).micro_batch(setting)
    assert Cluster(workers=(2, 4)).workers == (2, 4)


def test_a_worker_that_stays_where_it_is_is_named_once() -> None:
    mailbox = Mailbox()
    mailbox.beat(0, 13, "training")
    mailbox.beat(1, 12, "waiting for data")
    mailbox._beats[1] = Beat(12, "waiting for data", time.time() - 100)
    named: dict[int, Beat] = {}
    (line,) = silent_workers(mailbox.news(), 60, named)
    assert line.startswith("worker 1 has been waiting for data at step 12 for 100 s")
    assert "0 training at 13" in line
    assert silent_workers(mailbox.news(), 60, named) == []
    mailbox.beat(1, 13, "training")
    assert silent_workers(mailbox.news(), 60, named) == []


def test_workers_that_start_again_learn_when_those_before_were_last_heard_of() -> None:
    mailbox = Mailbox()
    assert mailbox.start() is None
    mailbox.beat(0, 13, "training")
    mailbox._beats[0] = Beat(13, "training", 1000.0)
    assert mailbox.start() == 1000.0
    assert silent_workers(mailbox.news(), 60, {}) == []  # those before are not missed


def test_news_are_told_once() -> None:
    mailbox = Mailbox()
    mailbox.say("one")
    mailbox.progress(3, "loss 1")
    news = mailbox.news()
    assert (news.said, news.step, news.note) == (("one",), 3, "loss 1")
    assert (mailbox.news().said, mailbox.news().step) == ((), None)
