"""Frozen parts: bitwise as they were, without gradient, moments or decay; thawed at a step; the same under kill and workers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import Cluster, ConfigError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import CheckpointError
from pipeline.training.dry_run import preview
from pipeline.training.frozen_parts import freeze
from pipeline.training.graphs import compile_step
from pipeline.training.loop import train
from pipeline.training.run_log import learning_rates
from pipeline.training.step import to_micro_batch
from tests.support.processes import one_thread
from tests.support.training_runs import RecordingConsole, SteppedRun, alone, experiment, job, shard_folders

FROZEN = ["backbone.stem", "backbone.stage1", "encoder"]
PREFIXES = ("backbone.stem.", "backbone.stages.0.", "encoder.")  # the same, as the released state dict has them

CONSTANTS = {"decoder.up", "decoder.reg_scale"}  # parameters of the released state dict that are never trained


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("shards"), images=40)


def frozen_run(folder: Path, data: dict[str, str], *, name: str = "run", **sections: Any) -> Any:
    optimizer = {"freeze": FROZEN, **sections.pop("optimizer", {})}
    return experiment(folder, data, name=name, optimizer=optimizer, ema={"warmup_steps": 2, "decay": 0.9}, **sections)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not same_bits(tensor.cpu(), before[name])}


def test_frozen_tensors_statistics_and_averages_keep_every_bit(data: dict[str, str], tmp_path: Path) -> None:
    setting = frozen_run(tmp_path, data, schedule={"micro_batch_size": 2}, optimizer={"weight_decay": 0.1})
    run = SteppedRun.begin(job(setting))
    state = run.state
    with torch.no_grad():  # statistics as of a trained detector, and a zero with a sign
        for name, buffer in state.detector.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) / 3)
        state.detector.backbone.stem.stem1.conv.weight[0, 0, 0, 0] = -0.0  # type: ignore[operator, union-attr]
    state.ema.module.load_state_dict(state.detector.state_dict())
    before = copied(state.detector)
    held = {name for name in before if name.startswith(PREFIXES)}
    assert len(held) > 150
    assert any(name.endswith("running_var") for name in held)

    run.losses(3)
    assert state.frozen == tuple(FROZEN)
    for module in (state.detector, state.ema.module):
        changed = moved(module, before)
        assert not changed & held
        assert {
            "backbone.stages.1.blocks.0.layers.0.bn.running_mean",
            "decoder.input_proj.0.norm.num_batches_tracked",
        } & (changed)
    learned = {name for name, p in state.detector.named_parameters() if p.requires_grad}
    assert not learned & held
    assert learned == {name for name, _ in state.detector.named_parameters()} - held - CONSTANTS
    for name, parameter in state.detector.named_parameters():
        if name in CONSTANTS:
            continue
        assert (parameter.grad is None) == (name in held), name
        assert (parameter in state.optimizer.state) == (name not in held), name


def test_the_norm_that_is_clipped_is_that_of_what_trains(data: dict[str, str], tmp_path: Path) -> None:
    run = SteppedRun.begin(job(frozen_run(tmp_path, data)))
    run.state.max_grad_norm = 1e9
    result = run.step(run.stream())
    squares = [float(p.grad.double().square().sum()) for p in run.state.detector.parameters() if p.grad is not None]
    assert float(result.grad_norm) == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def test_a_frozen_step_is_that_of_a_detector_whose_frozen_parts_are_constants(
    data: dict[str, str], tmp_path: Path
) -> None:
    """Against plain modules in evaluation mode and gradients by autograd, without any of the trainer's own freezing."""
    run = SteppedRun.begin(job(frozen_run(tmp_path, data)))
    plain = copy.deepcopy(run.state.detector).requires_grad_(True)
    for part in (plain.backbone.stem, plain.backbone.stages[0], plain.encoder):
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    batch = to_micro_batch(next(run.stream()), run.state, size=(64, 64), seed=0)
    terms = run.state.criterion(plain(batch.images, batch.targets, batch.denoising), batch.targets)
    torch.stack(list(terms.values())).sum().backward()
    run.state.max_grad_norm = 1e9
    run.step(run.stream())
    compared = 0
    for (name, ours), (_, theirs) in zip(run.state.detector.named_parameters(), plain.named_parameters(), strict=True):
        if not name.startswith(PREFIXES):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared > 100


def test_parts_thaw_at_their_step_and_begin_with_fresh_moments(data: dict[str, str], tmp_path: Path) -> None:
    console = RecordingConsole()
    setting = frozen_run(tmp_path, data, optimizer={"thaw_steps": 2})
    run = SteppedRun.begin(job(setting), alone(console))
    before = copied(run.state.detector)
    batches = run.stream()
    for step in range(4):
        run.step(batches)
        changed = {name for name in moved(run.state.detector, before) if name.startswith(PREFIXES)}
        assert bool(changed) == (step >= 2), step
    assert console.about("step 2: all parts train")
    names = {p: name for name, p in run.state.detector.named_parameters()}
    steps = {names[p]: int(moments["step"]) for p, moments in run.state.optimizer.state.items()}
    assert set(steps) == set(names.values()) - CONSTANTS
    assert {steps[name] for name in steps if name.startswith(PREFIXES)} == {2}
    assert {steps[name] for name in steps if not name.startswith(PREFIXES)} == {4}


def test_epochs_to_thaw_are_those_of_the_schedule(data: dict[str, str], tmp_path: Path) -> None:
    schedule = job(frozen_run(tmp_path, data, optimizer={"thaw_epochs": 3}, schedule={"steps": 60})).schedule
    assert schedule.steps_per_epoch == 10
    assert schedule.freezing.at(29) == tuple(FROZEN)
    assert schedule.freezing.at(30) == ()
    assert "frozen until step 30: backbone.stem, backbone.stage1, encoder" in schedule.lines(evaluates=True)


@pytest.mark.parametrize(
    "stop_after", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_that_is_continued_equals_one_that_was_not(data: dict[str, str], tmp_path: Path, stop_after: int) -> None:
    """Continued before, at and after the step that thaws; every tensor of the last checkpoint, to the bit."""
    settings = {
        "optimizer": {"thaw_steps": 2, "layer_decay": 0.5},
        "schedule": {"steps": 4},
        "checkpoints": {"keep": 9},
    }
    whole = frozen_run(tmp_path, data, name="whole", **copy.deepcopy(settings))
    train(job(whole), alone())
    cut = whole.model_copy(update={"name": "cut"})
    first = SteppedRun.begin(job(cut))
    first.losses(stop_after)
    first.checkpoints.save(first.state)
    first.checkpoints.wait()
    console = RecordingConsole()
    train(job(cut), alone(console))
    assert console.about(f"continuing at step {stop_after} ")
    assert moments_in(first, stop_after) == (stop_after > 2)
    expected, found = (tensors_of(tmp_path, name, 4) for name in ("whole", "cut"))
    assert len(found) > 1000
    assert expected.keys() == found.keys()
    assert [key for key, tensor in expected.items() if not same_bits(tensor, found[key])] == []


def tensors_of(folder: Path, name: str, step: int) -> dict[str, Tensor]:
    place = folder / "runs" / name / "checkpoints" / checkpoint.step_folder(step)
    return {f"{file}/{k}": v for file in checkpoint.FILES for k, v in load_file(place / f"{file}.safetensors").items()}


def moments_in(run: SteppedRun, step: int) -> bool:
    """Whether the checkpoint holds moments of a frozen part."""
    path = Path(run.job.checkpoints) / checkpoint.step_folder(step) / "optimizer.safetensors"
    return any(name.startswith(PREFIXES) for name in load_file(path))


def one_of_two(rank: int, folder: str, data: dict[str, str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run = SteppedRun.begin(job(two_workers(Path(folder), data, "two"), workers=2), alone(rank=rank, world_size=2))
    before = copied(run.state.detector)
    batches = run.stream()
    held, losses = [], []
    for _ in range(4):
        losses.append(float(run.step(batches).loss))
        held.append(not any(name.startswith(PREFIXES) for name in moved(run.state.detector, before)))
    content = {"losses": losses, "held": held, "state": run.state.detector.state_dict()}
    torch.save(content, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def two_workers(folder: Path, data: dict[str, str], name: str) -> Any:
    schedule = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 4}
    return frozen_run(folder, data, name=name, schedule=schedule, optimizer={"thaw_steps": 2})


@pytest.mark.slow
def test_two_workers_equal_one_before_and_after_the_thaw(data: dict[str, str], tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path), data), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["losses"] == second["losses"]
    assert all(same_bits(tensor, second["state"][key]) for key, tensor in first["state"].items())
    assert first["held"] == second["held"] == [True, True, False, False]
    with one_thread():
        losses = SteppedRun.begin(job(two_workers(tmp_path, data, "one"))).losses(4)
    assert first["losses"] == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_graphs_follow_the_thaw(data: dict[str, str], tmp_path: Path) -> None:
    """Captured whole by Dynamo: frozen, thawed and frozen again; losses equal those without graphs."""
    losses: dict[str, list[float]] = {}
    for name in ("eager", "graphs"):
        torch._dynamo.reset()
        run = SteppedRun.begin(job(frozen_run(tmp_path, data, name=name, optimizer={"thaw_steps": 2})))
        state = run.state
        if name == "graphs":
            state.graphs = compile_step(state.detector, state.criterion, losses=False, sizes=2, backend="aot_eager")
        before = copied(state.detector)
        losses[name] = run.losses(3)
        assert any(key.startswith(PREFIXES) for key in moved(state.detector, before))
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=1e-4)


def test_norms_that_the_model_freezes_for_good_do_not_thaw(data: dict[str, str], tmp_path: Path) -> None:
    setting = frozen_run(
        tmp_path, data, model={"freeze_at": 0, "freeze_norm": True}, optimizer={"freeze": ["backbone"], "thaw_steps": 1}
    )
    run = SteppedRun.begin(job(setting))
    before = copied(run.state.detector)
    run.losses(3)
    changed = moved(run.state.detector, before)
    assert not any(name.startswith("backbone.stem.") for name in changed)
    assert any(name.startswith("backbone.stages.0.") for name in changed)
    assert not any(name.startswith("backbone.") and name.endswith("running_mean") for name in changed)


def test_moments_of_parts_that_a_continued_run_freezes_are_dropped(data: dict[str, str], tmp_path: Path) -> None:
    whole = SteppedRun.begin(job(experiment(tmp_path, data, name="whole")))
    whole.losses(2)
    whole.checkpoints.save(whole.state)
    whole.checkpoints.wait()
    source = whole.checkpoints.uri(2)

    console = RecordingConsole()
    run = SteppedRun.begin(job(frozen_run(tmp_path, data, name="frozen"), resume=source), alone(console))
    assert run.state.step == 2
    names = {p: name for name, p in run.state.detector.named_parameters()}
    trained = {names[p] for p in run.state.optimizer.state}
    assert len(trained) > 100
    assert not any(name.startswith(PREFIXES) for name in trained)
    run.losses(1)
    run.checkpoints.save(run.state)
    run.checkpoints.wait()

    other = job(experiment(tmp_path, data, name="thawed"), resume=run.checkpoints.uri(3))
    with pytest.raises(CheckpointError, match="trained with other frozen parts"):
        SteppedRun.begin(other)


def test_a_replayed_step_has_the_same_frozen_norms(data: dict[str, str], tmp_path: Path) -> None:
    run = SteppedRun.begin(job(frozen_run(tmp_path, data)))
    detector = copy.deepcopy(run.state.detector).train()
    freeze(detector, run.state.frozen, [p for p in detector.parameters() if p.requires_grad])
    training = {name for name, module in detector.named_modules() if module.training}
    assert training == {name for name, module in run.state.detector.named_modules() if module.training}
    assert {p.requires_grad for p in detector.encoder.parameters()} == {False}


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (
            {"freeze": ["backbone.stem5"]},
            "unknown part 'backbone.stem5'; known: backbone, backbone.stem, backbone.stage1",
        ),
        ({"freeze": ["neck", "head"]}, "unknown part 'neck', 'head'"),
        ({"freeze": ["backbone", "encoder", "decoder"]}, "freeze all parts, so nothing would be trained"),
        ({"freeze": "encoder"}, "'encoder' must be a list of parts, as in [backbone.stem, encoder]"),
        ({"thaw_steps": 3}, "needs parts to thaw"),
        ({"freeze": ["encoder"], "thaw_steps": 3, "thaw_epochs": 1}, "give either thaw_steps (3) or thaw_epochs (1)"),
        ({"layer_decay": 0}, "optimizer.layer_decay"),
        ({"layer_decay": 1.2}, "optimizer.layer_decay"),
    ],
)
def test_mistakes_are_named(data: dict[str, str], tmp_path: Path, optimizer: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        experiment(tmp_path, data, optimizer=optimizer)
    assert said in str(raised.value)


def test_what_the_model_freezes_counts_among_all_parts(data: dict[str, str], tmp_path: Path) -> None:
    stages = [f"backbone.stage{number}" for number in range(1, 5)]
    rest = {"optimizer": {"freeze": [*stages, "encoder", "decoder"]}}
    assert experiment(tmp_path, data, **rest).optimizer.freeze  # the stem still trains
    with pytest.raises(ConfigError, match=r"and model\.freeze_at \(0\) freeze all parts"):
        experiment(tmp_path, data, model={"freeze_at": 0}, **rest)
    deeper = {"optimizer": {"freeze": ["encoder", "decoder", "backbone.stage3", "backbone.stage4"]}}
    with pytest.raises(ConfigError, match=r"and model\.freeze_at \(1\) freeze all parts"):
        experiment(tmp_path, data, model={"freeze_at": 1, "freeze_stem_only": False}, **deeper)


def test_a_dry_run_prints_groups_parts_rates_and_what_is_frozen(data: dict[str, str], tmp_path: Path) -> None:
    optimizer = {"freeze": ["backbone.stage1"], "thaw_steps": 4, "layer_decay": 0.5, "lr": 0.128, "backbone_lr": 0.064}
    setting = experiment(tmp_path, data, model={"freeze_at": 0}, optimizer={**optimizer, "scale_lr": "none"})
    table = preview(setting, Cluster(workers=1), measured=False).split("# parameters\n")[1].split("\n\n")[0]
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["group", "part", "tensors", "values", "rate", "decay", "frozen"]
    rates = {(row[0], row[1]): float(row[4]) for row in rows[1:-1]}
    assert rates["rest", "decoder"] == 0.128
    assert rates["rest", "encoder"] == 0.064
    assert rates["backbone", "backbone.stage4"] == 0.016
    assert rates["backbone", "backbone.stage1"] == 0.002
    frozen = {row[1]: " ".join(row[6:]) for row in rows[1:-1]}
    assert frozen["backbone.stage1"] == "until step 4"
    assert {said for part, said in frozen.items() if part != "backbone.stage1"} == {"no"}
    assert rows[-1][:2] == ["none", "backbone.stem"]
    assert rows[-1][4:] == ["always", "(model.freeze_at)"]


def test_reported_rates_are_those_next_to_the_head() -> None:
    groups = [
        {"name": "backbone", "part": "backbone.stage4", "lr": 4},
        {"name": "backbone", "part": "backbone.stem", "lr": 3},
        {"name": "rest", "part": "decoder", "lr": 2},
        {"name": "rest", "part": "encoder", "lr": 1},
    ]
    assert learning_rates(groups) == {"train/lr": 2, "train/lr_backbone": 4}
    assert learning_rates(groups[:2]) == {"train/lr": 4, "train/lr_backbone": 4}


@pytest.mark.parametrize("late", [{"thaw_steps": 6}, {"thaw_epochs": 1}])
def test_a_thaw_after_the_end_is_refused(data: dict[str, str], tmp_path: Path, late: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="and the run ends with step 6"):
        job(frozen_run(tmp_path, data, optimizer=late))


def test_frozen_random_weights_are_warned_of(data: dict[str, str], tmp_path: Path) -> None:
    assert any("WARNING: no initial weights" in line for line in job(frozen_run(tmp_path, data)).schedule.notes)
    save_file({"x": torch.zeros(1)}, tmp_path / "some.safetensors")
    given = frozen_run(tmp_path, data, init=str(tmp_path / "some.safetensors"))
    assert job(given).schedule.notes == ("frozen to the end: backbone.stem, backbone.stage1, encoder",)
