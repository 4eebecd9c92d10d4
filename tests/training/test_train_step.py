"""One step: the same on one worker and on two, with and without accumulation; running statistics and loss scale by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from dfine_core.loss.criterion import Normalizers
from pipeline.training.numerics import LossScale, RunningStatistics
from pipeline.training.step import to_micro_batch, train_step
from tests.support.processes import one_thread
from tests.support.training_runs import SteppedRun, alone, experiment, job, shard_folders

UNEVEN = {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2}
MICRO = {"steps": 20, "global_batch_size": 8, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("shards"), images=40)


def one_of_several(
    rank: int, world_size: int, folder: str, data: dict[str, str], schedule: dict[str, int], precision: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    setting = experiment(Path(folder), data, schedule=schedule, numerics={"precision": precision})
    run = SteppedRun.begin(job(setting, workers=world_size), alone(rank=rank, world_size=world_size))
    losses = run.losses(schedule["steps"])
    torch.save({"losses": losses, "state": run.state.detector.state_dict()}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def compare_workers_with_one(
    data: dict[str, str], folder: Path, workers: int, schedule: dict[str, int], precision: str = "fp32"
) -> float:
    """Return the largest relative difference of the losses; the weights of the workers must be equal."""
    mp.spawn(one_of_several, args=(workers, str(folder), data, schedule, precision), nprocs=workers)
    first, *others = (torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(workers))
    for other in others:
        assert first["losses"] == other["losses"]
        assert all(torch.equal(first["state"][key], tensor) for key, tensor in other["state"].items())

    setting = experiment(folder, data, name="alone", schedule=schedule, numerics={"precision": precision})
    run = SteppedRun.begin(job(setting))
    with one_thread():
        losses = run.losses(schedule["steps"])
    return max(abs(a - b) / abs(b) for a, b in zip(losses, first["losses"], strict=True))


@pytest.mark.slow  # `test_train_on_ray` compares fewer steps every time
def test_two_workers_equal_one_that_accumulates_for_twenty_steps(data: dict[str, str], tmp_path: Path) -> None:
    assert compare_workers_with_one(data, tmp_path, 2, MICRO) < 1e-4


@pytest.mark.parametrize(
    "workers", [3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_uneven_shares_equal_one_worker(data: dict[str, str], tmp_path: Path, workers: int) -> None:
    """Micro-batches per step: 2, 1, 1 for three workers; of six, 2, 2, 1, 1 for four and 2, 1, 1, 1, 1 for five."""
    schedule = UNEVEN if workers == 3 else UNEVEN | {"global_batch_size": 12}
    assert compare_workers_with_one(data, tmp_path, workers, schedule) < 1e-4


@pytest.mark.slow
def test_two_workers_exchange_the_gradients_of_weights_that_are_cast_once_a_step(
    data: dict[str, str], tmp_path: Path
) -> None:
    """Rounded to bf16, the losses of another division differ in the third digit."""
    assert compare_workers_with_one(data, tmp_path, 2, MICRO | {"steps": 3}, "bf16") < 0.02


def test_accumulated_gradients_are_those_of_the_mean_loss_with_shared_counts(
    data: dict[str, str], tmp_path: Path
) -> None:
    """Against a plain loop: every micro-batch on its own, its sums divided by counts over both."""
    run = SteppedRun.begin(job(experiment(tmp_path, data, schedule=MICRO)))
    state = run.state
    batches = run.stream()
    micro_batches = [to_micro_batch(next(batches), state, size=(64, 64), seed=0) for _ in range(2)]

    plain = copy.deepcopy(state.detector)
    outputs = [plain(m.images, m.targets, m.denoising) for m in micro_batches]
    found = [state.criterion.match(o, m.targets) for o, m in zip(outputs, micro_batches, strict=True)]
    boxes = sum(m.targets.total for m in micro_batches) / 2
    pairs = sum(len(f.union) for f in found) / 2
    normalizers = Normalizers(torch.tensor(boxes), torch.tensor(pairs))
    total = sum(
        torch.stack(list(state.criterion(o, m.targets, f, normalizers).values())).sum() / 2
        for o, m, f in zip(outputs, micro_batches, found, strict=True)
    )
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()

    result = train_step(state, micro_batches)
    assert float(result.loss) == pytest.approx(float(total.detach()), rel=1e-5)
    assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    clipped = {name: p.grad for name, p in state.detector.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        scaled = gradient * min(1.0, state.max_grad_norm / float(norm))
        torch.testing.assert_close(clipped[name], scaled, rtol=1e-3, atol=1e-6)


def test_running_statistics_are_the_mean_of_what_each_micro_batch_would_have_made() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.copy_(torch.randn(3))  # type: ignore[union-attr]
    batches = [torch.randn(4, 3, 5, 5) * scale for scale in (1, 2, 3)]
    alone = []
    for batch in batches:
        one = copy.deepcopy(norm)
        one(batch)
        alone.append(torch.cat([one.running_mean, one.running_var]))  # type: ignore[list-item]
    expected = torch.stack(alone).mean(0)

    before = copy.deepcopy(norm.state_dict())
    for finite in (False, True):
        statistics = RunningStatistics(norm)
        statistics.begin_step()
        for batch in batches:
            norm(batch)
            statistics.accumulate()
        statistics.commit(statistics.mean(len(batches)), torch.tensor(finite))
        if not finite:
            assert all(torch.equal(norm.state_dict()[key], tensor) for key, tensor in before.items())
    torch.testing.assert_close(torch.cat([norm.running_mean, norm.running_var]), expected)  # type: ignore[list-item]
    assert norm.num_batches_tracked == 1


def test_the_loss_scale_halves_at_once_and_doubles_after_a_while() -> None:
    scale = LossScale(torch.device("cpu"), enabled=True, growth_interval=3)
    seen = []
    for finite in (True, True, True, False, True, True, False, True, True, True):
        scale.update(torch.tensor(finite))
        seen.append(float(scale.scale) / 2**16)
    assert seen == [1, 1, 2, 1, 1, 1, 0.5, 0.5, 0.5, 1]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_lower_precision_trains_and_stays_near_fp32(data: dict[str, str], tmp_path: Path, precision: Any) -> None:
    def first_losses(name: str, kind: str) -> list[float]:
        setting = experiment(tmp_path, data, name=name, schedule=MICRO, numerics={"precision": kind})
        run = SteppedRun.begin(job(setting))
        losses = run.losses(2)
        assert all(parameter.isfinite().all() for parameter in run.state.detector.parameters())
        return losses

    assert first_losses(precision, precision)[0] == pytest.approx(first_losses("fp32", "fp32")[0], rel=0.02)


def test_channels_last_changes_nothing_but_the_layout(data: dict[str, str], tmp_path: Path) -> None:
    losses = []
    for channels_last in (False, True, None):  # None: the default, which is the faster layout on a CPU
        numerics = {} if channels_last is None else {"channels_last": channels_last}
        setting = experiment(tmp_path, data, schedule=MICRO, numerics=numerics)
        run = SteppedRun.begin(job(setting))
        batch = to_micro_batch(next(run.stream()), run.state, size=(64, 64), seed=0)
        assert batch.images.is_contiguous(memory_format=torch.channels_last) == (channels_last is not False)
        losses.append(float(train_step(run.state, [batch]).loss))
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-4)
