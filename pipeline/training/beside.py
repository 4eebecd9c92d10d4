"""Evaluations beside the training: of copied weights, in another process on other resources, while the steps go on.

One at a time: the next one is handed over when the one before has answered, so that no weights pile up. Which step waits for
its answer is part of the run's standing: a run that is continued has it evaluated again.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.weights import load_weights
from pipeline.data.shards.manifest import load_shards
from pipeline.data.stream.stream import Broadcast
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.figures import png
from pipeline.evaluation.report import EvaluationReport
from pipeline.evaluation.sample_images import sample_pictures


@dataclass(frozen=True)
class Order:
    """What is to be evaluated; plain data for another process."""

    model: dict[str, Any]  # ModelConfig as JSON has it
    weights: bytes  # safetensors
    val: str
    micro_batch: int
    pictures: int


@dataclass(frozen=True)
class Answer:
    report: EvaluationReport
    pictures: tuple[tuple[str, bytes], ...]  # PNG by name


Submit = Callable[[Order], "Future[Answer]"]


def carry_out(order: Order) -> Answer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = Detector(ModelConfig.from_plain(order.model))
    load_weights(detector, tensors_from_bytes(order.weights))
    shards = load_shards(order.val)
    detector.to(device).eval()
    report = evaluate(detector, shards, device=device, micro_batch=order.micro_batch, decode_in="inline")
    assert report is not None  # of the only rank
    drawn = sample_pictures(detector, shards, device=device, count=order.pictures)
    return Answer(report, tuple((name, png(figure)) for name, figure in drawn))


def on_ray(resources: dict[str, float]) -> Submit:
    """Tasks of Ray with so many CPUs and GPUs."""
    import ray  # here: a run in one process needs none

    task = ray.remote(carry_out).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        max_retries=3,
        scheduling_strategy="DEFAULT",  # not inside the training's own reservation
    )
    return lambda order: task.remote(order).future()


@dataclass(frozen=True)
class Outcome:
    ap: float | None  # None: it failed
    error: str
    answer: Answer | None  # on rank 0


class Beside:
    """The evaluation that is under way. Collective, except that rank 0 alone has a future."""

    def __init__(self, submit: Submit | None, broadcast: Broadcast) -> None:
        self._submit, self._broadcast = submit, broadcast
        self._future: Future[Answer] | None = None

    def begin(self, order: Order) -> None:
        """On rank 0."""
        assert self._submit is not None, "this run has nobody to evaluate beside it"
        self._future = self._submit(order)

    def outcome(self, rank: int, *, wait: bool) -> Outcome | None:
        """None while it is under way."""
        told: tuple[float | None, str] | None = None
        answer = None
        if rank == 0 and self._future is not None and (wait or self._future.done()):
            try:
                answer = self._future.result()
                told = (answer.report.numbers["AP"], "")
            except Exception as error:  # whatever happened over there must not end the training
                told = (None, f"{type(error).__name__}: {error}")
            self._future = None
        told = self._broadcast(told)
        return None if told is None else Outcome(told[0], told[1], answer)
