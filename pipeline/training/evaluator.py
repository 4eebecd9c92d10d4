"""Evaluation of the averaged weights: by all workers while training waits, or asynchronously in another process.

At most one asynchronous evaluation is in flight, which bounds memory. Its step is part of the history, so a run that
resumes submits it again.
"""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.training import checkpoint
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.evaluation_task import EvaluationRequest, EvaluationResult
from pipeline.training.run_log import RunLog
from pipeline.training.stage_two import with_evaluation
from pipeline.training.state import TrainState

if TYPE_CHECKING:  # imported with the first evaluation: the first step must not wait for metrics and figures
    from pipeline.evaluation.ground_truth import GroundTruth
    from pipeline.evaluation.report import EvaluationReport

DECODED_INLINE = 1000  # validation images per worker; for fewer, Ray Data takes longer to start than to decode


class Evaluator:
    """Collective: all ranks call every method. Without validation data it does nothing."""

    def __init__(self, job: TrainJob, context: WorkerContext, log: RunLog) -> None:
        self._job, self._context, self._log = job, context, log
        self._val, self._settings = job.data.val, job.experiment.evaluation
        self._micro_batch = self._settings.micro_batch_size or 2 * job.schedule.micro_batch_size
        self._ground_truth: GroundTruth | None = None
        self._in_flight: Future[EvaluationResult] | None = None  # on rank 0

    def lacks(self, state: TrainState) -> bool:
        """Whether the evaluation of this step is due and was not begun: the run was stopped there."""
        if self._val is None or not self._job.schedule.evaluates_after(state.step):
            return False
        return state.step not in (state.history.pending_step, *(step for step, _ in state.history.evaluated))

    def evaluate(self, state: TrainState) -> bool:
        """Evaluate now, or submit an asynchronous evaluation where stage one allows it; False if a stop request ended it."""
        if self._val is None:
            return True
        if self._settings.asynchronous and self._job.schedule.is_strong(state.step - 1):
            self.submit(state)
            return True
        try:
            ap, report = self._evaluate_inline(state, title=f"step {state.step}")
        except _EvaluationStoppedError:
            return False
        self._record(state, ap, state.step, report)
        return True

    def _stop_if_asked(self, _: object) -> None:
        """End the evaluation of the only worker where the loop will heed the request; several would wait for each other."""
        context = self._context
        if context.world_size == 1 and context.stop.heeded and context.stop.made:
            raise _EvaluationStoppedError

    def evaluate_initial(self, state: TrainState) -> None:
        """Evaluate the weights that training starts from; the history does not count them."""
        if self._val is not None:
            self._evaluate_inline(state, title=f"step {state.step}")

    def evaluate_best(self, state: TrainState) -> "EvaluationReport | None":
        """Evaluate the loaded best weights with pycocotools; return the report on rank 0."""
        if self._val is None:
            return None
        best = state.history.best_step
        _, report = self._evaluate_inline(state, title=f"best weights, of step {best}", final=True)
        return report

    def _evaluate_inline(
        self, state: TrainState, *, title: str, final: bool = False
    ) -> "tuple[float, EvaluationReport | None]":
        """AP on all ranks, and the report on rank 0."""
        from pipeline.evaluation.evaluate import evaluate
        from pipeline.evaluation.ground_truth import read_ground_truth
        from pipeline.evaluation.sample_images import sample_images

        assert self._val is not None
        context, detector = self._context, state.averaged_detector
        with self._log.paused(), context.console.working(state.step, "evaluating"):
            if self._ground_truth is None:
                self._ground_truth = read_ground_truth(self._val)
            # A small set is decoded by the workers themselves: starting Ray Data would take longer.
            few = self._val.manifest.images <= DECODED_INLINE * context.world_size
            report = evaluate(
                detector,
                self._val,
                self._ground_truth,
                device=context.device,
                rank=context.rank,
                world_size=context.world_size,
                broadcast=context.broadcast,
                shared=self._job.exchange,
                micro_batch_size=self._micro_batch,
                decode_in="inline" if few else context.decode_in or self._job.experiment.data.decode_in,
                final=final,
                wanted_precision=self._settings.wanted_precision,
                on_detections=self._stop_if_asked,
            )
            if report is not None:
                count = self._settings.num_images
                images = sample_images(detector, self._val, device=context.device, count=count)
                self._log.evaluation(report, images, step=state.step, title=title, final=final)
            return context.broadcast(None if report is None else report.numbers["AP"]), report

    def _record(self, state: TrainState, ap: float, step: int, report: "EvaluationReport | None") -> None:
        """Add an evaluation to the history, and report it to Ray."""
        value = 0.0 if ap != ap else ap  # NaN: the validation set has no boxes
        stage_one = self._job.schedule.is_strong(step - 1)
        state.history = with_evaluation(state.history, ap=value, step=step, stage_one=stage_one)
        progress = {"step": float(step), "epoch": step / self._job.schedule.steps_per_epoch}
        self._context.report({**(report.headline_numbers if report is not None else {}), **progress})

    # Asynchronous evaluation

    def submit(self, state: TrainState) -> None:
        """Submit the current averaged weights, once the evaluation in flight has ended."""
        self.poll(state, wait=True)
        state.history = replace(state.history, pending_step=state.step)
        if self._context.rank == 0:
            self._submit(state, checkpoint.weights_as_bytes(state.ema.module))

    def resubmit(self, state: TrainState, checkpoints: CheckpointManager) -> None:
        """Submit again what was in flight when the run was interrupted."""
        step = state.history.pending_step
        if step is None or self._val is None:
            return
        problem: str | None = None
        if self._context.rank == 0:
            uri = checkpoints.uri(step)
            try:
                self._submit(state, checkpoint.read_file(uri, "ema", checkpoint.read_metadata(uri)))
            except checkpoint.CheckpointError as error:
                problem = f"WARNING: {error}; the run continues without the evaluation of step {step}"
                self._context.print(problem)
        if self._context.broadcast(problem) is not None:
            state.history = replace(state.history, pending_step=None)

    def _submit(self, state: TrainState, weights: bytes) -> None:
        assert self._val is not None
        assert self._context.submit_evaluation is not None, "asynchronous evaluation is not configured for this run"
        request = EvaluationRequest(
            model=state.detector.config.to_plain(),
            weights=weights,
            val=self._val,
            micro_batch_size=self._micro_batch,
            num_images=self._settings.num_images,
            wanted_precision=self._settings.wanted_precision,
        )
        self._in_flight = self._context.submit_evaluation(request)

    def poll(self, state: TrainState, *, wait: bool) -> None:
        """Record the evaluation in flight if it has ended.

        Args:
            wait: until it has.
        """
        step = state.history.pending_step
        if step is None or self._val is None:
            return
        # Rank 0 alone has the future; the other ranks learn the outcome from it.
        result: EvaluationResult | None = None
        outcome: _Outcome | None = None
        if self._context.rank == 0 and self._in_flight is not None and (wait or self._in_flight.done()):
            try:
                with self._context.console.working(state.step, "waiting for an evaluation"):
                    result = self._in_flight.result()
                outcome = _Outcome(ap=result.report.numbers["AP"])
            except Exception as error:  # noqa: BLE001 - training survives any failure of the other process
                outcome = _Outcome(error=f"{type(error).__name__}: {error}")
            self._in_flight = None
        outcome = self._context.broadcast(outcome)
        if outcome is None:
            return
        state.history = replace(state.history, pending_step=None)
        if outcome.ap is None:
            self._context.print(f"the evaluation of step {step} failed: {outcome.error}; training continues without it")
            return
        if result is not None:
            self._log.evaluation(result.report, result.images, step=step, title=f"step {step}, asynchronous")
        self._record(state, outcome.ap, step, result.report if result is not None else None)


class _EvaluationStoppedError(Exception):
    """A stop request came during an evaluation."""


@dataclass(frozen=True)
class _Outcome:
    """End of an asynchronous evaluation, as every rank learns it."""

    ap: float | None = None  # None: it failed
    error: str = ""
