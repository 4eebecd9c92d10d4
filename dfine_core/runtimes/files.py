"""Which runtime opens which file: one line per runtime, whose module is imported when a file of it is opened."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from dfine_core.runtimes.program import OpenOptions, Program

DEFAULTS = OpenOptions()
Opener = Callable[[str, OpenOptions], Program]


class RuntimeFileError(ValueError):
    """Error of opening an exported file: it is missing or broken, or its runtime is not installed."""


@dataclass(frozen=True)
class Runtime:
    """Runtime of one kind of file."""

    name: str
    suffix: str  # ends the names of its files
    opener: str  # module:function of the type `Opener`
    extra: str | None  # name in ray-dfine[...] that installs the runtime; None: PyTorch alone


RUNTIMES = (
    Runtime("onnxruntime", ".onnx", "dfine_core.runtimes.onnx_file:open_file", "export"),
    Runtime("openvino", ".xml", "dfine_core.runtimes.openvino_file:open_file", "export"),
    Runtime("torch.export", ".pt2", "dfine_core.runtimes.torch_export_file:open_file", None),
)
PROGRAM_SUFFIXES = tuple(runtime.suffix for runtime in RUNTIMES)


def runtime_of(path: str) -> Runtime:
    """Runtime that opens a file, by its suffix.

    Raises:
        RuntimeFileError: there is none.
    """
    for runtime in RUNTIMES:
        if path.endswith(runtime.suffix):
            return runtime
    raise RuntimeFileError(f"{path}: no runtime opens it; known are {', '.join(PROGRAM_SUFFIXES)}")


def open_program(path: str | os.PathLike[str], options: OpenOptions = DEFAULTS) -> Program:
    """Open an exported file in the runtime of its suffix.

    Raises:
        RuntimeFileError: the file is missing or broken, would run code of its own, or its runtime is not installed.
    """
    source = os.fspath(path)
    runtime = runtime_of(source)
    if not os.path.exists(source):
        raise RuntimeFileError(f"{source}: there is no such file")
    try:
        return import_opener(runtime.opener)(source, options)
    except ModuleNotFoundError as error:
        needed = f'pip install "ray-dfine[{runtime.extra}]"' if runtime.extra else "install it"
        raise RuntimeFileError(f"{source}: needs {error.name}, which is not installed: {needed}") from None
    except RuntimeFileError:
        raise
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        first, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise RuntimeFileError(f"{source}: cannot be opened by {runtime.name}: {first}") from None


def import_opener(name: str) -> Opener:
    """Function of the form module:function."""
    module, _, function = name.partition(":")
    opener: Opener = getattr(import_module(module), function)
    return opener
