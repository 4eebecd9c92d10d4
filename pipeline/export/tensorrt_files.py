"""Write the input of TensorRT's builder: portable ONNX, and the command line that builds the engine on a GPU."""

from pathlib import Path

from pipeline.export.onnx_files import portable_model
from pipeline.export.source import INPUT_NAMES, ExportNote, ExportSource

MODEL_FILE, COMMAND_FILE = "detector.onnx", "build.sh"
MOST_IMAGES = 8  # batch size that an engine of a free batch size takes at most
REMARK = "the ONNX file is checked here; an engine needs a GPU, and is neither built nor measured"


def write_tensorrt(source: ExportSource, path: Path) -> None:
    """Write the folder. Engines belong to one GPU and one version of TensorRT, so that users build them."""
    model = portable_model(source).SerializeToString()
    path.mkdir()
    (path / MODEL_FILE).write_bytes(model)
    (path / COMMAND_FILE).write_text(build_script(source.model.config.input_size, source.batch_size))
    source.notes["tensorrt"] = ExportNote({"remark": REMARK}, (REMARK,))


def build_script(input_size: tuple[int, int], batch_size: int | None) -> str:
    """Shell script that builds detector.engine beside itself, in float32."""
    height, width = input_size
    options = [f"--onnx={MODEL_FILE}", "--saveEngine=detector.engine", "--noTF32"]
    if batch_size is None:
        for name, images in (("min", 1), ("opt", 1), ("max", MOST_IMAGES)):
            shapes = (f"{images}x3x{height}x{width}", f"{images}x2")
            named = ",".join(f"{key}:{shape}" for key, shape in zip(INPUT_NAMES, shapes, strict=True))
            options.append(f"--{name}Shapes={named}")
    lines = [
        "#!/bin/sh",
        "# Build detector.engine on the GPU that will run it. TensorRT computes in TF32 by itself, hence --noTF32.",
        'cd "$(dirname "$0")" || exit',
        "trtexec " + " \\\n  ".join(options),
    ]
    return "\n".join(lines) + "\n"
