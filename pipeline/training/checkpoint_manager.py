"""Checkpoints of one run: where it starts, what it keeps, and where it returns to."""

from dataclasses import replace

from dfine_core.thresholds import ClassThresholds
from pipeline import provenance, storage
from pipeline.config import ConfigError
from pipeline.config_files import dump_shareable
from pipeline.redaction import redact_values
from pipeline.thresholds import write_thresholds
from pipeline.training import checkpoint
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.init_weights import load_initial
from pipeline.training.state import TrainState


class CheckpointManager:
    """Collective: all ranks call every method; rank 0 writes, all ranks read."""

    def __init__(self, job: TrainJob, context: WorkerContext, *, tracking_key: str | None) -> None:
        self._job, self._context, self._tracking_key = job, context, tracking_key
        self._damaged: set[int] = set()
        self._saved_step = 0
        self._writer = None
        if context.rank == 0:
            self._writer = checkpoint.CheckpointWriter(job.checkpoints, keep=job.experiment.checkpoints.keep)

    def restore_or_init(self, state: TrainState) -> None:
        """Bring `state` to the first of: newest intact checkpoint of this run, `--resume`, `init`, random weights.

        Raises:
            CheckpointError: the checkpoint to resume is damaged or of another model.
            ConfigError: the weights of `init` are missing or do not fit.
        """
        if self._restore_newest(state):
            self._context.print(f"continuing at step {state.step} from {self.uri(state.step)}")
        elif self._job.resume:
            checkpoint.restore(state, self._job.resume)
            self._context.print(f"continuing at step {state.step} from {self._job.resume}")
        elif self._job.experiment.init:
            self._init_weights(state, self._job.experiment.init)
        else:
            self._context.print("starting from scratch")

    def _restore_newest(self, state: TrainState) -> bool:
        """Restore this run's newest checkpoint that is intact; False if there is none."""
        restored = False
        for step in reversed(self.steps()):
            try:
                checkpoint.restore(state, self.uri(step))
            except checkpoint.CheckpointError as error:
                self._discount(step, f"{error}; trying the one before")
            else:
                restored = True
                break
        here = state.step if restored else None
        if (agreed := self._context.broadcast(here)) != here:
            raise checkpoint.CheckpointError(
                f"worker {self._context.rank} cannot read the checkpoint that worker 0 continues from: {here} instead of step"
                f" {agreed}; every node must see {self._job.checkpoints}"
            )
        return restored

    def _discount(self, step: int, message: str) -> None:
        self._context.print(message)
        self._damaged.add(step)
        if self._writer is not None:
            self._writer.discount(step)

    def _intact(self, wanted: int, others: list[tuple[int, float]]) -> int | None:
        """Step of the wanted checkpoint, or of the best of the others, if it is damaged; None if all are.

        Args:
            others: (step, AP).
        """
        chosen: int | None = None
        if self._context.rank == 0:
            present = checkpoint.steps_in(self._job.checkpoints)
            ranked = sorted((pair for pair in others if pair[0] in present), key=lambda pair: -pair[1])
            for step in dict.fromkeys([wanted, *(step for step, _ in ranked)]):
                if (problem := checkpoint.problem_of(self.uri(step))) is None:
                    chosen = step
                    break
                self._discount(step, f"WARNING: {problem}; trying the next best")
        agreed: int | None = self._context.broadcast(chosen)
        return agreed

    def _init_weights(self, state: TrainState, source: str) -> None:
        origin = load_initial(state.detector, source, self._job.data.train.names)
        state.ema.module.load_state_dict(state.detector.state_dict())
        state.parent = redact_values(origin.parent)
        for line in origin.lines:
            self._context.print(line)

    def save(self, state: TrainState) -> None:
        """Copy the state now; a thread of rank 0 writes it while training continues."""
        if self._writer is not None:
            self._damaged.discard(state.step)
            self._saved_step = state.step
            self._context.console.heartbeat(state.step, "saving")
            self._writer.write(
                checkpoint.take_snapshot(state, self._metadata(state), dump_shareable(self._job.experiment))
            )

    def load_best_of_stage_one(self, state: TrainState) -> None:
        """Continue from the best weights of stage one; the step count and the history go on."""
        step = state.history.stage_one_step
        assert step is not None  # `stage_two.restarts` is true only then
        self.wait()
        strong = self._job.schedule.is_strong
        chosen = self._intact(step, [(other, ap) for other, ap in state.history.evaluated if strong(other - 1)])
        if chosen is None:
            self._context.print(
                "WARNING: no weights of stage one are intact; stage two continues from the present ones"
            )
            return
        checkpoint.load_tensors(state, self.uri(chosen))
        self._context.print(f"step {state.step}: continuing from the best weights of stage one, step {chosen}")

    def load_best(self, state: TrainState) -> None:
        """Load the best weights of the run, if there was an evaluation; the next best ones where they are damaged."""
        self.wait()
        best = state.history.best_step
        if best is None or best == state.step:
            return
        chosen = self._intact(best, list(state.history.evaluated))
        if chosen == best:
            checkpoint.load_tensors(state, self.uri(best))
            return
        # The last checkpoint names the weights that stand for the run: it is written again, with the intact ones.
        taken = state.step if chosen is None else chosen
        ap = dict(state.history.evaluated).get(taken)
        self._context.print(f"WARNING: the best weights, of step {best}, are lost: step {taken} takes their place")
        state.history = replace(state.history, best_step=taken, best_ap=ap)
        self.save(state)
        self.wait()
        if taken != state.step:
            checkpoint.load_tensors(state, self.uri(taken))

    def keep_thresholds(self, state: TrainState, thresholds: ClassThresholds) -> None:
        """Write the thresholds of the best weights, which are loaded, to their checkpoint. On rank 0."""
        step = state.history.best_step
        try:
            folder = self.uri(state.step if step is None else step)
            write_thresholds(storage.join(folder, checkpoint.METADATA), thresholds)
        except ConfigError as error:
            self._context.print(f"WARNING: {error}; its thresholds are not kept")

    def rewind(self, state: TrainState) -> None:
        """Return to the newest checkpoint; the count of skipped steps goes on."""
        skipped = state.skipped_steps
        if not self._restore_newest(state):
            raise checkpoint.CheckpointError(f"{self._job.checkpoints}: no checkpoint to rewind to is intact")
        state.skipped_steps = skipped
        self._context.print(f"rewound to the checkpoint of step {state.step}")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints that are not known to be damaged, ascending, as rank 0 sees them."""
        intact = [step for step in checkpoint.steps_in(self._job.checkpoints) if step not in self._damaged]
        found: list[int] = self._context.broadcast(intact)
        return found

    def uri(self, step: int) -> str:
        """Path or URI of the checkpoint of a step."""
        return storage.join(self._job.checkpoints, checkpoint.step_folder(step))

    def wait(self) -> None:
        """Block all ranks until rank 0 has written every snapshot."""
        if self._writer is not None:
            with self._context.console.working(self._saved_step, "saving"):
                self._writer.wait()
        self._context.broadcast(None)

    def _metadata(self, state: TrainState) -> checkpoint.Metadata:
        job, schedule = self._job, self._job.schedule
        return checkpoint.Metadata(
            run=job.experiment.name or "",
            step=state.step,
            epoch=state.step // schedule.steps_per_epoch,
            stage=1 if schedule.is_strong(state.step) else 2,
            history=state.history,
            global_batch_size=schedule.global_batch_size,
            micro_batch_size=schedule.micro_batch_size,
            workers=self._context.world_size,
            skipped_steps=state.skipped_steps,
            model=state.detector.config.to_plain(),
            categories=job.data.train.categories,
            data=job.data.digests(),
            tracking_key=self._tracking_key,
            parent=state.parent,
            versions=provenance.versions(),
            commit=provenance.code_commit(),
        )
