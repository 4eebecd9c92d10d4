"""The step as graphs: whole, few, and equal to the eager step. Backends run the captured graphs without generating kernels."""

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor

from benchmarks.launches import CLASSES, training_state
from dfine_core import Targets
from dfine_core.loss.padding import pad_denoising, pad_targets
from dfine_core.model.denoising import sample_queries_for
from pipeline.training.graphs import compile_step, graphs_compiled, inductor_options, resolve_compile
from pipeline.training.low_precision import CastDetector
from pipeline.training.state import AUTOCAST, TrainState
from pipeline.training.step import MicroBatch, train_step
from tests.support import recorded

CPU = torch.device("cpu")
# The compiler looks at every input's gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def batch(state: TrainState, counts: Sequence[int], side: int, seed: int) -> MicroBatch:
    config, generator = state.detector.config, torch.Generator().manual_seed(seed)
    targets = Targets.pack(recorded.targets(list(counts), CLASSES, seed), CLASSES, CPU)
    denoising = sample_queries_for(config, targets, generator)
    assert denoising is not None
    images = recorded.images(len(counts), side, side, seed)
    if state.graphs is not None:
        return MicroBatch(images, pad_targets(targets), pad_denoising(denoising, config))
    return MicroBatch(images, targets, denoising)


def state_of(variant: str, precision: str = "fp32", *, backend: str | None = None, sizes: int = 1) -> TrainState:
    torch._dynamo.reset()
    state = training_state(variant, precision)
    if backend is not None:
        if precision != "fp32":
            state.model = CastDetector(state.detector, AUTOCAST[precision], in_place=True)
        state.graphs = compile_step(state.detector, state.criterion, losses=True, sizes=sizes, backend=backend)
    return state


def run(state: TrainState, steps: int, sides: Sequence[int] = (64,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        counts = torch.randint(0, 12, (2,), generator=generator).tolist()
        result = train_step(state, [batch(state, counts, sides[step % len(sides)], seed=step)])
        losses.append(result.terms)
    return losses


@pytest.mark.parametrize("variant", ["n", *(pytest.param(v, marks=pytest.mark.slow) for v in "sl")])
def test_detector_costs_and_losses_are_one_graph_each_for_every_size_of_images(variant: str) -> None:
    state = state_of(variant, backend="eager", sizes=2)  # a break would be an error
    before = graphs_compiled()
    run(state, 6, sides=(64, 96))
    assert graphs_compiled() - before == 2 + 1 + 1


@pytest.mark.slow  # compiles twice
def test_a_compiled_detector_finds_its_weights_cast() -> None:
    """Bit for bit what autocast computes in the graph, and in as few graphs."""
    state = state_of("n", "bf16", backend="eager")
    state.model = state.detector
    expected = run(state, 2)
    state = state_of("n", "bf16", backend="eager")
    assert isinstance(state.model, CastDetector)
    before = graphs_compiled()
    for plain, cast in zip(expected, run(state, 2), strict=True):
        assert torch.equal(plain, cast)
    assert graphs_compiled() - before == 1 + 1 + 1


@pytest.mark.slow  # minutes: 300 steps
def test_three_hundred_steps_need_few_graphs() -> None:
    state = state_of("n", backend="eager", sizes=3)
    before = graphs_compiled()
    run(state, 300, sides=(64, 96, 128))
    assert graphs_compiled() - before <= 3 + 1 + 1 + 2


@pytest.mark.parametrize(
    ("precision", "steps", "tolerance"),
    [("fp32", 2, 1e-4), ("fp32", 20, 5e-3), ("bf16", 20, 5e-2)],
)
@pytest.mark.slow  # differentiating the graphs takes half a minute of CPU
def test_compiled_losses_follow_eager_ones(precision: str, steps: int, tolerance: float) -> None:
    expected = run(state_of("n", precision), steps)
    found = run(state_of("n", precision, backend="aot_eager"), steps)
    for step, (eager, compiled) in enumerate(zip(expected, found, strict=True)):
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=1e-4, msg=f"step {step}")


@pytest.mark.slow
def test_gradients_accumulated_over_micro_batches_are_those_of_the_eager_step() -> None:
    states = state_of("n"), state_of("n", backend="aot_eager")
    norms = [train_step(s, [batch(s, (3, 0), 64, 0), batch(s, (5, 2), 64, 1)]).grad_norm for s in states]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)


@pytest.mark.slow  # half a minute of CPU for each size
def test_the_encoder_is_compiled_for_every_size_and_computes_what_an_eager_one_does() -> None:
    """Forward only, with Inductor for real: on a CPU it computes wrong gradients in torch 2.14, so no training compiles there."""
    state = state_of("n")
    encoder, eager = state.detector.encoder, copy.deepcopy(state.detector.encoder)
    encoder.compile(dynamic=False, fullgraph=True, options=inductor_options(replay=False))
    for side in (320, 384):
        maps = [
            torch.rand(1, channels, side // s, side // s) for channels, s in zip((512, 1024), (16, 32), strict=True)
        ]
        found = encoder([m.requires_grad_() for m in maps])
        for expected, output in zip(eager(maps), found, strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_compiling_is_chosen_where_it_pays() -> None:
    cuda = torch.device("cuda", 0)
    assert resolve_compile("auto", CPU, 100_000) == "off"
    assert resolve_compile("auto", cuda, 100) == "off"
    assert resolve_compile("auto", cuda, 100_000) == "step"
    assert resolve_compile("detector", cuda, 1) == "detector"


PROGRAM = """
import torch
from pipeline.training.graphs import keep_graphs_in_cache, with_whole_cache
torch.set_num_threads(1)
torch._functorch.config.force_non_lazy_backward_lowering = True
keep_graphs_in_cache()
double = torch.compile(lambda x: x.sin() * 2 + x.sum())
x = torch.ones(64, requires_grad=True)
y = with_whole_cache(lambda: double(x))
y.sum().backward()
torch.testing.assert_close(y.detach(), x.detach().sin() * 2 + 64)
torch.testing.assert_close(x.grad, x.detach().cos() * 2 + 64)
"""


def begin(cache: Path) -> subprocess.Popen[str]:
    """Start a process that compiles, in a group of its own with the C compiler that it starts."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start(cache: Path) -> str:
    process = begin(cache)
    said, _ = process.communicate(timeout=1700)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow  # starts the compiler four times
@pytest.mark.timeout(1800)
def test_a_damaged_cache_is_moved_aside_and_compiled_again(tmp_path: Path) -> None:
    cache = tmp_path / "graphs"
    assert "compiled again" not in start(cache)
    libraries = list(cache.rglob("*.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(library.read_bytes()[:100])
    assert "compiled again" in start(cache)
    assert not list(tmp_path.glob("graphs.damaged*"))

    files = [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]
    assert {"fxgraph", "aotautograd"} <= {path.relative_to(cache).parts[0] for path in files}
    for index, path in enumerate(sorted(files)):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if index % 2 else b"")
    start(cache)  # the compiler itself may notice
    assert "compiled again" not in start(cache)


@pytest.mark.slow  # starts the compiler twice
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("files", [2, 12])
def test_a_process_killed_while_it_compiles_leaves_a_cache_that_starts(tmp_path: Path, files: int) -> None:
    cache = tmp_path / "graphs"
    process = begin(cache)
    while process.poll() is None and sum(path.is_file() for path in cache.rglob("*")) < files:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    start(cache)
