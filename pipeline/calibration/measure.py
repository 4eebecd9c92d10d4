"""Detections of a shard set with the widths of their edges."""

from dataclasses import dataclass
from math import ceil
from typing import Self

import torch
from torch import Tensor

from dfine_core.inference import LoadedDetector
from dfine_core.model.postprocess import best_pairs
from dfine_core.uncertainty import DetectedBoxes, TrueBoxes, edge_interval, edge_std
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.stream.stream import evaluation_stream
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluation_mode
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.progress import Progress

LEAST_SCORE = 0.05  # weaker detections are not kept: there are hundreds of them in every image
MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)  # of the distributions' own intervals


@dataclass(frozen=True)
class MeasuredDetections:
    """D detections of all images; boxes and widths in pixels of the stored images."""

    found: DetectedBoxes  # images by their number in the order of the shards
    initial_boxes: Tensor  # [D, 4] cxcywh
    std: Tensor  # [D, 4]
    intervals: Tensor  # [D, len(MASSES), 4, 2] the distributions' own central intervals

    def __getitem__(self, chosen: Tensor) -> Self:
        found = DetectedBoxes(
            self.found.image[chosen], self.found.boxes[chosen], self.found.labels[chosen], self.found.scores[chosen]
        )
        return type(self)(found, self.initial_boxes[chosen], self.std[chosen], self.intervals[chosen])

    @property
    def sides(self) -> Tensor:
        """Side of the initial box across each edge, [D, 4]: width, height, width, height."""
        return torch.cat([self.initial_boxes[:, 2:]] * 2, -1)


@torch.no_grad()
def measure(loaded: LoadedDetector, shards: ShardSet, truth: GroundTruth, *, batch_size: int) -> MeasuredDetections:
    """Detect in all images, in this process.

    Raises:
        UserError: the detector regresses boxes directly, or there is no image.
    """
    detector = loaded.detector
    if loaded.config.regression != "fdr":
        raise UserError(
            f"{loaded.origin}: it regresses boxes directly, so its edges have no distributions to calibrate"
        )
    if not shards.manifest.images:
        raise UserError(f"{shards.uri}: it holds no image to calibrate on")
    number_of = {int(image_id): number for number, image_id in enumerate(truth.image_id)}
    batches = evaluation_stream(
        shards, canvas=loaded.config.input_size, micro_batch_size=batch_size, decode_in="inline"
    )
    parts: list[tuple[Tensor, ...]] = []
    total = ceil(shards.manifest.images / batch_size)
    bar = Progress("detecting", total=total, unit="batch")
    with bar, evaluation_mode(detector), torch.autocast(loaded.device.type, enabled=False):
        for batch in batches:
            real = ~torch.tensor(batch.padding)
            sizes = batch.orig_size.to(loaded.device)
            detections, output = loaded.predict(batch.images, sizes, every_layer=True)
            assert output.matching is not None
            assert output.matching.edge_logits is not None
            _, query, _ = best_pairs(output.logits, detections.scores.shape[1])
            kept = (detections.scores >= LEAST_SCORE) & real.to(loaded.device).unsqueeze(1)  # [B, R]
            image, rank = kept.nonzero(as_tuple=True)
            row = image, query[image, rank]
            scale = sizes.float().repeat(1, 2)[image]  # [K, 4]
            initial = output.matching.initial_boxes[row] * scale
            probabilities = output.matching.edge_logits[-1][row].softmax(-1)  # [K, 4, N]
            widths = (probabilities, detector.decoder.bins, initial, loaded.config.reg_scale)
            number = torch.tensor([number_of[image_id] for image_id in batch.image_id[image.cpu()].tolist()])
            parts.append(
                (
                    number.to(torch.int64),
                    detections.boxes[image, rank].cpu(),
                    detections.labels[image, rank].cpu(),
                    detections.scores[image, rank].cpu(),
                    initial.cpu(),
                    edge_std(*widths).cpu(),
                    torch.stack([edge_interval(*widths, mass) for mass in MASSES], 1).cpu(),
                )
            )
            bar.advance(1)
    number, boxes, labels, scores, initial, std, intervals = (torch.cat(part) for part in zip(*parts, strict=True))
    return MeasuredDetections(DetectedBoxes(number, boxes, labels, scores), initial, std, intervals)


def true_boxes(truth: GroundTruth) -> TrueBoxes:
    """Ground truth as tensors; images by their number in the order of the shards."""
    return TrueBoxes(
        image=torch.tensor(truth.image),
        boxes=torch.tensor(truth.box),
        labels=torch.tensor(truth.label, dtype=torch.int64),
        crowd=torch.tensor(truth.ignored),
    )
