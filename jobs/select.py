"""Choose the images to label next, with pre-labels to correct.

    dfine select runs/mine photos/ --count 200 --out to_label
    dfine select runs/mine photos/ 'drone/**/*.jpg' clip.mp4 --labelled /shards/mine/train --out to_label
    dfine select runs/mine s3://bucket/pool --out to_label --format yolo

Images in which the detector expects many errors come first, by the entropy of its scores and the widths of its edges; each one
unlike those chosen before it, and unlike the labelled ones. Near-duplicates are left out. Writes copies of the images, pre-labels
for annotation tools, a contact sheet, and selected.json with the reasons. The same command again resumes an interrupted
selection; a finished one stays as it is. A few images are processed here, more on Ray.
"""

import argparse

from jobs.command import (
    announce,
    at_least,
    command_parser,
    location,
    parsed,
    refuse_missing,
    threshold,
    user_errors,
)
from jobs.image_inputs import add_inputs, add_processing

SELECT_FORMATS = ("coco", "yolo", "label-studio")


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.detector, "detector")
    announce("select", f"{args.detector}: listing the images and opening the detector …")
    from pipeline.labelling.plan import holds_selection
    from pipeline.predict.inputs import list_inputs

    earlier = args.out if holds_selection(args.out) else None  # its copies are no inputs
    unlabelled = list_inputs(args.inputs, frame_stride=args.frame_stride, leave_out=earlier)
    inputs = list_inputs([*args.inputs, *args.labelled], frame_stride=args.frame_stride, leave_out=earlier)

    import torch

    from pipeline.labelling.select import SelectOptions, select
    from pipeline.open_detector import open_detector
    from pipeline.predict.predict import in_this_process

    on_gpu = in_this_process(inputs, args.workers) and torch.cuda.is_available()
    loaded = open_detector(args.detector, "cuda" if on_gpu else "cpu")
    print(f"{loaded.origin} on {inputs}", flush=True)
    options = SelectOptions(
        count=args.count,
        format=args.format,
        threshold=args.threshold,
        part_size=args.part_size,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    print(select(loaded, inputs, inputs.num_images - unlabelled.num_images, args.out, options).summary())


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("select", __doc__)
    add_inputs(arguments, metavar="UNLABELLED")
    arguments.add_argument("--count", type=at_least(1), default=200, metavar="N", help="images to choose (%(default)s)")
    arguments.add_argument(
        "--labelled",
        nargs="+",
        type=location,
        default=[],
        metavar="INPUT",
        help="shard sets or folders of images that have labels: the choice keeps away from them, and from their copies",
    )
    arguments.add_argument(
        "--format", choices=SELECT_FORMATS, default="coco", help="form of the pre-labels (%(default)s)"
    )
    arguments.add_argument(
        "--threshold",
        type=threshold,
        help="minimum score of a pre-label; default: by class the best on the validation images, or 0.4",
    )
    add_processing(arguments)
    return arguments


if __name__ == "__main__":
    main()
