"""What differs between runs in config, data, code, versions and results, with the noise band beside every difference.

    python -m jobs.compare runs/first runs/second                       folders of runs
    python -m jobs.compare first 3f2a...e1 --tracking http://HOST:5000  names or ids, as MLflow knows them
    python -m jobs.compare first second --noise seed_0 seed_1 seed_2    noise from runs that differ in their seed alone

The first run is what the others are held against. Runs of a sweep bring its noise with them. --html writes a page, --log keeps
it with the first run in MLflow.
"""

import argparse

from jobs.command import location, user_errors
from pipeline import storage
from pipeline.tracking.client import RunFacts, RunLookupError, Runs
from pipeline.tracking.names import RUN_KEY
from pipeline.tuning.analysis.compare_runs import (
    Comparison,
    compare,
    comparison_page,
    comparison_text,
    open_runs,
)


@user_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, MLflow id or name")
    parser.add_argument(
        "--noise", nargs="+", default=[], metavar="RUN", help="replicates: they differ in their seed alone"
    )
    parser.add_argument(
        "--tracking", metavar="URI", help="MLflow's server or database; MLFLOW_TRACKING_URI unless given"
    )
    parser.add_argument("--storage", default="runs", help="whose database is read where no server is named")
    parser.add_argument("--html", type=location, metavar="FILE", help="write a page here")
    parser.add_argument("--log", action="store_true", help="keep the page with the first run in MLflow")
    args = parser.parse_args(argv)
    comparison = compare(*open_runs(args.runs, args.noise, tracking=args.tracking, storage_uri=args.storage))
    print(comparison_text(comparison))
    if args.html:
        storage.write_atomic(args.html, comparison_page(comparison).encode())
    if args.log:
        log(comparison, Runs(args.tracking, args.storage))


def log(comparison: Comparison, known: Runs) -> None:
    """Raises: RunLookupError, if MLflow does not know the first run."""
    first, *others = comparison.runs
    path = "compare/" + "_".join(name_of(run) for run in others) + ".html"
    run_id = first.run_id
    if run_id is None:
        found = known.by_key(first.tags.get(RUN_KEY, ""))
        if found is None:
            raise RunLookupError(f"{first.title}: {known.shown_uri} does not know this run, so nothing is logged")
        run_id = found.run_id
    assert run_id is not None
    known.log_text(run_id, comparison_page(comparison), path)
    print(f"logged as {path} of run {run_id}")


def name_of(run: RunFacts) -> str:
    return run.run_id[:8] if run.run_id else "".join(sign if sign.isalnum() else "-" for sign in run.title)


if __name__ == "__main__":
    main()
