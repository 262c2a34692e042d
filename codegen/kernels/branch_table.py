"""Bring a branch's columns, or a Linear's weight of it, into the form in which kernels on Hopper multiply them."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from freeact_fx.codegen.tiles import branch_width

from .launches import Launch

_BLOCK = 1024


@triton.jit
def branch_table_kernel(
    table_ptr,  # [I, J] int8 or floating
    row_scale_ptr,  # [I] fp32, or None
    column_scale_ptr,  # [J] fp32, or None
    out_ptr,  # [I, WIDTH] bf16; columns behind J become zeros
    I,  # noqa: E741
    J,
    WIDTH,
    row_stride,
    column_stride,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // WIDTH, place % WIDTH
    inside = (row < I) & (column < J)
    value = tl.load(table_ptr + row * row_stride + column * column_stride, inside, 0.0)
    value = value.to(tl.float32) * ONE
    if row_scale_ptr is not None:
        value *= tl.load(row_scale_ptr + row, inside, 0.0)
    if column_scale_ptr is not None:
        value /= tl.load(column_scale_ptr + column, inside, 1.0)
    tl.store(out_ptr + place, value.to(tl.bfloat16), row < I)


def branch_table(
    table: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, one: float
) -> Tensor:
    """See ``freeact::engine_branch_table``."""
    num_rows, num_columns = table.shape
    width = branch_width(num_columns)
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=table.device)
    optional = (row_scale, column_scale)
    _launch_of(one)(
        table.device,
        -(-out.numel() // _BLOCK),
        table,
        *(None if t is None else t.contiguous() for t in optional),
        out,
        num_rows,
        num_columns,
        width,
        table.stride(0),
        table.stride(1),
    )
    return out


@functools.cache
def _launch_of(one: float) -> Launch:
    return Launch(branch_table_kernel, ONE=one, BLOCK=_BLOCK, num_warps=4)
