"""A small detector on disk, and a plain HTTP client."""

import http.client
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dfine_core import Detector, ModelConfig


def exported_detector(folder: Path, names: list[str]) -> Path:
    """Exported detector with random weights."""
    torch.manual_seed(0)
    config = ModelConfig.variant("n", num_classes=len(names), input_size=(96, 128), num_queries=12)
    weights = {name: tensor.clone() for name, tensor in Detector(config).state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "detector.json").write_text(json.dumps({"config": asdict(config), "categories": names}))
    return folder


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
