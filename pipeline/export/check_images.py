"""The pictures on which exported files are compared with their detector, and what is truly in them, where that is known."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.images import read_image
from dfine_core.inference import image_sizes, prepare
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.sources.synthetic import synthetic_image
from pipeline.data.stream.stream import evaluation_stream
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth

BATCH = 3  # images at once; the first two batches are smaller, for a file may take one number of images alone
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Pictures:
    """A batch of B images."""

    pixels: Tensor  # [B, 3, H, W] uint8, stretched to the input size
    sizes: Tensor  # [B, 2] int64 (width, height) before that
    image_id: Tensor  # [B] int64

    def __getitem__(self, part: slice) -> "Pictures":
        return Pictures(self.pixels[part], self.sizes[part], self.image_id[part])


@dataclass(frozen=True, eq=False)
class CheckSet:
    what: str  # in words, for the report
    images: int
    batches: Callable[[tuple[int, int]], Iterator[Pictures]]  # of an input size (height, width)
    truth: GroundTruth | None = None  # of exactly these images


def from_shards(shards: ShardSet, images: int) -> CheckSet:
    """The first `images` of a shard set, with their truth."""
    whole = read_ground_truth(shards)
    images = min(images, len(whole.image_id))

    def batches(input_size: tuple[int, int]) -> Iterator[Pictures]:
        stream = evaluation_stream(shards, canvas=input_size, micro_batch_size=BATCH, decode_in="inline")
        left = images
        for batch in islice(stream, -(-images // BATCH)):
            real = min(left, len(batch.padding) - sum(batch.padding))
            yield Pictures(batch.images, batch.orig_size, batch.image_id)[:real]
            left -= real

    what = f"the first {images} images of {shards.uri} (digest {shards.manifest.digest[:12]})"
    return CheckSet(what, images, batches, only(whole, whole.image_id[:images]))


def from_files(paths: Sequence[Path], images: int) -> CheckSet:
    """Image files, and those in folders.

    Raises:
        ConfigError: there is none.
    """
    found = [file for path in paths for file in (_images_in(path) if path.is_dir() else [path])][:images]
    if not found:
        raise ConfigError(f"--images-from: no images ({', '.join(SUFFIXES)}) in {', '.join(map(str, paths))}")

    def batches(input_size: tuple[int, int]) -> Iterator[Pictures]:
        return _opened([(str(file), file.read_bytes) for file in found], input_size)

    return CheckSet(f"{len(found)} given images", len(found), batches)


def drawn(images: int, longest_side: int) -> CheckSet:
    """Textured shapes; the detector may know none of them, which leaves it low scores to agree on."""

    def encoded(index: int) -> Callable[[], bytes]:
        return lambda: synthetic_image(index, longest_side=longest_side).image

    def batches(input_size: tuple[int, int]) -> Iterator[Pictures]:
        return _opened([(f"drawn image {index}", encoded(index)) for index in range(images)], input_size)

    return CheckSet(f"{images} drawn images", images, batches)


def only(truth: GroundTruth, image_ids: NDArray[np.int64]) -> GroundTruth:
    """The truth of some of its images."""
    kept = np.isin(truth.image_id, image_ids)
    boxes = kept[truth.image]
    return replace(
        truth,
        image_id=truth.image_id[kept],
        width=truth.width[kept],
        height=truth.height[kept],
        file_name=tuple(name for name, keep in zip(truth.file_name, kept, strict=True) if keep),
        image=(np.cumsum(kept) - 1)[truth.image[boxes]],
        **{name: getattr(truth, name)[boxes] for name in ("box", "label", "area", "crowd")},
    )


def ragged(batches: Iterator[Pictures]) -> Iterator[Pictures]:
    """The same pictures, the first batch cut in two: one image alone, and the others."""
    for number, batch in enumerate(batches):
        parts = [batch[:1], batch[1:]] if number == 0 else [batch]
        yield from (part for part in parts if len(part.image_id))


def _opened(readers: Sequence[tuple[str, Callable[[], bytes]]], input_size: tuple[int, int]) -> Iterator[Pictures]:
    for start in range(0, len(readers), BATCH):
        opened = [_read(name, read()) for name, read in readers[start : start + BATCH]]
        yield Pictures(prepare(opened, input_size), image_sizes(opened), torch.arange(start, start + len(opened)))


def _read(name: str, content: bytes) -> PIL.Image.Image:
    try:
        return read_image(content)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
