"""The file `calibration.json` beside the weights of a detector."""

import logging

from dfine_core.checkpoints.folder import FileReader, StoredDetector
from dfine_core.uncertainty.detector_calibration import FILE, DetectorCalibration

log = logging.getLogger(__name__)


def read_calibration(stored: StoredDetector, files: FileReader) -> DetectorCalibration | None:
    """Calibration beside the weights; one that was fitted to others is left out, with a warning."""
    folder = stored.path.rpartition("/")[0]
    uri = f"{folder}/{FILE}"
    try:
        calibration = DetectorCalibration.from_json(files.read(uri))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is ignored, scores stay raw: %s; calibrate again, or delete it", uri, error)
        return None
    if calibration.sha256 != stored.sha256:
        fitted, there = ((digest or "unknown")[:12] for digest in (calibration.sha256, stored.sha256))
        log.warning(
            "%s is ignored, scores stay raw: it was fitted to other weights (SHA-256 %s) than those beside it (%s);"
            " run dfine calibrate %s SHARDS again, or delete it",
            uri,
            fitted,
            there,
            folder,
        )
        return None
    return calibration
