"""Inputs that a correct file handles like any other, and on which known faults of runtimes show.

All are made of the check images, whose detections are known image by image: a runtime that mixes up the rows of a batch agrees
on single images. Original sizes other than the images' show boxes in wrong units; swapped colours show a swap of channels that
grey images hide.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.inference import LoadedDetector
from dfine_core.model.postprocess import Detections
from pipeline.export.check_images import CheckSet
from pipeline.export.source import at_input_size

COMPARED = ("labels", "boxes", "scores")  # of detections; their other fields are of this project alone
ROWS = 4  # images of a probe
STEP_PX = 64  # between two input sizes; a multiple of every stride


@dataclass(frozen=True, eq=False)
class Probe:
    """Batch with the detector's detections, which were found image by image."""

    name: str
    pixels: Tensor  # [B, 3, H, W] uint8
    sizes: Tensor  # [B, 2] (width, height)
    expected: Detections
    one_by_one: bool = False  # run every image alone
    noise: bool = False  # pixels as no image has them
    scores_alone: bool = False  # do not compare boxes: on plain surfaces many queries are tied


def probes(model: LoadedDetector, check_set: CheckSet) -> list[Probe]:
    """Probes at the input size of the detector; the first one is plain."""
    pixels, sizes = _first_images(model, check_set)
    found = alone(model, pixels, sizes)
    backwards = torch.arange(ROWS).flip(0)
    first = torch.zeros(ROWS, dtype=torch.int64)
    other_sizes = torch.tensor([[1999, 301], [301, 1999], [640, 480], [97, 4001]])
    swapped = torch.stack([image[[2, 0, 1]] for image in pixels])
    swapped[:, 0] //= 2  # no channel is like another one, even in grey images
    empty = _plain_images(pixels)
    noise = torch.randint(0, 256, pixels.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return [
        Probe("a batch of different images", pixels, sizes, found),
        Probe("images one by one", pixels, sizes, found, one_by_one=True),
        Probe("the same batch in another order", pixels[backwards], sizes[backwards], rows(found, backwards)),
        Probe("a batch of one image repeated", pixels[first], sizes[first], rows(found, first)),
        Probe("other original sizes", pixels, other_sizes, alone(model, pixels, other_sizes)),
        Probe("swapped colours", swapped, sizes, alone(model, swapped, sizes)),
        Probe("noise", noise, sizes, alone(model, noise, sizes), noise=True),
        Probe("plain surfaces", empty, sizes, alone(model, empty, sizes), scores_alone=True),
    ]


def other_sizes(model: LoadedDetector, plain: Probe, free: bool) -> list[Probe]:
    """Probe at a larger input size, for files that take images of any size."""
    if not free:
        return []
    height, width = model.config.input_size
    larger = at_input_size(model, (height + STEP_PX, width + STEP_PX))
    pixels = F.interpolate(plain.pixels.float(), larger.config.input_size, mode="bilinear").to(torch.uint8)
    return [Probe("a larger input size", pixels, plain.sizes, alone(larger, pixels, plain.sizes))]


def alone(model: LoadedDetector, pixels: Tensor, sizes: Tensor) -> Detections:
    """Detections of every image, each found in a batch of its own."""
    found = [model.detect(pixels[row : row + 1], sizes[row : row + 1]) for row in range(len(pixels))]
    return joined(found)


def joined(parts: list[Detections]) -> Detections:
    """Batches end to end."""
    return Detections(**{name: torch.cat([getattr(part, name) for part in parts]) for name in COMPARED})


def rows(detections: Detections, index: Tensor) -> Detections:
    """Rows of a batch."""
    return Detections(**{name: getattr(detections, name)[index] for name in COMPARED})


def _first_images(model: LoadedDetector, check_set: CheckSet) -> tuple[Tensor, Tensor]:
    """ROWS different images with their sizes; mirrored ones where there are fewer."""
    taken = list(islice(check_set.batches(model.config.input_size), ROWS))
    pixels = torch.cat([batch.pixels for batch in taken])[:ROWS]
    sizes = torch.cat([batch.sizes for batch in taken])[:ROWS]
    mirrored = [pixels, *(pixels.flip(dims) for dims in ((3,), (2,), (2, 3)))]
    return torch.cat(mirrored)[:ROWS], sizes.repeat(len(mirrored), 1)[:ROWS]


def _plain_images(like: Tensor) -> Tensor:
    """Black, white, grey and red images."""
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0]], dtype=torch.uint8)
    return colours.reshape(ROWS, 3, 1, 1).expand(like.shape).contiguous()


def pieces(probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and sizes of the calls that a probe consists of."""
    step = 1 if probe.one_by_one else len(probe.pixels)
    for start in range(0, len(probe.pixels), step):
        yield probe.pixels[start : start + step], probe.sizes[start : start + step]
