"""``transform_quantize`` for Hopper, written for its warp groups (Gluon): the same arithmetic, one slice.

A program works on one token at a time; several programs on a multiprocessor wait for each other's loads, which is why
registers are few: ``HopperTransformTile.registers``. ``Z = (L^T X) R``: both factors stay in shared memory for all
tokens, and a token goes through it; what the first product leaves in registers is the left operand of the second. The
rows of X are taken in one or two powers of two (96 = 64 + 32), so that no product is over padding alone. The prologue
(norm or activation) is that of ``transform_prologue``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from freeact_fx.codegen.prologue import NO_PROLOGUE, Prologue
from freeact_fx.codegen.tiles import HopperTransformTile, hopper_transform_tile

from .transform_quantize import rows_in_memory

SMALLEST = gl.constexpr(1e-30)
# Triton 3.9 has a new name for it.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
TIES_TO_EVEN = gl.constexpr(12582912.0)  # as in transform_quantize


@gluon.jit
def largest_magnitude(tile):
    """As in ``transform_quantize``: NaN if the tile holds one."""
    bits = tile.to(gl.int32, bitcast=True) & 0x7FFFFFFF
    return gl.max(gl.max(bits, 1), 0).to(gl.float32, bitcast=True)


@gluon.jit
def larger(one, other):
    return gl.where((one >= other) | (one != one), one, other)


@gluon.jit
def activation(x, KIND: gl.constexpr):
    """As in ``transform_prologue``."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x / (1.0 + gl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x / (1.0 + gl.exp(-x))


@gluon.jit
def mean_of(tile, COUNT: gl.constexpr):
    return gl.sum(gl.sum(tile, 1), 0) / COUNT


@gluon.jit
def half_tile(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], gl.float16)
    return gl.allocate_shared_memory(gl.float16, [ROWS, COLUMNS], layout)


@gluon.jit
def type_of(type_ptr, token, DEFAULT_TYPE: gl.constexpr, NUM_TYPES: gl.constexpr):
    token_type = DEFAULT_TYPE
    if type_ptr is not None:
        token_type = gl.load(type_ptr + token).to(gl.int32)
        token_type = gl.where(token_type < 0, token_type + NUM_TYPES, token_type)
    return token_type


@gluon.jit
def fetch_row(row_ptr, SIZE: gl.constexpr, K: gl.constexpr, num_warps: gl.constexpr):
    """Ask for the lines of a row [K]; SIZE is K or a larger power of two."""
    LINE: gl.constexpr = 1024 // row_ptr.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    place = gl.minimum(gl.arange(0, SIZE // LINE, layout) * LINE, K - 1)
    gl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l",
        [(row_ptr + place).to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def hopper_transform_quantize_kernel(
    x_ptr,  # [M, K] floating
    other_ptr,  # [M, K] floating, or None: residual or multiplier, see Prologue
    total_ptr,  # [M, K] floating, or None
    weight_ptr,  # [K] floating, or None
    bias_ptr,  # [K] floating, or None
    type_ptr,  # [M] int, or None: all tokens are DEFAULT_TYPE
    shift_ptr,  # [P, K] fp32 or bf16, or None
    channel_scale_ptr,  # [K] fp32, or None
    left_ptr,  # [D1, D1] fp32
    right_ptr,  # [D2, D2] fp32
    clip_ptr,  # [P] fp32
    codes_ptr,  # [M, K] int8, engine order
    scale_ptr,  # [M] fp32
    M,
    x_stride,
    other_stride,
    D1: gl.constexpr,
    D2: gl.constexpr,
    NUM_TYPES: gl.constexpr,
    DEFAULT_TYPE: gl.constexpr,
    QMAX: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    IN_A: gl.constexpr,
    IN_B: gl.constexpr,
    PROLOGUE: gl.constexpr,
    EPS: gl.constexpr,
    WEIGHT_OFFSET: gl.constexpr,
    num_warps: gl.constexpr,
):
    K: gl.constexpr = D1 * D2
    PER_ROW: gl.constexpr = COLUMNS // 8 if COLUMNS < 256 else 32
    tokens: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // PER_ROW, PER_ROW], [num_warps, 1], [1, 0]
    )
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, COLUMNS, 16]
    )
    left_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    token_tile = half_tile(ROWS, COLUMNS)
    right_tile = half_tile(COLUMNS, COLUMNS)
    left_tile_a = half_tile(ROWS, IN_A)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, tokens))[:, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, tokens))[None, :]
    inside = (row < D1) & (column < D2)
    offset = row * D2 + column
    # Both factors, in units of their largest magnitude.
    right_row = gl.arange(0, COLUMNS, gl.SliceLayout(1, tokens))[:, None]
    right = gl.load(right_ptr + right_row * D2 + column, (right_row < D2) & (column < D2), 0.0)
    right_unit = larger(largest_magnitude(right), SMALLEST)
    right_tile.store((right * (1 / right_unit)).to(gl.float16))
    out = gl.arange(0, ROWS, gl.SliceLayout(1, tokens))[:, None]
    in_a = gl.arange(0, IN_A, gl.SliceLayout(0, tokens))[None, :]
    left_a = gl.load(left_ptr + in_a * D1 + out, (out < D1) & (in_a < D1), 0.0)
    left_unit = larger(largest_magnitude(left_a), SMALLEST)
    if IN_B > 0:
        in_b = IN_A + gl.arange(0, IN_B, gl.SliceLayout(0, tokens))[None, :]
        left_b = gl.load(left_ptr + in_b * D1 + out, (out < D1) & (in_b < D1), 0.0)
        left_unit = larger(left_unit, largest_magnitude(left_b))
        left_tile_b = half_tile(ROWS, IN_B)
        left_tile_b.store((left_b * (1 / left_unit)).to(gl.float16))
    left_tile_a.store((left_a * (1 / left_unit)).to(gl.float16))
    # Not a for: out of one the compiler moves loads of channel scales, which then fill the registers.
    token = gl.program_id(0).to(gl.int64)
    next_type = type_of(type_ptr, gl.minimum(token, M - 1), DEFAULT_TYPE, NUM_TYPES)
    while token < M:
        # Where the shift of a token is depends on its type, so that is loaded a token ahead; what will be read from
        # DRAM is fetched as far as the L2 cache.
        next_token = gl.minimum(token + gl.num_programs(0), M - 1)
        token_type = next_type
        next_type = type_of(type_ptr, next_token, DEFAULT_TYPE, NUM_TYPES)
        fetch_row(x_ptr + next_token * x_stride, ROWS * COLUMNS, K, num_warps)
        if other_ptr is not None:
            fetch_row(other_ptr + next_token * other_stride, ROWS * COLUMNS, K, num_warps)
        clip = gl.load(clip_ptr + token_type)
        x = gl.load(x_ptr + token * x_stride + offset, inside, 0.0).to(gl.float32)
        if other_ptr is not None:
            other = gl.load(other_ptr + token * other_stride + offset, inside, 0.0).to(gl.float32)
        # The token as its prologue leaves it.
        if total_ptr is not None:
            total = (x + other).to(total_ptr.dtype.element_ty)
            gl.store(total_ptr + token * K + offset, total, inside)
            x = total.to(gl.float32)
        elif PROLOGUE != "none" and PROLOGUE != "rms" and PROLOGUE != "layer":
            x = activation(x, PROLOGUE)
            if other_ptr is not None:
                x *= other
        if PROLOGUE == "layer":
            x = gl.where(inside, x - mean_of(x, K), 0.0)
        if PROLOGUE == "rms" or PROLOGUE == "layer":
            x *= gl.rsqrt(mean_of(x * x, K) + EPS)
            if weight_ptr is not None:
                x *= WEIGHT_OFFSET + gl.load(weight_ptr + offset, inside, 0.0).to(gl.float32)
            if bias_ptr is not None:
                x += gl.load(bias_ptr + offset, inside, 0.0).to(gl.float32)
        # Shift and scale; then in units of the largest magnitude, so that fp16 holds it.
        if shift_ptr is not None:
            x -= gl.load(shift_ptr + token_type * K + offset, inside, 0.0).to(gl.float32)
        if channel_scale_ptr is not None:
            x *= gl.load(channel_scale_ptr + offset, inside, 0.0)
        unit = larger(largest_magnitude(x), SMALLEST)
        token_tile.store((x * (1 / unit)).to(gl.float16))
        fence_async_shared()
        _barrier()
        # Z = (L^T X) R: fp16 operands, fp32 sums.
        y = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
        y = warpgroup_mma(left_tile_a, token_tile.slice(0, IN_A), y, use_acc=False, is_async=True)
        if IN_B > 0:
            y = warpgroup_mma(left_tile_b, token_tile.slice(IN_A, IN_B), y, is_async=True)
        y = warpgroup_mma_wait(num_outstanding=0, deps=(y,))
        y16 = gl.convert_layout(y.to(gl.float16), left_operand)
        z = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
        z = warpgroup_mma(y16, right_tile, z, use_acc=False, is_async=True)
        z = warpgroup_mma_wait(num_outstanding=0, deps=(z,))
        # Grid of the token, and its codes: even columns of all rows, then the odd ones.
        per_code = larger(largest_magnitude(z) * clip / QMAX, SMALLEST)
        gl.store(scale_ptr + token, larger(per_code * unit * left_unit * right_unit, SMALLEST))
        grid = gl.minimum(gl.maximum(z * (1 / per_code), -QMAX), QMAX)
        # The low byte of such a sum is the integer.
        codes = (grid + TIES_TO_EVEN).to(gl.int32, bitcast=True).to(gl.int8)
        even, odd = gl.split(gl.reshape(codes, (ROWS, COLUMNS // 2, 2)))
        PAIRS_PER_ROW: gl.constexpr = COLUMNS // 32 if COLUMNS >= 32 else 1
        stored: gl.constexpr = gl.BlockedLayout(
            [1, 16], [32 // PAIRS_PER_ROW, PAIRS_PER_ROW], [num_warps, 1], [1, 0]
        )
        pair_row = gl.arange(0, ROWS, gl.SliceLayout(1, stored))[:, None]
        pair = gl.arange(0, COLUMNS // 2, gl.SliceLayout(0, stored))[None, :]
        target = codes_ptr + token * K + pair_row * (D2 // 2) + pair
        here = (pair_row < D1) & (pair < D2 // 2)
        gl.store(target, gl.convert_layout(even, stored), here)
        gl.store(target + K // 2, gl.convert_layout(odd, stored), here)
        token += gl.num_programs(0)


def hopper_transform_quantize(
    x: Tensor,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    qmax: int,
    prologue: Prologue = NO_PROLOGUE,
) -> tuple[Tensor, Tensor]:
    """``transform_quantize`` on Hopper, for one slice with a square left factor.

    Shapes are those that ``tiles.hopper_transform_tile`` has a tile for.

    Returns codes [M, K] int8 in engine order and scale [M, 1] fp32.
    """
    (num_tokens, num_features), d1, d2 = x.shape, left.shape[0], right.shape[-1]
    codes = torch.empty(num_tokens, num_features, dtype=torch.int8, device=x.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return codes, scale
    tile = hopper_transform_tile(d1, d2, prologue.kind)
    assert tile is not None
    x = rows_in_memory(x)
    other = None if prologue.other is None else rows_in_memory(prologue.other)
    optional = (prologue.weight, prologue.bias, token_type, shift, channel_scale)
    contiguous = (None if t is None else t.contiguous() for t in optional)
    hopper_transform_quantize_kernel[(min(num_tokens, _num_programs(x.device, tile)),)](
        x,
        other,
        prologue.total,
        *contiguous,
        left.contiguous(),
        right.contiguous(),
        clip.contiguous(),
        codes,
        scale,
        num_tokens,
        x.stride(0),
        0 if other is None else other.stride(0),
        D1=d1,
        D2=d2,
        NUM_TYPES=len(slice_of_type),
        DEFAULT_TYPE=default_type,
        QMAX=qmax,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        IN_A=tile.rows_in[0],
        IN_B=tile.rows_in[1],
        PROLOGUE=prologue.kind,
        EPS=prologue.eps,
        WEIGHT_OFFSET=prologue.weight_offset,
        num_warps=tile.num_warps,
        maxnreg=tile.registers,
        enable_fp_fusion=True,
    )
    return codes, scale


@functools.cache
def _num_programs(device: torch.device, tile: HopperTransformTile) -> int:
    """As many as are on the chip at a time; each keeps the factors and walks over tokens."""
    return tile.per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count
