"""MLflow before it is imported: its URIs, the variable that names its server, its settings in this process.

Importing MLflow takes seconds, and some settings are read only then. So modules import it inside the functions that need
it, after `configure_mlflow`.
"""

import os
import threading

TRACKING_URI = "MLFLOW_TRACKING_URI"  # environment variable: the server or database
# Groups of metrics. MLflow sorts charts by them: accuracy, then loss, rates and speed in train/, then the details in val/.
ACCURACY, VAL, FINAL = "accuracy", "val", "val/final"
RUN_SCHEME, MODEL_SCHEME = MLFLOW_SCHEMES = ("runs:/", "models:/")

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds without a byte
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it may hold a password
}
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
LOOKUP_RETRIES = 2  # a dropped connection fails nothing, and an unreachable server is reported within seconds

# Two threads that import MLflow at once see half of its modules: the uploader's, and the one that logs the detector of a run that
# is over within seconds.
import_lock = threading.RLock()

_set_here: dict[str, str] = {}  # other values in the environment are the user's


def is_mlflow_uri(location: str) -> bool:
    """Return whether a location is a `runs:/` or `models:/` URI."""
    return location.startswith(MLFLOW_SCHEMES)


def configure_mlflow(*, retries: int = LOOKUP_RETRIES) -> None:
    """Set MLflow's environment variables in this process; values of the user's own win.

    Args:
        retries: per request. The smallest number that any caller has given holds for the whole process.
    """
    retries = min(retries, int(_set_here.get(RETRIES, retries)))
    for name, value in {**SETTINGS, RETRIES: str(retries)}.items():
        if os.environ.get(name) in (None, _set_here.get(name)):
            os.environ[name] = _set_here[name] = value
