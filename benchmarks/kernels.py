"""Kernels that a compiled training step launches on a GPU, counted in the code that Inductor generates for one. Needs no GPU.

    python -m benchmarks.kernels --variants n
    python -m benchmarks.kernels --variants n l --plain --keep /tmp/code

Detector, matching costs and losses are traced on fake tensors of a CPU in bf16; then their graphs, forward and backward, are
moved to a fake H100 and lowered. A kernel is a Triton kernel or a call of a library, which may launch several: the gradient of a
convolution is one call here and two kernels or more on a GPU. Casts of weights are outside the graphs and added by arithmetic.
Optimiser, average and statistics stay eager and are not counted.
"""

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from dfine_core import Criterion, Detector, ModelConfig, Targets
from dfine_core.config import VARIANTS
from dfine_core.loss.criterion import Normalizers
from dfine_core.loss.matching import Matches, Pairs
from dfine_core.loss.padding import Padding, pad_denoising, pad_targets
from dfine_core.structures import DenoisingQueries, DetectorOutput
from pipeline.training.graphs import inductor_options, loss_values
from pipeline.training.low_precision import CastDetector

GPU = torch.device("cuda", 0)
BATCH, SIDE, CLASSES, SLOTS, UNION = 8, 640, 80, 196, 256
TENSORS_OF_A_COPY = 64  # of one kernel of _foreach_copy_ on a GPU
H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


class _CapturedError(Exception):
    """Ends a compilation whose code is known."""


@contextmanager
def code_for_h100(codes: list[str]) -> Iterator[None]:
    """Let Inductor generate code for a device that is not there, and keep the code instead of loading it."""
    import triton.runtime
    from triton.backends.compiler import GPUTarget

    def keep(_: GraphLowering, code: Any) -> SimpleNamespace:
        codes.append(code.value)
        return SimpleNamespace(__file__="", call=None, key="", recursively_apply_fns=None)

    def constant(value: Any) -> Any:
        return lambda *_, **__: value

    cuda = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    interface = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_compute_capability": 90,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
    }
    worker = {"get_device_properties": H100, "current_device": 0}
    driver = SimpleNamespace(get_current_target=constant(GPUTarget("cuda", 90, 32)), get_current_device=constant(0))
    triton.runtime.driver.set_active(driver)
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, constant(value)))
        for owner, values in ((CudaInterface, interface), (CudaInterface.Worker, worker)):
            for name, value in values.items():
                stack.enter_context(patch.object(owner, name, staticmethod(constant(value))))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", constant(True)))
        stack.enter_context(patch.object(GraphLowering, "_compile_to_module_lines", keep))
        yield


def generated_code(function: Any, *inputs: Any) -> list[str]:
    """Code of the forward graph of a function of fake tensors and, if it has gradients, of the backward graph."""
    codes: list[str] = []

    def lower(graph: torch.fx.GraphModule, example_inputs: list[Any], **settings: Any) -> Any:
        mode = next(x.fake_mode for x in example_inputs if isinstance(x, Tensor))  # type: ignore[attr-defined]

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)

        for node in graph.graph.nodes:
            node.args, node.kwargs = (
                map_aggregate(part, lambda x: GPU if isinstance(x, torch.device) else x)
                for part in (node.args, node.kwargs)
            )
        with mode:
            for node in graph.graph.nodes:
                for key in ("val", "example_value"):
                    if key in node.meta:
                        node.meta[key] = pytree.tree_map(moved, node.meta[key])
            graph.recompile()
            with code_for_h100(codes):
                compile_fx_inner(graph, [moved(x) for x in example_inputs], **settings)
        return lambda *_: None

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        compile_fx(graph, example_inputs, inner_compile=lower)
        raise _CapturedError

    torch._dynamo.reset()
    try:
        torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*inputs)  # type: ignore[no-untyped-call]
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _CapturedError):
            raise
    return codes


def kernels(code: str) -> Counter[str]:
    """Launches in generated code, by kind: a library's function, or of which class a kernel of Triton is."""
    body = code[code.index("def call(") :]
    calls = re.findall(r"(triton_\w+)\.run\(|(?:extern_kernels\.|torch\.ops\.aten\.)(\w+)[\w.]*\(", body)
    return Counter(_class_of(triton) if triton else library for triton, library in calls)


def _class_of(kernel: str) -> str:
    """Class of a Triton kernel by its name, which lists the operators that are fused in it; a combined kernel's has none."""
    _, kind, *operators = kernel.split("_", 2)
    if "batch_norm" in kernel:
        return "batch norm, statistics" if kind in ("red", "per") else "batch norm, pointwise"
    if not re.search(r"[a-z]", operators[0].removeprefix("fused")):
        return "combined"
    return "other reduction" if kind in ("red", "per") else "other pointwise"


def graphs_of(variant: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Names, functions and fake inputs of the graphs of a step."""
    config = ModelConfig.variant(variant, num_classes=CLASSES, input_size=(SIDE, SIDE))
    stages = config.num_layers + 2
    detector, criterion = Detector(config).train(), Criterion(config)
    for module, name in (slot for group in CastDetector(detector, torch.bfloat16).groups for slot in group):
        weight = module.get_parameter(name)  # as the graphs find it
        module.register_parameter(name, nn.Parameter(weight.detach().bfloat16(), requires_grad=weight.requires_grad))

    def indices(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    boxes = indices(BATCH)
    targets = pad_targets(Targets(boxes, torch.rand(BATCH, 4), boxes, (1,) * BATCH))
    queries = DenoisingQueries(
        indices(BATCH, SLOTS),
        torch.rand(BATCH, SLOTS, 4),
        torch.zeros(SLOTS + config.num_queries, SLOTS + config.num_queries, dtype=torch.bool),
        SLOTS // 2,
        *(indices(BATCH * SLOTS // 2) for _ in range(3)),
    )
    denoising = pad_denoising(queries, config)

    def detect() -> DetectorOutput:
        output: DetectorOutput = detector(torch.rand(BATCH, 3, SIDE, SIDE), targets, denoising)
        return output

    def detector_graph(images: Tensor, targets: Targets, denoising: DenoisingQueries) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return detector(images, targets, denoising)

    yield "detector", detector_graph, (torch.rand(BATCH, 3, SIDE, SIDE), targets, denoising)
    with torch.autocast("cpu", torch.bfloat16):
        output = detect()
    with torch.no_grad():
        yield "matching costs", criterion.matching_cost, (output, targets)
    total = len(targets.labels)
    matches = Matches(
        own=Pairs(*(indices(stages, total) for _ in range(3))), union=Pairs(*(indices(UNION) for _ in range(3)))
    )
    padding = Padding(
        union=torch.ones(UNION),
        positive=torch.ones(len(denoising.positive_image)),
        own=torch.ones(total),
        slots=torch.ones(denoising.labels.shape[1]),
        groups=torch.ones(()),
        distillation=torch.ones(4),
    )
    normalizers = Normalizers(torch.ones(()), torch.ones(()))
    yield "losses", loss_values, (criterion, output, targets, matches, normalizers, padding)


def counts(variant: str) -> tuple[int, int]:
    """Convolutions of a detector, and kernels that cast its weights and their gradients."""
    config = ModelConfig.variant(variant, num_classes=CLASSES)
    with torch.device("meta"):
        detector = Detector(config)
        groups = CastDetector(detector, torch.bfloat16).groups
    copies = sum(math.ceil(len(group) / TENSORS_OF_A_COPY) for group in groups)
    return sum(isinstance(module, nn.Conv2d) for module in detector.modules()), 2 * copies


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--variants", nargs="+", choices=VARIANTS, default=["n", "l"])
    arguments.add_argument("--plain", action="store_true", help="without the options of training")
    arguments.add_argument("--graphs", nargs="+", default=["detector", "matching costs", "losses"])
    arguments.add_argument("--keep", type=Path, help="folder for the generated code")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._functorch.config.enable_autograd_cache = False
    options = {} if args.plain else inductor_options(replay=False)
    print(f"torch {torch.__version__}, bf16, {'no options' if args.plain else options}\n")
    print("| | graph | pass | kernels | of these | seconds |\n|---|---|---|---|---|---|")
    settings = {"fx_graph_cache": False, "compile_threads": 1, **options}
    for variant in args.variants:
        total, mode = 0, FakeTensorMode()
        mode.__deepcopy__ = lambda memo, mode=mode: mode  # type: ignore[attr-defined]  # copies of a layer stay in its mode
        with mode, torch._inductor.config.patch(settings):
            for name, function, inputs in graphs_of(variant):
                if name not in args.graphs:
                    continue
                start = time.process_time()
                codes = generated_code(function, *inputs)
                seconds = time.process_time() - start
                for which, code in zip(("forward", "backward"), codes, strict=False):
                    found = kernels(code)
                    total += found.total()
                    kinds = ", ".join(f"{kind} {number}" for kind, number in found.most_common(8))
                    print(
                        f"| {variant.upper()} | {name} | {which} | {found.total()} | {kinds} | {seconds:.0f} |",
                        flush=True,
                    )
                    if args.keep:
                        args.keep.mkdir(parents=True, exist_ok=True)
                        (args.keep / f"{variant}_{name.replace(' ', '_')}_{which}.py").write_text(code)
        found_convolutions, casts = counts(variant)
        print(f"| {variant.upper()} | casts of weights and gradients | | {casts} | | |")
        print(
            f"| {variant.upper()} | all | | {total + casts} | {found_convolutions} convolutions in the network | |",
            flush=True,
        )


if __name__ == "__main__":
    main()
