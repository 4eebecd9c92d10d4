"""Small annotation files of every format, and mutations of them: values, keys, lines and bytes."""

import copy
import json
from typing import Any
from xml.etree import ElementTree

from hypothesis import strategies as st

COCO: dict[str, Any] = {
    "info": {"year": 2026},
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 2, "file_name": "b.png", "width": 64, "height": 48},
    ],
    "categories": [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 3, "name": "dog", "supercategory": "pets"},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 21, 16], "area": 336, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 3, "bbox": [1.5, 2, 30, 40], "attributes": {"rotation": 30.0}},
        {"id": 3, "image_id": 2, "category_id": 3, "bbox": [5, 5, 10, 10], "area": 100.0, "iscrowd": 1},
    ],
}
YOLO_DATA: dict[str, Any] = {"path": ".", "train": "images", "val": ["images"], "names": {0: "cat", 1: "dog"}, "nc": 2}
YOLO_LABELS = "0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.3 0.2 0.2 0.6\n1 0.3 0.3 0.1 0.1 0.28 0.3 0.33 0.31\n"
VOC = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<annotation><folder>JPEGImages</folder><filename>a.jpg</filename>'
    "<size><width>64</width><height>48</height><depth>3</depth></size><object><name>cat</name><difficult>0</difficult>"
    "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>21</xmax><ymax>16</ymax></bndbox></object><object><name>dog</name>"
    "<bndbox><xmin>10.5</xmin><ymin>2</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object></annotation>"
)


def nested(depth: int = 100) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


SCALARS = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2**31, 2**33, 2**63 - 1, -(2**63), 2**70, 10**400, 0.5, -0.0, 1e30, 1e300]
    ),
    st.sampled_from(
        ["", " ", "1", "0", "1.0", "x", "a.jpg", "../a.jpg", "/etc/passwd", "http://host/a.jpg", "s3://", "a\0b"]
    ),
    st.sampled_from(
        [
            "nan",
            "inf",
            "-1",
            "\ud800",
            "caf\u00e9",
            "cafe\u0301",
            "a" * 300,
            "images\\a.jpg",
            "C:\\images\\a.jpg",
            "%41.jpg",
        ]
    ),
    st.sampled_from(
        ["images", "..", ".", "~", "labels", "a.jpg/b", "*", "file:///tmp", "[", "data.yaml", "\ufeff", "http://[x"]
    ),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=5),
    st.dictionaries(st.text(max_size=6), SCALARS, max_size=3),
    st.builds(nested),
)
INSERTED = [
    "nan",
    "inf",
    "-",
    "[" * 30_000,
    "{a: " * 3000,
    '{"a": ' * 300,
    "a: &a [*a, *a]\n",
    "b: &b {<<: *b}\n",
    "1e999",
    "\n",
    "\r",
    " ",
    "\t",
    "0 ",
    "<",
    "&",
    "]]>",
    "\x85",
    "9" * 30,
]
Path = tuple[Any, ...]


def paths_in(value: Any, path: Path = ()) -> list[Path]:
    """Paths of all values, by key and index."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, child in children for inner in paths_in(child, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """The content with one to three values replaced, removed, repeated or renamed."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_in(content)))
        if not path:
            content = draw(VALUES) if draw(st.integers(0, 20)) == 0 else content
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename"])):
            case "replace":
                parent[path[-1]] = copy.deepcopy(draw(VALUES))
            case "remove":
                del parent[path[-1]]
            case "repeat" if isinstance(parent, list):
                parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = parent.pop(path[-1])
            case _:
                continue
        if not isinstance(content, dict | list):
            break
    return content


@st.composite
def mutated_xml(draw: st.DrawFn, content: str) -> bytes:
    """The document with one to three of its elements given another text, removed, repeated or renamed."""
    root = ElementTree.fromstring(content.encode())
    for _ in range(draw(st.integers(1, 3))):
        parents = [element for element in root.iter() if len(element)]
        if not parents:
            break
        parent = draw(st.sampled_from(parents))
        at = draw(st.integers(0, len(parent) - 1))
        match draw(st.sampled_from(["text", "text", "text", "remove", "repeat", "rename"])):
            case "text":
                text = str(draw(SCALARS))[:400]
                parent[at].text = "".join(sign for sign in text if sign.isprintable() or sign in " \n")
            case "remove":
                parent.remove(parent[at])
            case "repeat":
                parent.append(copy.deepcopy(parent[at]))
            case _:
                parent[at].tag = draw(st.sampled_from(["name", "object", "xmin", "size", "part", "other"]))
    return ElementTree.tostring(root, encoding="utf-8")


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with one to three of them cut, changed, inserted, or in another encoding."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        until = min(len(content), at + draw(st.integers(0, 12)))
        match draw(st.sampled_from(["cut", "change", "change", "insert", "encode", "mark"])):
            case "cut":
                content = content[:at] if draw(st.booleans()) else content[:at] + content[until:]
            case "change":
                content = content[:at] + draw(st.binary(max_size=4)) + content[until:]
            case "insert":
                text = draw(st.sampled_from(INSERTED))
                content = content[:at] + text.encode() + content[at:]
            case "encode":
                text = content.decode("utf-8", errors="replace")
                content = text.encode(
                    draw(st.sampled_from(["utf-16", "utf-8-sig", "gb2312", "latin-1"])), errors="replace"
                )
            case _:
                content = (
                    draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\x1f\x8b"])) + content
                )
    return content


def as_json(content: Any) -> bytes:
    """JSON of any content; numbers that JSON lacks are written as Python writes them."""
    return json.dumps(content, default=str).encode()
