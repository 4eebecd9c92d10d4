"""Index of the images and boxes of a source, on disk and without pixels; every source fills one.

Annotation files have any order and any size, while shards need one order and little memory. So a source streams its images and
boxes into SQLite, which sorts them on disk. Memory does not grow with their number: the process peaked at 323, 326 and 323 MB
for half a million, one and two million annotations, half of it imported libraries (`benchmarks/prepare.py memory`).
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from pydantic import JsonValue

from pipeline.data.shards.manifest import Category, Notice
from pipeline.data.shards.records import Rejection
from pipeline.errors import UserError

FRACTIONS_ABOVE_PX = 8  # in smaller images a box of less than a pixel is no evidence
CACHE_MIB = 32  # SQLite's cache, and the size of one run of its sort on disk


class SourceError(UserError, ValueError):
    """A data set that is not in the stated format."""


class ImageEntry(NamedTuple):
    """An image as described by its source; `image_files.read_image_file` reads `uri`.

    Where the source has no size, width and height are None, and boxes and areas are fractions of the image.
    """

    image_id: int
    uri: str
    file_name: str
    width: int | None
    height: int | None


class BoxEntry(NamedTuple):
    """A box of an image, xyxy; `annotation_id` is the id in the source, if it has one."""

    image_id: int
    x1: float
    y1: float
    x2: float
    y2: float
    label: int
    area: float
    crowd: bool
    annotation_id: int | str | None = None
    weight: float = 1.0  # in training, see `records.WEIGHTS_FIELD`


@contextmanager
def temporary_files_named() -> Iterator[None]:
    """Turn a fault of the disk for temporary files, as SQLite reports it, into a SourceError with the way out."""
    try:
        yield
    except sqlite3.OperationalError as error:
        # SQLite's own order; Python's `tempfile` passes a full disk over.
        places = (os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/tmp")
        folder = next((place for place in places if place and os.access(place, os.W_OK)), ".")
        raise SourceError(
            f"{folder}: the index of the annotations cannot be written: {error};"
            " free space there, or set TMPDIR to another folder"
        ) from None


class AnnotationIndex:
    """Images and boxes in a temporary SQLite file, read back in the order of the shards.

    The file is in the folder for temporary files (TMPDIR), takes about 200 bytes per image and 70 per box, twice that during the
    sort, and is deleted with its process.

    Args:
        seed: seed of the order. Images are sorted by a hash of (seed, image id), so the position of an image does not depend on
            the others.
        shuffle: False sorts by image id instead.
    """

    def __init__(self, *, seed: int = 0, shuffle: bool = True) -> None:
        self._hash_key = seed.to_bytes(8, "little")
        self._notices: dict[str, Notice] = {}
        self._order = "hash, image_id" if shuffle else "image_id"
        self._db = sqlite3.connect("", isolation_level=None)  # an empty name makes SQLite use a temporary file
        self._db.executescript(
            f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            PRAGMA temp_store = FILE; PRAGMA cache_size = -{CACHE_MIB * 1024};
            CREATE TABLE images (image_id INTEGER PRIMARY KEY, uri, file_name, width, height, hash INTEGER);
            CREATE TABLE boxes (
                image_id INTEGER, x1 REAL, y1 REAL, x2 REAL, y2 REAL, label, area REAL, crowd, annotation_id, weight REAL
            );
            CREATE TABLE rejected (image_id, file_name, kind, reason, detail);
            BEGIN;
            """
        )

    def add_images(self, entries: Iterable[ImageEntry]) -> None:
        """Add images; raises SourceError for a repeated id."""
        entry: ImageEntry | None = None

        def rows() -> Iterator[tuple[object, ...]]:
            nonlocal entry
            for entry in entries:
                if is_text(entry.uri) and is_text(entry.file_name):
                    yield (*entry, self._hash(entry.image_id))
                else:  # of a disk whose names are in another encoding
                    detail = f"{as_text(entry.uri)} is not UTF-8; rename the file"
                    self.reject(Rejection(entry.image_id, entry.file_name, "image", "unusable file name", detail))

        try:
            self._db.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", rows())
        except sqlite3.IntegrityError:
            assert entry is not None
            raise SourceError(
                f"image id {entry.image_id} occurs twice, the second time for {entry.file_name}; ids must be unique"
            ) from None

    def add_boxes(self, entries: Iterable[BoxEntry]) -> None:
        """Add boxes, of images that may be added later."""
        self._db.executemany("INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", entries)

    def reject(self, rejection: Rejection) -> None:
        """Record an image or a box that cannot be used."""
        texts = (as_text(value) if isinstance(value, str) else value for value in rejection)
        self._db.execute("INSERT INTO rejected VALUES (?, ?, ?, ?, ?)", tuple(texts))

    def notice(self, code: str, example: str, count: int = 1) -> None:
        """Count something that a person should know; the first case of a kind is its example."""
        before, first = (known.count, known.example) if (known := self._notices.get(code)) else (0, as_text(example))
        self._notices[code] = Notice(code=code, count=before + count, example=first)

    @property
    def notices(self) -> tuple[Notice, ...]:
        """Everything that was noticed, by kind."""
        return tuple(self._notices.values())

    def largest_id(self) -> int:
        """Largest absolute value of an image id."""
        return int(self._db.execute("SELECT IFNULL(MAX(ABS(image_id)), 0) FROM images").fetchone()[0])

    def entries(self) -> list[ImageEntry]:
        """All images, by id."""
        query = "SELECT image_id, uri, file_name, width, height FROM images ORDER BY image_id"
        return [ImageEntry(*row) for row in self._db.execute(query)]

    def without_boxes(self) -> list[ImageEntry]:
        """Images without boxes, by id."""
        query = "SELECT image_id, uri, file_name, width, height FROM images WHERE image_id NOT IN (SELECT image_id FROM boxes)"
        return [ImageEntry(*row) for row in self._db.execute(f"{query} ORDER BY image_id")]

    def keep_images(self, ids: Iterable[int]) -> None:
        """Remove all other images, with their boxes and what was rejected of them."""
        self._db.execute("CREATE TEMP TABLE IF NOT EXISTS kept (image_id INTEGER PRIMARY KEY)")
        self._db.execute("DELETE FROM kept")
        self._db.executemany("INSERT INTO kept VALUES (?)", ((number,) for number in ids))
        others = "image_id IN (SELECT image_id FROM images WHERE image_id NOT IN (SELECT image_id FROM kept))"
        for table in ("boxes", "rejected", "images"):
            self._db.execute(f"DELETE FROM {table} WHERE {others}")

    def drop_label(self, label: int) -> bool:
        """Remove a label without boxes and lower those above it; False if it has boxes."""
        if self._db.execute("SELECT 1 FROM boxes WHERE label = ? LIMIT 1", (label,)).fetchone() is not None:
            return False
        self._db.execute("UPDATE boxes SET label = label - 1 WHERE label > ?", (label,))
        return True

    def finish(self) -> int:
        """Reject boxes of unknown images, and return the number of images.

        Raises:
            SourceError: two annotations have the same id, as in a file that was merged from several, or all boxes are
                fractions where pixels are expected.
        """
        twice = "SELECT annotation_id, COUNT(*) FROM boxes WHERE annotation_id NOT NULL GROUP BY 1 HAVING COUNT(*) > 1"
        if (repeated := self._db.execute(f"{twice} LIMIT 1").fetchone()) is not None:
            raise SourceError(
                f"annotation id {repeated[0]} occurs {repeated[1]} times; ids must be unique, renumber them"
            )
        self._db.execute(
            """
            INSERT INTO rejected
            SELECT image_id, NULL, 'box', 'unknown image', 'annotation ' || IFNULL(annotation_id, '?') FROM boxes
            WHERE image_id NOT IN (SELECT image_id FROM images)
            AND image_id NOT IN (SELECT image_id FROM rejected WHERE kind = 'image' AND image_id NOT NULL)
            """
        )
        if "file-names-read" in self._notices:
            self._reject_ambiguous_names()
        self._refuse_fractions()
        return int(self._db.execute("SELECT COUNT(*) FROM images").fetchone()[0])

    def _reject_ambiguous_names(self) -> None:
        """Reject images whose different names were read as one file: the boxes of one may not lie on another."""
        several = "SELECT uri FROM images GROUP BY uri HAVING COUNT(DISTINCT file_name) > 1"
        ambiguous = f"uri IN ({several}) AND substr(uri, -length(file_name) - 1) <> '/' || file_name"
        self._db.execute("CREATE TEMP TABLE ambiguous (image_id INTEGER PRIMARY KEY, uri, file_name)")
        self._db.execute(f"INSERT INTO ambiguous SELECT image_id, uri, file_name FROM images WHERE {ambiguous}")
        self._db.execute(
            """
            INSERT INTO rejected
            SELECT image_id, file_name, 'image', 'unusable file name', 'another image is read as ' || uri || ', too'
            FROM ambiguous
            """
        )
        for table in ("boxes", "images"):
            self._db.execute(f"DELETE FROM {table} WHERE image_id IN (SELECT image_id FROM ambiguous)")

    def _refuse_fractions(self) -> None:
        """Find boxes that are fractions of their image, where its size says that boxes are pixels."""
        inside = "MIN(x1, y1) >= -1 AND MAX(x2, y2) <= 1"
        fraction = f"({inside} AND (x1 <> ROUND(x1) OR y1 <> ROUND(y1) OR x2 <> ROUND(x2) OR y2 <> ROUND(y2)))"
        boxes, fractions, first = self._db.execute(
            f"""
            SELECT COUNT(*), TOTAL({fraction}), MIN(CASE WHEN {fraction} THEN file_name END)
            FROM boxes JOIN images USING (image_id) WHERE MIN(width, height) > {FRACTIONS_ABOVE_PX}
            """
        ).fetchone()
        if fractions and boxes == fractions:
            raise SourceError(
                f"all {boxes} boxes lie between 0 and 1 pixel, such as in {first}: they seem to be fractions of the image;"
                " multiply them by its width and height"
            )
        if fractions:
            self.notice("box-fraction", f"{first}", int(fractions))

    def rejected(self) -> Iterator[Rejection]:
        """Yield what was rejected, with the file name wherever the image is known."""
        query = """
            SELECT image_id, IFNULL(rejected.file_name, images.file_name), kind, reason, detail
            FROM rejected LEFT JOIN images USING (image_id) ORDER BY rejected.rowid
        """
        return (Rejection(*row) for row in self._db.execute(query))

    def sample(self, count: int) -> list[ImageEntry]:
        """Sample up to `count` images uniformly."""
        query = "SELECT image_id, uri, file_name, width, height FROM images ORDER BY hash, image_id LIMIT ?"
        return [ImageEntry(*row) for row in self._db.execute(query, (count,))]

    def ordered(self) -> Iterator[tuple[ImageEntry, list[BoxEntry]]]:
        """Yield every image with its boxes, in the order of the shards."""
        images = self._db.execute(f"SELECT image_id, uri, file_name, width, height FROM images ORDER BY {self._order}")
        boxes = self._db.execute(
            f"SELECT boxes.* FROM boxes JOIN images USING (image_id) ORDER BY {self._order}, boxes.rowid"
        )
        by_image = groupby((BoxEntry(*row) for row in boxes), key=itemgetter(0))
        next_id, group = next(by_image, (None, iter(())))
        for row in images:
            entry = ImageEntry(*row)
            if entry.image_id == next_id:
                yield entry, list(group)
                next_id, group = next(by_image, (None, iter(())))
            else:
                yield entry, []

    def close(self) -> None:
        """Delete the file."""
        self._db.close()

    def _hash(self, image_id: int) -> int:
        digest = hashlib.blake2b(image_id.to_bytes(8, "little", signed=True), digest_size=8, key=self._hash_key)
        return int.from_bytes(digest.digest(), "little", signed=True)


def is_text(name: str) -> bool:
    """False for a name of a disk that is not UTF-8, which Python shows by half surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(name: str) -> str:
    """The name with the bytes that are not UTF-8 as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace") if not is_text(name) else name


@dataclass(frozen=True)
class DatasetSource:
    """A detection data set, ready to be read.

    Attributes:
        description: stored in the manifest. Equal inputs have equal descriptions in any folder: names and hashes, no paths.
        fill: streams images and boxes into an index and returns the categories.
    """

    description: dict[str, JsonValue]
    fill: Callable[[AnnotationIndex], tuple[Category, ...]]
