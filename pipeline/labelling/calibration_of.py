"""The calibration that lies beside a detector's weights."""

from dfine_core.inference import LoadedDetector
from dfine_core.uncertainty.detector_calibration import FILE, DetectorCalibration
from pipeline import storage
from pipeline.errors import UserError


def calibration_of(loaded: LoadedDetector) -> DetectorCalibration | None:
    """Read what `dfine calibrate` wrote beside the weights; None if there is nothing, or the detector has no folder.

    Raises:
        UserError: the file is no calibration, or that of other weights.
    """
    folder = None if loaded.path is None else loaded.path.rpartition("/")[0]
    if not folder or loaded.path is None or not storage.exists(uri := storage.join(folder, FILE)):
        return None
    again = "run dfine calibrate again, or delete the file"
    try:
        calibration = DetectorCalibration.from_json(storage.read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: {error}; {again}") from None
    if calibration.sha256 is not None and calibration.sha256 != storage.sha256(loaded.path):
        raise UserError(f"{uri}: it was made for other weights than {loaded.path}; {again}")
    return calibration
