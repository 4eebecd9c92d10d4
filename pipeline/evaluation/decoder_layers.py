"""Diagnostics of the decoder layers (FDR, GO-LSD): quality of the boxes, certainty of the edge distributions, and its truth.

They are measured on the queries that are matched by the last layer's boxes. These are the same for all layers, so that layers
can be compared.
"""

import math
import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy, iou
from dfine_core.config import ModelConfig
from dfine_core.loss.matching import match
from dfine_core.model.distribution import weighting_function
from dfine_core.structures import DetectorOutput, Targets
from dfine_core.uncertainty import edge_errors, edge_interval, edge_std

EDGE_NUMBERS = ("edges/coverage_50", "edges/coverage_90", "edges/interval_score", "edges/width_error")
FOUND_IOU = 0.5  # last layer's boxes with less overlap found nothing: their edges are no edges of the object
NARROWEST, PER_OCTAVE, WIDTH_BINS = 2.0**-10, 2, 20  # bins of deviations, in parts of the image


class LayerDiagnostics:
    """Sums over matched (query, box) pairs, kept on the device until `numbers`.

    iou: IoU of predicted and true box, for the initial box and every layer.
    entropy: entropy of an edge's distribution over N bins, in nats; `entropy_share` is its ratio to the maximum, log N.
    end_mass: probability in the two outermost bins; a large one means that the bins do not reach far enough.
    divergence: KL(last layer || layer) in nats at the temperature of the distillation, which GO-LSD minimises.
    The last three are means over four edges, and absent where a detector regresses boxes directly. So are those of the edges of
    found objects, whose last box has an IoU of 0.5 and more:
    coverage: share of true edges in the central 50 or 90 % of the distribution; by layer for 90 %.
    interval_score: Winkler's score of the last layer's 90 % intervals over the side of the true box: mean width, plus 20
    times the distance of edges outside. Lower is better, in calibration and in sharpness.
    width_error: ENCE of the last layer, in bins of predicted deviation that weigh by their edges.
    """

    def __init__(self, config: ModelConfig, device: torch.device):
        self.config = config
        self._distributions = config.regression == "fdr"
        # Rows: IoU, entropy, end mass, divergence. Columns: the initial box, then the layers.
        self._sums = torch.zeros(4, config.num_layers + 1, dtype=torch.float64, device=device)
        # Rows: inside 50 %, inside 90 %, interval score, edges. And by bin of the last layer: variance, squared error, edges.
        self._edges = torch.zeros(4, config.num_layers, dtype=torch.float64, device=device)
        self._widths = torch.zeros(3, WIDTH_BINS, dtype=torch.float64, device=device)
        self._bins = weighting_function(config.reg_max, config.up, config.reg_scale).to(device)
        self._pairs = 0

    @torch.no_grad()
    def update(self, output: DetectorOutput, targets: Targets) -> None:
        """Add the matched pairs of a batch.

        Args:
            output: from `detector(images, every_layer=True)`.
        """
        layers = output.matching
        if layers is None:
            raise ValueError("the output holds the last layer only: call the detector with every_layer=True")
        if targets.total == 0:
            return
        pairs = match([(layers.logits[-1:], targets.labels)], layers.boxes[-1:], targets, self.config.loss).own
        image, query, target = pairs.image[0], pairs.query[0], pairs.target[0]  # [M]
        boxes = torch.cat([layers.initial_boxes[None], layers.boxes])[:, image, query].float()  # [1 + L, M, 4]
        self._sums[0] += iou(cxcywh_to_xyxy(boxes), targets.boxes_xyxy[target]).sum(1)
        if layers.edge_logits is not None:
            edge_logits = layers.edge_logits[:, image, query].float()
            self._sums[1:, 1:] += self._distribution_sums(edge_logits)
            self._add_edges(edge_logits, boxes, targets.boxes_xyxy[target])
        self._pairs += len(pairs)

    def _add_edges(self, edge_logits: Tensor, boxes: Tensor, true: Tensor) -> None:
        """Add the edges of found objects: [L, M, 4, N], [1 + L, M, 4] cxcywh, [M, 4] xyxy."""
        last = cxcywh_to_xyxy(boxes[-1])
        found = (iou(last, true) >= FOUND_IOU).double().unsqueeze(-1).expand(-1, 4)  # [M, 4]
        side = (true[:, 2:] - true[:, :2]).clamp(min=1e-6).repeat(1, 2)  # [M, 4]
        widths = (edge_logits.softmax(-1), self._bins, boxes[0], self.config.reg_scale)
        inside = []
        for mass in (0.5, 0.9):
            interval = edge_interval(*widths, mass)  # [L, M, 4, 2]
            outside = torch.maximum(interval[..., 0] - true, true - interval[..., 1]).clamp(min=0)
            inside.append(((outside == 0) * found).sum((1, 2)))
        score = (interval[..., 1] - interval[..., 0] + 2 / (1 - mass) * outside) / side
        self._edges += torch.stack([*inside, (score * found).sum((1, 2)), found.sum().expand(len(edge_logits))])

        std = edge_std(widths[0][-1], *widths[1:])  # [M, 4]
        index = (PER_OCTAVE * torch.log2(std.clamp(min=1e-12) / NARROWEST)).long().clamp(0, WIDTH_BINS - 1).flatten()
        for row, values in zip(self._widths, (std**2, edge_errors(last, true) ** 2, torch.ones_like(std)), strict=True):
            row.index_add_(0, index, (values * found).flatten())

    def _distribution_sums(self, edge_logits: Tensor) -> Tensor:
        """[L, M, 4, N] to [3, L]: entropy, end mass, divergence, summed over pairs and averaged over edges."""
        log_p = edge_logits.log_softmax(-1)
        p = log_p.exp()
        softened = (edge_logits / self.config.loss.ddf_temperature).log_softmax(-1)
        entropy = -(p * log_p).sum(-1)
        end_mass = p[..., 0] + p[..., -1]
        divergence = (softened[-1].exp() * (softened[-1] - softened)).sum(-1)
        return torch.stack([entropy, end_mass, divergence]).mean(-1).sum(-1)

    def state(self) -> NDArray[np.float64]:
        """All sums and the number of pairs; states of several workers add up."""
        sums = torch.cat([part.flatten() for part in (self._sums, self._edges, self._widths)])
        return np.append(sums.cpu().numpy(), float(self._pairs))

    def numbers(self, state: NDArray[np.float64] | None = None) -> dict[str, float]:
        """Means by name, "layers/iou_initial", "layers/iou_0", ...; NaN if no box was matched.

        Args:
            state: summed over the workers; None for this one's own.
        """
        state = self.state() if state is None else state
        shapes = [tuple(part.shape) for part in (self._sums, self._edges, self._widths)]
        parts = np.split(state[:-1], np.cumsum([math.prod(shape) for shape in shapes])[:-1])
        sums, edges, widths = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        means = (sums / (state[-1] or math.nan)).tolist()
        iou_means, *distribution_means = means
        numbers = {"layers/iou_initial": iou_means[0]}
        numbers |= {f"layers/iou_{layer}": mean for layer, mean in enumerate(iou_means[1:])}
        if self._distributions:
            entropy, end_mass, divergence = (row[1:] for row in distribution_means)
            measures = {
                "entropy": entropy,
                "entropy_share": [value / math.log(self.config.num_bins) for value in entropy],
                "end_mass": end_mass,
                "divergence": divergence[:-1],  # the last layer diverges from itself by zero
            }
            for name, row in measures.items():
                numbers |= {f"layers/{name}_{layer}": mean for layer, mean in enumerate(row)}
            numbers |= _edge_numbers(edges, widths)
        return numbers


def _edge_numbers(edges: NDArray[np.float64], widths: NDArray[np.float64]) -> dict[str, float]:
    """Numbers of the edges of found objects, NaN without any."""
    shares = edges[:3] / np.where(edges[3] > 0, edges[3], math.nan)  # [3, L]
    variance, squared_error, count = widths[:, widths[2] > 0]
    std, error = np.sqrt(variance / count), np.sqrt(squared_error / count)
    away = np.abs(std - error) / np.maximum(std, 1e-12)
    values = (*shares[:, -1].tolist(), float((away * count).sum() / count.sum()) if len(count) else math.nan)
    by_layer = {f"layers/coverage_90_{layer}": share for layer, share in enumerate(shares[1].tolist())}
    return by_layer | dict(zip(EDGE_NUMBERS, values, strict=True))


def by_layer(numbers: dict[str, float], measure: str) -> dict[str, float]:
    """Select one measure of `LayerDiagnostics.numbers`, in the order of the layers: by "initial", "0", "1", ..."""
    matches = ((re.fullmatch(rf"layers/{measure}_(initial|\d+)", name), value) for name, value in numbers.items())
    return {match[1]: value for match, value in matches if match}
