"""The training loop that every worker runs. Collective: all ranks call `train`.

The loop knows nothing of Ray Train: a `WorkerContext` holds rank, device, collectives and console, so that a test runs it in
one process.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dfine_core.inference import LoadedDetector
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.stream import StreamSettings, training_stream
from pipeline.training import stage_two
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.directives import Directive, Directives
from pipeline.training.early_stop import early_end
from pipeline.training.evaluator import Evaluator
from pipeline.training.graphs import graphs_compiled
from pipeline.training.multiscale import multiscale_side, multiscale_sides
from pipeline.training.nonfinite import NonFiniteGuard
from pipeline.training.profiler import StepProfiler
from pipeline.training.run_log import RunLog
from pipeline.training.state import TrainState, build_train_state
from pipeline.training.step import StepResult, to_micro_batch, train_step

if TYPE_CHECKING:
    from pipeline.evaluation.report import EvaluationReport

LATENCY_SECONDS = 3.0  # spent on measuring it


def train(job: TrainJob, context: WorkerContext) -> dict[str, Any]:
    """Train from the first step to the last, or continue from this run's newest checkpoint.

    Returns:
        The result for the driver: step, skipped_steps, best_ap, run_id, what MLflow lacks, and on rank 0 the COCO numbers of
        the best weights. After a stop request "stopped" is the checkpoint that was written for it.

    Raises:
        NonFiniteError: losses or gradients stay non-finite.
        CheckpointError: the checkpoint to resume is damaged or of another model.
    """
    experiment, schedule = job.experiment, job.schedule
    if job.threads:
        torch.set_num_threads(job.threads)

    with RunLog(job, context) as log, StepProfiler(job, context) as profiler:
        state = new_state(job, context)
        checkpoints = CheckpointManager(job, context, tracking_key=log.run_key)
        evaluator = Evaluator(job, context, log)
        guard = NonFiniteGuard(job, context)
        directives = Directives(job, context)

        # 1. The start: this run's newest checkpoint, the one to resume, the weights of `init`, or random weights.
        checkpoints.restore_or_init(state)
        evaluator.resubmit(state, checkpoints)
        log.begin(state.parent)
        if state.step == 0 and experiment.evaluation.before_training:
            evaluator.evaluate_initial(state)
        if evaluator.lacks(state):
            evaluator.evaluate(state)
            checkpoints.save(state)
        log.ready()
        batches = open_stream(job, context, state)
        directives.begin_steps()

        # 2. Step after step.
        while state.step < schedule.steps:
            if (end := early_end(state.history, state.step, schedule, experiment.evaluation.patience)) is not None:
                context.print(end.reason)
                if end.step == schedule.steps:
                    break
                state.step = end.step
                batches = open_stream(job, context, state)

            # Stage two begins with the best weights of stage one, so it needs the last evaluation of stage one.
            if state.step == schedule.stage_two_step:
                evaluator.poll(state, wait=True)
            if stage_two.restarts(state.history, state.step, schedule.stage_two_step):
                checkpoints.load_best_of_stage_one(state)

            result = run_step(job, context, state, batches, guard, log, directives.decide)
            directive = directives.after(result)
            profiler.step()

            if log.due(state.step):
                log.report(state)
                evaluator.poll(state, wait=False)

            # The host learns of a non-finite step one step late; before weights are kept or judged it waits to know.
            stops = directive is Directive.STOP
            evaluates = schedule.evaluates_after(state.step) and not stops  # a stopped run evaluates when it continues
            saves = evaluates or directive > Directive.GO_ON or saves_after(job, state.step)
            if saves or guard.limit_reached:
                guard.check_previous(state)
                if guard.limit_reached:
                    checkpoints.wait()
                    guard.begin_rewind(state, checkpoints.steps())
                    checkpoints.rewind(state)
                    evaluator.resubmit(state, checkpoints)
                    batches = open_stream(job, context, state)
                    continue

            if evaluates:
                ended = evaluator.evaluate(state)
                stops = not ended or context.broadcast(directives.decide()) is Directive.STOP  # asked for meanwhile
            if saves:
                checkpoints.save(state)
                directives.saved()
            if stops:
                checkpoints.wait()
                return {"step": state.step, "stopped": checkpoints.uri(state.step)}

        # 3. The end: the best weights, evaluated once more by pycocotools.
        directives.end_steps()
        evaluator.poll(state, wait=True)
        checkpoints.load_best(state)
        report = evaluator.evaluate_best(state)
        if report is not None:  # on rank 0
            checkpoints.keep_thresholds(state, report.points.thresholds)
        if context.rank == 0:
            log.finish(state, report, latency_ms(job, context, state))
        unrecorded = log.deliver(state.step)
        return result_of(state, report, run_id=log.run_id(timeout=0), unrecorded=unrecorded)


def new_state(job: TrainJob, context: WorkerContext) -> TrainState:
    """Random weights at step 0."""
    return build_train_state(
        job.experiment,
        job.schedule,
        num_classes=len(job.data.train.categories),
        device=context.device,
        world_size=context.world_size,
        weighted=job.data.train.weighted,
    )


def run_step(
    job: TrainJob,
    context: WorkerContext,
    state: TrainState,
    batches: Iterator[Batch],
    guard: NonFiniteGuard,
    log: RunLog,
    decide: Callable[[], int] = lambda: 0,
) -> StepResult:
    """Take this worker's micro-batches of the next step, and train on them; for `decide` see `train_step`."""
    context.console.heartbeat(state.step, "waiting for data")
    asked_at = time.perf_counter()
    taken = [next(batches) for _ in range(job.schedule.micro_batches_of(context.rank, context.world_size))]
    waited_s = time.perf_counter() - asked_at

    context.console.heartbeat(state.step, "training")
    for replaced in (replaced for batch in taken for replaced in batch.replaced):
        context.console.print(f"image {replaced.image_id} is {replaced.reason}")
    if state.freeze_for_step():
        now = f"{', '.join(state.frozen)} frozen" if state.frozen else "all parts train"
        context.print(f"step {state.step}: {now}")
    state.set_learning_rate(job.schedule.learning_rate_factor(state.step))
    size = step_size(job, state)
    micro_batches = [to_micro_batch(batch, state, size=size, seed=job.experiment.seed) for batch in taken]
    share = job.schedule.micro_batches / context.world_size
    known, began_at = graphs_compiled(), time.perf_counter()
    result = train_step(state, micro_batches, share=share, decide=decide)
    if state.graphs is not None and (made := graphs_compiled() - known):
        seconds = time.perf_counter() - began_at
        context.print(f"step {state.step}, {size[0]} x {size[1]} pixels: {made} graphs compiled, {seconds:.0f} s")

    guard.watch(state, taken, result)
    state.step += 1
    if state.teachers is not None and state.step % job.schedule.steps_per_epoch == 0:
        state.teachers.end_epoch(clean=not job.schedule.is_strong(state.step - 1))
    log.step(result, waited_s, step=state.step)
    return result


def step_size(job: TrainJob, state: TrainState) -> tuple[int, int]:
    """Height and width of the images in the next step: the input size, or a random one where multi-scale training is on."""
    height, width = state.detector.config.input_size
    repeat = job.experiment.base_size_repeat
    if not repeat or not job.schedule.is_strong(state.step):
        return height, width
    side = multiscale_side(job.experiment.seed, state.step, multiscale_sides(state.detector.config, repeat))
    return side, side


def saves_after(job: TrainJob, step: int) -> bool:
    """Whether `checkpoints.every_steps` asks for a checkpoint after `step` steps."""
    every = job.experiment.checkpoints.every_steps
    return every is not None and step % every == 0


def open_stream(job: TrainJob, context: WorkerContext, state: TrainState) -> Iterator[Batch]:
    """This worker's micro-batches from the current step to the last, in the plan's order."""
    experiment, schedule = job.experiment, job.schedule
    settings = StreamSettings(
        global_batch_size=schedule.global_batch_size,
        micro_batch_size=schedule.micro_batch_size,
        canvas=state.detector.config.input_size,
        augment=experiment.augment,
        stages=schedule.stages,
        distort_on_device=context.device.type != "cpu",
        seed=experiment.seed,
        window_rows=experiment.data.window_rows,
        decode_in=context.decode_in or experiment.data.decode_in,
        prefetch=experiment.data.prefetch,
    )
    return training_stream(
        job.data.train,
        settings,
        start_step=state.step,
        stop_step=schedule.steps,
        rank=context.rank,
        world_size=context.world_size,
        broadcast=context.broadcast,
    )


def latency_ms(job: TrainJob, context: WorkerContext, state: TrainState) -> float | None:
    """Median latency of one image, in milliseconds, if the experiment asks for it."""
    if not job.experiment.evaluation.latency:
        return None
    from pipeline.benchmark import detector_subject, measure  # here: it would lengthen the start of every worker

    categories = job.data.train.categories
    loaded = LoadedDetector(
        copy.deepcopy(state.averaged_detector).eval(),  # a copy: the benchmark fuses its layers
        tuple(category.name for category in categories),
        tuple(category.original_id for category in categories),
        job.run,
        context.device,
    )
    return measure(detector_subject(loaded), batch_sizes=(), seconds=LATENCY_SECONDS).latency_ms["p50"]


def result_of(
    state: TrainState, report: "EvaluationReport | None", *, run_id: str | None, unrecorded: str | None
) -> dict[str, Any]:
    """Result of the run, as plain values for the driver."""
    result = {
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "best_ap": state.history.best_ap,
        "run_id": run_id,
        "unrecorded": unrecorded,
    }
    return result | ({"numbers": report.headline_numbers} if report is not None else {})
