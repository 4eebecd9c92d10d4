"""How far predicted widths and scores can be believed, measured on matched detections."""

import torch
from torch import Tensor


def interval_coverage(interval: Tensor, true_xyxy: Tensor) -> Tensor:
    """Share of true edges inside their interval, by edge: [4].

    Args:
        interval: [M, 4, 2] lower and upper coordinates, see `edge_interval`.
        true_xyxy: [M, 4].
    """
    return ((interval[..., 0] <= true_xyxy) & (true_xyxy <= interval[..., 1])).double().mean(0)


def width_calibration_error(std: Tensor, error: Tensor, bins: int = 10) -> tuple[float, Tensor]:
    """ENCE: predicted width against root mean square error, in bins of equal count.

    Args:
        std: [M] or [M, 4].
        error: of the same shape, any sign.

    Returns:
        Mean of |width - error| / width over the bins; and [bins, 2] width and error of every bin.

    Source: Levi et al., arXiv:1905.11659.
    """
    order = std.flatten().argsort()
    widths = std.flatten().double()[order].square().tensor_split(bins)
    errors = error.flatten().double()[order].square().tensor_split(bins)
    pairs = [torch.stack([w.mean(), e.mean()]).sqrt() for w, e in zip(widths, errors, strict=True) if len(w)]
    table = torch.stack(pairs) if pairs else torch.zeros(0, 2, dtype=torch.float64)
    away = (table[:, 0] - table[:, 1]).abs() / table[:, 0].clamp(min=1e-12)
    return float(away.mean()), table


def detection_calibration_error(score: Tensor, is_true: Tensor, bins: int = 20) -> tuple[float, Tensor]:
    """D-ECE: mean score against precision, in equal bins of score; detections weigh equally.

    Returns:
        The error; and [bins, 3] mean score, precision and count of every bin, NaN where it is empty.

    Source: Küppers et al., arXiv:2004.13546.
    """
    index = (score.double() * bins).long().clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    mean_score = torch.bincount(index, score.double(), bins) / count
    precision = torch.bincount(index, is_true.double(), bins) / count
    away = ((mean_score - precision).abs() * count).nansum() / count.sum().clamp(min=1)
    return float(away), torch.stack([mean_score, precision, count], -1)


def label_aware_calibration_error(score: Tensor, labels: Tensor, is_true: Tensor, iou: Tensor, bins: int = 25) -> float:
    """LaECE: mean score against precision times mean IoU of the true ones, in bins of score, averaged over classes.

    A detector is calibrated in this sense if its score is the chance of being right times how well the box fits.

    Args:
        iou: [M] of the matches; values of unmatched detections do not count.

    Source: Oksuz et al., arXiv:2307.00934.
    """
    errors = []
    for label in labels.unique().tolist():
        own = labels == label
        fit = torch.where(is_true[own], iou[own].double(), 0.0)  # precision * mean IoU of the true ones
        error, _ = detection_calibration_error(score[own], fit, bins)
        errors.append(error)
    return sum(errors) / len(errors) if errors else float("nan")


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN for constant or fewer than two values."""
    if a.numel() < 2:
        return float("nan")
    ranks = torch.stack([_ranks(a.flatten()), _ranks(b.flatten())])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, index, count = torch.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count.double() - 1) / 2)[index]
