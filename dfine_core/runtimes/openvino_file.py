"""Open OpenVINO's `.xml` files, and `.onnx` files with OpenVINO.

As it comes, OpenVINO computes in bfloat16 on CPUs that multiply it. INFERENCE_PRECISION_HINT=f32 keeps to float32.
"""

from typing import Any

from dfine_core.runtimes.program import DEFAULT, OpenOptions, Program, parsed_description

METADATA = "model_info"  # where OpenVINO's tools keep the facts of a model


def open_file(path: str, options: OpenOptions) -> Program:
    """Open a file on the CPU."""
    import openvino  # type: ignore[import-untyped]

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if options.precision != DEFAULT:
        settings["INFERENCE_PRECISION_HINT"] = options.precision
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    batch_size, _, height, width = compiled.inputs[0].get_partial_shape()
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    request = compiled.create_infer_request()

    def run(images: Any, sizes: Any) -> Any:
        found = request.infer([images, sizes])
        return [found[output] for output in compiled.outputs]

    return Program(
        run=run,
        input_size=(_fixed(height), _fixed(width)),
        runtime=f"openvino {openvino.__version__.split('-')[0]} {used}",
        description=_description(core, path),
        batch_size=_fixed(batch_size),
    )


def _fixed(dimension: Any) -> int | None:
    return dimension.get_length() if dimension.is_static else None


def _description(core: Any, path: str) -> dict[str, Any]:
    model = core.read_model(path)
    if not model.has_rt_info([METADATA]):
        return {}
    stored = model.get_rt_info([METADATA]).astype(dict)
    return parsed_description({key: value.astype(str) for key, value in stored.items()})
