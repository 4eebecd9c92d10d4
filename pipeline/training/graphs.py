"""The training step as graphs: the detector, the costs of matching and the losses, each captured whole.

The assignment between costs and losses is solved on the host, the step's one round trip. Boxes, pairs and denoising slots are
padded to few sizes (`dfine_core.loss.padding`), so that there is one graph of each kind for each size of images. On CUDA the
graphs are replayed where a step has one micro-batch; with several, gradients of one would be overwritten by the next.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor
from torch import Tensor

from dfine_core import Criterion, Detector, Targets
from dfine_core.loss.criterion import Normalizers, count
from dfine_core.loss.matching import Matches, assign
from dfine_core.loss.padding import Padding, pad_matches, padding_of
from dfine_core.structures import DetectorOutput
from pipeline.progress import Progress

T = TypeVar("T")
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
WORTHWHILE_STEPS = 1000  # fewer are over before minutes of compiling have paid
SIZES_OF_BATCHES = (
    4  # doublings of boxes, pairs and slots that a training meets, beyond which the rest would run eagerly
)


def loss_values(
    criterion: Criterion,
    output: DetectorOutput,
    targets: Targets,
    matches: Matches | None,
    normalizers: Normalizers | None,
    padding: Padding | None = None,
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the loss terms, and their values side by side [T]; arguments as of `Criterion.forward`."""
    terms: dict[str, Tensor] = criterion(output, targets, matches, normalizers, padding)
    return tuple(terms), torch.stack(list(terms.values()))


@dataclass(frozen=True)
class StepGraphs:
    """Functions of a step whose detector is compiled, compiled themselves or not."""

    matching_cost: Callable[[DetectorOutput, Targets], Tensor]
    loss_values: Callable[..., tuple[tuple[str, ...], Tensor]]
    replay: bool  # with CUDA graphs

    def losses(
        self,
        criterion: Criterion,
        detect: Callable[[], DetectorOutput],
        targets: Targets,
        matches: Matches | None,
        normalizers: Normalizers | None,
    ) -> tuple[tuple[str, ...], Tensor]:
        """Loss terms of a padded micro-batch, as `loss_values` has them."""
        output = with_whole_cache(detect)
        if matches is None:
            with torch.no_grad():
                matches = assign(with_whole_cache(lambda: self.matching_cost(output, targets)), targets)
        normalizers = normalizers or count(targets.total, len(matches.union), targets.boxes.device)
        padded = pad_matches(matches, targets)
        padding = padding_of(matches, targets, output.denoising_queries, criterion.config, padded)
        return with_whole_cache(lambda: self.loss_values(criterion, output, targets, padded, normalizers, padding))


def resolve_compile(wanted: str, device: torch.device, steps: int) -> Literal["off", "detector", "step"]:
    """Resolve `auto`: the step on CUDA in a training long enough to pay for it, else nothing."""
    if wanted != "auto":
        return cast(Literal["off", "detector", "step"], wanted)
    return "step" if device.type == "cuda" and steps >= WORTHWHILE_STEPS else "off"


def compile_step(
    detector: Detector,
    criterion: Criterion,
    *,
    losses: bool,
    sizes: int,
    replay: bool = False,
    backend: str = "inductor",
) -> StepGraphs:
    """Compile the detector in place and, with `losses`, what follows it; every part is one graph, or an error.

    Args:
        sizes: number of image sizes that the training draws from.
        replay: record CUDA graphs.
    """
    # With gradients and, where a step has several micro-batches, without.
    limit = 2 * sizes * SIZES_OF_BATCHES
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * limit)
    # So that a damaged cache is found before the step exchanges anything with other workers.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    options = inductor_options(replay) if backend == "inductor" else None

    def compiled(function: T) -> T:
        return cast(T, torch.compile(function, backend=backend, dynamic=False, fullgraph=True, options=options))  # type: ignore[call-overload]

    detector.compile(backend=backend, dynamic=False, fullgraph=True, options=options)
    if not losses:
        return StepGraphs(criterion.matching_cost, loss_values, replay)
    return StepGraphs(compiled(criterion.matching_cost), compiled(loss_values), replay)


def inductor_options(replay: bool) -> dict[str, str | int | bool]:
    """Inductor's settings for a step that consists of many small operators.

    Combined kernels compute several independent small operators in one launch, such as casts of weights and sums of biases.
    """
    wanted = {"combo_kernels": True, "triton.cudagraphs": replay}
    return {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}


def graphs_compiled() -> int:
    """Number of graphs that this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def keep_graphs_in_cache() -> Path:
    """Let the compiler keep its results in a folder that outlives the machine's temporary one, unless one is set."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfine" / "graphs"
    return Path(os.environ.setdefault(CACHE_VARIABLE, str(default)))


def with_whole_cache(call: Callable[[], T]) -> T:
    """Call, and once more without the cache if compiling failed: a process killed while it wrote leaves damaged files."""
    try:
        return call()
    except (torch._inductor.exc.InductorError, torch._dynamo.exc.BackendCompilerFailed) as error:
        cache = Path(os.environ.get(CACHE_VARIABLE, ""))
        if not os.environ.get(CACHE_VARIABLE) or not cache.is_dir():
            raise
        aside = cache.with_name(f"{cache.name}.damaged-{os.getpid()}-{time.time_ns()}")
        try:
            cache.rename(aside)
        except FileNotFoundError:  # another worker was first
            aside = cache
        reason = str(error).splitlines()[0]
        Progress.write(f"compiling failed ({reason}): its cache was moved to {aside}, and it is compiled again")
        torch._dynamo.reset()
        torch._inductor.codecache.PyCodeCache.cache_clear(purge=True)
        result = call()
        if aside != cache:
            shutil.rmtree(aside, ignore_errors=True)  # it was the cache
        return result
