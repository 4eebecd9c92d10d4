"""Submitted jobs: whether this process is the entrypoint of one, and which paths keep their meaning there.

`ray job submit --working-dir .` runs the command in a temporary copy of the working directory. Files that travel with it (an
experiment, a cluster file) may be relative. Data and results may not: they would be missing there, or deleted with it.
"""

import json
import os
from collections.abc import Iterable

MLFLOW_FORMS = ("runs:/", "models:/")


def submitted_job() -> str | None:
    """Id of the job that this process is the entrypoint of; `ray job submit` puts it into the environment."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    job: str | None = config.get("metadata", {}).get("job_submission_id")
    return job


def lasting(location: str) -> str:
    """The location itself, if it means the same place inside and outside of a job.

    Args:
        location: path or URI of data, weights or results.

    Raises:
        ValueError: this is a submitted job and `location` is a relative path; says what to write instead.
    """
    fixed = "://" in location or location.startswith(MLFLOW_FORMS) or os.path.isabs(location)
    if fixed or not submitted_job():
        return location
    raise ValueError(
        f"{location!r} is relative, and a submitted job runs in a temporary copy of the working directory, which Ray deletes:"
        f" give the absolute path ($PWD/{os.path.normpath(location)} in the shell that submits) or a URI"
    )


def relative_problems(locations: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each (key, location) that is not `lasting`."""
    problems = []
    for key, location in locations:
        try:
            lasting(location)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems
