"""What a run would do, without doing it: `jobs.train --dry-run`."""

from collections.abc import Iterator

import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from dfine_core import Detector, ModelConfig, Targets
from dfine_core.denoising import draw_for
from dfine_core.optim import parameter_groups
from pipeline.config import Cluster, Experiment, dump
from pipeline.data.manifest import Manifest, load_shards
from pipeline.training.schedule import Schedule, derive

STATE_VALUES = 5  # for each parameter: itself, its gradient, two moments, its average
FLOAT_BYTES = 4


def preview(experiment: Experiment, cluster: Cluster) -> str:
    shards = load_shards(experiment.data.train)
    val = load_shards(experiment.data.val) if experiment.data.val else None
    workers = cluster.workers or max(1, torch.cuda.device_count())
    most = workers[1] if isinstance(workers, tuple) else workers
    schedule = derive(experiment, images=shards.manifest.images, workers=most)
    config = experiment.model.config(len(shards.manifest.categories), experiment.loss)
    sections = {
        "experiment, resolved": yaml.safe_dump(dump(experiment), sort_keys=False, default_flow_style=None, width=120),
        "data": "\n".join(_data_lines(shards.manifest) + (_data_lines(val.manifest) if val else ["val: none"])),
        f"schedule for {most} worker(s), each with {schedule.accumulation(most)} micro-batch(es) of"
        f" {schedule.micro_batch} images a step": "\n".join(schedule.lines()),
        "parameters": "\n".join(_parameter_lines(config, schedule)),
        "memory of a worker": "\n".join(_memory_lines(config, schedule, shards.manifest)),
    }
    return "\n\n".join(f"# {title}\n{text.rstrip()}" for title, text in sections.items())


def _data_lines(manifest: Manifest) -> list[str]:
    statistics = manifest.statistics
    sizes = statistics.box_sizes
    rare = sorted(zip(statistics.class_counts, (c.name for c in manifest.categories), strict=True))[:3]
    crowded = statistics.most_crowded
    return [
        f"{manifest.split}: {manifest.images} images, {manifest.boxes} boxes of {len(manifest.categories)} classes,"
        f" digest {manifest.digest[:12]}",
        f"  {statistics.boxes_per_image.mean:.1f} boxes an image, {statistics.images_without_boxes} images without, most crowded:"
        f" {crowded.boxes} in {crowded.file_name}",
        f"  {sizes.small} small, {sizes.medium} medium, {sizes.large} large boxes; rarest classes:"
        f" {', '.join(f'{name} ({count})' for count, name in rare)}",
    ]


def _parameter_lines(config: ModelConfig, schedule: Schedule) -> Iterator[str]:
    with torch.device("meta"):
        groups = parameter_groups(Detector(config), schedule.optimizer)
    yield f"{'group':20}{'tensors':>10}{'values':>14}{'rate':>12}{'decay':>12}"
    for group in groups:
        values = sum(p.numel() for p in group["params"])
        yield f"{group['name']:20}{len(group['params']):>10}{values:>14,}{group['lr']:>12g}{group['weight_decay']:>12g}"


def _memory_lines(config: ModelConfig, schedule: Schedule, manifest: Manifest) -> list[str]:
    crowded = manifest.statistics.most_crowded.boxes
    state, kept = estimated_bytes(config, schedule.micro_batch, crowded)
    return [
        f"{(state + kept) / 2**30:.1f} GiB in fp32, if all {schedule.micro_batch} images are as crowded as the most crowded one"
        f" ({crowded} boxes):",
        f"  {state / 2**30:.2f} GiB weights, gradients, moments and averaged weights",
        f"  {kept / 2**30:.2f} GiB kept from the forward pass for the backward pass; about 0.6 of it in bf16",
        "  besides: PyTorch and its libraries, batches that wait, what the losses need",
    ]


def estimated_bytes(config: ModelConfig, micro_batch: int, boxes: int) -> tuple[int, int]:
    """Bytes of the state, and of what the forward pass keeps, found by running it on tensors without content.

    Args:
        boxes: of every image; they set how many denoising queries there are.
    """
    target = {"labels": torch.zeros(boxes, dtype=torch.int64), "boxes": torch.full((boxes, 4), 0.5)}
    targets = Targets.pack([target] * micro_batch, config.num_classes, torch.device("cpu"))
    denoising = draw_for(config, targets)
    detector = Detector(config).train()
    parameters = sum(p.numel() for p in detector.parameters())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state: dict[str, Tensor] = {
        name: mode.from_tensor(t) for name, t in (*detector.named_parameters(), *detector.named_buffers())
    }
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}
    kept: dict[int, tuple[Tensor, int]] = {}  # by storage, which stays alive so that its place is not taken by another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        images = torch.empty(micro_batch, 3, *config.input_size)
        functional_call(detector, state, (images, targets, denoising or False))
    return parameters * STATE_VALUES * FLOAT_BYTES, sum(size for _, size in kept.values())
