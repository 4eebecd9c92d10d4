"""MLflow's pages: the address that shows a run, and a server for a database on this machine."""

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import UserError
from pipeline.redaction import redact

HOST = "127.0.0.1"
PORT = 5000  # the next free one from here on
START_SECONDS = 60.0
# MLflow 3 opens every page in its view for language models, unless the address asks for the other one or the user has chosen it.
VIEW = "workflowType=machine_learning"


class UiError(UserError, RuntimeError):
    """MLflow's pages cannot be served."""


def run_address(server: str, experiment_id: str, run_id: str) -> str:
    """Address of the charts of a run.

    Args:
        server: http://HOST:PORT.
    """
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}/model-metrics?{VIEW}"


@contextmanager
def serve_database(uri: str) -> Iterator[str]:
    """Serve the pages of a database to this machine alone while the block runs; yields the server's address.

    Raises:
        UiError: the server did not start; the message has the command to run by hand.
    """
    port = _free_port()
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
    command += ["--workers", "1"]
    server = subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # eight processes for language models
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(address, server, shlex.join(command))
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, server: "subprocess.Popen[bytes]", command: str) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if (code := server.poll()) is not None:
            raise UiError(f"`{redact(command)}` ended with exit code {code}: run it by hand to see why")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UiError(f"MLflow's server did not answer at {address} within {START_SECONDS:.0f} s")


def _free_port() -> int:
    for port in range(PORT, PORT + 100):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UiError(f"no port from {PORT} to {PORT + 99} is free on {HOST}")
