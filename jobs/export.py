"""Export a detector to other formats, and compare every file with it in its own runtime.

    dfine export runs/mine --to onnx --out exported --check shards/mine/val
    dfine export models:/shapes@champion --to onnx onnx-fp16 huggingface --out exported --input-size 512
    dfine export dfine_s_coco.pth --to onnx torch-export --out exported --images-from photos

    onnx           detector.onnx           images to detections, for ONNX Runtime
    onnx-portable  detector-portable.onnx  the same in opset 17 with common operators alone, for any runtime
    onnx-fp16      detector-fp16.onnx      the same in half precision, inputs and outputs in single precision
    onnx-int8      detector-int8.onnx      the same with backbone and encoder in 8-bit integers
    openvino       openvino/               OpenVINO's detector.xml and detector.bin
    openvino-fp16  openvino-fp16/          the same with weights in half precision
    openvino-int8  openvino-int8/          the same with backbone and encoder in 8-bit integers
    tensorrt       tensorrt/               portable ONNX with the command line of TensorRT's builder
    torch-export   detector.pt2            for torch.export.load, without this project
    released       detector.pth            the layout of the published files
    huggingface    huggingface/            for Transformers: DFineForObjectDetection and AutoImageProcessor
    safetensors    safetensors/            for dfine_core.load, and as the initial weights of another training

A file whose detections differ from the detector's goes to refused/, and the command fails. --check also compares COCO metrics.
The 8-bit formats need images with ground truth: those of --calibrate, else the ones of --check after the compared images. Blocks
go back to float, worst first, until AP falls by 0.5 points at most. export.json has every measured difference. For a model from
MLflow, or one named by --attach, the accepted files and the numbers are attached to its run, and the model version is tagged.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import (
    announce,
    at_least,
    command_parser,
    detector,
    local_path,
    location,
    parsed,
    refuse_missing,
    user_errors,
)

if TYPE_CHECKING:
    from dfine_core import LoadedDetector
    from pipeline.data.shards.manifest import ShardSet
    from pipeline.export.check_images import Calibration, CheckSet
    from pipeline.export.export import ExportResult
    from pipeline.tracking.client import ResolvedUri

EXPORT_FORMATS = (
    *("onnx", "onnx-portable", "onnx-fp16", "openvino", "openvino-fp16", "onnx-int8", "openvino-int8", "tensorrt"),
    *("torch-export", "released", "huggingface", "safetensors"),
)


@user_errors(extra="export")
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.model, "detector")
    announce("export", f"{args.model}: opening the detector …")
    from pipeline.config import ConfigError
    from pipeline.export.export import export, refuse_foreign_files
    from pipeline.export.gate import Timing
    from pipeline.mlflow_access import is_mlflow_uri
    from pipeline.open_detector import open_detector
    from pipeline.tracking.client import find_target

    if args.input_size and len(args.input_size) > 2:
        raise ConfigError(f"--input-size takes a side, or height and width, not {len(args.input_size)} numbers")
    if args.num_images < 1:
        raise ConfigError(f"--num-images is {args.num_images}: nothing is accepted without a comparison")
    if args.attach and not is_mlflow_uri(args.attach):
        raise ConfigError(
            f"--attach {args.attach}: name a run (runs:/RUN_ID) or a model version (models:/NAME/VERSION)"
        )
    refuse_foreign_files(args.out, args.to)
    named = args.attach or (args.model if is_mlflow_uri(args.model) else None)
    target = find_target(named) if named else None
    model = _resized(open_detector(args.model), args.input_size)
    check_set, calibration = _check_set(args, model), _calibration(args, model)
    done = export(
        model, args.to, args.out, check_set, batch_size=args.batch_size, timing=Timing(), calibration=calibration
    )
    print(f"{model.origin}, compared on {done.check_set.description}\n{done.table()}")
    if target is not None:
        _attach(target, done, args.out)
    if not done.accepted:
        sys.exit(1)


def _resized(model: "LoadedDetector", sides: list[int] | None) -> "LoadedDetector":
    from pipeline.config import ConfigError
    from pipeline.export.source import at_input_size

    if sides is None:
        return model
    try:
        return at_input_size(model, (sides[0], sides[-1]))
    except ValueError as error:
        raise ConfigError(f"--input-size: {error}") from None


def _check_set(args: argparse.Namespace, model: "LoadedDetector") -> "CheckSet":
    from pipeline.export.check_images import from_files, from_shards, from_synthetic_images

    if args.check:
        return from_shards(_shards(args.check, model), args.num_images)
    if args.images_from:
        return from_files(args.images_from, args.num_images)
    return from_synthetic_images(args.num_images, longest_side=max(model.config.input_size))


def _calibration(args: argparse.Namespace, model: "LoadedDetector") -> "Calibration | None":
    from pipeline.config import ConfigError
    from pipeline.export.check_images import calibration_from_shards
    from pipeline.export.formats import FORMATS

    calibrated = [name for name in args.to if FORMATS[name].calibrated]
    if not calibrated:
        return None
    if args.calibrate:
        return calibration_from_shards(_shards(args.calibrate, model))
    if args.check:
        return calibration_from_shards(_shards(args.check, model), skip=args.num_images)
    raise ConfigError(
        f"--to {calibrated[0]} needs images with ground truth: name a shard set by --calibrate SHARDS or --check SHARDS"
    )


def _shards(uri: str, model: "LoadedDetector") -> "ShardSet":
    from pipeline.data.shards.classes import with_classes_of
    from pipeline.data.shards.manifest import load_shards
    from pipeline.data.shards.reader import refuse_changed_files

    shards = with_classes_of(load_shards(uri), model.names, "the detector")
    refuse_changed_files(shards)
    return shards


def _attach(target: "ResolvedUri", done: "ExportResult", out: Path) -> None:
    from pipeline.tracking.client import attach

    attach(
        target,
        [result.path for result in done.results if result.path and result.verdict.accepted] + [out / "export.json"],
        tags={f"dfine.export.{result.verdict.format}": result.tag for result in done.results},
        metrics={
            f"export/{result.verdict.format}/{name}": value
            for result in done.results
            for name, value in result.verdict.measured.items()
        },
        folder="export",
    )
    print(f"attached to {target}")


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("export", __doc__)
    arguments.add_argument(
        "model",
        type=detector,
        help="checkpoint, run folder, runs:/ID, models:/NAME@ALIAS, exported folder, .pth, hf://ORG/NAME or published name",
    )
    arguments.add_argument(
        "--to", nargs="+", required=True, choices=EXPORT_FORMATS, metavar="FORMAT", help="formats, see above"
    )
    arguments.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="folder on a local disk")
    arguments.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="side, or height and width; default: as trained",
    )
    arguments.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="the only one that ONNX, OpenVINO and torch.export files will accept; default: any",
    )
    images = arguments.add_mutually_exclusive_group()
    images.add_argument(
        "--check", type=location, metavar="SHARDS", help="shard set to compare on, by detections and by AP"
    )
    images.add_argument(
        "--images-from", type=local_path, nargs="+", metavar="PATH", help="images or folders to compare on"
    )
    arguments.add_argument(
        "--calibrate",
        type=location,
        metavar="SHARDS",
        help="shard set for 8-bit formats, better of training images; default: the rest of --check",
    )
    arguments.add_argument("--num-images", type=int, default=50, metavar="N", help="images to compare on (%(default)s)")
    arguments.add_argument(
        "--attach", metavar="MODEL", help="runs:/ID or models:/NAME/VERSION; default: the origin of the model"
    )
    return arguments


if __name__ == "__main__":
    main()
