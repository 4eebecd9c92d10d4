"""Choice of the images to label: much expected error, and unlike each other and what is labelled.

Greedy: the next image is the one of the largest expected error times distance to everything chosen so far. Distances are those of
the encoder's pooled features. An image that nearly repeats a chosen or labelled one is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FAR = 2.0  # the largest distance; also that of the first image, if nothing is labelled
LEAST_ERROR = 1e-3  # boxes; with it distance decides between images in which nothing was found


@dataclass(frozen=True)
class ChosenImage:
    """Image to label."""

    index: int  # among the candidates
    distance: float  # to the nearest labelled or chosen image before it, 0..FAR; FAR if there was none
    like_it: tuple[int, ...]  # indices of the candidates that nearly repeat it


@dataclass(frozen=True)
class Choice:
    """Images to label, the most valuable first."""

    images: tuple[ChosenImage, ...]
    already_labelled: int  # candidates left out, because they nearly repeat a labelled image


def choose(
    expected_error: NDArray[np.float32],
    features: NDArray[np.float32],
    groups: Sequence[Sequence[int]],
    count: int,
    *,
    labelled: NDArray[np.float32] | None = None,
) -> Choice:
    """Choose up to `count` of N candidates.

    Args:
        expected_error: [N].
        features: [N, D] pooled features.
        groups: near-duplicates, as indices of candidates 0..N - 1 and, from N, of labelled images; see `near_groups`.
        labelled: [L, D] features of labelled images.
    """
    number = len(expected_error)
    vectors, known = _directions(features, labelled)
    group_of = np.arange(number)
    free = np.ones(number, np.bool_)
    for group in groups:
        inside = [index for index in group if index < number]
        group_of[inside] = min(inside, default=0)
        free[inside] &= len(inside) == len(group)
    already_labelled = int((~free).sum())
    distance = np.full(number, FAR, np.float32)
    for vector in known:
        distance = np.minimum(distance, 1 - vectors @ vector)

    chosen: list[ChosenImage] = []
    while len(chosen) < count and free.any():
        gain = np.where(free, (expected_error + LEAST_ERROR) * distance.clip(0), -1.0)
        index = int(gain.argmax())
        alike = group_of == group_of[index]
        free &= ~alike
        others = tuple(np.flatnonzero(alike & (np.arange(number) != index)).tolist())
        chosen.append(ChosenImage(index, float(distance[index].clip(0)), others))
        distance = np.minimum(distance, 1 - vectors @ vectors[index])
    return Choice(tuple(chosen), already_labelled)


def _directions(
    features: NDArray[np.float32], labelled: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors of candidates and labelled images, from their common centre: images of one kind share most of it."""
    everything = features if labelled is None else np.concatenate([features, labelled])
    centred = everything - everything.mean(0, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.maximum(length, np.finfo(np.float32).tiny)
    return unit[: len(features)].astype(np.float32), unit[len(features) :].astype(np.float32)
