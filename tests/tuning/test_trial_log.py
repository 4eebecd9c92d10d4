"""The console of a trial is kept, on a disk and in an object store."""

import sys
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.tuning import trial_log
from pipeline.tuning.trial_log import console_to_log, log_uri
from tests.support.processes import wait_until
from tests.support.s3_server import s3_bucket


def test_a_second_start_appends(tmp_path: Path) -> None:
    uri = log_uri(str(tmp_path), "a-1")
    for text in ("first", "second"):
        with console_to_log(uri):
            print(text)
            print(text, "error", file=sys.stderr)
    assert Path(uri).read_text() == "first\nfirst error\nsecond\nsecond error\n"


def test_a_log_in_an_object_store_appears_while_the_trial_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_log, "UPLOAD_SECONDS", 0.05)
    with s3_bucket() as bucket:
        uri = log_uri(f"{bucket}/sweep", "a-1")
        with console_to_log(uri):
            print("first", flush=True)
            wait_until(lambda: storage.exists(uri) and storage.read_bytes(uri) == b"first\n")
        with console_to_log(uri):
            print("second")
        assert storage.read_bytes(uri) == b"first\nsecond\n"
