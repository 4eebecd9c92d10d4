"""Triton kernels of `sampling`. A program samples for a block of queries and one head; channels lie side by side in memory.

The interpreter of Triton (TRITON_INTERPRET=1) runs the same kernels on a CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfine_core.model.sampling import MAX_LEVELS

QUERIES = 32  # of one program
# Sizes of maps and batches: a kernel compiled for each of them would be one too many.
SIZES = ("rows", "queries", "length", "h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3")
WHOLE_BITS = 46  # of the largest contribution, as a whole number; 64 bits hold the sum of 2 ** 16 of them


@triton.jit
def _corner(x, y, start, height, width, live):
    """Index of the token at a cell, and whether there is one; comparisons in floating point hold for any value."""
    inside = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column = tl.where(inside, x, 0.0).to(tl.int32)
    row = tl.where(inside, y, 0.0).to(tl.int32)
    return start + row * width + column, inside


@triton.jit
def _read(base, token, inside, channel, kept, STRIDE: tl.constexpr):
    """Channels [QUERIES, C] of one token for each query, 0 where there is none."""
    address = base[:, None] + token[:, None] * STRIDE + channel[None, :]
    return tl.load(address, mask=inside[:, None] & kept[None, :], other=0.0).to(tl.float32)


@triton.jit
def _level_forward(
    total, base, location, weight, live, channel, kept, start, height, width,
    FIRST: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Add the samples of one level to the total [QUERIES, C]."""
    for point in range(FIRST, FIRST + COUNT):
        x = tl.load(location + 2 * point, mask=live, other=0.0).to(tl.float32) * width - 0.5
        y = tl.load(location + 2 * point + 1, mask=live, other=0.0).to(tl.float32) * height - 0.5
        share = tl.load(weight + point, mask=live, other=0.0).to(tl.float32)
        left, top = tl.floor(x), tl.floor(y)
        right_part, low_part = x - left, y - top
        for corner in tl.static_range(4):
            across, down = corner % 2, corner // 2
            token, inside = _corner(left + across, top + down, start, height, width, live)
            part_x = right_part if across == 1 else 1 - right_part
            part_y = low_part if down == 1 else 1 - low_part
            total += (share * part_x * part_y)[:, None] * _read(base, token, inside, channel, kept, STRIDE)
    return total


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    tokens, locations, weights, out, rows, queries, length, h0, w0, h1, w1, h2, w2, h3, w3,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sample for ROWS of the B * Q queries and one head."""
    STRIDE: tl.constexpr = HEADS * WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    live, kept = row < rows, channel < WIDTH
    base = tokens + (row // queries).to(tl.int64) * length * STRIDE + head * WIDTH
    place = (row.to(tl.int64) * HEADS + head) * (P0 + P1 + P2 + P3)
    location, weight = locations + 2 * place, weights + place

    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    total = _level_forward(total, base, location, weight, live, channel, kept, 0, h0, w0, 0, P0, STRIDE)
    start = h0 * w0
    total = _level_forward(total, base, location, weight, live, channel, kept, start, h1, w1, P0, P1, STRIDE)
    start += h1 * w1
    total = _level_forward(total, base, location, weight, live, channel, kept, start, h2, w2, P0 + P1, P2, STRIDE)
    start += h2 * w2
    total = _level_forward(total, base, location, weight, live, channel, kept, start, h3, w3, P0 + P1 + P2, P3, STRIDE)

    address = out + row.to(tl.int64)[:, None] * STRIDE + head * WIDTH + channel[None, :]
    tl.store(address, total.to(out.dtype.element_ty), mask=live[:, None] & kept[None, :])


@triton.jit
def _level_backward(
    gradient, base, to_tokens, location, weight, to_location, to_weight, unit, live, channel, kept, start, height, width,
    FIRST: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one level's locations and weights, and add to those of its tokens."""
    for point in range(FIRST, FIRST + COUNT):
        x = tl.load(location + 2 * point, mask=live, other=0.0).to(tl.float32) * width - 0.5
        y = tl.load(location + 2 * point + 1, mask=live, other=0.0).to(tl.float32) * height - 0.5
        share = tl.load(weight + point, mask=live, other=0.0).to(tl.float32)
        left, top = tl.floor(x), tl.floor(y)
        right_part, low_part = x - left, y - top
        of_x, of_y, of_share = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        for corner in tl.static_range(4):
            across, down = corner % 2, corner // 2
            token, inside = _corner(left + across, top + down, start, height, width, live)
            part_x = right_part if across == 1 else 1 - right_part
            part_y = low_part if down == 1 else 1 - low_part
            along = tl.sum(gradient * _read(base, token, inside, channel, kept, STRIDE), axis=1)
            of_share += along * part_x * part_y
            of_x += along * part_y * (2 * across - 1)
            of_y += along * part_x * (2 * down - 1)
            change = gradient * (share * part_x * part_y)[:, None]
            address = to_tokens[:, None] + token[:, None] * STRIDE + channel[None, :]
            if WHOLE:
                change = (change * unit).to(tl.int64)
            tl.atomic_add(address, change, mask=inside[:, None] & kept[None, :], sem="relaxed")
        tl.store(to_location + 2 * point, of_x * share * width, mask=live)
        tl.store(to_location + 2 * point + 1, of_y * share * height, mask=live)
        tl.store(to_weight + point, of_share.to(to_weight.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    gradients, tokens, locations, weights, to_tokens, to_locations, to_weights, units,
    rows, queries, length, h0, w0, h1, w1, h2, w2, h3, w3,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS of the B * Q queries and one head."""
    STRIDE: tl.constexpr = HEADS * WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    live, kept = row < rows, channel < WIDTH
    image = (row // queries).to(tl.int64) * length * STRIDE + head * WIDTH
    place = (row.to(tl.int64) * HEADS + head) * (P0 + P1 + P2 + P3)
    address = gradients + row.to(tl.int64)[:, None] * STRIDE + head * WIDTH + channel[None, :]
    g = tl.load(address, mask=live[:, None] & kept[None, :], other=0.0).to(tl.float32)
    base, to = tokens + image, to_tokens + image
    loc, w = locations + 2 * place, weights + place
    to_loc, to_w = to_locations + 2 * place, to_weights + place
    unit = tl.load(units)

    _level_backward(g, base, to, loc, w, to_loc, to_w, unit, live, channel, kept, 0, h0, w0, 0, P0, STRIDE, WHOLE)
    start = h0 * w0
    _level_backward(g, base, to, loc, w, to_loc, to_w, unit, live, channel, kept, start, h1, w1, P0, P1, STRIDE, WHOLE)
    start += h1 * w1
    _level_backward(
        g, base, to, loc, w, to_loc, to_w, unit, live, channel, kept, start, h2, w2, P0 + P1, P2, STRIDE, WHOLE
    )
    start += h2 * w2
    _level_backward(
        g, base, to, loc, w, to_loc, to_w, unit, live, channel, kept, start, h3, w3, P0 + P1 + P2, P3, STRIDE, WHOLE
    )


def forward(tokens: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int], points: Sequence[int]) -> Tensor:
    """Compute `sampling.deformable_sampling`."""
    tokens, locations, weights = tokens.contiguous(), locations.contiguous(), weights.contiguous()
    batch, queries = weights.shape[:2]
    out = tokens.new_empty(batch, queries, tokens.shape[-1], dtype=torch.promote_types(tokens.dtype, weights.dtype))
    if out.numel():
        grid, sizes, constants = _layout(tokens, weights, shapes, points)
        _forward_kernel[grid](tokens, locations, weights, out, *sizes, **constants)
    return out


def backward(
    gradient: Tensor,
    tokens: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Sequence[int],
    points: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `sampling.deformable_sampling_backward`."""
    tokens, locations, weights = tokens.contiguous(), locations.contiguous(), weights.contiguous()
    whole = torch.are_deterministic_algorithms_enabled()
    to_tokens = torch.zeros_like(tokens, dtype=torch.int64 if whole else torch.float32)
    to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
    unit = _unit(gradient, weights) if whole else gradient.new_ones((), dtype=torch.float32)
    if gradient.numel():
        grid, sizes, constants = _layout(tokens, weights, shapes, points)
        tensors = (gradient, tokens, locations, weights, to_tokens, to_locations, to_weights, unit)
        _backward_kernel[grid](*tensors, *sizes, **constants, WHOLE=whole)
    return (to_tokens / unit if whole else to_tokens).to(tokens.dtype), to_locations, to_weights


def _unit(gradient: Tensor, weights: Tensor) -> Tensor:
    """Power of two that makes contributions whole numbers of at most WHOLE_BITS bits; NaN where one is not finite."""
    largest = gradient.abs().amax().float() * weights.abs().amax().float()
    exponent = (WHOLE_BITS - torch.frexp(largest).exponent).clamp(max=120)
    return torch.ldexp(torch.ones_like(largest), exponent) + 0 * largest


def _layout(
    tokens: Tensor, weights: Tensor, shapes: Sequence[int], points: Sequence[int]
) -> tuple[tuple[int, int], list[int], dict[str, Any]]:
    """Grid of programs, sizes and compile-time constants. Levels that are not there have no points."""
    batch, queries, heads, _ = weights.shape
    missing = MAX_LEVELS - len(points)
    width = tokens.shape[-1] // heads
    rows = batch * queries
    constants = {f"P{level}": count for level, count in enumerate((*points, *[0] * missing))}
    constants |= {"HEADS": heads, "WIDTH": width, "CHANNELS": triton.next_power_of_2(width), "ROWS": QUERIES}
    sizes = [rows, queries, tokens.shape[1], *shapes, *[1, 1] * missing]
    return (triton.cdiv(rows, QUERIES), heads), sizes, constants
