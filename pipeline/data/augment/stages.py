"""Stages of the augmentation over a training: warm-up, dense, ordinary, clean."""

import sys
from typing import NamedTuple

from pipeline.data.augment.settings import AugmentSettings


class Stages(NamedTuple):
    """First epochs of the stages after the warm-up; epochs count from 0.

    The warm-up and the clean epochs flip and resize alone. Mosaic and mixup are added in the dense stage ("dense one-to-one":
    more boxes per image give one-to-one matching more positives).

    Source: DEIM, arXiv:2412.04234.
    """

    dense: int
    ordinary: int
    clean: int | None  # None: never

    def settings_of(self, epoch: int, settings: AugmentSettings) -> AugmentSettings:
        """Augmentation of one epoch."""
        if epoch < self.dense or (self.clean is not None and epoch >= self.clean):
            return settings.clean()
        return settings if epoch < self.ordinary else settings.ordinary()


WHOLLY_DENSE = Stages(dense=0, ordinary=sys.maxsize, clean=None)
