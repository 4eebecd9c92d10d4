"""The same validation images as several runs see them: ground truth and detections, side by side."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from dfine_core.images import open_image
from pipeline import storage
from pipeline.tracking.run_facts import RunFacts

MAX_IMAGES = 8
WIDTH = 1000  # px, of an image in the page
RENDERED = "images_"  # first characters of the files with ground truth and detections


@dataclass(frozen=True)
class PairedImage:
    """One validation image, as rendered by every run."""

    name: str  # id of the image in the shard set
    data: tuple[str, ...]  # data URI of each run


def paired_images(runs: Sequence[RunFacts]) -> list[PairedImage]:
    """Find images that the newest evaluations of all runs have rendered; none where a run's folder cannot be reached."""
    folders = [_newest_evaluation(run.folder) if run.folder else None for run in runs]
    reached = [folder for folder in folders if folder is not None]
    if len(reached) < len(runs) or len({run.data.get("val") for run in runs}) > 1:
        return []
    names = set.intersection(*({n for n in storage.names(folder) if n.startswith(RENDERED)} for folder in reached))
    return [
        PairedImage(
            name.removeprefix(RENDERED).removesuffix(".png"),
            tuple(_data_uri(storage.read_bytes(storage.join(folder, name))) for folder in reached),
        )
        for name in sorted(names)[:MAX_IMAGES]
    ]


def _newest_evaluation(run: str) -> str | None:
    evaluations = storage.join(run, "evaluation")
    try:
        names = sorted(storage.names(evaluations), key=lambda name: (name == "final", name))
    except (OSError, storage.StorageError):  # the folder is on another machine
        return None
    return storage.join(evaluations, names[-1]) if names else None


def _data_uri(png: bytes) -> str:
    image = open_image(png)
    image.thumbnail((WIDTH, WIDTH))
    content = io.BytesIO()
    image.save(content, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
