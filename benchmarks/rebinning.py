"""Change of boxes and scores when FDR heads are re-binned, with random weights and after a short training.

    python -m benchmarks.rebinning              about ten minutes on one core
    ... --steps 80                              less training, faster

Edges are those of the last decoder layer's boxes, in % of the box's size; pixels are box coordinates of a 640 x 640 image.
The change includes the effect of moved boxes on the attention of the next layer. Compared methods: ours, interpolation of
the log density (logits minus the log of the bin width), and interpolation of the logits.
"""

import argparse
import math
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from dfine_core import Criterion, Detector, ModelConfig
from dfine_core.checkpoints import rebinning
from dfine_core.checkpoints.rebinning import Bins
from dfine_core.checkpoints.weights import load_weights

LogitMap = Callable[[Bins, Bins], tuple[Tensor, Tensor]]
CONFIG = ModelConfig.variant("n", num_classes=3, input_size=(256, 256), num_queries=100, num_denoising=20)
TARGETS: tuple[dict[str, float], ...] = (
    {"reg_max": 16},
    {"reg_max": 24},
    {"reg_max": 48},
    {"reg_max": 64},
    {"reg_scale": 8.0},
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps before the second table")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args(argv)

    maps: dict[str, LogitMap] = {
        "ours": rebinning.logit_map,
        "log density": interpolated_density,
        "logits": interpolated_logits,
    }
    print("Bell-shaped densities: edges, mean and 95 %, in % of the box's size")
    bell_table(maps)

    torch.manual_seed(0)
    detector = Detector(CONFIG)
    randomise(detector)
    print("\nRandom weights")
    detector_table(detector, maps)

    detector = Detector(CONFIG)
    loss = train(detector, args.steps, args.batch)
    print(f"\nAfter {args.steps} steps on generated rectangles (loss {loss:.1f})")
    detector_table(detector, maps)


def bell_table(maps: dict[str, LogitMap]) -> None:
    source = Bins(CONFIG.reg_max, CONFIG.reg_scale, CONFIG.up)
    logits = rebinning.bell_logits(source)
    for change in TARGETS:
        target = Bins(**{**vars(source), **change})
        cells = []
        for name, logit_map in maps.items():
            matrix, constant = logit_map(source, target)
            shift = edge_shift(logits, source, logits @ matrix.T + constant, target)
            cells.append(f"{name} {mean_and_p95(shift)}")
        print(f"  {change_name(change)}  {'   '.join(cells)}")


@torch.no_grad()
def detector_table(detector: Detector, maps: dict[str, LogitMap]) -> None:
    images, _ = synthetic_batch(4, torch.Generator().manual_seed(1))
    detector.eval()
    features = detector.encoder(detector.backbone(images))
    before = detector.decoder(features, None, True)
    for change in TARGETS:
        converted = Detector(CONFIG.with_(**change)).eval()
        cells = []
        for name, logit_map in maps.items():
            with patch("dfine_core.checkpoints.rebinning.logit_map", logit_map):
                weights, report = rebinning.rebin(detector.state_dict(), **change)  # type: ignore[arg-type]
            load_weights(converted, weights)
            after = converted.decoder(features, None, True)
            shift = edge_shift(
                before.matching.edge_logits[-1], report.source, after.matching.edge_logits[-1], report.target
            )
            pixels = 640 * (after.boxes - before.boxes).abs().mean()
            cells.append(f"{name} {mean_and_p95(shift)} {pixels:5.2f} px")
            if name == "ours":
                scores = score_changes(converted, weights, detector.state_dict(), features, before.logits)
        print(f"  {change_name(change)}  {'   '.join(cells)}   score logits {scores}")


def score_changes(
    converted: Detector, weights: dict[str, Tensor], original: dict[str, Tensor], features: list[Tensor], before: Tensor
) -> str:
    """Mean change of the class logits, with converted and with unchanged LQE."""
    as_it_was = {key: original[key] if "lqe_layers" in key else tensor for key, tensor in weights.items()}
    changes = []
    for state_dict in (weights, as_it_was):
        load_weights(converted, state_dict)
        changes.append(float((converted.decoder(features, None, False).logits - before).abs().mean()))
    return f"{changes[0]:.3f} (LQE left as it was: {changes[1]:.3f})"


def interpolated_logits(source: Bins, target: Bins) -> tuple[Tensor, Tensor]:
    matrix = rebinning._interpolation(source.offsets, at=target.offsets)
    return matrix, torch.zeros(len(matrix), dtype=matrix.dtype)


def interpolated_density(source: Bins, target: Bins) -> tuple[Tensor, Tensor]:
    matrix, _ = interpolated_logits(source, target)
    old, new = (rebinning._triangle_areas(bins.offsets).log() for bins in (source, target))
    return matrix, new - matrix @ old


def edge_shift(logits: Tensor, source: Bins, new_logits: Tensor, target: Bins) -> Tensor:
    """Shift of edges, as a fraction of the box size."""
    old = logits.double().softmax(-1) @ source.offsets
    return (new_logits.double().softmax(-1) @ target.offsets - old).abs().flatten()


def mean_and_p95(shift: Tensor) -> str:
    return f"{100 * shift.mean():6.3f} {100 * shift.quantile(0.95):6.3f} %"


def change_name(change: dict[str, float]) -> str:
    ((name, value),) = change.items()
    return f"{name} {getattr(CONFIG, name):g} -> {value:g}".ljust(20)


@torch.no_grad()
def randomise(detector: Detector) -> None:
    """Randomise weights at a scale that keeps activations of order one, including weights that training starts at zero."""
    for parameter in detector.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()))


def train(detector: Detector, steps: int, batch: int) -> float:
    """Train briefly on generated rectangles; returns the last loss."""
    criterion = Criterion(CONFIG)
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=5e-4)
    generator = torch.Generator().manual_seed(2)
    detector.train()
    loss = torch.zeros(())
    for _ in range(steps):
        images, targets = synthetic_batch(batch, generator)
        loss = torch.stack(list(criterion(detector(images, targets), targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
    return float(loss.detach())


def synthetic_batch(batch: int, generator: torch.Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Generate noisy images with up to three rectangles; each class is one colour channel."""
    height, width = CONFIG.input_size
    images = 0.3 * torch.rand(batch, 3, height, width, generator=generator)
    targets = []
    for image in images:
        count = int(torch.randint(1, 4, (), generator=generator))
        labels = torch.randint(0, CONFIG.num_classes, (count,), generator=generator)
        sizes = 0.15 + 0.35 * torch.rand(count, 2, generator=generator)
        centres = sizes / 2 + (1 - sizes) * torch.rand(count, 2, generator=generator)
        for label, (x, y), (w, h) in zip(labels.tolist(), centres.tolist(), sizes.tolist(), strict=True):
            rows = slice(round((y - h / 2) * height), round((y + h / 2) * height))
            columns = slice(round((x - w / 2) * width), round((x + w / 2) * width))
            image[label, rows, columns] = 0.9
        targets.append({"labels": labels, "boxes": torch.cat([centres, sizes], dim=-1)})
    return images, targets


if __name__ == "__main__":
    main()
