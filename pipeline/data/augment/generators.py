"""Random generators by key, so that every draw can be repeated in any order, process or thread."""

from typing import Literal

import numpy as np

# Purposes have numbers of their own, so that no two of them ever share random numbers.
PURPOSES = {"image": 0, "blend": 1, "multiscale": 2, "partners": 3, "mosaic": 4}


def keyed_generator(
    purpose: Literal["image", "blend", "multiscale", "partners", "mosaic"],
    seed: int,
    key: int,
    subkey: int = 0,
) -> np.random.Generator:
    """An independent generator for each (purpose, seed, key, subkey), the same in every process."""
    low_64_bits = 2**64 - 1
    # Philox counts in the first word alone, so sequences with other words in the rest never meet.
    counter = np.array([0, PURPOSES[purpose], key & low_64_bits, subkey & low_64_bits], np.uint64)
    return np.random.Generator(np.random.Philox(key=seed & low_64_bits, counter=counter))


def epoch_of_showing(epoch: int, showing: int) -> int:
    """Key in the place of the epoch, so that several showings of an image in one epoch have draws of their own.

    Args:
        showing: below 2^32; 0 leaves the epoch as it is.
    """
    return epoch | showing << 32
