"""Detect in any number of images, split into parts that Ray Data processes. An interrupted prediction resumes.

plan.json            settings of the prediction; another prediction is refused in this folder
parts/*.parquet      one row per image: its detections, or the reason for its rejection
detections.json      COCO results; images.json has the images and categories in COCO's format
rejected.parquet     images that could not be read
drawings/*.jpg       images with boxes; contact_sheet.jpg shows all of them; explained/*.png: refinement of one box
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy

from dfine_core.inference import DEFAULT_THRESHOLD, LoadedDetector
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import Category
from pipeline.evaluation.detections import DetectionTable, to_coco_json
from pipeline.predict.drawings import write_drawings
from pipeline.predict.inputs import Inputs
from pipeline.predict.partition import PARTS_FOLDER, PartCounts, PredictPlan, part_name, read_part, write_part
from pipeline.progress import Progress
from pipeline.ray_cluster import start_ray

PLAN_FILE = "plan.json"
DETECTIONS_FILE, IMAGES_FILE, REJECTED_FILE = "detections.json", "images.json", "rejected.parquet"
IMAGE_COLUMNS = ["image_id", "file_name", "frame", "seconds", "width", "height", "rejected"]
PARTS_PER_EXECUTION = 2000  # limits the bookkeeping of one Ray Data execution, which grows with its blocks
COUNTS = ("images", "detections", "rejected")
IN_PROCESS = 0  # number of workers that means: in this process, without Ray


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of a prediction."""

    threshold: float = DEFAULT_THRESHOLD  # minimum score
    part_size: int = 256  # images per part, the most that an interruption repeats
    batch_size: int = 8  # images per forward pass
    num_images: int = 12  # images to draw
    num_explanations: int = 0  # images whose best box is explained; above 0 the edges of all boxes are measured, too
    workers: int | None = None  # IN_PROCESS, or detectors on Ray; None: one per GPU, or one


@dataclass(frozen=True)
class PredictResult:
    """Summary of a prediction."""

    out: str
    num_images: int
    detections: Counter[str]  # by class
    rejected: tuple[tuple[str, str], ...]  # file and reason

    def summary(self) -> str:
        """Lines for the console."""
        by_class = ", ".join(f"{count} {name}" for name, count in self.detections.most_common(12))
        lines = [f"{self.out}: {self.detections.total()} detections in {self.num_images} images", f"  {by_class}"]
        if self.rejected:
            lines.append(f"{len(self.rejected)} could not be read, see {REJECTED_FILE}:")
            lines += [f"  {name}: {reason}" for name, reason in self.rejected[:5]]
        return "\n".join(lines)


def predict(loaded: LoadedDetector, inputs: Inputs, out: str, options: PredictOptions) -> PredictResult:
    """Detect in all inputs and write the results to `out`, or resume the prediction there.

    Args:
        out: path or URI, shared by all nodes.

    Raises:
        ConfigError: the folder contains another prediction, or the detector has no distributions to measure.
    """
    if options.num_explanations and loaded.config.regression != "fdr":
        raise ConfigError("this detector regresses boxes directly: its edges have no distributions to explain")

    # 1. The plan: everything that the parts depend on. A folder with another one is refused.
    out = storage.absolute(out)
    plan = PredictPlan(
        inputs=inputs.digest,
        detector=detector_digest(loaded),
        num_images=inputs.num_images,
        part_size=options.part_size,
        batch_size=options.batch_size,
        threshold=options.threshold,
        deviations=options.num_explanations > 0,
    )
    _write_or_check_plan(out, plan)

    # 2. The parts that are missing. Explanations need every decoder layer, which a deployed detector lacks.
    if not options.num_explanations:
        loaded = loaded.deploy()
    if options.workers != IN_PROCESS:
        loaded = loaded.to("cpu")
    existing = storage.sizes(storage.join(out, PARTS_FOLDER))
    todo = [part for part in range(plan.num_parts) if part_name(part) not in existing]
    done = plan.num_images - sum(stop - first for first, stop in map(plan.image_range, todo))
    rejected = 0
    if todo and options.workers != IN_PROCESS:
        start_ray()
    with Progress("predict", total=plan.num_images, initial=done, unit=" images") as progress:
        for counts in _run_parts(loaded, inputs, plan, todo, out, options.workers):
            rejected += counts.rejected
            progress.advance(counts.images, f"{rejected} rejected" if rejected else "")
    storage.remove_temporaries(storage.join(out, PARTS_FOLDER))

    # 3. Results over all parts, and drawings of some images.
    categories = output_categories(loaded, inputs)
    result = _collect(out, plan, categories)
    write_drawings(
        out, inputs, plan, categories, loaded, num_images=options.num_images, num_explanations=options.num_explanations
    )
    return result


def detector_digest(loaded: LoadedDetector) -> str:
    """SHA-256 over the weights, the configuration and the class names."""
    hashed = hashlib.sha256(json.dumps([asdict(loaded.config), loaded.names], default=list).encode())
    for key, tensor in sorted(loaded.detector.state_dict().items()):
        hashed.update(key.encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def output_categories(loaded: LoadedDetector, inputs: Inputs) -> tuple[Category, ...]:
    """Categories of the shard set if it is the only input and has the detector's classes, else those of the detector."""
    shards = inputs.shard_set
    if shards is not None and tuple(category.name for category in shards.manifest.categories) == loaded.names:
        return shards.manifest.categories
    pairs = zip(loaded.category_ids, loaded.names, strict=True)
    return tuple(Category(label=label, original_id=original, name=name) for label, (original, name) in enumerate(pairs))


def _write_or_check_plan(out: str, plan: PredictPlan) -> None:
    """Write the plan, or compare it with the one in the folder."""
    uri = storage.join(out, PLAN_FILE)
    if not storage.exists(uri):
        storage.write_atomic(uri, plan.model_dump_json(indent=1).encode())
        return
    try:
        old = PredictPlan.model_validate_json(storage.read_bytes(uri)).model_dump()
    except ValueError as error:
        raise ConfigError(f"{uri}: not the plan of a prediction ({error}); choose another --out") from None
    changed = [name for name, value in plan.model_dump().items() if old[name] != value]
    if changed:
        raise ConfigError(
            f"{out} contains another prediction: {', '.join(changed)} changed. Choose another --out, or delete that folder"
        )


# Detection


def _run_parts(
    loaded: LoadedDetector, inputs: Inputs, plan: PredictPlan, todo: Sequence[int], out: str, workers: int | None
) -> Iterator[PartCounts]:
    """Process parts in this process or on Ray, and yield their counts as they finish."""
    if not todo:
        return
    if workers == IN_PROCESS:
        threads = torch.get_num_threads()
        yield from (write_part(loaded, inputs, plan, part, out, threads) for part in todo)
        return
    shared = ray.put((loaded, inputs, plan, out))
    for start in range(0, len(todo), PARTS_PER_EXECUTION):
        yield from _run_on_ray(shared, todo[start : start + PARTS_PER_EXECUTION], workers)


def _run_on_ray(shared: "ray.ObjectRef[Any]", todo: Sequence[int], workers: int | None) -> Iterator[PartCounts]:
    # Share the CPUs and GPUs of the cluster among the workers.
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    workers = min(workers or gpus or 1, len(todo))
    cpus = cpus_per_worker([int(node.get("CPU", 0)) for node in nodes], workers)

    # One block per part, so that a failure repeats one part only.
    parts = ray.data.from_arrow([pa.table({"part": [part]}) for part in todo])
    parts.context.enable_progress_bars = False
    parts.context.print_on_execution_start = False
    results = parts.map_batches(
        PartWriter,
        batch_size=1,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=min(1.0, gpus / workers),
        fn_constructor_args=([shared], cpus),  # in a list, so that Ray Data passes the reference itself
    )
    for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
        for row in zip(*(batch[name].tolist() for name in COUNTS), strict=True):
            yield PartCounts(*row)


def cpus_per_worker(nodes: Sequence[int], workers: int) -> int:
    """Largest number of CPUs that every worker can have, given the CPUs of each node; a worker does not span nodes."""
    possible = (n for n in range(max(nodes), 0, -1) if sum(node // n for node in nodes) >= workers)
    return next(possible, 1)


class PartWriter:
    """Detector in a process of its own, on a GPU if Ray assigns one."""

    def __init__(self, shared: Sequence["ray.ObjectRef[Any]"], threads: int) -> None:
        torch.set_num_threads(threads)
        loaded, self.inputs, self.plan, self.out = ray.get(shared[0])
        self.loaded: LoadedDetector = loaded.to("cuda" if ray.get_gpu_ids() else "cpu")
        self.threads = threads

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the parts of a batch and return their counts."""
        parts = batch["part"].tolist()
        counts = [write_part(self.loaded, self.inputs, self.plan, part, self.out, self.threads) for part in parts]
        return {name: np.array([getattr(each, name) for each in counts]) for name in COUNTS}


# Results


def _collect(out: str, plan: PredictPlan, categories: Sequence[Category]) -> PredictResult:
    """Merge the results of all parts, with one part in memory at a time."""
    images: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with storage.open_atomic(storage.join(out, DETECTIONS_FILE)) as file:
        separator = b"["
        for part in range(plan.num_parts):
            table = read_part(out, part)
            for row in to_coco_json(detection_table(table), categories):
                file.write(separator + json.dumps(row).encode())
                separator = b",\n"
            labels = np.asarray(table.column("labels").combine_chunks().flatten(), np.int64)
            counts.update({categories[label].name: int(n) for label, n in enumerate(np.bincount(labels)) if n})
            for row in table.select(IMAGE_COLUMNS).to_pylist():
                if row["rejected"] is None:
                    fields = {name: value for name, value in row.items() if value is not None}
                    images.append({"id": fields.pop("image_id"), **fields})
                else:
                    rejected.append(row)
        file.write(b"]" if separator == b",\n" else b"[]")
    content = {
        "images": images,
        "annotations": [],
        "categories": [{"id": category.original_id, "name": category.name} for category in categories],
    }
    storage.write_atomic(storage.join(out, IMAGES_FILE), json.dumps(content).encode())
    columns = [("image_id", pa.int64()), ("file_name", pa.string()), ("frame", pa.int64()), ("rejected", pa.string())]
    with storage.open_atomic(storage.join(out, REJECTED_FILE)) as file:
        pq.write_table(pa.Table.from_pylist(rejected, pa.schema(columns)), file)
    reasons = tuple((row["file_name"], row["rejected"]) for row in rejected)
    return PredictResult(out, plan.num_images, counts, reasons)


def detection_table(table: pa.Table) -> DetectionTable:
    """Collect the detections of all rows of a part."""

    def flat(name: str) -> Any:
        return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)

    counts = table.column("labels").combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    return DetectionTable(
        image_id=np.repeat(table.column("image_id").to_numpy(), counts),
        label=flat("labels"),
        score=flat("scores"),
        box=flat("boxes").reshape(-1, 4),
    )
