"""Make a detector from a folder of annotated images: prepare, check, train, evaluate, export.

    dfine fit /data/mine                                          a COCO, YOLO, VOC, Roboflow, CVAT or Label Studio export
    dfine fit /data/mine --out runs/mine --set model.variant=m schedule.epochs=40
    dfine fit /data/mine --init none --split-off val=0.1

Splits a validation part off where there is none, and chooses variant, input size, batch and epochs from the data and this
machine; one table says why. --set, --init and --cluster override a choice as in dfine train. The same command again goes on
where it was; if images or annotations have changed, it says which and trains again beside what is there. OUT has the shards, the
doctor's page, the experiment as YAML, the run, the exported file and a page of results.
"""

import argparse
import sys
from pathlib import Path

from jobs.command import (
    add_cluster,
    add_set,
    announce,
    command_parser,
    detector,
    local_path,
    parsed,
    refuse_missing,
    user_errors,
)
from pipeline.errors import UserError

NO_WEIGHTS = "none"


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(str(args.folder), "data set")
    if args.init not in (None, NO_WEIGHTS):
        refuse_missing(args.init, "weights")
    out = args.out or default_out(args.folder)

    # 1. Check the user's values; still without PyTorch and Ray.
    from pipeline.config_files import load_cluster, parse_overrides
    from pipeline.fit.values import refuse_wrong_values

    given = parse_overrides(args.set)
    if args.init is not None:
        given["init"] = None if args.init == NO_WEIGHTS else args.init
    refuse_wrong_values(str(out), given)
    cluster = load_cluster(args.cluster) if args.cluster else None
    announce("fit", f"{args.folder}: looking at the data …")

    # 2. Prepare and choose, then train.
    from pipeline.fit.fit import FitRequest, plan_fit, run_fit

    request = FitRequest(folder=args.folder, out=out, given=given, split=args.split_off, cluster=cluster)
    request, experiment = plan_fit(request)
    if args.dry_run:
        print(f"the plan: {request.experiment_file}; the same command without --dry-run goes on")
    elif not run_fit(request, experiment):
        sys.exit(1)


def default_out(folder: Path) -> Path:
    """Folder of the results if none is given.

    Raises:
        UserError: this is a submitted job, whose working directory is deleted.
    """
    try:
        return local_path(f"runs/{folder.name}")
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--out: {error}") from None


def initial_weights(text: str) -> str:
    """Argument type: detector, or `none`."""
    return text if text == NO_WEIGHTS else detector(text)


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("fit", __doc__)
    arguments.add_argument("folder", type=local_path, help="folder of an export; its layout is recognised")
    arguments.add_argument(
        "--out", type=local_path, metavar="FOLDER", help="folder for all results (runs/ and the folder's name)"
    )
    arguments.add_argument(
        "--init",
        type=initial_weights,
        metavar="WEIGHTS",
        help="published name, run, checkpoint or file to start from; none: random weights; default: published ones",
    )
    add_set(arguments, help="values of the experiment, as for dfine train; they are not chosen then")
    arguments.add_argument(
        "--split-off",
        metavar="NAME=SHARE",
        help="share of the training images to validate on, as val=0.1; default: val=0.2 if there is no validation split",
    )
    add_cluster(arguments)
    arguments.add_argument("--dry-run", action="store_true", help="prepare the data, choose, print the plan, and end")
    return arguments


if __name__ == "__main__":
    main()
