"""Write the page of results of a run: curves, classes, errors, best and worst images.

    dfine report runs/mine
    dfine report runs/mine --out results.html --data shards/mine/test

The best weights are evaluated on the validation images of the run, or on --data. The page is one HTML file without links to
others. What to try next is derived from measured facts, each of which it names.
"""

import argparse

from jobs.command import announce, command_parser, location, parsed, refuse_missing, user_errors


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.run, "run")
    announce("report", f"{args.run}: opening the data and the detector …")
    from pipeline.data.shards.manifest import load_shards
    from pipeline.data.shards.reader import refuse_changed_files

    val = None if args.data is None else load_shards(args.data)
    if val is not None:
        refuse_changed_files(val)
    from pipeline import storage
    from pipeline.run_report.write import write_report

    print(f"page of results: {write_report(args.run, args.out or storage.join(args.run, PAGE), val=val)}")


PAGE = "report.html"  # in the folder of the run


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("report", __doc__)
    arguments.add_argument("run", type=location, help="folder of a run that has a checkpoint")
    arguments.add_argument("--out", type=location, metavar="FILE", help="HTML file; default: report.html in the run")
    arguments.add_argument(
        "--data",
        type=location,
        metavar="SHARDS",
        help="shard set to evaluate on; default: the validation images of the run",
    )
    return arguments


if __name__ == "__main__":
    main()
