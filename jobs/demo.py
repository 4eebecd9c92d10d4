"""A first look: D-FINE learns a handful of drawn pictures by heart, in about two minutes on two CPU cores.

    make demo

Draws pictures of shapes, trains D-FINE-N on them, and writes demo/detections.png: boxes as they are found, and for one box how
the decoder layers refined the probability distributions of its four edges.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dfine_core import Criterion, Detector, ModelConfig
from dfine_core.boxes import cxcywh_to_xyxy, iou
from dfine_core.optim import OptimizerConfig, learning_rate_factor, make_optimizer

NAMES = ("disc", "square", "triangle")
COLOURS = ("tab:red", "tab:blue", "tab:green")
SIZE = 128


def draw_picture(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One picture [3, SIZE, SIZE] of two to four shapes on noise, with its targets."""
    random = np.random.default_rng(seed)
    canvas = random.uniform(0.35, 0.65, (SIZE, SIZE, 3))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    labels, boxes = [], []
    for _ in range(random.integers(2, 5)):
        label, half = int(random.integers(len(NAMES))), random.uniform(10, 28)
        cx, cy = random.uniform(half, SIZE - half, 2)
        dx, dy = np.abs(x - cx), np.abs(y - cy)
        inside = (
            dx**2 + dy**2 < half**2,
            np.maximum(dx, dy) < half,
            (dy < half) & (dx < (y - cy + half) / 2),
        )[label]
        canvas[inside] = random.uniform(0, 1, 3)
        labels.append(label)
        boxes.append([cx, cy, 2 * half, 2 * half])
    targets = {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes, dtype=torch.float32) / SIZE}
    return torch.from_numpy(canvas.astype(np.float32)).permute(2, 0, 1), targets


def learn(detector: Detector, images: Tensor, targets: list[dict[str, Tensor]], steps: int) -> None:
    criterion = Criterion(detector.config)
    optimizer = make_optimizer(detector, OptimizerConfig(lr=1e-3, backbone_lr=1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warmup_steps=20, total_steps=steps, final_factor=0.01)
    )
    detector.train()
    with tqdm(range(steps), desc="training", unit="step") as progress:
        for _ in progress:
            terms = criterion(detector(images, targets), targets)
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            progress.set_postfix(loss=f"{loss.item():.2f}")


def found_share(logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], threshold: float = 0.4) -> float:
    """Share of true boxes that a detection above the threshold covers with the right class and IoU of at least 0.75."""
    hits = total = 0
    for image_logits, image_boxes, target in zip(logits, boxes, targets, strict=True):
        scores, labels = image_logits.sigmoid().max(-1)
        overlaps = iou(cxcywh_to_xyxy(target["boxes"]).unsqueeze(1), cxcywh_to_xyxy(image_boxes))
        good = (overlaps >= 0.75) & (scores > threshold) & (labels == target["labels"].unsqueeze(1))
        hits += int(good.any(1).sum())
        total += len(target["labels"])
    return hits / total


def draw_boxes(axes: Axes, image: NDArray[np.float32], logits: Tensor, boxes: Tensor, threshold: float = 0.4) -> None:
    axes.imshow(image)
    axes.axis("off")
    scores, labels = logits.sigmoid().max(-1)
    for score, label, box in zip(scores.tolist(), labels.tolist(), cxcywh_to_xyxy(boxes) * SIZE, strict=True):
        if score > threshold:
            left, top, right, bottom = box.tolist()
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=COLOURS[label], lw=2))
            axes.text(left, top - 2, f"{NAMES[label]} {score:.2f}", color=COLOURS[label], fontsize=8)


def picture(detector: Detector, images: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """Draw the detections of the first images and the refinement of the first one's best box; give back all detections."""
    with torch.no_grad():
        output = detector.eval()(images, every_layer=True)
    layers = output.matching
    assert layers is not None
    assert layers.edge_logits is not None

    figure, axes = plt.subplots(2, 4, figsize=(14, 7), layout="constrained")
    for index in range(3):
        image = images[index].permute(1, 2, 0).numpy()
        draw_boxes(axes[0, index], image, output.logits[index], output.boxes[index])
    best = int(output.logits[0].amax(-1).argmax())
    zoom = axes[0, 3]
    zoom.imshow(images[0].permute(1, 2, 0).numpy())
    zoom.axis("off")
    zoom.set_title("one box: initial (dotted), then each layer", fontsize=9)
    steps = [layers.initial_boxes[0, best], *layers.boxes[:, 0, best]]
    shades = plt.get_cmap("viridis")(np.linspace(0.2, 0.9, len(steps)))
    for number, (box, shade) in enumerate(zip(steps, shades, strict=True)):
        left, top, right, bottom = (cxcywh_to_xyxy(box) * SIZE).tolist()
        style = ":" if number == 0 else "-"
        zoom.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=shade, ls=style, lw=1.5))
    bins = detector.decoder.bins.numpy() / detector.config.reg_scale
    for edge, (name, below) in enumerate(zip(("left", "top", "right", "bottom"), axes[1], strict=True)):
        for layer, probabilities in enumerate(layers.edge_logits[:, 0, best, edge].softmax(-1)):
            below.plot(bins, probabilities.numpy(), color=shades[layer + 1], label=f"layer {layer}")
        below.set_title(f"{name} edge")
        below.set_xlabel("offset, in box sizes")
    axes[1, 0].set_ylabel("probability")
    axes[1, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return output.logits, output.boxes


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("demo/detections.png"))
    args = parser.parse_args(argv)

    matplotlib.use("Agg")
    torch.manual_seed(0)
    drawn = [draw_picture(seed) for seed in range(6)]
    images, targets = torch.stack([image for image, _ in drawn]), [target for _, target in drawn]
    detector = Detector(ModelConfig.variant("n", num_classes=len(NAMES), input_size=(SIZE, SIZE), num_queries=50))
    started = time.perf_counter()
    learn(detector, images, targets, args.steps)
    logits, boxes = picture(detector, images, args.out)
    share = found_share(logits, boxes, targets)
    print(
        f"{share:.0%} of the true boxes found (IoU >= 0.75) after {time.perf_counter() - started:.0f} s; see {args.out}"
    )
    return share


if __name__ == "__main__":
    main()
