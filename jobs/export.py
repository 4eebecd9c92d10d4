"""Write a trained detector for other programs. Every file is opened in its own runtime and held against the detector.

    python -m jobs.export runs/mine --to onnx --out exported --check shards/mine/val
    python -m jobs.export models:/shapes@champion --to onnx onnx-fp16 huggingface --out exported --input-size 512
    python -m jobs.export dfine_s_coco.pth --to onnx torch-export --out exported --images-from photos

    onnx           detector.onnx       images to detections, any number of images, for ONNX Runtime, TensorRT, OpenVINO
    onnx-fp16      detector-fp16.onnx  the same in half precision, inputs and outputs in single
    torch-export   detector.pt2        for torch.export.load, without this project
    released       detector.pth        the layout of the published files
    huggingface    huggingface/        for Transformers: DFineForObjectDetection and AutoImageProcessor
    safetensors    safetensors/        for dfine_core.load; what another training starts from

A file that does not find what the detector finds is put into refused/, and the command fails. With --check the COCO numbers
of file and detector are compared as well. export.json has every measured difference. What came from MLflow, or is named by
--attach, gets the accepted files and the numbers into its run, and marks on the model version.
"""

import argparse
import sys
from pathlib import Path

from dfine_core import LoadedDetector
from jobs.command import local_path, location, user_errors
from jobs.evaluate import refuse_other_classes
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import load_shards
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.export.check_images import CheckSet, from_files, from_shards, from_synthetic_images
from pipeline.export.export import ExportResult, export
from pipeline.export.formats import FORMATS, at_input_size
from pipeline.open_detector import open_detector
from pipeline.tracking.attachments import MODEL, RUN, Target, attach, find_target


@user_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", type=location, help="checkpoint, run folder, runs:/ID, models:/NAME@ALIAS, exported folder or .pth"
    )
    parser.add_argument("--to", nargs="+", required=True, choices=FORMATS, metavar="FORMAT", help="formats, see above")
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="on this machine's disk")
    parser.add_argument("--input-size", type=int, nargs="+", metavar="PX", help="side, or height and width; as trained")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--check", type=location, metavar="SHARDS", help="shard set to compare on, by detections and by AP"
    )
    pictures.add_argument(
        "--images-from", type=local_path, nargs="+", metavar="PATH", help="images or folders to compare on"
    )
    parser.add_argument("--images", type=int, default=50, metavar="N", help="how many of them (%(default)s)")
    parser.add_argument("--attach", metavar="MODEL", help="runs:/ID or models:/NAME/VERSION; where the model came from")
    args = parser.parse_args(argv)
    named = args.attach or (args.model if args.model.startswith((RUN, MODEL)) else None)
    target = find_target(named) if named else None
    model = _sized(open_detector(args.model), args.input_size)
    done = export(model, args.to, args.out, _check_set(args, model))
    print(f"{model.origin}, compared on {done.check_set.description}\n{done.table()}")
    if target is not None:
        _attach(target, done, args.out)
    if not done.accepted:
        sys.exit(1)


def _sized(model: LoadedDetector, sides: list[int] | None) -> LoadedDetector:
    if sides is None:
        return model
    if len(sides) > 2:
        raise ConfigError(f"--input-size takes a side, or height and width, not {len(sides)} numbers")
    try:
        return at_input_size(model, (sides[0], sides[-1]))
    except ValueError as error:
        raise ConfigError(f"--input-size: {error}") from None


def _check_set(args: argparse.Namespace, model: LoadedDetector) -> CheckSet:
    if args.images < 1:
        raise ConfigError(f"--images is {args.images}: nothing is accepted without a comparison")
    if args.check:
        shards = load_shards(args.check)
        refuse_other_classes(model.names, shards)
        refuse_changed_files(shards)
        return from_shards(shards, args.images)
    if args.images_from:
        return from_files(args.images_from, args.images)
    return from_synthetic_images(args.images, longest_side=max(model.config.input_size))


def _attach(target: Target, done: ExportResult, out: Path) -> None:
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


if __name__ == "__main__":
    main()
