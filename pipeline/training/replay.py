"""Replay of a kept non-finite step, image by image: which term, and where in the network the first bad value appears."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn

from dfine_core import Criterion, Detector, ModelConfig, Targets
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.augment.blend import Blend, Paste
from pipeline.data.augment.blend_pixels import blend_images
from pipeline.data.augment.photometric import photometric_distort
from pipeline.training.frozen_parts import freeze
from pipeline.training.nonfinite import ABOUT, MODEL, rank_file


@dataclass(frozen=True)
class ReplayedImage:
    """Losses of one image of a kept step, run on its own."""

    rank: int
    micro_batch: int
    image_id: int
    terms: dict[str, float]
    first_module: str | None  # first module, in forward order, with a non-finite output
    gradient_of: str | None  # first parameter with a non-finite gradient

    @property
    def finite(self) -> bool:
        """Whether all losses and gradients were finite."""
        return all(value - value == 0 for value in self.terms.values()) and self.gradient_of is None

    def __str__(self) -> str:
        if self.finite:
            return f"image {self.image_id}: finite, loss {sum(self.terms.values()):.4g}"
        bad = ", ".join(name for name, value in self.terms.items() if value - value != 0) or "none"
        where = f"output of {self.first_module}" if self.first_module else "no output of a module"
        return f"image {self.image_id}: NOT FINITE; terms {bad}; first: {where}; gradient of {self.gradient_of or 'nothing'}"


def replay(folder: str, *, precision: str, device: torch.device) -> Iterator[ReplayedImage]:
    """Run every image of a kept step on its own, forward and backward.

    Args:
        folder: the one that the training printed, `.../non_finite/step-...`.
        precision: fp32, bf16 or fp16.
    """
    try:
        about = storage.read_json(storage.join(folder, ABOUT), "model")
        weights = tensors_from_bytes(storage.read_bytes(storage.join(folder, MODEL)))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not a kept step; training prints the folder when it skips a step") from None
    except SafetensorError as error:
        raise ConfigError(f"{folder}: its {MODEL} is damaged: {error}") from None
    detector = Detector(ModelConfig.from_plain(about["model"]))
    detector.load_state_dict(weights)
    detector.to(device).train()
    freeze(detector, about.get("frozen", ()), [p for p in detector.parameters() if p.requires_grad])
    criterion = Criterion(detector.config)
    ranks = sorted(
        int(name.removeprefix("rank-").removesuffix(".safetensors"))
        for name in storage.sizes(folder)
        if name.startswith("rank-")
    )
    for rank in ranks:
        kept = tensors_from_bytes(storage.read_bytes(storage.join(folder, rank_file(rank))))
        for number in sorted({int(key.split("/")[0]) for key in kept}):
            batch = {key.split("/")[1]: value for key, value in kept.items() if key.startswith(f"{number}/")}
            yield from _replay_batch(detector, criterion, batch, rank, number, precision, device)


def _replay_batch(
    detector: Detector,
    criterion: Criterion,
    batch: dict[str, Tensor],
    rank: int,
    number: int,
    precision: str,
    device: torch.device,
) -> Iterator[ReplayedImage]:
    images = photometric_distort(batch["images"].float() / 255, batch["photometric"])
    pastes = tuple(Paste(*paste) for paste in batch["pastes"].tolist())
    images = blend_images(images, Blend(float(batch["blend_ratio"]), pastes)).to(device)
    counts = batch["counts"].tolist()
    boxes, labels = batch["boxes"].split(counts), batch["labels"].split(counts)
    # Every image starts from the kept batch-norm statistics.
    statistics = {name: buffer.clone() for name, buffer in detector.named_buffers()}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for index, image_id in enumerate(batch["image_id"].tolist()):
        target = [{"labels": labels[index], "boxes": boxes[index]}]
        targets = Targets.pack(target, detector.config.num_classes, device)
        detector.zero_grad()
        with _first_bad_output(detector) as first, torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = detector(images[index : index + 1], targets, generator=torch.Generator(device).manual_seed(0))
        terms = criterion(output, targets)
        torch.stack(list(terms.values())).sum().backward()
        gradients = ((name, p.grad) for name, p in detector.named_parameters() if p.grad is not None)
        gradient_of = next((name for name, gradient in gradients if not gradient.isfinite().all()), None)
        values = {name: float(term.detach()) for name, term in terms.items()}
        yield ReplayedImage(rank, number, int(image_id), values, first[0] if first else None, gradient_of)
        for name, buffer in detector.named_buffers():
            buffer.copy_(statistics[name])


@contextmanager
def _first_bad_output(detector: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules with a non-finite output, in forward order."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in detector.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
