"""MLflow before it is imported: its URIs, the variable that names its server, its settings in this process.

Importing MLflow takes seconds, and some settings are read only then. So modules import it inside the functions that need
it, after `import_mlflow`.
"""

import os
import threading
import warnings

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

_importing = threading.Lock()
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


def import_mlflow(*, retries: int = LOOKUP_RETRIES) -> None:
    """Set MLflow's environment variables, and import it in one thread at a time.

    Its modules import each other in circles: a second thread would meet them half done, and fail. At the end of a short run
    the uploader's thread and the training import it together.

    Args:
        retries: as of `configure_mlflow`.
    """
    configure_mlflow(retries=retries)
    with _importing, warnings.catch_warnings():  # MLflow warns about type hints of its own
        warnings.simplefilter("ignore")
        import mlflow.pyfunc  # noqa: F401 - for those that import parts of it afterwards
