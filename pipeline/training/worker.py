"""A Ray Train worker: finds its place among the others and trains."""

import logging
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.execution import collective_impl as collectives
from ray.train.v2._internal.execution import context as reporting

from pipeline.training.context import Job
from pipeline.training.heartbeat import WorkerConsole, stopped_before


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """
    Args:
        config: {"job": Job, "mailbox": the driver's actor}.
    """
    # Here, because Ray Train's controller imports this module too and has no use for them.
    from pipeline.training.beside import on_ray
    from pipeline.training.group import Group
    from pipeline.training.loop import train

    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)  # it tells of every report
    logging.getLogger(collectives.__name__).setLevel(logging.ERROR)  # it warns of broadcasts above 1 kB
    job: Job = config["job"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if rank == 0 and (stopped_at := stopped_before(config["mailbox"])) is not None:
        job = replace(job, launched_at=stopped_at, restarted=True)
    group = Group(
        rank=rank,
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        broadcast=broadcast_from_rank_zero,
        report=ray.train.report,
        submit=on_ray(job.evaluation_resources) if rank == 0 and job.experiment.evaluation.beside else None,
    )
    return train(job, group, WorkerConsole(config["mailbox"], rank))
