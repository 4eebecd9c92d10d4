"""Detections of any number of pictures, in parts that a Ray Data job works through; a killed job goes on where it was.

plan.json            what was asked for: another question is refused in this folder
parts/*.parquet      a row per picture: what was found in it, or why it could not be read
detections.json      COCO result list; images.json has the images and categories in COCO's form
rejected.parquet     pictures that could not be read
pictures/*.jpg       drawn, on one page in contact_sheet.jpg; explained/*.png: how the decoder refined a box
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
from pipeline.predict.partition import PARTS, Counts, Plan, part_name, read_part, write_part
from pipeline.progress import Progress
from pipeline.ray_cluster import start_ray

PLAN = "plan.json"
DETECTIONS, IMAGES, REJECTED = "detections.json", "images.json", "rejected.parquet"
DESCRIBED = ["image_id", "file_name", "frame", "seconds", "width", "height", "rejected"]
SEGMENT = 2000  # parts of one Ray Data execution, whose book-keeping grows with its blocks
COUNTED = ("pictures", "detections", "rejected")
HERE = 0  # workers: in this process and without Ray


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    threshold: float = DEFAULT_THRESHOLD  # least score
    part: int = 256  # pictures that a kill may cost
    batch: int = 8  # pictures that a detector sees at once
    pictures: int = 12  # to draw
    explain: int = 0  # pictures whose surest box is explained; more than 0 also measures the edges of all boxes
    workers: int | None = None  # HERE, or so many detectors on Ray; None: one for each GPU, or one


@dataclass(frozen=True)
class Outcome:
    out: str
    pictures: int
    detections: Counter[str]  # by class
    rejected: tuple[tuple[str, str], ...]  # file and reason

    def summary(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in self.detections.most_common(12))
        lines = [f"{self.out}: {self.detections.total()} detections in {self.pictures} pictures", f"  {found}"]
        if self.rejected:
            lines.append(f"{len(self.rejected)} could not be read, see {REJECTED}:")
            lines += [f"  {name}: {reason}" for name, reason in self.rejected[:5]]
        return "\n".join(lines)


def predict(loaded: LoadedDetector, inputs: Inputs, out: str, options: PredictOptions) -> Outcome:
    """Detect in all inputs and write the results to `out`, or go on with it.

    Args:
        out: path or URI, shared by all nodes.

    Raises:
        ConfigError: the folder holds another prediction, or the detector has no distributions to measure.
    """
    if options.explain and loaded.config.regression != "fdr":
        raise ConfigError("this detector regresses boxes directly: its edges have no distributions to explain")
    out = storage.absolute(out)
    plan = Plan(
        inputs=inputs.digest,
        detector=digest(loaded),
        pictures=inputs.pictures,
        part=options.part,
        batch=options.batch,
        threshold=options.threshold,
        deviations=options.explain > 0,
    )
    _begin(out, plan)
    if not options.explain:
        loaded = loaded.deploy()
    if options.workers != HERE:
        loaded = loaded.to("cpu")
    there = storage.sizes(storage.join(out, PARTS))
    todo = [number for number in range(plan.parts) if part_name(number) not in there]
    done = plan.pictures - sum(stop - first for first, stop in map(plan.pictures_of, todo))
    rejected = 0
    if todo and options.workers != HERE:
        start_ray()
    with Progress("predict", total=plan.pictures, initial=done, unit=" images") as progress:
        for counts in _work(loaded, inputs, plan, todo, out, options.workers):
            rejected += counts.rejected
            progress.advance(counts.pictures, f"{rejected} rejected" if rejected else "")
    storage.remove_temporaries(storage.join(out, PARTS))
    categories = categories_of(loaded, inputs)
    outcome = _collect(out, plan, categories)
    write_drawings(out, inputs, plan, categories, loaded, pictures=options.pictures, explain=options.explain)
    return outcome


def digest(loaded: LoadedDetector) -> str:
    """SHA-256 of the weights, the configuration and the names."""
    hashed = hashlib.sha256(json.dumps([asdict(loaded.config), loaded.names], default=list).encode())
    for key, tensor in sorted(loaded.detector.state_dict().items()):
        hashed.update(key.encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def categories_of(loaded: LoadedDetector, inputs: Inputs) -> tuple[Category, ...]:
    """Those of the shard set if it is all there is and has the detector's classes, otherwise the detector's own."""
    shards = inputs.shard_set
    if shards is not None and tuple(category.name for category in shards.manifest.categories) == loaded.names:
        return shards.manifest.categories
    pairs = zip(loaded.category_ids, loaded.names, strict=True)
    return tuple(Category(label=label, original_id=number, name=name) for label, (number, name) in enumerate(pairs))


def _begin(out: str, plan: Plan) -> None:
    """Write the plan, or make sure that the one which is there is the same."""
    uri = storage.join(out, PLAN)
    if not storage.exists(uri):
        storage.write_atomic(uri, plan.model_dump_json(indent=1).encode())
        return
    try:
        old = Plan.model_validate_json(storage.read_bytes(uri)).model_dump()
    except ValueError as error:
        raise ConfigError(f"{uri}: not the plan of a prediction ({error}); choose another --out") from None
    changed = [name for name, value in plan.model_dump().items() if old[name] != value]
    if changed:
        raise ConfigError(
            f"{out} holds another prediction: {', '.join(changed)} changed. Choose another --out, or delete that folder"
        )


# The work


def _work(
    loaded: LoadedDetector, inputs: Inputs, plan: Plan, todo: Sequence[int], out: str, workers: int | None
) -> Iterator[Counts]:
    if not todo:
        return
    if workers == HERE:
        threads = torch.get_num_threads()
        yield from (write_part(loaded, inputs, plan, number, out, threads) for number in todo)
        return
    shared = ray.put((loaded, inputs, plan, out))
    for start in range(0, len(todo), SEGMENT):
        yield from _on_ray(shared, todo[start : start + SEGMENT], workers)


def _on_ray(shared: "ray.ObjectRef[Any]", todo: Sequence[int], workers: int | None) -> Iterator[Counts]:
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    workers = min(workers or gpus or 1, len(todo))
    cpus = cpus_of_each([int(node.get("CPU", 0)) for node in nodes], workers)
    parts = ray.data.from_arrow([pa.table({"part": [number]}) for number in todo])
    parts.context.enable_progress_bars = False
    parts.context.print_on_execution_start = False
    results = parts.map_batches(
        PartWriter,
        batch_size=1,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=min(1.0, gpus / workers),
        fn_constructor_args=([shared], cpus),  # in a list, so that Ray Data hands the reference on
    )
    for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
        for row in zip(*(batch[name].tolist() for name in COUNTED), strict=True):
            yield Counts(*row)


def cpus_of_each(nodes: Sequence[int], workers: int) -> int:
    """Most CPUs that each of the workers can have, given those of every node; a worker lies on one node."""
    fitting = (n for n in range(max(nodes), 0, -1) if sum(node // n for node in nodes) >= workers)
    return next(fitting, 1)


class PartWriter:
    """A detector in a process of its own, on a GPU if Ray gives it one."""

    def __init__(self, shared: Sequence["ray.ObjectRef[Any]"], threads: int) -> None:
        torch.set_num_threads(threads)
        loaded, self.inputs, self.plan, self.out = ray.get(shared[0])
        self.loaded: LoadedDetector = loaded.to("cuda" if ray.get_gpu_ids() else "cpu")
        self.threads = threads

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        numbers = batch["part"].tolist()
        done = [write_part(self.loaded, self.inputs, self.plan, part, self.out, self.threads) for part in numbers]
        return {name: np.array([getattr(counts, name) for counts in done]) for name in COUNTED}


# What it comes to


def _collect(out: str, plan: Plan, categories: Sequence[Category]) -> Outcome:
    """Write the results of all parts together, one part in memory at a time."""
    images: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with storage.open_atomic(storage.join(out, DETECTIONS)) as file:
        separator = b"["
        for number in range(plan.parts):
            table = read_part(out, number)
            for row in to_coco_json(detections_of(table), categories):
                file.write(separator + json.dumps(row).encode())
                separator = b",\n"
            labels = np.asarray(table.column("labels").combine_chunks().flatten(), np.int64)
            counts.update({categories[label].name: int(n) for label, n in enumerate(np.bincount(labels)) if n})
            for row in table.select(DESCRIBED).to_pylist():
                if row["rejected"] is None:
                    known = {name: value for name, value in row.items() if value is not None}
                    images.append({"id": known.pop("image_id"), **known})
                else:
                    rejected.append(row)
        file.write(b"]" if separator == b",\n" else b"[]")
    described = {
        "images": images,
        "annotations": [],
        "categories": [{"id": category.original_id, "name": category.name} for category in categories],
    }
    storage.write_atomic(storage.join(out, IMAGES), json.dumps(described).encode())
    fields = [("image_id", pa.int64()), ("file_name", pa.string()), ("frame", pa.int64()), ("rejected", pa.string())]
    with storage.open_atomic(storage.join(out, REJECTED)) as file:
        pq.write_table(pa.Table.from_pylist(rejected, pa.schema(fields)), file)
    reasons = tuple((row["file_name"], row["rejected"]) for row in rejected)
    return Outcome(out, plan.pictures, counts, reasons)


def detections_of(table: pa.Table) -> DetectionTable:
    """Those of all rows of a part."""

    def flat(name: str) -> Any:
        return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)

    counts = table.column("labels").combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    return DetectionTable(
        image_id=np.repeat(table.column("image_id").to_numpy(), counts),
        label=flat("labels"),
        score=flat("scores"),
        box=flat("boxes").reshape(-1, 4),
    )
