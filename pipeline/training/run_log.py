"""What a run leaves behind besides checkpoints: params, metrics and pictures in MLflow, reports and results in its folder."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import save as tensors_to_bytes

from dfine_core import Detector, ModelConfig
from dfine_core.images import open_image
from pipeline import provenance, storage
from pipeline.config import Experiment
from pipeline.config_files import dump
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.stream.batch import Batch
from pipeline.evaluation.report import EvaluationReport
from pipeline.tracking.model import log_detector
from pipeline.tracking.names import Scalar, flatten
from pipeline.tracking.tracker import DatasetInput, Tracker
from pipeline.training import checkpoint
from pipeline.training.run_dir import RESULT
from pipeline.training.schedule import Schedule
from pipeline.training.stage_two import Standing

SOURCE = "jobs/train.py"


def plain(config: ModelConfig) -> dict[str, Any]:
    """As JSON has it."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return content


def begin(
    tracker: Tracker,
    run: str,
    experiment: Experiment,
    schedule: Schedule,
    shards: ShardSet,
    val: ShardSet | None,
    parent: dict[str, str],
    ray_job: str | None,
) -> None:
    params = flatten(dump(experiment))
    params |= flatten({"derived": asdict(schedule)})
    params["model.num_classes"] = len(shards.manifest.categories)
    tags = {
        "variant": experiment.model.variant,
        "data": shards.manifest.split,
        "run_folder": run,
        "digest.train": shards.manifest.digest,
        **({"digest.val": val.manifest.digest} if val else {}),
        **{f"parent.{key}": value for key, value in parent.items()},
        "dfine.run": run,
        **{f"version.{key}": value for key, value in provenance.versions().items()},
        **experiment.tracking.tags,
    }
    if commit := provenance.code_commit():
        tags["mlflow.source.git.commit"] = commit
    if ray_job:
        tags["ray.job"] = ray_job
    datasets = [dataset(shards, "training"), *([dataset(val, "validation")] if val else [])]
    tracker.begin(params, tags, datasets, SOURCE, parent)
    tracker.text(yaml.safe_dump(dump(experiment), sort_keys=False), "experiment.yaml")


def dataset(shards: ShardSet, context: Any) -> DatasetInput:
    digest = shards.manifest.digest
    return DatasetInput(name=shards.manifest.split, digest=digest, uri=storage.absolute(shards.uri), context=context)


def memory(device: torch.device) -> dict[str, float]:
    """Of this worker, in GiB: the device's high mark, or the process where that is the device."""
    if device.type == "cuda":
        used, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return {"system/memory_gib": most / 2**30, "system/memory_now_gib": used / 2**30}
    return {"system/memory_gib": psutil.Process().memory_info().rss / 2**30}


def keep_evaluation(
    report: EvaluationReport,
    pictures: Iterable[tuple[str, bytes]],
    tracker: Tracker | None,
    folder: str,
    *,
    step: int,
    final: bool,
) -> None:
    """The report in the run's folder, and what people look at in MLflow.

    Args:
        pictures: PNG by name.
    """
    report.write(folder)
    if tracker is not None:
        tracker.metrics(report.metrics("final" if final else "val"), step)
        if final:
            for name, figure in report.figures().items():
                tracker.figure(figure, f"evaluation/{name}.png")
            columns: dict[str, list[Scalar]] = {
                "class": [c.name for c in report.per_class],
                "AP": [c.ap for c in report.per_class],
                "boxes": [c.boxes for c in report.per_class],
            }
            tracker.table(columns, "evaluation/per_class.json")
    for name, picture in pictures:
        storage.write_atomic(storage.join(folder, f"{name.replace('/', '_')}.png"), picture)
        if tracker is not None:
            tracker.image(name, open_image(picture), step)


def finish(
    run: str,
    tracker: Tracker | None,
    detector: Detector,
    shards: ShardSet,
    report: EvaluationReport | None,
    standing: Standing,
    experiment: Experiment,
    step: int,
    latency_ms: float | None = None,
) -> None:
    """The result, in the run's folder and in MLflow.

    Args:
        detector: the best averaged weights.
    """
    result = {
        "step": step,
        "best_step": standing.best_step,
        "numbers": report.numbers if report else None,
        "evaluated": standing.evaluated,
        "latency_ms": latency_ms,
    }
    storage.write_atomic(storage.join(run, RESULT), json.dumps(result, indent=1).encode())
    if tracker is None:
        return
    if latency_ms is not None:
        tracker.metrics({"final/latency_ms": latency_ms}, step)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "detector.safetensors")
        weights.write_bytes(checkpoint.weights_as_bytes(detector))
        log_detector(
            tracker,
            config=detector.config,
            weights=weights,
            categories=[category.name for category in shards.manifest.categories],
            metrics=report.metrics("final") if report else {},
            example=_an_image(shards),
            step=step,
            register_as=experiment.tracking.register_as,
            alias=experiment.tracking.alias,
        )
    tracker.finish("FINISHED")


def _an_image(shards: ShardSet) -> bytes:
    (group, *_) = read_row_groups(locate_row_groups(shards), [0]).values()
    image: bytes = group.column("image")[0].as_py()
    return image


# Steps that were not finite


def save_not_finite(run: str, step: int, rank: int, batches: Sequence[Batch], detector: Detector) -> str:
    """A worker's micro-batches of a step, and the weights that it was made with; the folder of all workers'."""
    folder = storage.join(storage.join(run, "not_finite"), checkpoint.folder_name(step))
    tensors: dict[str, torch.Tensor] = {}
    for batch in batches:
        named = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        named["counts"] = torch.tensor(batch.counts)
        named["padding"] = torch.tensor(batch.padding)
        tensors |= {f"{batch.micro_batch}/{name}": value.cpu().contiguous().clone() for name, value in named.items()}
    storage.write_atomic(storage.join(folder, f"rank-{rank}.safetensors"), tensors_to_bytes(tensors))
    if rank == 0:
        storage.write_atomic(storage.join(folder, "model.safetensors"), checkpoint.weights_as_bytes(detector))
        about = {"step": step, "model": plain(detector.config)}
        storage.write_atomic(storage.join(folder, "about.json"), json.dumps(about, indent=1).encode())
    return folder
