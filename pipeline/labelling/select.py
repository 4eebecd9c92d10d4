"""Choose the images to label next, and write them with pre-labels; an interrupted selection resumes.

select_plan.json     settings of the selection and the classes; another selection is refused in this folder
parts/*.parquet      one row per image: boxes, expected error, features
images/*             the chosen images, copied; annotations.json, data.yaml with labels/*, or tasks.json: their pre-labels
contact_sheet.jpg    the chosen images with their pre-labels
selected.txt         their names, the most valuable first
selected.json        the same with scores and reasons; written last, and nothing is written after it
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfine_core.images import SUFFIXES, open_image
from dfine_core.inference import LoadedDetector
from dfine_core.thresholds import Threshold
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.prepare.image_files import read_image_file
from pipeline.data.prepare.split_off import near_groups
from pipeline.labelling.choose import FAR, Choice, ChosenImage, choose
from pipeline.labelling.measured_images import write_part
from pipeline.labelling.plan import (
    RESULT_FILE,
    Format,
    SelectPlan,
    claim_folder,
    finished_result,
    read_part,
)
from pipeline.labelling.prelabels import IMAGES_FOLDER, LABELS_FOLDER, PreLabelled, clipped, prelabel_files
from pipeline.predict.drawings import contact_sheet, draw_detections, drawing_name
from pipeline.predict.inputs import InputImage, Inputs, decode_input, read_images
from pipeline.predict.plan import PARTS_FOLDER, missing_parts
from pipeline.predict.predict import IN_PROCESS, detector_digest, in_this_process, output_categories
from pipeline.progress import Progress
from pipeline.thresholds import refuse_unmeasured
from pipeline.wording import plural

LIST_FILE, CONTACT_SHEET = "selected.txt", "contact_sheet.jpg"
SHEET_IMAGES = 60  # the most valuable ones
FRAME_QUALITY = 95  # JPEG, for frames of videos
REJECTED_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Options of a selection."""

    count: int = 200
    format: Format = "coco"
    threshold: Threshold | None = None  # least score of a pre-label; None: the detector's own
    part_size: int = 256  # images per part, the most that an interruption repeats
    batch_size: int = 8  # images per forward pass
    workers: int | None = None  # IN_PROCESS, or detectors on Ray; None as in a prediction


@dataclass(frozen=True)
class SelectResult:
    """Summary of a selection."""

    out: str
    content: dict[str, Any]  # of selected.json

    def summary(self) -> str:
        """Lines for the console."""
        content = self.content
        chosen = content["chosen"]
        lines = [f"{self.out}: {plural(len(chosen), 'image')} to label, of {content['candidates']:,}"]
        if len(chosen) < content["wanted"]:
            lines.append(
                f"  {content['wanted']} were asked for: the others repeat these or labelled ones, or cannot be read"
            )
        lines += [f"  {image['file']}: {image['reason']}" for image in chosen[:3]]
        if content["already_labelled"]:
            lines.append(f"  left out as near-duplicates of labelled images: {content['already_labelled']}")
        if content["rejected"]:
            lines.append(f"  {len(content['rejected'])} could not be read:")
            lines += [f"    {each['source']}: {each['reason']}" for each in content["rejected"][:REJECTED_SHOWN]]
        return "\n".join([*lines, f"  {content['next']}"])


def select(loaded: LoadedDetector, inputs: Inputs, num_labelled: int, out: str, options: SelectOptions) -> SelectResult:
    """Choose images and write them to `out`, resume the selection there, or report a finished one.

    Args:
        inputs: unlabelled images, and after them the labelled ones.
        num_labelled: images at the end of `inputs` that are labelled already.
        out: path or URI, shared by all nodes.

    Raises:
        ConfigError: the folder contains other files or another selection, or there is no unlabelled image that can be read.
    """
    if num_labelled >= inputs.num_images:
        raise ConfigError("every unlabelled image is also one of --labelled: name images that have no labels yet")
    refuse_unmeasured(loaded, options.threshold)

    # 1. The plan: everything that the result depends on. A folder with another one is refused.
    out = storage.absolute(out)
    plan = SelectPlan(
        inputs=inputs.digest,
        detector=detector_digest(loaded),
        scores=None if loaded.calibration is None else loaded.calibration.scores.to_plain(),
        num_images=inputs.num_images,
        num_labelled=num_labelled,
        part_size=options.part_size,
        batch_size=options.batch_size,
        count=options.count,
        format=options.format,
        thresholds=loaded.least_scores(options.threshold),
        categories=output_categories(loaded, inputs),
    )
    claim_folder(out, plan)
    if (finished := finished_result(out)) is not None:
        return SelectResult(out, finished)  # labels may have been corrected there since

    # 2. The parts that are missing.
    _measure(loaded, inputs, plan, out, options.workers)
    rows = [row for part in range(plan.num_parts) for row in read_part(out, part)]
    candidates, labelled = rows[: -num_labelled or None], rows[len(rows) - num_labelled :]

    # 3. The choice, among the images that could be read.
    readable = [index for index, row in enumerate(candidates) if row["rejected"] is None]
    if not readable:
        raise ConfigError(f"none of the {len(candidates)} unlabelled images can be read: {candidates[0]['rejected']}")
    choice = choose_rows(
        [candidates[index] for index in readable], [r for r in labelled if r["rejected"] is None], plan.count
    )

    # 4. Results; `selected.json` is the last file.
    content = _write_results(out, inputs, plan, candidates, readable, choice)
    for folder in ("", PARTS_FOLDER, IMAGES_FOLDER, LABELS_FOLDER):
        storage.remove_temporaries(storage.join(out, folder))
    return SelectResult(out, content)


def choose_rows(candidates: Sequence[dict[str, Any]], labelled: Sequence[dict[str, Any]], count: int) -> Choice:
    """Choose among measured images.

    Args:
        candidates: rows as of `measured_images.SCHEMA`, none of them rejected.
        labelled: rows of images that are labelled already.
    """
    features, known = (np.array([row["features"] for row in rows], np.float32) for rows in (candidates, labelled))
    return choose(
        np.array([row["score_error"] + row["edge_error"] for row in candidates], np.float32),
        features,
        near_groups([row["gradient_hash"] for row in (*candidates, *labelled)]),
        count,
        labelled=known if len(known) else None,
    )


def _measure(loaded: LoadedDetector, inputs: Inputs, plan: SelectPlan, out: str, wanted: int | None) -> None:
    """Write the missing parts, in this process or on Ray."""
    todo = missing_parts(out, plan)
    workers = IN_PROCESS if in_this_process(inputs, wanted) else wanted
    done = plan.num_images - sum(stop - first for first, stop in map(plan.image_range, todo))
    with Progress("measuring", total=plan.num_images, initial=done, unit=" images") as progress:
        if workers == IN_PROCESS:
            threads = torch.get_num_threads()
            for part in todo:
                progress.advance(write_part(loaded, inputs, plan, part, out, threads).images)
        elif todo:
            from pipeline.predict.on_ray import write_parts_on_ray  # imports Ray, which takes seconds

            for counts in write_parts_on_ray(loaded.to("cpu"), inputs, plan, todo, out, workers, write_part):
                progress.advance(counts.images)


# Results


def _write_results(
    out: str,
    inputs: Inputs,
    plan: SelectPlan,
    candidates: Sequence[dict[str, Any]],
    readable: Sequence[int],
    choice: Choice,
) -> dict[str, Any]:
    """Copy the images, and write pre-labels, contact sheet and lists."""
    names = [category.name for category in plan.categories]
    prelabelled: list[PreLabelled] = []
    listed: list[dict[str, Any]] = []
    drawings: list[tuple[str, Image.Image]] = []
    for chosen in choice.images:
        index = readable[chosen.index]
        row = candidates[index]
        (source,) = read_images(inputs, index, index + 1)
        if not isinstance(source, InputImage):
            raise ConfigError(f"{row['file_name']} was chosen, and can no longer be read: put it back, or delete {out}")
        file, content = _file_of(source)
        storage.write_atomic(storage.join(out, IMAGES_FOLDER, file), content)
        prelabelled.append(image := _prelabelled(row, file, plan))
        like_it = [candidates[readable[other]]["file_name"] for other in chosen.like_it]
        listed.append(_entry(row, file, chosen, len(image.labels), like_it))
        if len(drawings) < SHEET_IMAGES:
            drawing = draw_detections(
                decode_input(source), image.boxes.tolist(), image.labels.tolist(), image.scores.tolist(), names
            )
            drawings.append((f"{len(listed)}. {file}: {listed[-1]['expected_error']:.1f}", drawing))
    files = prelabel_files(prelabelled, plan.categories, plan.format)
    for path, content in files.items():
        storage.write_atomic(storage.join(out, path), content)
    sheet = io.BytesIO()
    contact_sheet(drawings).save(sheet, "JPEG", quality=88)
    storage.write_atomic(storage.join(out, CONTACT_SHEET), sheet.getvalue())
    storage.write_atomic(storage.join(out, LIST_FILE), "".join(f"{each['source']}\n" for each in listed).encode())
    result = {
        "wanted": plan.count,
        "candidates": len(candidates),
        "already_labelled": choice.already_labelled,
        "format": plan.format,
        "prelabels": next(iter(files)),
        "next": _next_step(out, plan.format),
        "chosen": listed,
        "rejected": [
            {"source": row["file_name"], "reason": row["rejected"]} for row in candidates if row["rejected"] is not None
        ],
    }
    storage.write_atomic(storage.join(out, RESULT_FILE), json.dumps(result, indent=1).encode())
    return result


def _prelabelled(row: dict[str, Any], file: str, plan: SelectPlan) -> PreLabelled:
    labels, scores = np.array(row["labels"], np.int32), np.array(row["scores"], np.float32)
    kept = scores >= np.array(plan.thresholds, np.float32)[labels]
    boxes = np.array(row["boxes"], np.float32).reshape(-1, 4)
    parts = clipped(boxes[kept], labels[kept], scores[kept], row["width"], row["height"])
    return PreLabelled(row["image_id"], file, row["width"], row["height"], *parts)


def _entry(
    row: dict[str, Any], file: str, chosen: ChosenImage, num_boxes: int, like_it: Sequence[str]
) -> dict[str, Any]:
    """Entry of `selected.json`, with the reasons in words."""
    expected = row["score_error"] + row["edge_error"]
    unsure = sum(0.2 <= score <= 0.8 for score in row["scores"])
    reason = (
        f"{expected:.1f} expected errors, {row['score_error']:.1f} by scores and {row['edge_error']:.1f} by edges;"
        f" {unsure} of {plural(len(row['scores']), 'box')} unsure"
    )
    if chosen.distance < FAR:
        reason += f"; {chosen.distance:.2f} from the nearest image"
    if like_it:
        reason += f"; {plural(len(like_it), 'near-duplicate')} left out"
    return {
        "file": file,
        "source": row["file_name"],
        "value": expected * chosen.distance,
        "expected_error": expected,
        "score_error": row["score_error"],
        "edge_error": row["edge_error"],
        "distance": chosen.distance,
        "boxes": num_boxes,
        "near_duplicates": list(like_it),
        "reason": reason,
    }


def _file_of(source: InputImage) -> tuple[str, bytes]:
    """Name and content of the copy of an image; bytes stay as they are, a frame of a video becomes a JPEG."""
    stem = drawing_name(source)
    if isinstance(source.content, np.ndarray):
        stream = io.BytesIO()
        Image.fromarray(source.content).save(stream, "JPEG", quality=FRAME_QUALITY)
        return f"{stem}.jpg", stream.getvalue()
    content = read_image_file(source.content) if isinstance(source.content, str) else source.content
    suffix = next((suffix for suffix in SUFFIXES if source.file_name.lower().endswith(suffix)), None)
    if suffix is None:
        with open_image(content) as image:
            suffix = f".{(image.format or 'jpeg').lower()}"
    return f"{stem}{suffix}", content


def _next_step(out: str, form: Format) -> str:
    if form == "yolo":
        return f"correct {out}/labels, then: dfine prepare yolo {out}/data.yaml --split train --out SHARDS"
    if form == "label-studio":
        return (
            f"import {out}/tasks.json with {out}/label_config.xml and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={out},"
            " export as COCO with images, then: dfine prepare auto EXPORT --split train --out SHARDS"
        )
    return (
        f"correct {out}/annotations.json, then: dfine prepare coco --images {out}/images"
        f" --annotations {out}/annotations.json --split train --out SHARDS"
    )
