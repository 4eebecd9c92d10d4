"""Asking MLflow for something that a person named: what fails is told in a line, and without the password of its URI."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

from pipeline.config import ConfigError
from pipeline.redaction import redact


@contextmanager
def asking(what: str, failure: type[ValueError] = ConfigError) -> Iterator[None]:
    """
    Raises:
        ValueError: of the kind `failure`, that MLflow does not know it, or does not answer.
    """
    try:
        yield
    except MlflowException as error:
        raise failure(f"{what}: {redact(error.message)}") from None
