"""Record of the files that a fit was made from: it shows what has changed when the same command is given again.

Of every image the size, the time of its last change and a digest are kept; of the annotations the description of their source,
which has a digest, too. A file with another time and the same content, as after a copy, counts as unchanged.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from pipeline import storage
from pipeline.data.shards.manifest import FrozenModel
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, temporary_files_named
from pipeline.errors import in_one_line
from pipeline.output_folder import shown
from pipeline.progress import Progress
from pipeline.wording import plural

READERS = 8  # threads
DIGEST_BYTES = 16


class FileFacts(FrozenModel):
    """Size, time and content of a file."""

    size: int
    changed_at_ns: int
    digest: str


class SplitRecord(FrozenModel):
    """One split of the source."""

    description: dict[str, JsonValue]  # of the annotations
    images: dict[str, FileFacts | None]  # by path; None: the file cannot be read


class SourceRecord(FrozenModel):
    """All files that a fit reads, and the experiment that it wrote from them."""

    splits: dict[str, SplitRecord]
    experiment_digest: str | None = None  # of the experiment's file as it was written; None: not written yet


def read_source(sources: Mapping[str, DatasetSource], before: SourceRecord | None = None) -> SourceRecord:
    """Look at all files of the splits.

    Args:
        before: record of an earlier call; the content of files with the same size and time is not read again.
    """
    known = {name: split.images for name, split in before.splits.items()} if before else {}
    return SourceRecord(
        splits={name: _read_split(source, known.get(name, {})) for name, source in sources.items()},
        experiment_digest=before.experiment_digest if before else None,
    )


def read_record(path: Path) -> SourceRecord | None:
    """Read a record; None if there is none.

    Raises:
        StorageError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        return SourceRecord.model_validate(storage.read_json(path))
    except ValidationError as error:
        raise storage.StorageError(f"{path}: damaged: {in_one_line(error)}; delete it to go on without it") from None


def _read_split(source: DatasetSource, known: Mapping[str, FileFacts | None]) -> SplitRecord:
    with temporary_files_named(), closing(AnnotationIndex()) as index:
        source.fill(index)
        uris = sorted({entry.uri for entry in index.entries()})
    with (
        ThreadPoolExecutor(READERS) as pool,
        Progress("reading the files", total=len(uris), unit=" images", delay=5) as progress,
    ):
        images = {}
        for uri, facts in zip(uris, pool.map(lambda uri: _facts(uri, known.get(uri)), uris), strict=True):
            images[uri] = facts
            progress.advance(1)
    return SplitRecord(description=source.description, images=images)


def _facts(uri: str, before: FileFacts | None) -> FileFacts | None:
    try:
        status = Path(uri).stat()
        size, changed_at = status.st_size, status.st_mtime_ns
        if before is not None and (before.size, before.changed_at_ns) == (size, changed_at):
            return before
        return FileFacts(size=size, changed_at_ns=changed_at, digest=digest(storage.read_regular_file(uri)))
    except OSError:
        return None


def digest(content: bytes) -> str:
    """Short digest of a file, in hex."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


def changes(before: SourceRecord, now: SourceRecord) -> list[str]:
    """Differences between two records, one line per split; empty if the data are the same."""
    lines = []
    for name in before.splits | now.splits:
        if name not in before.splits or name not in now.splits:
            lines.append(f"{name}: {'a new split' if name in now.splits else 'the split is gone'}")
        elif parts := _split_changes(before.splits[name], now.splits[name]):
            lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _split_changes(before: SplitRecord, now: SplitRecord) -> list[str]:
    old, new = _contents(before), _contents(now)
    parts = [
        *_some(new.keys() - old.keys(), "added"),
        *_some(old.keys() - new.keys(), "removed"),
        *_some([uri for uri in old.keys() & new.keys() if old[uri] != new[uri]], "changed"),
    ]
    return [*parts, *["other annotations"] * (before.description != now.description)]


def _contents(split: SplitRecord) -> dict[str, Any]:
    return {uri: facts and facts.digest for uri, facts in split.images.items()}


def _some(uris: Iterable[str], word: str) -> list[str]:
    names = sorted(Path(uri).name for uri in uris)
    return [f"{plural(len(names), 'image')} {word} ({shown(names)})"] if names else []
