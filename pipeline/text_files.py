"""Text and YAML in files that people and tools write: every usual encoding, and a bound on what aliases stand for."""

import codecs
from collections.abc import Hashable
from typing import Any

import yaml

MOST_ALIASED_VALUES = 1_000_000  # that aliases add to the values of a document

# Byte order marks; that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def encoding_of(data: bytes) -> str:
    """Encoding that the first bytes of a text state or show; UTF-8 if they do neither."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    if b"\0" in data[:2]:  # an ASCII character of two bytes
        return "unmarked UTF-16"
    return "UTF-8"


def text_of(data: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        ValueError: it has another encoding, or holds characters that no text has.
    """
    encoding = encoding_of(data)
    try:
        text = data.decode({"UTF-8": "utf-8-sig", "UTF-16": "utf-16"}.get(encoding, "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from None
    if "\0" in text:
        reason = "it holds NUL characters" if encoding == "UTF-8" else f"it seems to be {encoding}"
        raise ValueError(f"not UTF-8 text ({reason}); save it as UTF-8")
    return text


def load_yaml(text: str, *, unique_keys: bool = False) -> Any:
    """Parse YAML to plain values.

    Args:
        unique_keys: a key that is given twice is an error.

    Raises:
        ValueError: not YAML, nested too deeply, or of aliases that stand for millions of values.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeys if unique_keys else _Bounded)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, OverflowError, AttributeError) as error:  # AttributeError: PyYAML's, for some wrong tags
        raise ValueError(str(error)) from None


class _Bounded(yaml.SafeLoader):
    """The safe loader, for documents whose aliases may be followed without end."""

    def get_single_node(self) -> Any:
        """Compose the only document of the stream."""
        node = super().get_single_node()
        if node is not None:
            sizes: dict[int, int] = {}
            if _expanded(node, sizes) > len(sizes) + MOST_ALIASED_VALUES:
                raise ValueError(f"its aliases stand for more than {MOST_ALIASED_VALUES:,} values")
        return node


class _UniqueKeys(_Bounded):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values of a node with all aliases followed; a node inside itself has more than any limit."""
    if (known := sizes.get(id(node))) is not None:
        return known
    sizes[id(node)] = 2 * MOST_ALIASED_VALUES  # found again below itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = sizes[id(node)] = 1 + sum(_expanded(child, sizes) for child in children)
    return size
