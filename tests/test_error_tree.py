"""The tree of errors that users can cause: complete, drawn as it is, and caught in one place."""

import ast
import errno
import re
from functools import cache

import pytest
from ray.train import WorkerGroupError

import pipeline.errors
from pipeline.config import ConfigError
from pipeline.training.on_ray import user_error_of
from tests.support.commands import COMMAND_MODULES, ROOT


def test_the_tree_in_the_docstring_holds_every_user_error() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", pipeline.errors.__doc__ or ""))
    assert len(drawn) > 10
    assert drawn == {name for name, bases in _classes().items() if "UserError" in bases}


def test_every_exception_of_pipeline_and_jobs_is_a_user_error() -> None:
    exceptions = {
        name: bases
        for name, bases in _classes().items()
        if any(base.endswith(("Error", "Exception")) for base in bases)
        and not name.startswith("_")  # never leaves its module
    }
    assert all(name.endswith("Error") for name in exceptions)
    assert len(exceptions) > 10
    of_users = {"UserError", *(name for name, bases in exceptions.items() if "UserError" in bases)}
    assert [name for name, bases in exceptions.items() if name not in of_users and not of_users & set(bases)] == []


@cache
def _classes() -> dict[str, list[str]]:
    """Names of the bases of every class, by its name."""
    files = [path for package in ("pipeline", "jobs") for path in (ROOT / package).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    return {node.name: [ast.unparse(base) for base in node.bases] for node in nodes}


@pytest.mark.parametrize("command", sorted(COMMAND_MODULES))
def test_a_command_leaves_user_errors_to_one_place(command: str) -> None:
    source = (ROOT / "jobs" / f"{command}.py").read_text()
    assert "@user_errors(" in source
    handlers = [node.type for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler) and node.type]
    caught = {name.id for kind in handlers for name in ast.walk(kind) if isinstance(name, ast.Name)}
    assert not caught & {name for name, bases in _classes().items() if "UserError" in bases}


def test_a_mistake_that_a_worker_met_is_found_behind_rays_error() -> None:
    class TaskError(Exception):
        cause = ConfigError("init: it is damaged")

    assert (
        user_error_of(WorkerGroupError("workers failed", {0: RuntimeError("bug"), 1: TaskError()})) is TaskError.cause
    )
    assert user_error_of(WorkerGroupError("workers failed", {0: TaskError.cause})) is TaskError.cause
    assert user_error_of(WorkerGroupError("workers failed", {0: RuntimeError("bug")})) is None
    assert user_error_of(RuntimeError("bug")) is None
    full = OSError(errno.ENOSPC, "No space left on device", "/runs/a/checkpoints")
    assert user_error_of(WorkerGroupError("workers failed", {0: full})) is full
    assert user_error_of(WorkerGroupError("workers failed", {0: OSError(errno.ECONNRESET, "reset")})) is None
