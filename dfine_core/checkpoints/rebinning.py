"""FDR heads converted to another number or spacing of bins, so that boxes stay where they were.

    state_dict, report = rebin(state_dict, reg_max=16)
    print(report)  # how far box edges move by it

An edge's distribution lies on offsets v = W(n) / reg_scale, in units of the box's size: that unit survives a change of
reg_scale. Let p be the old probabilities on N bins, p' the new ones on N', c and c' their logits.

1. Split the mass. H[m, n] is linear interpolation of old bin n between its two new neighbours; p' = H p has the same expectation
   whatever p is, so the boxes stay exactly. But logits are summed over the decoder's layers, and only a map linear in
   logits survives a sum. Training puts an offset on its two nearest bins, so a uniform density gives p = w, where w[n] is
   the area of the triangle that falls from 1 at bin n to 0 at its neighbours. To first order about it

       c' - ln q = A0 (c - ln w),    J = H diag(w),    q = J 1,    A0 = diag(1 / q) J,

   which is exact wherever a new bin gets mass of one old bin only (32 -> 64, but for step 2).
2. Fill the gaps. Finer bins leave new ones without any mass; a share of J is therefore diag(w') P, the old log density
   interpolated at the new bins. A larger share makes smoother distributions, a smaller one keeps boxes closer.
3. Sharpen. Where a new bin gets mass of several old ones (32 -> 16), a mean of logits falls short of the logit of the sum, so
   peaks flatten. Therefore A x, read at the old bins by interpolation (Hᵀ), should give x back, and stay near A0 x:

       A = argmin  |x - Hᵀ A x|² / N + |A x - A0 x|² / N'  =  A0 + (H Hᵀ / N + I / N')⁻¹ H (I - Hᵀ A0) / N

Equal bins give A = I. A goes into the last layer of every head, along its bins; the constant ln q - A ln w enters the sum once,
by the bias of the first head. Everything is symmetric about 0, so a symmetric distribution stays symmetric.

The quality estimators (LQE) read the four largest probabilities of every edge, which shrink as bins get finer. Their first layer
takes in an affine map from the new ones to the old ones, fitted to bell-shaped densities.

`benchmarks/rebinning.py` measures all of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfine_core.model.decoder import LQE_TOP
from dfine_core.model.distribution import weighting_function

# How much of the mass comes from interpolated density (step 2). At 1/4, 32 -> 64 moves edges a third as far as at 1, while
# the bins in gaps start 1.4 nats below what their neighbours suggest.
GAP_SHARE = 0.25
_CONSTANTS = ("decoder.up", "decoder.reg_scale", "decoder.decoder.up", "decoder.decoder.reg_scale")


@dataclass(frozen=True)
class Bins:
    """One choice of bins: reg_max + 1 of them, spaced by reg_scale, with their reach set by `up`."""

    reg_max: int
    reg_scale: float
    up: float

    def __post_init__(self) -> None:
        if self.reg_max < 4 or self.reg_max % 2 or self.reg_scale <= 0 or self.up <= 0:
            raise ValueError(f"{self}: reg_max must be even and at least 4, reg_scale and up positive")

    @property
    def offsets(self) -> Tensor:
        """Offsets by which the bins move an edge, [N] float64, in units of the box's size."""
        return weighting_function(self.reg_max, self.up, self.reg_scale).double() / self.reg_scale

    def __str__(self) -> str:
        return f"reg_max {self.reg_max}, reg_scale {self.reg_scale:g}, up {self.up:g}"


@dataclass(frozen=True)
class RebinReport:
    """Conversion that was made, and how far edges of bell-shaped distributions move by it, as a share of the box's size."""

    source: Bins
    target: Bins
    heads: int
    mean_shift: float
    p95_shift: float

    def __str__(self) -> str:
        return (
            f"{self.heads} FDR heads re-binned from {self.source} to {self.target}: edges of bell-shaped distributions"
            f" move by {self.mean_shift:.2%} of the box size (95 %: {self.p95_shift:.2%})"
        )


def rebin(
    state_dict: Mapping[str, Tensor],
    *,
    reg_max: int | None = None,
    reg_scale: float | None = None,
    up: float | None = None,
) -> tuple[dict[str, Tensor], RebinReport]:
    """Convert a detector's weights to distributions on other bins. What is not given stays as it is in `state_dict`.

    Raises:
        ValueError: if the weights have no distributions, or the bins are impossible.
    """
    source = _bins_of(state_dict)
    requested = Bins(
        source.reg_max if reg_max is None else reg_max,
        source.reg_scale if reg_scale is None else reg_scale,
        source.up if up is None else up,
    )
    target = replace(requested, reg_scale=_as_stored(requested.reg_scale), up=_as_stored(requested.up))
    heads = sum(key.startswith("decoder.dec_bbox_head.") and key.endswith(".layers.2.weight") for key in state_dict)
    result = dict(state_dict)
    if source == target:
        return result, RebinReport(source, target, heads, 0.0, 0.0)

    matrix, constant = logit_map(source, target)
    logits = bell_logits(source)
    converted = logits @ matrix.T + constant
    statistics_map = _statistics_map(converted, logits)
    for layer in range(heads):
        head = f"decoder.dec_bbox_head.{layer}.layers.2"
        weight, bias = result[f"{head}.weight"], result[f"{head}.bias"]
        result[f"{head}.weight"] = _along_bins(matrix, weight)
        result[f"{head}.bias"] = _along_bins(matrix, bias) + (constant.repeat(4).to(bias) if layer == 0 else 0)
        quality = f"decoder.decoder.lqe_layers.{layer}.reg_conf.layers.0"
        if f"{quality}.weight" in result:  # a deployed detector keeps only the last
            weight, bias = result[f"{quality}.weight"], result[f"{quality}.bias"]
            result[f"{quality}.weight"], result[f"{quality}.bias"] = _fold(statistics_map, weight, bias)
    for key in _CONSTANTS:
        value = target.up if key.endswith("up") else target.reg_scale
        result[key] = torch.tensor([value], device=result["decoder.up"].device)

    shift = (converted.softmax(-1) @ target.offsets - logits.softmax(-1) @ source.offsets).abs()
    return result, RebinReport(source, target, heads, float(shift.mean()), float(shift.quantile(0.95)))


def logit_map(source: Bins, target: Bins) -> tuple[Tensor, Tensor]:
    """Matrix A [N', N] and constant [N'] of new logits = A (old logits) + constant, float64; derived above."""
    old, new = source.offsets, target.offsets
    old_areas, new_areas = _triangle_areas(old), _triangle_areas(new)
    split = _interpolation(new, at=old).T  # H [N', N]
    joint = (1 - GAP_SHARE) * split * old_areas + GAP_SHARE * new_areas.unsqueeze(1) * _interpolation(old, at=new)
    mass = joint.sum(1)
    first_order = joint / mass.unsqueeze(1)  # A0
    lost = torch.eye(len(old), dtype=old.dtype) - split.T @ first_order
    normal = split @ split.T / len(old) + torch.eye(len(new), dtype=old.dtype) / len(new)
    matrix = first_order + torch.linalg.solve(normal, split @ lost / len(old))
    constant = mass.log() - matrix @ old_areas.log()
    return (matrix + matrix.flip(0, 1)) / 2, (constant + constant.flip(0)) / 2  # symmetric to the last bit


def bell_logits(bins: Bins, positions: int = 65, widths: int = 25) -> Tensor:
    """Logits [positions * widths, N] that training would give Gaussian densities of offsets.

    Means within half the inner reach, deviations from a quarter of the finest bin to the whole reach.
    """
    offsets = bins.offsets
    fine, reach = float(offsets[bins.reg_max // 2 + 1]), float(offsets[-2])
    mean = torch.linspace(-reach / 2, reach / 2, positions, dtype=offsets.dtype).reshape(-1, 1, 1)
    deviation = torch.logspace(math.log10(fine / 4), math.log10(reach), widths, dtype=offsets.dtype).reshape(-1, 1)
    points = torch.linspace(float(offsets[0]), float(offsets[-1]), 4097, dtype=offsets.dtype)
    density = torch.exp(-((points - mean) ** 2) / (2 * deviation**2)).flatten(0, 1)
    probability = density @ _interpolation(offsets, at=points)
    probability = probability / probability.sum(-1, keepdim=True)
    return (probability + 1e-4 / len(offsets)).log()  # a network does not reach zero


def _bins_of(state_dict: Mapping[str, Tensor]) -> Bins:
    bias = state_dict.get("decoder.dec_bbox_head.0.layers.2.bias")
    if bias is None or len(bias) < 4 * 5 or "decoder.reg_scale" not in state_dict:
        raise ValueError(
            "there are no edge distributions to re-bin: the weights are no detector's, or it regresses boxes directly"
        )
    up, reg_scale = float(state_dict["decoder.up"]), float(state_dict["decoder.reg_scale"])
    return Bins(len(bias) // 4 - 1, reg_scale, up)


def _as_stored(value: float) -> float:
    """Round to single precision, which a state dict keeps."""
    return float(torch.tensor(value, dtype=torch.float32))


def _interpolation(bins: Tensor, at: Tensor) -> Tensor:
    """Weights [len(at), len(bins)] that interpolate values on `bins` at each point; constant beyond them."""
    at = at.clamp(bins[0], bins[-1])
    right = torch.searchsorted(bins, at, right=True).clamp(1, len(bins) - 1)
    share = (at - bins[right - 1]) / (bins[right] - bins[right - 1])
    weights = torch.zeros(len(at), len(bins), dtype=bins.dtype)
    rows = torch.arange(len(at))
    weights[rows, right - 1] = 1 - share
    weights[rows, right] = share
    return weights


def _triangle_areas(offsets: Tensor) -> Tensor:
    """Area under every hat_n, [N]."""
    gaps = torch.nn.functional.pad(offsets.diff(), (1, 1))
    return (gaps[:-1] + gaps[1:]) / 2


def _along_bins(matrix: Tensor, tensor: Tensor) -> Tensor:
    """Apply [N', N] to the bins of [4 * N, ...], edge by edge."""
    per_edge = tensor.cpu().double().reshape(4, matrix.shape[1], -1)
    return (matrix @ per_edge).reshape(4 * matrix.shape[0], *tensor.shape[1:]).to(tensor)


def _quality_statistics(logits: Tensor) -> Tensor:
    """Input of LQE for an edge: its largest probabilities and their mean, [..., LQE_TOP + 1]."""
    top = logits.softmax(-1).topk(LQE_TOP, dim=-1).values
    return torch.cat([top, top.mean(-1, keepdim=True)], dim=-1)


def _statistics_map(new_logits: Tensor, old_logits: Tensor) -> Tensor:
    """Least-squares map [S + 1, S] from the statistics of new logits, with a 1 behind, to those of the old ones."""
    new = torch.nn.functional.pad(_quality_statistics(new_logits), (0, 1), value=1.0)
    # The mean repeats the others, so many maps are equally good: take the smallest.
    return torch.linalg.pinv(new, rtol=1e-6) @ _quality_statistics(old_logits)


def _fold(statistics_map: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a linear layer [H, 4 * S] over old statistics as one over new ones."""
    per_edge = weight.cpu().double().unflatten(1, (4, -1))  # [H, 4, S]
    folded = per_edge @ statistics_map[:-1].T
    shift = (per_edge @ statistics_map[-1]).sum(1)
    return folded.flatten(1).to(weight), bias + shift.to(bias)
