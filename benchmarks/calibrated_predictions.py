"""Calibrated predictions of a trained detector on images that it was not trained on.

    python -m benchmarks.calibrated_predictions coverage runs/bccd shards/bccd/test     of `dfine predict --coverage`
    python -m benchmarks.calibrated_predictions recorded fdr_real.npz       the same on recorded outputs, see edge_uncertainty
    python -m benchmarks.calibrated_predictions drift runs/bccd shards/bccd/test        false alarms and power
    python -m benchmarks.calibrated_predictions latency runs/bccd                       with and without intervals
    python -m benchmarks.calibrated_predictions evaluation                              the edges' numbers of 5,000 images

The images are cut into two random halves: one to calibrate on, by `dfine calibrate`, the other to predict.
"""

import argparse
import contextlib
import hashlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from scipy.stats import betabinom

from dfine_core import Detector, LoadedDetector, ModelConfig
from dfine_core.image_detections import RawDetections
from dfine_core.images import open_image
from dfine_core.inference import build, prepare
from dfine_core.uncertainty import (
    DetectedBoxes,
    ScoreCalibration,
    TrueBoxes,
    edge_errors,
    fit_edge_calibration,
    match_for_calibration,
)
from dfine_core.uncertainty.detector_calibration import LEVELS, DetectorCalibration
from dfine_core.uncertainty.drift import LEVEL, NAMES, ImageValues, drift_tests
from jobs import calibrate as calibrate_job
from jobs import predict as predict_job
from pipeline.data.shards.manifest import MANIFEST_NAME, Shard, ShardSet, load_shards
from pipeline.data.shards.set_statistics import count_rows
from pipeline.evaluation.decoder_layers import LayerDiagnostics
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.open_detector import open_detector
from pipeline.predict.predicted_images import predicted_images

LEAST_SCORE = 0.3  # raw; `dfine calibrate` fits edges of such detections
REPEATS = 200


def main() -> None:
    """Run one of the measurements."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=("coverage", "recorded", "drift", "latency", "evaluation"))
    arguments.add_argument("detector", nargs="?")
    arguments.add_argument("shards", nargs="?")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    if args.what == "evaluation":
        evaluation_cost()
    elif args.what == "recorded":
        recorded(Path(args.detector), args.seed)
    elif args.what == "latency":
        latency(open_detector(args.detector, "cpu"))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            detector, other = calibrated_half(args.detector, args.shards, Path(temporary), args.seed)
            if args.what == "coverage":
                coverage(detector, other, Path(temporary))
            else:
                drift(detector, load_shards(args.shards), Path(temporary))


def calibrated_half(source: str, shards: str, folder: Path, seed: int) -> tuple[Path, ShardSet]:
    """Copy of a detector that is calibrated on a half of the images, and the other half."""
    whole = load_shards(shards)
    order = np.random.default_rng(seed).permutation(whole.manifest.images)
    first, second = (np.sort(half) for half in np.array_split(order, 2))
    loaded = open_detector(source, "cpu")
    detector = Path(loaded.save(folder / "detector"))
    subset(whole, first, folder / "first")
    calibrate_job.main([str(detector), str(folder / "first"), "--score", f"{LEAST_SCORE}"])
    return detector, subset(whole, second, folder / "second")


def subset(
    shards: ShardSet, rows: NDArray[np.integer[Any]], folder: Path, change: Callable[[bytes], bytes] | None = None
) -> ShardSet:
    """Write some images as a shard set of their own; `change` works on the encoded image."""
    folder.mkdir()
    table = pa.concat_tables([pq.read_table(shards.shard_uri(n)) for n in range(len(shards.manifest.shards))]).take(
        rows
    )
    if change is not None:
        images = pa.array([change(each.as_py()) for each in table["image"]], table.schema.field("image").type)
        table = table.set_column(table.schema.get_field_index("image"), "image", images)
    path = folder / "part.parquet"
    pq.write_table(table, path)
    shard = Shard(
        file=path.name,
        rows=len(table),
        bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        row_groups=(len(table),),
    )
    statistics = count_rows(table, len(shards.manifest.categories))
    boxes = int(pc.sum(pc.list_value_length(table["labels"])).as_py())
    changed = {"shards": (shard,), "images": len(table), "boxes": boxes, "statistics": statistics}
    (folder / MANIFEST_NAME).write_text(shards.manifest.model_copy(update=changed).model_dump_json())
    return load_shards(str(folder))


# Coverage through the command


def coverage(detector: Path, shards: ShardSet, folder: Path) -> None:
    """Share of true edges inside the intervals of `dfine predict`, and of boxes with all four, at every level."""
    loaded = open_detector(str(detector), "cpu")
    assert loaded.calibration is not None
    least = float(loaded.calibrated(torch.tensor(LEAST_SCORE)))
    fitted = loaded.calibration.edges[0].objects
    for source in ("conformal", "joint", "own"):
        if source == "own":
            (detector / "calibration.json").rename(detector / "unused.json")
            least = LEAST_SCORE
        for level in LEVELS:
            out = str(folder / f"{source}-{level}")
            options = ["--coverage", f"{level}", "--threshold", f"{least}", "--out", out, "--num-images", "0"]
            options += ["--joint"] if source == "joint" else []
            with contextlib.redirect_stdout(io.StringIO()):
                predict_job.main([str(detector), shards.uri, *options, "--precision", "fp32", "--workers", "0"])
            report(source, level, edges_inside(out, shards), fitted)


def recorded(file: Path, seed: int) -> None:
    """Coverage of `LoadedDetector.keep` on recorded detections: fitted on half of the images, measured on the other."""
    with np.load(file) as arrays:
        content = {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind in "fiub"}
    rows = ((content["det_gt"] >= 0) & (content["det_score"] >= LEAST_SCORE)).nonzero().squeeze(1)
    image, boxes = content["det_image"][rows].long(), content["det_box"][rows]
    true = content["gt_box"][content["det_gt"][rows].long()]
    raw = RawDetections(
        boxes=boxes,
        scores=content["det_score"][rows],
        labels=content["det_label"][rows].long(),
        size=torch.ones(2),
        queries=torch.arange(len(rows)),
        edge_logits=content["det_edge_probability"][rows].float().clamp(min=1e-12).log(),
        initial_boxes=content["det_reference_box"][rows],
    )
    config = ModelConfig.variant("n", num_classes=80)
    names = [(number, f"{number}") for number in range(80)]
    loaded = build(config, Detector(config).state_dict(), names, f"{file}", "cpu")
    images = len(content["image_id"])
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    half = torch.isin(image, order[: images // 2])

    std = loaded.keep(raw, torch.zeros(80), measured=True).edge_std_px
    assert std is not None
    edges, whole = (
        tuple(fit_edge_calibration(std[half], edge_errors(boxes, true)[half], level, joint) for level in LEVELS)
        for joint in (False, True)
    )
    calibrated = DetectorCalibration(edges, whole, ScoreCalibration("temperature"), images // 2, None)
    for source, calibration in (("conformal", calibrated), ("joint", calibrated), ("own", None)):
        for level in LEVELS:
            used = replace(loaded, calibration=calibration)
            found = used.keep(raw, torch.zeros(80), coverage=level, joint=source == "joint")
            assert found.edge_intervals is not None
            low, high = found.edge_intervals.unbind(-1)
            inside = ((low <= true) & (true <= high))[~half].numpy()
            report(source, level, inside, int(half.sum()))


def report(source: str, level: float, inside: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]", fitted: int) -> None:
    """Print the share inside, with the bounds of 99 % that the numbers of objects leave; jointly, a box counts with all edges."""
    counted = "the edges of"
    if source == "joint":
        inside, counted = np.asarray(inside.all(1)), "the boxes of"
    low, high = (count / len(inside) for count in betabinom.interval(0.99, len(inside), *beta(fitted, level)))
    print(
        f"{source}, {100 * level:g} %: {100 * inside.mean():.1f} % of {counted} {len(inside)} objects"
        f" (99 % bounds {100 * low:.1f} to {100 * high:.1f}; fitted on {fitted})",
        flush=True,
    )


def beta(fitted: int, level: float) -> tuple[float, float]:
    """Coverage of split conformal intervals, over fits: a beta distribution; objects count, not their four edges."""
    rank = np.ceil((fitted + 1) * level)
    return float(rank), float(fitted + 1 - rank)


def edges_inside(out: str, shards: ShardSet) -> "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]":
    """Edges that lie inside their intervals, for every detection that found an object: [M, 4] bool."""
    truth = read_ground_truth(shards)
    number_of = {int(image_id): number for number, image_id in enumerate(truth.image_id)}
    images = [image for image in predicted_images(out) if image.edge_intervals is not None]
    found = DetectedBoxes(
        image=torch.tensor([number_of[image.image_id] for image in images for _ in image.names]),
        boxes=torch.tensor(np.concatenate([image.boxes for image in images])),
        labels=torch.tensor(np.concatenate([image.labels for image in images])).long(),
        scores=torch.tensor(np.concatenate([image.scores for image in images])),
    )
    true = TrueBoxes(
        torch.tensor(truth.image),
        torch.tensor(truth.box),
        torch.tensor(truth.label).long(),
        torch.tensor(truth.ignored),
    )
    match = match_for_calibration(found, true)
    rows = (match >= 0).numpy()
    edges = true.boxes[match[match >= 0]].numpy()
    intervals = np.concatenate([image.edge_intervals for image in images if image.edge_intervals is not None])[rows]
    inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (intervals[..., 0] <= edges) & (
        edges <= intervals[..., 1]
    )
    return inside


# Drift


def drift(detector: Path, shards: ShardSet, folder: Path) -> None:
    """False alarms between random halves of the images, and the share of halves that are found when one of them is changed."""
    rows = np.arange(shards.manifest.images)
    values = {}
    for name, change in CHANGES.items():
        changed = subset(shards, rows, folder / f"images-{name}", change)
        out = str(folder / f"found-{name}")
        with contextlib.redirect_stdout(io.StringIO()):
            predict_job.main(
                [str(detector), changed.uri, "--out", out, "--num-images", "0", "--precision", "fp32", "--workers", "0"]
            )
        values[name] = values_of(out)
    print(f"halves of {len(rows)} images, drawn {REPEATS} times; level {LEVEL:g}")
    for name, changed_values in values.items():
        random = np.random.default_rng(0)
        found = np.zeros(len(NAMES) + 1, int)
        for _ in range(REPEATS):
            first, second = np.array_split(random.permutation(len(rows)), 2)
            tests = drift_tests([values["unchanged"][n] for n in first], [changed_values[n] for n in second])
            found += [any(test.moved for test in tests), *(test.moved for test in tests)]
        by_value = ", ".join(f"{value} {100 * n / REPEATS:.1f} %" for value, n in zip(NAMES, found[1:], strict=True))
        print(f"{name}: reported {100 * found[0] / REPEATS:.1f} % ({by_value})")


def values_of(out: str) -> list[ImageValues]:
    """Values of the images of a prediction."""
    rows = pq.ParquetDataset(f"{out}/parts").read(columns=["drift"])["drift"].to_pylist()
    return [ImageValues(*row) for row in rows if row is not None]


def edited(work: Callable[[Image.Image], Image.Image]) -> Callable[[bytes], bytes]:
    """Change of an encoded image, at the same size."""

    def change(content: bytes) -> bytes:
        stream = io.BytesIO()
        with open_image(content) as image:
            work(image.convert("RGB")).save(stream, "PNG")
        return stream.getvalue()

    return change


CHANGES: dict[str, Callable[[bytes], bytes] | None] = {
    "unchanged": None,
    "darkened to 0.8": edited(lambda image: ImageEnhance.Brightness(image).enhance(0.8)),
    "darkened to 0.5": edited(lambda image: ImageEnhance.Brightness(image).enhance(0.5)),
    "blurred by 1 px": edited(lambda image: image.filter(ImageFilter.GaussianBlur(1))),
    "blurred by 3 px": edited(lambda image: image.filter(ImageFilter.GaussianBlur(3))),
}


# Cost


def latency(loaded: LoadedDetector, rounds: int = 100) -> None:
    """CPU seconds of one image with intervals over those without, in alternation."""
    torch.set_num_threads(1)
    loaded = loaded.deploy()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8))
    pixels, sizes = prepare([image], loaded.config.input_size), torch.tensor([[640, 480]])
    least = torch.tensor(loaded.least_scores(0.0))
    for kept in (20, 300):
        took: dict[float | None, list[float]] = {None: [], 0.9: []}
        for _ in range(rounds):
            for wanted, times in took.items():
                started = time.thread_time()
                (raw,) = loaded.find(pixels, sizes)
                replace(loaded, calibration=loaded.calibration if wanted else None).keep(
                    raw, least, coverage=wanted, limit=kept
                )
                times.append(time.thread_time() - started)
        plain, measured = (float(np.median(times)) for times in took.values())
        print(
            f"{kept} detections kept: {1000 * plain:.2f} ms, with intervals {1000 * measured:.2f} ms"
            f" ({100 * (measured / plain - 1):+.2f} %)",
            flush=True,
        )


def evaluation_cost(images: int = 5000, boxes: int = 7, batch: int = 16) -> None:
    """CPU seconds of the edges' numbers in an evaluation, for 36,781 boxes as COCO's val2017 has."""
    torch.set_num_threads(1)
    config = ModelConfig.variant("n", num_classes=80)
    diagnostics = LayerDiagnostics(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    pairs = batch * boxes
    edge_logits = torch.randn(config.num_layers, pairs, 4, config.num_bins, generator=generator)
    low = torch.rand(pairs, 2, generator=generator) * 0.5
    true = torch.cat([low, low + 0.2], -1)
    cxcywh = torch.cat([low + 0.1, torch.full((pairs, 2), 0.2)], -1).expand(config.num_layers + 1, -1, -1)
    started = time.thread_time()
    for _ in range(images // batch):
        diagnostics._add_edges(edge_logits, cxcywh, true)
    print(f"{images:,} images, {images * boxes:,} boxes: {time.thread_time() - started:.2f} CPU seconds")


if __name__ == "__main__":
    main()
