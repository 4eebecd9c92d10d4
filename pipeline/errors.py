"""Every error that a user can cause, as one tree. Commands print it as a message and exit (`jobs/command.py`).

    UserError
    ├── BadImageError             an image that cannot go into a shard
    ├── CheckpointError           a checkpoint that is missing, damaged or does not fit
    ├── ClusterError              a Ray cluster that cannot be joined, or not be started on this machine
    ├── ConfigError               a file or a value that is not accepted, with every problem found
    ├── FitError                  data that `dfine fit` cannot train on as they are, or a folder of another fit
    ├── ManifestError             a manifest that is missing, unreadable or inconsistent
    ├── NonFiniteError            losses or gradients that stay NaN or infinite
    ├── OutboxError               an outbox of a run's log that is damaged or belongs to another run
    ├── PlanError                 batch sizes that do not fit the number of images or workers
    ├── PrepareError              data that cannot become a shard set, or a folder that cannot hold it
    ├── PretrainedError           published weights that the hub does not hand out, or that arrive damaged
    ├── ProgramError              an exported file that its runtime does not open or run
    ├── RequestError              an HTTP request that is refused, with its status
    ├── RunLookupError            a run or a model that MLflow does not know, or knows several of
    ├── ShardError                shard files that differ from their manifest
    ├── SourceError               a data set that is not in the stated format
    ├── SplitOffError             a share of a split that cannot be split off
    ├── StorageError              a path or URI that cannot be resolved, or a damaged file
    ├── SweepInterruptedError     a sweep stopped by Ctrl-C or SIGTERM; its folder is whole
    ├── TrackingError             a tracking server or database that is not named, or cannot be used
    ├── TrainingStoppedError      a training stopped by Ctrl-C or SIGTERM, with a checkpoint
    ├── UiError                   a server for MLflow's pages that does not start
    ├── UndecodableImageError     an image that training or evaluation cannot decode
    └── UndeliveredError          events of a run that MLflow still does not have

Each class stands in the module that raises it, and ConfigError here, as many do. Most are also a ValueError or RuntimeError, so
that pydantic validators may raise them. `dfine_core.inference.LoadError` belongs to the core; `pipeline.open_detector` turns it
into a ConfigError.
"""

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """A mistake in what was asked for or a fault of its data, with a message that names the way out."""

    exit_code = 1  # the command ends with it
    recurs = False  # the same training would meet it again, so that Ray Train need not start its workers again


class ConfigError(UserError, ValueError):
    """Invalid file or value, with every problem that was found."""

    recurs = True


# Faults of a disk that a person can mend: what is wrong, and the way out.
DISK_FAULTS = {
    errno.ENOSPC: "no space is left on its disk: free some, or choose another folder",
    errno.EDQUOT: "the quota of this disk is used up: free some space, or choose another folder",
    errno.EROFS: "its file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose another folder, or change its owner or mode",
    errno.EPERM: "operation not permitted: choose another folder, or change its owner or attributes",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}


def os_error_text(error: OSError) -> str:
    """Path and fault of a failed operation, with the way out where a person can mend it."""
    fault = DISK_FAULTS.get(error.errno or 0) or (error.strerror or str(error) or type(error).__name__).lower()
    return fault if error.filename is None else f"{error.filename!s}: {fault}"


def in_one_line(error: "ValidationError") -> str:
    """All problems of a pydantic error, each with its location, without pydantic's frame around them."""
    problems = []
    for problem in error.errors():
        location = ".".join(map(str, problem["loc"]))
        text = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{location}: {text}" if location else text)
    return "; ".join(problems)
