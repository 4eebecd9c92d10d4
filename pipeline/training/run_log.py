"""The log of a run: metrics on console and in MLflow, evaluation reports and the result in the run's folder."""

import json
import math
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch
import yaml
from torch import Tensor

from dfine_core.images import open_image
from pipeline import storage
from pipeline.config_files import dump_shareable
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.mlflow_access import FINAL, VAL
from pipeline.tracking.delivery import missing_from_mlflow
from pipeline.tracking.model import log_detector
from pipeline.tracking.settings import EXPERIMENT_FILE, Scalar
from pipeline.tracking.system import system_metrics
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.run_description import NOTE, chosen_params, dataset_input, run_note, run_tags
from pipeline.training.run_dir import RESULT, note_recorded, note_unrecorded
from pipeline.training.state import TrainState
from pipeline.training.step import StepResult

if TYPE_CHECKING:
    from pipeline.evaluation.report import EvaluationReport

SOURCE = "jobs/train.py"
# Points in MLflow: a long run would log millions, and both its database and its charts become slow.
LOSS = "loss_"  # first characters of the terms
LAYER_TERM = re.compile(r"_\d+$|_pre$")  # a loss of one decoder layer, of the encoder or before the first layer
LAYER_TERMS = "train/terms_by_layer/"
LAYER_TERMS_EVERY = 10  # reports
FULL_RATE_S = 3600.0  # every report is logged this long after the start,
THINNED_S = 60.0  # then one in this time
SHOWN_S = 2.0  # least time between two updates of the progress line; each waits for the device


@dataclass
class MetricMeter:
    """Losses summed on the device and times summed on the host, between two reports."""

    names: tuple[str, ...] = ()
    sums: Tensor | None = None  # over the finite steps, one for each name; last, their number
    steps: int = 0
    waited_s: float = 0.0  # for data
    started_at: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult, waited_s: float) -> None:
        """Add the losses of a step, and the time it waited for data."""
        others = torch.stack([result.loss, result.grad_norm, torch.ones_like(result.loss)])
        values = torch.where(result.finite, torch.cat([result.terms, others]), 0)
        self.names = (*result.names, "loss", "grad_norm")
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1
        self.waited_s += waited_s

    def read(self, images_per_step: int) -> dict[str, float]:
        """Return the means since the last call, and start again. Waits for the device."""
        values = self.means(images_per_step)
        self.sums, self.steps, self.waited_s = None, 0, 0.0
        self.started_at = time.perf_counter()
        return values

    def means(self, images_per_step: int) -> dict[str, float]:
        """Return the means since the last `read`, and go on. Waits for the device."""
        if self.sums is None:
            return {}
        *sums, finite_steps = self.sums.tolist()
        seconds = time.perf_counter() - self.started_at
        values = {metric_name(name): total / max(finite_steps, 1) for name, total in zip(self.names, sums, strict=True)}
        return values | {
            "train/speed/images_per_s": self.steps * images_per_step / seconds,
            "train/speed/step_s": seconds / self.steps,
            "train/speed/data_wait_share": self.waited_s / seconds,
        }


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rates to report; of groups that are split by parts, that of the part next to the head."""
    rates = {group["name"]: group["lr"] for group in reversed(groups)}
    first = next(iter(reversed(rates.values())))
    return {"train/lr": rates.get("rest", first), "train/lr_backbone": rates.get("backbone", 0.0)}


def metric_name(name: str) -> str:
    """Name in MLflow of a loss: totals in train/, terms of the last layer and of single layers in groups of their own."""
    if not name.startswith(LOSS):
        return f"train/{name}"
    return (LAYER_TERMS if LAYER_TERM.search(name) else "train/terms/") + name.removeprefix(LOSS)


class RunLog:
    """Log of one run on this worker; rank 0 alone writes. A context manager that owns the tracker.

    Args:
        tracker: replaces the one that the job's tracking settings lead to.
    """

    def __init__(self, job: TrainJob, context: WorkerContext, tracker: Tracker | None = None) -> None:
        self._job, self._context = job, context
        if tracker is None and context.rank == 0 and job.tracking is not None and job.outbox_folder is not None:
            tracker = Tracker(job.outbox_folder, job.tracking)
        self._tracker = tracker
        self._delivered = False  # or given up
        self._meter = MetricMeter()
        self._entered_at = self._ready_at = time.time()
        self._tracked_at = 0.0
        self._shown_at = -math.inf  # time.monotonic
        self._first_step_reported = False

    def __enter__(self) -> Self:
        if self._tracker is not None:
            self._tracker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None:
            if self._delivered:  # it has waited
                self._tracker.stop()
            self._tracker.__exit__(kind, error, trace)

    @property
    def run_key(self) -> str | None:
        """Key that identifies the MLflow run; None if the run is not tracked."""
        return self._tracker.run_key if self._tracker is not None else None

    def run_id(self, timeout: float) -> str | None:
        """MLflow's id of the run, once the server has given one."""
        return self._tracker.wait_for_run_id(timeout=timeout) if self._tracker is not None else None

    # Start

    def begin(self, parent: dict[str, str]) -> None:
        """Open the MLflow run: parameters, tags, data sets.

        Args:
            parent: source of the initial weights.
        """
        if self._tracker is None:
            return
        job = self._job
        # Data sets by digest, so that runs on the same data can be found.
        datasets = [dataset_input(each.shards, "training") for each in job.data.train.sets]
        if job.data.val is not None:
            datasets.append(dataset_input(job.data.val, "validation"))
        tags = {**run_tags(job, parent), NOTE: run_note(job)}
        self._tracker.begin(chosen_params(job), tags, datasets, SOURCE, parent)
        self._tracker.text(yaml.safe_dump(dump_shareable(job.experiment), sort_keys=False), EXPERIMENT_FILE)

    def ready(self) -> None:
        """Note that the state is built and training begins."""
        self._ready_at = time.time()

    # Steps

    def step(self, result: StepResult, waited_s: float, *, step: int) -> None:
        """Add a step to the meter; report after the first one what the start took, and show the progress.

        Args:
            step: steps that are done.
        """
        self._meter.add(result, waited_s)
        if not self._first_step_reported:
            self._first_step_reported = True
            self._report_start(waited_s)
        if self._context.rank == 0 and not self.due(step) and time.monotonic() - self._shown_at >= SHOWN_S:
            self._show(step, self._meter.means(self._job.schedule.global_batch_size))

    def _show(self, step: int, values: dict[str, float]) -> None:
        self._shown_at = time.monotonic()
        memory = memory_metrics(self._context.device)["system/memory_gib"]
        note = (
            f"loss {values['train/loss']:.2f}, {values['train/speed/images_per_s']:.1f} images/s,"
            f" data wait {values['train/speed/data_wait_share']:.1%}, {memory:.1f} GiB"
        )
        self._context.console.progress(step, note)

    def _report_start(self, waited_s: float) -> None:
        now, job = time.time(), self._job
        parts = {
            "starting the workers": self._entered_at - job.launched_at,
            "building the model and reading the checkpoint": self._ready_at - self._entered_at,
            "waiting for the first data": waited_s,
            "the step itself": now - self._ready_at - waited_s,
        }
        named = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in sorted(parts.items(), key=lambda p: -p[1]))
        since = "workers' last heartbeat" if job.restarted else "launch"
        self._context.print(f"first step {now - job.launched_at:.1f} s after the {since}: {named}")

    def due(self, step: int) -> bool:
        """Whether metrics are reported after `step` steps."""
        return step % self._job.experiment.tracking.every_steps == 0 or step == self._job.schedule.steps

    def report(self, state: TrainState) -> None:
        """Report losses, rates, speed and memory since the last report."""
        schedule = self._job.schedule
        values = self._meter.read(schedule.global_batch_size)
        # Rates, progress and memory; the losses are means since the last report.
        values |= learning_rates(state.optimizer.param_groups)
        values["train/epoch"] = state.step / schedule.steps_per_epoch
        values["train/skipped_steps"] = state.skipped_steps
        values |= memory_metrics(self._context.device)
        if state.teachers is not None:
            values |= state.teachers.metrics()
        if self._context.rank != 0:
            return
        self._show(state.step, values)
        if self._tracker is not None:
            self._track(self._tracker, values | system_metrics(), state.step)

    def _track(self, tracker: Tracker, values: dict[str, float], step: int) -> None:
        """Log a report, or the part of it that is due; the last one of the run whole."""
        job, now = self._job, time.time()
        last = step == job.schedule.steps
        if now - job.launched_at > FULL_RATE_S and now - self._tracked_at < THINNED_S and not last:
            return
        self._tracked_at = now
        number = step // job.experiment.tracking.every_steps
        # By the step's number, so that a resumed run logs at the same steps.
        if not last and number % LAYER_TERMS_EVERY != 1:
            values = {name: value for name, value in values.items() if not name.startswith(LAYER_TERMS)}
        tracker.metrics(values, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block from the speed metrics."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self._meter.started_at += time.perf_counter() - started_at

    # Evaluations and the end

    def evaluation(
        self,
        report: "EvaluationReport",
        images: Iterable[tuple[str, bytes]],
        *,
        step: int,
        title: str,
        final: bool = False,
    ) -> None:
        """Print an evaluation, and write it to the run's folder and to MLflow.

        Args:
            images: name and PNG.
        """
        self._context.print(f"evaluation, {title}\n{report.table()}")
        # In the run's folder: the report, then each image. In MLflow: metrics, at the end figures and a table too.
        folder = storage.join(self._job.run, "evaluation", "final" if final else checkpoint.step_folder(step))
        report.write(folder)
        if self._tracker is not None:
            self._tracker.metrics(report.metrics(final=final), step)
            if final:
                _log_figures(self._tracker, report)
        for name, png in images:
            storage.write_atomic(storage.join(folder, f"{name.replace('/', '_')}.png"), png)
            if self._tracker is not None:
                self._tracker.image(f"{FINAL if final else VAL}/{name}", open_image(png), step)

    def finish(self, state: TrainState, report: "EvaluationReport | None", latency_ms: float | None) -> None:
        """Log and register the best weights; write the result of the run. On rank 0.

        Args:
            state: with the best weights loaded.
        """
        if self._tracker is not None:
            self._log_end(self._tracker, state, report, latency_ms)
        result = {
            "step": state.step,
            "best_step": state.history.best_step,
            "best_ap": state.history.best_ap,
            "skipped_steps": state.skipped_steps,
            "numbers": report.headline_numbers if report else None,
            "evaluated": state.history.evaluated,
            "latency_ms": latency_ms,
        }
        # The result file marks the run as finished. It is the last one: whatever dies now, all the rest waits in the outbox.
        storage.write_atomic(storage.join(self._job.run, RESULT), json.dumps(result, indent=1).encode())

    def deliver(self, step: int) -> str | None:
        """Wait for MLflow to have everything, as long as it makes progress; return what it lacks."""
        if self._tracker is None:
            return None
        console = self._context.console
        with console.working(step, "recording the run in MLflow"):
            left = self._tracker.deliver(show=lambda left: console.progress(step, f"MLflow: {left} left"))
        self._delivered = True
        if not left.events:
            note_recorded(self._job.run)
        return missing_from_mlflow(left, self._tracker.rejected, self._job.run)

    def _log_end(
        self, tracker: Tracker, state: TrainState, report: "EvaluationReport | None", latency_ms: float | None
    ) -> None:
        job = self._job
        if latency_ms is not None:
            tracker.metrics({f"{FINAL}/latency_ms": latency_ms}, state.step)
        shards = job.data.val or job.data.train.sets[0].shards
        detector = state.averaged_detector
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder, "detector.safetensors")
            weights.write_bytes(checkpoint.weights_as_bytes(detector))
            log_detector(
                tracker,
                config=detector.config,
                weights=weights,
                categories=job.data.train.names,
                metrics=report.metrics(final=True) if report else {},
                example=_first_image(shards),
                step=state.step,
                dataset=dataset_input(job.data.val, "validation") if job.data.val else None,
                thresholds=report.points.thresholds if report else None,
                registered_model_name=job.experiment.tracking.registered_model_name,
                alias=job.experiment.tracking.alias,
            )
        if report is not None:
            tracker.tags({NOTE: run_note(job, report.numbers)})
        tracker.finish("FINISHED")
        note_unrecorded(job.run, tracker.folder)


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory of this worker in GiB: peak of the GPU, or size of the process on a CPU."""
    if device.type == "cuda":
        used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return {"system/memory_gib": peak / 2**30, "system/memory_now_gib": used / 2**30}
    return {"system/memory_gib": psutil.Process().memory_info().rss / 2**30}


def _log_figures(tracker: Tracker, report: "EvaluationReport") -> None:
    for name, figure in report.figures().items():
        tracker.figure(figure, f"evaluation/{name}.png")
    columns = report.class_columns()
    table: dict[str, list[Scalar]] = {"class": [*columns.pop("name")], **columns}
    tracker.table(table, "evaluation/per_class.json")


def _first_image(shards: ShardSet) -> bytes:
    (group, *_) = read_row_groups(locate_row_groups(shards), [0]).values()
    image: bytes = group.column("image")[0].as_py()
    return image
