"""A training run as one worker lives it. Collective: all workers go through it in step.

    build the learner -> newest checkpoint of this run, or first weights -> step after step
        -> every so often: losses and speed to the record, an evaluation, a checkpoint
        -> the best weights, evaluated a last time

The run knows nothing of Ray Train: a `Group` tells it who the others are, a `Console` shows what it says.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from dfine_core import Detector
from dfine_core.inference import LoadedDetector
from pipeline import provenance, storage
from pipeline.config_files import dump
from pipeline.data.augment.augment import multiscale_size
from pipeline.data.shards.manifest import load_shards
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.stream import StreamSettings, training_stream
from pipeline.errors import UserError
from pipeline.evaluation.report import EvaluationReport
from pipeline.tracking.system import system_metrics
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint, run_log
from pipeline.training.context import Job
from pipeline.training.evaluator import Evaluations
from pipeline.training.group import Group
from pipeline.training.heartbeat import Console
from pipeline.training.init_weights import load_initial
from pipeline.training.schedule import derive
from pipeline.training.stage_two import Standing, after_evaluation, goes_back
from pipeline.training.state import make_learner
from pipeline.training.step import HostFlag, StepResult, to_micro_batch, train_step

LATENCY_SECONDS = 3.0  # spent on finding it


class NotFiniteError(UserError, RuntimeError):
    """Losses or gradients stay NaN or infinite."""


@dataclass
class Meter:
    """Losses summed on the device and times summed on the host, from one report to the next."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    counted: Tensor | None = None  # steps that were finite
    steps: int = 0
    waited: float = 0.0
    started_at: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult, waited: float) -> None:
        values = {**result.terms, "loss": result.loss, "grad_norm": result.grad_norm}
        for name, value in values.items():
            finite_value = torch.where(result.finite, value, 0)
            self.terms[name] = self.terms[name] + finite_value if name in self.terms else finite_value
        counted = result.finite.float()
        self.counted = counted if self.counted is None else self.counted + counted
        self.steps += 1
        self.waited += waited

    def read(self, images_per_step: int) -> dict[str, float]:
        """Means since the last reading, and a new start. Waits for the device."""
        if self.counted is None:
            return {}
        *sums, counted = torch.stack([*self.terms.values(), self.counted]).tolist()
        seconds = time.perf_counter() - self.started_at
        means = {name: total / max(counted, 1) for name, total in zip(self.terms, sums, strict=True)}
        values = {f"train/{name}": mean for name, mean in means.items()}
        values |= {
            "speed/images_per_s": self.steps * images_per_step / seconds,
            "speed/step_s": seconds / self.steps,
            "speed/data_wait_share": self.waited / seconds,
        }
        self.terms, self.counted, self.steps, self.waited = {}, None, 0, 0.0
        self.started_at = time.perf_counter()
        return values


@dataclass(frozen=True)
class Made:
    """A step whose finiteness the host has not looked at yet."""

    step: int
    batches: Sequence[Batch]
    result: StepResult
    finite: HostFlag


class Run:
    def __init__(self, job: Job, group: Group, console: Console, tracker: Tracker | None) -> None:
        self.job, self.group, self.console, self.tracker = job, group, console, tracker
        self.experiment = job.experiment
        self.shards = load_shards(self.experiment.data.train)
        self.val = load_shards(self.experiment.data.val) if self.experiment.data.val else None
        self.schedule = derive(
            self.experiment,
            images=self.shards.manifest.images,
            workers=group.world_size,
            micro_batch=job.micro_batch,
        )
        self.learner = make_learner(
            self.experiment,
            self.schedule,
            num_classes=len(self.shards.manifest.categories),
            device=group.device,
            workers=group.world_size,
        )
        self.step = 0  # steps done
        self.standing = Standing()
        self.skipped = self.in_a_row = 0
        self._last_images: list[int] = []  # of a step that was not finite
        self._went_back_to: int | None = None
        self.parent: dict[str, str] = {}
        self.meter = Meter()
        self._unchecked: Made | None = None
        self.evaluations = None
        if self.val is not None:
            self.evaluations = Evaluations(job, group, console, tracker, self.val, self.schedule)
        self._writer = (
            checkpoint.Writer(job.checkpoints, keep=self.experiment.checkpoints.keep) if group.rank == 0 else None
        )
        self._first_step_said = False
        self._entered_at = self._built_at = time.time()

    # From the first step to the last

    def train(self) -> EvaluationReport | None:
        """The evaluation of the best weights, on rank 0 and if there is anything to evaluate on."""
        self._begin()
        if self.tracker is not None:
            run_log.begin(
                self.tracker,
                self.job.run,
                self.experiment,
                self.schedule,
                self.shards,
                self.val,
                self.parent,
                self.job.ray_job,
            )
        if self.step == 0 and self.evaluations is not None and self.experiment.evaluation.before_training:
            self.evaluations.here(self.learner.average.module, self.step)
        self._built_at = time.time()
        batches = self._stream()
        while self.step < self.schedule.steps:
            if self.step == self.schedule.stage_two_step:
                self._hear_evaluation(wait=True)
            if goes_back(self.standing, self.step, self.schedule.stage_two_step):
                self._take_weights_of(self.standing.stage_one_step)
            self._one_step(batches)
            if self._reports():
                self._report()
                self._hear_evaluation(wait=False)
            if self._stops() and not self._settle():
                batches = self._go_back()
                continue
            if self.schedule.evaluates_after(self.step):
                if self.experiment.evaluation.beside and self.schedule.is_strong(self.step - 1):
                    self._evaluate_beside()
                else:
                    self._evaluate()
            if self._saves():
                self._save()
        self._hear_evaluation(wait=True)
        return self._end()

    def _one_step(self, batches: Iterator[Batch]) -> None:
        self.console.beat(self.step, "waiting for data")
        asked_at = time.perf_counter()
        taken = [next(batches) for _ in range(self.schedule.accumulation(self.group.world_size))]
        waited = time.perf_counter() - asked_at
        self.console.beat(self.step, "training")
        for batch in taken:
            for replaced in batch.replaced:
                self.console.say(f"image {replaced.image_id} was replaced by the next one: {replaced.reason}")
        self._set_learning_rate()
        seed, size = self.experiment.seed, self._size()
        micro_batches = [to_micro_batch(batch, self.learner, size=size, seed=seed) for batch in taken]
        result = train_step(self.learner, micro_batches)
        finite = HostFlag(result.finite)
        self._look_at_last()  # while the device works on this one
        self._unchecked = Made(self.step, taken, result, finite)
        self.meter.add(result, waited)
        self.step += 1
        if not self._first_step_said:
            self._first_step_said = True
            self._say_start(waited)

    def _set_learning_rate(self) -> None:
        factor = self.schedule.learning_rate_factor(self.step)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _size(self) -> tuple[int, int]:
        height, width = self.learner.detector.config.input_size
        if not self.experiment.multiscale_repeat or not self.schedule.is_strong(self.step):
            return height, width
        side = multiscale_size(self.experiment.seed, self.step, height, self.experiment.multiscale_repeat)
        return side, side

    def _stream(self) -> Iterator[Batch]:
        data = self.experiment.data
        settings = StreamSettings(
            global_batch=self.schedule.global_batch,
            micro_batch=self.schedule.micro_batch,
            canvas=self.learner.detector.config.input_size,
            augment=self.experiment.augment,
            augment_epochs=self.schedule.strong_epochs,
            seed=self.experiment.seed,
            window_rows=data.window_rows,
            decode_in=data.decode_in,
            prefetch=data.prefetch,
        )
        return training_stream(
            self.shards,
            settings,
            start_step=self.step,
            stop_step=self.schedule.steps,
            rank=self.group.rank,
            world_size=self.group.world_size,
            broadcast=self.group.broadcast,
        )

    # Where a run begins: own checkpoint, the one to resume, first weights, nothing

    def _begin(self) -> None:
        own = [
            storage.join(self.job.checkpoints, checkpoint.folder_name(s))
            for s in checkpoint.steps_in(self.job.checkpoints)
        ]
        for uri in [*reversed(self.group.broadcast(own)), *filter(None, [self.job.resume])]:
            try:
                self._take_over(checkpoint.restore(self.learner, uri))
                self._say(f"continuing at step {self.step} from {uri}")
                self._evaluate_again()
                return
            except checkpoint.CheckpointError as error:
                if uri == self.job.resume:
                    raise
                self._say(f"{error}; trying the one before")
        if self.experiment.init:
            names = [category.name for category in self.shards.manifest.categories]
            origin = load_initial(self.learner.detector, self.experiment.init, names)
            self.learner.average.module.load_state_dict(self.learner.detector.state_dict())
            self.parent = origin.parent
            for text in origin.lines:
                self._say(text)
        else:
            self._say("starting from scratch")

    def _take_over(self, metadata: checkpoint.Metadata) -> None:
        self.step, self.standing = metadata.step, metadata.standing
        self.skipped, self.parent = metadata.skipped_steps, metadata.parent

    def _take_weights_of(self, step: int | None) -> None:
        """The state of an earlier step, the count of steps and the record going on."""
        assert step is not None
        self._wait_for_checkpoints()
        checkpoint.restore(self.learner, storage.join(self.job.checkpoints, checkpoint.folder_name(step)))
        self._say(f"step {self.step}: going on from the best weights of stage one, of step {step}")

    # What is not finite

    def _look_at_last(self) -> None:
        """Read whether the last step was finite, and act on it."""
        made, self._unchecked = self._unchecked, None
        if made is None:
            return
        if made.finite:
            self.in_a_row = 0
            return
        self.skipped += 1
        # In fp16 a scale that is too large is ordinary: the step is repeated at a smaller one by the next batch.
        searching_scale = self.learner.loss_scale.enabled and bool(made.result.loss.isfinite())
        if searching_scale and float(self.learner.loss_scale.scale) >= 1:
            return
        self.in_a_row += 1
        self._last_images = [image_id for batch in made.batches for image_id in batch.image_id.tolist()]
        self.console.say(
            f"worker {self.group.rank} skipped step {made.step}: loss {float(made.result.loss):g}, gradient norm"
            f" {float(made.result.grad_norm):g}, images {self._last_images}"
        )
        if self.skipped <= self.experiment.not_finite.saved:
            uri = run_log.save_not_finite(self.job.run, made.step, self.group.rank, made.batches, self.learner.detector)
            self._say(f"its batch and the weights are kept: `python -m jobs.replay {uri}` looks into them")

    def _settle(self) -> bool:
        """Before the state is kept or judged; False if the run must go back."""
        self._look_at_last()
        return self.in_a_row < self.experiment.not_finite.in_a_row

    def _go_back(self) -> Iterator[Batch]:
        """To the last checkpoint, after too many steps that were not finite."""
        self._wait_for_checkpoints()
        steps = self.group.broadcast(checkpoint.steps_in(self.job.checkpoints))
        if not steps or steps[-1] == self._went_back_to:
            recurs = (
                "again after going back to the last checkpoint" if steps else "and there is no checkpoint to go back to"
            )
            raise NotFiniteError(
                f"{self.in_a_row} steps in a row up to step {self.step} were not finite, {recurs}; the last images of worker"
                f" {self.group.rank} are {self._last_images}. The first of the batches are kept in"
                f" {storage.join(self.job.run, 'not_finite')}: `python -m jobs.replay` finds the place. A lower optimizer.lr or"
                " numerics.precision=fp32 is the usual way out."
            )
        self._went_back_to = steps[-1]
        self.in_a_row = 0
        skipped = self.skipped
        self._take_over(
            checkpoint.restore(self.learner, storage.join(self.job.checkpoints, checkpoint.folder_name(steps[-1])))
        )
        self.skipped = skipped
        self._evaluate_again()
        self._say(f"going back to the checkpoint of step {self.step}")
        return self._stream()

    # Now and then

    def _reports(self) -> bool:
        return self.step % self.experiment.tracking.every_steps == 0 or self.step == self.schedule.steps

    def _saves(self) -> bool:
        every = self.experiment.checkpoints.every_steps
        return self.schedule.evaluates_after(self.step) or (every is not None and self.step % every == 0)

    def _stops(self) -> bool:
        return self._saves() or self.in_a_row >= self.experiment.not_finite.in_a_row

    def _report(self) -> None:
        values = self.meter.read(self.schedule.global_batch)
        groups = {g["name"]: g["lr"] for g in self.learner.optimizer.param_groups}
        values["train/lr"] = groups.get("rest", next(iter(groups.values())))
        values["train/lr_backbone"] = groups.get("backbone", 0.0)
        values["train/epoch"] = self.step / self.schedule.steps_per_epoch
        values["train/skipped_steps"] = self.skipped
        values |= run_log.memory(self.group.device)
        if self.group.rank == 0:
            note = (
                f"loss {values['train/loss']:.2f}, {values['speed/images_per_s']:.1f} images/s,"
                f" data wait {values['speed/data_wait_share']:.1%}, {values['system/memory_gib']:.1f} GiB"
            )
            self.console.progress(self.step, note)
            if self.tracker is not None:
                self.tracker.metrics(values | system_metrics(), self.step)

    def _evaluate(self, *, final: bool = False) -> EvaluationReport | None:
        if self.evaluations is None:
            return None
        self.console.beat(self.step, "evaluating")
        started_at = time.perf_counter()
        best = self.standing.best_step if final else None
        ap, report = self.evaluations.here(self.learner.average.module, self.step, best_step=best, final=final)
        if not final:
            self._judged(ap, self.step, report)
        self.meter.started_at += time.perf_counter() - started_at
        return report

    def _judged(self, ap: float, step: int, report: EvaluationReport | None) -> None:
        """Into the standing, and to whoever searches."""
        value = 0.0 if ap != ap else ap  # NaN: nothing to find in the validation set
        stage_one = self.schedule.is_strong(step - 1)
        self.standing = after_evaluation(self.standing, ap=value, step=step, stage_one=stage_one)
        place = {"step": float(step), "epoch": step / self.schedule.steps_per_epoch}
        self.group.report({**(report.numbers if report is not None else {}), **place})

    def _evaluate_beside(self) -> None:
        """Stage one decides nothing on the answer, so it may come later."""
        self._hear_evaluation(wait=True)
        self.standing = replace(self.standing, pending_step=self.step)
        if self.evaluations is not None and self.group.rank == 0:
            self.evaluations.hand_over(self.learner, checkpoint.weights_as_bytes(self.learner.average.module))

    def _evaluate_again(self) -> None:
        """What was under way when the run was interrupted."""
        step = self.standing.pending_step
        if step is not None and self.evaluations is not None and self.group.rank == 0:
            uri = storage.join(self.job.checkpoints, checkpoint.folder_name(step))
            weights = checkpoint.read_file(uri, "ema", checkpoint.read_metadata(uri))
            self.evaluations.hand_over(self.learner, weights)

    def _hear_evaluation(self, *, wait: bool) -> None:
        """The answer of an evaluation beside the training, if one is awaited and there."""
        step = self.standing.pending_step
        if step is None or self.evaluations is None:
            return
        outcome = self.evaluations.answer(step, wait=wait)
        if outcome is None:
            return
        self.standing = replace(self.standing, pending_step=None)
        if outcome.ap is not None:
            self._judged(outcome.ap, step, outcome.answer.report if outcome.answer else None)

    def _save(self) -> None:
        if self._writer is None:
            return
        self.console.beat(self.step, "saving")
        self._writer.write(checkpoint.take_snapshot(self.learner, self._metadata(), dump(self.experiment)))

    def _metadata(self) -> checkpoint.Metadata:
        uses = {"train": self.shards, **({"val": self.val} if self.val else {})}
        return checkpoint.Metadata(
            run=self.experiment.name or "",
            step=self.step,
            epoch=self.step // self.schedule.steps_per_epoch,
            stage=1 if self.schedule.is_strong(self.step) else 2,
            standing=self.standing,
            global_batch=self.schedule.global_batch,
            micro_batch=self.schedule.micro_batch,
            workers=self.group.world_size,
            skipped_steps=self.skipped,
            model=run_log.plain(self.learner.detector.config),
            categories=self.shards.manifest.categories,
            data={use: shards.manifest.digest for use, shards in uses.items()},
            tracking_key=self.tracker.run_key if self.tracker else None,
            parent=self.parent,
            versions=provenance.versions(),
            commit=provenance.code_commit(),
        )

    def _end(self) -> EvaluationReport | None:
        """Evaluate the best weights with the protocol's own program, and say where everything is."""
        self._wait_for_checkpoints()
        best = self.standing.best_step
        if best is not None and best != self.step:
            checkpoint.restore(self.learner, storage.join(self.job.checkpoints, checkpoint.folder_name(best)))
        report = self._evaluate(final=True)
        if self.group.rank == 0:
            run_log.finish(
                self.job.run,
                self.tracker,
                cast(Detector, self.learner.average.module),
                self.val or self.shards,
                report,
                self.standing,
                self.experiment,
                self.step,
                self._latency(),
            )
        return report

    def _latency(self) -> float | None:
        """Median milliseconds of one image."""
        if not self.experiment.evaluation.latency:
            return None
        from pipeline.benchmark import measure, of_detector  # here: it would lengthen every worker's start

        copied = copy.deepcopy(self.learner.average.module)  # it will be deployed
        names = tuple(category.name for category in self.shards.manifest.categories)
        ids = tuple(category.original_id for category in self.shards.manifest.categories)
        loaded = LoadedDetector(cast(Detector, copied).eval(), names, ids, self.job.run, self.group.device)
        return measure(of_detector(loaded), batches=(), seconds=LATENCY_SECONDS).latency_ms["p50"]

    def _wait_for_checkpoints(self) -> None:
        """On all workers, until rank 0 has written what it was given."""
        if self._writer is not None:
            self._writer.wait()
        self.group.broadcast(None)

    def _say(self, text: str) -> None:
        if self.group.rank == 0:
            self.console.say(text)

    def _say_start(self, waited: float) -> None:
        now = time.time()
        parts = {
            "starting the workers": self._entered_at - self.job.launched_at,
            "building the model and reading the checkpoint": self._built_at - self._entered_at,
            "waiting for the first data": waited,
            "the step itself": now - self._built_at - waited,
        }
        named = ", ".join(
            f"{name} {seconds:.1f} s" for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
        )
        since = "workers were last heard of" if self.job.restarted else "launch"
        self._say(f"first step {now - self.job.launched_at:.1f} s after the {since}: {named}")


def train(job: Job, group: Group, console: Console) -> dict[str, Any]:
    """The whole run on this worker; what it came to, for the driver."""
    if job.threads:
        torch.set_num_threads(job.threads)
    tracker = None
    if group.rank == 0 and job.tracking is not None and job.tracking_folder is not None:
        tracker = Tracker(job.tracking_folder, job.tracking)
    with tracker or nullcontext():
        run = Run(job, group, console, tracker)
        report = run.train()
        run_id = tracker.wait_for_run_id(timeout=10) if tracker is not None else None
    outcome = {"step": run.step, "skipped_steps": run.skipped, "best_ap": run.standing.best_ap, "run_id": run_id}
    return outcome | ({"numbers": report.numbers} if report is not None else {})
