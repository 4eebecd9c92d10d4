"""Checkpoints that are damaged, missing or in the way of others: named, passed over, and not counted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfine_core.checkpoints.folder import checkpoints_by_rank
from pipeline.config import Experiment
from pipeline.open_detector import open_detector
from pipeline.training import checkpoint, run_dir
from pipeline.training.context import resolve_data
from pipeline.training.run_dir import begin_or_continue
from pipeline.training.stage_two import EvaluationHistory
from tests.support.training_runs import RecordingConsole, SteppedRun, alone, experiment, job, shard_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("shards"), images=8, val=2)


@pytest.fixture
def setting(data: dict[str, str], tmp_path: Path) -> Experiment:
    return experiment(tmp_path, data, checkpoints={"keep": 9})


def save(run: SteppedRun, *steps: int) -> None:
    """Write checkpoints whose weights tell their step."""
    for step in steps:
        run.state.step = step
        for parameter in (next(run.state.detector.parameters()), next(run.state.ema.module.parameters())):
            with torch.no_grad():
                parameter.fill_(step)
        run.checkpoints.save(run.state)
    run.checkpoints.wait()


def step_of_weights(run: SteppedRun) -> int:
    return int(next(run.state.detector.parameters()).flatten()[0])


def begin(setting: Experiment) -> tuple[SteppedRun, RecordingConsole]:
    console = RecordingConsole()
    return SteppedRun.begin(job(setting), alone(console)), console


def folder_of(run: SteppedRun, step: int) -> Path:
    return Path(run.checkpoints.uri(step))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("ema.safetensors", flip),
        ("ema.safetensors", make_folder),
        ("optimizer.safetensors", Path.unlink),
        ("optimizer.safetensors", lambda file: file.write_bytes(b"")),
        ("metadata.json", make_folder),
        ("metadata.json", lambda file: file.write_bytes(b"")),
        ("metadata.json", lambda file: file.write_bytes(b"null")),
        ("metadata.json", lambda file: file.write_bytes(b"[" * 200_000)),
        ("metadata.json", lambda file: file.write_bytes(file.read_bytes()[:500])),
        ("metadata.json", lambda file: edit(file, step=3)),
        ("metadata.json", lambda file: edit(file, skipped_steps=1)),
        ("metadata.json", lambda file: edit(file, step=3, digest=None)),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    setting: Experiment, file: str, damage: Callable[[Path], object]
) -> None:
    written, _ = begin(setting)
    save(written, 2, 4)
    damage(folder_of(written, 4) / file)
    run, console = begin(setting)
    assert (run.state.step, step_of_weights(run)) == (2, 2)
    assert console.about(f"{checkpoint.step_folder(4)}/{file}: ")
    assert console.about("trying the one before")


def test_a_checkpoint_of_a_version_without_digests_is_read(setting: Experiment) -> None:
    written, _ = begin(setting)
    save(written, 2)
    edit(folder_of(written, 2) / "metadata.json", digest=None)
    assert begin(setting)[0].state.step == 2


def test_copies_and_strays_beside_checkpoints_do_not_count_and_stay(setting: Experiment) -> None:
    written, _ = begin(setting)
    save(written, 2)
    folder = folder_of(written, 2).parent
    for copy in (f"{checkpoint.step_folder(2)}.bak", "step-7"):
        shutil.copytree(folder_of(written, 2), folder / copy)
    for stray in (99, 4):
        folder_of(written, stray).write_text("mine")
    (folder / f".{checkpoint.step_folder(4)}.partial").write_text("mine too")
    assert checkpoint.steps_in(str(folder)) == [2]
    run, _ = begin(setting)
    save(run, 4)
    assert checkpoint.steps_in(str(folder)) == [2, 4]
    assert sorted(path.read_text() for path in folder.iterdir() if path.is_file()) == ["mine", "mine", "mine too"]
    assert checkpoint.problem_of(run.checkpoints.uri(4)) is None


def test_damaged_later_checkpoints_do_not_displace_good_ones(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, checkpoints={"keep": 2})
    written, _ = begin(experiment(tmp_path, data, checkpoints={"keep": 9}))
    save(written, 2, 4, 6, 8)
    for step in (6, 8):
        flip(folder_of(written, step) / "model.safetensors")
    run, console = begin(setting)
    assert run.state.step == 4
    assert len(console.about("model.safetensors: is damaged")) == 2
    save(run, 5)
    assert checkpoint.steps_in(run.job.checkpoints) == [4, 5, 6, 8]
    save(run, 7)
    assert checkpoint.steps_in(run.job.checkpoints) == [5, 7, 8]
    assert run.checkpoints.steps() == [5, 7]
    run.checkpoints.rewind(run.state)
    assert run.state.step == 7
    save(run, 8)
    assert checkpoint.steps_in(run.job.checkpoints) == run.checkpoints.steps() == [7, 8]


@pytest.mark.parametrize(("lost", "taken"), [([4], 6), ([4, 6], 2), ([2, 4, 6], 8)])
def test_where_the_best_checkpoint_is_lost_the_next_best_stands_for_the_run(
    setting: Experiment, lost: list[int], taken: int
) -> None:
    run, console = begin(setting)
    evaluated = ((2, 0.3), (4, 0.5), (6, 0.4))
    run.state.history = EvaluationHistory(best_ap=0.5, best_step=4, stage_one_step=4, evaluated=evaluated)
    save(run, 2, 4, 6, 8)
    flip(folder_of(run, lost[0]) / "ema.safetensors")
    for step in lost[1:]:
        shutil.rmtree(folder_of(run, step))
    run.checkpoints.load_best(run.state)
    assert step_of_weights(run) == taken
    assert console.about(f"WARNING: the best weights, of step 4, are lost: step {taken} takes their place")
    history = checkpoint.read_metadata(run.checkpoints.uri(8)).history
    assert (history.best_step, history.best_ap) == (taken, dict(evaluated).get(taken))
    assert checkpoints_by_rank(run.job.checkpoints)[0] == run.checkpoints.uri(taken)
    assert checkpoint.problem_of(run.checkpoints.uri(8)) is None


def test_stage_two_begins_with_the_next_best_weights_where_the_best_are_lost(setting: Experiment) -> None:
    run, console = begin(setting)
    history = EvaluationHistory(best_ap=0.5, best_step=2, stage_one_step=2, evaluated=((2, 0.5), (4, 0.4)))
    run.state.history = history
    save(run, 2, 4, 6)
    shutil.rmtree(folder_of(run, 2))
    run.checkpoints.load_best_of_stage_one(run.state)
    assert (run.state.step, step_of_weights(run)) == (6, 4)
    assert console.about("WARNING: ")
    shutil.rmtree(folder_of(run, 4))
    save(run, 6)
    run.state.history = replace(history, evaluated=((2, 0.5), (4, 0.4)))
    run.checkpoints.load_best_of_stage_one(run.state)
    assert (run.state.step, step_of_weights(run)) == (6, 6)


@pytest.mark.parametrize("content", [b"", b'{"experiment": ', None])
def test_a_lost_run_file_is_taken_from_the_newest_checkpoint(setting: Experiment, content: bytes | None) -> None:
    shards = resolve_data(setting.data)
    given = job(setting)

    def start(setting: Experiment, key: str) -> run_dir.RunStart:
        return begin_or_continue(given.run, setting, shards, tracking_key=key, allow_changes=False)

    first = start(setting, "first")
    run, _ = begin(setting)
    run.checkpoints._tracking_key = first.tracking_key
    save(run, 2)
    path = Path(given.run) / run_dir.RUN_START
    before = json.loads(path.read_text())
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match="seed: 0 before, 3 now"):
        start(setting.model_copy(update={"seed": 3}), "second")
    path.unlink() if content is None else path.write_bytes(content)
    again = start(setting, "second")
    assert again.tracking_key == "first"
    assert "it is taken from the newest checkpoint" in (again.notice or "")
    assert json.loads(path.read_text()) == before


def test_a_detector_of_a_run_is_the_next_best_where_the_best_is_damaged(
    setting: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = begin(setting)
    run.state.history = EvaluationHistory(best_ap=0.5, best_step=4, evaluated=((2, 0.3), (4, 0.5), (6, 0.4)))
    save(run, 2, 4, 6, 8)
    assert open_detector(run.job.run).origin == run.checkpoints.uri(4)
    assert not caplog.records

    metadata = folder_of(run, 8) / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"best_step": 4', '"best_step": 2'))
    assert open_detector(run.job.run).origin == run.checkpoints.uri(4)
    assert f"{checkpoint.step_folder(8)}/metadata.json: is damaged: not what was written" in caplog.text

    flip(folder_of(run, 4) / "ema.safetensors")
    assert open_detector(run.job.run).origin == run.checkpoints.uri(6)
    assert f"{checkpoint.step_folder(4)}/ema.safetensors: is damaged" in caplog.text
    assert f"{checkpoint.step_folder(6)} takes the place of the best checkpoint" in caplog.text
