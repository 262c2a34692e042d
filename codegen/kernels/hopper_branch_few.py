"""Split the branch off few transformed tokens and round what is left: ``hopper_branch_quantize`` for decoding.

There a program has 64 tokens and goes three times over all of K; with one token that is as slow. Here programs share
the features of a token, and have their rows of U in registers before the kernel in front of them is done. Twice each
needs what all have found: coefficients, which a second kernel adds up, and the largest magnitude, which the last of
its programs sees: that one makes the token's codes.

U is int8 codes as they are stored. The rest is rounded where ``hopper_branch_quantize`` rounds; letters as there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from freeact_fx.codegen.tiles import branch_width, few_tokens_tile
from freeact_fx.reference import column_step

from .gluon_names import barrier
from .hopper_arithmetic import larger, larger_magnitude, reciprocal, to_e4m3, to_int4
from .hopper_transform_quantize import SMALLEST, type_of
from .launches import Launch
from .stream_order import allow_next_kernel, counters, wait_for_previous_kernel


@gluon.constexpr_function
def rows_of_columns(block_r, num_warps):
    """Sixteen codes of a row of U to a thread."""
    per_row = block_r // 16
    return gl.BlockedLayout([1, 16], [32 // per_row, per_row], [num_warps, 1], [1, 0])


@gluon.jit
def columns_of_part(
    columns_ptr,
    part,
    K: gl.constexpr,
    R: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    layout: gl.constexpr,
):
    """The rows of U that belong to a part of the features in engine order, the even ones before the odd ones."""
    first = part * BLOCK_K
    is_odd = (first >= K // 2).to(gl.int32)
    pair = first - is_odd * (K // 2) + gl.arange(0, BLOCK_K, gl.SliceLayout(1, layout))
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, layout))
    place = (2 * pair + is_odd)[:, None] * R + r[None, :]
    return gl.load(columns_ptr + place, (r < R)[None, :], 0)


@gluon.jit
def values_of_part(
    z_ptr, token, part, K: gl.constexpr, BLOCK_K: gl.constexpr, layout: gl.constexpr
):
    k = part * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(1, layout))
    return gl.load(z_ptr + token.to(gl.int64) * K + k).to(gl.float32)


@gluon.jit
def coefficients_kernel(
    z_ptr,  # [M, K] bf16, in engine order
    columns_ptr,  # [K, R] int8
    partial_ptr,  # [M, parts, BLOCK_R] fp32
    K: gl.constexpr,
    R: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What each part of a token's features adds to its coefficients, in codes of U."""
    layout: gl.constexpr = rows_of_columns(BLOCK_R, num_warps)
    allow_next_kernel()
    token = gl.program_id(0) // (K // BLOCK_K)
    part = gl.program_id(0) % (K // BLOCK_K)
    columns = columns_of_part(columns_ptr, part, K, R, BLOCK_K, BLOCK_R, layout)
    wait_for_previous_kernel()
    z = values_of_part(z_ptr, token, part, K, BLOCK_K, layout)
    c = gl.sum(z[:, None] * columns.to(gl.float32), 0)
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, layout))
    gl.store(partial_ptr + gl.program_id(0) * BLOCK_R + r, c)


@gluon.jit
def codes_kernel(
    z_ptr,
    columns_ptr,
    partial_ptr,
    type_ptr,  # [M] int, or None: all tokens are DEFAULT_TYPE
    clip_ptr,  # [P] fp32
    rest_ptr,  # [M, K] fp32, for the programs of a token among themselves
    counter_ptr,  # [M] int32 of zeros, which it leaves as such
    codes_ptr,  # [M, K] int8 or the bytes of e4m3
    scale_ptr,  # [M] fp32
    coefficients_ptr,  # [M, WIDTH] bf16, in units of the scale; zeros behind R
    K: gl.constexpr,
    R: gl.constexpr,
    WIDTH: gl.constexpr,
    OWN_RANK: gl.constexpr,
    NUM_TYPES: gl.constexpr,
    DEFAULT_TYPE: gl.constexpr,
    QMAX: gl.constexpr,
    STEP: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PARTS: gl.constexpr,  # a power of two, of which the token has K / BLOCK_K
    CHUNK: gl.constexpr,
    num_warps: gl.constexpr,
):
    layout: gl.constexpr = rows_of_columns(BLOCK_R, num_warps)
    NUM_PARTS: gl.constexpr = K // BLOCK_K
    allow_next_kernel()
    token = gl.program_id(0) // NUM_PARTS
    part = gl.program_id(0) % NUM_PARTS
    columns = columns_of_part(columns_ptr, part, K, R, BLOCK_K, BLOCK_R, layout)
    wait_for_previous_kernel()
    z = values_of_part(z_ptr, token, part, K, BLOCK_K, layout)
    token_type = type_of(type_ptr, token, DEFAULT_TYPE, NUM_TYPES)
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, layout))
    p = gl.arange(0, PARTS, gl.SliceLayout(1, layout))
    place = (token * NUM_PARTS + p)[:, None] * BLOCK_R + r[None, :]
    c = STEP * gl.sum(gl.load(partial_ptr + place, (p < NUM_PARTS)[:, None], 0.0), 0)
    if OWN_RANK > 0:
        c = gl.where(r // OWN_RANK == token_type, c, 0.0)
    multiplied = c.to(gl.bfloat16).to(gl.float32)
    rest = z - STEP * gl.sum(columns.to(gl.float32) * multiplied[None, :], 1)
    of_token = rest_ptr + token.to(gl.int64) * K
    k = part * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(1, layout))
    gl.store(of_token + k, rest)
    barrier()
    if gl.atomic_add(counter_ptr + token, 1, sem="acq_rel") == NUM_PARTS - 1:
        gl.store(counter_ptr + token, 0)
        flat: gl.constexpr = gl.BlockedLayout([4], [32], [num_warps], [0])
        i = gl.arange(0, CHUNK, flat)
        # As in ``hopper_branch_quantize``: where a token is not finite nothing is.
        largest = gl.full((CHUNK,), float("nan"), gl.float32, flat)
        chunks = ()
        for number in gl.static_range(K // CHUNK):
            # Not out of the L1 cache, which may hold values of a call before.
            chunk = gl.load(of_token + number * CHUNK + i, cache_modifier=".cg")
            largest = larger_magnitude(largest, chunk)
            chunks = chunks + (chunk,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuple)
        per_code = gl.max(largest, 0) * gl.load(clip_ptr + token_type) / QMAX
        per_code = larger(per_code, SMALLEST)
        gl.store(scale_ptr + token, per_code)
        place_of_c = coefficients_ptr + token * WIDTH + r
        gl.store(place_of_c, (c / per_code).to(gl.bfloat16), r < WIDTH)
        target = codes_ptr + token.to(gl.int64) * K + i
        for number in gl.static_range(K // CHUNK):
            if QMAX == 448:
                codes = to_e4m3(chunks[number], reciprocal(per_code))
            else:
                gl.static_assert(QMAX == 7)
                codes = to_int4(chunks[number], reciprocal(14 * per_code))
            gl.store(target + number * CHUNK, codes)


def branch_quantize_few(
    z: Tensor,
    lowrank: Tensor,
    token_type: Tensor | None,
    clip: Tensor,
    default_type: int,
    own_rank: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hopper_branch_quantize`` by as many programs as share a token's features."""
    (num_tokens, num_features), rank = z.shape, lowrank.shape[1]
    empty = functools.partial(torch.empty, device=z.device)
    tile = few_tokens_tile(num_features, rank)
    num_parts = num_features // tile.block_k
    partial = empty(num_tokens * num_parts * tile.block_r, dtype=torch.float32)
    rest = empty(num_tokens, num_features, dtype=torch.float32)
    codes = empty(num_tokens, num_features, dtype=torch.int8)
    scale = empty(num_tokens, 1, dtype=torch.float32)
    coefficients = empty(num_tokens, branch_width(rank), dtype=torch.bfloat16)
    add_up, make_codes = _launch_of(num_features, rank, own_rank, clip.shape[0], default_type, qmax)
    add_up(z.device, num_tokens * num_parts, z, lowrank, partial)
    make_codes(
        z.device,
        num_tokens * num_parts,
        z,
        lowrank,
        partial,
        token_type,
        clip,
        rest,
        counters(z.device, num_tokens, 0),
        codes,
        scale,
        coefficients,
    )
    return codes.view(torch.float8_e4m3fn) if qmax == 448 else codes, scale, coefficients


@functools.cache
def _launch_of(
    num_features: int, rank: int, own_rank: int, num_types: int, default_type: int, qmax: int
) -> tuple[Launch, Launch]:
    tile = few_tokens_tile(num_features, rank)
    shared = {
        "K": num_features,
        "R": rank,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": tile.block_r,
        "num_warps": tile.num_warps,
        "enable_fp_fusion": True,
        "launch_pdl": True,
    }
    num_parts = num_features // tile.block_k
    return Launch(coefficients_kernel, **shared), Launch(
        codes_kernel,
        **shared,
        WIDTH=branch_width(rank),
        OWN_RANK=own_rank,
        NUM_TYPES=num_types,
        DEFAULT_TYPE=default_type,
        QMAX=qmax,
        STEP=column_step(num_features),
        PARTS=1 << (num_parts - 1).bit_length(),
        CHUNK=tile.chunk,
    )
