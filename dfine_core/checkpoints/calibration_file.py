"""The file `calibration.json` beside the weights of a detector."""

import logging
from pathlib import Path

from dfine_core.checkpoints.folder import ON_DISK, WEIGHTS, FileReader, StoredDetector
from dfine_core.uncertainty.detector_calibration import FILE, DetectorCalibration

log = logging.getLogger(__name__)


def write_calibration(calibration: DetectorCalibration | None, folder: Path) -> None:
    """Write the file beside the weights of an exported folder, for which it then holds; nothing without a calibration."""
    if calibration is not None:
        (folder / FILE).write_bytes(calibration.bound_to((folder / WEIGHTS).read_bytes()).to_json())


def read_calibration(stored: StoredDetector, files: FileReader) -> DetectorCalibration | None:
    """Calibration beside the weights of a folder; one that was fitted to others is left out, with a warning."""
    folder = stored.path.rpartition("/")[0]
    return calibration_beside(folder, stored.sha256, files)


def calibration_beside(
    folder: str | Path, sha256: str | None, files: FileReader = ON_DISK
) -> DetectorCalibration | None:
    """Calibration in a folder, if it fits weights with this SHA-256; else None, with a warning if there is one."""
    uri = f"{folder}/{FILE}"
    try:
        calibration = DetectorCalibration.from_json(files.read(uri))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is ignored, scores stay raw: %s; run dfine calibrate again, or delete it", uri, error)
        return None
    if calibration.sha256 == sha256:
        return calibration
    fitted, there = ((digest or "unknown")[:12] for digest in (calibration.sha256, sha256))
    log.warning(
        "%s is ignored, scores stay raw: it was fitted to other weights (SHA-256 %s) than those beside it (%s);"
        " run dfine calibrate %s SHARDS again, or delete it",
        uri,
        fitted,
        there,
        folder,
    )
    return None
