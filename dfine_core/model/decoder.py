"""Decoder: queries attend to the encoder's maps and refine the distributions of their box edges, layer by layer.

FDR as it happens here (see `distribution` for the arithmetic): the first layer predicts an *initial box* for every query and
zero-centred edge distributions around it. Each layer adds its own logits to the sum of those before it; the sum, not the box,
is what is refined. A layer's box is the initial box moved by the expectation of its distributions, and centres the next
layer's attention. Gradients reach the heads of all earlier layers through the sum, but neither through boxes
nor through the initial box, so every layer is trained on its own step.

Attribute names follow the released state dict.

Source: D-FINE, arXiv:2410.13842.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from dfine_core.boxes import inverse_sigmoid
from dfine_core.config import ModelConfig
from dfine_core.model import distribution, sampling
from dfine_core.model.attention import DeformableAttention, Levels, split_levels
from dfine_core.model.layers import (
    ACTIVATIONS,
    MLP,
    ConvNorm,
    SelfAttention,
    TableCache,
    additive_mask,
    bias_for_prior,
    mlps_side_by_side,
    side_by_side,
)
from dfine_core.model.products import Linear
from dfine_core.structures import DenoisingQueries, DetectorOutput, QueryPredictions

LQE_TOP = 4  # largest probabilities per edge, the quality estimator's input
FFN_LIMIT = 65504.0  # the largest half-precision number


class Gate(nn.Module):
    """Weighted sum of the query and its attended content, channel by channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = Linear(2 * dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)  # both halves start at a weight of one half

    def forward(self, query: Tensor, attended: Tensor) -> Tensor:
        """Combine two tensors [B, Q, D]."""
        keep, take = self.gate(torch.cat([query, attended], dim=-1)).sigmoid().chunk(2, dim=-1)
        return self.norm(keep * query + take * attended)


class DecoderLayer(nn.Module):
    """Self-attention among queries, gated deformable attention to the maps, feed-forward network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, heads = config.decoder_dim, config.decoder_heads
        self.self_attn = SelfAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, heads, config.num_points, config.sampling)
        self.gateway = Gate(dim)
        self.activation = config.activation
        self.linear1 = Linear(dim, config.decoder_ffn_dim)
        self.linear2 = Linear(config.decoder_ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, x: Tensor, position: Tensor, reference_boxes: Tensor, levels: Levels, mask: Tensor | None
    ) -> Tensor:
        """Return the refined content [B, Q, D].

        Args:
            x: [B, Q, D] content of the queries.
            position: [B, Q, D].
            reference_boxes: [B, Q, 4] cxcywh.
            levels: see `split_levels`.
            mask: [Q, Q] added to the attention's logits.
        """
        x = self.norm1(x + self.self_attn(x, position, mask))
        x = self.gateway(x, self.cross_attn(x + position, reference_boxes, levels))
        y = x + self.linear2(ACTIVATIONS[self.activation](self.linear1(x)))
        return self.norm3(y.clamp(-FFN_LIMIT, FFN_LIMIT))


class QualityEstimator(nn.Module):
    """Location quality estimation (LQE): peaked edge distributions raise the class scores, flat ones lower them."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.reg_conf = MLP([4 * (LQE_TOP + 1), 64, 1], activation)
        self.reg_conf.zero_last()

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return a correction of all class logits [..., 1] from edge distributions [..., 4, N]."""
        return self.reg_conf(edge_statistics(probabilities))


def edge_statistics(probabilities: Tensor) -> Tensor:
    """Largest probabilities of every edge and their mean, [..., 4, N] to [..., 4 * (LQE_TOP + 1)]."""
    top = probabilities.topk(LQE_TOP, dim=-1).values
    return torch.cat([top, top.mean(-1, keepdim=True)], dim=-1).flatten(-2)


class DecoderStack(nn.Module):
    """Container of the layers and the quality estimators, as the released state dict has them."""

    def __init__(self, config: ModelConfig, up: nn.Parameter, reg_scale: nn.Parameter):
        super().__init__()
        self.up, self.reg_scale = up, reg_scale
        layer = DecoderLayer(config)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(config.num_layers))
        if config.regression == "fdr":
            self.lqe_layers = nn.ModuleList(QualityEstimator(config.activation) for _ in range(config.num_layers))


class EncoderOutput(nn.Module):
    """Projection of the encoder's tokens before they are scored."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.proj.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens [B, T, D]."""
        return self.norm(self.proj(tokens))


class Decoder(nn.Module):
    """Query selection, decoder layers and heads of the whole decoder."""

    bins: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim, classes, layers = config.decoder_dim, config.num_classes, config.num_layers
        # Constants, kept as parameters because the released state dict has them (twice).
        self.up = nn.Parameter(torch.tensor([config.up]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([config.reg_scale]), requires_grad=False)
        bins = distribution.weighting_function(config.reg_max, config.up, config.reg_scale)
        self.register_buffer("bins", bins, persistent=False)
        self._tables = TableCache()

        projections = [
            nn.Identity() if config.encoder_dim == dim else _projection(config.encoder_dim, dim)
            for _ in range(config.num_levels)
        ]
        self.input_proj = nn.ModuleList(projections)
        self.decoder = DecoderStack(config, self.up, self.reg_scale)

        self.denoising_class_embed = nn.Embedding(classes + 1, dim, padding_idx=classes)
        if config.learn_query_content:
            self.tgt_embed = nn.Embedding(config.num_queries, dim)
            nn.init.xavier_uniform_(self.tgt_embed.weight)
        self.query_pos_head = MLP([4, 2 * dim, dim], config.activation)
        for linear in self.query_pos_head.layers:
            nn.init.xavier_uniform_(cast(nn.Linear, linear).weight)

        self.enc_output = EncoderOutput(dim)
        self.enc_score_head = _score_head(dim, 1 if config.query_selection == "agnostic" else classes)
        self.enc_bbox_head = _box_head(dim, 4, config.activation)
        self.dec_score_head = nn.ModuleList(_score_head(dim, classes) for _ in range(layers))
        self.pre_bbox_head = _box_head(dim, 4, config.activation)
        outputs = 4 * config.num_bins if config.regression == "fdr" else 4
        self.dec_bbox_head = nn.ModuleList(_box_head(dim, outputs, config.activation) for _ in range(layers))

    def forward(
        self, maps: list[Tensor], denoising: DenoisingQueries | None = None, every_layer: bool = False
    ) -> DetectorOutput:
        """Detect on the encoder's maps, fine to coarse.

        `denoising` queries are put before the others. With `every_layer`, and always in training, the output also has
        the predictions of each layer.
        """
        every_layer = every_layer or self.training
        maps = [project(x) for project, x in zip(self.input_proj, maps, strict=True)]
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # [B, T, D]

        content, reference_logits, encoder_logits = self._select_queries(memory, shapes)
        encoder_boxes = reference_logits.sigmoid()
        content, reference_logits = content.detach(), reference_logits.detach()
        if self.config.learn_query_content:
            content = self.tgt_embed.weight.unsqueeze(0).expand(memory.shape[0], -1, -1)

        allowed = None
        if denoising is not None:
            noised = self.denoising_class_embed(denoising.labels).to(content.dtype)
            content = torch.cat([noised, content], dim=1)
            reference_logits = torch.cat([denoising.reference_logits, reference_logits], dim=1)
            allowed = ~denoising.attention_mask if denoising.labels.shape[1] else None
        elif self.training:
            # Every parameter takes part in every step, or DistributedDataParallel would wait for its gradient.
            content = content + 0 * self.denoising_class_embed.weight.sum()

        fused = self.config.sampling == "default" and sampling.usable(memory, len(shapes))
        levels = split_levels(memory, shapes, self.config.decoder_heads, fused=fused)
        predictions = self._refine(content, reference_logits, levels, allowed, every_layer)
        edges = None if predictions.edge_logits is None or self.training else predictions.edge_logits[-1]
        if not every_layer:
            return DetectorOutput(
                logits=predictions.logits[-1],
                boxes=predictions.boxes[-1],
                edge_logits=edges,
                initial_boxes=predictions.initial_boxes,
            )
        noised_part, matching = predictions.split(0 if denoising is None else denoising.labels.shape[1])
        return DetectorOutput(
            logits=matching.logits[-1],
            boxes=matching.boxes[-1],
            edge_logits=edges,
            initial_boxes=None if self.training else predictions.initial_boxes,
            matching=matching,
            denoising=None if denoising is None else noised_part,
            denoising_queries=denoising,
            encoder_logits=encoder_logits,
            encoder_boxes=encoder_boxes,
            joined=None if denoising is None else predictions,
        )

    def _select_queries(self, memory: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Select the best tokens as queries: content [B, Q, D], reference logits [B, Q, 4], class logits [B, Q, C or 1]."""
        anchor_logits, usable = self._tables.get(
            (tuple(shapes), memory.device, memory.dtype), lambda: _anchor_tables(shapes, memory)
        )
        encoded = self.enc_output(memory * usable)
        logits = self.enc_score_head(encoded)
        queries = self.config.num_queries
        if self.config.query_selection == "one2many":
            token = logits.flatten(1).topk(queries, dim=1).indices // logits.shape[-1]
        else:  # agnostic scores have one class
            token = logits.amax(-1).topk(queries, dim=1).indices
        token = token.unsqueeze(-1)
        content = encoded.gather(1, token.expand(-1, -1, encoded.shape[-1]))
        # Not len(memory): a whole number, which would tie an exported graph to its batch.
        chosen = anchor_logits.expand(memory.shape[0], -1, -1).gather(1, token.expand(-1, -1, 4))
        return (
            content,
            self.enc_bbox_head(content).float() + chosen,
            logits.gather(1, token.expand(-1, -1, logits.shape[-1])),
        )

    def _refine(
        self,
        x: Tensor,
        reference_logits: Tensor,
        levels: Levels,
        allowed: Tensor | None,
        every_layer: bool,
    ) -> QueryPredictions:
        """Run the layers; without `every_layer` only the last one is scored and kept."""
        config = self.config
        last = config.num_layers - 1
        previous: Tensor | None = None  # content of the layer before, detached
        edge_logits: Tensor | None = None
        reference = reference_logits.sigmoid()
        kept: list[int] = []  # layers
        contents, boxes, edges = [], [], []
        mask = None if allowed is None else additive_mask(allowed, x)

        for index, layer in enumerate(self.decoder.layers):
            near = reference.to(x.dtype)
            position = self.query_pos_head(near).clamp(-10, 10)
            x = layer(x, position, near, levels, mask)
            if index == 0:
                initial_boxes = (self.pre_bbox_head(x).float() + inverse_sigmoid(reference)).sigmoid()
                reference = initial_boxes.detach()
            step = self.dec_bbox_head[index](x if previous is None else x + previous)
            if config.regression == "fdr":
                step = step.unflatten(-1, (4, config.num_bins))
                step = step.float() if config.numerics == "float32" else step
                edge_logits = step if edge_logits is None else step + edge_logits
                if index < last:  # gradients come from the boxes of all layers, decoded at once below
                    reference = self._decode(
                        edge_logits.detach().softmax(-1), edge_logits.dtype, initial_boxes.detach()
                    )
            else:
                moved = (step.float() + inverse_sigmoid(reference)).sigmoid()
                reference = moved.detach()
            if every_layer or index == last:
                kept.append(index)
                contents.append(x)
                if edge_logits is not None:
                    edges.append(edge_logits)
                else:
                    boxes.append(moved)
            previous = x.detach()

        if edges:
            every_edge = torch.stack(edges)
            probabilities = every_edge.softmax(-1)
            moved = self._decode(probabilities, every_edge.dtype, initial_boxes.detach())
        else:
            every_edge, probabilities, moved = None, None, torch.stack(boxes)
        class_logits, scores = self._score(kept, contents, probabilities)
        return QueryPredictions(
            logits=scores,
            boxes=moved,
            edge_logits=every_edge,
            initial_logits=class_logits[0],
            initial_boxes=initial_boxes,
        )

    def _score(self, layers: list[int], contents: list[Tensor], probabilities: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class logits of layers, and the same corrected by the quality of their distributions: [L, B, Q, C] each."""
        heads = [cast(nn.Linear, self.dec_score_head[index]) for index in layers]
        shape = contents[0].shape[:2]
        logits = side_by_side(heads, torch.stack(contents).flatten(1, 2)).unflatten(1, shape)
        if probabilities is None:
            return logits, logits
        estimators = [cast(QualityEstimator, self.decoder.lqe_layers[index]).reg_conf for index in layers]
        statistics = edge_statistics(probabilities).flatten(1, 2)
        return logits, logits + mlps_side_by_side(estimators, statistics).unflatten(1, shape)

    def _decode(self, probabilities: Tensor, dtype: torch.dtype, initial_boxes: Tensor) -> Tensor:
        """Decode edge distributions [..., 4, N] to boxes [..., 4]; outside autocast unless `numerics` is "released"."""
        full_precision = torch.autocast(probabilities.device.type, enabled=False)
        with full_precision if self.config.numerics == "float32" else nullcontext():
            offsets = distribution.expectation(probabilities, self.bins.to(dtype))
        return distribution.decode_boxes(initial_boxes, offsets.float(), self.config.reg_scale)

    def deploy(self, *, as_released: bool = False) -> None:
        """Drop the parts that evaluation does not use: scores and quality of all layers but the last.

        Projections are fused with their norms, which the release leaves as they are.
        """
        for projection in () if as_released else self.input_proj:
            if isinstance(projection, ConvNorm):
                projection.fuse()
        last = self.config.num_layers - 1
        for index in range(last):
            self.dec_score_head[index] = nn.Identity()
            if self.config.regression == "fdr":
                self.decoder.lqe_layers[index] = nn.Identity()


def anchors(shapes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """One anchor per feature position: logits of cxcywh [1, T, 4] and a mask of the usable ones [1, T, 1].

    Anchors that touch the border are not; their logits are infinite and their tokens are blanked.
    """
    per_level = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(
            (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height,
            (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width,
            indexing="ij",
        )
        size = torch.full_like(x, 0.05 * 2.0**level)
        per_level.append(torch.stack([x, y, size, size], dim=-1).reshape(1, -1, 4))
    boxes = torch.cat(per_level, dim=1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return torch.where(valid, torch.log(boxes / (1 - boxes)), torch.inf), valid


def _anchor_tables(shapes: Sequence[tuple[int, int]], memory: Tensor) -> tuple[Tensor, Tensor]:
    anchor_logits, valid = anchors(shapes, memory.device)
    return anchor_logits, valid.to(memory.dtype)


def _projection(in_channels: int, out_channels: int) -> ConvNorm:
    projection = ConvNorm(in_channels, out_channels, 1)
    nn.init.xavier_uniform_(projection.conv.weight)
    return projection


def _score_head(dim: int, classes: int) -> nn.Linear:
    head = Linear(dim, classes)
    nn.init.constant_(head.bias, bias_for_prior())
    return head


def _box_head(dim: int, outputs: int, activation: str) -> MLP:
    head = MLP([dim, dim, dim, outputs], activation)
    head.zero_last()
    return head
