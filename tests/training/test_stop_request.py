"""Stop signals and their way to the workers."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.training import checkpoint
from pipeline.training.loop import train
from pipeline.training.stop_request import STOP_SIGNALS, StopRequest, TrainingStoppedError, status_after, stop_signals
from tests.support.training_runs import RecordingConsole, alone, experiment, job, shard_folders


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_asks_and_the_second_is_handled_as_before(number: signal.Signals) -> None:
    request = StopRequest()

    def ask() -> bool:
        request.made = True
        return True

    with stop_signals(ask):
        os.kill(os.getpid(), number)
        assert request.made
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.default_int_handler


def test_a_signal_that_nothing_can_heed_interrupts_and_an_ignored_one_stays_so() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with stop_signals(lambda: False):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_main_thread_handlers_stay() -> None:
    def enter() -> None:
        with stop_signals(lambda: True):
            found.append(signal.getsignal(signal.SIGINT))

    found: list[Any] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_a_stopped_run_is_killed_and_one_with_an_error_has_failed() -> None:
    errors = (TrainingStoppedError("stopped"), KeyboardInterrupt(), SystemExit(), OSError(), ValueError())
    assert [status_after(error) for error in errors] == ["KILLED", "KILLED", "KILLED", "FAILED", "FAILED"]


def train_on_rank(rank: int, folder: str, data: dict[str, str]) -> None:
    """Rank 0 gets a stop request in the third step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    stop = StopRequest()

    class Console(RecordingConsole):
        def heartbeat(self, step: int, activity: str) -> None:
            stop.made = stop.made or (rank == 0 and (step, activity) == (2, "training"))

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    setting = experiment(Path(folder), data, schedule={"micro_batch_size": 2})
    context = alone(Console(), rank=rank, world_size=2, broadcast=broadcast, stop=stop)
    torch.save(train(job(setting, workers=2), context), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_all_workers_stop_after_the_same_step(tmp_path: Path) -> None:
    mp.spawn(train_on_rank, args=(str(tmp_path), shard_folders(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    saved = f"{tmp_path}/runs/run/checkpoints/{checkpoint.step_folder(3)}"
    assert results == [{"step": 3, "stopped": saved}] * 2
    assert checkpoint.problem_of(saved) is None
