"""A whole run in one process: interrupted, damaged, fed with infinities, given other weights."""

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dfine_core import Criterion, load
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint, run_dir, run_log
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.evaluation_task import EvaluationResult, SubmitEvaluation, run_evaluation
from pipeline.training.loop import new_state, train
from pipeline.training.nonfinite import NonFiniteError
from pipeline.training.replay import replay
from pipeline.training.run_log import MetricMeter, RunLog
from pipeline.training.step import StepResult
from pipeline.training.stop_request import StopRequest
from tests.support.training_runs import RecordingConsole, SteppedRun, alone, experiment, job, shard_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("shards"))


class Killed(BaseException):
    """As SIGKILL: no handler of ordinary errors runs."""


@dataclass
class KillingConsole(RecordingConsole):
    """Ends the run as soon as it asks for the data of step `kill_at`."""

    kill_at: int = 0

    def heartbeat(self, step: int, activity: str) -> None:
        if step == self.kill_at:
            raise Killed


def run_and_kill(job: TrainJob, *, after: int, written: int, **context: Any) -> None:
    """Train, end without a word after that many steps, and wait for the checkpoint that was being written."""
    with pytest.raises(Killed):
        train(job, alone(KillingConsole(kill_at=after), **context))
    deadline = time.monotonic() + 60
    while written not in checkpoint.steps_in(job.checkpoints):
        assert time.monotonic() < deadline, f"step {written} was never written"
        time.sleep(0.02)


def tensors_of(folder: str, step: int) -> dict[str, Tensor]:
    place = Path(folder) / checkpoint.step_folder(step)
    return {f"{file}/{k}": v for file in checkpoint.FILES for k, v in load_file(place / f"{file}.safetensors").items()}


def test_a_run_that_is_killed_and_continued_equals_one_that_was_not(data: dict[str, str], tmp_path: Path) -> None:
    whole = experiment(
        tmp_path, data, name="whole", checkpoints={"every_steps": 2}, ema={"warmup_steps": 2, "decay": 0.9}
    )
    train(job(whole), alone())
    cut = whole.model_copy(update={"name": "cut"})
    run_and_kill(job(cut), after=3, written=2)
    console = RecordingConsole()
    train(job(cut), alone(console))
    assert console.about("continuing at step 2")
    expected, found = (tensors_of(f"{tmp_path}/runs/{name}/checkpoints", 6) for name in ("whole", "cut"))
    assert len(found) > 1000
    assert expected.keys() == found.keys()
    different = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
    assert not different


@dataclass
class StoppingConsole(RecordingConsole):
    """Makes a stop request as soon as the run is at this step, with this activity."""

    stop: StopRequest = field(default_factory=StopRequest)
    stop_at: tuple[int, str] = (0, "")

    def heartbeat(self, step: int, activity: str) -> None:
        self.stop.made = self.stop.made or (step, activity) == self.stop_at

    def working(self, step: int, activity: str) -> AbstractContextManager[None]:
        self.heartbeat(step, activity)
        return nullcontext()


@pytest.mark.parametrize(
    ("stop_at", "saved"), [((2, "training"), 3), ((3, "training"), 4), ((4, "evaluating"), 4), ((5, "training"), 6)]
)
def test_a_run_that_is_stopped_and_continued_equals_one_that_was_not(
    data: dict[str, str], tmp_path: Path, stop_at: tuple[int, str], saved: int
) -> None:
    """Stopped in a step, in a step that an evaluation follows, in that evaluation, and in the last step."""
    whole = experiment(tmp_path, data, name="whole", evaluation={"every_steps": 2}, ema={"decay": 0.9})
    train(job(whole), alone())
    cut = whole.model_copy(update={"name": "cut"})
    stopping = StoppingConsole(stop_at=stop_at)
    result = train(job(cut), alone(stopping, stop=stopping.stop))
    folder = f"{tmp_path}/runs/cut/checkpoints"
    assert result == {"step": saved, "stopped": f"{folder}/{checkpoint.step_folder(saved)}"}
    history = checkpoint.read_metadata(result["stopped"]).history
    assert [step for step, _ in history.evaluated] == ([2] if saved < 6 else [2, 4])

    console = RecordingConsole()
    train(job(cut), alone(console))
    assert console.about(f"continuing at step {saved} ")
    assert result_of(tmp_path, "cut") == result_of(tmp_path, "whole")
    expected, found = (tensors_of(f"{tmp_path}/runs/{name}/checkpoints", 6) for name in ("whole", "cut"))
    assert len(found) > 1000
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []


def test_minutes_between_checkpoints_are_counted_from_the_last_one(data: dict[str, str], tmp_path: Path) -> None:
    for name, minutes, saved in (("often", 1e-9, [1, 2, 3, 4, 5, 6]), ("rarely", 60, [3, 6]), ("never", None, [3, 6])):
        kept = {"every_minutes": minutes, "keep": 9, "every_steps": 3}
        train(job(experiment(tmp_path, data, name=name, checkpoints=kept)), alone())
        assert checkpoint.steps_in(f"{tmp_path}/runs/{name}/checkpoints") == saved


def test_no_file_of_a_run_holds_a_secret_of_its_settings(data: dict[str, str], tmp_path: Path) -> None:
    tracking = {
        "uri": "postgresql://me:hunter2@db/mlflow?sslpassword=hunter2",
        "tags": {"image": "https://h/x?token=hunter2"},
    }
    run = job(experiment(tmp_path, data, tracking=tracking, checkpoints={"every_steps": 3}))
    run_dir.begin_or_continue(run.run, run.experiment, run.data, tracking_key="key", allow_changes=False)
    train(run, alone())
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"run.json", "experiment.yaml", "metadata.json"} <= {path.name for path in files}
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2})
    run_and_kill(job(setting), after=5, written=4)
    newest = Path(f"{tmp_path}/runs/run/checkpoints/{checkpoint.step_folder(4)}")
    content = bytearray((newest / "ema.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "ema.safetensors").write_bytes(content)
    console = RecordingConsole()
    run = SteppedRun.begin(job(setting), alone(console))
    assert run.state.step == 2
    assert console.about("ema.safetensors: is damaged")


def test_half_a_checkpoint_does_not_count(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2})
    run_and_kill(job(setting), after=3, written=2)
    folder = Path(f"{tmp_path}/runs/run/checkpoints")
    shutil.copytree(folder / checkpoint.step_folder(2), folder / checkpoint.step_folder(3))
    (folder / checkpoint.step_folder(3) / checkpoint.METADATA).unlink()
    shutil.copytree(folder / checkpoint.step_folder(2), folder / f".{checkpoint.step_folder(3)}.partial")
    assert checkpoint.steps_in(str(folder)) == [2]


def test_an_evaluated_run_keeps_its_last_and_best_checkpoints_and_its_result(
    data: dict[str, str], tmp_path: Path
) -> None:
    setting = experiment(
        tmp_path,
        data,
        schedule={"steps": 18, "no_aug_epochs": 1},
        evaluation={"every_steps": 3},
        checkpoints={"keep": 1},
    )
    console = RecordingConsole()
    result = train(job(setting), alone(console))
    steps = checkpoint.steps_in(f"{tmp_path}/runs/run/checkpoints")
    metadata = checkpoint.read_metadata(f"{tmp_path}/runs/run/checkpoints/{checkpoint.step_folder(18)}")
    history = metadata.history
    assert [step for step, _ in history.evaluated] == [3, 6, 9, 12, 15, 18]
    assert set(steps) == {18, history.best_step, history.stage_one_step}
    assert console.about(f"step 12: continuing from the best weights of stage one, step {history.stage_one_step}")
    written = result_of(tmp_path, "run")
    assert written["step"] == result["step"] == 18
    assert written["numbers"].keys() == result["numbers"].keys()
    # The thresholds of the final evaluation lie with the weights that it measured, and with no others.
    final = json.loads(Path(f"{tmp_path}/runs/run/evaluation/final/report.json").read_text())["points"]
    best = load(f"{tmp_path}/runs/run", "cpu")
    assert best.origin.endswith(checkpoint.step_folder(history.best_step or 18))
    assert best.thresholds is not None
    assert [each and each["score"] for each in final["best_f1"]] == list(best.thresholds.best_f1)
    others = set(steps) - {history.best_step}
    assert all(
        checkpoint.read_metadata(f"{tmp_path}/runs/run/checkpoints/{checkpoint.step_folder(step)}").thresholds is None
        for step in others
    )


def make_infinite(
    monkeypatch: pytest.MonkeyPatch, console: RecordingConsole, steps: set[int], *, once: bool = False
) -> list[int]:
    """Make the loss of chosen steps infinite, as an overflow in the network would; return the steps that were hit."""
    hit: list[int] = []
    original = Criterion.forward

    def forward(self: Criterion, *args: Any) -> dict[str, Tensor]:
        terms = original(self, *args)
        if console.at in steps and not (once and console.at in hit):
            hit.append(console.at)
            terms["loss_vfl"] = terms["loss_vfl"] * torch.inf
        return terms

    monkeypatch.setattr(Criterion, "forward", forward)
    return hit


def test_a_step_that_is_not_finite_changes_nothing_and_is_kept_for_replay(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = {"mosaic_probability": 0.5, "mixup_probability": 1}
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 1, "keep": 9}, augment=dense)
    console = RecordingConsole()
    make_infinite(monkeypatch, console, {3})
    result = train(job(setting), alone(console))
    folder = f"{tmp_path}/runs/run/checkpoints"
    before, after, later = (tensors_of(folder, step) for step in (3, 4, 5))
    assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key])] == []
    assert any(not torch.equal(tensor, later[key]) for key, tensor in before.items())
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert result["skipped_steps"] == 1
    (line,) = console.about("skipped step 3")
    assert "images [" in line
    kept = Path(f"{tmp_path}/runs/run/non_finite/{checkpoint.step_folder(3)}")
    tensors = load_file(kept / "rank-0.safetensors")
    assert tensors["0/images"].shape == (4, 3, 64, 64)
    assert 0.45 <= float(tensors["0/blend_ratio"]) <= 0.55
    assert len(tensors["0/boxes"]) == tensors["0/counts"].sum()
    replayed = list(replay(str(kept), precision="fp32", device=torch.device("cpu")))
    assert [image.image_id for image in replayed] == tensors["0/image_id"].tolist()
    assert all(image.finite for image in replayed)


def test_after_some_in_a_row_the_run_rewinds_and_continues(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2}, non_finite={"max_consecutive": 2})
    console = RecordingConsole()
    hit = make_infinite(monkeypatch, console, {2, 3}, once=True)
    result = train(job(setting), alone(console))
    assert hit == [2, 3]
    assert console.about("rewound to the checkpoint of step 2")
    assert result["step"] == 6
    assert result["skipped_steps"] == 2


def test_if_it_recurs_the_run_stops_and_names_the_images(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2}, non_finite={"max_consecutive": 2})
    console = RecordingConsole()
    make_infinite(monkeypatch, console, {2, 3})
    with pytest.raises(NonFiniteError, match=r"again after rewinding .* the last images of worker 0 are \[\d+, \d+"):
        train(job(setting), alone(console))


def test_a_step_that_the_batch_norms_alone_would_not_survive_is_skipped(data: dict[str, str], tmp_path: Path) -> None:
    run = SteppedRun.begin(job(experiment(tmp_path, data)))
    norm = next(m for m in run.state.detector.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def overflow(module: torch.nn.BatchNorm2d, *_: Any) -> None:
        assert module.running_var is not None
        module.running_var.fill_(torch.inf)

    norm.register_full_backward_hook(overflow)
    run.step(run.stream())
    run.guard.check_previous(run.state)
    assert run.state.skipped_steps == 1
    assert norm.running_var is not None
    assert norm.running_var.isfinite().all()


@pytest.fixture
def finished(data: dict[str, str], tmp_path: Path) -> str:
    setting = experiment(tmp_path, data, name="source", schedule={"steps": 2})
    train(job(setting), alone())
    return f"{tmp_path}/runs/source/checkpoints/{checkpoint.step_folder(2)}"


def test_first_weights_are_the_averaged_ones_and_the_parent_is_noted(
    finished: str, data: dict[str, str], tmp_path: Path
) -> None:
    console = RecordingConsole()
    run = SteppedRun.begin(job(experiment(tmp_path, data, name="tuned", init=finished)), alone(console))
    expected = load_file(f"{finished}/ema.safetensors")
    for weights in (run.state.detector.state_dict(), run.state.ema.module.state_dict()):
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    assert run.state.step == 0
    assert run.state.parent["run"] == "source"
    assert console.about(f"weights from {finished}")


def test_first_weights_with_other_bins_are_rebinned(finished: str, data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, name="bins", init=finished, model={"reg_max": 16})
    console = RecordingConsole()
    run = SteppedRun.begin(job(setting), alone(console))
    assert console.about("16")
    assert len(run.state.detector.state_dict()["decoder.dec_bbox_head.0.layers.2.bias"]) == 4 * 17


def test_resuming_another_runs_checkpoint_takes_its_whole_state(
    finished: str, data: dict[str, str], tmp_path: Path
) -> None:
    run = SteppedRun.begin(job(experiment(tmp_path, data, name="resumed"), resume=finished))
    assert run.state.step == 2
    assert run.state.ema.updates == 2
    assert len(run.state.optimizer.state) > 100


def test_a_meter_gives_means_of_finite_steps_and_starts_anew() -> None:
    meter = MetricMeter()
    for value, finite in ((1.0, True), (torch.nan, False), (3.0, True)):
        result = StepResult(
            ("loss_vfl",),
            torch.tensor([value]),
            torch.tensor(value),
            torch.tensor(2.0),
            torch.tensor(finite),
            directive=torch.tensor(0.0),
        )
        meter.add(result, waited_s=0.0)
    values = meter.read(images_per_step=8)
    assert values["train/terms/vfl"] == values["train/loss"] == 2.0
    assert meter.read(images_per_step=8) == {}


class RecordingTracker:
    """Keeps what would be logged."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.logged[step] = values


@pytest.mark.parametrize(("age_s", "logged"), [(0.0, list(range(1, 25))), (4000.0, [1, 24])])
def test_reports_are_thinned_in_mlflow(data: dict[str, str], tmp_path: Path, age_s: float, logged: list[int]) -> None:
    given = job(experiment(tmp_path, data, schedule={"steps": 24}))
    tracker = RecordingTracker()
    log = RunLog(replace(given, launched_at=time.time() - age_s), alone(), cast(Tracker, tracker))
    state = new_state(given, alone())
    terms = ("loss_vfl", "loss_vfl_aux_0", "loss_vfl_enc_0", "loss_bbox_dn_2", "loss_bbox_pre")
    one = torch.tensor(1.0)
    for step in range(1, 25):
        result = StepResult(terms, torch.ones(len(terms)), one, one, torch.tensor(True), directive=one)
        log.step(result, waited_s=0.0, step=step)
        state.step = step
        log.report(state)

    # After an hour, one report a minute and the last; of the terms of single layers, every tenth and the last.
    assert sorted(tracker.logged) == logged
    assert all("train/terms/vfl" in values for values in tracker.logged.values())
    for term in terms[1:]:
        with_term = [
            step
            for step, values in tracker.logged.items()
            if f"train/terms_by_layer/{term.removeprefix('loss_')}" in values
        ]
        assert with_term == [step for step in logged if step in (1, 11, 21, 24)], term


def test_the_first_step_shows_its_loss_and_later_ones_a_mean_without_an_end_of_the_report(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = RecordingConsole()
    given = job(experiment(tmp_path, data, schedule={"steps": 24}, tracking={"every_steps": 20}))
    log = RunLog(given, alone(console))

    def step(number: int, loss: float) -> None:
        value = torch.tensor(loss)
        log.step(
            StepResult(("loss_vfl",), value.unsqueeze(0), value, value, torch.tensor(True), directive=value),
            waited_s=0.0,
            step=number,
        )

    step(1, 4.0)
    step(2, 6.0)  # too soon after the first
    monkeypatch.setattr(run_log, "SHOWN_S", 0.0)
    step(3, 8.0)
    assert [(step, note.split(",")[0]) for step, note in console.notes] == [(1, "loss 4.00"), (3, "loss 6.00")]
    assert log._meter.steps == 3, "the report of step 20 is over all 20 steps"


# Asynchronous evaluation


def asynchronous(submit: SubmitEvaluation, console: RecordingConsole | None = None) -> WorkerContext:
    return alone(console, submit_evaluation=submit)


def result_of(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "runs" / name / "result.json").read_text())
    return content


@pytest.mark.slow
def test_asynchronous_evaluations_equal_inline_ones(data: dict[str, str], tmp_path: Path) -> None:
    inline = experiment(tmp_path, data, name="inline", evaluation={"every_steps": 2, "num_images": 1})
    train(job(inline), alone())
    away = experiment(tmp_path, data, name="away", evaluation={"every_steps": 2, "num_images": 1, "asynchronous": True})
    console = RecordingConsole()
    with ThreadPoolExecutor(1) as elsewhere:
        train(job(away), asynchronous(lambda request: elsewhere.submit(run_evaluation, request), console))
    assert len(console.about("asynchronous")) == 3
    assert result_of(tmp_path, "away") == result_of(tmp_path, "inline")
    assert [step for step, _ in result_of(tmp_path, "away")["evaluated"]] == [2, 4, 6]
    expected, found = (tensors_of(f"{tmp_path}/runs/{name}/checkpoints", 6) for name in ("inline", "away"))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    folders = {path.parent.name for path in (tmp_path / "runs" / "away" / "evaluation").rglob("images_*.png")}
    assert folders == {"step-00000002", "step-00000004", "step-00000006", "final"}


def test_an_evaluation_in_flight_at_a_kill_is_submitted_again(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, evaluation={"every_steps": 2, "num_images": 0, "asynchronous": True})
    never: Future[EvaluationResult] = Future()
    run_and_kill(job(setting), after=3, written=2, submit_evaluation=lambda request: never)
    with ThreadPoolExecutor(1) as elsewhere:
        train(job(setting), asynchronous(lambda request: elsewhere.submit(run_evaluation, request)))
    assert [step for step, _ in result_of(tmp_path, "run")["evaluated"]] == [2, 4, 6]


def test_an_evaluation_that_fails_elsewhere_does_not_end_the_training(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, evaluation={"every_steps": 3, "num_images": 0, "asynchronous": True})
    failed: Future[EvaluationResult] = Future()
    failed.set_exception(MemoryError("no room there"))
    console = RecordingConsole()
    train(job(setting), asynchronous(lambda request: failed, console))
    assert console.about("the evaluation of step 3 failed: MemoryError: no room there")
    assert result_of(tmp_path, "run")["evaluated"] == []
    assert result_of(tmp_path, "run")["numbers"] is not None


def test_a_profile_of_some_steps_lies_in_the_run(data: dict[str, str], tmp_path: Path) -> None:
    console = RecordingConsole()
    train(job(experiment(tmp_path, data), profile_steps=1), alone(console))
    trace = json.loads((tmp_path / "runs" / "run" / "profile" / "trace-rank-0.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])
    assert console.about("profile of 1 steps")
