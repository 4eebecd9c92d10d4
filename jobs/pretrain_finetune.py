"""Pretrain, then fine-tune from the best weights, as one job under one MLflow run.

    dfine pretrain-finetune configs/chains/objects365_to_coco_s.yaml --cluster configs/clusters/several_nodes.yaml
    ... --set storage=s3://bucket/runs pretrain.schedule.epochs=12    values of the chain, or of one stage's experiment
    ray job submit --working-dir . -- python -m jobs.pretrain_finetune my_chain.yaml    with absolute paths or URIs in it

Each stage prepares the shard sets that are missing, trains, evaluates its best weights and registers them as a model version.
The same command again skips finished stages and resumes an interrupted one. --dry-run prints the plan of every stage.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs import prepare
from jobs.command import add_cluster, add_set, announce, command_parser, parsed, recipe, user_errors

if TYPE_CHECKING:
    from pipeline.training.chain import ResolvedStage


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)

    # 1. Check the files of the chain and its stages, which takes no PyTorch and no Ray.
    from pipeline.config_files import load_cluster, parse_overrides
    from pipeline.training.chain import load_chain, run_chain

    chain, steps = load_chain(
        args.chain, parse_overrides(args.set), load_cluster(args.cluster) if args.cluster else None
    )
    announce("pretrain-finetune", f"{args.chain}: {'planning' if args.dry_run else 'starting'} …")

    # 2. Run the stages, or show the plan.
    if args.dry_run:
        print(plan(steps))
        return
    print(run_chain(chain, steps, lambda words: prepare.prepare_shards(prepare.parser().parse_args(words))))


def plan(steps: Sequence["ResolvedStage"]) -> str:
    """Plan of every stage; for one whose data is missing, the commands that prepare it."""
    from pipeline.config import Cluster
    from pipeline.training.dry_run import preview

    sections = []
    for step in steps:
        title = f"## {step.stage.name}: {step.experiment.name}"
        commands = [f"  dfine prepare {' '.join(arguments)}" for arguments in step.missing]
        if commands:
            sections.append("\n".join([title, "planned once its data is prepared:", *commands]))
        else:
            sections.append(f"{title}\n{preview(step.experiment, step.cluster or Cluster())}")
    return "\n\n".join(sections)


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("pretrain-finetune", __doc__)
    arguments.add_argument("chain", type=recipe, help="YAML file, see configs/chains/")
    add_cluster(arguments, help="YAML file, for stages that name none; see configs/clusters/")
    add_set(arguments, help="values that replace those of the chain or of a stage, see above")
    arguments.add_argument("--dry-run", action="store_true", help="print the plan, and end")
    return arguments


if __name__ == "__main__":
    main()
