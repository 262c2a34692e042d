"""Split the branch off few transformed tokens and round what is left: ``hopper_branch_quantize`` for decoding.

There a program has 64 tokens and goes three times over all of K, which takes as long for one token. Here programs share
the features of sixteen tokens, a tile of them each, and have their rows of U ready for the tensor cores before the
kernel in front of them is done. What all have found each needs twice: coefficients and the largest magnitude. So there
are three kernels: one finds coefficients of parts of the features, one what is left, and one its codes.

U is int8 codes as they are stored. The rest is rounded where ``hopper_branch_quantize`` rounds; letters as there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from freeact_fx.codegen.tiles import branch_width, few_tokens_tile
from freeact_fx.reference import column_step

from .hopper_arithmetic import larger, larger_magnitude, reciprocal, to_e4m3, to_int4
from .hopper_int_mm import types_of
from .hopper_transform_quantize import SMALLEST, type_of
from .launches import Launch
from .stream_order import allow_next_kernel, wait_for_previous_kernel


@gluon.constexpr_function
def sums_layout(num_warps):
    """Sixteen tokens by columns that the warps share."""
    return gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, num_warps], instr_shape=[16, 8]
    )


@gluon.constexpr_function
def operand_layout(index, num_warps):
    """Of the left (0) or the right (1) operand of such sums."""
    return gl.DotOperandLayout(index, sums_layout(num_warps), k_width=2)


@gluon.constexpr_function
def rows_layout(length, size, num_warps):
    """Rows of a power of two of elements, ``size`` of them to a thread."""
    per_row = min(32, length // size)
    return gl.BlockedLayout([1, size], [32 // per_row, per_row], [num_warps, 1], [1, 0])


@gluon.jit
def columns_of_tile(
    columns_ptr,
    tile,
    K: gl.constexpr,
    R: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The rows of U [BLOCK_K, BLOCK_R] of a tile of the features in engine order, the even ones before the odd ones."""
    layout: gl.constexpr = rows_layout(BLOCK_R, 16, num_warps)
    first = tile * BLOCK_K
    is_odd = (first >= K // 2).to(gl.int32)
    pair = first - is_odd * (K // 2) + gl.arange(0, BLOCK_K, gl.SliceLayout(1, layout))
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, layout))
    place = (2 * pair + is_odd)[:, None] * R + r[None, :]
    return gl.load(columns_ptr + place, (r < R)[None, :], 0).to(gl.bfloat16)


@gluon.jit
def values_of_tile(z_ptr, m, tile, M, K: gl.constexpr, BLOCK_K: gl.constexpr, layout: gl.constexpr):
    k = tile * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    return gl.load(z_ptr + m.to(gl.int64)[:, None] * K + k[None, :], (m < M)[:, None], 0.0)


@gluon.jit
def coefficients_kernel(
    z_ptr,  # [M, K] bf16, in engine order
    columns_ptr,  # [K, R] int8
    partial_ptr,  # [tiles of tokens, num_parts, BLOCK_M, BLOCK_R] fp32
    M,
    num_parts,  # programs for one tile of tokens
    K: gl.constexpr,
    R: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What each part of the tokens' features adds to their coefficients, in codes of U."""
    left: gl.constexpr = operand_layout(0, num_warps)
    right: gl.constexpr = operand_layout(1, num_warps)
    rows: gl.constexpr = rows_layout(BLOCK_K, 8, num_warps)
    outputs: gl.constexpr = rows_layout(BLOCK_R, 4, num_warps)
    allow_next_kernel()
    first_m = gl.program_id(0) // num_parts * BLOCK_M
    part = gl.program_id(0) % num_parts
    columns = columns_of_tile(columns_ptr, part, K, R, BLOCK_K, BLOCK_R, num_warps)
    first_columns = gl.convert_layout(columns, right)
    wait_for_previous_kernel()
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, rows))
    z = values_of_tile(z_ptr, m, part, M, K, BLOCK_K, rows)
    c = gl.zeros((BLOCK_M, BLOCK_R), gl.float32, sums_layout(num_warps))
    c = mma_v2(gl.convert_layout(z, left), first_columns, c)
    for tile in range(part + num_parts, K // BLOCK_K, num_parts):
        columns = columns_of_tile(columns_ptr, tile, K, R, BLOCK_K, BLOCK_R, num_warps)
        z = values_of_tile(z_ptr, m, tile, M, K, BLOCK_K, rows)
        c = mma_v2(gl.convert_layout(z, left), gl.convert_layout(columns, right), c)
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, outputs))
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, outputs))
    place = (gl.program_id(0) * BLOCK_M + row)[:, None] * BLOCK_R + r[None, :]
    gl.store(partial_ptr + place, gl.convert_layout(c, outputs))


@gluon.jit
def rest_kernel(
    z_ptr,
    columns_ptr,
    partial_ptr,
    type_ptr,  # [M] int, or None: all tokens are DEFAULT_TYPE
    rest_ptr,  # [M, K] fp32
    largest_ptr,  # [M, K / BLOCK_K] fp32
    sums_ptr,  # [M, BLOCK_R] fp32: coefficients
    M,
    num_parts,
    K: gl.constexpr,
    R: gl.constexpr,
    OWN_RANK: gl.constexpr,
    NUM_TYPES: gl.constexpr,
    DEFAULT_TYPE: gl.constexpr,
    STEP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``z - c U^T`` of a tile of features, and its largest magnitudes."""
    NUM_TILES: gl.constexpr = K // BLOCK_K
    left: gl.constexpr = operand_layout(0, num_warps)
    right: gl.constexpr = operand_layout(1, num_warps)
    rows: gl.constexpr = rows_layout(BLOCK_K, 8, num_warps)
    inputs: gl.constexpr = rows_layout(BLOCK_R, 4, num_warps)
    allow_next_kernel()
    tile_m = gl.program_id(0) // NUM_TILES
    tile = gl.program_id(0) % NUM_TILES
    columns = columns_of_tile(columns_ptr, tile, K, R, BLOCK_K, BLOCK_R, num_warps)
    columns = gl.convert_layout(columns.permute((1, 0)), right)
    wait_for_previous_kernel()
    m = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, rows))
    z = values_of_tile(z_ptr, m, tile, M, K, BLOCK_K, rows)
    # Parts one after the other, as many at a time as a thread may wait for.
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, inputs))
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, inputs))
    place = (tile_m * num_parts * BLOCK_M + row)[:, None] * BLOCK_R + r[None, :]
    c = gl.zeros((BLOCK_M, BLOCK_R), gl.float32, inputs)
    for first in range(0, num_parts, 8):
        for i in gl.static_range(8):
            of_part = partial_ptr + (first + i) * (BLOCK_M * BLOCK_R) + place
            # Each is read once here: not by way of the L1 cache.
            c += gl.load(of_part, first + i < num_parts, 0.0, cache_modifier=".cg")
    c = c * STEP
    row_m = tile_m * BLOCK_M + row
    if OWN_RANK > 0:
        token_type = DEFAULT_TYPE
        if type_ptr is not None:
            token_type = types_of(type_ptr, row_m, M, NUM_TYPES)[:, None]
        c = gl.where((r // OWN_RANK)[None, :] == token_type, c, 0.0)
    if tile == 0:
        gl.store(sums_ptr + row_m[:, None] * BLOCK_R + r[None, :], c, (row_m < M)[:, None])
    multiplied = gl.convert_layout(c.to(gl.bfloat16), left)
    of_branch = gl.zeros((BLOCK_M, BLOCK_K), gl.float32, sums_layout(num_warps))
    of_branch = mma_v2(multiplied, columns, of_branch)
    rest = z.to(gl.float32) - STEP * gl.convert_layout(of_branch, rows)
    k = tile * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, rows))
    gl.store(rest_ptr + m.to(gl.int64)[:, None] * K + k[None, :], rest, (m < M)[:, None])
    # As in ``hopper_branch_quantize``: where a token is not finite nothing is.
    largest = gl.full((BLOCK_M, BLOCK_K), float("nan"), gl.float32, rows)
    largest = gl.max(larger_magnitude(largest, rest), 1)
    gl.store(largest_ptr + m * NUM_TILES + tile, largest, m < M)


@gluon.jit
def codes_kernel(
    rest_ptr,
    largest_ptr,
    sums_ptr,
    type_ptr,
    clip_ptr,  # [P] fp32
    codes_ptr,  # [M, K] int8 or the bytes of e4m3
    scale_ptr,  # [M] fp32
    coefficients_ptr,  # [M, WIDTH] bf16, in units of the scale; zeros behind R
    K: gl.constexpr,
    WIDTH: gl.constexpr,
    NUM_TYPES: gl.constexpr,
    DEFAULT_TYPE: gl.constexpr,
    QMAX: gl.constexpr,
    NUM_TILES: gl.constexpr,
    TILES: gl.constexpr,  # a power of two, at least that
    CHUNK: gl.constexpr,
    BLOCK_R: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The codes of a chunk of a token; the program of its first chunk has the scale and the coefficients."""
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [num_warps], [0])
    allow_next_kernel()
    token = gl.program_id(0) // (K // CHUNK)
    chunk = gl.program_id(0) % (K // CHUNK)
    wait_for_previous_kernel()
    place = token.to(gl.int64) * K + chunk * CHUNK + gl.arange(0, CHUNK, flat)
    rest = gl.load(rest_ptr + place)
    tile = gl.arange(0, TILES, flat)
    largest = gl.load(largest_ptr + token * NUM_TILES + tile, tile < NUM_TILES, float("nan"))
    token_type = type_of(type_ptr, token, DEFAULT_TYPE, NUM_TYPES)
    per_code = gl.max(largest, 0) * gl.load(clip_ptr + token_type) / QMAX
    per_code = larger(per_code, SMALLEST)
    if chunk == 0:
        gl.store(scale_ptr + token, per_code)
        r = gl.arange(0, BLOCK_R, flat)
        c = gl.load(sums_ptr + token * BLOCK_R + r) / per_code
        gl.store(coefficients_ptr + token * WIDTH + r, c.to(gl.bfloat16), r < WIDTH)
    if QMAX == 448:
        codes = to_e4m3(rest, reciprocal(per_code))
    else:
        gl.static_assert(QMAX == 7)
        codes = to_int4(rest, reciprocal(14 * per_code))
    gl.store(codes_ptr + place, codes)


def branch_quantize_few(
    z: Tensor,
    lowrank: Tensor,
    token_type: Tensor | None,
    clip: Tensor,
    default_type: int,
    own_rank: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hopper_branch_quantize`` by as many programs as share the tokens' features."""
    (num_tokens, num_features), rank = z.shape, lowrank.shape[1]
    tile = few_tokens_tile(num_features, rank)
    tiles_m, num_tiles = -(-num_tokens // tile.block_m), num_features // tile.block_k
    num_parts = tile.num_parts(tiles_m)
    empty = functools.partial(torch.empty, device=z.device)
    partial = empty(tiles_m * num_parts * tile.block_m * tile.block_r, dtype=torch.float32)
    rest = empty(num_tokens, num_features, dtype=torch.float32)
    largest = empty(num_tokens, num_tiles, dtype=torch.float32)
    sums = empty(num_tokens, tile.block_r, dtype=torch.float32)
    codes = empty(num_tokens, num_features, dtype=torch.int8)
    scale = empty(num_tokens, 1, dtype=torch.float32)
    coefficients = empty(num_tokens, branch_width(rank), dtype=torch.bfloat16)
    add_up, take_away, make_codes = _launch_of(
        num_features, rank, own_rank, clip.shape[0], default_type, qmax
    )
    add_up(z.device, tiles_m * num_parts, z, lowrank, partial, num_tokens, num_parts)
    take_away(
        z.device,
        tiles_m * num_tiles,
        z,
        lowrank,
        partial,
        token_type,
        rest,
        largest,
        sums,
        num_tokens,
        num_parts,
    )
    make_codes(
        z.device,
        num_tokens * (num_features // tile.chunk),
        rest,
        largest,
        sums,
        token_type,
        clip,
        codes,
        scale,
        coefficients,
    )
    return codes.view(torch.float8_e4m3fn) if qmax == 448 else codes, scale, coefficients


@functools.cache
def _launch_of(
    num_features: int, rank: int, own_rank: int, num_types: int, default_type: int, qmax: int
) -> tuple[Launch, Launch, Launch]:
    tile = few_tokens_tile(num_features, rank)
    num_tiles = num_features // tile.block_k
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": True, "launch_pdl": True}
    of_types = {"NUM_TYPES": num_types, "DEFAULT_TYPE": default_type}
    shared = {
        "K": num_features,
        "R": rank,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": tile.block_r,
        **options,
    }
    return (
        Launch(coefficients_kernel, **shared),
        Launch(
            rest_kernel, **shared, **of_types, OWN_RANK=own_rank, STEP=column_step(num_features)
        ),
        Launch(
            codes_kernel,
            **options,
            **of_types,
            K=num_features,
            WIDTH=branch_width(rank),
            QMAX=qmax,
            NUM_TILES=num_tiles,
            TILES=1 << (num_tiles - 1).bit_length(),
            CHUNK=tile.chunk,
            BLOCK_R=tile.block_r,
        ),
    )
