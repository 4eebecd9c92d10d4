"""Diagnostics of the decoder layers (FDR, GO-LSD): quality of the boxes, and certainty of the edge distributions.

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
from dfine_core.structures import DetectorOutput, Targets


class LayerDiagnostics:
    """Sums over matched (query, box) pairs, kept on the device until `numbers`.

    iou: IoU of predicted and true box, for the initial box and every layer.
    entropy: entropy of an edge's distribution over N bins, in nats; `entropy_share` is its ratio to the maximum, log N.
    end_mass: probability in the two outermost bins; a large one means that the bins do not reach far enough.
    divergence: KL(last layer || layer) in nats at the temperature of the distillation, which GO-LSD minimises.
    The last three are means over four edges, and absent where a detector regresses boxes directly.
    """

    def __init__(self, config: ModelConfig, device: torch.device):
        self.config = config
        self._distributions = config.regression == "fdr"
        # Rows: IoU, entropy, end mass, divergence. Columns: the initial box, then the layers.
        self._sums = torch.zeros(4, config.num_layers + 1, dtype=torch.float64, device=device)
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
            self._sums[1:, 1:] += self._distribution_sums(layers.edge_logits[:, image, query].float())
        self._pairs += len(pairs)

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
        return np.append(self._sums.cpu().numpy().ravel(), float(self._pairs))

    def numbers(self, state: NDArray[np.float64] | None = None) -> dict[str, float]:
        """Means by name, "layers/iou_initial", "layers/iou_0", ...; NaN if no box was matched.

        Args:
            state: summed over the workers; None for this one's own.
        """
        state = self.state() if state is None else state
        means = (state[:-1].reshape(tuple(self._sums.shape)) / (state[-1] or math.nan)).tolist()
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
        return numbers


def by_layer(numbers: dict[str, float], measure: str) -> dict[str, float]:
    """Select one measure of `LayerDiagnostics.numbers`, in the order of the layers: by "initial", "0", "1", ..."""
    matches = ((re.fullmatch(rf"layers/{measure}_(initial|\d+)", name), value) for name, value in numbers.items())
    return {match[1]: value for match, value in matches if match}
