"""Detect in any number of images, split into parts; an interrupted prediction resumes.

plan.json            settings of the prediction and the classes; another prediction is refused in this folder
parts/*.parquet      one row per image: its detections, or the reason for its rejection
rejected.parquet     images that could not be read
drift.json           with a calibration: whether the images are like those of the calibration; see `drift`
detections.json      COCO results, with images.json: if they are few, or asked for; see `coco_json`
drawings/*.jpg       images with boxes; contact_sheet.jpg shows all of them; explained/*.png: refinement of one box
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dfine_core.inference import LoadedDetector
from dfine_core.precision import AUTO
from dfine_core.precision_choice import choose_precision
from dfine_core.runtimes.loaded_program import LoadedProgram
from dfine_core.thresholds import Threshold
from dfine_core.tiles import Tiling
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.shards.classes import with_classes_of
from pipeline.data.shards.manifest import Category, ManifestError
from pipeline.predict.coco_json import DETECTIONS_FILE, DETECTIONS_FOLDER, DETECTIONS_PER_FILE, SMALL_RESULT, write_json
from pipeline.predict.drawings import DRAWINGS_FOLDER, EXPLAINED_FOLDER, write_drawings
from pipeline.predict.drift import write_drift
from pipeline.predict.inputs import Inputs
from pipeline.predict.partition import PartCounts, write_part
from pipeline.predict.plan import (
    PARTS_FOLDER,
    SCHEMA,
    PredictPlan,
    claim_folder,
    holds_prediction,
    missing_parts,
    read_plan,
)
from pipeline.predict.predicted_images import record_batches
from pipeline.progress import Progress
from pipeline.ray_job import cluster_to_join
from pipeline.thresholds import refuse_unmeasured, refuse_without_intervals

log = logging.getLogger(__name__)
REJECTED_FILE = "rejected.parquet"
REJECTED_COLUMNS = ["image_id", "file_name", "frame", "rejected"]
REJECTED_SHOWN = 5  # in the summary
IN_PROCESS = 0  # number of workers that means: in this process, without Ray
FEW_IMAGES = 256  # one part of the default size, which Ray could not divide: starting it would only cost time


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of a prediction."""

    threshold: Threshold | None = None  # minimum score; None: the detector's own, see `LoadedDetector.least_scores`
    part_size: int = 256  # images per part, the most that an interruption repeats
    batch_size: int = 8  # images per forward pass
    num_images: int = 12  # images to draw
    num_explanations: int = 0  # images whose best box is explained; above 0 the deviations of edges are measured, too
    workers: int | None = None  # IN_PROCESS, or detectors on Ray; None: see `in_this_process`, and one per GPU on Ray
    precision: str = AUTO  # a name of PRECISIONS; auto: that of the parts which exist, else measured
    coverage: float | None = None  # wanted share of true edges inside intervals; None: no intervals
    tiling: Tiling | None = None  # tiles that larger images are cut into; None: images are taken whole
    joint: bool = False  # the coverage is that of boxes with all four edges inside
    json: bool = False  # write COCO results as JSON even if there are more than SMALL_RESULT detections


@dataclass(frozen=True)
class PredictResult:
    """Summary of a prediction."""

    out: str
    num_images: int
    detections: Counter[str]  # by class
    num_rejected: int
    rejected: tuple[tuple[str, str], ...]  # file and reason of the first few
    json_files: int  # files with COCO results; 0 if they were left out
    threshold_text: str
    interval_text: str | None
    calibration_text: str | None
    drift_lines: tuple[str, ...]

    def summary(self) -> str:
        """Lines for the console."""
        by_class = ", ".join(f"{count} {name}" for name, count in self.detections.most_common(12))
        lines = [
            f"{self.out}: {self.detections.total()} detections in {self.num_images} images",
            *([f"  {by_class}"] if by_class else []),
            f"  threshold: {self.threshold_text}",
            *([f"  scores: calibrated {self.calibration_text}"] if self.calibration_text else []),
            *([f"  intervals: {self.interval_text}"] if self.interval_text else []),
            *(f"  {line}" for line in self.drift_lines),
        ]
        if not self.json_files:
            lines.append(
                f"{DETECTIONS_FILE} is left out above {SMALL_RESULT:,} detections; the same command with --json"
                f" writes them in files of at most {DETECTIONS_PER_FILE:,}"
            )
        if self.num_rejected:
            lines.append(f"{self.num_rejected} could not be read, see {REJECTED_FILE}:")
            lines += [f"  {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


def predict(
    loaded: LoadedDetector,
    inputs: Inputs,
    out: str,
    options: PredictOptions,
    announce: Callable[[str], None] = log.info,
) -> PredictResult:
    """Detect in all inputs and write the results to `out`, or resume the prediction there.

    Args:
        out: path or URI, shared by all nodes.
        announce: receives the line about a precision that was measured.

    Raises:
        ConfigError: the folder contains other files or another prediction, or the detector has no distributions or no
            thresholds of the kind that the options ask for.
    """
    if options.num_explanations and isinstance(loaded, LoadedProgram):
        raise ConfigError(f"{loaded.origin}: an exported file returns no distributions to explain; give its detector")
    if options.num_explanations and options.tiling:
        raise ConfigError("--num-explanations explains whole images, and --tile cuts them: give one of the two")
    if options.num_explanations and loaded.config.regression != "fdr":
        raise ConfigError("this detector regresses boxes directly: its edges have no distributions to explain")
    refuse_unmeasured(loaded, options.threshold)
    refuse_without_intervals(loaded, options.coverage, options.joint)
    measured = options.coverage is not None or loaded.calibration is not None
    edges = loaded.edges() if measured else None

    # 1. The plan: everything that the parts depend on. A folder with another one is refused.
    # Explanations need every decoder layer, which a deployed detector lacks.
    out = storage.absolute(out)
    digest = detector_digest(loaded)
    if not options.num_explanations:
        loaded = loaded.deploy()
    loaded = loaded.with_precision(precision_of(loaded, out, options.precision, announce))
    calibration = loaded.calibration
    reference = None if calibration is None else calibration.reference
    plan = PredictPlan(
        inputs=inputs.digest,
        detector=digest,
        precision=loaded.precision,
        num_images=inputs.num_images,
        part_size=options.part_size,
        batch_size=options.batch_size,
        thresholds=loaded.least_scores(options.threshold),
        threshold_text=loaded.threshold_text(options.threshold),
        edge_std=edges is not None or options.num_explanations > 0,
        coverage=options.coverage,
        joint=options.joint,
        intervals=None if edges is None or options.coverage is None else edges.kind(options.coverage, options.joint),
        interval_text=None
        if edges is None or options.coverage is None
        else edges.text(options.coverage, options.joint),
        calibration=None if calibration is None else calibration.digest,
        drift_score=None if reference is None else reference.least_score,
        categories=output_categories(loaded, inputs),
        tile=options.tiling.side if options.tiling else None,
        overlap=options.tiling.overlap if options.tiling else None,
    )
    claim_folder(out, plan)

    # 2. The parts that are missing.
    workers = IN_PROCESS if in_this_process(inputs, options.workers) else options.workers
    if workers != IN_PROCESS:
        loaded = loaded.to("cpu")
    todo = missing_parts(out, plan)
    done = plan.num_images - sum(stop - first for first, stop in map(plan.image_range, todo))
    rejected = 0
    with Progress("predict", total=plan.num_images, initial=done, unit=" images") as progress:
        for counts in _run_parts(loaded, inputs, plan, todo, out, workers) if todo else ():
            rejected += counts.rejected
            progress.advance(counts.images, f"{rejected} rejected" if rejected else "")

    # 3. Results over all parts, and drawings of some images.
    totals = _summarise(out, plan)
    found = totals.detections.total()
    json_files = write_json(out, plan, found) if options.json or found <= SMALL_RESULT else 0
    write_drawings(out, inputs, plan, loaded, num_images=options.num_images, num_explanations=options.num_explanations)
    drift_lines = () if reference is None else write_drift(out, plan, reference)
    for folder in ("", PARTS_FOLDER, DETECTIONS_FOLDER, DRAWINGS_FOLDER, EXPLAINED_FOLDER):
        storage.remove_temporaries(storage.join(out, folder))
    return PredictResult(
        out,
        plan.num_images,
        totals.detections,
        totals.num_rejected,
        totals.rejected,
        json_files,
        plan.threshold_text,
        plan.interval_text,
        None if calibration is None else loaded.calibration_text(),
        drift_lines,
    )


def precision_of(loaded: LoadedDetector, out: str, wanted: str, announce: Callable[[str], None] = log.info) -> str:
    """Precision of the whole prediction: as wanted; for `auto` that of an earlier start, else the fastest one on this CPU."""
    if wanted not in (AUTO, *loaded.precisions):
        raise ConfigError(
            f"{loaded.origin}: the precision of an exported file is fixed; leave out --precision {wanted}"
        )
    if wanted != AUTO or len(loaded.precisions) == 1:
        return loaded.precisions[0] if wanted == AUTO else wanted
    if holds_prediction(out):
        return read_plan(out).precision
    if torch.cuda.is_available():  # the workers' device, even if the detector is still on the CPU
        return "fp32"
    choice = choose_precision(loaded)
    announce(choice.line())
    return choice.name


def detector_digest(loaded: LoadedDetector) -> str:
    """SHA-256 over the weights, the configuration and the class names."""
    hashed = hashlib.sha256(json.dumps([asdict(loaded.config), loaded.names], default=list).encode())
    if isinstance(loaded, LoadedProgram):
        hashed.update(loaded.digest().encode())
    for key, tensor in sorted(loaded.detector.state_dict().items()):
        hashed.update(key.encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def output_categories(loaded: LoadedDetector, inputs: Inputs) -> tuple[Category, ...]:
    """Categories of the shard set if it is the only input and its classes are the detector's, else those of the detector."""
    if (shards := inputs.shard_set) is not None:
        with suppress(ManifestError):  # other classes
            return with_classes_of(shards, loaded.names, "the detector").categories
    pairs = zip(loaded.category_ids, loaded.names, strict=True)
    return tuple(Category(label=label, original_id=original, name=name) for label, (original, name) in enumerate(pairs))


# Detection


def in_this_process(inputs: Inputs, workers: int | None) -> bool:
    """Whether to predict here: if asked to, or by default a few images where no cluster is named."""
    if workers is not None:
        return workers == IN_PROCESS
    return inputs.num_images <= FEW_IMAGES and not cluster_to_join()


def _run_parts(
    loaded: LoadedDetector, inputs: Inputs, plan: PredictPlan, todo: Sequence[int], out: str, workers: int | None
) -> Iterator[PartCounts]:
    """Process parts in this process or on Ray, and yield their counts as they finish."""
    if workers == IN_PROCESS:
        threads = torch.get_num_threads()
        yield from (write_part(loaded, inputs, plan, part, out, threads) for part in todo)
        return
    from pipeline.predict.on_ray import write_parts_on_ray  # imports Ray, which takes seconds

    yield from write_parts_on_ray(loaded, inputs, plan, todo, out, workers)


# Results


@dataclass(frozen=True)
class _Totals:
    detections: Counter[str]  # by class
    num_rejected: int
    rejected: tuple[tuple[str, str], ...]  # the first few


def _summarise(out: str, plan: PredictPlan) -> _Totals:
    """Count the detections of all parts by class, and write the list of rejected images."""
    counts = np.zeros(len(plan.categories), np.int64)
    num_rejected = 0
    first: list[tuple[str, str]] = []
    with (
        storage.open_atomic(storage.join(out, REJECTED_FILE)) as file,
        pq.ParquetWriter(file, pa.schema([SCHEMA.field(name) for name in REJECTED_COLUMNS])) as writer,
    ):
        for batch in record_batches(out, plan, (*REJECTED_COLUMNS, "labels")):
            counts += np.bincount(batch.column("labels").flatten().to_numpy(), minlength=len(counts))
            rejected = batch.filter(batch.column("rejected").is_valid()).select(REJECTED_COLUMNS)
            if rejected.num_rows:
                writer.write_batch(rejected)
                num_rejected += rejected.num_rows
                shown = rejected.slice(0, REJECTED_SHOWN - len(first)).to_pylist()
                first += [(row["file_name"], row["rejected"]) for row in shown]
    by_class = zip(plan.categories, counts.tolist(), strict=True)
    found = Counter({category.name: count for category, count in by_class if count})
    return _Totals(found, num_rejected, tuple(first))
