"""Open a run in MLflow's pages: accuracy, losses, images, models.

    dfine ui runs/mine                  the folder of a run; its database is served to this machine until Ctrl-C
    dfine ui RUN                        id or name of a run on the server of MLFLOW_TRACKING_URI
    dfine ui runs/mine --no-browser     print the address only

Runs of one experiment are compared there: choose several in the table, which is one click up from the run.
"""

import argparse
import time
import webbrowser
from contextlib import nullcontext, suppress

from jobs.command import announce, command_parser, parsed, user_errors


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    run = args.run.rstrip("/")
    announce("ui", f"{run}: looking it up …")

    # 1. Find the run.
    from pipeline.training.tracked_run import tracking_of

    settings, key = tracking_of(run)
    from pipeline.tracking.client import find_tracked_run
    from pipeline.tracking.ui import run_address, serve_database

    _, found = find_tracked_run(settings, run, key)

    # 2. Serve its database, unless a server has it; show the page.
    remote = settings.uri.startswith("http")
    with nullcontext(settings.shown_uri) if remote else serve_database(settings.uri) as server:
        address = run_address(server, found.info.experiment_id, found.info.run_id)
        print(address, flush=True)
        if not args.no_browser:
            webbrowser.open(address)
        if not remote:
            print("Ctrl-C ends the server", flush=True)
            with suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("ui", __doc__)
    arguments.add_argument("run", help="folder of a run, or its id or name in MLflow")
    arguments.add_argument("--no-browser", action="store_true", help="print the address, and open nothing")
    return arguments


if __name__ == "__main__":
    main()
