"""Partners of mosaics: which rows each sample is joined with, as arithmetic on the plan, before anything is decoded.

A partner is drawn from a pool of rows that the read task holds anyway: the window of the sample's lane. A lane's pool depends on
the plan alone, never on where a stream was entered, so a sample has the same partners for any number of workers, after a resume
and when its task is retried.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.generators import epoch_of_showing, keyed_generator
from pipeline.data.augment.settings import TILES
from pipeline.data.shards.reader import Rows
from pipeline.data.stream.plan import BatchPlan, Window

PARTNERS = TILES - 1
MIN_POOL_ROWS = 512  # per lane, where samples have partners: 1 in 16 partners is from the sample's own row group of 32


def partner_pools(plan: BatchPlan, window: Window, lanes: list[int]) -> list[Rows]:
    """Rows that the partners of each lane's samples are drawn from.

    The last window of an epoch is shorter than the others: its pool reaches back, by at most one window. An epoch no longer than
    a window is one pool for all lanes, and is read whole.
    """
    if plan.num_rows <= plan.window_rows:
        return [plan.stretches(window.epoch).all_rows()] * len(lanes)
    step = window.first_step - window.epoch * plan.steps_per_epoch
    last_step = min((step // plan.steps_per_window + 1) * plan.steps_per_window, plan.steps_per_epoch)
    stop = last_step * plan.micro_batch_size
    start = max(0, stop - plan.steps_per_window * plan.micro_batch_size)
    return [order.rows(start, stop) for order in plan.lane_orders(window.epoch, lanes)]


def draw_partners(
    image_ids: NDArray[np.int64],
    pool: int,
    *,
    seed: int,
    epoch: int,
    probability: float,
    showings: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Draw which samples become mosaics, and their partners.

    Args:
        image_ids: [n]
        showings: [n] see `mixture.Mixture`; None: all are 0.
        pool: number of rows to draw from, uniformly and with replacement; a sample may draw itself.

    Returns:
        [n, 3] positions in the pool; -1 for a sample that is no mosaic.
    """
    drawn = np.full((len(image_ids), PARTNERS), -1, np.int64)
    numbers = np.zeros(len(image_ids), np.int64) if showings is None else showings
    for partners, image_id, showing in zip(drawn, image_ids.tolist(), numbers.tolist(), strict=True):
        generator = keyed_generator("partners", seed, epoch_of_showing(epoch, showing), image_id)
        if generator.random() < probability:
            partners[:] = generator.integers(pool, size=PARTNERS)
    return drawn


def with_partners(own: Rows, pool: Rows, drawn: NDArray[np.int64]) -> tuple[Rows, NDArray[np.int32]]:
    """Rows of some samples followed by those of their partners; a partner that is one of the rows before it is not repeated.

    Args:
        drawn: [n, 3] positions in the pool, or -1.

    Returns:
        The rows, and [n, 3] positions in them, or -1.
    """
    rows = list(zip(own.group.tolist(), own.row.tolist(), strict=True))
    place: dict[tuple[int, int], int] = {}
    for index, pair in enumerate(rows):
        place.setdefault(pair, index)  # samples may repeat a row
    group, row = pool.group.tolist(), pool.row.tolist()
    found = np.full(drawn.size, -1, np.int32)
    for index, at in enumerate(drawn.ravel().tolist()):
        if at >= 0:
            pair = (group[at], row[at])
            found[index] = place.setdefault(pair, len(rows))
            rows += [pair] if found[index] == len(rows) else []
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    return Rows(group=pairs[:, 0], row=pairs[:, 1]), found.reshape(drawn.shape)
