"""The fastest precision of a detector on this CPU, by a short measurement."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.agreement import COMPARED_DETECTIONS, FULL, HALF, differences, summarize
from dfine_core.cpu import multiplies_bf16
from dfine_core.inference import LoadedDetector
from dfine_core.model.postprocess import Detections

BUDGET_S = 1.0  # for all candidates together, after one call of each on every image
SCENES, RECTANGLES = 2, 24  # generated images, and objects in each
LEAST_GAIN = 0.05  # of the time; less is not worth another rounding


@dataclass(frozen=True)
class PrecisionChoice:
    """Chosen precision, with what was measured."""

    name: str
    milliseconds: dict[str, float]  # of one image, by candidate: the shortest, which other load disturbs least
    refused: dict[str, float]  # share of agreeing detections of candidates that differ too much

    def line(self) -> str:
        """One line for the console."""
        times = ", ".join(f"{name} {spent:.0f} ms" for name, spent in self.milliseconds.items())
        refused = "".join(
            f"; {name} refused: {share:.0%} of its detections agree" for name, share in self.refused.items()
        )
        return f"precision {self.name}, by measurement ({times}{refused}); --precision {self.name} repeats it"


def candidates(device: torch.device) -> tuple[str, ...]:
    """Precisions to measure; the first one is the reference. One alone where nothing is measured."""
    if device.type != "cpu":
        return ("fp32",)
    return ("fp32", "fp32-channels-last", *(["bf16-channels-last"] if multiplies_bf16() else []))


def choose_precision(loaded: LoadedDetector) -> PrecisionChoice:
    """Measure the candidates alternately on generated images, and take the fastest that agrees with float32.

    The tolerances are those of exported files. The weights keep their values; their layout is that of the last call.
    """
    names = tuple(name for name in candidates(loaded.device) if name in loaded.precisions)
    if len(names) == 1:
        return PrecisionChoice(names[0], {}, {})
    images = scenes(loaded.config.input_size)
    sizes = torch.tensor([loaded.config.input_size[::-1]])  # [1, 2] width, height

    # 1. Detections of every candidate; those that differ from the first are out.
    variants = {name: _detect_all(loaded, name, images, sizes) for name in names}
    refused = {}
    for name in names[1:]:
        share, wanted = _agreement(variants[names[0]], variants[name], sizes, name)
        if share < wanted:
            refused[name] = share

    # 2. Times in turns, so that other load affects all alike.
    running = [name for name in names if name not in refused]
    spent: dict[str, list[float]] = {name: [] for name in running}
    until = time.perf_counter() + BUDGET_S
    while len(spent[running[-1]]) < 2 or time.perf_counter() < until:
        for name in running:
            variant = loaded.with_precision(name)
            started_at = time.perf_counter()
            variant.detect(images[:1], sizes)
            spent[name].append(time.perf_counter() - started_at)
    times = {name: 1e3 * min(seconds) for name, seconds in spent.items()}
    best = min(times, key=times.__getitem__)
    chosen = best if times[best] < (1 - LEAST_GAIN) * times[names[0]] else names[0]
    return PrecisionChoice(chosen, times, refused)


def scenes(size: tuple[int, int]) -> Tensor:
    """Generated images [N, 3, H, W] uint8 of coloured rectangles on a cloudy background, always the same."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    clouds = torch.rand(SCENES, 3, 8, 8, generator=generator)
    images = F.interpolate(clouds, size=size, mode="bilinear", align_corners=False)
    for image in images:
        for corner, extent, colour in zip(
            torch.rand(RECTANGLES, 2, generator=generator),
            torch.rand(RECTANGLES, 2, generator=generator) * 0.3 + 0.03,
            torch.rand(RECTANGLES, 3, 1, 1, generator=generator),
            strict=True,
        ):
            (top, left), (bottom, right) = (
                (int(share[0] * height), int(share[1] * width)) for share in (corner, corner + extent)
            )
            image[:, top:bottom, left:right] = colour
    return (images * 255).to(torch.uint8)


def _detect_all(loaded: LoadedDetector, name: str, images: Tensor, sizes: Tensor) -> list[Detections]:
    variant = loaded.with_precision(name)
    return [variant.detect(image.unsqueeze(0), sizes) for image in images]


def _agreement(expected: list[Detections], actual: list[Detections], sizes: Tensor, name: str) -> tuple[float, float]:
    """Share of the detections that agree, and the share that must."""
    tolerance = FULL if name.startswith("fp32") else HALF
    number = min(COMPARED_DETECTIONS, expected[0].scores.shape[1])
    off = torch.cat(
        [torch.from_numpy(differences(one, other, sizes, number)) for one, other in zip(expected, actual, strict=True)]
    )
    return summarize(off.numpy(), tolerance)["agreeing"], tolerance.share
