"""Multi-scale training: the size that the images of a step are resized to."""

from pipeline.data.augment.generators import keyed_generator


def multiscale_size(seed: int, global_step: int, base: int, repeat: int) -> int:
    """Side of the square that all workers resize this step to: `base`, or a multiple of 32 within a quarter of it.

    Args:
        repeat: number of times that `base` itself counts among the sizes; 0 turns multi-scale training off.
    """
    if repeat == 0:
        return base
    smallest, largest = int(0.75 * base / 32) * 32, int(1.25 * base / 32) * 32
    sizes = [*range(smallest, base, 32), *[base] * repeat, *range(largest, base, -32)]
    return sizes[int(keyed_generator("multiscale", seed, global_step).integers(len(sizes)))]
