"""Mutated annotation files: each ends in a result, in listed rejections, or in a UserError, never in another exception."""

import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.prepare.shard_writer import WORK_LIST, PrepareOptions, write_shard
from pipeline.data.prepare.work_plan import write_work_list
from pipeline.data.sources.coco import coco_source
from pipeline.data.sources.index import AnnotationIndex, DatasetSource
from pipeline.data.sources.voc import voc_source
from pipeline.data.sources.yolo import yolo_source
from pipeline.errors import UserError
from tests.support.fuzzed_annotations import (
    COCO,
    VOC,
    YOLO_DATA,
    YOLO_LABELS,
    as_json,
    mutated,
    mutated_bytes,
    mutated_xml,
)

QUICK, LONG = 70, 7000  # examples of each format


def outcome(folder: Path, open_source: Callable[[], DatasetSource]) -> str:
    """Prepare what there is, in this process. An exception other than UserError is a failure."""
    out = str(folder / "out")
    try:
        with closing(AnnotationIndex()) as index:
            categories = open_source().fill(index)
            images = index.finish()
            rejected = list(index.rejected())
            if not images:
                return "rejected" if rejected else "empty"
            write_work_list(index, f"{out}/{WORK_LIST}", images=images, rows_per_shard=images)
        receipt = write_shard(out, 0, PrepareOptions(), len(categories))
        return "rejected" if rejected or receipt.rejected else "prepared"
    except UserError as error:
        return "refused" if str(error).strip() else "refused without a word"
    finally:
        shutil.rmtree(out, ignore_errors=True)


def data_set(folder: Path) -> Path:
    """Two images, and annotations of every format around them."""
    for name in ("images/a.jpg", "images/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), "red").save(folder / name)
    for name, text in (("labels/a.txt", YOLO_LABELS), ("labels/b.txt", ""), ("data.yaml", yaml.safe_dump(YOLO_DATA))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, text in (
        ("voc/Annotations/a.xml", VOC),
        ("voc/Annotations/b.xml", VOC),
        ("voc/ImageSets/Main/train.txt", "a\nb\n"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copytree(folder / "images", folder / "voc/JPEGImages", dirs_exist_ok=True)
    return folder


def coco(folder: Path, draw: st.DataObject) -> str:
    content = as_json(draw.draw(mutated(COCO)))
    path = folder / "instances.json"
    path.write_bytes(draw.draw(mutated_bytes(content)) if draw.draw(st.integers(0, 3)) == 0 else content)
    return outcome(folder, lambda: coco_source(str(folder / "images"), str(path)))


def yolo(folder: Path, draw: st.DataObject) -> str:
    data, labels = yaml.safe_dump(YOLO_DATA).encode(), YOLO_LABELS.encode()
    if draw.draw(st.booleans()):
        labels = draw.draw(mutated_bytes(labels))
    elif draw.draw(st.booleans()):
        data = draw.draw(mutated_bytes(data))
    else:
        data = as_json(draw.draw(mutated({**YOLO_DATA, "names": ["cat", "dog"], "kpt_shape": [2, 2]})))
    (folder / "data.yaml").write_bytes(data)
    (folder / "labels/a.txt").write_bytes(labels)
    return outcome(folder, lambda: yolo_source(folder / "data.yaml", "train"))


def voc(folder: Path, draw: st.DataObject) -> str:
    broken = draw.draw(st.integers(0, 3)) == 0
    (folder / "voc/Annotations/a.xml").write_bytes(
        draw.draw(mutated_bytes(VOC.encode()) if broken else mutated_xml(VOC))
    )
    listing = b"a\nb\n"
    changed = draw.draw(mutated_bytes(listing)) if draw.draw(st.integers(0, 3)) == 0 else listing
    (folder / "voc/ImageSets/Main/train.txt").write_bytes(changed)
    return outcome(folder, lambda: voc_source(folder / "voc", "train"))


FORMATS = (coco, yolo, voc)


def fuzz(mutate: Callable[[Path, st.DataObject], str], folder: Path, examples: int) -> Counter[str]:
    """Run so many examples; return how they ended."""
    ends: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == QUICK,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(st.data())
    def run(draw: st.DataObject) -> None:
        ends[mutate(folder, draw)] += 1

    run()
    return ends


@pytest.mark.parametrize("mutate", FORMATS)
def test_mutated_annotations_end_in_a_result_or_a_sentence(
    tmp_path: Path, mutate: Callable[[Path, st.DataObject], str]
) -> None:
    ends = fuzz(mutate, data_set(tmp_path), QUICK)
    assert ends.total() >= QUICK
    assert ends["refused"] > 0 < ends["prepared"] + ends["rejected"]
    assert not ends["refused without a word"]


@pytest.mark.slow
@pytest.mark.parametrize("mutate", FORMATS)
def test_twenty_thousand_mutated_annotations_end_in_a_result_or_a_sentence(
    tmp_path: Path, mutate: Callable[[Path, st.DataObject], str]
) -> None:
    ends = fuzz(mutate, data_set(tmp_path), LONG)
    assert len(FORMATS) * LONG > 20_000
    assert ends.total() >= LONG
    assert min(ends["refused"], ends["prepared"], ends["rejected"]) > 0
    assert not ends["refused without a word"]
