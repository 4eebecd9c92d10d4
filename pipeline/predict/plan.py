"""Folder of a prediction: its plan, the schema of its parts, and the refusal of folders that hold anything else."""

import pyarrow as pa
from pydantic import PositiveInt, ValidationError

from dfine_core.config import IntervalKind
from dfine_core.tiles import Tiling
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import Category, FrozenModel
from pipeline.errors import in_one_line
from pipeline.output_folder import refuse_foreign_folder

PLAN_FILE, PARTS_FOLDER = "plan.json", "parts"
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("frame", pa.int64()),  # index of the video frame, from 0
        ("seconds", pa.float64()),  # time from the start of the video
        ("width", pa.int32()),  # null if the image could not be read
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # flat [4K], xyxy in pixels as stored; best first
        ("labels", pa.list_(pa.int32())),  # [K]
        ("scores", pa.list_(pa.float32())),  # [K]
        ("edge_std_px", pa.list_(pa.float32())),  # flat [4K]: left, top, right, bottom edge in px, NaN: cut; or null
        ("edge_intervals", pa.list_(pa.float32())),  # flat [8K]: lowest and highest coordinate of the same; or null
        ("drift", pa.list_(pa.float32())),  # flat [3 T] `ImageValues` of the image, or of each of its tiles; or null
        ("rejected", pa.string()),  # reason if the image could not be read
    ]
)


class PartsPlan(FrozenModel):
    """Images of a command that works in parts, each of which is one file; the same images and sizes give the same parts."""

    inputs: str  # digest
    detector: str  # digest
    num_images: PositiveInt
    part_size: PositiveInt  # images per part; the last one may have fewer
    batch_size: PositiveInt  # images per forward pass
    categories: tuple[Category, ...]  # by label

    @property
    def num_parts(self) -> int:
        """Parts of all images."""
        return -(-self.num_images // self.part_size)

    def image_range(self, part: int) -> tuple[int, int]:
        """Return the index range (first, stop) of the images of a part."""
        return part * self.part_size, min((part + 1) * self.part_size, self.num_images)


class PredictPlan(PartsPlan):
    """Everything that the content of the parts depends on: parts of equal plans belong together."""

    version: int = 4
    thresholds: tuple[float, ...]  # least score by label
    threshold_text: str  # where they come from
    edge_std: bool  # deviations of edges are measured
    coverage: float | None = None  # of the intervals of edges; None without them
    joint: bool = False  # it is that of boxes with all four edges inside
    intervals: IntervalKind | None = None  # their source
    interval_text: str | None = None
    calibration: str | None = None  # digest; None: scores are raw
    drift_score: float | None = None  # raw score from which a detection counts for drift; None: not measured
    precision: str = "fp32"  # name of an arithmetic, the same for all parts
    tile: int | None = None  # side in px of the tiles that images are cut into; None: they are taken whole
    overlap: float | None = None  # share of the side by which neighbouring tiles overlap

    @property
    def tiling(self) -> Tiling | None:
        """Tiles that images are cut into."""
        return Tiling.given(self.tile, self.overlap)


def part_name(part: int) -> str:
    """Return the file name of a part."""
    return f"part-{part:06d}.parquet"


def part_uri(out: str, part: int) -> str:
    """Return the path or URI of a part: from its number alone, so that no file can name one outside of the folder."""
    return storage.join(out, PARTS_FOLDER, part_name(part))


def missing_parts(out: str, plan: PartsPlan) -> list[int]:
    """Numbers of the parts that are not written yet."""
    existing = storage.sizes(storage.join(out, PARTS_FOLDER))
    return [part for part in range(plan.num_parts) if part_name(part) not in existing]


def read_plan(out: str) -> PredictPlan:
    """Read the plan of the prediction in a folder.

    Raises:
        ConfigError: the folder has none, or another file of that name.
    """
    uri = storage.join(out, PLAN_FILE)
    try:
        return PredictPlan.model_validate_json(storage.read_bytes(uri))
    except FileNotFoundError:
        raise ConfigError(f"{out} holds no prediction: it has no {PLAN_FILE}") from None
    except ValidationError as error:
        raise ConfigError(
            f"{uri}: not the plan of a prediction ({in_one_line(error)}); choose another --out, nothing was written"
        ) from None


def holds_prediction(out: str) -> bool:
    """Whether a folder is that of a prediction, finished or not."""
    try:
        return storage.exists(storage.join(out, PLAN_FILE)) and bool(read_plan(out))
    except ConfigError:
        return False


def claim_folder(out: str, plan: PredictPlan) -> None:
    """Write the plan into a new or empty folder, or compare it with the plan that is there.

    The plan is the first file to be written. A folder that has files but no plan is therefore somebody else's.

    Raises:
        ConfigError: the folder holds other files, or another prediction.
    """
    if not storage.exists(storage.join(out, PLAN_FILE)):
        refuse_foreign_folder(out, PLAN_FILE, "prediction")
        storage.write_atomic(storage.join(out, PLAN_FILE), plan.model_dump_json(indent=1).encode())
        return
    old = read_plan(out).model_dump()
    told = {"threshold_text", "interval_text"}
    changed = [name for name, value in plan.model_dump(exclude=told).items() if old[name] != value]
    if changed:
        raise ConfigError(
            f"{out} contains another prediction: {', '.join(changed)} changed. Choose another --out, or delete that folder"
        )
