"""Where a detector comes from: run by run, down to shard sets and code commits.

    client = client_of("sqlite:////runs/mlflow.db")
    print(drawn(lineage(client, find_run(client, "fine-tuned"))))

A run names what its first weights came from in its tags `parent.*`: the MLflow id of the run that made them, or the key
under which that run was recorded, or a file that MLflow never knew.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from pipeline.config import ConfigError
from pipeline.redaction import redact
from pipeline.tracking.asking import asking
from pipeline.tracking.names import RUN_KEY

RUN, MODEL = "runs:/", "models:/"
PARENT = "parent."
COMMIT = "mlflow.source.git.commit"


@dataclass(frozen=True)
class Ancestor:
    """One run, and what it began with."""

    name: str
    run_id: str
    status: str
    ap: float | None
    commit: str
    data: tuple[str, ...]  # one line per shard set
    versions: tuple[str, ...]  # of registered models that this run made: NAME/VERSION
    began_with: str  # "" from scratch
    parent: "Ancestor | None"


def client_of(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def facts(client: MlflowClient, source: str) -> dict[str, str]:
    """What MLflow knows about `runs:/RUN_ID` or `models:/NAME@ALIAS`, as of now: an alias may move on.

    Raises:
        ConfigError: it knows nothing of it.
    """
    with asking(source):
        return _facts(client, source)


def _facts(client: MlflowClient, source: str) -> dict[str, str]:
    known = {"source": source}
    if source.startswith(RUN):
        return known | _of_run(client, source.removeprefix(RUN).split("/")[0])
    name = source.removeprefix(MODEL)
    if name.startswith("m-"):
        model = client.get_logged_model(name)
        return known | {"model_id": name, "run_id": model.source_run_id or ""}
    if "@" in name:
        version = client.get_model_version_by_alias(*name.split("@", 1))
    else:
        version = client.get_model_version(*name.split("/", 1))
    known["model_version"] = f"{version.name}/{version.version}"
    return known | {"run_id": version.run_id or "", "model_id": version.model_id or ""}


def parent_model(client: MlflowClient, parent: Mapping[str, str]) -> str | None:
    """Id of the logged model that a run began with, if MLflow knows one."""
    if parent.get("model_id"):
        return parent["model_id"]
    run = _parent_run(client, parent)
    outputs = run.outputs.model_outputs if run is not None and run.outputs else []
    return outputs[-1].model_id if outputs else None


def lineage(client: MlflowClient, run_id: str, seen: frozenset[str] = frozenset()) -> Ancestor:
    """The run and all that it comes from.

    Raises:
        ConfigError: there is no such run.
    """
    with asking(run_id):
        run = client.get_run(run_id)
    tags = run.data.tags
    parent = {key.removeprefix(PARENT): value for key, value in tags.items() if key.startswith(PARENT)}
    before = _parent_run(client, parent)
    known = before is not None and before.info.run_id not in seen | {run_id}
    return Ancestor(
        name=run.info.run_name or run_id,
        run_id=run_id,
        status=run.info.status,
        ap=run.data.metrics.get("final/AP"),
        commit=tags.get(COMMIT, ""),
        data=tuple(_data_lines(run)),
        versions=tuple(f"{v.name}/{v.version}" for v in client.search_model_versions(f"run_id = '{run_id}'")),
        began_with=_described(parent),
        parent=lineage(client, before.info.run_id, seen | {run_id}) if known and before is not None else None,
    )


def drawn(run: Ancestor) -> str:
    """As a tree, the newest run first."""
    return "\n".join(_lines(run))


def find_run(client: MlflowClient, wanted: str) -> str:
    """The id of a run by its id, its name, its key, or the model version that it made (`models:/NAME@ALIAS`).

    Raises:
        ConfigError: there is none, or there are several of that name.
    """
    with asking(wanted):
        if wanted.startswith(MODEL):
            return facts(client, wanted)["run_id"]
        for what in ("attributes.run_id", "attributes.run_name", f"tags.`{RUN_KEY}`"):
            found = client.search_runs(_everywhere(client), f"{what} = '{wanted}'")
            if len(found) == 1:
                return str(found[0].info.run_id)
            if found:
                ids = ", ".join(run.info.run_id for run in found)
                raise ConfigError(f"{len(found)} runs are named {wanted!r}: give one of their ids, {ids}")
    raise ConfigError(f"MLflow at {redact(client.tracking_uri)} knows no run {wanted!r}")


def _everywhere(client: MlflowClient) -> list[str]:
    return [experiment.experiment_id for experiment in client.search_experiments(view_type=ViewType.ALL)]


def _of_run(client: MlflowClient, run_id: str) -> dict[str, str]:
    run = client.get_run(run_id)
    outputs = run.outputs.model_outputs if run.outputs else []
    return {"run_id": run_id, "run": run.info.run_name or ""} | ({"model_id": outputs[-1].model_id} if outputs else {})


def _parent_run(client: MlflowClient, parent: Mapping[str, str]) -> Run | None:
    if parent.get("run_id"):
        return client.get_run(parent["run_id"])
    if not parent.get("run_key"):
        return None
    found = client.search_runs(_everywhere(client), f"tags.`{RUN_KEY}` = '{parent['run_key']}'")
    return found[0] if found else None


def _described(parent: Mapping[str, str]) -> str:
    """What the first weights were, whether or not MLflow knows the run that made them."""
    what = next(
        (parent[key] for key in ("model_version", "source", "checkpoint", "file", "folder") if key in parent), ""
    )
    where = f", step {parent['step']}" if "step" in parent else ""
    digest = f", sha256 {parent['sha256'][:12]}" if "sha256" in parent else ""
    return f"{what}{where}{digest}" if what else ""


def _data_lines(run: Run) -> Iterator[str]:
    for given in run.inputs.dataset_inputs if run.inputs else []:
        use = next((tag.value for tag in given.tags if tag.key == "mlflow.data.context"), "data")
        place = json.loads(given.dataset.source).get("uri", "")
        yield f"{use}: {given.dataset.name}, digest {given.dataset.digest[:12]}, {place}"


def _lines(run: Ancestor) -> list[str]:
    ap = f", AP {run.ap:.3f}" if run.ap is not None else ""
    said = [*(f"model {version}" for version in run.versions), *([f"code {run.commit[:12]}"] if run.commit else [])]
    said += [*run.data, f"began with {run.began_with}" if run.began_with else "began from scratch"]
    below = [[text] for text in said] + ([_lines(run.parent)] if run.parent is not None else [])
    lines = [f"{run.name}  ({run.run_id}, {run.status.lower()}{ap})"]
    for number, (first, *rest) in enumerate(below, start=1):
        last = number == len(below)
        lines.append(f"{'└─' if last else '├─'} {first}")
        lines += [f"{' ' if last else '│'}  {line}" for line in rest]
    return lines
