"""Compare runs in config, data, code, versions and results, with the noise band.

    dfine compare runs/first runs/second                        folders of runs
    dfine compare first 3f2a...e1 --tracking http://HOST:5000   names or ids in MLflow
    dfine compare first second --noise seed_0 seed_1 seed_2     noise from runs that differ in their seed alone

The first run is the reference for all others. Runs of a sweep bring its noise with them. --html writes a page, --log attaches
it to the first run in MLflow.
"""

import argparse
from typing import TYPE_CHECKING

from jobs.command import announce, command_parser, location, parsed, user_errors

if TYPE_CHECKING:
    from pipeline.tracking.run_facts import RunFacts, Runs
    from pipeline.tuning.analysis.compare_runs import Comparison


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    announce("compare", f"{' '.join(args.runs)}: reading the runs …")
    from pipeline import storage
    from pipeline.output_folder import HTML, refuse_foreign_file
    from pipeline.tracking.run_facts import Runs
    from pipeline.tuning.analysis.compare_runs import compare, comparison_page, comparison_text, open_runs

    refuse_foreign_file(args.html, "--html", HTML)
    comparison = compare(*open_runs(args.runs, args.noise, tracking=args.tracking, storage_uri=args.storage))
    print(comparison_text(comparison))
    if args.html:
        storage.write_atomic(args.html, comparison_page(comparison).encode())
    if args.log:
        log(comparison, Runs(args.tracking, args.storage))


def log(comparison: "Comparison", known: "Runs") -> None:
    """Attach the page to the first run in MLflow.

    Raises:
        RunLookupError: the first run is not in MLflow.
    """
    from pipeline.tracking.client import RunLookupError
    from pipeline.tracking.settings import RUN_KEY
    from pipeline.tuning.analysis.compare_runs import comparison_page

    first, *others = comparison.runs
    path = "compare/" + "_".join(name_of(run) for run in others) + ".html"
    run_id = first.run_id
    if run_id is None:
        found = known.by_key(first.tags.get(RUN_KEY, ""))
        if found is None:
            raise RunLookupError(f"{first.title}: not in {known.shown_uri}, so nothing is logged")
        run_id = found.run_id
    assert run_id is not None
    known.log_text(run_id, comparison_page(comparison), path)
    print(f"logged as {path} of run {run_id}")


def name_of(run: "RunFacts") -> str:
    """Name of a run as part of a file name."""
    return run.run_id[:8] if run.run_id else "".join(sign if sign.isalnum() else "-" for sign in run.title)


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("compare", __doc__)
    arguments.add_argument("runs", nargs="+", metavar="RUN", help="folder, MLflow id or name")
    arguments.add_argument(
        "--noise", nargs="+", default=[], metavar="RUN", help="replicates: runs that differ in their seed alone"
    )
    arguments.add_argument(
        "--tracking", metavar="URI", help="MLflow's server or database; default: MLFLOW_TRACKING_URI"
    )
    arguments.add_argument("--storage", default="runs", help="folder of the database that is read without a server")
    arguments.add_argument("--html", type=location, metavar="FILE", help="file for a page")
    arguments.add_argument("--log", action="store_true", help="attach the page to the first run in MLflow")
    return arguments


if __name__ == "__main__":
    main()
