"""Measurements of unlabelled images: boxes with their doubts, pooled features, and the hash that finds near-duplicates."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy
from dfine_core.inference import LoadedDetector
from dfine_core.uncertainty import edge_std
from pipeline import storage
from pipeline.data.prepare.split_off import gradient_bits
from pipeline.errors import UserError
from pipeline.labelling.expected_error import doubtful_boxes
from pipeline.labelling.plan import SelectPlan
from pipeline.predict.inputs import Inputs, read_images
from pipeline.predict.partition import BATCHES_AHEAD, DecodedImage, PartCounts, decode_ahead
from pipeline.predict.plan import part_uri

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("frame", pa.int64()),  # index of the video frame, from 0
        ("width", pa.int32()),  # null if the image could not be read, as all that follows but the reason
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # flat [4K], xyxy in pixels as stored; best first
        ("labels", pa.list_(pa.int32())),  # [K]
        ("scores", pa.list_(pa.float32())),  # [K] calibrated, if the detector is
        ("score_error", pa.float32()),  # expected errors, summed over the boxes; see `DoubtfulBoxes`
        ("edge_error", pa.float32()),
        ("features", pa.list_(pa.float32())),  # [D] of the encoder's coarsest map, mean over the image
        ("gradient_hash", pa.uint64()),
        ("rejected", pa.string()),  # reason if the image could not be read
    ]
)


def measure_batch(loaded: LoadedDetector, pixels: Tensor, sizes: Tensor) -> list[dict[str, Any]]:
    """Measure a batch: one row per image, with the columns of `SCHEMA` from `boxes` to `gradient_hash`.

    Args:
        loaded: not deployed. One that regresses boxes directly has no widths, and its edges are taken as certain.
        pixels: [B, 3, H, W] uint8.
        sizes: [B, 2] (width, height) of the original images.

    Raises:
        UserError: the detector's numbers are not finite.
    """
    _, output = loaded.predict(pixels, sizes, every_layer=True)
    assert output.encoder_map is not None
    logits, boxes = output.logits.float().cpu(), output.boxes.float().cpu()
    features = output.encoder_map.float().mean((-2, -1)).cpu()  # [B, D]
    if not (logits.isfinite().all() and boxes.isfinite().all() and features.isfinite().all()):
        raise UserError(f"{loaded.origin}: its detections are not finite; the weights of this detector have diverged")
    scores = loaded.calibrated(logits.sigmoid())  # [B, Q, C]
    widths = _relative_std(loaded, output.matching, boxes)
    scale = sizes.float().repeat(1, 2)  # [B, 4]
    rows = []
    for image in range(len(pixels)):
        found = doubtful_boxes(scores[image], boxes_xyxy := cxcywh_to_xyxy(boxes[image]), widths[image])
        rows.append(
            {
                "boxes": (boxes_xyxy[found.query] * scale[image]).flatten().numpy(),
                "labels": found.labels.int().numpy(),
                "scores": found.scores.numpy(),
                "score_error": float(found.score_error.sum()),
                "edge_error": float(found.edge_error.sum()),
                "features": features[image].numpy(),
                "gradient_hash": gradient_bits(Image.fromarray(pixels[image].permute(1, 2, 0).cpu().numpy())),
            }
        )
    return rows


def _relative_std(loaded: LoadedDetector, matching: Any, boxes: Tensor) -> Tensor:
    """Standard deviation of every edge over the side that it bounds, [B, Q, 4]."""
    if matching is None or matching.edge_logits is None:
        return torch.zeros_like(boxes)
    std = edge_std(
        matching.edge_logits[-1].float().softmax(-1),
        loaded.detector.decoder.bins,
        matching.initial_boxes,
        loaded.config.reg_scale,
    ).cpu()
    sides = torch.cat([boxes[..., 2:]] * 2, -1)
    return std / sides.clamp(min=torch.finfo(torch.float32).eps)


def write_part(
    loaded: LoadedDetector, inputs: Inputs, plan: SelectPlan, part: int, out: str, threads: int
) -> PartCounts:
    """Measure all images of a part, and write its file below `out`."""
    rows: list[dict[str, Any]] = []
    batch: list[DecodedImage] = []

    def measure() -> None:
        pixels = torch.cat([decoded.pixels for decoded in batch if decoded.pixels is not None])
        sizes = torch.tensor([[decoded.row["width"], decoded.row["height"]] for decoded in batch])
        for decoded, measured in zip(batch, measure_batch(loaded, pixels, sizes), strict=True):
            decoded.row.update(measured)
        batch.clear()

    images = read_images(inputs, *plan.image_range(part))
    for decoded in decode_ahead(images, loaded.config.input_size, threads, BATCHES_AHEAD * plan.batch_size):
        rows.append(decoded.row)
        batch += [decoded] if decoded.pixels is not None else []
        if len(batch) == plan.batch_size:
            measure()
    if batch:
        measure()
    with storage.open_atomic(part_uri(out, part)) as file:
        kept = [{name: row.get(name) for name in SCHEMA.names} for row in rows]
        pq.write_table(pa.Table.from_pylist(kept, SCHEMA), file, compression="zstd")
    return PartCounts(
        images=len(rows),
        detections=sum(len(row["labels"]) for row in rows),
        rejected=sum(row["rejected"] is not None for row in rows),
    )
