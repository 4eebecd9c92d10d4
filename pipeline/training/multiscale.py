"""Multi-scale training: the sizes that the images of a step are resized to."""

from dfine_core import ModelConfig
from pipeline.data.augment.generators import keyed_generator


def multiscale_sides(config: ModelConfig, repeat: int) -> list[int]:
    """Sides that the steps of a training draw from: the input size `repeat` times, and multiples of 32 within a quarter of it.

    A side at which the network has fewer feature positions than queries is left out; small input sizes have such sides.

    Args:
        config: with a square input size.
        repeat: 0 turns multi-scale training off.
    """
    base = config.input_size[0]
    if repeat == 0:
        return [base]
    smallest, largest = int(0.75 * base / 32) * 32, int(1.25 * base / 32) * 32
    sides = [*range(smallest, base, 32), *[base] * repeat, *range(largest, base, -32)]
    return [side for side in sides if not config.size_problems(side, side)]


def multiscale_side(seed: int, global_step: int, sides: list[int]) -> int:
    """Side of the square that all workers resize the images of this step to.

    Args:
        sides: from `multiscale_sides`.
    """
    return sides[int(keyed_generator("multiscale", seed, global_step).integers(len(sides)))]
