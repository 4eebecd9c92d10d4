"""Deliver to MLflow what it does not have yet of a run that has ended.

    dfine record runs/mine
    dfine record s3://bucket/runs/mine              on the machine that trained it, where its log waits
    dfine record runs/mine --tracking http://mlflow:5000     a server that has moved, or whose address holds a password

A training delivers everything by itself where the server keeps up. Where it did not, the training command names this one.
It waits as long as the server makes progress, and exits with 1 if something is left or was refused.
"""

import argparse

from jobs.command import announce, command_parser, location, parsed, refuse_missing, user_errors


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.run, "run")
    announce("record", f"{args.run}: looking for what MLflow lacks …")
    from pipeline.training.recording import deliver_run

    delivery = deliver_run(args.run, args.tracking)
    print(f"MLflow has everything of {args.run}; delivered now: {delivery.delivered} events")


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("record", __doc__)
    arguments.add_argument("run", type=location, help="folder or URI of a run, chain or sweep")
    arguments.add_argument(
        "--tracking", metavar="URI", help="MLflow's server or database; default: the one that the run was tracked at"
    )
    return arguments


if __name__ == "__main__":
    main()
