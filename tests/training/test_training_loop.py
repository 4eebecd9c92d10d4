"""A whole run in one process: interrupted, damaged, fed with infinities, given other weights."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.training import checkpoint, loop
from pipeline.training.beside import Answer, Order, carry_out
from pipeline.training.group import Group
from pipeline.training.loop import NotFiniteError, Run, train
from pipeline.training.step import StepResult
from tests.support.training_runs import ALONE, Heard, experiment, job, shard_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("shards"))


class Killed(BaseException):
    """As SIGKILL: nothing gets to tidy up."""


def run_and_kill(run: Run, after: int) -> None:
    """Train, and end without a word after that many steps."""
    original = run._one_step

    def one_step(batches: Any) -> None:
        if run.step == after:
            raise Killed
        original(batches)

    run._one_step = one_step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.train()
    assert run._writer is not None
    run._writer._waiting.join()


def tensors_of(folder: str, step: int) -> dict[str, Tensor]:
    place = Path(folder) / checkpoint.folder_name(step)
    return {f"{file}/{k}": v for file in checkpoint.FILES for k, v in load_file(place / f"{file}.safetensors").items()}


def test_a_run_that_is_killed_and_continued_equals_one_that_was_not(data: dict[str, str], tmp_path: Path) -> None:
    whole = experiment(
        tmp_path, data, name="whole", checkpoints={"every_steps": 2}, ema={"warmup_steps": 2, "decay": 0.9}
    )
    train(job(whole), ALONE, Heard())
    cut = whole.model_copy(update={"name": "cut"})
    run_and_kill(Run(job(cut), ALONE, Heard(), None), after=3)
    heard = Heard()
    train(job(cut), ALONE, heard)
    assert heard.about("continuing at step 2")
    expected, found = (tensors_of(f"{tmp_path}/runs/{name}/checkpoints", 6) for name in ("whole", "cut"))
    assert len(found) > 1000
    assert expected.keys() == found.keys()
    different = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
    assert not different


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2})
    run_and_kill(Run(job(setting), ALONE, Heard(), None), after=5)
    newest = Path(f"{tmp_path}/runs/run/checkpoints/{checkpoint.folder_name(4)}")
    content = bytearray((newest / "ema.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "ema.safetensors").write_bytes(content)
    heard = Heard()
    run = Run(job(setting), ALONE, heard, None)
    run._begin()
    assert run.step == 2
    assert heard.about("ema.safetensors: is damaged")


def test_half_a_checkpoint_does_not_count(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2})
    run_and_kill(Run(job(setting), ALONE, Heard(), None), after=3)
    folder = Path(f"{tmp_path}/runs/run/checkpoints")
    shutil.copytree(folder / checkpoint.folder_name(2), folder / checkpoint.folder_name(3))
    (folder / checkpoint.folder_name(3) / checkpoint.METADATA).unlink()
    shutil.copytree(folder / checkpoint.folder_name(2), folder / f".{checkpoint.folder_name(3)}.partial")
    assert checkpoint.steps_in(str(folder)) == [2]


def test_an_evaluated_run_keeps_its_last_and_best_checkpoints_and_its_result(
    data: dict[str, str], tmp_path: Path
) -> None:
    setting = experiment(
        tmp_path,
        data,
        schedule={"steps": 18, "clean_epochs": 1},
        evaluation={"every_steps": 3},
        checkpoints={"keep": 1},
    )
    heard = Heard()
    outcome = train(job(setting), ALONE, heard)
    steps = checkpoint.steps_in(f"{tmp_path}/runs/run/checkpoints")
    metadata = checkpoint.read_metadata(f"{tmp_path}/runs/run/checkpoints/{checkpoint.folder_name(18)}")
    standing = metadata.standing
    assert [step for step, _ in standing.evaluated] == [3, 6, 9, 12, 15, 18]
    assert set(steps) == {18, standing.best_step, standing.stage_one_step}
    assert heard.about(f"step 12: going on from the best weights of stage one, of step {standing.stage_one_step}")
    result = json.loads(Path(f"{tmp_path}/runs/run/result.json").read_text())
    assert result["step"] == outcome["step"] == 18
    assert result["numbers"].keys() == outcome["numbers"].keys()
    assert Path(f"{tmp_path}/runs/run/evaluation/final/report.json").exists()


class Poison:
    """Makes the loss of chosen steps infinite, as an overflow in the network would."""

    def __init__(self, run: Run, steps: set[int], *, once: bool = False) -> None:
        self.met: list[int] = []
        original = run.learner.criterion.forward

        def forward(*args: Any) -> dict[str, Tensor]:
            terms = original(*args)
            if run.step in steps and not (once and run.step in self.met):
                self.met.append(run.step)
                terms["loss_vfl"] = terms["loss_vfl"] * torch.inf
            return terms

        run.learner.criterion.forward = forward  # type: ignore[method-assign]


def test_a_step_that_is_not_finite_changes_nothing_and_is_kept_for_replay(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 1, "keep": 9})
    heard = Heard()
    run = Run(job(setting), ALONE, heard, None)
    Poison(run, {3})
    run.train()
    folder = f"{tmp_path}/runs/run/checkpoints"
    before, after, later = (tensors_of(folder, step) for step in (3, 4, 5))
    assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key])] == []
    assert any(not torch.equal(tensor, later[key]) for key, tensor in before.items())
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert run.skipped == 1
    (line,) = heard.about("skipped step 3")
    assert "images [" in line
    kept = Path(f"{tmp_path}/runs/run/not_finite/{checkpoint.folder_name(3)}")
    assert load_file(kept / "rank-0.safetensors")["0/images"].shape == (4, 3, 64, 64)


def test_after_some_in_a_row_the_run_goes_back_and_goes_on(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2}, not_finite={"in_a_row": 2})
    heard = Heard()
    run = Run(job(setting), ALONE, heard, None)
    poison = Poison(run, {2, 3}, once=True)
    run.train()
    assert poison.met == [2, 3]
    assert heard.about("going back to the checkpoint of step 2")
    assert run.step == 6


def test_if_it_recurs_the_run_stops_and_names_the_images(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"every_steps": 2}, not_finite={"in_a_row": 2})
    run = Run(job(setting), ALONE, Heard(), None)
    Poison(run, {2, 3})
    with pytest.raises(NotFiniteError, match=r"again after going back .* the last images of worker 0 are \[\d+, \d+"):
        run.train()


def test_a_step_that_the_batch_norms_alone_would_not_survive_is_skipped(data: dict[str, str], tmp_path: Path) -> None:
    run = Run(job(experiment(tmp_path, data)), ALONE, Heard(), None)
    run._begin()
    norm = next(m for m in run.learner.detector.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def overflow(module: torch.nn.BatchNorm2d, *_: Any) -> None:
        assert module.running_var is not None
        module.running_var.fill_(torch.inf)

    norm.register_full_backward_hook(overflow)
    batches = run._stream()
    run._one_step(batches)
    run._look_at_last()
    assert run.skipped == 1
    assert norm.running_var is not None
    assert norm.running_var.isfinite().all()


@pytest.fixture
def finished(data: dict[str, str], tmp_path: Path) -> str:
    setting = experiment(tmp_path, data, name="source", schedule={"steps": 2})
    train(job(setting), ALONE, Heard())
    return f"{tmp_path}/runs/source/checkpoints/{checkpoint.folder_name(2)}"


def test_first_weights_are_the_averaged_ones_and_the_parent_is_noted(
    finished: str, data: dict[str, str], tmp_path: Path
) -> None:
    heard = Heard()
    run = Run(job(experiment(tmp_path, data, name="tuned", init=finished)), ALONE, heard, None)
    run._begin()
    expected = load_file(f"{finished}/ema.safetensors")
    for weights in (run.learner.detector.state_dict(), run.learner.average.module.state_dict()):
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    assert run.step == 0
    assert run.parent["run"] == "source"
    assert heard.about(f"weights from {finished}")


def test_first_weights_with_other_bins_are_rebinned(finished: str, data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, name="bins", init=finished, model={"reg_max": 16})
    heard = Heard()
    run = Run(job(setting), ALONE, heard, None)
    run._begin()
    assert heard.about("16")
    assert len(run.learner.detector.state_dict()["decoder.dec_bbox_head.0.layers.2.bias"]) == 4 * 17


def test_resuming_another_runs_checkpoint_takes_its_whole_state(
    finished: str, data: dict[str, str], tmp_path: Path
) -> None:
    run = Run(job(experiment(tmp_path, data, name="resumed"), resume=finished), ALONE, Heard(), None)
    run._begin()
    assert run.step == 2
    assert run.learner.average.updates == 2
    assert len(run.learner.optimizer.state) > 100


def test_a_meter_gives_means_of_finite_steps_and_starts_anew() -> None:
    meter = loop.Meter()
    for value, finite in ((1.0, True), (torch.nan, False), (3.0, True)):
        result = StepResult(
            {"loss_vfl": torch.tensor(value)}, torch.tensor(value), torch.tensor(2.0), torch.tensor(finite)
        )
        meter.add(result, waited=0.0)
    values = meter.read(images_per_step=8)
    assert values["train/loss_vfl"] == values["train/loss"] == 2.0
    assert meter.read(images_per_step=8) == {}


# Evaluations beside the training


def beside(submit: Callable[[Order], "Future[Answer]"]) -> Group:
    return replace(ALONE, submit=submit)


def result_of(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "runs" / name / "result.json").read_text())
    return content


@pytest.mark.slow
def test_evaluations_beside_the_training_come_to_what_those_within_it_do(data: dict[str, str], tmp_path: Path) -> None:
    within = experiment(tmp_path, data, name="within", evaluation={"every_steps": 2, "pictures": 1})
    train(job(within), ALONE, Heard())
    away = experiment(tmp_path, data, name="away", evaluation={"every_steps": 2, "pictures": 1, "beside": True})
    heard = Heard()
    with ThreadPoolExecutor(1) as elsewhere:
        train(job(away), beside(lambda order: elsewhere.submit(carry_out, order)), heard)
    assert len(heard.about("beside the training")) == 3
    assert result_of(tmp_path, "away") == result_of(tmp_path, "within")
    assert [step for step, _ in result_of(tmp_path, "away")["evaluated"]] == [2, 4, 6]
    expected, found = (tensors_of(f"{tmp_path}/runs/{name}/checkpoints", 6) for name in ("within", "away"))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    pictures = {path.parent.name for path in (tmp_path / "runs" / "away" / "evaluation").rglob("pictures_*.png")}
    assert pictures == {"step-00000002", "step-00000004", "step-00000006", "final"}


def test_an_evaluation_that_was_under_way_is_done_again_after_a_kill(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, evaluation={"every_steps": 2, "pictures": 0, "beside": True})
    never: Future[Answer] = Future()
    run_and_kill(Run(job(setting), beside(lambda order: never), Heard(), None), after=3)
    with ThreadPoolExecutor(1) as elsewhere:
        train(job(setting), beside(lambda order: elsewhere.submit(carry_out, order)), Heard())
    assert [step for step, _ in result_of(tmp_path, "run")["evaluated"]] == [2, 4, 6]


def test_an_evaluation_that_fails_elsewhere_does_not_end_the_training(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, evaluation={"every_steps": 3, "pictures": 0, "beside": True})
    failed: Future[Answer] = Future()
    failed.set_exception(MemoryError("no room there"))
    heard = Heard()
    train(job(setting), beside(lambda order: failed), heard)
    assert heard.about("the evaluation of step 3 failed: MemoryError: no room there")
    assert result_of(tmp_path, "run")["evaluated"] == []
    assert result_of(tmp_path, "run")["numbers"] is not None
