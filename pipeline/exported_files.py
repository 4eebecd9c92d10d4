"""Open exported `.onnx` and `.pt2` files in their own runtimes, for the export gate and for benchmarks."""

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

EXPORTED_SUFFIXES = (".onnx", ".pt2")
TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # without it torch.export.load unpickles arbitrary objects
CODE_IN_PT2 = ("custom_obj_", "opaque_obj_", "data/aotinductor/")  # pickled objects, compiled libraries
LOG_ERRORS_ONLY = 3  # log level of onnxruntime


@dataclass(frozen=True)
class ExportedFile:
    """Exported detector in its runtime."""

    # Maps images [B, 3, H, W] float32 in 0..1 and sizes [B, 2] int64 to the runtime's own outputs: labels, boxes, scores.
    run: Callable[[Tensor, Tensor], Any]
    input_size: tuple[int, int]  # height, width
    device: torch.device  # device of the inputs
    compute_device: torch.device  # differs for ONNX on a GPU, whose inputs stay in main memory
    runtime: str
    batch_size: int | None = None  # the only accepted one; None: any
    parameters: int | None = None


def open_exported(path: str | Path, device: torch.device) -> ExportedFile:
    """Open an exported file; its suffix decides on the runtime.

    Raises:
        ConfigError: the file is missing or broken, would run code of its own, or its runtime is not installed.
    """
    source = str(path)
    if not Path(source).is_file():
        raise ConfigError(f"{source}: there is no such file")
    return _open_onnx(source, device) if source.endswith(".onnx") else _open_torch_export(source, device)


def _open_onnx(source: str, device: torch.device) -> ExportedFile:
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(f"{source}: needs onnxruntime; install the extra `export`") from None
    preferred = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [name for name in preferred if name in onnxruntime.get_available_providers()] + ["CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = LOG_ERRORS_ONLY
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        raise ConfigError(f"{source}: cannot be opened by onnxruntime: {error}") from None
    used = session.get_providers()[0]
    batch_size, _, height, width = session.get_inputs()[0].shape
    names = [tensor.name for tensor in session.get_inputs()]

    def run(images: Tensor, sizes: Tensor) -> Any:
        return session.run(None, dict(zip(names, (images.numpy(), sizes.numpy()), strict=True)))

    return ExportedFile(
        run=run,
        input_size=(height, width),
        device=torch.device("cpu"),
        compute_device=device if used.startswith("CUDA") else torch.device("cpu"),
        runtime=f"onnxruntime {onnxruntime.__version__} {used}",
        batch_size=batch_size if isinstance(batch_size, int) else None,
    )


def _open_torch_export(source: str, device: torch.device) -> ExportedFile:
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
        compute_device=device,
        runtime=f"torch.export {torch.__version__}",
        batch_size=example.shape[0] if isinstance(_traced_batch_size(program), int) else None,
        parameters=sum(parameter.numel() for parameter in program.parameters()),
    )


def load_program(source: str) -> torch.export.ExportedProgram:
    """Load a `.pt2` file and unpickle nothing but tensors. It is still a program: open only files that you trust.

    Raises:
        ConfigError: the file is not a torch.export program, or would unpickle or load code.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            code = [name for name in archive.namelist() if any(part in name for part in CODE_IN_PT2)]
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{source}: not a torch.export file: {error}") from None
    if code:
        raise ConfigError(
            f"{source}: contains code besides its program ({code[0]}), which is refused; export the file again without it"
        )
    before = os.environ.get(TENSORS_ONLY)
    os.environ[TENSORS_ONLY] = "1"
    try:
        return torch.export.load(source)
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        raise ConfigError(f"{source}: cannot be opened by torch.export: {error}") from None
    finally:
        os.environ.pop(TENSORS_ONLY)
        os.environ.update({} if before is None else {TENSORS_ONLY: before})


def _traced_batch_size(program: torch.export.ExportedProgram) -> Any:
    """First dimension of the first input: a number, or a symbol if any batch size is accepted."""
    (first, *_) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == first)
    return node.meta["val"].shape[0]
