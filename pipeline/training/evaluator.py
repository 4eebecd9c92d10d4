"""How a run is evaluated: here, by all workers, while the training waits; or beside it, by another process."""

from collections.abc import Iterable

from torch import nn

from pipeline import storage
from pipeline.data.shards.manifest import ShardSet
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.figures import png
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.evaluation.report import EvaluationReport
from pipeline.evaluation.sample_images import sample_pictures
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint, run_log
from pipeline.training.beside import Beside, Order, Outcome
from pipeline.training.context import Job
from pipeline.training.group import Group
from pipeline.training.heartbeat import Console
from pipeline.training.schedule import Schedule
from pipeline.training.step import Learner

DECODED_INLINE = 1000  # validation images of a worker up to which starting Ray Data takes longer than decoding them


class Evaluations:
    """Of one run, on this worker."""

    def __init__(
        self, job: Job, group: Group, console: Console, tracker: Tracker | None, val: ShardSet, schedule: Schedule
    ) -> None:
        self._job, self._group, self._console, self._tracker = job, group, console, tracker
        self._val, self._settings = val, job.experiment.evaluation
        self._micro_batch = self._settings.micro_batch or 2 * schedule.micro_batch
        self._truth: GroundTruth | None = None
        self._beside = Beside(group.submit, group.broadcast)

    def here(
        self, detector: nn.Module, step: int, *, best_step: int | None = None, final: bool = False
    ) -> tuple[float, EvaluationReport | None]:
        """AP on all workers, the report on rank 0. Collective.

        Args:
            best_step: of the weights, if they are not those of `step`.
        """
        group = self._group
        if group.rank == 0 and self._truth is None:
            self._truth = read_ground_truth(self._val)
        few = self._val.manifest.images <= DECODED_INLINE * group.world_size
        report = evaluate(
            detector,
            self._val,
            self._truth,
            device=group.device,
            rank=group.rank,
            world_size=group.world_size,
            broadcast=group.broadcast,
            micro_batch=self._micro_batch,
            decode_in="inline" if few else self._job.experiment.data.decode_in,
            final=final,
        )
        if report is not None:
            title = f"best weights, of step {best_step}" if final else f"step {step}"
            drawn = sample_pictures(detector, self._val, device=group.device, count=self._settings.pictures)
            self._keep(report, ((name, png(figure)) for name, figure in drawn), step, title, final=final)
        return group.broadcast(None if report is None else report.numbers["AP"]), report

    def hand_over(self, learner: Learner, weights: bytes) -> None:
        """On rank 0: have these averaged weights evaluated beside the training."""
        self._beside.begin(
            Order(
                model=run_log.plain(learner.detector.config),
                weights=weights,
                val=self._val.uri,
                micro_batch=self._micro_batch,
                pictures=self._settings.pictures,
            )
        )

    def answer(self, step: int, *, wait: bool) -> Outcome | None:
        """Of the weights of `step`; None while they are being evaluated. Collective."""
        outcome = self._beside.outcome(self._group.rank, wait=wait)
        if outcome is not None and self._group.rank == 0:
            if outcome.answer is None:
                self._console.say(
                    f"the evaluation of step {step} failed: {outcome.error}; the training goes on without it"
                )
            else:
                self._keep(outcome.answer.report, outcome.answer.pictures, step, f"step {step}, beside the training")
        return outcome

    def _keep(
        self,
        report: EvaluationReport,
        pictures: Iterable[tuple[str, bytes]],
        step: int,
        title: str,
        *,
        final: bool = False,
    ) -> None:
        self._console.say(f"evaluation, {title}\n{report.table()}")
        folder = storage.join(self._job.run, f"evaluation/{'final' if final else checkpoint.folder_name(step)}")
        run_log.keep_evaluation(report, pictures, self._tracker, folder, step=step, final=final)
