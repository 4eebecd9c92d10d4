"""Console output of each trial in a file of its own, in the sweep's folder; output of many trials at once is unreadable."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline import storage

UPLOAD_SECONDS = 30.0  # a log for an object store is uploaded again so often, if it has grown


def log_uri(folder: str, trial_id: str) -> str:
    """Path or URI of a trial's log.

    Args:
        folder: of the sweep.
    """
    return storage.join(folder, "logs", f"{trial_id}.log")


@contextlib.contextmanager
def console_to_log(uri: str) -> Iterator[None]:
    """Append the console output of the block to a log, on a disk or in an object store."""
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(_uploaded(uri)) if "://" in uri else Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        yield


@contextlib.contextmanager
def _uploaded(uri: str) -> Iterator[Path]:
    """A local copy of an object, which is uploaded while the block runs and at its end."""
    with tempfile.TemporaryDirectory(prefix="trial-log-") as folder:
        path = Path(folder, "log")
        path.write_bytes(storage.read_bytes(uri) if storage.exists(uri) else b"")
        stopped = threading.Event()

        def upload() -> None:
            uploaded, last = -1, False
            while not last:
                last = stopped.wait(UPLOAD_SECONDS)
                if os.path.getsize(path) == uploaded:
                    continue
                content = path.read_bytes()
                with contextlib.suppress(OSError):  # a trial does not fail for its log; the next upload has all of it
                    storage.write_atomic(uri, content)
                    uploaded = len(content)

        thread = threading.Thread(target=upload, daemon=True, name="trial log")
        thread.start()
        try:
            yield path
        finally:
            stopped.set()
            thread.join()
