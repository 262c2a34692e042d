"""``transform_quantize`` for Hopper, written for its warp groups (Gluon): codes of 4 bits or e4m3, one slice. For
``branch_quantize`` it leaves Z in bf16 instead of codes.

A program works on one token at a time; several programs on a multiprocessor wait for each other's loads, which is why
registers are few: ``HopperTransformTile.registers``. ``Z = (L^T X) R``: both factors stay in shared memory for all
tokens, and a token goes through it; what the first product leaves in registers is the left operand of the second. The
rows of X, or else its columns, are taken in pieces A and B of two powers of two where one would be mostly padding (96 =
64 + 32); B may be absent. The prologue (norm or activation) is that of ``transform_prologue``.

Why bf16 where the portable kernel has fp16: it needs no search for the largest magnitude of a token, and two values
share an instruction. This kernel waits for instructions, not for memory, and 2^-9 of a value is far below the
distance of two of 15 codes, or of two values of e4m3; integers of 8 bits would see it.
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

from .launches import Launch
from .stream_order import allow_next_kernel, wait_for_previous_kernel
from .transform_quantize import rows_in_memory

SMALLEST = gl.constexpr(1e-30)
# Triton 3.9 has a new name for it.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def larger(one, other):
    return gl.where((one >= other) | (one != one), one, other)


@gluon.jit
def minus(one, other):
    return gl.inline_asm_elementwise(
        "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def times(one, other):
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def times_plus(one, other, third):
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [one, other, third],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def larger_magnitude(one, other):
    """As a modifier of its operands a magnitude costs nothing."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b;
        abs.f32 a, $1;
        abs.f32 b, $2;
        max.f32 $0, a, b;
        }""",
        "=f,f,f",
        [one, other],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def to_int4(z, per_unit):
    """``14 * z * per_unit`` to the nearest integers in [-7, 7].

    Saturation is free where it is to [0, 1]; what is then added makes the low byte of an fp32 the integer.
    """
    # 0.5, 14, and 1.5 * 2^23 - 7
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d;
        .reg .b32 low, high;
        fma.rn.sat.f32 a, $1, $5, 0f3F000000;
        fma.rn.sat.f32 b, $2, $6, 0f3F000000;
        fma.rn.sat.f32 c, $3, $7, 0f3F000000;
        fma.rn.sat.f32 d, $4, $8, 0f3F000000;
        fma.rn.f32 a, a, 0f41600000, 0f4B3FFFF9;
        fma.rn.f32 b, b, 0f41600000, 0f4B3FFFF9;
        fma.rn.f32 c, c, 0f41600000, 0f4B3FFFF9;
        fma.rn.f32 d, d, 0f41600000, 0f4B3FFFF9;
        prmt.b32 low, a, b, 0x0040;
        prmt.b32 high, c, d, 0x0040;
        prmt.b32 $0, low, high, 0x5410;
        }""",
        "=r,r,r,r,r,r,r,r,r",
        [z, per_unit],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def to_e4m3(z, per_unit):
    """``z * per_unit`` to the nearest e4m3 values, as bytes."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d;
        .reg .b16 low, high;
        mul.rn.f32 a, $1, $5;
        mul.rn.f32 b, $2, $6;
        mul.rn.f32 c, $3, $7;
        mul.rn.f32 d, $4, $8;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a;
        cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r,r,r,r,r",
        [z, per_unit],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def sigmoid(x):
    """In approximate functions of the chip, exact to about 2^-21."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 $0, e;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def activation(x, KIND: gl.constexpr):
    """As in ``transform_prologue``."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return x * sigmoid(x)


@gluon.jit
def sum_of(tile):
    """At once over both dimensions: each exchange between threads takes time."""
    return gl.sum(gl.reshape(tile, (tile.shape[0] * tile.shape[1],)), 0)


@gluon.jit
def bf16_tile(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [ROWS, COLUMNS], layout)


@gluon.jit
def for_contiguous_codes(right):
    """R with its columns in the order in which each thread gets neighbouring codes, to store them without exchange.

    In a product's result thread q of four has columns 8 j + 2 q and 8 j + 2 q + 1 of a row, for all j. Those are to be
    the even and the odd code of pair J q + j of COLUMNS / 2, J = COLUMNS / 8.
    """
    ROWS: gl.constexpr = right.shape[0]
    COLUMNS: gl.constexpr = right.shape[1]
    by_thread = gl.reshape(right, (ROWS, 4, COLUMNS // 8, 2))
    return gl.reshape(gl.permute(by_thread, (0, 2, 1, 3)), (ROWS, COLUMNS))


@gluon.constexpr_function
def layout_of_pairs(rows, pairs):
    """Who has the even codes [rows, pairs] of a product's result: neighbours in a row, and the row eight below."""
    per_thread, powers = pairs // 4, [1 << i for i in range(8)]
    return gl.DistributedLinearLayout(
        reg_bases=[*([0, p] for p in powers if p < per_thread), [8, 0]],
        lane_bases=[*([0, p] for p in powers if per_thread <= p < pairs), [1, 0], [2, 0], [4, 0]],
        warp_bases=[[r, 0] for r in powers if 16 <= r < rows],
        block_bases=[],
        shape=[rows, pairs],
    )


@gluon.jit
def even_and_odd(z):
    """The even and the odd columns of Z [ROWS, COLUMNS / 2], in their own order; each thread keeps what it has."""
    ROWS: gl.constexpr = z.shape[0]
    COLUMNS: gl.constexpr = z.shape[1]
    by_column = gl.permute(gl.reshape(z, (ROWS, COLUMNS // 8, 4, 2)), (0, 2, 1, 3))
    even, odd = gl.split(gl.reshape(by_column, (ROWS, COLUMNS // 2, 2)))
    # The same threads have the same values, but neighbours come first.
    layout: gl.constexpr = layout_of_pairs(ROWS, COLUMNS // 2)
    return gl.convert_layout(even, layout), gl.convert_layout(odd, layout)


@gluon.jit
def largest_of(even, odd):
    size: gl.constexpr = even.shape[0] * even.shape[1]
    return gl.max(gl.reshape(larger_magnitude(even, odd), (size,)), 0)


@gluon.constexpr_function
def row_by_row(pairs, num_warps):
    per_row = min(pairs // 2, 32)
    return gl.BlockedLayout([1, 2], [32 // per_row, per_row], [num_warps, 1], [1, 0])


@gluon.jit
def store_codes(
    target,
    z,
    per_code,
    FIRST: gl.constexpr,
    D1: gl.constexpr,
    D2: gl.constexpr,
    QMAX: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Codes of the even or of the odd columns of a piece of Z, from pair FIRST of each row on; for QMAX 0 itself."""
    if QMAX == 0:
        codes = z.to(gl.bfloat16)
    elif QMAX == 448:
        codes = to_e4m3(z, 1 / per_code)
    else:
        gl.static_assert(QMAX == 7)
        codes = to_int4(z, 1 / (14 * per_code))
    if D2 % 16 != 0:
        # Rows begin where a thread could not write its codes at once: exchanged, so that a warp's are side by side.
        codes = gl.convert_layout(codes, row_by_row(z.shape[1], num_warps))
    layout: gl.constexpr = codes.type.layout
    row = gl.arange(0, z.shape[0], gl.SliceLayout(1, layout))[:, None]
    pair = FIRST + gl.arange(0, z.shape[1], gl.SliceLayout(0, layout))[None, :]
    gl.store(target + row * (D2 // 2) + pair, codes, (row < D1) & (pair < D2 // 2))


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
def place_of(
    FIRST_ROW: gl.constexpr,
    ROWS: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
    D1: gl.constexpr,
    D2: gl.constexpr,
    layout: gl.constexpr,
):
    """Where a piece of a matrix [D1, D2] is in memory, and which of its values there are."""
    row = FIRST_ROW + gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    column = FIRST_COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    return row * D2 + column, (row < D1) & (column < D2)


@gluon.constexpr_function
def memory_layout(columns, num_warps):
    """Eight neighbours to a thread, rows of a piece one after the other."""
    per_row = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // per_row, per_row], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(columns, num_warps):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def load_factor(
    ptr,
    FIRST_ROW: gl.constexpr,
    ROWS: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
    SIZE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A piece of a factor [SIZE, SIZE] in bf16."""
    layout: gl.constexpr = memory_layout(COLUMNS, num_warps)
    offset, inside = place_of(FIRST_ROW, ROWS, FIRST_COLUMN, COLUMNS, SIZE, SIZE, layout)
    return gl.load(ptr + offset, inside, 0.0).to(gl.bfloat16)


@gluon.jit
def load_channels(ptr, place, OFFSET: gl.constexpr):
    """OFFSET plus one value for each channel of a piece of a token, in bf16."""
    offset, inside = place
    return (OFFSET + gl.load(ptr + offset, inside, 0.0).to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def load_once(row, place):
    """Past the L1 cache, which is for what all tokens need: shifts."""
    offset, inside = place
    return gl.load(row + offset, inside, 0.0, cache_modifier=".cg")


@gluon.jit
def begun(x, other_row, total_row, place, PROLOGUE: gl.constexpr):
    """A piece of a token, plus its residual or through its activation function."""
    offset, inside = place
    if total_row is not None:
        other = load_once(other_row, place).to(gl.float32)
        x = (x.to(gl.float32) + other).to(total_row.dtype.element_ty)
        gl.store(total_row + offset, x, inside)
    elif PROLOGUE != "none" and PROLOGUE != "rms" and PROLOGUE != "layer":
        x = activation(x.to(gl.float32), PROLOGUE)
        if other_row is not None:
            x *= load_once(other_row, place).to(gl.float32)
    return x


@gluon.jit
def centred(x, mean, place):
    _, inside = place
    return gl.where(inside, x.to(gl.float32) - mean, 0.0)


@gluon.jit
def prepared(x, inverse, weight, bias, shift_row, channel_scale, place):
    """What is transformed of a piece of a token, in bf16: normed, minus the shift of its type, scaled."""
    if inverse is not None:
        x = x.to(gl.float32) * inverse
    x = x.to(gl.bfloat16)
    if bias is not None:
        if weight is not None:
            x = times_plus(x, weight, bias)
        else:
            x += bias
    elif weight is not None:
        x = times(x, weight)
    if shift_row is not None:
        offset, inside = place
        x = minus(x, gl.load(shift_row + offset, inside, 0.0).to(gl.bfloat16))
    if channel_scale is not None:
        x = times(x, channel_scale)
    return x


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
    codes_ptr,  # [M, K] int8 or the bytes of e4m3, or Z in bf16; engine order
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
    COLUMNS_B: gl.constexpr,
    IN_A: gl.constexpr,
    IN_B: gl.constexpr,
    PROLOGUE: gl.constexpr,
    EPS: gl.constexpr,
    WEIGHT_OFFSET: gl.constexpr,
    num_warps: gl.constexpr,
):
    K: gl.constexpr = D1 * D2
    IS_NORM: gl.constexpr = PROLOGUE == "rms" or PROLOGUE == "layer"
    HAS_B: gl.constexpr = IN_B > 0 or COLUMNS_B > 0
    # Rows, columns and place of piece B.
    ROWS_B: gl.constexpr = IN_B if IN_B > 0 else IN_A
    WIDTH_B: gl.constexpr = COLUMNS_B if COLUMNS_B > 0 else COLUMNS
    FIRST_COLUMN_B: gl.constexpr = COLUMNS if COLUMNS_B > 0 else 0
    FIRST_ROW_B: gl.constexpr = IN_A if IN_B > 0 else 0
    tokens: gl.constexpr = memory_layout(COLUMNS, num_warps)
    mma: gl.constexpr = product_layout(COLUMNS, num_warps)
    left_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    allow_next_kernel()
    # What does not depend on the kernel before: both factors. A norm's weight might.
    left_tile_a = bf16_tile(IN_A, ROWS)
    left_tile_a.store(load_factor(left_ptr, 0, IN_A, 0, ROWS, D1, num_warps))
    right_aa = bf16_tile(COLUMNS, COLUMNS)
    right = load_factor(right_ptr, 0, COLUMNS, 0, COLUMNS, D2, num_warps)
    right_aa.store(for_contiguous_codes(right))
    if IN_B > 0:
        left_tile_b = bf16_tile(IN_B, ROWS)
        left_tile_b.store(load_factor(left_ptr, IN_A, IN_B, 0, ROWS, D1, num_warps))
    if COLUMNS_B > 0:
        mma_b: gl.constexpr = product_layout(COLUMNS_B, num_warps)
        left_operand_b: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_b, k_width=2)
        right_ba = bf16_tile(COLUMNS_B, COLUMNS)
        right = load_factor(right_ptr, COLUMNS, COLUMNS_B, 0, COLUMNS, D2, num_warps)
        right_ba.store(for_contiguous_codes(right))
        right_ab = bf16_tile(COLUMNS, COLUMNS_B)
        right = load_factor(right_ptr, 0, COLUMNS, COLUMNS, COLUMNS_B, D2, num_warps)
        right_ab.store(for_contiguous_codes(right))
        right_bb = bf16_tile(COLUMNS_B, COLUMNS_B)
        right = load_factor(right_ptr, COLUMNS, COLUMNS_B, COLUMNS, COLUMNS_B, D2, num_warps)
        right_bb.store(for_contiguous_codes(right))
    wait_for_previous_kernel()
    token_tile_a = bf16_tile(IN_A, COLUMNS)
    place_a = place_of(0, IN_A, 0, COLUMNS, D1, D2, tokens)
    weight_a, bias_a, channel_scale_a = weight_ptr, bias_ptr, channel_scale_ptr
    if weight_ptr is not None:
        weight_a = load_channels(weight_ptr, place_a, WEIGHT_OFFSET)
    if bias_ptr is not None:
        bias_a = load_channels(bias_ptr, place_a, 0.0)
    if channel_scale_ptr is not None:
        channel_scale_a = load_channels(channel_scale_ptr, place_a, 0.0)
    if HAS_B:
        token_tile_b = bf16_tile(ROWS_B, WIDTH_B)
        tokens_b: gl.constexpr = memory_layout(WIDTH_B, num_warps)
        place_b = place_of(FIRST_ROW_B, ROWS_B, FIRST_COLUMN_B, WIDTH_B, D1, D2, tokens_b)
        weight_b, bias_b, channel_scale_b = weight_ptr, bias_ptr, channel_scale_ptr
        if weight_ptr is not None:
            weight_b = load_channels(weight_ptr, place_b, WEIGHT_OFFSET)
        if bias_ptr is not None:
            bias_b = load_channels(bias_ptr, place_b, 0.0)
        if channel_scale_ptr is not None:
            channel_scale_b = load_channels(channel_scale_ptr, place_b, 0.0)
    # Not a for: out of one the compiler moves loads, which then fill the registers.
    token = gl.program_id(0).to(gl.int64)
    next_token = gl.minimum(token, M - 1)
    next_type = type_of(type_ptr, next_token, DEFAULT_TYPE, NUM_TYPES)
    next_a = load_once(x_ptr + next_token * x_stride, place_a)
    if HAS_B:
        next_b = load_once(x_ptr + next_token * x_stride, place_b)
    while token < M:
        # What comes from DRAM is under way a token ahead: x, and its type, which says where the shift is, in registers,
        # the rest as far as the L2 cache.
        next_token = gl.minimum(token + gl.num_programs(0), M - 1)
        token_type = next_type
        next_type = type_of(type_ptr, next_token, DEFAULT_TYPE, NUM_TYPES)
        other_row, total_row, shift_row = other_ptr, total_ptr, shift_ptr
        if other_ptr is not None:
            fetch_row(other_ptr + next_token * other_stride, ROWS * COLUMNS, K, num_warps)
            other_row += token * other_stride
        if total_ptr is not None:
            total_row += token * K
        if shift_ptr is not None:
            shift_row += token_type * K
        clip = gl.load(clip_ptr + token_type)
        # The token as its prologue leaves it.
        x_a = begun(next_a, other_row, total_row, place_a, PROLOGUE)
        if HAS_B:
            x_b = begun(next_b, other_row, total_row, place_b, PROLOGUE)
        if PROLOGUE == "layer":
            mean = sum_of(x_a.to(gl.float32))
            if HAS_B:
                mean += sum_of(x_b.to(gl.float32))
                x_b = centred(x_b, mean / K, place_b)
            x_a = centred(x_a, mean / K, place_a)
        inverse = None
        if IS_NORM:
            variance = sum_of(x_a.to(gl.float32) * x_a.to(gl.float32))
            if HAS_B:
                variance += sum_of(x_b.to(gl.float32) * x_b.to(gl.float32))
            inverse = gl.rsqrt(variance / K + EPS)
        token_tile_a.store(
            prepared(x_a, inverse, weight_a, bias_a, shift_row, channel_scale_a, place_a)
        )
        if HAS_B:
            token_tile_b.store(
                prepared(x_b, inverse, weight_b, bias_b, shift_row, channel_scale_b, place_b)
            )
        next_a = load_once(x_ptr + next_token * x_stride, place_a)
        if HAS_B:
            next_b = load_once(x_ptr + next_token * x_stride, place_b)
        fence_async_shared()
        _barrier()
        # Z = (L^T X) R: bf16 operands, fp32 sums.
        y_a = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
        left_a = left_tile_a.permute((1, 0))
        y_a = warpgroup_mma(left_a, token_tile_a, y_a, use_acc=False, is_async=True)
        if IN_B > 0:
            y_a = warpgroup_mma(left_tile_b.permute((1, 0)), token_tile_b, y_a, is_async=True)
        z_a = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
        if COLUMNS_B > 0:
            y_b = gl.zeros((ROWS, COLUMNS_B), gl.float32, mma_b)
            y_b = warpgroup_mma(left_a, token_tile_b, y_b, use_acc=False, is_async=True)
            y_a, y_b = warpgroup_mma_wait(num_outstanding=0, deps=(y_a, y_b))
            y_a, y_b = y_a.to(gl.bfloat16), y_b.to(gl.bfloat16)
            y_aa, y_ab = (
                gl.convert_layout(y_a, left_operand),
                gl.convert_layout(y_a, left_operand_b),
            )
            y_ba, y_bb = (
                gl.convert_layout(y_b, left_operand),
                gl.convert_layout(y_b, left_operand_b),
            )
            z_a = warpgroup_mma(y_aa, right_aa, z_a, use_acc=False, is_async=True)
            z_a = warpgroup_mma(y_ba, right_ba, z_a, is_async=True)
            z_b = gl.zeros((ROWS, COLUMNS_B), gl.float32, mma_b)
            z_b = warpgroup_mma(y_ab, right_ab, z_b, use_acc=False, is_async=True)
            z_b = warpgroup_mma(y_bb, right_bb, z_b, is_async=True)
            z_a, z_b = warpgroup_mma_wait(num_outstanding=0, deps=(z_a, z_b))
        else:
            y_a = warpgroup_mma_wait(num_outstanding=0, deps=(y_a,))
            y_aa = gl.convert_layout(y_a.to(gl.bfloat16), left_operand)
            z_a = warpgroup_mma(y_aa, right_aa, z_a, use_acc=False, is_async=True)
            z_a = warpgroup_mma_wait(num_outstanding=0, deps=(z_a,))
        # Grid of the token, and its codes: even columns of all rows, then the odd ones. A NaN or an infinity in x is in
        # all of Z.
        even_a, odd_a = even_and_odd(z_a)
        if COLUMNS_B > 0:
            even_b, odd_b = even_and_odd(z_b)
        per_code = 1.0
        if QMAX > 0:
            largest = largest_of(even_a, odd_a)
            if COLUMNS_B > 0:
                largest = larger(largest, largest_of(even_b, odd_b))
            per_code = larger(largest * clip / QMAX, SMALLEST)
        gl.store(scale_ptr + token, per_code)
        target = codes_ptr + token * K
        store_codes(target, even_a, per_code, 0, D1, D2, QMAX, num_warps)
        store_codes(target + K // 2, odd_a, per_code, 0, D1, D2, QMAX, num_warps)
        if COLUMNS_B > 0:
            store_codes(target, even_b, per_code, COLUMNS // 2, D1, D2, QMAX, num_warps)
            store_codes(target + K // 2, odd_b, per_code, COLUMNS // 2, D1, D2, QMAX, num_warps)
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

    Returns codes [M, K] int8 (e4m3 for 448; for 0 the values themselves in bf16) in engine order and scale [M, 1] fp32.
    """
    (num_tokens, num_features), d1, d2 = x.shape, left.shape[0], right.shape[-1]
    dtype = torch.int8 if qmax else torch.bfloat16
    codes = torch.empty(num_tokens, num_features, dtype=dtype, device=x.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    result = codes.view(torch.float8_e4m3fn) if qmax == 448 else codes, scale
    if num_tokens == 0:
        return result
    tile = hopper_transform_tile(d1, d2, prologue.kind)
    assert tile is not None
    x = rows_in_memory(x)
    other = None if prologue.other is None else rows_in_memory(prologue.other)
    optional = (prologue.weight, prologue.bias, token_type, shift, channel_scale)
    contiguous = (None if t is None else t.contiguous() for t in optional)
    launch = _launch_of(
        d1,
        d2,
        len(slice_of_type),
        default_type,
        qmax,
        tile,
        prologue.kind,
        prologue.eps,
        prologue.weight_offset,
    )
    launch(
        x.device,
        min(num_tokens, _num_programs(x.device, tile)),
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
    )
    return result


@functools.cache
def _launch_of(
    d1: int,
    d2: int,
    num_types: int,
    default_type: int,
    qmax: int,
    tile: HopperTransformTile,
    prologue: str,
    eps: float,
    weight_offset: float,
) -> Launch:
    return Launch(
        hopper_transform_quantize_kernel,
        D1=d1,
        D2=d2,
        NUM_TYPES=num_types,
        DEFAULT_TYPE=default_type,
        QMAX=qmax,
        ROWS=tile.rows,
        COLUMNS=tile.columns[0],
        COLUMNS_B=tile.columns[1],
        IN_A=tile.rows_in[0],
        IN_B=tile.rows_in[1],
        PROLOGUE=prologue,
        EPS=eps,
        WEIGHT_OFFSET=weight_offset,
        num_warps=tile.num_warps,
        maxnreg=tile.registers,
        enable_fp_fusion=True,
        launch_pdl=True,
    )


@functools.cache
def _num_programs(device: torch.device, tile: HopperTransformTile) -> int:
    """As many as are on the chip at a time; each keeps the factors and walks over tokens."""
    return tile.per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count
