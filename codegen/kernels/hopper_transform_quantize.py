"""``transform_quantize`` for Hopper, written for its warp groups (Gluon): codes of 4 bits or e4m3. For
``branch_quantize`` it leaves Z in bf16 instead of codes.

``Z = (L^T X) R``: both factors stay in shared memory for all tokens, and a token goes through it; what the first
product leaves in registers is the left operand of the second. The rows of X, or else its columns, are taken in pieces A
and B of two powers of two where one would be mostly padding (96 = 64 + 32); B may be absent. The prologue (norm or
activation) is that of ``transform_prologue``.

A program works on one token at a time. While it waits, others of the multiprocessor work, as many as there are
registers for, and the copy engine brings its next tokens to shared memory; or, if tokens are wide, the program itself
is ahead (``HopperTransformTile.ahead``): it prepares the next token while the second product of this one is computed,
and makes the codes of this one during the next one's first. With a token for each program there is no next one: what
it needs is asked for all at once, and what the kernel before has no part in before that one is done.

An RMS norm divides codes and scale alike: z is made of x, and from x the norm times the shift is taken away. So there
is nothing to multiply a token with before the transform, and less is rounded.

Slices (``widths``) are zeros in the columns of L: a token gets the L and the R of its slice, and the codes of all rows.

Why bf16 where the portable kernel has fp16: it needs no search for the largest magnitude of a token, and two values
share an instruction. This kernel waits for instructions, not for memory, and 2^-9 of a value is far below the
distance of two of 15 codes, or of two values of e4m3; integers of 8 bits would see it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from freeact_fx.codegen.prologue import NO_PROLOGUE, Prologue
from freeact_fx.codegen.tiles import HopperTransformTile, hopper_transform_tile

from .gluon_names import barrier, load_tile
from .hopper_arithmetic import (
    activation,
    larger,
    larger_magnitude,
    minus,
    reciprocal,
    times,
    times_plus,
    to_e4m3,
    to_fp32,
    to_int4,
    two_parts,
)
from .launches import Launch, multiprocessors_of
from .stream_order import allow_next_kernel, wait_for_previous_kernel
from .transform_quantize import rows_in_memory

SMALLEST = gl.constexpr(1e-30)


@gluon.jit
def by_thread(tile, num_warps: gl.constexpr):
    """What each thread has of a piece in ``memory_layout``: [threads, values]."""
    ROWS: gl.constexpr = tile.shape[0]
    AT_ONCE: gl.constexpr = neighbours(ROWS, tile.shape[1], num_warps)
    PER_ROW: gl.constexpr = tile.shape[1] // AT_ONCE
    OF_WARP: gl.constexpr = 32 // PER_ROW
    TIMES: gl.constexpr = ROWS // (OF_WARP * num_warps)
    values = gl.reshape(tile, (TIMES, num_warps, OF_WARP, PER_ROW, AT_ONCE))
    return gl.reshape(gl.permute(values, (1, 2, 3, 0, 4)), (32 * num_warps, TIMES * AT_ONCE))


@gluon.jit
def of_threads(values, num_warps: gl.constexpr):
    """One value of each thread, which stays where it is, as ``sum_of_threads`` and ``largest_of_threads`` take them."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    return gl.convert_layout(values, layout, assert_trivial=True)


@gluon.jit
def sum_in_threads(tile, num_warps: gl.constexpr):
    return of_threads(gl.sum(by_thread(tile, num_warps), 1), num_warps)


@gluon.jit
def squares_in_threads(x, num_warps: gl.constexpr):
    """The sum of squares that each thread has. Of bf16 every two are added in bf16, which is wrong by at most 2^-8 and
    makes a norm wrong by 2^-9; the rest in fp32."""
    if x.dtype == gl.bfloat16:
        values = by_thread(x, num_warps)
        THREADS: gl.constexpr = values.shape[0]
        NUMBER: gl.constexpr = values.shape[1]
        # A pair of neighbours is a register: one, the other.
        pairs = gl.permute(gl.reshape(values, (THREADS, NUMBER // 4, 2, 2)), (0, 1, 3, 2))
        one, other = gl.split(pairs)
        values = times_plus(other, other, times(one, one))
        return of_threads(gl.sum(gl.sum(to_fp32(values), 1), 1), num_warps)
    else:
        x = x.to(gl.float32)
        return sum_in_threads(x * x, num_warps)


@gluon.constexpr_function
def log2(power):
    return power.bit_length() - 1


@gluon.jit
def magnitude_in_threads(even, odd, num_warps: gl.constexpr):
    """The largest magnitude that each thread has in ``layout_of_pairs``, as bits: a NaN's are larger than all numbers'.

    Bits because there is an instruction for the largest of three integers, and one for those of a warp. In a tree: one
    after the other they would wait.
    """
    ROWS: gl.constexpr = even.shape[0]
    PAIRS: gl.constexpr = even.shape[1]
    tile = larger_magnitude(even, odd).to(gl.int32, bitcast=True)
    tile = gl.reshape(tile, (ROWS // 16, 2, 8, 4, PAIRS // 4))
    tile = gl.reshape(gl.permute(tile, (0, 2, 3, 1, 4)), (2 * ROWS, PAIRS // 2))
    for _ in gl.static_range(log2(PAIRS // 2)):
        one, other = gl.split(gl.reshape(tile, (2 * ROWS, tile.shape[1] // 2, 2)))
        tile = gl.maximum(one, other)
    return of_threads(gl.reshape(tile, (2 * ROWS,)), num_warps)


@gluon.jit
def exchanged(of_warp, slots, num_warps: gl.constexpr):
    """A value of each warp, in every thread. Between two uses of the same slots there must be another barrier."""
    slots.store(of_warp)
    barrier()
    return slots.load(gl.BlockedLayout([num_warps], [32], [num_warps], [0]))


@gluon.jit
def sum_of_threads(of_thread, slots, num_warps: gl.constexpr):
    of_warp = gl.sum(gl.reshape(of_thread, (num_warps, 32)), 1)
    return gl.sum(exchanged(of_warp, slots, num_warps), 0)


@gluon.jit
def largest_of_threads(of_thread, slots, num_warps: gl.constexpr):
    of_warp = gl.max(gl.reshape(of_thread, (num_warps, 32)), 1)
    return gl.max(exchanged(of_warp, slots, num_warps), 0).to(gl.float32, bitcast=True)


@gluon.jit
def bf16_tiles(NUMBER: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [NUMBER, ROWS, COLUMNS], layout)


@gluon.jit
def row_major(dtype, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    return gl.allocate_shared_memory(dtype, [ROWS, COLUMNS], layout)


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


@gluon.constexpr_function
def row_by_row(pairs, num_warps):
    per_row = min(pairs // 2, 32)
    return gl.BlockedLayout([1, 2], [32 // per_row, per_row], [num_warps, 1], [1, 0])


@gluon.jit
def codes_of(z, per_code, QMAX: gl.constexpr):
    """For QMAX 0 z times per_code, in bf16."""
    if QMAX == 0:
        return (z * per_code).to(gl.bfloat16)
    elif QMAX == 448:
        return to_e4m3(z, reciprocal(per_code))
    else:
        gl.static_assert(QMAX == 7)
        return to_int4(z, reciprocal(14 * per_code))


@gluon.jit
def store_codes(target, codes, FIRST: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr):
    """Codes of the even or of the odd columns of a piece of Z, from pair FIRST of each row on."""
    layout: gl.constexpr = codes.type.layout
    row = gl.arange(0, codes.shape[0], gl.SliceLayout(1, layout))[:, None]
    pair = FIRST + gl.arange(0, codes.shape[1], gl.SliceLayout(0, layout))[None, :]
    gl.store(target + row * (D2 // 2) + pair, codes, (row < D1) & (pair < D2 // 2))


@gluon.jit
def type_of(type_ptr, token, DEFAULT_TYPE: gl.constexpr, NUM_TYPES: gl.constexpr):
    token_type = DEFAULT_TYPE
    if type_ptr is not None:
        token_type = gl.load(type_ptr + token).to(gl.int32)
        token_type = gl.where(token_type < 0, token_type + NUM_TYPES, token_type)
    return token_type


@gluon.jit
def slice_of(token_type, SLICE_OF_TYPE: gl.constexpr, NUM_SLICES: gl.constexpr):
    in_slice = 0
    if NUM_SLICES > 1:
        for t in gl.static_range(len(SLICE_OF_TYPE)):
            in_slice = gl.where(token_type == t, SLICE_OF_TYPE[t], in_slice)
    return in_slice


@gluon.jit
def fetch(ptr, NUMBER: gl.constexpr, num_warps: gl.constexpr):
    """Ask for the lines of neighbouring values, as far as the L2 cache.

    By loads that nobody waits for: an instruction for it exists, and takes as long as a dozen of loads.
    """
    LINE: gl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth
    LINES: gl.constexpr = (NUMBER + LINE - 1) // LINE
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    place = gl.minimum(gl.arange(0, 2 ** log2(2 * LINES - 1), layout) * LINE, NUMBER - 1)
    gl.inline_asm_elementwise(
        "{ .reg .b16 unused; ld.volatile.global.L2::128B.b8 unused, [$1]; mov.b32 $0, 0; }",
        "=r,l",
        [(ptr + place).to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def copy_token(x_rows, x_ring, arrived, number, token, M):
    """Ask the copy engine for a token, if there is one, as the ``number``-th of this program."""
    TOKENS_AHEAD: gl.constexpr = x_ring.shape[0]
    NUM_BYTES: gl.constexpr = (
        x_ring.shape[2] * x_ring.shape[3] * x_ring.dtype.primitive_bitwidth // 8
    )
    if token < M:
        slot = number % TOKENS_AHEAD
        mbarrier.expect(arrived.index(slot), NUM_BYTES)
        load_tile(x_rows, [token, 0, 0], arrived.index(slot), x_ring.index(slot))


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
    if COLUMNS == D2:
        # Rows without gaps: as one of them, so that the places of a thread are one address and constants.
        AT_ONCE: gl.constexpr = layout.size_per_thread[1]
        WARPS: gl.constexpr = layout.warps_per_cta[0]
        flat: gl.constexpr = gl.BlockedLayout([AT_ONCE], [32], [WARPS], [0])
        offset = gl.reshape(gl.arange(0, ROWS * COLUMNS, flat), (ROWS, COLUMNS))
        offset = gl.convert_layout(offset, layout, assert_trivial=True)
        if FIRST_ROW > 0:
            offset += FIRST_ROW * D2
        offset = gl.max_contiguous(gl.multiple_of(offset, [1, AT_ONCE]), [1, AT_ONCE])
        return offset, offset < D1 * D2
    else:
        row = FIRST_ROW + gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
        column = FIRST_COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
        return row * D2 + column, (row < D1) & (column < D2)


@gluon.constexpr_function
def neighbours(rows, columns, num_warps):
    """Of a row that a thread has; eight, or fewer so that each thread has some."""
    return min(8, rows * columns // (32 * num_warps))


@gluon.constexpr_function
def memory_layout(rows, columns, num_warps):
    """Neighbours to a thread, rows of a piece one after the other."""
    per_thread = neighbours(rows, columns, num_warps)
    per_row = columns // per_thread
    return gl.BlockedLayout([1, per_thread], [32 // per_row, per_row], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def layout_of_registers(layout, dtype):
    """Of what ``load_token`` loads: neighbours of 16 bits in pairs."""
    if dtype.primitive_bitwidth != 16:
        return layout
    rows, columns = layout.size_per_thread
    return gl.BlockedLayout(
        [rows, columns // 2], layout.threads_per_warp, layout.warps_per_cta, layout.order
    )


@gluon.constexpr_function
def product_layout(columns, num_warps):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def load_piece(
    ptr,
    FIRST_ROW: gl.constexpr,
    ROWS: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
    NUM_ROWS: gl.constexpr,
    NUM_COLUMNS: gl.constexpr,
    START: gl.constexpr,
    END: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A piece of a factor [NUM_ROWS, NUM_COLUMNS] in fp32; zeros outside of its columns START to END."""
    layout: gl.constexpr = memory_layout(ROWS, COLUMNS, num_warps)
    row = FIRST_ROW + gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    column = FIRST_COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    inside = (row < NUM_ROWS) & (column >= START) & (column < END)
    return gl.load(ptr + row * NUM_COLUMNS + column, inside, 0.0)


@gluon.jit
def load_left(
    tiles,
    ptr,
    FIRST_ROW: gl.constexpr,
    SLICE: gl.constexpr,
    D1: gl.constexpr,
    STARTS: gl.constexpr,
    WIDTHS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What one of the tiles [slices, rows, columns] of the left factor is for."""
    ROWS: gl.constexpr = tiles.shape[1]
    COLUMNS: gl.constexpr = tiles.shape[2]
    LAST: gl.constexpr = len(WIDTHS) - 1
    WIDTH: gl.constexpr = STARTS[LAST] + WIDTHS[LAST]
    START: gl.constexpr = STARTS[SLICE]
    END: gl.constexpr = STARTS[SLICE] + WIDTHS[SLICE]
    return load_piece(ptr, FIRST_ROW, ROWS, 0, COLUMNS, D1, WIDTH, START, END, num_warps)


@gluon.jit
def load_right(
    tiles,
    ptr,
    FIRST_ROW: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
    SLICE: gl.constexpr,
    D2: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The same of the right one."""
    ROWS: gl.constexpr = tiles.shape[1]
    COLUMNS: gl.constexpr = tiles.shape[2]
    ptr += SLICE * D2 * D2
    return load_piece(ptr, FIRST_ROW, ROWS, FIRST_COLUMN, COLUMNS, D2, D2, 0, D2, num_warps)


@gluon.jit
def put_left(tile, piece):
    """A piece of the left factor into shared memory."""
    tile.store(piece.to(gl.bfloat16))


@gluon.jit
def put_right(tile, piece):
    """The same of the right one."""
    tile.store(for_contiguous_codes(piece.to(gl.bfloat16)))


@gluon.jit
def load_channels(ptr, place):
    """One value for each channel of a piece of a token."""
    offset, inside = place
    return gl.load(ptr + offset, inside, 0.0)


@gluon.jit
def of_channels(values, OFFSET: gl.constexpr):
    """OFFSET plus what ``load_channels`` loaded, in bf16."""
    return (OFFSET + values.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def load_once(row, place):
    """Past the L1 cache, which is for what all tokens need: shifts."""
    offset, inside = place
    return gl.load(row + offset, inside, 0.0, cache_modifier=".cg")


@gluon.jit
def load_again(row, place):
    """What many tokens need."""
    offset, inside = place
    return gl.load(row + offset, inside, 0.0)


@gluon.jit
def load_token(row, place):
    """A piece of x as a loop should carry it: of 16 bits two neighbours to a register, in which they come. A value in
    each would be unpacked, and waited for, where the loop ends."""
    if row.dtype.element_ty.primitive_bitwidth == 16:
        row = row.to(gl.pointer_type(gl.int32))
    return load_once(row, place)


@gluon.jit
def unpacked(x, dtype: gl.constexpr, num_warps: gl.constexpr):
    if x.dtype != dtype:
        even, odd = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [x],
            dtype=(gl.int16, gl.int16),
            is_pure=True,
            pack=1,
        )
        ROWS: gl.constexpr = x.shape[0]
        COLUMNS: gl.constexpr = 2 * x.shape[1]
        x = gl.reshape(gl.join(even, odd), (ROWS, COLUMNS)).to(dtype, bitcast=True)
        layout: gl.constexpr = memory_layout(ROWS, COLUMNS, num_warps)
        x = gl.convert_layout(x, layout, assert_trivial=True)
    return x


@gluon.jit
def begun(x, other, other_row, total_row, place, PROLOGUE: gl.constexpr):
    """A piece of a token, plus its residual or through its activation function.

    other  None: it is in other_row
    """
    offset, inside = place
    if other is None and other_row is not None:
        other = load_once(other_row, place)
    if total_row is not None:
        # Of two bf16 the compiler makes one addition in bf16, and of two of those one instruction.
        x = (x.to(gl.float32) + other.to(gl.float32)).to(total_row.dtype.element_ty)
        gl.store(total_row + offset, x, inside)
    elif PROLOGUE != "none" and PROLOGUE != "rms" and PROLOGUE != "layer":
        x = activation(to_fp32(x), PROLOGUE)
        if other is not None:
            x *= to_fp32(other)
    return x


@gluon.jit
def centred(x, mean, place):
    _, inside = place
    return gl.where(inside, to_fp32(x) - mean, 0.0)


@gluon.jit
def prepared(
    x,
    inverse,
    rms,
    weight,
    bias,
    shift,
    channel_scale,
    SCALE_IN_SHARED: gl.constexpr,
):
    """What is transformed of a piece of a token, in bf16: normed, minus the shift of its type, scaled.

    rms  instead of inverse: all of it times this, so that what is normed is x itself
    """
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
    if shift is not None:
        shift = shift.to(gl.bfloat16)
        if rms is None:
            x = minus(x, shift)
        else:
            # In two parts: one of them would be wrong by up to 2^-9 in all channels alike.
            high, low = two_parts(-rms)
            x = times_plus(shift, high, x)
            x = times_plus(shift, low, x)
    if channel_scale is not None:
        if SCALE_IN_SHARED:
            channel_scale = channel_scale.load(x.type.layout)
        x = times(x, channel_scale)
    return x


@gluon.jit
def put_token(
    tile_a,
    tile_b,
    x_a,
    x_b,
    others,
    token,
    token_type,
    tables,
    piece_a,
    piece_b,
    slots,
    DTYPE: gl.constexpr,
    K: gl.constexpr,
    PROLOGUE: gl.constexpr,
    EPS: gl.constexpr,
    HAS_B: gl.constexpr,
    SCALE_IN_SHARED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What is transformed of a token goes to shared memory. Returns what its scale is to be multiplied with."""
    place_a, weight_a, bias_a, channel_scale_a = piece_a
    place_b, weight_b, bias_b, channel_scale_b = piece_b
    other_ptr, other_stride, total_ptr, shift_ptr = tables
    other_row, total_row, shift_row = other_ptr, total_ptr, shift_ptr
    if other_ptr is not None:
        other_row += token.to(gl.int64) * other_stride
    if total_ptr is not None:
        total_row += token.to(gl.int64) * K
    if shift_ptr is not None:
        shift_row += token_type * K
    other_a, other_b = others
    # Before the norm's barrier, so that both are waited for at a time.
    EARLY: gl.constexpr = PROLOGUE == "rms"
    shift_a, shift_b = shift_row, shift_row
    if shift_row is not None and EARLY:
        shift_a = load_again(shift_row, place_a)
        if HAS_B:
            shift_b = load_again(shift_row, place_b)
    x_a = unpacked(x_a, DTYPE, num_warps)
    x_a = begun(x_a, other_a, other_row, total_row, place_a, PROLOGUE)
    if HAS_B:
        x_b = unpacked(x_b, DTYPE, num_warps)
        x_b = begun(x_b, other_b, other_row, total_row, place_b, PROLOGUE)
    if PROLOGUE == "layer":
        mean = sum_in_threads(to_fp32(x_a), num_warps)
        if HAS_B:
            mean += sum_in_threads(to_fp32(x_b), num_warps)
        mean = sum_of_threads(mean, slots.index(1), num_warps) / K
        x_a = centred(x_a, mean, place_a)
        if HAS_B:
            x_b = centred(x_b, mean, place_b)
    unit = 1.0
    inverse, rms = None, None
    if PROLOGUE == "rms" or PROLOGUE == "layer":
        variance = squares_in_threads(x_a, num_warps)
        if HAS_B:
            variance += squares_in_threads(x_b, num_warps)
        variance = sum_of_threads(variance, slots.index(0), num_warps) / K + EPS
        if PROLOGUE == "rms" and bias_a is None:
            unit = gl.rsqrt(variance)
            rms = variance * unit
        else:
            inverse = gl.rsqrt(variance)
    IN_SHARED: gl.constexpr = SCALE_IN_SHARED
    if shift_row is not None and not EARLY:
        shift_a = load_again(shift_row, place_a)
    x_a = prepared(x_a, inverse, rms, weight_a, bias_a, shift_a, channel_scale_a, IN_SHARED)
    tile_a.store(x_a)
    if HAS_B:
        if shift_row is not None and not EARLY:
            shift_b = load_again(shift_row, place_b)
        x_b = prepared(x_b, inverse, rms, weight_b, bias_b, shift_b, channel_scale_b, IN_SHARED)
        tile_b.store(x_b)
    return unit


@gluon.jit
def first_product(
    lefts,
    tokens,
    in_slice,
    turn,
    IN_B: gl.constexpr,
    COLUMNS_B: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Begin Y = L^T X: fp32 sums of bf16 products, in one piece of columns or two."""
    left = lefts[0].index(in_slice).permute((1, 0))
    token_a = tokens[0].index(turn)
    token_b = tokens[1].index(turn)
    ROWS: gl.constexpr = left.shape[0]
    COLUMNS: gl.constexpr = token_a.shape[1]
    y_a = gl.zeros((ROWS, COLUMNS), gl.float32, product_layout(COLUMNS, num_warps))
    y_a = warpgroup_mma(left, token_a, y_a, use_acc=False, is_async=True)
    if IN_B > 0:
        left_b = lefts[1].index(in_slice).permute((1, 0))
        y_a = warpgroup_mma(left_b, token_b, y_a, is_async=True)
        return (y_a,)
    elif COLUMNS_B > 0:
        y_b = gl.zeros((ROWS, COLUMNS_B), gl.float32, product_layout(COLUMNS_B, num_warps))
        y_b = warpgroup_mma(left, token_b, y_b, use_acc=False, is_async=True)
        return (y_a, y_b)
    else:
        return (y_a,)


@gluon.jit
def second_product(y, rights, in_slice, num_warps: gl.constexpr):
    """Begin Z = Y R, Y in bf16, in as many pieces."""
    right_aa, right_ba, right_ab, right_bb = rights
    ROWS: gl.constexpr = y[0].shape[0]
    COLUMNS: gl.constexpr = y[0].shape[1]
    mma: gl.constexpr = product_layout(COLUMNS, num_warps)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    z_a = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
    y_a = y[0].to(gl.bfloat16)
    y_aa = gl.convert_layout(y_a, operand)
    z_a = warpgroup_mma(y_aa, right_aa.index(in_slice), z_a, use_acc=False, is_async=True)
    if len(y) == 1:
        return (z_a,)
    else:
        COLUMNS_B: gl.constexpr = y[1].shape[1]
        mma_b: gl.constexpr = product_layout(COLUMNS_B, num_warps)
        operand_b: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_b, k_width=2)
        z_b = gl.zeros((ROWS, COLUMNS_B), gl.float32, mma_b)
        y_b = y[1].to(gl.bfloat16)
        y_ba = gl.convert_layout(y_b, operand)
        y_ab = gl.convert_layout(y_a, operand_b)
        y_bb = gl.convert_layout(y_b, operand_b)
        z_a = warpgroup_mma(y_ba, right_ba.index(in_slice), z_a, is_async=True)
        z_b = warpgroup_mma(y_ab, right_ab.index(in_slice), z_b, use_acc=False, is_async=True)
        z_b = warpgroup_mma(y_bb, right_bb.index(in_slice), z_b, is_async=True)
        return (z_a, z_b)


@gluon.jit
def waited_for(product):
    if len(product) == 1:
        return (warpgroup_mma_wait(num_outstanding=0, deps=(product[0],)),)
    else:
        return warpgroup_mma_wait(num_outstanding=0, deps=(product[0], product[1]))


@gluon.jit
def put_codes(
    z,
    unit,
    clip,
    codes_row,
    scale_ptr,
    slots,
    exchange,
    D1: gl.constexpr,
    D2: gl.constexpr,
    QMAX: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Grid of a token, and its codes: even columns of all rows, then the odd ones. D1 is of the result.

    A NaN or an infinity in x is in all of Z.
    """
    even_a, odd_a = even_and_odd(z[0])
    if len(z) == 2:
        even_b, odd_b = even_and_odd(z[1])
    if QMAX == 0:
        per_code = unit
        gl.store(scale_ptr, 1.0)
        barrier()  # that of the exchange: all warps have waited for their products
    else:
        largest = magnitude_in_threads(even_a, odd_a, num_warps)
        if len(z) == 2:
            largest = gl.maximum(largest, magnitude_in_threads(even_b, odd_b, num_warps))
        largest = largest_of_threads(largest, slots, num_warps)
        per_code = larger(largest * clip / QMAX, SMALLEST)
        gl.store(scale_ptr, larger(per_code * unit, SMALLEST))
    odd_row = codes_row + D1 * (D2 // 2)
    FIRST_B: gl.constexpr = z[0].shape[1] // 2
    if D2 % 16 == 0 or QMAX == 0:
        store_codes(codes_row, codes_of(even_a, per_code, QMAX), 0, D1, D2)
        store_codes(odd_row, codes_of(odd_a, per_code, QMAX), 0, D1, D2)
        if len(z) == 2:
            store_codes(codes_row, codes_of(even_b, per_code, QMAX), FIRST_B, D1, D2)
            store_codes(odd_row, codes_of(odd_b, per_code, QMAX), FIRST_B, D1, D2)
    else:
        # Rows begin where a thread could not write its codes at once: exchanged, so that a warp's are side by side.
        even_codes_a, odd_codes_a, even_codes_b, odd_codes_b = exchange
        even_codes_a.store(codes_of(even_a, per_code, QMAX))
        odd_codes_a.store(codes_of(odd_a, per_code, QMAX))
        if len(z) == 2:
            even_codes_b.store(codes_of(even_b, per_code, QMAX))
            odd_codes_b.store(codes_of(odd_b, per_code, QMAX))
        barrier()
        by_row: gl.constexpr = row_by_row(FIRST_B, num_warps)
        store_codes(codes_row, even_codes_a.load(by_row), 0, D1, D2)
        store_codes(odd_row, odd_codes_a.load(by_row), 0, D1, D2)
        if len(z) == 2:
            by_row_b: gl.constexpr = row_by_row(z[1].shape[1] // 2, num_warps)
            store_codes(codes_row, even_codes_b.load(by_row_b), FIRST_B, D1, D2)
            store_codes(odd_row, odd_codes_b.load(by_row_b), FIRST_B, D1, D2)


@gluon.jit
def hopper_transform_quantize_kernel(
    x_ptr,  # [M, K] floating
    x_rows,  # descriptor of the same [M, D1, D2], or None: TOKENS_AHEAD is 0
    other_ptr,  # [M, K] floating, or None: residual or multiplier, see Prologue
    total_ptr,  # [M, K] floating, or None
    weight_ptr,  # [K] floating, or None
    bias_ptr,  # [K] floating, or None
    type_ptr,  # [M] int, or None: all tokens are DEFAULT_TYPE
    shift_ptr,  # [P, K] fp32 or bf16, or None
    channel_scale_ptr,  # [K] fp32, or None
    left_ptr,  # [D1, sum of WIDTHS] fp32
    right_ptr,  # [S, D2, D2] fp32
    clip_ptr,  # [P] fp32
    codes_ptr,  # [M, K'] int8 or the bytes of e4m3, or Z in bf16; engine order
    scale_ptr,  # [M] fp32
    M,
    x_stride,
    other_stride,
    D1: gl.constexpr,
    D2: gl.constexpr,
    STARTS: gl.constexpr,
    WIDTHS: gl.constexpr,
    SLICE_OF_TYPE: gl.constexpr,
    DEFAULT_TYPE: gl.constexpr,
    QMAX: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    COLUMNS_B: gl.constexpr,
    IN_A: gl.constexpr,
    IN_B: gl.constexpr,
    AHEAD: gl.constexpr,
    TOKENS_AHEAD: gl.constexpr,
    ONE_EACH: gl.constexpr,
    PROLOGUE: gl.constexpr,
    EPS: gl.constexpr,
    WEIGHT_OFFSET: gl.constexpr,
    num_warps: gl.constexpr,
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    K: gl.constexpr = D1 * D2
    NUM_TYPES: gl.constexpr = len(SLICE_OF_TYPE)
    NUM_SLICES: gl.constexpr = len(WIDTHS)
    WIDTH: gl.constexpr = STARTS[NUM_SLICES - 1] + WIDTHS[NUM_SLICES - 1]
    HAS_B: gl.constexpr = IN_B > 0 or COLUMNS_B > 0
    # Rows, columns and place of piece B.
    ROWS_B: gl.constexpr = IN_B if IN_B > 0 else IN_A
    WIDTH_B: gl.constexpr = COLUMNS_B if COLUMNS_B > 0 else COLUMNS
    FIRST_COLUMN_B: gl.constexpr = COLUMNS if COLUMNS_B > 0 else 0
    FIRST_ROW_B: gl.constexpr = IN_A if IN_B > 0 else 0
    TURNS: gl.constexpr = 2 if AHEAD else 1
    IN_REGISTERS: gl.constexpr = TOKENS_AHEAD == 0
    gl.static_assert(not ONE_EACH or (IN_REGISTERS and not AHEAD))
    gl.static_assert(IN_REGISTERS or not (AHEAD or HAS_B))
    # A token's clip is asked for before its products, unless the next token fills the registers meanwhile.
    CLIP_EARLY: gl.constexpr = AHEAD or not IN_REGISTERS
    # Two pieces of columns leave no registers for the channels' scales, nor does a token that is there all at once.
    SCALE_IN_SHARED: gl.constexpr = COLUMNS_B > 0 or ONE_EACH
    allow_next_kernel()
    # What does not depend on the kernel before: both factors, for each slice, and the scales of channels. A norm's
    # weight might.
    left_a = bf16_tiles(NUM_SLICES, IN_A, ROWS)
    right_aa = bf16_tiles(NUM_SLICES, COLUMNS, COLUMNS)
    left_b, right_ba, right_ab, right_bb = left_a, right_aa, right_aa, right_aa
    if IN_B > 0:
        left_b = bf16_tiles(NUM_SLICES, IN_B, ROWS)
    if COLUMNS_B > 0:
        right_ba = bf16_tiles(NUM_SLICES, COLUMNS_B, COLUMNS)
        right_ab = bf16_tiles(NUM_SLICES, COLUMNS, COLUMNS_B)
        right_bb = bf16_tiles(NUM_SLICES, COLUMNS_B, COLUMNS_B)
    layout_a: gl.constexpr = memory_layout(IN_A, COLUMNS, num_warps)
    place_a = place_of(0, IN_A, 0, COLUMNS, D1, D2, layout_a)
    in_x: gl.constexpr = layout_of_registers(layout_a, DTYPE)
    PAIR: gl.constexpr = 2 if DTYPE.primitive_bitwidth == 16 else 1
    x_place_a = place_of(0, IN_A, 0, COLUMNS // PAIR, D1, D2 // PAIR, in_x)
    place_b, x_place_b = place_a, x_place_a
    if HAS_B:
        layout_b: gl.constexpr = memory_layout(ROWS_B, WIDTH_B, num_warps)
        place_b = place_of(FIRST_ROW_B, ROWS_B, FIRST_COLUMN_B, WIDTH_B, D1, D2, layout_b)
        in_x_b: gl.constexpr = layout_of_registers(layout_b, DTYPE)
        x_place_b = place_of(
            FIRST_ROW_B, ROWS_B, FIRST_COLUMN_B // PAIR, WIDTH_B // PAIR, D1, D2 // PAIR, in_x_b
        )
    token = gl.program_id(0)
    channel_scale_a, channel_scale_b = channel_scale_ptr, channel_scale_ptr
    weight_a, bias_a, weight_b, bias_b = weight_ptr, bias_ptr, weight_ptr, bias_ptr
    x_ring, arrived = left_a, left_a
    NUM_PUT: gl.constexpr = 0 if IN_REGISTERS else 1
    if not IN_REGISTERS:
        x_ring = gl.allocate_shared_memory(DTYPE, [TOKENS_AHEAD, 1, IN_A, COLUMNS], x_rows.layout)
        arrived = gl.allocate_shared_memory(gl.int64, [TOKENS_AHEAD, 1], mbarrier.MBarrierLayout())
        for number in gl.static_range(TOKENS_AHEAD):
            mbarrier.init(arrived.index(number), count=1)
        # The first tokens take longest, and the rest is asked for before any of it is waited for.
        wait_for_previous_kernel()
        for ahead in gl.static_range(TOKENS_AHEAD):
            copy_token(x_rows, x_ring, arrived, ahead, token + ahead * gl.num_programs(0), M)
        left = load_left(left_a, left_ptr, 0, 0, D1, STARTS, WIDTHS, num_warps)
        right = load_right(right_aa, right_ptr, 0, 0, 0, D2, num_warps)
        if channel_scale_ptr is not None:
            channel_scale_a = load_channels(channel_scale_ptr, place_a)
        if weight_ptr is not None:
            weight_a = load_channels(weight_ptr, place_a)
        barrier()  # behind it the assembler would have the last of them only once it has put the first away
        put_left(left_a.index(0), left)
        put_right(right_aa.index(0), right)
    for s in gl.static_range(NUM_PUT, NUM_SLICES):
        put_left(left_a.index(s), load_left(left_a, left_ptr, 0, s, D1, STARTS, WIDTHS, num_warps))
        if IN_B > 0:
            piece = load_left(left_b, left_ptr, IN_A, s, D1, STARTS, WIDTHS, num_warps)
            put_left(left_b.index(s), piece)
        put_right(right_aa.index(s), load_right(right_aa, right_ptr, 0, 0, s, D2, num_warps))
        if COLUMNS_B > 0:
            piece = load_right(right_ba, right_ptr, COLUMNS, 0, s, D2, num_warps)
            put_right(right_ba.index(s), piece)
            piece = load_right(right_ab, right_ptr, 0, COLUMNS, s, D2, num_warps)
            put_right(right_ab.index(s), piece)
            piece = load_right(right_bb, right_ptr, COLUMNS, COLUMNS, s, D2, num_warps)
            put_right(right_bb.index(s), piece)
    tokens_a = bf16_tiles(TURNS, IN_A, COLUMNS)
    tokens_b = tokens_a
    if HAS_B:
        tokens_b = bf16_tiles(TURNS, ROWS_B, WIDTH_B)
    if channel_scale_ptr is not None:
        if IN_REGISTERS:
            channel_scale_a = load_channels(channel_scale_ptr, place_a)
        channel_scale_a = of_channels(channel_scale_a, 0.0)
        if HAS_B:
            channel_scale_b = of_channels(load_channels(channel_scale_ptr, place_b), 0.0)
        if SCALE_IN_SHARED:
            # One token alone comes where they were: each thread has taken its own.
            scale_tile_a, scale_tile_b = tokens_a.index(0), tokens_b.index(0)
            if not ONE_EACH:
                scale_tile_a = row_major(gl.bfloat16, IN_A, COLUMNS)
                if HAS_B:
                    scale_tile_b = row_major(gl.bfloat16, ROWS_B, WIDTH_B)
            scale_tile_a.store(channel_scale_a)
            channel_scale_a = scale_tile_a
            if HAS_B:
                scale_tile_b.store(channel_scale_b)
                channel_scale_b = scale_tile_b
    if IN_REGISTERS:
        if ONE_EACH:
            # As far as the L2 cache, in case that no kernel has just written it.
            row = gl.minimum(token, M - 1).to(gl.int64)
            fetch(x_ptr + row * x_stride, K, num_warps)
            if other_ptr is not None:
                fetch(other_ptr + row * other_stride, K, num_warps)
        wait_for_previous_kernel()
    # What the warps tell each other: two sums and a maximum.
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    sums = gl.allocate_shared_memory(gl.float32, [2, num_warps], flat)
    maxima = gl.allocate_shared_memory(gl.int32, [num_warps], flat)
    exchange = (maxima, maxima, maxima, maxima)  # of codes, if need be
    if D2 % 16 != 0 and QMAX > 0:
        even_a = row_major(gl.int8, ROWS, COLUMNS // 2)
        odd_a = row_major(gl.int8, ROWS, COLUMNS // 2)
        exchange = (even_a, odd_a, even_a, odd_a)
        if COLUMNS_B > 0:
            even_b = row_major(gl.int8, ROWS, COLUMNS_B // 2)
            odd_b = row_major(gl.int8, ROWS, COLUMNS_B // 2)
            exchange = (even_a, odd_a, even_b, odd_b)
    # What comes from DRAM is under way before it is needed: x, a token ahead in registers or more than one in shared
    # memory; its type, which says where the shift is; the rest as far as the L2 cache.
    here = gl.minimum(token, M - 1)  # the token in x
    x_a, x_b = x_ptr, x_ptr
    if IN_REGISTERS:
        x_a = load_token(x_ptr + here.to(gl.int64) * x_stride, x_place_a)
        if HAS_B:
            x_b = load_token(x_ptr + here.to(gl.int64) * x_stride, x_place_b)
    others = (None, None)
    if ONE_EACH and other_ptr is not None:
        other_row = other_ptr + here.to(gl.int64) * other_stride
        other_a = load_once(other_row, place_a)
        others = (other_a, other_a)
        if HAS_B:
            others = (other_a, load_once(other_row, place_b))
    type_here = type_of(type_ptr, here, DEFAULT_TYPE, NUM_TYPES)
    if ONE_EACH:
        clip = gl.load(clip_ptr + type_here)
    if weight_ptr is not None:
        if IN_REGISTERS:
            weight_a = load_channels(weight_ptr, place_a)
        weight_a = of_channels(weight_a, WEIGHT_OFFSET)
        if HAS_B:
            weight_b = of_channels(load_channels(weight_ptr, place_b), WEIGHT_OFFSET)
    if bias_ptr is not None:
        bias_a = of_channels(load_channels(bias_ptr, place_a), 0.0)
        if HAS_B:
            bias_b = of_channels(load_channels(bias_ptr, place_b), 0.0)
    lefts = (left_a, left_b)
    rights = (right_aa, right_ba, right_ab, right_bb)
    tokens = (tokens_a, tokens_b)
    piece_a = (place_a, weight_a, bias_a, channel_scale_a)
    piece_b = (place_b, weight_b, bias_b, channel_scale_b)
    tables = (other_ptr, other_stride, total_ptr, shift_ptr)
    turn, number = 0, 0
    if AHEAD:
        token_type = type_here
        clip = gl.load(clip_ptr + type_here)
        unit = put_token(
            tokens_a.index(0),
            tokens_b.index(0),
            x_a,
            x_b,
            others,
            here,
            type_here,
            tables,
            piece_a,
            piece_b,
            sums,
            DTYPE,
            K,
            PROLOGUE,
            EPS,
            HAS_B,
            SCALE_IN_SHARED,
            num_warps,
        )
        fence_async_shared()
        barrier()
        in_slice = slice_of(token_type, SLICE_OF_TYPE, NUM_SLICES)
        y = first_product(lefts, tokens, in_slice, 0, IN_B, COLUMNS_B, num_warps)
        here = gl.minimum(here + gl.num_programs(0), M - 1)
        type_here = type_of(type_ptr, here, DEFAULT_TYPE, NUM_TYPES)
        x_a = load_token(x_ptr + here.to(gl.int64) * x_stride, x_place_a)
        if HAS_B:
            x_b = load_token(x_ptr + here.to(gl.int64) * x_stride, x_place_b)
        if other_ptr is not None:
            fetch(other_ptr + here.to(gl.int64) * other_stride, K, num_warps)
        y = waited_for(y)
        barrier()
    # Not a for: out of one the compiler moves loads, which then fill the registers.
    while token < M:
        if not ONE_EACH:
            after = gl.minimum(here + gl.num_programs(0), M - 1)
            type_after = type_of(type_ptr, after, DEFAULT_TYPE, NUM_TYPES)
            if other_ptr is not None:
                fetch(other_ptr + after.to(gl.int64) * other_stride, K, num_warps)
        if AHEAD:
            turn = 1 - turn
            in_slice = slice_of(token_type, SLICE_OF_TYPE, NUM_SLICES)
            z = second_product(y, rights, in_slice, num_warps)
        if CLIP_EARLY:
            clip_here = gl.load(clip_ptr + type_here)
        token_a, token_b = x_a, x_b
        if not IN_REGISTERS:
            slot = number % TOKENS_AHEAD
            mbarrier.wait(arrived.index(slot), (number // TOKENS_AHEAD) & 1)
            token_a = x_ring.index(slot).reshape((IN_A, COLUMNS)).load(layout_a)
            token_b = token_a
        unit_here = put_token(
            tokens_a.index(turn),
            tokens_b.index(turn),
            token_a,
            token_b,
            others,
            here,
            type_here,
            tables,
            piece_a,
            piece_b,
            sums,
            DTYPE,
            K,
            PROLOGUE,
            EPS,
            HAS_B,
            SCALE_IN_SHARED,
            num_warps,
        )
        fence_async_shared()
        # Before the barrier, or the assembler would have them much later.
        if IN_REGISTERS and not ONE_EACH:
            x_a = load_token(x_ptr + after.to(gl.int64) * x_stride, x_place_a)
            if HAS_B:
                x_b = load_token(x_ptr + after.to(gl.int64) * x_stride, x_place_b)
        barrier()
        if not IN_REGISTERS:
            far = token + TOKENS_AHEAD * gl.num_programs(0)
            copy_token(x_rows, x_ring, arrived, number + TOKENS_AHEAD, far, M)
            number += 1
        if AHEAD:
            z = waited_for(z)
        in_slice = slice_of(type_here, SLICE_OF_TYPE, NUM_SLICES)
        y = first_product(lefts, tokens, in_slice, turn, IN_B, COLUMNS_B, num_warps)
        if not AHEAD:
            unit = unit_here
            y = waited_for(y)
            z = second_product(y, rights, in_slice, num_warps)
            z = waited_for(z)
            if CLIP_EARLY:
                clip = clip_here
            elif not ONE_EACH:
                clip = gl.load(clip_ptr + type_here)
        put_codes(
            z,
            unit,
            clip,
            codes_ptr + token.to(gl.int64) * (WIDTH * D2),
            scale_ptr + token,
            maxima,
            exchange,
            WIDTH,
            D2,
            QMAX,
            num_warps,
        )
        if AHEAD:
            y = waited_for(y)
            token_type, unit, clip = type_here, unit_here, clip_here
        if not ONE_EACH:
            here, type_here = after, type_after
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
    tile: HopperTransformTile | None = None,
) -> tuple[Tensor, Tensor]:
    """``transform_quantize`` on Hopper.

    tile  ``hopper_transform_tile`` of the shape, which must have one, unless another is given

    Returns codes [M, K'] int8 (e4m3 for 448; for 0 the values themselves in bf16) in engine order and scale [M, 1]
    fp32.
    """
    num_tokens, d1, d2 = x.shape[0], left.shape[0], right.shape[-1]
    dtype = torch.int8 if qmax else torch.bfloat16
    codes = torch.empty(num_tokens, sum(widths) * d2, dtype=dtype, device=x.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    result = codes.view(torch.float8_e4m3fn) if qmax == 448 else codes, scale
    if num_tokens == 0:
        return result
    tile = tile or hopper_transform_tile(d1, tuple(widths), d2, prologue.kind)
    assert tile is not None
    x = rows_in_memory(x)
    if (x.data_ptr() | x.stride(0) * x.element_size()) % 4:
        x = x.clone(memory_format=torch.contiguous_format)  # read in pairs of 16 bits
    other = None if prologue.other is None else rows_in_memory(prologue.other)
    optional = (prologue.weight, prologue.bias, token_type, shift, channel_scale)
    contiguous = (None if t is None else t.contiguous() for t in optional)
    num_multiprocessors = multiprocessors_of(x.device)
    # Each keeps the factors and walks over tokens.
    num_programs = tile.per_multiprocessor * num_multiprocessors
    of_one_multiprocessor = -(-num_tokens // num_multiprocessors)
    one_each = of_one_multiprocessor <= tile.per_multiprocessor
    if one_each:
        tile, num_programs = tile.of_one_token(of_one_multiprocessor), num_tokens
    elif x.element_size() != 2 or (x.data_ptr() | 2 * x.stride(0)) % 16:
        # The copy engine takes aligned rows, and there is room for values of 16 bits.
        tile = replace(tile, tokens_ahead=0)
    x_rows = None
    if tile.tokens_ahead:
        x_rows = TensorDescriptor.from_tensor(x.unflatten(1, (d1, d2)), *box_of_token(tile))
    launch = _launch_of(
        d1,
        d2,
        tuple(widths),
        tuple(slice_of_type),
        default_type,
        qmax,
        tile,
        one_each,
        prologue.kind,
        prologue.eps,
        prologue.weight_offset,
    )
    launch(
        x.device,
        min(num_tokens, num_programs),
        x,
        x_rows,
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


def box_of_token(tile: HopperTransformTile) -> tuple[list[int], Any]:
    """Shape of a padded token [1, D1, D2] of 16 bits, and its layout in shared memory."""
    box = [1, tile.rows_in[0], tile.columns[0]]
    return box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)


@functools.cache
def _launch_of(
    d1: int,
    d2: int,
    widths: tuple[int, ...],
    slice_of_type: tuple[int, ...],
    default_type: int,
    qmax: int,
    tile: HopperTransformTile,
    one_each: bool,
    prologue: str,
    eps: float,
    weight_offset: float,
) -> Launch:
    return Launch(
        hopper_transform_quantize_kernel,
        D1=d1,
        D2=d2,
        STARTS=tuple(sum(widths[:i]) for i in range(len(widths))),
        WIDTHS=widths,
        SLICE_OF_TYPE=slice_of_type,
        DEFAULT_TYPE=default_type,
        QMAX=qmax,
        ROWS=tile.rows,
        COLUMNS=tile.columns[0],
        COLUMNS_B=tile.columns[1],
        IN_A=tile.rows_in[0],
        IN_B=tile.rows_in[1],
        AHEAD=tile.ahead,
        TOKENS_AHEAD=tile.tokens_ahead,
        ONE_EACH=one_each,
        PROLOGUE=prologue,
        EPS=eps,
        WEIGHT_OFFSET=weight_offset,
        num_warps=tile.num_warps,
        maxnreg=tile.registers,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
