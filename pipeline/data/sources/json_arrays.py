"""JSON files of any size, read as a stream: the values of one array after the other, with bounded memory.

The parser keeps the path of every open array and object, so deep nesting would take memory with the square of its depth. The
stream therefore counts brackets, and refuses what no annotation tool writes.
"""

import posixpath
import re
from collections.abc import Iterator
from typing import Any

import ijson
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.sources.index import SourceError
from pipeline.progress import Progress
from pipeline.text_files import encoding_of

READ_BYTES = 1 << 20
DEEPEST = 64  # arrays and objects inside each other; COCO has six
LOOKED_AT = 2000  # events of a file that may be COCO

_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
_UNSTRUCTURED = bytes(sorted(set(range(256)) - set(b'[]{}"')))
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


def array_items(uri: str, key: str) -> Iterator[Any]:
    """Yield the values of the array under `key`, wherever it is in the file. One pass reads about 40 MB/s.

    Args:
        key: "" for a file that is an array as a whole, such as COCO's results.

    Raises:
        SourceError: the file is not JSON, or has no such array.
    """
    filesystem, path = storage.resolve(uri)
    size = filesystem.get_file_info(path).size
    found = False
    try:
        shown = f"{key} of {posixpath.basename(path)}".removeprefix(" of ")
        with (
            filesystem.open_input_stream(path) as stream,
            Progress(shown, total=size, unit="B", delay=5) as progress,
        ):
            checked = CheckedStream(stream, uri, progress)
            for item in ijson.items(checked, f"{key}.item".removeprefix("."), use_float=True, buf_size=READ_BYTES):
                found = True
                yield item
        if not found:
            with filesystem.open_input_stream(path) as stream:
                _refuse_without_array(uri, key, CheckedStream(stream, uri))
    except ijson.JSONError as error:
        raise SourceError(f"{uri}: not valid JSON: {_in_one_line(error)}") from None
    except FileNotFoundError:
        raise SourceError(f"{uri}: no such file") from None
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise SourceError(f"{uri}: cannot be read: {error}") from None


def has_array(uri: str, keys: tuple[str, ...], before: tuple[str, ...] = ()) -> bool:
    """True if one of the first arrays of a JSON file is under one of these keys; False for a file that cannot be read.

    Args:
        before: keys of arrays that may fill the beginning of a long file; by themselves they say nothing.

    Raises:
        SourceError: it is in another encoding.
    """
    filesystem, path = storage.resolve(uri)
    begun = False
    try:
        with filesystem.open_input_stream(path) as stream:
            for number, (prefix, event, _) in enumerate(ijson.parse(CheckedStream(stream, uri), buf_size=READ_BYTES)):
                if prefix in keys and event == "start_array":
                    return True
                begun = begun or (prefix in before and event == "start_array")
                if number > LOOKED_AT and "." not in prefix:
                    return begun
    except (ijson.JSONError, OSError, pa.ArrowException, UnicodeError):
        return False
    return False


def _refuse_without_array(uri: str, key: str, stream: "CheckedStream") -> None:
    """Raise SourceError unless there is an array under `key`, which may be empty."""
    keys: list[str] = []
    for prefix, event, value in ijson.parse(stream, buf_size=READ_BYTES):
        if prefix == "" and event == "map_key":
            keys.append(value)
        elif prefix == key and event == "start_array":
            return
        elif prefix == key == "":
            raise SourceError(f"{uri}: it is no array; COCO's results are an array of detections")
        elif prefix == key and event != "map_key":
            raise SourceError(f"{uri}: `{key}` is not an array; is it a COCO instances file?")
    there = f"its keys are {', '.join(keys[:10])}" if keys else "it is no object with keys"
    raise SourceError(f"{uri}: no `{key}`: {there}; is it a COCO instances file?")


class CheckedStream:
    """A stream that skips a byte order mark, advances a progress bar by the bytes read, and bounds nesting.

    Raises:
        SourceError: another encoding than UTF-8, or arrays and objects that are nested too deeply.
    """

    def __init__(self, stream: pa.NativeFile, uri: str, progress: Progress | None = None) -> None:
        self._stream, self._progress, self._uri = stream, progress, uri
        self._begun = False
        self._depth = 0
        self._rest = b""  # an open string's quotation mark, or half of an escape, of the block before

    def read(self, num_bytes: int) -> bytes:
        """Read a block."""
        data = bytes(self._stream.read(num_bytes))
        if self._progress is not None:
            self._progress.advance(len(data))
        if not self._begun and num_bytes:
            self._begun = True
            if (encoding := encoding_of(data)) != "UTF-8":
                raise SourceError(f"{self._uri}: it is {encoding} text; save it as UTF-8")
            data = data.removeprefix(b"\xef\xbb\xbf")
        self._bound_nesting(data)
        return data

    def _bound_nesting(self, data: bytes) -> None:
        """Follow the depth through a block. It adds a sixth to the parsing."""
        text = self._rest + data
        escape = b""
        if b"\\" in text:
            if (len(text) - len(text.rstrip(b"\\"))) % 2:
                text, escape = text[:-1], b"\\"
            text = _ESCAPED.sub(b"", text)
        # Pairs of quotation marks leave the others where they are: inside or outside of a string.
        structure = text.translate(None, _UNSTRUCTURED).replace(b'""', b"")
        structure = _STRING.sub(b"", structure)
        structure, quote, _ = structure.partition(b'"')
        self._rest = quote + escape
        steps: NDArray[np.int64] = _STEP[np.frombuffer(structure, np.uint8)].cumsum(dtype=np.int64)
        if len(steps):
            if self._depth + int(steps.max()) > DEEPEST:
                raise SourceError(f"{self._uri}: nested too deeply: {DEEPEST} arrays and objects are inside each other")
            self._depth += int(steps[-1])


def _in_one_line(error: Exception) -> str:
    given = error.args[0] if error.args else ""
    text = given.decode("utf-8", "backslashreplace") if isinstance(given, bytes) else str(error)
    line = " ".join(text.replace("(right here) ------^", "").split())
    if "invalid bytes in UTF8" in line:
        return f"{line}; save it as UTF-8"
    if "NaN" in line or "Infinity" in line or "overflow" in line:
        return f"{line}; JSON has no NaN, no Infinity and no numbers beyond 1e308 or 2^63: write null"
    return line
