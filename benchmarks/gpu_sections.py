"""Sections of `benchmarks.gpu_proof`: each prints rows, and runs in a process of its own.

python -m benchmarks.gpu_sections speed '{"device": "cuda", "variant": "l", "batch": 8}'
"""

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

MARK = "ROW "
BOXES, CLASSES = 10, 80
ROUNDS, WARM_UP = 10, 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Proof:
    """Settings of a section."""

    device: str = "cuda"
    size: int = 640
    variant: str = "n"
    batch: int = 2
    compiled: str = "off"  # numerics.compile
    fused: bool = True  # Triton kernels
    backend: str = ""

    def of(self, variant: str = "n", batch: int = 2, **changes: Any) -> "Proof":
        return replace(self, variant=variant, batch=batch, **changes)

    def label(self) -> str:
        return f"{self.variant}, batch {self.batch}, compile {self.compiled}, fused {self.fused} {self.backend}".strip()

    def environment(self) -> dict[str, str]:
        """Environment of the section's process: cuBLAS needs the second entry to be deterministic."""
        given = {
            "DFINE_TRITON": str(int(self.fused)),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "RAY_AUTH_MODE": "disabled",
        }
        if self.device == "cpu":
            given["CUDA_VISIBLE_DEVICES"] = ""
        return {**os.environ, **given}


def golden(proof: Proof) -> Iterator[Row]:
    """Recordings of the published network, repeated on the device in float32."""
    from dfine_core import Criterion, Detector, ModelConfig
    from tests.support import recorded

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    names = ["eval_n_320"] if proof.device == "cpu" else recorded.recordings("eval")
    for name in names:
        record = recorded.load(name)
        case = record.case
        size = (case["height"], case["width"])
        detector = Detector(ModelConfig.variant(case["variant"], num_classes=case["num_classes"], input_size=size))
        recorded.fill(detector, case["seed"])
        detector.to(proof.device).eval()
        with torch.no_grad():
            output = detector.decoder([x.to(proof.device) for x in record.encoder_maps])
        expected = record.tensor("pred_logits").sort(dim=1).values  # near-tied queries may swap ranks
        off = (output.logits.cpu().sort(dim=1).values - expected).abs().max() / expected.abs().max()
        yield {"case": name, "relative error": float(off), "equal": bool(off < 1e-4)}
    for name in ["train_n_denoising"] if proof.device == "cpu" else recorded.recordings("train"):
        record = recorded.load(name)
        case = record.case
        config = ModelConfig.variant(
            case["variant"],
            num_classes=case["num_classes"],
            input_size=(case["size"],) * 2,
            num_denoising=case["num_denoising"],
        )
        detector = Detector(config)
        recorded.fill(detector, case["seed"])
        recorded.batch_norms_to_eval(detector.train())
        targets = recorded.targets(case["counts"], case["num_classes"], case["seed"])
        noised: Any = False
        if "dn.class" in record.arrays:
            noised = recorded.denoising_queries(record, targets)
            on_device = {k: v.to(proof.device) for k, v in vars(noised).items() if isinstance(v, Tensor)}
            noised = replace(noised, **on_device)
        images = recorded.images(len(case["counts"]), case["size"], case["size"], case["seed"]).to(proof.device)
        detector.to(proof.device)
        terms = Criterion(config)(detector(images, targets, denoising=noised), targets)
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        norms = {k: float(p.grad.norm()) for k, p in detector.named_parameters() if p.grad is not None}
        recordeds = {k: v for k, v in record.json("grad_norms").items() if v is not None}
        off_loss = abs(float(total) / float(record.arrays["total"]) - 1)
        largest = max(recordeds.values())
        off_norm = max(abs(norms.get(k, 0.0) - v) / max(v, 1e-3 * largest) for k, v in recordeds.items())
        equal = off_loss < 1e-4 and off_norm < 0.01
        yield {"case": name, "relative error": off_loss, "gradient norms": off_norm, "equal": equal}


def sampling(proof: Proof) -> Iterator[Row]:
    """The fused sampling operator against the plain path: values, gradients, time, and equal sums in deterministic mode."""
    from dfine_core.model.attention import DeformableAttention, split_levels
    from dfine_core.model.sampling import usable

    torch.manual_seed(0)
    sides = [proof.size // 8, proof.size // 16, proof.size // 32]
    shapes, count = [(s, s) for s in sides], sum(s * s for s in sides)
    attention = DeformableAttention(256, 8, (3, 6, 3)).to(proof.device)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
    boxes = torch.rand(proof.batch, 500, 4, device=proof.device)
    for dtype in (torch.float32, torch.bfloat16):
        tokens = torch.randn(proof.batch, count, 256, device=proof.device, dtype=dtype)
        query = torch.randn(proof.batch, 500, 256, device=proof.device)

        def both(fused: bool, tokens: Tensor = tokens, query: Tensor = query) -> tuple[Tensor, ...]:
            leaves = [tokens.clone().requires_grad_(), query.clone().requires_grad_()]
            out = attention(leaves[1], boxes, split_levels(leaves[0], shapes, 8, fused=fused))
            return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

        row: Row = {"case": str(dtype), "plain ms": milliseconds(lambda: both(False), proof.device)}
        if usable(tokens, 3):
            row["fused ms"] = milliseconds(lambda: both(True), proof.device)
            for name, ours, plain in zip(("values", "to tokens", "to query"), both(True), both(False), strict=True):
                row[name] = float((ours.float() - plain.float()).norm() / plain.float().norm())
            torch.use_deterministic_algorithms(True, warn_only=True)
            row["deterministic"] = torch.equal(both(True)[1], both(True)[1])
            torch.use_deterministic_algorithms(False)
        else:
            row["fused ms"] = "no fused kernels here"
        yield row


def distortion(proof: Proof) -> Iterator[Row]:
    """The photometric distortion in one pass against the plain operators."""
    import numpy as np

    from dfine_core import fused_kernels
    from pipeline.data.augment import photometric
    from pipeline.data.augment.photometric_parameters import draw_photometric
    from pipeline.data.augment.settings import AugmentSettings

    generator = np.random.default_rng(0)
    batch = 32 if proof.device == "cuda" else 2
    rows = np.stack([draw_photometric(generator, AugmentSettings()) for _ in range(batch)])
    rows[:, -2:], rows[:, -5] = proof.size, 0.5  # the whole canvas; mean grey
    parameters = torch.from_numpy(rows).to(proof.device)
    images = torch.rand(batch, 3, proof.size, proof.size, device=proof.device)
    plain = photometric._plain_distortion(images, parameters)
    row: Row = {"plain ms": milliseconds(lambda: photometric._plain_distortion(images, parameters), proof.device)}
    if fused_kernels.usable(images):
        row["fused ms"] = milliseconds(lambda: photometric.fused_distortion(images, parameters), proof.device)
        row["largest difference"] = float((photometric.fused_distortion(images, parameters) - plain).abs().max())
    yield {"case": f"{batch} images", **row}


def resume(proof: Proof) -> Iterator[Row]:
    """Steps repeated from the same weights, and continued from a copy, in deterministic mode: equal to the bit?"""
    for strict in (True, False):
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        try:
            first, second = steps_from_start(proof, 4), steps_from_start(proof, 4)
            continued = steps_from_start(proof, 4, restart_at=2)
        except RuntimeError as error:
            yield {"case": "strict" if strict else "warn only", "refused": str(error).splitlines()[0][:160]}
            continue
        yield {
            "case": "strict" if strict else "warn only",
            "repeated equal": all(map(torch.equal, first, second)),
            "resumed equal": all(map(torch.equal, first, continued)),
        }
        return


def steps_from_start(proof: Proof, steps: int, restart_at: int | None = None) -> list[Tensor]:
    """Weights after some steps; at `restart_at`, everything is copied into a new state, as from a checkpoint."""
    from pipeline.training.step import train_step

    state, batch = training(proof)
    for step in range(steps):
        if step == restart_at:
            kept = [copy.deepcopy(x.state_dict()) for x in (state.detector, state.ema.module, state.optimizer)]
            updates = copy.deepcopy({k: v for k, v in vars(state.ema).items() if isinstance(v, int | Tensor)})
            state, _ = training(proof)
            for into, saved in zip((state.detector, state.ema.module, state.optimizer), kept, strict=True):
                into.load_state_dict(saved)
            vars(state.ema).update(updates)
        train_step(state, [micro_batch(proof, state, batch, step)])
    return [
        x.detach().clone() for x in (*state.detector.state_dict().values(), *state.ema.module.state_dict().values())
    ]


def gradients(proof: Proof) -> Iterator[Row]:
    """Losses and gradients of a compiled step against an eager one with the same input."""
    from pipeline.training.step import train_step

    found = []
    for mode in ("off", proof.compiled):
        state, batch = training(replace(proof, compiled=mode))
        started_at = time.perf_counter()
        result = train_step(state, [micro_batch(proof, state, batch, 0)])
        spent = time.perf_counter() - started_at
        found.append((result.loss, [p.grad for p in state.detector.parameters() if p.grad is not None], spent))
    (loss, eager, _), (compiled_loss, compiled, spent) = found
    norm = torch.stack([g.norm() for g in eager]).norm()
    off = torch.stack([(a - b).norm() for a, b in zip(eager, compiled, strict=True)]).norm() / norm
    yield {
        "case": proof.label(),
        "loss": float((compiled_loss - loss).abs() / loss),
        "gradients": float(off),
        "first step s": spent,
    }


def speed(proof: Proof) -> Iterator[Row]:
    """Images a second of whole steps, with augmentation on the device; then the shares of the step, and memory."""
    from benchmarks.launches import PARTS
    from pipeline.training.step import train_step

    state, batch = training(proof)
    moved = micro_batch(proof, state, batch, 0)
    started_at = time.perf_counter()
    train_step(state, [moved])
    wait(proof.device)
    first = time.perf_counter() - started_at
    rounds = ROUNDS if proof.device == "cuda" else 2
    if proof.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [
        milliseconds(
            lambda: train_step(state, [micro_batch(proof, state, batch, 1)]), proof.device, rounds=1, warm_up=0
        )
        for _ in range(WARM_UP + rounds)
    ][WARM_UP:]
    step = statistics.median(times)
    row: Row = {"case": proof.label(), "images/s": 1e3 * proof.batch / step, "step ms": step, "first step s": first}
    if proof.device == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if proof.device == "cuda" and proof.compiled == "off":
        gflop = step_gflop(proof)
        row |= {"GFLOP/s": 1e3 * gflop / step, "GFLOP an image": gflop / proof.batch}
    if proof.compiled == "off":
        row |= shares(proof, state, batch, PARTS)
    yield row


def shares(proof: Proof, state: Any, batch: Any, parts: tuple[str, ...]) -> Row:
    """Share of each part of one step, in percent, with the device waited for after each."""
    from pipeline.training import step as step_module

    spent: dict[str, float] = dict.fromkeys(("input", *parts), 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait(proof.device)
            started_at = time.perf_counter()
            result = function(*args, **kwargs)
            wait(proof.device)
            spent[name] += time.perf_counter() - started_at
            return result

        return call

    marks: list[tuple[Any, str, str]] = [
        (state.detector.backbone, "forward", "backbone"),
        (state.detector.encoder, "forward", "encoder"),
        (state.detector.decoder, "forward", "decoder"),
        (state.criterion, "forward", "criterion"),
        (Tensor, "backward", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (state.optimizer, "step", "optimiser"),
        (state.ema, "update", "average"),
    ]
    whole = time.perf_counter()
    moved = timed("input", micro_batch)(proof, state, batch, 2)
    patches = [patch.object(owner, name, timed(part, getattr(owner, name))) for owner, name, part in marks]
    for each in patches:
        each.start()
    step_module.train_step(state, [moved])
    for each in patches:
        each.stop()
    wait(proof.device)
    whole = time.perf_counter() - whole
    return {f"{name} %": round(100 * value / whole, 1) for name, value in spent.items() if value}


def collectives(proof: Proof) -> Iterator[Row]:
    """Two workers of Ray Train that share one device exchange a tensor."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.ray_cluster import start_ray

    if proof.device == "cpu" and proof.backend == "nccl":
        yield {"case": "nccl", "result": "no GPU"}
        return
    gpus = 1 if proof.device == "cuda" else 0
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _exchange,
            scaling_config=ScalingConfig(
                num_workers=2, use_gpu=bool(gpus), resources_per_worker={"CPU": 0.5, **({"GPU": 0.5} if gpus else {})}
            ),
            torch_config=TorchConfig(backend=proof.backend, timeout_s=40),
            run_config=RunConfig(storage_path=folder, name="exchange"),
        )
        try:
            result = trainer.fit()
            yield {"case": proof.backend, "result": "as expected", **(result.metrics or {})}
        except Exception as error:  # noqa: BLE001  # NCCL may refuse two ranks on one device: that is the result
            lines = [line for line in str(error).splitlines() if line.strip()]
            told = [line for line in lines if "Duplicate GPU" in line or "NCCL" in line] or lines
            yield {"case": proof.backend, "result": "refused", "reason": told[-1][-200:]}


def _exchange() -> None:
    import ray.train
    import torch.distributed as dist

    rank = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    x = torch.full((1_000_000,), float(rank + 1), device=device)
    started_at = time.perf_counter()
    dist.all_reduce(x)
    wait(device.type)
    assert bool((x == 3).all())
    ray.train.report({"ms": 1e3 * (time.perf_counter() - started_at), "device": str(device)})


def whole_training(proof: Proof) -> Iterator[Row]:
    """A training by Ray with its stream and its log: seconds of a step, and the share of it that waits for data."""
    from benchmarks.overhead import recorded
    from pipeline.config import Cluster, Experiment
    from pipeline.config_files import check
    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.prepare.shard_writer import PrepareOptions
    from pipeline.data.sources.synthetic import synthetic_source
    from pipeline.ray_cluster import start_ray
    from pipeline.training.launch import launch

    gpu = proof.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        start_ray()
        prepare(
            synthetic_source(64, longest_side=proof.size), f"{folder}/train", split="train", options=PrepareOptions()
        )
        content = {
            "name": "proof",
            "storage": f"{folder}/runs",
            "data": {"train": f"{folder}/train"},
            "model": {
                "variant": proof.variant,
                "input_size": [proof.size, proof.size],
                "num_queries": 60 if gpu else 20,
            },
            "schedule": {"steps": 40 if gpu else 20, "global_batch_size": 16 if gpu else 2, "no_aug_epochs": 0},
            "numerics": {"compile": False},
        }
        launch(
            check(Experiment, content, source="proof"),
            Cluster(workers=1, gpus_per_worker=int(gpu), cpus_per_worker=0.5),
        )
        found = recorded(f"{folder}/runs/mlflow.db", "proof")
    yield {
        "case": f"{proof.variant}, {content['schedule']}",
        "step ms": 1e3 * statistics.median(found["train/speed/step_s"][1:]),
        "waits for data": statistics.median(found["train/speed/data_wait_share"][1:]),
    }


def training(proof: Proof) -> tuple[Any, Any]:
    """State of a training as a worker builds it, and a batch as the stream hands it over."""
    import numpy as np

    from benchmarks.criterion import random_targets
    from pipeline.config import Experiment
    from pipeline.config_files import check
    from pipeline.data.augment.blend import Blend
    from pipeline.data.augment.photometric_parameters import draw_photometric
    from pipeline.data.augment.settings import AugmentSettings
    from pipeline.data.stream.batch import Batch
    from pipeline.training.schedule import derive
    from pipeline.training.state import build_train_state

    content = {
        "name": "proof",
        "storage": "unused",
        "data": {"train": "unused"},
        "model": {"variant": proof.variant, "input_size": [proof.size, proof.size]},
        "schedule": {"steps": 1000, "global_batch_size": proof.batch, "no_aug_epochs": 0},
        "numerics": {"compile": {"off": False}.get(proof.compiled, proof.compiled)},
    }
    if proof.device == "cpu":
        content["model"] = {**content["model"], "num_queries": 20}  # type: ignore[dict-item]
    experiment = check(Experiment, content, source="proof")
    schedule = derive(experiment, images=64 * proof.batch, workers=1)
    state = build_train_state(
        experiment, schedule, num_classes=CLASSES, device=torch.device(proof.device), world_size=1
    )
    generator = torch.Generator().manual_seed(0)
    targets = random_targets([BOXES] * proof.batch, CLASSES, generator)
    drawn = np.random.default_rng(0)
    rows = np.stack([draw_photometric(drawn, AugmentSettings()) for _ in range(proof.batch)])
    rows[:, -2:], rows[:, -5] = proof.size, 0.5  # the whole canvas; mean grey
    images = torch.randint(0, 256, (proof.batch, proof.size, proof.size, 3), generator=generator, dtype=torch.uint8)
    batch = Batch(
        step=0,
        micro_batch=0,
        images=images.permute(0, 3, 1, 2),
        photometric=torch.from_numpy(rows),
        blend=Blend(),
        boxes=torch.cat([t["boxes"] for t in targets]),
        labels=torch.cat([t["labels"] for t in targets]),
        counts=(BOXES,) * proof.batch,
        image_id=torch.arange(proof.batch),
        orig_size=torch.full((proof.batch, 2), proof.size),
        padding=(False,) * proof.batch,
        replaced=(),
        teacher_boxes=torch.zeros(0, 4),
        teacher_labels=torch.zeros(0, dtype=torch.int64),
        teacher_scores=torch.zeros(0),
        teacher_counts=(0,) * proof.batch,
    )
    return state, batch.pin_memory() if proof.device == "cuda" else batch


def micro_batch(proof: Proof, state: Any, batch: Any, step: int) -> Any:
    from pipeline.training.step import to_micro_batch

    return to_micro_batch(replace(batch, step=step), state, size=(proof.size, proof.size), seed=0)


def step_gflop(proof: Proof) -> float:
    """Operations of a step: of one image, since they grow with the batch."""
    from benchmarks.train_step import Settings, Training

    fixed: dict[str, Any] = {"device": "cpu", "amp": "no", "compile": False, "channels_last": False}
    one = Settings(variant=proof.variant, batch=1, size=proof.size, classes=CLASSES, objects=BOXES, **fixed)
    return Training(one, "fdr").gflops * proof.batch


def milliseconds(function: Callable[[], Any], device: str, *, rounds: int = 5, warm_up: int = 2) -> float:
    """Median of a call, the device waited for."""
    times = []
    for _ in range(warm_up + rounds):
        wait(device)
        started_at = time.perf_counter()
        function()
        wait(device)
        times.append(1e3 * (time.perf_counter() - started_at))
    return statistics.median(times[warm_up:])


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


SECTIONS: dict[str, Callable[[Proof], Iterator[Row]]] = {
    "golden": golden,
    "sampling": sampling,
    "distortion": distortion,
    "resume": resume,
    "speed": speed,
    "gradients": gradients,
    "collectives": collectives,
    "training": whole_training,
}


def main() -> None:
    """Run one section."""
    proof = Proof(**json.loads(sys.argv[2]))
    if proof.device == "cpu":
        torch.set_num_threads(1)
    for row in SECTIONS[sys.argv[1]](proof):
        print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
