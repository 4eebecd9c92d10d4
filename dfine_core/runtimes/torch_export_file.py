"""Open `.pt2` files with torch.export. Such a file is a program: open only files that you trust."""

import json
import os
import zipfile
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from dfine_core.runtimes.files import RuntimeFileError
from dfine_core.runtimes.program import OpenOptions, Program

TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # without it torch.export.load unpickles arbitrary objects
CODE_IN_PT2 = ("custom_obj_", "opaque_obj_", "data/aotinductor/")  # pickled objects, compiled libraries
DESCRIPTION = "detector.json"  # extra file with the metadata


def open_file(path: str, options: OpenOptions) -> Program:
    """Open a file on any device of PyTorch, in the precision of the file."""
    program, description = load_program(path)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        program = move_to_device_pass(program, str(device))
    module = program.module()
    _, _, height, width = program.example_inputs[0][0].shape

    @torch.inference_mode()
    def run(images: Any, sizes: Any) -> Any:
        outputs = module(images, sizes)
        return outputs if isinstance(outputs, tuple | list) else (outputs,)

    return Program(
        run=run,
        input_size=(height, width),
        runtime=f"torch.export {torch.__version__}",
        description=description,
        batch_size=_traced_batch_size(program),
        place=lambda array: torch.from_numpy(array).to(device),
        wait=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        device=options.device,
        parameters=sum(parameter.numel() for parameter in program.parameters()),
    )


def load_program(source: str) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Load a file and unpickle nothing but tensors; returns the program and its metadata.

    Raises:
        RuntimeFileError: the file is not a torch.export program, or would unpickle or load code.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            code = [name for name in archive.namelist() if any(part in name for part in CODE_IN_PT2)]
    except (OSError, zipfile.BadZipFile) as error:
        raise RuntimeFileError(f"{source}: not a torch.export file: {error}") from None
    if code:
        raise RuntimeFileError(
            f"{source}: contains code besides its program ({code[0]}), which is refused; export the file again without it"
        )
    before = os.environ.get(TENSORS_ONLY)
    os.environ[TENSORS_ONLY] = "1"
    extra = {DESCRIPTION: ""}
    try:
        program = torch.export.load(source, extra_files=extra)
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        raise RuntimeFileError(f"{source}: cannot be opened by torch.export: {error}") from None
    finally:
        os.environ.pop(TENSORS_ONLY)
        os.environ.update({} if before is None else {TENSORS_ONLY: before})
    return program, json.loads(extra[DESCRIPTION] or "{}")


def _traced_batch_size(program: torch.export.ExportedProgram) -> int | None:
    """First dimension of the first input; None if it is a symbol, so that any batch size is accepted."""
    (first, *_) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == first)
    size = node.meta["val"].shape[0]
    return size if isinstance(size, int) else None
