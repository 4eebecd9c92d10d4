"""Numbers with their nouns."""

import re
from pathlib import Path

import pytest

from pipeline.wording import plural

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "class", "1 class"),
        (0, "class", "0 classes"),
        (2, "box", "2 boxes"),
        (3, "micro-batch", "3 micro-batches"),
        (2, "epoch", "2 epochs"),
        (1204, "image", "1,204 images"),
        (2, "broken one", "2 broken ones"),
    ],
)
def test_a_noun_agrees_with_its_number(number: int, noun: str, text: str) -> None:
    assert plural(number, noun) == text


def test_no_text_leaves_the_choice_to_its_reader() -> None:
    sources = [path for package in ("dfine_core", "pipeline", "jobs") for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 100
    found = [
        f"{path.name}: {match[0]}"
        for path in sources
        for match in re.finditer(r"^.* \w[\w-]*\((?:s|es)\).*$", path.read_text(), re.MULTILINE)
        if '"' in match[0] and " def " not in match[0]
    ]
    assert found == []
