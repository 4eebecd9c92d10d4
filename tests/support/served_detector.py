"""A small detector on disk, a server as the command starts it, and a plain HTTP client."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dfine_core import Detector, ModelConfig
from tests.support.processes import free_port, wait_for


def exported_detector(folder: Path, names: list[str]) -> Path:
    """Exported detector with random weights."""
    torch.manual_seed(0)
    config = ModelConfig.variant("n", num_classes=len(names), input_size=(96, 128), num_queries=12)
    weights = {name: tensor.clone() for name, tensor in Detector(config).state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "detector.json").write_text(json.dumps({"config": asdict(config), "categories": names}))
    return folder


@contextmanager
def served_by_command(log: Path, source: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Port and process id of `dfine serve`, with a Ray of its own; its end is checked, too."""
    port = free_port()
    command = [sys.executable, "-m", "jobs.serve", str(source), "--port", str(port), *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, text=True)
    try:
        wait_for(lambda: "serving at" in log.read_text(), server, log)
        yield port, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    assert code == 0, log.read_text()
    assert log.read_text().rstrip().endswith("stopping")


def request(
    port: int, path: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Send a request; returns status, headers with lower-case names, and content (parsed if it is JSON)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, named)
        response = connection.getresponse()
        content = response.read()
        response_headers = {name.lower(): value for name, value in response.getheaders()}
        is_json = response_headers.get("content-type") == "application/json"
        return response.status, response_headers, json.loads(content) if is_json else content.decode()
    finally:
        connection.close()
