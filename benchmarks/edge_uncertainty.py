"""Reliability of the edge distributions of a trained detector, on detections that are stored with their true boxes.

    python -m benchmarks.edge_uncertainty tests/golden/fdr_real.npz

The file has `bins`, `det_score`, `det_label`, `det_box`, `det_image`, `gt_*`, and for its matched detections the initial box and
the probabilities of every edge: `edge_*` as in the tests' recording, or `det_*` for all detections.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfine_core.uncertainty import (
    CROWD,
    DetectedBoxes,
    TrueBoxes,
    detection_calibration_error,
    edge_errors,
    edge_interval,
    edge_std,
    fit_edge_calibration,
    fit_score_calibration,
    interval_coverage,
    match_for_calibration,
    rank_correlation,
    width_calibration_error,
)

REG_SCALE, LEAST_SCORE = 4.0, 0.3


def main() -> None:
    """Print the numbers."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("file", type=Path, help=".npz, without pickles")
    with np.load(arguments.parse_args().file) as arrays:
        content = dict(arrays)

    # 1. Matches of all detections, and the edges of the matched ones.
    found = DetectedBoxes(
        image=_tensor(content["det_image"]).long(),
        boxes=_tensor(content["det_box"]),
        labels=_tensor(content["det_label"]).long(),
        scores=_tensor(content["det_score"]),
    )
    truth = TrueBoxes(
        image=_tensor(content["gt_image"]).long(),
        boxes=_tensor(content["gt_box"]),
        labels=_tensor(content["gt_label"]).long(),
        crowd=_tensor(content["gt_crowd"]).bool(),
    )
    match = match_for_calibration(found, truth)
    rows, initial, probabilities = _edges(content, match, found.scores)
    bins, true = _tensor(content["bins"]).float(), truth.boxes[match[rows]]
    std, errors = edge_std(probabilities, bins, initial, REG_SCALE), edge_errors(found.boxes[rows], true)
    side = torch.cat([initial[:, 2:]] * 2, -1)
    print(f"{len(rows):,} matched detections scored {LEAST_SCORE:g} and more")

    # 2. Widths.
    for mass in (0.5, 0.8, 0.9, 0.95, 0.99):
        held = interval_coverage(edge_interval(probabilities, bins, initial, REG_SCALE, mass), true).mean()
        print(f"central {100 * mass:g} % interval holds {100 * held:.1f} %")
    print(
        f"ENCE {width_calibration_error(std, errors)[0]:.3f}, one std holds {100 * (errors <= std).double().mean():.1f} %"
    )
    print(
        f"rank correlation of std and |error|: {rank_correlation(std, errors):.3f} in pixels,"
        f" {rank_correlation(std / side, errors / side):.3f} over the side"
    )
    for joint, what in ((False, "each edge"), (True, "all four edges")):
        print(f"conformal factor at 90 %, {what}: {fit_edge_calibration(std, errors, joint=joint).factor:.3f}")

    # 3. Width of intervals at equal coverage, fitted to one half and measured on the other.
    for name, width in (("std", std), ("side", side), ("constant", torch.ones_like(std))):
        half = fit_edge_calibration(width[::2], errors[::2]).half_width(width[1::2])
        inside = (errors[1::2] <= half).double().mean()
        print(f"90 % interval by {name}: {2 * half.mean():.1f} px wide, holds {100 * inside:.1f} %")

    # 4. Scores.
    counted = (match != CROWD) & (found.scores >= LEAST_SCORE)
    score, is_true = found.scores[counted], match[counted] >= 0
    fitted = fit_score_calibration(score, is_true)
    before, after = (detection_calibration_error(each, is_true)[0] for each in (score, fitted(score)))
    print(f"D-ECE {before:.3f}, {after:.3f} after one temperature of {fitted.temperature:.3f}")


def _edges(content: Mapping[str, Any], match: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of matched detections, their initial boxes and probabilities."""
    if "edge_rows" in content:
        return (
            _tensor(content["edge_rows"]).long(),
            _tensor(content["edge_reference_box"]),
            _tensor(content["edge_probability"]),
        )
    rows = ((match >= 0) & (scores >= LEAST_SCORE)).nonzero().squeeze(1)
    return rows, _tensor(content["det_reference_box"])[rows], _tensor(content["det_edge_probability"])[rows]


def _tensor(array: "np.ndarray[Any, Any]") -> Tensor:
    return torch.from_numpy(array)


if __name__ == "__main__":
    main()
