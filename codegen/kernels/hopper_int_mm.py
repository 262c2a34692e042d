"""The product and its epilogue on Hopper, written for its copy engine and its warp groups (Gluon).

The same arithmetic on the same buffers as ``int_mm``. One warp copies tiles into a ring in shared memory; two or three
groups of four warps take a part of the outputs each: they unpack weights into registers, multiply, scale, and write the
tile out while the next one is loaded. Programs are persistent, one or two per multiprocessor.

Barriers: the first of a stage counts the bytes that have arrived, the second one arrival from each group that has read
them: with eight warps in one group some would arrive before others have read. One more counts the codes of the first
steps, whose weights come before them.

Where there are too few tiles for the chip, K is split among programs. Each leaves its sum in memory and counts itself;
the last one adds what the others left, and does the epilogue. Weights come before the kernel before is done
(``stream_order``), as many as there is room for in shared memory, and a few at a time: all at once they would fill the
memory's queues, and the transform, which has to be done first, would wait behind them for its tokens. Why not the
rest, into the L2 cache: that was slower with all of them at once and with a few at a time.

Linears of one input (q, k, v) are one launch, whose programs share the tiles of all: with few tokens all their weights
are on their way before the kernel before is done, with many there is one last round of tiles and not three.

e4m3 codes differ in unpacking and in the accumulator. With PROMOTED the sum of a step is added to the rest in fp32, as
in ``int_mm``; registers hold both, so tiles are smaller. Without, all is left to the tensor core.

A branch is more steps in the same ring, behind those of the codes: coefficients in bf16, as many as take the bytes of
codes, and their 8-bit weights, which become bf16 in registers, in the units of the sums. Where K is split all programs
copy them, and the last one multiplies.

A token's codes outside of its own slice are zeros, so a tile of tokens takes only the steps from the first to the last
of the slices that occur in it. Each of the warps finds that out for itself.

Letters as in ``int_mm``; S slices, P token types, R columns of a branch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from freeact_fx.codegen.tiles import (
    MOST_TOGETHER,
    PROMOTED,
    TileConfig,
    choose_hopper_tile,
    in_launches,
)
from freeact_fx.codegen.tuning import gpu_name, known_tile, problem_of

from .gluon_names import barrier, load_tile, store_tile
from .int_mm import partial_dtype
from .launches import Launch, multiprocessors_of
from .stream_order import allow_next_kernel, counters, wait_for_previous_kernel

# What the product of two codes that are 1 adds to the sums, by the dtype of the tokens' codes.
ONE_IN_SUMS = {torch.int8: 16.0, torch.float8_e4m3fn: 2.0**-9}

_OLD_NAME = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))

# Whose weights are under way at a time before the kernel before is done, for each tile of tokens.
_STEPS_AT_A_TIME = gl.constexpr(3)

_INSTRUCTION_TOKENS = gl.constexpr(128)  # int8 wgmma is refused at 256


@gluon.constexpr_function
def product_layout(tokens, columns=32):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tokens, columns]
    )


@gluon.constexpr_function
def each_its_own(number):
    return tuple(range(number))


@gluon.jit
def unpack_codes(packed):
    """The even and the odd code of each byte, times 16, in an int8 (``int_mm.unpack_codes``)."""
    even, odd = gl.inline_asm_elementwise(
        """{
        .reg .b32 low;
        shl.b32 low, $2, 4;
        lop3.b32 $0, low, 0xF0F0F0F0, 0x80808080, 0x6A;
        lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
        }""",
        "=r,=r,r",
        [packed],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    return even, odd


@gluon.jit
def unpack_e4m3(packed):
    """The even and the odd code of each byte, times 2^-9, in an e4m3 (``int_mm.unpack_e4m3``)."""
    even, odd = gl.inline_asm_elementwise(
        """{
        .reg .b32 high, positive, size, negative;
        shl.b32 high, $2, 4;
        prmt.b32 positive, high, 0, 0xBA98;
        and.b32 size, $2, 0x07070707;
        sub.s32 negative, 0x88888888, size;
        lop3.b32 $0, positive, size, negative, 0xCA;
        shr.u32 high, $2, 4;
        prmt.b32 positive, $2, 0, 0xBA98;
        and.b32 size, high, 0x07070707;
        sub.s32 negative, 0x88888888, size;
        lop3.b32 $1, positive, size, negative, 0xCA;
        }""",
        "=r,=r,r",
        [packed],
        dtype=(gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )
    return even, odd


@gluon.jit
def tile_of(index, num_m, num_n, GROUP_M: gl.constexpr):
    per_group = GROUP_M * num_n
    first = index // per_group * GROUP_M
    rows = gl.minimum(num_m - first, GROUP_M)
    return first + index % per_group % rows, index % per_group // rows


@gluon.jit
def those_given(first, second, third):
    """What there is of each Linear of a launch: a tuple without None."""
    given = ()
    if first is not None:
        given = (first,)
    if second is not None:
        given = (first, second)
    if third is not None:
        given = (first, second, third)
    return given


@gluon.jit
def tiles_of(sizes, ROWS: gl.constexpr):
    """How many tiles of outputs each Linear has."""
    nums_n = ()
    for number in gl.static_range(len(sizes)):
        nums_n = nums_n + (gl.cdiv(sizes[number], ROWS),)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuple)
    return nums_n


@gluon.jit
def num_tiles(num_m, nums_n):
    total = num_m * nums_n[0]
    for number in gl.static_range(1, len(nums_n)):
        total += num_m * nums_n[number]
    return total


@gluon.jit
def place_of(tile, num_m, nums_n, GROUP_M: gl.constexpr):
    """To which Linear a tile of all belongs, and where it is there."""
    which, first, num_n, end = 0, 0, nums_n[0], num_m * nums_n[0]
    for number in gl.static_range(1, len(nums_n)):
        is_later = tile >= end
        which = gl.where(is_later, number, which)
        first = gl.where(is_later, end, first)
        num_n = gl.where(is_later, nums_n[number], num_n)
        end += num_m * nums_n[number]
    tile_m, tile_n = tile_of(tile - first, num_m, num_n, GROUP_M)
    return which, tile_m, tile_n


@gluon.jit
def of_linear(values, which):
    """The one of a Linear's pointers or numbers that ``which`` says."""
    found = values[0]
    for number in gl.static_range(1, len(values)):
        found = gl.where(which == number, values[number], found)
    return found


@gluon.jit
def load_tile_of(descriptors, which, place, arrived, target):
    if len(descriptors) == 1:
        load_tile(descriptors[0], place, arrived, target)
    else:
        for number in gl.static_range(len(descriptors)):
            if which == number:
                load_tile(descriptors[number], place, arrived, target)


@gluon.jit
def store_tile_of(descriptors, which, place, source):
    if len(descriptors) == 1:
        store_tile(descriptors[0], place, source)
    else:
        for number in gl.static_range(len(descriptors)):
            if which == number:
                store_tile(descriptors[number], place, source)


@gluon.jit
def types_of(type_ptr, m, M, NUM_TYPES: gl.constexpr):
    token_type = gl.load(type_ptr + m, m < M, 0).to(gl.int32)
    return gl.where(token_type < 0, token_type + NUM_TYPES, token_type)


@gluon.jit
def bytes_of_tile(
    type_ptr,
    tile_m,
    M,
    num_even,
    DEFAULT_TYPE: gl.constexpr,
    SLICE_OF_TYPE: gl.constexpr,
    SLICE_STARTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """Where the first slice of a tile's tokens begins in a row of weights, in whole steps, and the last one ends."""
    first, last = 0, num_even
    if len(SLICE_STARTS) > 1:
        if type_ptr is None:
            lowest = SLICE_OF_TYPE[DEFAULT_TYPE]
            highest = lowest
        else:
            # Each warp has all tokens of the tile; those past the end count as the last one.
            layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
            m = gl.minimum(tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout), M - 1)
            token_type = types_of(type_ptr, m, M, len(SLICE_OF_TYPE))
            in_slice = gl.where(token_type == 0, SLICE_OF_TYPE[0], 0)
            for number in gl.static_range(1, len(SLICE_OF_TYPE)):
                in_slice = gl.where(token_type == number, SLICE_OF_TYPE[number], in_slice)
            lowest, highest = gl.min(in_slice, 0), gl.max(in_slice, 0)
        for index in gl.static_range(1, len(SLICE_STARTS)):
            first = gl.where(lowest >= index, SLICE_STARTS[index] // BLOCK_K * BLOCK_K, first)
            last = gl.where(highest < index, gl.minimum(last, SLICE_STARTS[index]), last)
    return first, last


@gluon.jit
def part_of(first, last, part, BLOCK_K: gl.constexpr, SPLIT_K: gl.constexpr):
    """The part of a range of weight bytes that one of SPLIT_K programs sums over; those of few steps may be empty."""
    if SPLIT_K > 1:
        bytes_of_part = gl.cdiv(last - first, BLOCK_K * SPLIT_K) * BLOCK_K
        first += part * bytes_of_part
        last = gl.minimum(last, first + bytes_of_part)
    return first, last


@gluon.jit
def for_copy(tile, descriptor):
    """The memory of a tile of the ring as one that a descriptor's copies go to."""
    layout: gl.constexpr = descriptor.layout
    if _OLD_NAME:
        return tile._reinterpret(descriptor.dtype, descriptor.block_shape, layout)
    else:
        return tile.reinterpret(descriptor.dtype, descriptor.block_shape, layout)


@gluon.jit
def copy_tiles(
    codes,
    weights,
    coefficients,
    branches,
    type_ptr,
    codes_ring,
    weight_ring,
    barriers,
    M,
    sizes,
    num_even,
    DEFAULT_TYPE: gl.constexpr,
    SLICE_OF_TYPE: gl.constexpr,
    SLICE_STARTS: gl.constexpr,
    GROUPS: gl.constexpr,
    GROUP_M: gl.constexpr,
    SPLIT_K: gl.constexpr,
    RANK: gl.constexpr,
):
    """The copying warp: packed weights, even codes and odd codes of each step, for each tile of this program."""
    STAGES: gl.constexpr = weight_ring.shape[0] // GROUPS
    ROWS: gl.constexpr = weight_ring.shape[1]
    BLOCK_K: gl.constexpr = weight_ring.shape[2]
    BLOCK_M: gl.constexpr = codes_ring.shape[1]
    STEP_BYTES: gl.constexpr = (GROUPS * ROWS + 2 * BLOCK_M) * BLOCK_K
    num_m, nums_n = gl.cdiv(M, BLOCK_M), tiles_of(sizes, GROUPS * ROWS)
    # Weights of the first steps do not depend on the kernel before; with slices types say which, and they may.
    num_ahead = 0
    if len(SLICE_STARTS) == 1:
        item = gl.program_id(0)
        which, tile_m, tile_n = place_of(item // SPLIT_K, num_m, nums_n, GROUP_M)
        first, last = part_of(0, num_even, item % SPLIT_K, BLOCK_K, SPLIT_K)
        num_ahead = gl.minimum((last - first) // BLOCK_K, STAGES)
        # Tiles of other tokens take the same weights, out of the L2 cache.
        at_a_time = _STEPS_AT_A_TIME * num_m
        for stage in range(0, num_ahead):
            if stage >= at_a_time:
                mbarrier.wait(barriers.index(stage - at_a_time), 0)
            mbarrier.expect(barriers.index(stage), GROUPS * ROWS * BLOCK_K)
            for group in gl.static_range(GROUPS):
                load_tile_of(
                    weights,
                    which,
                    [(tile_n * GROUPS + group) * ROWS, first + stage * BLOCK_K],
                    barriers.index(stage),
                    weight_ring.index(GROUPS * stage + group),
                )
        wait_for_previous_kernel()
        of_codes = barriers.index(2 * STAGES)
        for stage in range(0, num_ahead):
            place, byte = tile_m * BLOCK_M, first + stage * BLOCK_K
            mbarrier.expect(of_codes, 2 * BLOCK_M * BLOCK_K)
            load_tile(codes, [place, byte], of_codes, codes_ring.index(2 * stage))
            load_tile(codes, [place, num_even + byte], of_codes, codes_ring.index(2 * stage + 1))
        for _ in range(num_ahead, STAGES):
            mbarrier.arrive(of_codes)
    else:
        wait_for_previous_kernel()
    step = 0
    for item in range(gl.program_id(0), num_tiles(num_m, nums_n) * SPLIT_K, gl.num_programs(0)):
        which, tile_m, tile_n = place_of(item // SPLIT_K, num_m, nums_n, GROUP_M)
        first, last = bytes_of_tile(
            type_ptr,
            tile_m,
            M,
            num_even,
            DEFAULT_TYPE,
            SLICE_OF_TYPE,
            SLICE_STARTS,
            BLOCK_M,
            BLOCK_K,
            1,
        )
        first, last = part_of(first, last, item % SPLIT_K, BLOCK_K, SPLIT_K)
        for byte in range(first, last, BLOCK_K):
            if step >= num_ahead:
                stage = step % STAGES
                arrived = barriers.index(stage)
                mbarrier.wait(barriers.index(STAGES + stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(arrived, STEP_BYTES)
                for group in gl.static_range(GROUPS):
                    row = (tile_n * GROUPS + group) * ROWS
                    target = weight_ring.index(GROUPS * stage + group)
                    load_tile_of(weights, which, [row, byte], arrived, target)
                row = tile_m * BLOCK_M
                load_tile(codes, [row, byte], arrived, codes_ring.index(2 * stage))
                load_tile(codes, [row, num_even + byte], arrived, codes_ring.index(2 * stage + 1))
            step += 1
        for column in gl.static_range(0, RANK, BLOCK_K // 2):
            stage = step % STAGES
            arrived = barriers.index(stage)
            mbarrier.wait(barriers.index(STAGES + stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(arrived, (GROUPS * ROWS // 2 + BLOCK_M) * BLOCK_K)
            for group in gl.static_range(GROUPS):
                first_n = (tile_n * GROUPS + group) * ROWS
                target = for_copy(weight_ring.index(GROUPS * stage + group), branches[0])
                load_tile_of(branches, which, [column, first_n], arrived, target)
            target = for_copy(codes_ring.index(2 * stage), coefficients)
            load_tile(coefficients, [tile_m * BLOCK_M, column], arrived, target)
            step += 1


@gluon.jit
def sum_of_parts(
    total, partial_ptr, counter_ptr, tile, part, SPLIT_K: gl.constexpr, layout: gl.constexpr
):
    """The sums of all parts of a tile, and whether this program is the last of them; only then they are complete."""
    ROWS: gl.constexpr = total.shape[0]
    BLOCK_M: gl.constexpr = total.shape[1]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    offset = row * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))[None, :]
    of_tile = partial_ptr + tile.to(gl.int64) * (SPLIT_K * ROWS * BLOCK_M) + offset
    gl.store(of_tile + part * (ROWS * BLOCK_M), total)
    barrier()
    is_last = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if is_last:
        # The sum of floats depends on their order: all of them again, whichever part is the last.
        ORDERED: gl.constexpr = total.dtype == gl.float32
        if ORDERED:
            total = gl.zeros((ROWS, BLOCK_M), gl.float32, layout)
        for ahead in range(0 if ORDERED else 1, SPLIT_K):
            other = ahead if ORDERED else (part + ahead) % SPLIT_K
            # Not out of the L1 cache, which may hold sums of a call before.
            total += gl.load(of_tile + other * (ROWS * BLOCK_M), cache_modifier=".cg")
        gl.store(counter_ptr + tile, 0)
    return total, is_last


@gluon.jit
def tile_rows(ptr, NUM_ROWS: gl.constexpr, n, N):
    """Of each of the rows of a table [NUM_ROWS, N] the part that is for a tile's outputs."""
    rows = ()
    for number in gl.static_range(NUM_ROWS):
        rows = rows + (gl.load(ptr + number * N + n, n < N, 0.0),)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuple)
    return rows


@gluon.jit
def rows_of_outputs(
    weight_scale_ptr,
    bias_ptr,
    n,
    N,
    DEFAULT_TYPE: gl.constexpr,
    SLICE_OF_TYPE: gl.constexpr,
    NUM_SLICES: gl.constexpr,
    TYPED: gl.constexpr,
):
    """Scales of a tile's outputs for each slice, and their biases for each type; those of DEFAULT_TYPE alone if not
    TYPED. No biases if there are none."""
    biases = ()
    if TYPED:
        weight_scales = tile_rows(weight_scale_ptr, NUM_SLICES, n, N)
        if bias_ptr is not None:
            biases = tile_rows(bias_ptr, len(SLICE_OF_TYPE), n, N)
    else:
        weight_scales = tile_rows(weight_scale_ptr + SLICE_OF_TYPE[DEFAULT_TYPE] * N, 1, n, N)
        if bias_ptr is not None:
            biases = tile_rows(bias_ptr + DEFAULT_TYPE * N, 1, n, N)
    return weight_scales, biases


@gluon.jit
def row_of_types(rows, token_type, ROW_OF_TYPE: gl.constexpr):
    """[outputs, tokens]: of the rows the one that each token's type has; if there is only one, [outputs, 1]."""
    found = rows[0][:, None]
    if len(rows) > 1:
        found = rows[ROW_OF_TYPE[0]][:, None]
        for number in gl.static_range(1, len(ROW_OF_TYPE)):
            of_this = rows[ROW_OF_TYPE[number]][:, None]
            found = gl.where((token_type == number)[None, :], of_this, found)
    return found


@gluon.jit
def halves(tile):
    """The first and the last of its columns; each thread keeps what it has."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    return gl.split(gl.permute(gl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@gluon.jit
def parts_of_tokens(tile):
    """A tile [outputs, tokens] in parts of 32 tokens, if it has as many."""
    parts = (tile,)
    if tile.shape[1] > 32:
        parts = halves(tile)
        if tile.shape[1] > 64:
            first, last = halves(parts[0]), halves(parts[1])
            parts = (first[0], first[1], last[0], last[1])
    return parts


@gluon.jit
def write_tile(
    total,
    out_tile,
    scales,
    types,
    weight_scales,
    biases,
    SLICE_OF_TYPE: gl.constexpr,
    E4M3: gl.constexpr,
):
    """The epilogue, in fp32: the factor of unpacking, the scales of token and output, the bias of the token's type.

    In parts, since scales and types of all tokens would fill the registers.
    """
    PER_UNIT: gl.constexpr = 512.0 if E4M3 else 0.0625
    EACH: gl.constexpr = each_its_own(len(biases))
    parts = parts_of_tokens(total)
    TOKENS: gl.constexpr = total.shape[1] // len(parts)
    layout: gl.constexpr = product_layout(TOKENS)
    of_tokens: gl.constexpr = gl.SliceLayout(0, layout)
    for number in gl.static_range(len(parts)):
        scale = scales.slice(number * TOKENS, TOKENS).load(of_tokens) * PER_UNIT
        token_type = types.slice(number * TOKENS, TOKENS).load(of_tokens)
        # The same threads have the same sums.
        y = gl.convert_layout(parts[number], layout).to(gl.float32) * scale[None, :]
        y *= row_of_types(weight_scales, token_type, SLICE_OF_TYPE)
        if len(biases) > 0:
            y += row_of_types(biases, token_type, EACH)
        y = y.to(out_tile.dtype).permute((1, 0))
        out_tile.slice(number * TOKENS, TOKENS).store(y)


@gluon.jit
def plus_branch(
    total,
    coefficients,
    branch,
    branch_scale_ptr,
    weight_scale,
    codes_ring,
    weight_ring,
    barriers,
    step,
    ONE: gl.constexpr,
    GROUPS: gl.constexpr,
    R: gl.constexpr,
    RANK: gl.constexpr,
    GROUP: gl.constexpr,
    layout: gl.constexpr,
):
    """The sums of a group's outputs, in fp32, plus those of the branch, whose steps begin with ``step``."""
    STAGES: gl.constexpr = weight_ring.shape[0] // GROUPS
    BLOCK_K: gl.constexpr = weight_ring.shape[2]
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    total = gl.convert_layout(total.to(gl.float32), layout)  # the same threads have the same sums
    # The scales are there, in the threads that need them. Behind the last output they are zeros.
    weight_scale = gl.convert_layout(weight_scale, gl.SliceLayout(1, left), assert_trivial=True)
    of_sums = gl.where(weight_scale > 0, ONE / weight_scale, 0.0)
    for column in gl.static_range(0, RANK, BLOCK_K // 2):
        r = column + gl.arange(0, BLOCK_K // 2, gl.SliceLayout(0, left))
        of_columns = gl.load(branch_scale_ptr + r, r < R, 0.0)
        stage = step % STAGES
        mbarrier.wait(barriers.index(stage), (step // STAGES) & 1)
        weights = for_copy(weight_ring.index(GROUPS * stage + GROUP), branch).permute((1, 0))
        weights = weights.load(left).to(gl.float32) * of_columns[None, :] * of_sums[:, None]
        of_outputs = weights.to(gl.bfloat16)
        of_tokens = for_copy(codes_ring.index(2 * stage), coefficients).permute((1, 0))
        total = warpgroup_mma(of_outputs, of_tokens, total, is_async=True)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        mbarrier.arrive(barriers.index(STAGES + stage))
        step += 1
    return total


@gluon.jit
def multiply_tiles(
    outs,
    coefficients,
    branch,
    branch_scale_ptrs,
    scale_ptr,
    weight_scale_ptrs,
    bias_ptrs,
    type_ptr,
    partial_ptr,
    counter_ptr,
    codes_ring,
    weight_ring,
    out_tiles,
    scale_tiles,
    type_tiles,
    barriers,
    M,
    sizes,
    num_even,
    DEFAULT_TYPE: gl.constexpr,
    SLICE_OF_TYPE: gl.constexpr,
    SLICE_STARTS: gl.constexpr,
    GROUPS: gl.constexpr,
    GROUP_M: gl.constexpr,
    SPLIT_K: gl.constexpr,
    PROMOTED: gl.constexpr,
    R: gl.constexpr,
    RANK: gl.constexpr,
    ONE: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One group of four warps: its part of the outputs of each tile, scaled and written out."""
    STAGES: gl.constexpr = weight_ring.shape[0] // GROUPS
    ROWS: gl.constexpr = weight_ring.shape[1]
    BLOCK_K: gl.constexpr = weight_ring.shape[2]
    BLOCK_M: gl.constexpr = codes_ring.shape[1]
    TOKENS: gl.constexpr = BLOCK_M if BLOCK_M < _INSTRUCTION_TOKENS else _INSTRUCTION_TOKENS
    layout: gl.constexpr = product_layout(TOKENS)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=4)
    E4M3: gl.constexpr = codes_ring.dtype == gl.float8e4nv
    BRANCH_STEPS: gl.constexpr = (2 * RANK + BLOCK_K - 1) // BLOCK_K
    NUM_SLICES: gl.constexpr = len(SLICE_STARTS)
    TYPED: gl.constexpr = type_ptr is not None and (len(bias_ptrs) > 0 or NUM_SLICES > 1)
    PART: gl.constexpr = BLOCK_M if BLOCK_M < 32 else 32
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    scales, types = scale_tiles.index(GROUP), type_tiles.index(GROUP)
    num_m, nums_n = gl.cdiv(M, BLOCK_M), tiles_of(sizes, GROUPS * ROWS)
    wait_for_previous_kernel()
    step = 0
    for item in range(gl.program_id(0), num_tiles(num_m, nums_n) * SPLIT_K, gl.num_programs(0)):
        which, tile_m, tile_n = place_of(item // SPLIT_K, num_m, nums_n, GROUP_M)
        first, last = bytes_of_tile(
            type_ptr,
            tile_m,
            M,
            num_even,
            DEFAULT_TYPE,
            SLICE_OF_TYPE,
            SLICE_STARTS,
            BLOCK_M,
            BLOCK_K,
            4,
        )
        first, last = part_of(first, last, item % SPLIT_K, BLOCK_K, SPLIT_K)
        first_m, first_n = tile_m * BLOCK_M, (tile_n * GROUPS + GROUP) * ROWS
        N, weight_scale_ptr = of_linear(sizes, which), of_linear(weight_scale_ptrs, which)
        bias_ptr = None
        if len(bias_ptrs) > 0:
            bias_ptr = of_linear(bias_ptrs, which)
        # What the epilogue needs is on its way during the products.
        m = first_m + gl.arange(0, BLOCK_M, lanes)
        scale = gl.load(scale_ptr + m, m < M, 0.0)
        if TYPED:
            token_type = types_of(type_ptr, m, M, len(SLICE_OF_TYPE)).to(gl.int8)
        n = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(PART)))
        if not PROMOTED:
            weight_scales, biases = rows_of_outputs(
                weight_scale_ptr, bias_ptr, n, N, DEFAULT_TYPE, SLICE_OF_TYPE, NUM_SLICES, TYPED
            )
        total = gl.zeros((ROWS, BLOCK_M), gl.float32 if E4M3 else gl.int32, layout)
        if NUM_SLICES == 1:
            mbarrier.wait(barriers.index(2 * STAGES), 0)  # once and for all
        for _byte in range(first, last, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(barriers.index(stage), (step // STAGES) & 1)
            packed = weight_ring.index(GROUPS * stage + GROUP).load(left)
            even_codes = codes_ring.index(2 * stage).permute((1, 0))
            odd_codes = codes_ring.index(2 * stage + 1).permute((1, 0))
            if E4M3:
                even, odd = unpack_e4m3(packed)
            else:
                even, odd = unpack_codes(packed)
            # Waited for here and not a step later: tensor cores that read registers across the end of the loop's body
            # make the assembler wait after each of their instructions (C7512). The other groups multiply meanwhile.
            if PROMOTED:
                of_step = gl.zeros((ROWS, BLOCK_M), gl.float32, layout)
                of_step = warpgroup_mma(even, even_codes, of_step, use_acc=False, is_async=True)
                of_step = warpgroup_mma(odd, odd_codes, of_step, is_async=True)
                total += warpgroup_mma_wait(num_outstanding=0, deps=(of_step,))
            else:
                total = warpgroup_mma(even, even_codes, total, is_async=True)
                total = warpgroup_mma(odd, odd_codes, total, is_async=True)
                total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
            mbarrier.arrive(barriers.index(STAGES + stage))
            step += 1
        if PROMOTED:  # whose registers are full during them
            weight_scales, biases = rows_of_outputs(
                weight_scale_ptr, bias_ptr, n, N, DEFAULT_TYPE, SLICE_OF_TYPE, NUM_SLICES, TYPED
            )
        is_whole = True
        if SPLIT_K > 1:
            of_group = GROUPS * (item // SPLIT_K) + GROUP
            total, is_whole = sum_of_parts(
                total, partial_ptr, counter_ptr, of_group, item % SPLIT_K, SPLIT_K, layout
            )
        if is_whole:
            scales.store(scale)
            if TYPED:
                types.store(token_type)
            sums = total
            if RANK > 0:
                sums = plus_branch(
                    total,
                    coefficients,
                    branch,
                    of_linear(branch_scale_ptrs, which),
                    weight_scales[0],
                    codes_ring,
                    weight_ring,
                    barriers,
                    step,
                    ONE,
                    GROUPS,
                    R,
                    RANK,
                    GROUP,
                    product_layout(TOKENS, 16),
                )
            tma.store_wait(0)
            write_tile(
                sums,
                out_tiles.index(GROUP),
                scales,
                types,
                weight_scales,
                biases,
                SLICE_OF_TYPE,
                E4M3,
            )
            fence_async_shared()
            store_tile_of(outs, which, [first_m, first_n], out_tiles.index(GROUP))
        elif RANK > 0:
            for ahead in gl.static_range(BRANCH_STEPS):
                unread = (step + ahead) % STAGES
                mbarrier.wait(barriers.index(unread), ((step + ahead) // STAGES) & 1)
                mbarrier.arrive(barriers.index(STAGES + unread))
        step += BRANCH_STEPS
    tma.store_wait(0)


@gluon.jit
def hopper_linear_kernel(
    codes,  # descriptor of [M, K] int8 or e4m3, engine order
    weight,  # descriptor of [N, bytes] int8
    out,  # descriptor of [M, N]
    branch,  # descriptor of [R, N] int8, or None
    branch_scale_ptr,  # [R] fp32, or None
    weight_scale_ptr,  # [S, N] fp32
    bias_ptr,  # [P, N] fp32, or None
    N,
    weight_1,  # the same of a second Linear, or None
    out_1,
    branch_1,
    branch_scale_ptr_1,
    weight_scale_ptr_1,
    bias_ptr_1,
    N_1,
    weight_2,  # ... and of a third
    out_2,
    branch_2,
    branch_scale_ptr_2,
    weight_scale_ptr_2,
    bias_ptr_2,
    N_2,
    coefficients,  # descriptor of [M, RANK] bf16, or None
    scale_ptr,  # [M] fp32
    type_ptr,  # [M] int, or None: all tokens are DEFAULT_TYPE
    partial_ptr,  # [tiles, GROUPS, SPLIT_K, ROWS, BLOCK_M] as sums are, or None if K is not split
    counter_ptr,  # [tiles, GROUPS] int32 of zeros, which it leaves as such, or None
    M,
    num_even,
    DEFAULT_TYPE: gl.constexpr,
    SLICE_OF_TYPE: gl.constexpr,
    SLICE_STARTS: gl.constexpr,  # bytes of a weight row
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUPS: gl.constexpr,
    GROUP_M: gl.constexpr,
    SPLIT_K: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    PROMOTED: gl.constexpr,
    R: gl.constexpr,  # columns of the branch
    RANK: gl.constexpr,  # as many, and zeros behind it up to a multiple of 8; 0: no branch
    ONE: gl.constexpr,  # in units of the sums
    num_warps: gl.constexpr,
):
    allow_next_kernel()
    codes_ring = gl.allocate_shared_memory(
        codes.dtype, [2 * STAGES, BLOCK_M, BLOCK_K], codes.layout
    )
    weight_ring = gl.allocate_shared_memory(
        weight.dtype, [GROUPS * STAGES, ROWS, BLOCK_K], weight.layout
    )
    out_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, BLOCK_M, ROWS], out.layout)
    by_token: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scale_tiles = gl.allocate_shared_memory(gl.float32, [GROUPS, BLOCK_M], by_token)
    type_tiles = gl.allocate_shared_memory(gl.int8, [GROUPS, BLOCK_M], by_token)
    barriers = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=1)
        mbarrier.init(barriers.index(STAGES + stage), count=GROUPS)
    mbarrier.init(barriers.index(2 * STAGES), count=STAGES)
    weights = those_given(weight, weight_1, weight_2)
    outs = those_given(out, out_1, out_2)
    branches = those_given(branch, branch_1, branch_2)
    branch_scale_ptrs = those_given(branch_scale_ptr, branch_scale_ptr_1, branch_scale_ptr_2)
    weight_scale_ptrs = those_given(weight_scale_ptr, weight_scale_ptr_1, weight_scale_ptr_2)
    bias_ptrs = those_given(bias_ptr, bias_ptr_1, bias_ptr_2)
    sizes = those_given(N, N_1, N_2)
    # The first group has the registers that are left. Why all in full: a tuple in a variable loses what is None.
    # fmt: off
    if GROUPS == 2:
        gl.warp_specialize([
            (multiply_tiles, (
                outs, coefficients, branch, branch_scale_ptrs, scale_ptr, weight_scale_ptrs, bias_ptrs, type_ptr,
                partial_ptr, counter_ptr, codes_ring, weight_ring, out_tiles, scale_tiles, type_tiles,
                barriers, M, sizes, num_even, DEFAULT_TYPE, SLICE_OF_TYPE, SLICE_STARTS,
                GROUPS, GROUP_M, SPLIT_K, PROMOTED, R, RANK, ONE, 0,
            )),
            (multiply_tiles, (
                outs, coefficients, branch, branch_scale_ptrs, scale_ptr, weight_scale_ptrs, bias_ptrs, type_ptr,
                partial_ptr, counter_ptr, codes_ring, weight_ring, out_tiles, scale_tiles, type_tiles,
                barriers, M, sizes, num_even, DEFAULT_TYPE, SLICE_OF_TYPE, SLICE_STARTS,
                GROUPS, GROUP_M, SPLIT_K, PROMOTED, R, RANK, ONE, 1,
            )),
            (copy_tiles, (
                codes, weights, coefficients, branches, type_ptr, codes_ring, weight_ring, barriers,
                M, sizes, num_even,
                DEFAULT_TYPE, SLICE_OF_TYPE, SLICE_STARTS, GROUPS, GROUP_M, SPLIT_K, RANK,
            )),
        ], [4, 1], [GROUP_REGISTERS, 24])
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize([
            (multiply_tiles, (
                outs, coefficients, branch, branch_scale_ptrs, scale_ptr, weight_scale_ptrs, bias_ptrs, type_ptr,
                partial_ptr, counter_ptr, codes_ring, weight_ring, out_tiles, scale_tiles, type_tiles,
                barriers, M, sizes, num_even, DEFAULT_TYPE, SLICE_OF_TYPE, SLICE_STARTS,
                GROUPS, GROUP_M, SPLIT_K, PROMOTED, R, RANK, ONE, 0,
            )),
            (multiply_tiles, (
                outs, coefficients, branch, branch_scale_ptrs, scale_ptr, weight_scale_ptrs, bias_ptrs, type_ptr,
                partial_ptr, counter_ptr, codes_ring, weight_ring, out_tiles, scale_tiles, type_tiles,
                barriers, M, sizes, num_even, DEFAULT_TYPE, SLICE_OF_TYPE, SLICE_STARTS,
                GROUPS, GROUP_M, SPLIT_K, PROMOTED, R, RANK, ONE, 1,
            )),
            (multiply_tiles, (
                outs, coefficients, branch, branch_scale_ptrs, scale_ptr, weight_scale_ptrs, bias_ptrs, type_ptr,
                partial_ptr, counter_ptr, codes_ring, weight_ring, out_tiles, scale_tiles, type_tiles,
                barriers, M, sizes, num_even, DEFAULT_TYPE, SLICE_OF_TYPE, SLICE_STARTS,
                GROUPS, GROUP_M, SPLIT_K, PROMOTED, R, RANK, ONE, 2,
            )),
            (copy_tiles, (
                codes, weights, coefficients, branches, type_ptr, codes_ring, weight_ring, barriers,
                M, sizes, num_even,
                DEFAULT_TYPE, SLICE_OF_TYPE, SLICE_STARTS, GROUPS, GROUP_M, SPLIT_K, RANK,
            )),
        ], [4, 4, 1], [GROUP_REGISTERS, GROUP_REGISTERS, 24])
    # fmt: on


def registers(tile: TileConfig) -> dict[str, int]:
    """Registers of a thread: of all groups and four warps for copying on average, and in a group but the first."""
    if tile.block_m <= 32:
        average, group = 64, 80
    elif tile.block_m <= 64:
        average, group = 80, 104
    else:
        average, group = (168, 232) if tile.groups == 2 else (128, 160)
    return {"maxnreg": average, "GROUP_REGISTERS": group}


@functools.cache
def layouts(
    tile: TileConfig, dtype: torch.dtype, codes: torch.dtype = torch.int8
) -> tuple[Any, Any, Any, Any, Any]:
    """Shared-memory layouts of a tile of codes, and of a group's packed weights and outputs; of a tile of coefficients,
    and of a group's branch."""
    out = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    shared = gl.NVMMASharedLayout.get_default_for
    return (
        shared([tile.block_m, tile.block_k], gl.int8 if codes == torch.int8 else gl.float8e4nv),
        shared([tile.rows, tile.block_k], gl.int8),
        shared([tile.block_m, tile.rows], out),
        shared([tile.block_m, tile.block_k // 2], gl.bfloat16),
        shared([tile.block_k // 2, tile.rows], gl.int8),
    )


# weight, weight_scale, bias_table, branch_weight, branch_scale
_Linear = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def hopper_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias_table: Tensor | None,
    token_type: Tensor | None,
    slice_sizes: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    dtype: torch.dtype,
    tile: TileConfig | None = None,
    promoted: bool | None = None,
    coefficients: Tensor | None = None,
    branch_weight: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """A whole linear after its transform, on Hopper.

    codes         [M, K'] int8 or e4m3 in engine order, contiguous, zeros outside of a token's slice
    scale         [M] fp32
    weight        [N, ceil(K' / 8)] int32, contiguous
    weight_scale  [S, N] fp32
    bias_table    [P, N] fp32, or None
    token_type    [M] integers, or None: all tokens are ``default_type``
    slice_sizes   columns of each slice, even numbers
    tile          None: the fastest that was measured (``tuning``), else ``choose_hopper_tile``; must be legal for the
                  shape, ``tiles.fits_hopper``
    promoted      e4m3: True keeps the products of integers exact; None: ``tiles.PROMOTED``
    coefficients  [M, branch_width(R)] bf16, divided by ``scale``, with branch_weight [R, N] int8, both contiguous, and
                  branch_scale [R] fp32; or None

    Returns [M, N] of ``dtype``.
    """
    (out,) = hopper_linears(
        codes,
        scale,
        [(weight, weight_scale, bias_table, branch_weight, branch_scale)],
        token_type,
        slice_sizes,
        slice_of_type,
        default_type,
        dtype,
        tile,
        promoted,
        coefficients,
    )
    return out


def hopper_linears(
    codes: Tensor,
    scale: Tensor,
    linears: Sequence[_Linear],
    token_type: Tensor | None,
    slice_sizes: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    dtype: torch.dtype,
    tile: TileConfig | None = None,
    promoted: bool | None = None,
    coefficients: Tensor | None = None,
) -> list[Tensor]:
    """Linears of one input, up to three in a launch; ``hopper_linear`` says what is what.

    tile  of each launch

    Returns [M, N] of ``dtype`` for each, N its number of outputs.
    """
    num_tokens = codes.shape[0]
    outputs = [
        torch.empty(num_tokens, weight.shape[0], dtype=dtype, device=codes.device)
        for weight, *_ in linears
    ]
    if num_tokens == 0:
        return outputs
    is_e4m3, has_branch = codes.dtype != torch.int8, coefficients is not None
    if promoted is None:
        promoted = PROMOTED and is_e4m3
    static = (default_type, tuple(slice_of_type), tuple(slice_sizes))
    of_tokens = (codes, scale, token_type, coefficients)
    each = list(zip(linears, outputs, strict=True))
    for some in in_launches(each, is_e4m3=is_e4m3, has_branch=has_branch):
        _launch(of_tokens, some, static, tile, promoted)
    return outputs


def _launch(
    of_tokens: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    linears: Sequence[tuple[_Linear, Tensor]],
    static: tuple[int, tuple[int, ...], tuple[int, ...]],
    tile: TileConfig | None,
    promoted: bool,
) -> None:
    """Run the kernel for up to three Linears, each with its output."""
    codes, scale, token_type, coefficients = of_tokens
    num_tokens, num_codes = codes.shape
    num_multiprocessors = multiprocessors_of(codes.device)
    num_outputs = sum(out.shape[1] for _, out in linears)
    tile = tile or known_tile(
        problem_of(num_tokens, num_outputs, static[2], codes.dtype), gpu_name(codes.device)
    )
    tile = tile or choose_hopper_tile(
        num_tokens, num_outputs, num_codes, num_multiprocessors, promoted=promoted
    )
    described = TensorDescriptor.from_tensor
    columns = tile.block_k // 2
    of_codes, of_weight, of_out, of_coefficients, of_branch = layouts(
        tile, linears[0][1].dtype, codes.dtype
    )
    rank = num_columns = tiles = 0
    operands: list[Any] = []
    for (weight, weight_scale, bias_table, branch_weight, branch_scale), out in linears:
        branch = None
        if coefficients is not None and branch_weight is not None:
            rank, num_columns = coefficients.shape[1], branch_weight.shape[0]
            branch = described(branch_weight, [columns, tile.rows], of_branch)
        tiles += -(-num_tokens // tile.block_m) * -(-out.shape[1] // tile.block_n)
        operands += [
            described(weight.view(torch.int8), [tile.rows, tile.block_k], of_weight),
            described(out, [tile.block_m, tile.rows], of_out),
            branch,
            branch_scale,
            weight_scale,
            bias_table,
            out.shape[1],
        ]
    operands += [None] * (len(operands) // len(linears) * (MOST_TOGETHER - len(linears)))
    partial = counter = None
    if tile.split_k > 1:
        size = tiles * tile.split_k * tile.block_m * tile.block_n
        partial = torch.empty(size, dtype=partial_dtype(codes.dtype), device=codes.device)
        counter = counters(codes.device, tile.groups * tiles)
    ranks = num_columns, rank
    launch = _launch_of(tile, promoted, *static, ranks, ONE_IN_SUMS[codes.dtype])
    launch(
        codes.device,
        min(tiles * tile.split_k, num_multiprocessors * tile.programs),
        described(codes, [tile.block_m, tile.block_k], of_codes),
        *operands,
        described(coefficients, [tile.block_m, columns], of_coefficients) if rank else None,
        scale,
        token_type,
        partial,
        counter,
        num_tokens,
        num_codes // 2,
    )


@functools.cache
def _launch_of(
    tile: TileConfig,
    promoted: bool,
    default_type: int,
    slice_of_type: tuple[int, ...],
    slice_sizes: tuple[int, ...],
    ranks: tuple[int, int],
    one: float,
) -> Launch:
    return Launch(
        hopper_linear_kernel,
        DEFAULT_TYPE=default_type,
        SLICE_OF_TYPE=slice_of_type,
        SLICE_STARTS=tuple(sum(slice_sizes[:i]) // 2 for i in range(len(slice_sizes))),
        STAGES=tile.num_stages,
        BLOCK_M=tile.block_m,
        ROWS=tile.rows,
        BLOCK_K=tile.block_k,
        GROUPS=tile.groups,
        GROUP_M=tile.group_m,
        SPLIT_K=tile.split_k,
        PROMOTED=promoted,
        R=ranks[0],
        RANK=ranks[1],
        ONE=one,
        num_warps=tile.num_warps,
        **registers(tile),
        enable_fp_fusion=True,
        launch_pdl=True,
    )
