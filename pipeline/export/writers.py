"""Write a detector for PyTorch and Transformers, one function per format.

A written file is not accepted yet: `gate.py` opens it in its own runtime and compares it with the detector. The libraries
of a format are imported when it is written, because they are extras and slow to import.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from dfine_core.checkpoints.calibration_file import write_calibration
from dfine_core.checkpoints.folder import DESCRIPTION, THRESHOLDS, TRANSFORMERS_CONFIG, tensors_to_bytes
from dfine_core.checkpoints.weights import save_released
from pipeline.export.source import ExportSource


def write_torch_export(source: ExportSource, path: Path) -> None:
    """Write a program for `torch.export.load`, which needs PyTorch but not this project."""
    torch.export.save(source.program, path, extra_files={"detector.json": json.dumps(source.description)})


def write_released(source: ExportSource, path: Path) -> None:
    """Write a checkpoint in the layout of the published files."""
    save_released(source.model.detector.state_dict(), source.model.config, path)


def write_huggingface(source: ExportSource, path: Path) -> None:
    """Write a folder for Transformers; see `huggingface.py`."""
    from pipeline.export.huggingface import save_transformers

    save_transformers(source.model.config, source.model.detector.state_dict(), source.model.names, path)
    if source.model.thresholds is not None:  # Transformers keeps keys that it does not know
        content = json.loads((path / TRANSFORMERS_CONFIG).read_text())
        content[THRESHOLDS] = source.model.thresholds.to_plain()
        (path / TRANSFORMERS_CONFIG).write_text(json.dumps(content, indent=2))
    write_calibration(source.model.calibration, path)


def write_safetensors(source: ExportSource, path: Path) -> None:
    """Write a folder that `dfine_core.load` opens and another training can start from."""
    path.mkdir()
    description = {"config": asdict(source.model.config), "categories": source.description["names"]}
    (path / DESCRIPTION).write_text(json.dumps(description | source.description, indent=1))
    weights = {key: tensor.clone() for key, tensor in source.model.detector.state_dict().items()}
    (path / "model.safetensors").write_bytes(tensors_to_bytes(weights, source.model.config.activation))
    write_calibration(source.model.calibration, path)
