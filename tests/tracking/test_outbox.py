"""The outbox without a server: order, processes that die or log at once, and paths that lead out of it."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.tracking.outbox import DATABASE, ORPHAN_SECONDS, Event, Lane, Outbox, OutboxError

ROOT = Path(__file__).parents[2]

# Logs events of its own until it is killed.
LOGGING = """
import sys
from pathlib import Path
from pipeline.tracking.outbox import Lane, Outbox

outbox = Outbox(Path(sys.argv[1]), None)
for number in range(100_000):
    outbox.append({"kind": "metrics", "from": sys.argv[2], "number": number}, lane=Lane.RECORDS)
    print(number, flush=True)
"""


def record(number: int) -> Event:
    return {"kind": "metrics", "number": number}


def numbers(outbox: Outbox) -> list[int]:
    return [event["number"] for _, event in outbox.next_events(1000)]


def deliver(outbox: Outbox, count: int) -> list[Event]:
    taken = outbox.next_events(count)
    outbox.remove([number for number, _ in taken], [event for _, event in taken])
    return [event for _, event in taken]


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.text(max_size=5)),
    st.tuples(st.just("deliver"), st.integers(1, 3)),
    st.tuples(st.just("reopen"), st.none()),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPERATIONS, max_size=12))
def test_events_come_back_once_and_in_order_however_often_it_is_reopened(
    tmp_path: Path, operations: list[tuple[str, Any]]
) -> None:
    shutil.rmtree(tmp_path / "outbox", ignore_errors=True)
    outbox = Outbox(tmp_path / "outbox", "key")
    written: list[str] = []
    taken: list[str] = []
    for kind, value in operations:
        if kind == "append":
            outbox.append({"kind": "metrics", "text": value}, lane=Lane.RECORDS)
            written.append(value)
        elif kind == "deliver":
            taken += [event["text"] for event in deliver(outbox, value)]
        else:
            outbox = Outbox(tmp_path / "outbox", None)
        assert outbox.pending().events == len(written) - len(taken)
    assert taken + [event["text"] for _, event in outbox.next_events(100)] == written


def test_two_processes_log_at_once_and_a_kill_loses_nothing_that_was_logged(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LOGGING, str(tmp_path), name], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    for child in children:
        assert child.stdout is not None
        while int(child.stdout.readline()) < 15:
            pass
    logged = {}
    for name, child in zip(("a", "b"), children, strict=True):
        child.kill()
        output, _ = child.communicate()
        logged[name] = int((["15", *output.split()])[-1]) + 1
    outbox = Outbox(tmp_path, None)
    for name, count in logged.items():
        found = [event["number"] for _, event in outbox.next_events(10**6) if event["from"] == name]
        assert found == list(range(len(found)))
        assert len(found) in (count, count + 1), "printed after it was logged"


def test_artifacts_wait_for_earlier_records_and_delay_no_later_ones_and_finished_comes_last(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "key")
    outbox.append(record(1), lane=Lane.RECORDS)
    outbox.append({"kind": "artifact", "number": 2}, lane=Lane.ARTIFACTS)
    outbox.append(record(3), lane=Lane.RECORDS)
    outbox.finish({"kind": "finish", "status": "FINISHED", "number": 4})
    outbox.append(record(5), lane=Lane.RECORDS)  # of a process that goes on
    assert numbers(outbox) == [1, 3, 2, 4]
    assert [event["number"] for event in deliver(outbox, 1000)] == [1, 3, 2, 4]
    assert numbers(outbox) == [5]


def test_killed_does_not_wait_for_artifacts(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "key")
    outbox.append({"kind": "artifact", "number": 1}, lane=Lane.ARTIFACTS)
    outbox.finish({"kind": "finish", "status": "KILLED", "number": 2})
    assert numbers(outbox) == [2, 1]


def test_a_finished_run_is_not_killed_by_what_stops_its_processes_later(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "key")
    outbox.begin({"kind": "begin"})
    for status in ("FINISHED", "KILLED", "FAILED"):
        outbox.finish({"kind": "finish", "status": status})
    outbox.begin({"kind": "begin"})
    outbox.finish({"kind": "finish", "status": "KILLED"})
    kinds = [(event["kind"], event.get("status")) for event in deliver(outbox, 100) + deliver(outbox, 100)]
    assert kinds == [("begin", None), ("finish", "FINISHED"), ("running", None), ("finish", "KILLED")]


def test_events_with_a_key_are_logged_once_even_after_their_delivery(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "key")
    for _ in range(2):
        stored = outbox.store_content(b"pixels", "image.png")
        outbox.append({"kind": "artifact", **stored}, lane=Lane.ARTIFACTS, once="image/7")
        assert outbox.is_logged("image/7")
        assert len(list(outbox.files.iterdir())) == 1
    deliver(outbox, 100)
    outbox.append({"kind": "artifact"}, lane=Lane.ARTIFACTS, once="image/7")
    assert outbox.pending().events == 0


def test_delivered_events_leave_the_disk(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "key")
    empty = (tmp_path / DATABASE).stat().st_size
    outbox.append(*[{"kind": "metrics", "text": "x" * 1000} for _ in range(500)], lane=Lane.RECORDS)
    outbox.append({"kind": "artifact", **outbox.store_content(b"x", "a.txt")}, lane=Lane.ARTIFACTS)
    assert (tmp_path / DATABASE).stat().st_size > empty + 500_000
    assert outbox.pending().counts == {"metrics": 500, "artifacts": 1}
    deliver(outbox, 1000)
    assert (tmp_path / DATABASE).stat().st_size == empty
    assert list(outbox.files.iterdir()) == []


def test_content_that_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "key")
    outbox.append({"kind": "artifact", **outbox.store_content(b"pending", "a.txt")}, lane=Lane.ARTIFACTS)
    old = outbox.content_of(outbox.store_content(b"old", "b.txt")).parent
    young = outbox.content_of(outbox.store_content(b"young", "c.txt")).parent
    for folder in set(outbox.files.iterdir()) - {young}:
        os.utime(folder, (0, time.time() - ORPHAN_SECONDS - 1))
    outbox.remove_orphans()
    assert young.exists()
    assert not old.exists()
    ((_, pending),) = outbox.next_events(10)
    assert outbox.content_of(pending).read_bytes() == b"pending"


@pytest.mark.parametrize(
    "file",
    [
        "../../precious/file",
        "/etc/passwd",
        "precious",
        ".",
        "a/../../precious",
        "a/b/c",
        "linked/file",
        "folder/linked",
    ],
)
def test_a_path_that_leads_out_of_the_outbox_is_neither_read_nor_removed(tmp_path: Path, file: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    outbox = Outbox(tmp_path / "run" / "tracking", "key")
    (outbox.files / "linked").symlink_to(precious)
    (outbox.files / "folder").mkdir()
    (outbox.files / "folder" / "linked").symlink_to(precious / "file")
    event = {"kind": "artifact", "file": file}
    with pytest.raises(OutboxError, match="does not lie in"):
        outbox.content_of(event)
    with pytest.raises(OutboxError):
        outbox.remove([1], [event])
    assert (precious / "file").read_text() == "mine"
    assert outbox.files.exists()


def test_a_link_deep_inside_content_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    outbox = Outbox(tmp_path / "outbox", "key")
    (tmp_path / "model" / "inner").mkdir(parents=True)
    stored = outbox.store_content(tmp_path / "model", "model")
    assert outbox.content_of(stored).is_dir()
    (outbox.files / stored["file"] / "inner" / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(OutboxError):
        outbox.content_of(stored)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    Outbox(tmp_path, "one")
    with pytest.raises(OutboxError, match="run_key one, not two"):
        Outbox(tmp_path, "two")
    assert Outbox(tmp_path, None).run_key == "one"


def test_a_damaged_outbox_is_named(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database, but long enough to be read as the header of one" * 20)
    with pytest.raises(OutboxError, match=f"{DATABASE} is damaged"):
        Outbox(tmp_path, None)


def test_a_disk_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox", "key")
    shutil.rmtree(tmp_path / "outbox")
    with pytest.raises(OSError, match=DATABASE):
        outbox.append(record(1), lane=Lane.RECORDS)


def test_an_unreadable_event_is_read_as_such(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "key")
    with sqlite3.connect(tmp_path / DATABASE) as database:
        for body in ("{torn", json.dumps([1])):
            database.execute("insert into events (lane, kind, bytes, body) values (0, 'metrics', 0, ?)", (body,))
    assert [event for _, event in outbox.next_events(10)] == [{"kind": "unreadable"}] * 2
