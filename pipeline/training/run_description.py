"""Description of a run in MLflow: the parameters that people compare, tags, data sets, and a note."""

import posixpath
from typing import Any

from pipeline import provenance
from pipeline.config import Experiment
from pipeline.config_files import check, dump, dump_shareable, flatten
from pipeline.data.shards.manifest import ShardSet
from pipeline.tracking.settings import Scalar
from pipeline.tracking.tracker import DatasetInput
from pipeline.training.context import TrainJob
from pipeline.wording import plural

NOTE = "mlflow.note.content"  # tag: MLflow renders it as Markdown on the page of the run
# Parameters of every run; any other is logged where it differs from its default. The file experiment.yaml has all of them.
COMPARED = (
    "seed",
    "model.variant",
    "model.input_size",
    "model.regression",
    "model.reg_max",
    "model.reg_scale",
    "model.num_queries",
    "loss.fgl",
    "loss.ddf",
    "loss.ddf_temperature",
    "numerics.precision",
)
# Tags, the note or the data sets have these.
NO_PARAMETERS = ("name", "storage", "data.train", "data.val", "tracking.", "checkpoints.", "evaluation.num_images")


def chosen_params(job: TrainJob) -> dict[str, Scalar]:
    """Parameters that a person chose or would compare, about thirty; the schedule's as derived."""
    experiment, schedule = job.experiment, job.schedule
    given = flatten(dump_shareable(experiment))
    least = {"data": {"train": "any"}, "model": {"variant": experiment.model.variant}, "schedule": {"epochs": 1}}
    defaults = flatten(dump(check(Experiment, least, source="defaults")))
    params = {
        key: value
        for key, value in given.items()
        if key in COMPARED or (value != defaults.get(key) and not key.startswith(NO_PARAMETERS))
    }
    derived: dict[str, Scalar] = {
        "schedule.epochs": round(schedule.epochs, 2),
        "schedule.steps": schedule.steps,
        "schedule.global_batch_size": schedule.global_batch_size,
        "schedule.micro_batch_size": schedule.micro_batch_size,
        "schedule.warmup_steps": schedule.warmup_steps,
        "schedule.min_lr_ratio": schedule.min_lr_ratio,
        "optimizer.lr": schedule.optimizer.lr,
        "optimizer.backbone_lr": schedule.optimizer.backbone_lr,
        "optimizer.weight_decay": schedule.optimizer.weight_decay,
        "ema.decay": schedule.ema_decay,
        "model.num_classes": len(job.data.train.categories),
        "data.images": job.data.train.images,
    }
    return dict(sorted({**params, **derived}.items()))


def run_tags(job: TrainJob, parent: dict[str, str]) -> dict[str, str]:
    """Tags of a run, one for each fact.

    Args:
        parent: source of the initial weights.
    """
    tags = {
        "run_folder": job.run,
        **{f"digest.{use}": digest for use, digest in job.data.digests().items()},
        **{f"parent.{key}": value for key, value in parent.items()},
        **{f"version.{key}": value for key, value in provenance.versions().items()},
        **job.experiment.tracking.tags,
    }
    if commit := provenance.code_commit():
        tags["mlflow.source.git.commit"] = commit
    if job.ray_job:
        tags["ray.job"] = job.ray_job
    return tags


def run_note(job: TrainJob, numbers: dict[str, float] | None = None) -> str:
    """Markdown that introduces a run: result, model and schedule, data, command.

    Args:
        numbers: COCO's numbers of the best weights, once the run is finished.
    """
    experiment, schedule = job.experiment, job.schedule
    side = " x ".join(map(str, experiment.model.config(1, experiment.loss).input_size))
    lines = [
        f"D-FINE-{experiment.model.variant.upper()} at {side}: {schedule.epochs:.4g} epochs,"
        f" {schedule.steps:,} steps of {plural(schedule.global_batch_size, 'image')}"
        + (f", from `{experiment.init}`" if experiment.init else ", from random weights"),
        *(
            f"{use}: {dataset_name(shards)}, {plural(shards.manifest.images, 'image')}"
            f" with {plural(shards.manifest.boxes, 'box')} of {plural(len(shards.manifest.categories), 'class')}, `{shards.uri}`"
            for use, shards in (
                *(("Training", each.shards) for each in job.data.train.sets),
                *([("Validation", job.data.val)] if job.data.val else []),
            )
        ),
    ]
    if numbers is not None:
        shown = ", ".join(f"{name} {numbers[name]:.3f}" for name in ("AP", "AP50", "AP75"))
        lines.insert(0, f"**{shown}** with the best weights")
    if job.command:
        lines.append(f"`{job.command}`")
    return "\n\n".join(lines)


def dataset_name(shards: ShardSet) -> str:
    """Set and split of a shard set: coco/train2017 for .../coco/train2017 and for .../coco with this split."""
    folder = posixpath.normpath(shards.uri.partition("://")[2] or shards.uri)
    if folder.endswith(".json"):
        folder = posixpath.dirname(folder)
    parent, last = posixpath.split(folder)
    split = shards.manifest.split
    return f"{posixpath.basename(parent) or last}/{last}" if last == split else f"{last}/{split}"


def dataset_input(shards: ShardSet, context: Any) -> DatasetInput:
    """Describe a shard set as an MLflow data set."""
    return DatasetInput(name=dataset_name(shards), digest=shards.manifest.digest, uri=shards.uri, context=context)
