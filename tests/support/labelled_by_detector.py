"""Images whose ground truth follows from a detector, so that an untrained one can be calibrated."""

from dataclasses import replace

import numpy as np

from dfine_core import LoadedDetector
from pipeline.data.shards.records import ImageRecord
from tests.support.synthetic_shards import synthetic_records


def labelled_by(loaded: LoadedDetector, count: int) -> list[ImageRecord]:
    """Images whose true boxes are most of the detector's own, moved by noise in proportion to its deviations."""
    generator = np.random.default_rng(0)
    records = []
    for record in synthetic_records(count, longest_side=64):
        (found,) = loaded([record.image], threshold=0.3, coverage=0.5)
        assert found.edge_std_px is not None
        kept = generator.random(len(found)) < 0.4 + 0.5 * found.scores.numpy()
        noise = generator.normal(0, 0.4, (len(found), 4)) * found.edge_std_px.numpy()
        boxes = (found.boxes.numpy() + noise)[kept].astype(np.float32)
        areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(np.float32)
        labels, crowd = found.labels.numpy()[kept].astype(np.int32), np.zeros(int(kept.sum()), bool)
        records.append(replace(record, boxes=boxes, labels=labels, areas=areas, crowd=crowd))
    return records
