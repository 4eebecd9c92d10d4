"""Profile of a few training steps: a Chrome trace of rank 0."""

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline import storage
from pipeline.training.context import TrainJob, WorkerContext

WAIT_STEPS, WARMUP_STEPS = 3, 1  # before the profiled ones: the first steps allocate and compile
TRACE = "profile/trace-rank-0.json"  # in the run's folder; opens in https://ui.perfetto.dev


class StepProfiler(AbstractContextManager["StepProfiler"]):
    """PyTorch's profiler over `job.profile_steps` steps of rank 0; without any it does nothing."""

    def __init__(self, job: TrainJob, context: WorkerContext) -> None:
        self._job, self._context = job, context
        self._profile: profile | None = None
        if job.profile_steps and context.rank == 0:
            activities = [ProfilerActivity.CPU]
            if context.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=job.profile_steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )

    def __enter__(self) -> Self:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """Mark the end of a step."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, recorded: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            recorded.export_chrome_trace(str(path))
            target = storage.join(self._job.run, TRACE)
            storage.write_atomic(target, path.read_bytes())
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=key, row_limit=12)
        self._context.print(f"profile of {self._job.profile_steps} steps: {target}\n{table}")
