"""Row groups read from shards: the right rows, and one file opened for each, however many shards there are."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from pipeline.data.shards import reader
from pipeline.data.shards.reader import ShardError, locate_row_groups, read_row_groups, refuse_changed_files
from tests.support.synthetic_shards import stored_rows, synthetic_records, write_shards


class CountingDisk:
    """A disk that counts the files it opens."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open_input_file(self, path: str) -> Any:
        self.opened.append(path)
        return fs.LocalFileSystem().open_input_file(path)


def test_a_row_group_costs_one_open_file_also_beyond_the_kept_footers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(96), shard_rows=8)
    source, disk = locate_row_groups(shards), CountingDisk()
    monkeypatch.setattr(reader, "_resolve", lambda folder: (disk, folder))
    monkeypatch.setattr(reader, "_footers", reader._Footers(limit=4))
    numbers = range(len(source.rows))
    assert len(set(source.shard.tolist())) == 12
    for _ in range(2):
        tables = read_row_groups(source, numbers)
        assert pa.concat_tables([tables[number] for number in numbers]).equals(stored_rows(shards))
    assert len(disk.opened) == 2 * len(numbers)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(16), shard_rows=8)
    source = locate_row_groups(shards)
    path = Path(shards.shard_uri(1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ShardError, match=f"{path.name}: damaged"):
        read_row_groups(source, range(len(source.rows)))


def test_a_shard_of_the_same_size_and_other_content_is_found_by_its_hash(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(16), shard_rows=8)
    refuse_changed_files(shards, contents=True)
    path = Path(shards.shard_uri(1))
    content = path.read_bytes()
    path.write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
    refuse_changed_files(shards)
    with pytest.raises(ShardError, match=f"{path.name} has another SHA-256 than the manifest: copy them again"):
        refuse_changed_files(shards, contents=True)


def test_missing_and_truncated_shards_are_named_before_any_is_read(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(24), shard_rows=8)
    Path(shards.shard_uri(0)).unlink()
    path = Path(shards.shard_uri(2))
    path.write_bytes(path.read_bytes()[:-20])
    for contents in (False, True):
        with pytest.raises(
            ShardError, match=r"part-00000.parquet is missing, part-00016.parquet has [\d,]+ bytes instead"
        ):
            refuse_changed_files(shards, contents=contents)
