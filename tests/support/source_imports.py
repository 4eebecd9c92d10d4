"""Names that a module imports, read from its source."""

import ast
from collections.abc import Iterator
from functools import cache


@cache
def imports(source: str) -> tuple[str, ...]:
    """Full names of everything a module imports, wherever in it and however: `from a import b` gives a and a.b."""
    return tuple(_imports(source))


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else f"{node.module}"
            yield from () if node.level else (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (given.value for given in node.args if isinstance(given, ast.Constant))
