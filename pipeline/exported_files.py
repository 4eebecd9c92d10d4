"""Exported `.onnx` and `.pt2` files, opened in their own runtimes: for the gate of an export, and for benchmarks."""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from pipeline.config import ConfigError

SUFFIXES = (".onnx", ".pt2")
TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.export.load unpickles whatever there is otherwise
CODE_IN_PT2 = ("custom_obj_", "opaque_obj_", "data/aotinductor/")  # pickled objects, compiled libraries
ERRORS_ALONE = 3  # onnxruntime's log level


@dataclass(frozen=True)
class ExportedFile:
    """An exported detector in its runtime."""

    # Images [B, 3, H, W] float32 in 0..1 and sizes [B, 2] int64 to the runtime's own outputs: labels, boxes, scores.
    run: Callable[[Tensor, Tensor], Any]
    input_size: tuple[int, int]  # height, width
    device: torch.device  # that inputs lie on
    computes_on: torch.device
    runtime: str
    batch: int | None = None  # the only size that it takes; None: any
    parameters: int | None = None


def open_exported(path: str | Path, device: torch.device) -> ExportedFile:
    """Open a file by its suffix.

    Raises:
        ConfigError: it is missing or broken, its runtime is not installed, or it would run code of its own.
    """
    source = str(path)
    if not Path(source).is_file():
        raise ConfigError(f"{source}: there is no such file")
    return _onnx(source, device) if source.endswith(".onnx") else _torch_export(source, device)


def _onnx(source: str, device: torch.device) -> ExportedFile:
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(f"{source}: needs onnxruntime; install the extra `export`") from None
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()] + ["CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ALONE
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # on a broken file the reader fails in arbitrary ways
        raise ConfigError(f"{source}: cannot be opened by onnxruntime: {error}") from None
    used = session.get_providers()[0]
    batch, _, height, width = session.get_inputs()[0].shape
    names = [given.name for given in session.get_inputs()]

    def run(images: Tensor, sizes: Tensor) -> Any:
        return session.run(None, dict(zip(names, (images.numpy(), sizes.numpy()), strict=True)))

    return ExportedFile(
        run=run,
        input_size=(height, width),
        device=torch.device("cpu"),
        computes_on=device if used.startswith("CUDA") else torch.device("cpu"),
        runtime=f"onnxruntime {onnxruntime.__version__} {used}",
        batch=batch if isinstance(batch, int) else None,
    )


def _torch_export(source: str, device: torch.device) -> ExportedFile:
    program = load_program(source)
    if device.type == "cuda":
        program = move_to_device_pass(program, str(device))
    module = program.module()
    example: Tensor = program.example_inputs[0][0]

    @torch.inference_mode()
    def run(images: Tensor, sizes: Tensor) -> Any:
        return module(images, sizes)

    return ExportedFile(
        run=run,
        input_size=(example.shape[2], example.shape[3]),
        device=device,
        computes_on=device,
        runtime=f"torch.export {torch.__version__}",
        batch=example.shape[0] if isinstance(_traced_batch(program), int) else None,
        parameters=sum(parameter.numel() for parameter in program.parameters()),
    )


def load_program(source: str) -> torch.export.ExportedProgram:
    """Load a `.pt2` file, unpickling nothing but tensors. It remains a program: open those that you trust.

    Raises:
        ConfigError: it is none, or would unpickle or load code.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            code = [name for name in archive.namelist() if any(part in name for part in CODE_IN_PT2)]
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{source}: not a file of torch.export: {error}") from None
    if code:
        raise ConfigError(f"{source}: holds code beside its program ({code[0]}), which is never run here")
    before = os.environ.get(TENSORS_ONLY)
    os.environ[TENSORS_ONLY] = "1"
    try:
        return torch.export.load(source)
    except Exception as error:  # on a broken file the reader fails in arbitrary ways
        raise ConfigError(f"{source}: cannot be opened by torch.export: {error}") from None
    finally:
        os.environ.pop(TENSORS_ONLY)
        os.environ.update({} if before is None else {TENSORS_ONLY: before})


def _traced_batch(program: torch.export.ExportedProgram) -> Any:
    """The first size of the first input: a number, or a symbol where it may be any."""
    (first, *_) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == first)
    return node.meta["val"].shape[0]
