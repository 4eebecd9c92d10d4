"""A worker among all of them, and what it may ask of the world around the training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.data.stream.stream import Broadcast
from pipeline.training.beside import Submit


@dataclass(frozen=True)
class Group:
    """This worker among all of them."""

    rank: int
    world_size: int
    device: torch.device
    broadcast: Broadcast  # rank 0's value to all
    report: Callable[[dict[str, float]], None] = lambda metrics: None  # to whoever searches; collective
    submit: Submit | None = None  # on rank 0: an evaluation beside the training
