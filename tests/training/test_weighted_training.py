"""Training on labels of unequal worth: counts of the whole step, any number of workers, and what is refused."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dfine_core.loss.criterion import Normalizers
from pipeline.config import ConfigError
from pipeline.data.shards.records import ImageRecord
from pipeline.training.launch import launch
from pipeline.training.step import to_micro_batch, train_step
from tests.support.processes import one_thread
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.training_runs import SteppedRun, alone, experiment, job

SCHEDULE = {"steps": 3, "global_batch_size": 8, "micro_batch_size": 4}


def with_weights(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Every third image keeps its labels; in the others a box counts less, or is ignored."""
    changed = []
    for number, record in enumerate(records):
        generator = np.random.default_rng(number)
        weights = generator.uniform(0.5, 1, len(record.labels)).astype(np.float32)
        ignored = generator.random(len(weights)) < 0.3
        if number % 3 == 0:
            weights[:], ignored[:] = 1, False
        weights[ignored] = 0
        changed.append(replace(record, weights=weights, crowd=record.crowd | ignored))
    return changed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weighted")
    return {
        name: write_shards(folder / name, with_weights(synthetic_records(count, longest_side=64)), weighted=True).uri
        for name, count in (("train", 40), ("val", 6))
    }


def test_counts_of_a_step_are_sums_of_weights_over_all_micro_batches(data: dict[str, str], tmp_path: Path) -> None:
    """Against a plain loop: every micro-batch on its own, its sums divided by the weights of both."""
    run = SteppedRun.begin(job(experiment(tmp_path, data, schedule=SCHEDULE)))
    state, batches = run.state, run.stream()
    micro_batches = [to_micro_batch(next(batches), state, size=(64, 64), seed=0) for _ in range(2)]
    weights = [m.targets.weights for m in micro_batches]
    assert all(weight is not None and 0.5 <= weight.min() < 1 for weight in weights)
    assert any(m.targets.ignored is not None for m in micro_batches)

    plain = copy.deepcopy(state.detector)
    outputs = [plain(m.images, m.targets, m.denoising) for m in micro_batches]
    found = [state.criterion.match(o, m.targets) for o, m in zip(outputs, micro_batches, strict=True)]
    boxes = sum(weight for own in weights if own is not None for weight in own.tolist()) / 2
    pairs = sum(
        own.tolist()[target]
        for own, matches in zip(weights, found, strict=True)
        if own is not None
        for target in matches.union.target.tolist()
    )
    normalizers = Normalizers(torch.tensor(boxes), torch.tensor(pairs / 2))
    total = sum(
        torch.stack(list(state.criterion(o, m.targets, f, normalizers).values())).sum() / 2
        for o, m, f in zip(outputs, micro_batches, found, strict=True)
    )
    assert isinstance(total, Tensor)
    result = train_step(state, micro_batches)
    assert float(result.loss) == pytest.approx(total.item(), rel=1e-5)
    assert bool(result.finite)


def one_of_two(rank: int, folder: str, data: dict[str, str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run = SteppedRun.begin(
        job(experiment(Path(folder), data, schedule=SCHEDULE), workers=2), alone(rank=rank, world_size=2)
    )
    losses = run.losses(SCHEDULE["steps"])
    torch.save(losses, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_equal_one(data: dict[str, str], tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path), data), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    run = SteppedRun.begin(job(experiment(tmp_path, data, name="alone", schedule=SCHEDULE)))
    with one_thread():
        losses = run.losses(SCHEDULE["steps"])
    assert losses == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("wanted", ["step", "detector"])
def test_compiled_steps_are_refused_before_anything_starts(wanted: str, data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, data, numerics={"compile": wanted})
    with pytest.raises(ConfigError, match=r"numerics\.compile: labels of .* are of unequal worth.*write off or auto"):
        launch(setting)


def test_auto_compiles_nothing(data: dict[str, str], tmp_path: Path) -> None:
    run = SteppedRun.begin(job(experiment(tmp_path, data, numerics={"compile": "auto"})))
    assert run.state.graphs is None
