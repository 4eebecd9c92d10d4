"""Images on which exported files are compared with their detector, with ground truth if it is known."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dfine_core.images import SUFFIXES, read_image
from dfine_core.inference import image_sizes, prepare
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.sources.synthetic import synthetic_image
from pipeline.data.stream.stream import evaluation_stream
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.wording import plural

BATCH_SIZE = 3  # the first batch is split, because a file may accept one batch size only
RANGE_IMAGES, JUDGED_IMAGES = 128, 100  # the most that a calibration takes for each purpose

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CheckBatch:
    """Batch of B check images."""

    pixels: Tensor  # [B, 3, H, W] uint8, resized to the input size
    sizes: Tensor  # [B, 2] int64 (width, height) of the original images
    image_id: Tensor  # [B] int64

    def __getitem__(self, rows: slice) -> "CheckBatch":
        return CheckBatch(self.pixels[rows], self.sizes[rows], self.image_id[rows])


@dataclass(frozen=True, eq=False)
class CheckSet:
    """Images for the gate, resized on demand."""

    description: str  # in words, for the report
    images: int
    batches: Callable[[tuple[int, int]], Iterator[CheckBatch]]  # takes the input size (height, width)
    ground_truth: GroundTruth | None = None  # limited to these images


@dataclass(frozen=True, eq=False)
class Calibration:
    """Images for quantisation, none of which the gate judges."""

    ranges: CheckSet  # their activations set the ranges of the integers
    judged: CheckSet  # with ground truth; their AP decides which blocks stay in float


def from_shards(shards: ShardSet, images: int, skip: int = 0) -> CheckSet:
    """So many images of a shard set after the first `skip`, with their ground truth."""
    ground_truth = read_ground_truth(shards)
    end = min(skip + images, len(ground_truth.image_id))

    def batches(input_size: tuple[int, int]) -> Iterator[CheckBatch]:
        stream = evaluation_stream(shards, canvas=input_size, micro_batch_size=BATCH_SIZE, decode_in="inline")
        at = 0
        for batch in islice(stream, -(-end // BATCH_SIZE)):
            rows = len(batch.padding) - sum(batch.padding)  # without the padding of the last batch
            if at + rows > skip:
                taken = slice(max(skip - at, 0), min(rows, end - at))
                yield CheckBatch(batch.images, batch.orig_size, batch.image_id)[taken]
            at += rows

    which = f"images {skip + 1} to {end}" if skip else f"the first {end} images"
    description = f"{which} of {shards.uri} (digest {shards.manifest.digest[:12]})"
    return CheckSet(description, end - skip, batches, ground_truth.of_images(ground_truth.image_id[skip:end]))


def calibration_from_shards(shards: ShardSet, skip: int = 0) -> Calibration:
    """Calibration images of a shard set after the first `skip`: half for the ranges, half to be judged, up to a limit.

    Raises:
        ConfigError: too few images are left, or those to be judged have no boxes.
    """
    available = len(read_ground_truth(shards).image_id) - skip
    ranges = min(RANGE_IMAGES, available // 2)
    if ranges < 1:
        raise ConfigError(
            f"{shards.uri}: {plural(max(available, 0), 'image')} left for calibration after the {skip} that are compared;"
            " name a larger set by --calibrate, or compare fewer with --num-images"
        )
    judged = from_shards(shards, JUDGED_IMAGES, skip + ranges)
    if judged.ground_truth is None or not judged.ground_truth.boxes_of_class.any():
        raise ConfigError(f"{shards.uri}: {judged.description} have no boxes to judge a quantised detector by")
    return Calibration(from_shards(shards, ranges, skip), judged)


def from_files(paths: Sequence[Path], images: int) -> CheckSet:
    """First `images` readable ones of the given image files and folders; broken ones are left out with a warning.

    Raises:
        ConfigError: there is no image, or none that can be read.
    """
    files = [file for path in paths for file in (_image_files(path) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(f"--images-from: no images ({', '.join(SUFFIXES)}) in {', '.join(map(str, paths))}")
    readable: list[Path] = []
    problems: list[str] = []
    for file in files:
        if len(readable) == images:
            break
        try:
            read_image(file)
        except ValueError as error:
            problems.append(f"{file}: {error}")
            log.warning("--images-from: left out: %s", problems[-1])
        else:
            readable.append(file)
    if not readable:
        raise ConfigError(f"--images-from: none of {plural(len(problems), 'image')} can be read, such as {problems[0]}")

    def batches(input_size: tuple[int, int]) -> Iterator[CheckBatch]:
        return _read_batches([file.read_bytes for file in readable], input_size)

    left_out = f", {plural(len(problems), 'broken one')} left out" if problems else ""
    return CheckSet(f"{plural(len(readable), 'given image')}{left_out}", len(readable), batches)


def from_synthetic_images(images: int, longest_side: int) -> CheckSet:
    """Generated images of textured shapes. A detector of other classes still has low scores to compare."""

    def encoded(index: int) -> Callable[[], bytes]:
        return lambda: synthetic_image(index, longest_side=longest_side).image

    def batches(input_size: tuple[int, int]) -> Iterator[CheckBatch]:
        return _read_batches([encoded(index) for index in range(images)], input_size)

    return CheckSet(f"{plural(images, 'generated image')}", images, batches)


def split_first_batch(batches: Iterator[CheckBatch]) -> Iterator[CheckBatch]:
    """Yield the batches unchanged, except for the first: its first image comes alone, then the others."""
    for number, batch in enumerate(batches):
        pieces = [batch[:1], batch[1:]] if number == 0 else [batch]
        yield from (piece for piece in pieces if len(piece.image_id))


def _read_batches(readers: Sequence[Callable[[], bytes]], input_size: tuple[int, int]) -> Iterator[CheckBatch]:
    for start in range(0, len(readers), BATCH_SIZE):
        images = [read_image(read()) for read in readers[start : start + BATCH_SIZE]]
        yield CheckBatch(prepare(images, input_size), image_sizes(images), torch.arange(start, start + len(images)))


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
