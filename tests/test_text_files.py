"""Texts and YAML of users: encodings, and bounds on what aliases stand for."""

import time
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.config_files import read_yaml
from pipeline.data.shards.manifest import ManifestError, load_shards
from pipeline.text_files import encoding_of, load_yaml, text_of


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_usual_encodings_are_decoded(encoding: str) -> None:
    assert text_of("dög\n".encode(encoding)) == "dög\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("dög".encode("latin-1"), "not UTF-8 text .*; save it as UTF-8"),
        ("dog".encode("utf-16-le"), "seems to be unmarked UTF-16"),
        ("dog".encode("utf-32"), "not UTF-8 text"),
        (b"dog and a long text\0", "NUL characters"),
    ],
)
def test_other_encodings_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(data)


def test_the_mark_of_utf32_is_not_taken_for_that_of_utf16() -> None:
    assert [encoding_of("{".encode(name)) for name in ("utf-32", "utf-16", "utf-8-sig")] == [
        "UTF-32",
        "UTF-16",
        "UTF-8",
    ]


def lines(last: str, depth: int, of: str) -> str:
    """Nine aliases of the line before in every line: 9^depth values."""
    return "".join(f"a{n}: &a{n} {of.format(', '.join([f'*a{n - 1}'] * 9))}\n" for n in range(1, depth)) + last


@pytest.mark.parametrize("of", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(of: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="aliases stand for more than"):
        load_yaml(lines("b: *a11", 12, of).replace("a1: &a1 ", "a0: &a0 {x: 1}\na1: &a1 ", 1))
    assert time.process_time() - start < 5  # 9^11 values would take hours


def test_a_value_inside_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="aliases"):
        load_yaml("a: &a [*a]")


def test_ordinary_aliases_and_long_lists_are_read() -> None:
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }
    assert len(load_yaml("[" + "x," * 3000 + "]")) == 3000


@pytest.mark.parametrize(
    "content",
    [b"[" * 1000, b"a: 2020-99-99", b"a: " + b"9" * 5000, b"a: \xff", b"a: 1\0", lines("", 12, "[{}]").encode()],
)
def test_an_experiment_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml: not readable as YAML"):
        read_yaml(tmp_path / "run.yaml")


def test_an_experiment_of_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("name: dög\r\n".encode("utf-16"))
    assert read_yaml(tmp_path / "run.yaml") == {"name": "dög"}


def test_a_deeply_nested_manifest_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ManifestError, match="not JSON"):
        load_shards(tmp_path)
