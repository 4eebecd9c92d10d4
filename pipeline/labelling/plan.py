"""Folder of a selection: its plan, the parts with measurements, and the refusal of folders that hold anything else."""

import json
from typing import Any, Literal, get_args

import pyarrow.parquet as pq
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.errors import in_one_line
from pipeline.output_folder import refuse_foreign_folder
from pipeline.predict.plan import PartsPlan, part_uri

PLAN_FILE, RESULT_FILE = "select_plan.json", "selected.json"
Format = Literal["coco", "yolo", "label-studio"]
FORMATS: tuple[Format, ...] = get_args(Format)


class SelectPlan(PartsPlan):
    """Everything that the content of a selection depends on. Its inputs are the unlabelled images, then the labelled ones."""

    version: int = 1
    scores: dict[str, Any] | None  # calibration of the detector's scores
    num_labelled: NonNegativeInt  # the last ones of the images
    count: PositiveInt  # images to choose
    format: Format
    thresholds: tuple[float, ...]  # least score of a pre-label, by label


def holds_selection(out: str) -> bool:
    """Whether a folder is that of a selection, finished or not."""
    return storage.exists(storage.join(out, PLAN_FILE))


def claim_folder(out: str, plan: SelectPlan) -> None:
    """Write the plan into a new or empty folder, or compare it with the plan that is there.

    Raises:
        ConfigError: the folder holds other files, or another selection.
    """
    uri = storage.join(out, PLAN_FILE)
    if not storage.exists(uri):
        refuse_foreign_folder(out, PLAN_FILE, "selection")
        storage.write_atomic(uri, plan.model_dump_json(indent=1).encode())
        return
    try:
        old = SelectPlan.model_validate_json(storage.read_bytes(uri)).model_dump()
    except ValidationError as error:
        raise ConfigError(
            f"{uri}: not the plan of a selection ({in_one_line(error)}); choose another --out, nothing was written"
        ) from None
    changed = [name for name, value in plan.model_dump().items() if old[name] != value]
    if changed:
        raise ConfigError(
            f"{out} contains another selection: {', '.join(changed)} changed. Choose another --out, or delete that folder"
        )


def read_part(out: str, part: int) -> list[dict[str, Any]]:
    """Rows of one part, see `measured_images.SCHEMA`."""
    filesystem, path = storage.resolve(part_uri(out, part))
    with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
        rows: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()
        return rows


def finished_result(out: str) -> dict[str, Any] | None:
    """Content of `selected.json`, the last file to be written; None if the selection is unfinished."""
    uri = storage.join(out, RESULT_FILE)
    if not storage.exists(uri):
        return None
    try:
        content = json.loads(storage.read_bytes(uri))
        return {"chosen": list(content["chosen"]), **content}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{uri} cannot be read ({error!r}): choose another --out, or delete that folder") from None
