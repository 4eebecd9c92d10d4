"""What the driver hands to its workers."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import storage
from pipeline.config import Experiment
from pipeline.tracking.settings import TrackingSettings


@dataclass(frozen=True)
class Job:
    """What is to be done; plain data, the same for every worker."""

    experiment: Experiment
    run: str  # folder or URI of the run
    tracking: TrackingSettings | None  # None: not recorded
    tracking_folder: Path | None = None  # of the queue, on a disk
    micro_batch: int | None = None  # of the run that is continued
    resume: str | None = None  # checkpoint of another run, to be continued by this one
    threads: int | None = None  # of PyTorch on the CPU
    evaluation_resources: dict[str, float] = field(default_factory=dict)  # CPU and GPU, of an evaluation beside
    ray_job: str | None = None  # id of the submitted job
    launched_at: float = field(default_factory=time.time)  # or, restarted, when the workers before were last heard of
    restarted: bool = False  # by Ray, after a worker died

    @property
    def checkpoints(self) -> str:
        return storage.join(self.run, "checkpoints")
