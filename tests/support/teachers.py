"""Teachers for tests: a random tiny vision transformer, detections of true boxes, and a detector in a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from dfine_core.checkpoints.folder import DESCRIPTION, WEIGHTS, make_description
from pipeline.data.prepare.teacher_boxes import prepare_teacher_boxes
from pipeline.data.shards.manifest import load_shards
from pipeline.data.shards.reader import read_annotations
from pipeline.training.checkpoint import weights_as_bytes
from tests.support.small_detectors import small_detector

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tiny_vit(folder: Path, patch_size: int = 16) -> str:
    """Patches of 16 px: DINOv3 with registers; of 14 px: DINOv2."""
    torch.manual_seed(0)
    if patch_size == 16:
        model: Any = DINOv3ViTModel(DINOv3ViTConfig(**TINY, patch_size=16, image_size=64, num_register_tokens=4))
    else:
        model = Dinov2Model(Dinov2Config(**TINY, patch_size=patch_size, image_size=4 * patch_size))
    model.save_pretrained(folder)
    return str(folder)


def detector_folder(folder: Path, **settings: Any) -> str:
    loaded = small_detector(seed=7, **settings)
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(weights_as_bytes(loaded.detector))
    (folder / DESCRIPTION).write_bytes(make_description(loaded.config, loaded.names, loaded.category_ids))
    return str(folder)


def results_of_truth(shard_set: str, score: float = 0.8) -> list[dict[str, Any]]:
    """The true boxes of a shard set as COCO results."""
    shards = load_shards(shard_set)
    ids = [category.original_id for category in shards.categories]
    rows = read_annotations(shards).to_pylist()
    return [
        {
            "image_id": row["image_id"],
            "category_id": ids[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for row in rows
        for label, crowd, (left, top, right, bottom) in zip(
            row["labels"], row["crowd"], zip(*[iter(row["boxes"])] * 4, strict=True), strict=True
        )
        if not crowd
    ]


def teacher_boxes(shard_set: str, folder: Path, score: float = 0.8) -> str:
    """Boxes of a teacher that has found every true box."""
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results_of_truth(shard_set, score)))
    out = str(folder / "boxes")
    prepare_teacher_boxes(load_shards(shard_set), [str(folder / "results.json")], out)
    return out
