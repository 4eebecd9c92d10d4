"""Pretrain, then fine-tune from the best weights: training runs after each other as one job, under one MLflow run.

    python -m jobs.pretrain_finetune configs/chains/objects365_to_coco_s.yaml --cluster configs/clusters/several_nodes.yaml
    ... --set storage=s3://bucket/runs pretrain.schedule.epochs=12    values of the chain, or of one stage's experiment
    ray job submit --working-dir . -- python -m jobs.pretrain_finetune my_chain.yaml    paths in it absolute, or URIs

Each stage prepares the shard sets that are missing, trains, evaluates its best weights and registers them as a model version.
The same command again leaves alone what is finished and continues what was interrupted. --dry-run shows the stages.
"""

import argparse
from pathlib import Path

from jobs import prepare
from jobs.command import add_set, user_errors
from pipeline.config_files import load_cluster, parse_overrides
from pipeline.training.chain import ResolvedStage, load_chain, run_chain
from pipeline.training.dry_run import preview


@user_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", type=Path, help="YAML file, see configs/chains/")
    parser.add_argument("--cluster", type=Path, help="YAML file, for stages that do not name their own")
    add_set(parser, help="replace values, see above")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and end")
    args = parser.parse_args(argv)
    chain, steps = load_chain(args.chain, parse_overrides(args.set), load_cluster(args.cluster))
    if args.dry_run:
        print("\n\n".join(_shown(step) for step in steps))
        return
    print(run_chain(chain, steps, lambda arguments: prepare.prepare_shards(prepare.parser().parse_args(arguments))))


def _shown(step: ResolvedStage) -> str:
    title = f"## {step.stage.name}: {step.experiment.name}"
    if step.missing:
        lines = [f"  python -m jobs.prepare {' '.join(arguments)}" for arguments in step.missing]
        return "\n".join([title, "not known before its data is prepared:", *lines])
    return f"{title}\n{preview(step.experiment, step.cluster)}"


if __name__ == "__main__":
    main()
