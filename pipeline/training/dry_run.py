"""Plan of a run, printed without starting it: `jobs.train --dry-run`."""

from collections.abc import Iterator

import torch
import yaml

from dfine_core import Detector, ModelConfig
from dfine_core.optim import parameter_groups
from dfine_core.parts import BACKBONE, DEPTH, part_of
from pipeline.config import Cluster, Experiment
from pipeline.config_files import dump_shareable
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.data.shards.training_set import TrainingSet
from pipeline.mlflow_access import is_mlflow_uri
from pipeline.pretrained import HUB_SCHEME, describe, is_published
from pipeline.training.activation import with_activation
from pipeline.training.budget import budget_lines, estimated_bytes, launch_cost
from pipeline.training.context import ResolvedData, resolve_data
from pipeline.training.schedule import Schedule, derive
from pipeline.training.start_checks import refuse_failing_start
from pipeline.training.teachers.checks import with_teachers
from pipeline.wording import plural


def preview(experiment: Experiment, cluster: Cluster, *, measured: bool = True) -> str:
    """Describe the resolved experiment, data, schedule, parameters, memory and time.

    Args:
        measured: time training steps on this machine, and extrapolate.

    Raises:
        UserError: the start would fail.
    """
    data = with_teachers(experiment, resolve_data(experiment.data))
    for shards in data.shard_sets():
        refuse_changed_files(shards)
    train = data.train
    workers = cluster.workers or max(1, torch.cuda.device_count())
    most = workers[1] if isinstance(workers, tuple) else workers
    schedule = derive(experiment, images=train.images_in_epoch, workers=most)
    boxes = round(train.statistics.boxes_per_image.mean)
    seen = schedule.steps * schedule.global_batch_size
    init = experiment.init
    notes: list[str] = []
    if init and not is_mlflow_uri(init) and not init.startswith(HUB_SCHEME):  # a dry run fetches nothing
        experiment, notes = with_activation(experiment)
    config = experiment.model.config(len(train.categories), experiment.loss)
    start = refuse_failing_start(experiment, data, config)
    sections = {
        **({"initial weights": "\n".join(describe(init))} if init and is_published(init) else {}),
        "experiment, resolved": yaml.safe_dump(
            dump_shareable(experiment), sort_keys=False, default_flow_style=None, width=120
        ),
        "data": "\n".join(
            [
                *(line for shards in data.shard_sets() for line in _data_lines(shards.manifest)),
                *([] if data.val else ["val: none"]),
                *data.lines(),
            ]
        ),
        f"schedule for {plural(most, 'worker')}, {plural(schedule.micro_batches, 'micro-batch')} of"
        f" {plural(schedule.micro_batch_size, 'image')} a step": "\n".join(
            [*schedule.lines(evaluates=data.val is not None), *notes]
        ),
        "parameters": "\n".join(_parameter_lines(config, schedule)),
        **({"teachers": _teacher_text(experiment, data, config, measured)} if experiment.teacher.in_use else {}),
        "memory of a worker": "\n".join(_memory_lines(config, schedule, train)),
        "disk": "\n".join(start),
        "time": "\n".join(
            [
                *budget_lines(config, seen, most, boxes=boxes, measured=measured),
                *filter(None, launch_cost(config, schedule, most, boxes=boxes)),
            ]
        ),
    }
    return "\n\n".join(f"# {title}\n{text.rstrip()}" for title, text in sections.items())


def _teacher_text(experiment: Experiment, data: ResolvedData, config: ModelConfig, measured: bool) -> str:
    from pipeline.training.teachers.cost import teacher_lines  # here: few runs have a teacher

    return "\n".join(teacher_lines(experiment, data, config, measured=measured))


def _data_lines(manifest: Manifest) -> list[str]:
    statistics = manifest.statistics
    sizes = statistics.box_sizes
    rare = sorted(zip(statistics.class_counts, (c.name for c in manifest.categories), strict=True))[:3]
    crowded = statistics.most_crowded
    return [
        f"{manifest.split}: {plural(manifest.images, 'image')}, {plural(manifest.boxes, 'box')} of"
        f" {plural(len(manifest.categories), 'class')}, digest {manifest.digest[:12]}",
        f"  {statistics.boxes_per_image.mean:.1f} boxes an image, {plural(statistics.images_without_boxes, 'image')} without,"
        f" most crowded: {crowded.boxes} in {crowded.file_name}",
        f"  {sizes.small} small, {sizes.medium} medium, {sizes.large} large boxes; rarest classes:"
        f" {', '.join(f'{name} ({count})' for count, name in rare)}",
    ]


def _parameter_lines(config: ModelConfig, schedule: Schedule) -> Iterator[str]:
    """Table of all parameters by group and part, from the head to the image."""
    with torch.device("meta"):
        detector = Detector(config)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    yield f"{'group':20}{'part':18}{'tensors':>8}{'values':>14}{'rate':>12}{'decay':>12}  frozen"
    for group in parameter_groups(detector, schedule.optimizer):
        for part in DEPTH:
            sizes = [p.numel() for p in group["params"] if part_of(names[id(p)]) == part]
            if sizes:
                yield (
                    f"{group['name']:20}{part:18}{len(sizes):>8}{sum(sizes):>14,}{group['lr']:>12g}"
                    f"{group['weight_decay']:>12g}  {schedule.freezing.until(part) or 'no'}"
                )
    for part in BACKBONE[::-1]:
        sizes = [p.numel() for name, p in detector.named_parameters() if part_of(name) == part and not p.requires_grad]
        if sizes:
            yield f"{'none':20}{part:18}{len(sizes):>8}{sum(sizes):>14,}{'':24}  always (model.freeze_at)"


def _memory_lines(config: ModelConfig, schedule: Schedule, train: TrainingSet) -> list[str]:
    crowded = train.statistics.most_crowded.boxes
    frozen = schedule.freezing.at(schedule.steps)  # those that never thaw
    state, kept = estimated_bytes(config, schedule.micro_batch_size, crowded, frozen=frozen)
    return [
        f"{(state + kept) / 2**30:.1f} GiB in fp32, if all {schedule.micro_batch_size} images are as crowded as the most"
        f" crowded one ({plural(crowded, 'box')}):",
        f"  {state / 2**30:.2f} GiB weights, gradients, moments and averaged weights",
        f"  {kept / 2**30:.2f} GiB kept from the forward pass for the backward pass; about 0.6 of it in bf16",
        "  besides: PyTorch and its libraries, batches that wait, what the losses need",
    ]
