"""What the transform does to a token before it is transformed, on a token's tile: norm or activation, shift, scale.

A tile is [IN, COLUMNS], some columns of a token's matrix X [D1, D2], zero outside of it. All of it is in fp32; only the
sum of a token and its residual is rounded, to what is written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_token(
    x_row,
    other_row,
    total_row,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FIRST: tl.constexpr,
    IN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """A token, plus its residual or through its activation function."""
    offset, inside = place(D1, D2, FIRST, IN, COLUMNS)
    x = tl.load(x_row + offset, inside, 0.0).to(tl.float32)
    if total_row is not None:
        total = (x + tl.load(other_row + offset, inside, 0.0).to(tl.float32)).to(
            total_row.dtype.element_ty
        )
        tl.store(total_row + offset, total, inside)
        x = total.to(tl.float32)
    elif PROLOGUE != "none" and PROLOGUE != "rms" and PROLOGUE != "layer":
        x = activation(x, PROLOGUE)
        if other_row is not None:
            x *= tl.load(other_row + offset, inside, 0.0).to(tl.float32)
    return x


@triton.jit
def activation(x, KIND: tl.constexpr):
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def sum_of(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def centred(x, mean, D1: tl.constexpr, D2: tl.constexpr, FIRST: tl.constexpr):
    _, inside = place(D1, D2, FIRST, x.shape[0], x.shape[1])
    return tl.where(inside, x - mean, 0.0)


@triton.jit
def weighted(
    x,
    weight_ptr,
    bias_ptr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FIRST: tl.constexpr,
    OFFSET: tl.constexpr,
):
    offset, inside = place(D1, D2, FIRST, x.shape[0], x.shape[1])
    if weight_ptr is not None:
        x *= OFFSET + tl.load(weight_ptr + offset, inside, 0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offset, inside, 0.0).to(tl.float32)
    return x


@triton.jit
def shifted(
    x, shift_row, channel_scale_ptr, D1: tl.constexpr, D2: tl.constexpr, FIRST: tl.constexpr
):
    offset, inside = place(D1, D2, FIRST, x.shape[0], x.shape[1])
    if shift_row is not None:
        x -= tl.load(shift_row + offset, inside, 0.0).to(tl.float32)
    if channel_scale_ptr is not None:
        x *= tl.load(channel_scale_ptr + offset, inside, 0.0)
    return x


@triton.jit
def place(D1: tl.constexpr, D2: tl.constexpr, FIRST: tl.constexpr, IN, COLUMNS):
    """Where the values of a tile are in a row of memory, and which there are."""
    row, column = tl.arange(0, IN)[:, None], FIRST + tl.arange(0, COLUMNS)[None, :]
    return row * D2 + column, (row < D1) & (column < D2)
