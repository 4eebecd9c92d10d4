"""Split a share of the images off, by seed and without tearing near-duplicates apart.

Frames of one video and copies of one image would make an evaluation too good if they were on both sides. Images whose coarse
gradients are nearly equal are therefore kept together. Groups go to the smaller part in an order that is a hash of the seed.
"""

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image

from dfine_core.images import ImageError, open_image, to_rgb
from pipeline.data.prepare.image_files import BadImageError, read_image_file
from pipeline.data.shards.manifest import Category
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, ImageEntry
from pipeline.errors import UserError
from pipeline.progress import Progress

READERS = 8  # threads
HASH_SIDE = 8  # the hash has HASH_SIDE^2 = 64 bits; those of unrelated images differ in about half
MOST_DIFFERENT_BITS = 6  # of near-duplicates


class SplitOffError(UserError, ValueError):
    """A share of a split that cannot be split off."""


@dataclass(frozen=True)
class SplitOff:
    """Name of the new split, and its share of the images."""

    name: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse NAME=SHARE, such as val=0.2."""
        match = re.fullmatch(r"([\w.-]+)=(0?\.\d+)", text)
        if match is None or not 0 < float(match[2]) < 1:
            raise SplitOffError(
                f"--split-off {text}: expected NAME=SHARE with a share between 0 and 1, such as val=0.2"
            )
        return cls(match[1], float(match[2]))


def split_off(source: DatasetSource, part: SplitOff, *, split: str, seed: int) -> tuple[DatasetSource, DatasetSource]:
    """Divide a source into what stays, called `split`, and what is split off."""
    if part.name == split:
        raise SplitOffError(f"--split-off: {split} cannot be split off itself; choose another name")
    chosen: frozenset[int] | None = None  # images that are split off; found by whichever side is filled first

    def side(name: str, other: bool) -> DatasetSource:
        def fill(index: AnnotationIndex) -> tuple[Category, ...]:
            nonlocal chosen
            categories = source.fill(index)
            entries = index.entries()
            if chosen is None:
                chosen = choose(entries, part.share, seed)
            index.keep_images([entry.image_id for entry in entries if (entry.image_id in chosen) == other])
            return categories

        return DatasetSource(
            {**source.description, "part": name, "split_off": f"{part.name}={part.share:g}", "split_seed": seed}, fill
        )

    return side(split, False), side(part.name, True)


def choose(entries: Sequence[ImageEntry], share: float, seed: int) -> frozenset[int]:
    """Ids of about this share of the images, in whole groups of near-duplicates.

    Raises:
        SplitOffError: there are too few groups for two parts.
    """
    groups = near_duplicates(entries)

    def order(group: Sequence[int]) -> bytes:
        return hashlib.blake2b(f"{seed} {min(group)}".encode(), digest_size=8).digest()

    wanted, chosen = max(1, round(share * len(entries))), list[int]()
    for group in sorted(groups, key=order):
        # A group is taken if that brings the part closer to its share.
        if len(chosen) < wanted and len(group) <= 2 * (wanted - len(chosen)):
            chosen += group
    if not chosen or len(chosen) == len(entries):
        raise SplitOffError(
            f"{share:g} of {len(entries)} images cannot be split off: they are {len(groups)} groups of near-duplicates,"
            f" the largest of {max(map(len, groups), default=0)}. Prepare the two splits from separate images"
        )
    return frozenset(chosen)


def near_duplicates(entries: Sequence[ImageEntry]) -> list[list[int]]:
    """Groups of image ids; an image that resembles no other, or cannot be read, is alone."""
    with (
        ThreadPoolExecutor(READERS) as pool,
        Progress("comparing images", total=len(entries), unit=" images", delay=5) as progress,
    ):
        hashes = []
        for value in pool.map(gradient_hash, (entry.uri for entry in entries)):
            hashes.append(value)
            progress.advance(1)
    return [[entries[n].image_id for n in group] for group in near_groups(hashes)]


def near_groups(hashes: Sequence[int | None]) -> list[list[int]]:
    """Groups of positions whose hashes are nearly equal, each ascending; a position without a hash is alone."""
    leader = list(range(len(hashes)))

    def find(n: int) -> int:
        while leader[n] != n:
            leader[n] = leader[leader[n]]
            n = leader[n]
        return n

    known = np.flatnonzero([value is not None for value in hashes])
    values = np.array([value for value in hashes if value is not None], np.uint64)
    for k in range(len(values)):  # all pairs: 3 s for 100,000 images
        near = np.flatnonzero(np.bitwise_count(values[k + 1 :] ^ values[k]) <= MOST_DIFFERENT_BITS) + k + 1
        for other in near.tolist():
            a, b = find(int(known[k])), find(int(known[other]))
            leader[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for n in range(len(hashes)):
        groups.setdefault(find(n), []).append(n)
    return list(groups.values())


def gradient_hash(uri: str) -> int | None:
    """Hash of an image file, see `gradient_bits`; None if it cannot be read."""
    try:
        with open_image(read_image_file(uri)) as image:
            image.draft("RGB", (64, 64))  # a JPEG is decoded at an eighth of its size
            return gradient_bits(to_rgb(image))
    except (BadImageError, ImageError, OSError):
        return None


def gradient_bits(image: Image.Image) -> int:
    """Signs of the horizontal gradients of an image reduced to 9 x 8 pixels, as 64 bits."""
    small = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    levels = np.asarray(small, np.int16)
    return int.from_bytes(np.packbits(levels[:, 1:] > levels[:, :-1]).tobytes())
