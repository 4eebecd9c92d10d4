"""Time and memory that frozen parts save in a training step: CPU seconds in turns, bytes for the backward pass, bytes of moments.

python -m benchmarks.freezing
python -m benchmarks.freezing --variants n --size 160 --batch 8 --turns 10
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.criterion import random_targets
from dfine_core import ModelConfig, Targets
from dfine_core.model.denoising import sample_queries_for
from pipeline.config import Experiment
from pipeline.config_files import check
from pipeline.training.schedule import derive
from pipeline.training.state import TrainState, build_train_state
from pipeline.training.step import MicroBatch, train_step

FROZEN: tuple[list[str], ...] = ([], ["backbone.stem", "backbone.stage1"], ["backbone"], ["backbone", "encoder"])
BOXES, CLASSES = 8, 3
CPU = torch.device("cpu")


def state_of(variant: str, size: int, batch: int, frozen: list[str]) -> TrainState:
    """State of a training with random weights."""
    model = {"variant": variant, "input_size": [size, size], "num_queries": 100}
    content: dict[str, Any] = {
        "data": {"train": "none"},
        "model": model,
        "schedule": {"steps": 1000, "global_batch_size": batch},
        "optimizer": {"freeze": frozen},
    }
    experiment = check(Experiment, content, source="benchmark")
    schedule = derive(experiment, images=1000, workers=1)
    return build_train_state(experiment, schedule, num_classes=CLASSES, device=CPU, world_size=1)


def micro_batch(config: ModelConfig, batch: int, size: int) -> MicroBatch:
    """Random images and boxes, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    targets = Targets.pack(random_targets([BOXES] * batch, CLASSES, generator), CLASSES, CPU)
    images = torch.rand(batch, 3, size, size, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    return MicroBatch(images, targets, sample_queries_for(config, targets, generator))


def kept_bytes(state: TrainState, batch: MicroBatch) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in state.detector.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = state.model(batch.images, batch.targets, batch.denoising)
    assert output is not None  # the kept tensors live as long as it does
    return sum(kept.values())


def main(argv: list[str] | None = None) -> None:
    """Print a table for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["n"])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args(argv)
    for variant in args.variants:
        states = [state_of(variant, args.size, args.batch, list(frozen)) for frozen in FROZEN]
        batch = micro_batch(states[0].detector.config, args.batch, args.size)
        seconds: list[list[float]] = [[] for _ in states]
        for turn in range(args.turns + 1):
            for state, measured in zip(states, seconds, strict=True):
                began = time.process_time()
                train_step(state, [batch])
                if turn:  # the first one sets up what stays
                    measured.append(time.process_time() - began)
        for frozen, state, measured in zip(FROZEN, states, seconds, strict=True):
            moments = sum(m.nbytes for moment in state.optimizer.state.values() for m in moment.values())
            print(
                f"{variant}  {', '.join(frozen) or 'nothing':32}{median(measured):8.3f} CPU s"
                f" ({median(measured) / median(seconds[0]):.2f})  kept {kept_bytes(state, batch) / 2**20:7.1f} MiB"
                f"  moments {moments / 2**20:6.1f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
