"""Submitted jobs: whether this process is the entry point of one, and the paths that are valid there.

`ray job submit --working-dir .` runs the command in a temporary copy of the working directory. Files that travel with it (an
experiment, a cluster file) may be relative. Data and results may not: they would be missing there, or deleted with it.
"""

import json
import os
from collections.abc import Iterable

from pipeline.mlflow_access import is_mlflow_uri


def submitted_job() -> str | None:
    """Id of the submitted job whose entry point this process is; `ray job submit` sets it in the environment."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    job: str | None = config.get("metadata", {}).get("job_submission_id")
    return job


def cluster_address() -> str | None:
    """Address of the running cluster that RAY_ADDRESS names; None if it names none, or is "local"."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def cluster_to_join() -> bool:
    """Whether commands run on a cluster that exists already: RAY_ADDRESS names one, or this is a submitted job."""
    return bool(cluster_address() or submitted_job())


def absolute_location(location: str) -> str:
    """Make a path absolute; URIs stay as they are.

    Args:
        location: path or URI of data, weights or results.

    Raises:
        ValueError: this is a submitted job and `location` is a relative path; the message has the path to write instead.
    """
    if "://" in location or is_mlflow_uri(location):
        return location
    if not os.path.isabs(location) and submitted_job():
        raise ValueError(
            f"{location!r} is relative, and a submitted job runs in a temporary copy of the working directory, which Ray"
            f" deletes: give the absolute path ($PWD/{os.path.normpath(location)} in the shell that submits) or a URI"
        )
    return os.path.abspath(location)


def relative_problems(locations: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each (key, location) that a submitted job cannot take."""
    problems = []
    for key, location in locations:
        try:
            absolute_location(location)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems
