"""Open `.onnx` files with ONNX Runtime."""

from typing import Any

from dfine_core.runtimes.program import OpenOptions, Program, parsed_description

LOG_ERRORS_ONLY = 3


def open_file(path: str, options: OpenOptions) -> Program:
    """Open a file; on a GPU where ONNX Runtime has its provider. It computes in the precision of the file."""
    import onnxruntime  # type: ignore[import-untyped]

    preferred = ["CUDAExecutionProvider"] if options.device.startswith("cuda") else []
    providers = [name for name in preferred if name in onnxruntime.get_available_providers()] + ["CPUExecutionProvider"]
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = LOG_ERRORS_ONLY
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(path, settings, providers=providers)
    used = session.get_providers()[0]
    names = [tensor.name for tensor in session.get_inputs()]
    batch_size, _, height, width = session.get_inputs()[0].shape

    def run(images: Any, sizes: Any) -> Any:
        return session.run(None, dict(zip(names, (images, sizes), strict=True)))

    return Program(
        run=run,
        input_size=(_fixed(height), _fixed(width)),
        runtime=f"onnxruntime {onnxruntime.__version__} {used}",
        description=parsed_description(session.get_modelmeta().custom_metadata_map),
        batch_size=_fixed(batch_size),
        device=options.device if used.startswith("CUDA") else "cpu",
    )


def _fixed(dimension: int | str | None) -> int | None:
    return dimension if isinstance(dimension, int) else None
