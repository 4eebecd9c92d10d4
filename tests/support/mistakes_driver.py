"""Run many command lines in one process, which imports what the commands need once; write how each of them ended.

    python -m tests.support.mistakes_driver ROWS.json RESULTS.json

Rows: [{"command": "train", "arguments": [...], "environment": {}}]
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def ending(command: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Exit code and output of `python -m jobs.<command>`, as the interpreter itself would print them."""
    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    os.environ.update(environment)
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = importlib.import_module(f"jobs.{command}").main(arguments) or 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            err.write(code)
            code = 1
    except BaseException:  # noqa: BLE001 (the interpreter, too, prints whatever is raised)
        err.write(traceback.format_exc())
        code = 1
    finally:
        for name in os.environ.keys() - before.keys():
            if name in environment:
                del os.environ[name]
        os.environ.update(before)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    rows, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([ending(**row) for row in json.loads(rows.read_text())]))
