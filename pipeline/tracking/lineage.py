"""Lineage of a detector: run by run, down to shard sets and code commits.

    client = connect("sqlite:////runs/mlflow.db")
    run = find_run(client, "fine-tuned")
    print(lineage_tree(lineage(client, run.info.run_id)))

The tags `parent.*` of a run name the source of its initial weights: MLflow's id of the run that made them, or the key of that
run, or a file that is not in MLflow.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.mlflow_access import FINAL
from pipeline.tracking.client import COMMIT, find_run_by_key, logged_model_id, mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT, TEACHER = "parent.", "digest.teacher."  # first characters of tags


@dataclass(frozen=True)
class Ancestor:
    """One run and the run that it started from."""

    name: str
    run_id: str
    status: str
    ap: float | None
    commit: str
    data: tuple[str, ...]  # one line per shard set and teacher
    versions: tuple[str, ...]  # registered models that this run made: NAME/VERSION
    began_with: str  # source of the initial weights; "" for random weights
    parent: "Ancestor | None"


def parent_model(client: "MlflowClient", parent: Mapping[str, str]) -> str | None:
    """Id of the logged model that a run started from, if MLflow knows one."""
    if parent.get("model_id"):
        return parent["model_id"]
    run = _parent_run(client, parent)
    return logged_model_id(run) if run is not None else None


def lineage(client: "MlflowClient", run_id: str, seen: frozenset[str] = frozenset()) -> Ancestor:
    """A run and all runs before it.

    Args:
        seen: runs that are already in the line, so that a circle ends.

    Raises:
        RunLookupError: there is no such run.
    """
    with mlflow_errors(run_id):
        run = client.get_run(run_id)
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        tags = run.data.tags
        parent = {key.removeprefix(PARENT): value for key, value in tags.items() if key.startswith(PARENT)}
        before = _parent_run(client, parent)
    known = before is not None and before.info.run_id not in seen | {run_id}
    return Ancestor(
        name=run.info.run_name or run_id,
        run_id=run_id,
        status=run.info.status,
        ap=run.data.metrics.get(f"{FINAL}/AP"),
        commit=tags.get(COMMIT, ""),
        data=(*_data_lines(run), *teacher_lines(tags)),
        versions=tuple(f"{v.name}/{v.version}" for v in versions),
        began_with=_described(parent),
        parent=lineage(client, before.info.run_id, seen | {run_id}) if known and before is not None else None,
    )


def lineage_tree(run: Ancestor) -> str:
    """The lineage as a tree of text, the newest run first."""
    return "\n".join(_lines(run))


def _parent_run(client: "MlflowClient", parent: Mapping[str, str]) -> "Run | None":
    if parent.get("run_id"):
        return client.get_run(parent["run_id"])
    if not parent.get("run_key"):
        return None
    return find_run_by_key(client, parent["run_key"])


def _described(parent: Mapping[str, str]) -> str:
    """Source of the initial weights, whether or not MLflow knows the run that made them."""
    keys = ("model_version", "source", "checkpoint", "file", "folder")
    source = next((parent[key] for key in keys if key in parent), "")
    step = f", step {parent['step']}" if "step" in parent else ""
    digest = f", sha256 {parent['sha256'][:12]}" if "sha256" in parent else ""
    random = f", {parent['random']} random" if "random" in parent else ""
    return f"{source}{step}{digest}{random}" if source else ""


def _data_lines(run: "Run") -> Iterator[str]:
    for given in run.inputs.dataset_inputs if run.inputs else []:
        use = next((tag.value for tag in given.tags if tag.key == "mlflow.data.context"), "data")
        uri = json.loads(given.dataset.source).get("uri", "")
        yield f"{use}: {given.dataset.name}, digest {given.dataset.digest[:12]}, {uri}"


def teacher_lines(tags: Mapping[str, str]) -> list[str]:
    """One line for each teacher of a run, from its tags."""
    return [
        f"teacher: {key.removeprefix(TEACHER)}, digest {digest[:12]}"
        for key, digest in sorted(tags.items())
        if key.startswith(TEACHER)
    ]


def _lines(run: Ancestor) -> list[str]:
    ap = f", AP {run.ap:.3f}" if run.ap is not None else ""
    facts = [*(f"model {version}" for version in run.versions), *([f"code {run.commit[:12]}"] if run.commit else [])]
    facts += [*run.data, f"began with {run.began_with}" if run.began_with else "began from scratch"]
    below = [[text] for text in facts] + ([_lines(run.parent)] if run.parent is not None else [])
    lines = [f"{run.name}  ({run.run_id}, {run.status.lower()}{ap})"]
    for number, (first, *rest) in enumerate(below, start=1):
        last = number == len(below)
        lines.append(f"{'└─' if last else '├─'} {first}")
        lines += [f"{' ' if last else '│'}  {line}" for line in rest]
    return lines
