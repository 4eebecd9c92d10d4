"""Checkpoints of one run: where it starts, what it keeps, and where it returns to."""

from pipeline import provenance, storage
from pipeline.config_files import dump_shareable
from pipeline.redaction import redact_values
from pipeline.training import checkpoint
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.init_weights import load_initial
from pipeline.training.state import TrainState


class CheckpointManager:
    """Collective: all ranks call every method; rank 0 writes, all ranks read."""

    def __init__(self, job: TrainJob, context: WorkerContext, *, tracking_key: str | None) -> None:
        self._job, self._context, self._tracking_key = job, context, tracking_key
        self._writer = None
        if context.rank == 0:
            self._writer = checkpoint.CheckpointWriter(job.checkpoints, keep=job.experiment.checkpoints.keep)

    def restore_or_init(self, state: TrainState) -> None:
        """Bring `state` to the first of: newest intact checkpoint of this run, `--resume`, `init`, random weights.

        Raises:
            CheckpointError: the checkpoint to resume is damaged or of another model.
            ConfigError: the weights of `init` are missing or do not fit.
        """
        own = [self.uri(step) for step in reversed(self.steps())]
        for uri in [*own, *filter(None, [self._job.resume])]:
            try:
                checkpoint.restore(state, uri)
            except checkpoint.CheckpointError as error:
                if uri == self._job.resume:
                    raise
                self._context.print(f"{error}; trying the one before")
            else:
                self._context.print(f"continuing at step {state.step} from {uri}")
                return
        if self._job.experiment.init:
            self._init_weights(state, self._job.experiment.init)
        else:
            self._context.print("starting from scratch")

    def _init_weights(self, state: TrainState, source: str) -> None:
        names = [category.name for category in self._job.data.train.manifest.categories]
        origin = load_initial(state.detector, source, names)
        state.ema.module.load_state_dict(state.detector.state_dict())
        state.parent = redact_values(origin.parent)
        for line in origin.lines:
            self._context.print(line)

    def save(self, state: TrainState) -> None:
        """Copy the state now; a thread of rank 0 writes it while training continues."""
        if self._writer is not None:
            self._context.console.heartbeat(state.step, "saving")
            self._writer.write(
                checkpoint.take_snapshot(state, self._metadata(state), dump_shareable(self._job.experiment))
            )

    def load_best_of_stage_one(self, state: TrainState) -> None:
        """Continue from the best weights of stage one; the step count and the history go on."""
        step = state.history.stage_one_step
        assert step is not None  # `stage_two.restarts` is true only then
        self.wait()
        checkpoint.load_tensors(state, self.uri(step))
        self._context.print(f"step {state.step}: continuing from the best weights of stage one, step {step}")

    def load_best(self, state: TrainState) -> None:
        """Load the best weights of the run, if there was an evaluation."""
        self.wait()
        best = state.history.best_step
        if best is not None and best != state.step:
            checkpoint.load_tensors(state, self.uri(best))

    def rewind(self, state: TrainState) -> None:
        """Return to the newest checkpoint; the count of skipped steps goes on."""
        skipped = state.skipped_steps
        checkpoint.restore(state, self.uri(self.steps()[-1]))
        state.skipped_steps = skipped
        self._context.print(f"rewound to the checkpoint of step {state.step}")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, as rank 0 sees them."""
        found: list[int] = self._context.broadcast(checkpoint.steps_in(self._job.checkpoints))
        return found

    def uri(self, step: int) -> str:
        """Path or URI of the checkpoint of a step."""
        return storage.join(self._job.checkpoints, checkpoint.step_folder(step))

    def wait(self) -> None:
        """Block all ranks until rank 0 has written every snapshot."""
        if self._writer is not None:
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
            categories=job.data.train.manifest.categories,
            data=job.data.digests(),
            tracking_key=self._tracking_key,
            parent=state.parent,
            versions=provenance.versions(),
            commit=provenance.code_commit(),
        )
