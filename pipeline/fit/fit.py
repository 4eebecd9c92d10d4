"""From a folder of annotated images to a detector: what a person would do with eight commands, in one.

OUT/fit.json       folder and values that the fit was started with
OUT/source.json    the files of the folder, to notice changes
OUT/shards/        the prepared data          OUT/doctor.html    what the doctor found in it
OUT/fit.yaml       the experiment, with the reason for every choice
OUT/training/      the run: checkpoints, evaluations, thresholds
OUT/exported/      detector.onnx and export.json
OUT/report.html    the page of results

Every step is skipped where its result is there, so that the same call goes on. Where the data have changed, it starts over: in
place before the training, and in OUT/round-2, OUT/round-3, … after it, with the same files there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dfine_core.inference import LoadedDetector
from pipeline import storage
from pipeline.config import Cluster, Experiment
from pipeline.config_files import load_experiment
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.export.check_images import from_shards
from pipeline.export.export import REPORT_FILE, ExportResult, export
from pipeline.export.formats import FORMATS
from pipeline.export.source import ExportSource
from pipeline.fit.choices import choose, table
from pipeline.fit.machine import data_facts, this_machine
from pipeline.fit.plan import available_weights, experiment_yaml
from pipeline.fit.prepared import SHARDS, FitError, FoundSplits, PreparedData, find_splits, prepare_parts
from pipeline.fit.source_record import SourceRecord, changes, digest, read_record, read_source
from pipeline.fit.values import RUN_NAME
from pipeline.open_detector import open_detector
from pipeline.output_folder import refuse_foreign_folder
from pipeline.run_report.write import write_report
from pipeline.training.budget import seconds_per_image
from pipeline.training.launch import launch
from pipeline.training.run_dir import RunFinishedError

START, SOURCE, EXPERIMENT, EXPORTED, REPORT = "fit.json", "source.json", "fit.yaml", "exported", "report.html"
ROUND = "round-"  # begins the folders of later rounds, in which the data are others
FORMAT = "onnx"
CHECKED_IMAGES = 50


@dataclass(frozen=True)
class FitRequest:
    """Arguments of a fit."""

    folder: Path  # absolute
    out: Path
    given: Mapping[str, Any]  # values of the experiment by dotted key, which are not chosen
    split: str | None = None  # NAME=SHARE
    cluster: Cluster | None = None
    round: int = 1  # counts up where the data change after a training

    @property
    def results(self) -> Path:
        """Folder of this round's results."""
        return self.out if self.round == 1 else self.out / f"{ROUND}{self.round}"

    @property
    def source_file(self) -> Path:
        """Record of the files that this round was made from."""
        return self.results / SOURCE

    @property
    def experiment_file(self) -> Path:
        """YAML file that the training uses."""
        return self.results / EXPERIMENT

    @property
    def run(self) -> str:
        """Folder of the run."""
        return str(self.results / RUN_NAME)


def plan_fit(request: FitRequest) -> tuple[FitRequest, Experiment]:
    """Prepare the data and choose the experiment, unless that is done; the request names the round that goes on.

    Raises:
        UserError: the folder cannot be used, or the doctor found errors.
    """
    _claim(request)
    splits = find_splits(request.folder, request.split)
    request, record = round_of(request, splits)
    if request.experiment_file.exists():
        print(f"going on with {request.experiment_file}", flush=True)
        return request, load_experiment(request.experiment_file)
    seed = int(request.given.get("seed", 0))
    from pipeline.ray_cluster import start_ray, stop_own_ray  # Ray takes seconds, and a second call needs none

    start_ray()
    prepared = prepare_parts(splits.parts(seed), str(request.results), seed=seed)
    stop_own_ray()
    text = _choose(request, prepared).encode()
    _write_record(request, record.model_copy(update={"experiment_digest": digest(text)}))
    storage.write_atomic(request.experiment_file, text)
    return request, load_experiment(request.experiment_file)


def round_of(request: FitRequest, splits: FoundSplits) -> tuple[FitRequest, SourceRecord]:
    """Latest round, or a new one if the data have changed since; the record of the data is written."""
    while (later := replace(request, round=request.round + 1)).source_file.exists():
        request = later
    before = read_record(request.source_file)
    now = read_source(splits.sources, before)
    if before is None and request.experiment_file.exists():
        print(f"{request.source_file} is missing: data that have changed since then are not noticed", flush=True)
    if before is not None and (changed := changes(before, now)):
        lines = "".join(f"\n  {line}" for line in changed)
        print(f"{request.folder} has changed since {request.results} was made:{lines}", flush=True)
        if _can_be_replaced(request, before):
            _start_over(request)
            print("the data are prepared again", flush=True)
        else:
            print(f"a new training begins in {later.results}; {request.results} stays as it is", flush=True)
            request = later
        now = now.model_copy(update={"experiment_digest": None})
    _write_record(request, now)
    return request, now


def run_fit(request: FitRequest, experiment: Experiment) -> bool:
    """Train, export, write the page of results, and print what comes next; False if the export was refused."""
    assert experiment.data.val is not None
    val = load_shards(experiment.data.val)

    # 1. Train; thresholds are measured by the last evaluation.
    try:
        print(launch(experiment, request.cluster).summary(), flush=True)
    except RunFinishedError:
        print(f"the training is finished: {request.run}", flush=True)

    # 2. Export, and the page of results.
    loaded = open_detector(request.run)
    accepted = _export(request, loaded, val)
    page = write_report(request.run, str(request.results / REPORT), val=val)
    print(_ending(request, page), flush=True)
    return accepted


def _claim(request: FitRequest) -> None:
    """Note what the fit was started with; once its experiment is written, the folder takes no other one."""
    start = request.out / START
    refuse_foreign_folder(str(request.out), START, "fit")
    content = {"folder": str(request.folder), "given": dict(request.given), "split": request.split}
    if not request.experiment_file.exists():  # of the first round
        storage.write_atomic(start, json.dumps(content, indent=1).encode())
        return
    before = storage.read_json(start, *content)
    if changed := [f"{key} {before[key]!r}" for key, value in content.items() if before[key] != value]:
        raise FitError(
            f"{request.out} holds a fit with other values ({', '.join(changed)}): choose another --out, or train again with"
            f" dfine train {request.experiment_file} --name NAME --set KEY=VALUE"
        )


def _can_be_replaced(request: FitRequest, record: SourceRecord) -> bool:
    """True before the training, unless the user has changed the experiment."""
    if Path(request.run).exists():
        return False
    file = request.experiment_file
    return not file.exists() or digest(file.read_bytes()) == record.experiment_digest


def _start_over(request: FitRequest) -> None:
    request.experiment_file.unlink(missing_ok=True)
    if (shards := request.results / SHARDS).exists():
        storage.remove_folder(shards)


def _write_record(request: FitRequest, record: SourceRecord) -> None:
    storage.write_atomic(request.source_file, record.model_dump_json(indent=1).encode())


def _choose(request: FitRequest, prepared: PreparedData) -> str:
    machine, facts = this_machine(), data_facts(prepared.report)
    choices = choose(
        facts,
        machine,
        request.given,
        weights=available_weights,
        seconds_per_image=lambda config: seconds_per_image(config, round(facts.boxes_per_image), torch.device("cpu")),
    )
    print(f"on {machine}:\n{table(choices)}", flush=True)
    return experiment_yaml(str(request.results), prepared.train, prepared.val, choices, request.given)


def _export(request: FitRequest, loaded: LoadedDetector, val: ShardSet) -> bool:
    """Export through the gate, unless the very weights were exported before; False if the file was refused."""
    out = request.results / EXPORTED
    if (out / REPORT_FILE).exists() and (out / FORMATS[FORMAT].file).exists():
        before = storage.read_json(out / REPORT_FILE, "weights_sha256")
        if before["weights_sha256"] == ExportSource(loaded).digest:
            print(f"exported before: {out / FORMATS[FORMAT].file}", flush=True)
            return True
    result: ExportResult = export(loaded, [FORMAT], out, from_shards(val, CHECKED_IMAGES))
    print(result.table(), flush=True)
    return result.accepted


def _ending(request: FitRequest, page: str) -> str:
    lines = [
        f"page of results: {page}",
        "what comes next:",
        f"  dfine serve {request.run}",
        f"  dfine predict {request.run} PHOTOS --out found",
        f"  dfine train {request.experiment_file} --name longer --set schedule.epochs=N",
    ]
    return "\n".join(lines)
