"""Time of matching and losses, compared with a plain per-layer, per-image version with equal results.

    python -m benchmarks.criterion                      L, batch 8, 300 queries, 20 objects per image, 80 classes
    python -m benchmarks.criterion --objects 100 --rounds 5

Both versions run alternately on the same output of a detector in training, forward and backward. Times are medians over
the rounds. Parts are timed in separate rounds; an accelerator is synchronised before and after each part.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.plain_criterion import plain_criterion
from dfine_core import Criterion, ModelConfig
from dfine_core.model import denoising
from dfine_core.structures import DenoisingQueries, DetectorOutput, QueryPredictions, Targets

Losses = Callable[[], dict[str, Tensor]]
PARTS = {  # parts of matching and their functions
    "cost": "dfine_core.loss.matching.matching_cost",
    "assignment": "dfine_core.loss.matching.solve",
    "union": "dfine_core.loss.matching.go_union",
    "matching": "dfine_core.loss.criterion.match",
}


@dataclass(frozen=True)
class Example:
    """Inputs of the loss in one training step, built from leaf tensors with gradients."""

    output: DetectorOutput
    targets: list[dict[str, Tensor]]
    leaves: dict[str, Tensor]


def random_example(
    config: ModelConfig, counts: Sequence[int], *, device: str = "cpu", with_denoising: bool = True, seed: int = 0
) -> Example:
    """Random outputs: queries approach boxes of their image layer by layer, and scores reflect their distance.

    Some layers aim at another box, so that matchings of layers differ.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = random_targets(counts, config.num_classes, generator)
    denoising_queries = _draw(config, targets, generator) if with_denoising else None
    noised = 0 if denoising_queries is None else denoising_queries.labels.shape[1]
    leaves = _predictions(config, targets, noised, generator)
    leaves = {name: leaf.contiguous().to(device).requires_grad_() for name, leaf in leaves.items()}
    every_query = QueryPredictions(
        logits=leaves["logits"],
        boxes=leaves["boxes"],
        edge_logits=leaves["edge_logits"] if config.regression == "fdr" else None,
        initial_logits=leaves["initial_logits"],
        initial_boxes=leaves["initial_boxes"],
    )
    denoised, matching = every_query.split(noised)
    output = DetectorOutput(
        logits=matching.logits[-1],
        boxes=matching.boxes[-1],
        matching=matching,
        denoising=denoised if with_denoising else None,
        denoising_queries=None if denoising_queries is None else _on(denoising_queries, device),
        encoder_logits=leaves["encoder_logits"],
        encoder_boxes=leaves["encoder_boxes"],
    )
    return Example(output, [{name: x.to(device) for name, x in target.items()} for target in targets], leaves)


def random_targets(counts: Sequence[int], num_classes: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Random boxes cxcywh inside the image, with sides between 2 % and 70 % of it."""
    made = []
    for count in counts:
        size = 0.02 * 35 ** torch.rand(count, 2, generator=generator)
        centre = size / 2 + torch.rand(count, 2, generator=generator) * (1 - size)
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        made.append({"labels": labels, "boxes": torch.cat([centre, size], dim=1)})
    return made


def _predictions(
    config: ModelConfig, targets: list[dict[str, Tensor]], noised: int, generator: torch.Generator
) -> dict[str, Tensor]:
    batch, queries = len(targets), noised + config.num_queries
    stages = config.num_layers + 2  # encoder, initial box, layers

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    aim = (0.25 + torch.rand(batch, queries, 4, generator=generator) / 2).repeat(stages, 1, 1, 1)
    label = torch.randint(0, config.num_classes, (batch, queries, 1), generator=generator).repeat(stages, 1, 1, 1)
    for image, target in enumerate(targets):
        if count := len(target["labels"]):
            other = torch.rand(stages, queries, generator=generator) < 0.2
            box = (torch.arange(queries) + other) % count
            aim[:, image], label[:, image, :, 0] = target["boxes"][box], target["labels"][box]

    distance = 0.02 * 50 ** torch.rand(batch, queries, 1, generator=generator)  # 2 % to 100 % of the box's side
    far = distance * torch.linspace(1, 0.5, stages).view(-1, 1, 1, 1)  # [stages, B, Q, 1]
    centre = aim[..., :2] + far * aim[..., 2:] * noise(stages, batch, queries, 2)
    size = aim[..., 2:] * torch.exp(far * noise(stages, batch, queries, 2))
    boxes = torch.cat([centre, size], dim=-1)
    logits = noise(stages, batch, queries, config.num_classes) - 5
    logits.scatter_add_(-1, label, 5 * torch.exp(-far))
    return {
        "encoder_logits": logits[0, :, noised:],
        "encoder_boxes": boxes[0, :, noised:],
        "initial_logits": logits[1],
        "initial_boxes": boxes[1],
        "logits": logits[2:],
        "boxes": boxes[2:],
        "edge_logits": noise(config.num_layers, batch, queries, 4, config.num_bins).cumsum(0),
    }


def _draw(config: ModelConfig, targets: list[dict[str, Tensor]], generator: torch.Generator) -> DenoisingQueries:
    return denoising.sample_queries(
        Targets.pack(targets, config.num_classes, torch.device("cpu")),
        num_classes=config.num_classes,
        num_queries=config.num_queries,
        num_denoising=config.num_denoising,
        label_noise_ratio=config.label_noise_ratio,
        box_noise_scale=config.box_noise_scale,
        generator=generator,
    )


def _on(queries: DenoisingQueries, device: str) -> DenoisingQueries:
    tensors = {f.name: getattr(queries, f.name) for f in fields(queries) if f.name != "groups"}
    return replace(queries, **{name: tensor.to(device) for name, tensor in tensors.items()})


def gradients(example: Example, losses: Losses) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss terms, and the gradient of their sum with respect to every leaf; 0 for unused leaves."""
    terms = losses()
    total = torch.stack(list(terms.values())).sum()
    leaves = example.leaves
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return terms, dict(zip(leaves, found, strict=True))


@dataclass(frozen=True)
class Clock:
    device: str
    cpu_time: bool = False  # CPU time of all threads instead of wall time

    def __call__(self) -> float:
        """Current time in seconds, after synchronising the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.perf_counter()


def timed_step(example: Example, losses: Losses, now: Clock) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    start = now()
    total = torch.stack(list(losses().values())).sum()
    middle = now()
    torch.autograd.grad(total, list(example.leaves.values()), allow_unused=True)
    return 1e3 * (middle - start), 1e3 * (now() - middle)


@contextmanager
def timed_parts(now: Clock) -> Iterator[dict[str, float]]:
    """Context that sums the milliseconds spent in each part."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = now()
            result = function(*args)
            spent[part] += 1e3 * (now() - start)
            return result

        return call

    with ExitStack() as stack:
        for part, path in PARTS.items():
            module, name = path.rsplit(".", 1)
            stack.enter_context(patch(path, timed(part, getattr(__import__(module, fromlist=[name]), name))))
        yield spent


def part_times(example: Example, losses: Losses, now: Clock) -> dict[str, float]:
    with timed_parts(now) as spent:
        forward, backward = timed_step(example, losses, now)
    inside = spent["cost"] + spent["assignment"] + spent["union"]
    return {
        "cost": spent["cost"],
        "copies": spent["matching"] - inside,
        "assignment": spent["assignment"],
        "union": spent["union"],
        "losses": forward - spent["matching"],
        "backward": backward,
    }


def largest_difference(terms: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert terms.keys() == expected.keys()
    ours, theirs = (torch.stack([losses[name].detach() for name in expected]) for losses in (terms, expected))
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-6)).max())


def report(config: ModelConfig, counts: Sequence[int], now: Clock, rounds: int) -> None:
    device = now.device
    example = random_example(config, counts, device=device)
    criterion = Criterion(config).to(device)

    def ours() -> dict[str, Tensor]:
        return criterion(example.output, example.targets)

    def plain() -> dict[str, Tensor]:
        return plain_criterion(config, example.output, example.targets)

    difference = largest_difference(gradients(example, ours)[0], gradients(example, plain)[0])  # also warms up
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    parts = []
    for _ in range(rounds):
        times["plain"].append(timed_step(example, plain, now))
        times["ours"].append(timed_step(example, ours, now))
        parts.append(part_times(example, ours, now))

    print(f"{device}: {len(counts)} images, {config.num_queries} queries, {counts[0]} objects in each image,")
    print(
        f"  {config.num_classes} classes, {config.num_layers} layers; {torch.get_num_threads()} CPU threads,"
        f" {'CPU' if now.cpu_time else 'wall'} time"
    )
    for name, runs in times.items():
        forward, backward = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"  {name:6} {forward + backward:8.1f} ms  forward {forward:.1f}, backward {backward:.1f}")
    ratios = [sum(p) / sum(o) for p, o in zip(times["plain"], times["ours"], strict=True)]
    print(f"  ratio  {statistics.median(ratios):8.1f}     of single rounds {min(ratios):.1f} to {max(ratios):.1f}")
    medians = {part: statistics.median(spent[part] for spent in parts) for part in parts[0]}
    print("  parts  " + ", ".join(f"{part} {spent:.1f}" for part, spent in medians.items()) + " ms")
    print(f"  largest relative difference of a loss term {difference:.1e}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="l")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--objects", type=int, default=20, help="boxes in each image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time: for a machine that others use, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = ModelConfig.variant(args.variant, num_classes=args.classes)
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        report(config, [args.objects] * args.batch, Clock(device, args.cpu_time), args.rounds)


if __name__ == "__main__":
    main()
