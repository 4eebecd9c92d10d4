"""Chains of trainings: what a file comes to, every problem at once, and a real one from pretraining to fine-tuning."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Cluster, ConfigError
from pipeline.config_files import load_experiment
from pipeline.training.chain import load_chain
from tests.support.synthetic_shards import synthetic_records, write_shards

ROOT = Path(__file__).parents[2]
CHAINS = sorted((ROOT / "configs" / "chains").glob("*.yaml"))
MARGIN = 0.4  # of AP: fine-tuned from pretrained weights against the same steps from scratch


def chain_file(folder: Path, **changes: Any) -> Path:
    experiment = {
        "data": {"train": str(folder / "few"), "val": str(folder / "few")},
        "schedule": {"steps": 4, "global_batch_size": 4},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    content: dict[str, Any] = {
        "name": "mine",
        "storage": str(folder / "runs"),
        "stages": [
            {"name": "pretrain", "experiment": "experiment.yaml", "registered_model_name": "many"},
            {"name": "finetune", "experiment": "experiment.yaml", "set": {"seed": 3}, "cluster": {"workers": 2}},
        ],
    }
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_a_stage_begins_with_the_run_before_it_under_the_chains_name(tmp_path: Path) -> None:
    overrides = {"pretrain.schedule.steps": 9, "storage": str(tmp_path / "elsewhere")}
    _, (first, second) = load_chain(chain_file(tmp_path), overrides, Cluster(workers=7))
    assert (first.experiment.name, second.experiment.name) == ("mine-pretrain", "mine-finetune")
    assert first.experiment.init is None
    assert second.experiment.init == f"{tmp_path}/elsewhere/mine-pretrain"
    assert (first.experiment.schedule.steps, second.experiment.schedule.steps) == (9, 4)
    assert (first.experiment.tracking.registered_model_name, second.experiment.tracking.registered_model_name) == (
        "many",
        None,
    )
    assert (first.experiment.seed, second.experiment.seed) == (0, 3)
    assert (first.cluster.workers, second.cluster.workers) == (7, 2)
    assert second.experiment.tracking.tags["stage"] == "finetune"


def test_only_shard_sets_that_are_missing_are_prepared(tmp_path: Path) -> None:
    write_shards(tmp_path / "few", synthetic_records(4))
    lines = [f"synthetic --images 4 --split x --out {tmp_path / name}" for name in ("few", "many")]
    stages = [{"name": "only", "experiment": "experiment.yaml", "prepare": lines}]
    _, (step,) = load_chain(chain_file(tmp_path, stages=stages), {}, Cluster())
    assert [arguments[-1] for arguments in step.missing] == [str(tmp_path / "many")]


def test_every_problem_of_a_chain_is_told_at_once(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "experiment": "experiment.yaml", "set": {"optimizer.rate": 1}},
        {"name": "b", "experiment": "missing.yaml"},
        {"name": "c", "experiment": "experiment.yaml", "prepare": ["coco data --split x"]},
        {"name": "d", "experiment": "experiment.yaml", "set": {"init": "x.pth"}},
    ]
    with pytest.raises(ConfigError) as raised:
        load_chain(chain_file(tmp_path, stages=stages), {"e.seed": 1}, Cluster())
    text = str(raised.value)
    assert "5 problems" in text
    for part in (
        "unknown key 'rate'",
        "missing.yaml: there is no such file",
        "does not say --out",
        "init: set by the chain",
    ):
        assert part in text
    assert "--set e.seed: begin with a stage, a or b or c or d" in text


def test_stages_of_one_name_are_refused(tmp_path: Path) -> None:
    stages = [{"name": "a", "experiment": "experiment.yaml"}] * 2
    with pytest.raises(ConfigError, match="distinct names"):
        load_chain(chain_file(tmp_path, stages=stages), {}, Cluster())


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_the_shipped_chains_are_valid_and_say_how_they_are_run(path: Path) -> None:
    assert len(CHAINS) >= 5
    chain, steps = load_chain(path, {}, Cluster())
    assert [step.stage.name for step in steps] == ["pretrain", "finetune"]
    assert f"configs/chains/{path.name}" in path.read_text()
    assert steps[1].experiment.init == f"{chain.storage}/{steps[0].experiment.name}"
    for step in steps:
        outs = {line.split("--out ")[1] for line in step.stage.prepare}
        assert {os.path.abspath(out) for out in outs} == {step.experiment.data.train, step.experiment.data.val}


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_chain_beats_scratch_is_left_alone_when_finished_and_tells_its_lineage(tmp_path: Path) -> None:
    chains = tmp_path / "chains"
    (chains / "demo").mkdir(parents=True)
    for name in ("demo.yaml", "demo/pretrain.yaml", "demo/finetune.yaml"):
        text = (ROOT / "configs" / "chains" / name).read_text()
        (chains / name).write_text(re.sub(r"\bdemo/(chain|runs)", rf"{tmp_path}/\1", text))
    chain = ["jobs.pretrain_finetune", str(chains / "demo.yaml")]
    first = run(*chain)
    result = json.loads((tmp_path / "runs" / "demo-chain-finetune" / "result.json").read_text())
    assert f"AP {result['numbers']['AP']:.3f}" in first

    again = run(*chain)
    assert again.count("is finished: skipped") == 2

    scratch = load_experiment(chains / "demo" / "finetune.yaml")
    assert scratch.init is None
    cluster = tmp_path / "one.yaml"
    cluster.write_text("{workers: 1, cpus_per_worker: 1}")
    run(
        *("jobs.train", str(chains / "demo" / "finetune.yaml"), "--cluster", str(cluster)),
        *("--name", "scratch", "--set", f"storage={tmp_path}/runs"),
    )
    from_scratch = json.loads((tmp_path / "runs" / "scratch" / "result.json").read_text())
    assert result["numbers"]["AP"] > from_scratch["numbers"]["AP"] + MARGIN

    tree = run("jobs.lineage", str(tmp_path / "runs" / "demo-chain-finetune"))
    for part in (
        "demo-chain-pretrain",
        "model shapes-pretrained/1",
        "model shapes/1",
        "training: chain/few,",
        "training: chain/many,",
    ):
        assert part in tree, tree
