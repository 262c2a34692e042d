"""Split the branch off transformed tokens and round what is left: plan ``branch`` on Hopper (Gluon).

Coefficients ``c = z U`` take all of a token, its grid all of ``z - c U^T``, and neither fits a multiprocessor for as
many tokens as tensor cores want. So a program goes three times over its tokens' z, which comes out of the L2 cache as
far as it is still there: for c, for the largest magnitude, and for the codes: forwards, backwards, and forwards again.
z and the rows of U arrive by the copy engine in chunks, each in the place of its number modulo the places there are; so
the last ones of one time over are the first of the next, and still there. A place is filled in turn by chunks of even
and of odd ``chunk // STAGES``, which is the phase of its barrier.

Where that leaves multiprocessors idle, PARTS programs share the features of a tile of tokens, and wait for each other
twice: for the coefficients and for the largest magnitudes of all. Programs start in the order of their numbers, so one
that waits keeps none from starting that it waits for.

U is int8 codes of one constant step (``reference.branch_codes``), which bf16 holds exactly. z is rounded to bf16, and
so is c before it is multiplied, as ``branch_product`` will: 2^-9 of the token or of its part in the branch, not of
what is left. c leaves in units of the token's scale, as the Linear's sums are (``engine_ops.engine_linear``).

Letters: M tokens, K features in engine order, P token types, R columns of the branch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from freeact_fx.codegen.tiles import (
    BranchTile,
    branch_tile,
    branch_width,
    few_tokens,
    parts_of_branch,
)
from freeact_fx.reference import column_step

from .gluon_names import barrier, load_tile
from .hopper_arithmetic import larger, larger_magnitude, to_e4m3, to_int4
from .hopper_branch_few import branch_quantize_few, rows_layout
from .hopper_int_mm import types_of
from .hopper_transform_quantize import SMALLEST
from .launches import Launch, multiprocessors_of
from .stream_order import allow_next_kernel, counters, wait_for_previous_kernel

_ROWS = 32  # of U that a program makes bf16


@gluon.jit
def columns_kernel(
    codes_ptr,  # [K, R] int8
    columns_ptr,  # [K, WIDTH] bf16
    K: gl.constexpr,
    R: gl.constexpr,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    num_warps: gl.constexpr,
):
    """U in bf16, with zeros behind R, as the copy engine and the tensor cores take it; ready before the kernel ahead is
    done, but for writing it."""
    layout: gl.constexpr = rows_layout(BLOCK_R, 16, num_warps)
    allow_next_kernel()
    k = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, layout))
    codes = gl.load(codes_ptr + k[:, None] * R + r[None, :], (k < K)[:, None] & (r < R)[None, :], 0)
    columns = codes.to(gl.bfloat16)
    wait_for_previous_kernel()
    place = columns_ptr + k[:, None] * WIDTH + r[None, :]
    gl.store(place, columns, (k < K)[:, None] & (r < WIDTH)[None, :])


@gluon.jit
def copy_chunk(
    rings,
    first_m,
    first_chunk,
    chunk,
    of_part,
    R: gl.constexpr,
    NUM_CHUNKS: gl.constexpr,
):
    """Ask for a chunk of the tokens and its rows of U, if a part has one of that number."""
    z, columns, z_ring, columns_ring, full = rings
    STAGES: gl.constexpr = z_ring.shape[0]
    BLOCK_M: gl.constexpr = z_ring.shape[1]
    BLOCK_K: gl.constexpr = z_ring.shape[2]
    BLOCK_R: gl.constexpr = columns_ring.shape[2]
    # Rows of U are the even features and, behind them, the odd ones.
    HALF: gl.constexpr = NUM_CHUNKS // 2
    if (chunk >= 0) & (chunk < of_part):
        stage = chunk % STAGES
        arrived = full.index(stage)
        mbarrier.expect(arrived, 2 * BLOCK_K * (BLOCK_M + BLOCK_R))
        number = first_chunk + chunk
        load_tile(z, [first_m, number * BLOCK_K], arrived, z_ring.index(stage))
        place = [number % HALF * BLOCK_K, number // HALF * R]
        load_tile(columns, place, arrived, columns_ring.index(stage))


@gluon.jit
def wait_for_parts(counter_ptr, count):
    """Count this part, and return when so many have been: what all wrote before can be read."""
    barrier()
    counted = gl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    while counted < count:
        counted = gl.atomic_add(counter_ptr, 0, sem="acquire")


@gluon.jit
def sum_of_all_parts(c, partial_ptr, counter_ptr, part, PARTS: gl.constexpr, layout: gl.constexpr):
    """The same bits in each part."""
    BLOCK_M: gl.constexpr = c.shape[0]
    BLOCK_R: gl.constexpr = c.shape[1]
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))[:, None]
    place = row * BLOCK_R + gl.arange(0, BLOCK_R, gl.SliceLayout(0, layout))[None, :]
    gl.store(partial_ptr + part * (BLOCK_M * BLOCK_R) + place, c)
    wait_for_parts(counter_ptr, PARTS)
    total = gl.zeros((BLOCK_M, BLOCK_R), gl.float32, layout)
    for number in gl.static_range(PARTS):
        of_part = partial_ptr + number * (BLOCK_M * BLOCK_R) + place
        total += gl.load(of_part, cache_modifier=".cg")  # not out of the L1 cache
    return total


@gluon.jit
def largest_of_all_parts(
    largest, maxima_ptr, counter_ptr, part, PARTS: gl.constexpr, layout: gl.constexpr
):
    BLOCK_M: gl.constexpr = largest.shape[0]
    row = gl.arange(0, BLOCK_M, layout)
    gl.store(maxima_ptr + part * BLOCK_M + row, largest)
    wait_for_parts(counter_ptr, 2 * PARTS)
    for number in gl.static_range(PARTS):
        of_part = gl.load(maxima_ptr + number * BLOCK_M + row, cache_modifier=".cg")
        largest = larger(largest, of_part)
    # Whoever is the last to know leaves the counter as it was.
    if gl.atomic_add(counter_ptr, 1, sem="relaxed") == 3 * PARTS - 1:
        gl.store(counter_ptr, 0)
    return largest


@gluon.jit
def residual(z_chunk, columns_chunk, coefficients, STEP: gl.constexpr, layout: gl.constexpr):
    """``z - c U^T`` of a chunk, in fp32."""
    BLOCK_M: gl.constexpr = z_chunk.shape[0]
    BLOCK_K: gl.constexpr = z_chunk.shape[1]
    of_branch = gl.zeros((BLOCK_M, BLOCK_K), gl.float32, layout)
    columns = columns_chunk.permute((1, 0))
    of_branch = warpgroup_mma(coefficients, columns, of_branch, use_acc=False, is_async=True)
    z = z_chunk.load(layout).to(gl.float32)
    of_branch = warpgroup_mma_wait(num_outstanding=0, deps=(of_branch,))
    return z - STEP * of_branch


@gluon.jit
def hopper_branch_quantize_kernel(
    z,  # descriptor of [M, K] bf16
    columns,  # descriptor of [K / 2, 2 R] bf16: U in codes, the rows of an even and an odd feature side by side
    type_ptr,  # [M] int, or None: all tokens are DEFAULT_TYPE
    clip_ptr,  # [P] fp32
    codes_ptr,  # [M, K] int8 or the bytes of e4m3
    scale_ptr,  # [M] fp32
    coefficients_ptr,  # [M, R] bf16, in units of the scale
    partial_ptr,  # [tiles, PARTS, BLOCK_M, BLOCK_R] fp32, or None: one part
    maxima_ptr,  # [tiles, PARTS, BLOCK_M] fp32, or None
    counter_ptr,  # [tiles] int32 of zeros, which it leaves as such, or None
    M,
    K: gl.constexpr,
    R: gl.constexpr,
    OWN_RANK: gl.constexpr,
    NUM_TYPES: gl.constexpr,
    DEFAULT_TYPE: gl.constexpr,
    QMAX: gl.constexpr,
    STEP: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    num_warps: gl.constexpr,
):
    NUM_CHUNKS: gl.constexpr = K // BLOCK_K
    OF_EACH: gl.constexpr = (NUM_CHUNKS + PARTS - 1) // PARTS  # of a part but the last
    # Both warp groups have all tokens, and half of the columns of a product.
    of_coefficients: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[4, num_warps // 4],
        instr_shape=[16, 4 * BLOCK_R // num_warps, 16],
    )
    of_chunk: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[4, num_warps // 4],
        instr_shape=[16, 4 * BLOCK_K // num_warps, 16],
    )
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_chunk, k_width=2)
    allow_next_kernel()
    z_ring = gl.allocate_shared_memory(z.dtype, [STAGES, BLOCK_M, BLOCK_K], z.layout)
    columns_ring = gl.allocate_shared_memory(
        columns.dtype, [STAGES, BLOCK_K, BLOCK_R], columns.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for ahead in gl.static_range(STAGES):
        mbarrier.init(full.index(ahead), count=1)
    wait_for_previous_kernel()
    # The last tokens first: of what the transform wrote they are most likely still in the L2 cache.
    tile = (gl.num_programs(0) - 1 - gl.program_id(0)) // PARTS
    part = gl.program_id(0) % PARTS
    first_m, first_chunk = tile * BLOCK_M, part * OF_EACH
    of_part = gl.minimum(NUM_CHUNKS - first_chunk, OF_EACH)
    rings = (z, columns, z_ring, columns_ring, full)
    for ahead in gl.static_range(STAGES):
        copy_chunk(rings, first_m, first_chunk, ahead, of_part, R, NUM_CHUNKS)
    # Coefficients; zeros for columns of other types, and for those behind R, which are the odd features'.
    c = gl.zeros((BLOCK_M, BLOCK_R), gl.float32, of_coefficients)
    for chunk in range(0, of_part):
        stage = chunk % STAGES
        mbarrier.wait(full.index(stage), (chunk // STAGES) & 1)
        c = warpgroup_mma(z_ring.index(stage), columns_ring.index(stage), c, is_async=True)
        c = warpgroup_mma_wait(num_outstanding=0, deps=(c,))
        barrier()
        copy_chunk(rings, first_m, first_chunk, chunk + STAGES, of_part, R, NUM_CHUNKS)
    if PARTS > 1:
        of_tile = partial_ptr + tile.to(gl.int64) * (PARTS * BLOCK_M * BLOCK_R)
        c = sum_of_all_parts(c, of_tile, counter_ptr + tile, part, PARTS, of_coefficients)
    tokens_of_c: gl.constexpr = gl.SliceLayout(1, of_coefficients)
    m = first_m + gl.arange(0, BLOCK_M, tokens_of_c)
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, of_coefficients))
    c = gl.where((r < R)[None, :], c * STEP, 0.0)
    if OWN_RANK > 0:
        owner = (r // OWN_RANK)[None, :]
        if type_ptr is None:
            c = gl.where(owner == DEFAULT_TYPE, c, 0.0)
        else:
            c = gl.where(owner == types_of(type_ptr, m, M, NUM_TYPES)[:, None], c, 0.0)
    multiplied = gl.convert_layout(c.to(gl.bfloat16), left)
    # The grid of each token. A maximum is a number if either of two is; where z is not finite nothing is.
    largest = gl.full((BLOCK_M, BLOCK_K), float("nan"), gl.float32, of_chunk)
    for number in range(0, of_part):
        chunk = of_part - 1 - number
        stage = chunk % STAGES
        mbarrier.wait(full.index(stage), (chunk // STAGES) & 1)
        rest = residual(z_ring.index(stage), columns_ring.index(stage), multiplied, STEP, of_chunk)
        barrier()
        copy_chunk(rings, first_m, first_chunk, chunk - STAGES, of_part, R, NUM_CHUNKS)
        largest = larger_magnitude(largest, rest)
    tokens_of_chunk: gl.constexpr = gl.SliceLayout(1, of_chunk)
    of_token = gl.max(largest, 1)
    if PARTS > 1:
        of_tile = maxima_ptr + tile * (PARTS * BLOCK_M)
        of_token = largest_of_all_parts(
            of_token, of_tile, counter_ptr + tile, part, PARTS, tokens_of_chunk
        )
    m = first_m + gl.arange(0, BLOCK_M, tokens_of_chunk)
    token_type = DEFAULT_TYPE
    if type_ptr is not None:
        token_type = types_of(type_ptr, m, M, NUM_TYPES)
    per_code = larger(of_token * gl.load(clip_ptr + token_type) / QMAX, SMALLEST)
    is_first = part == 0
    gl.store(scale_ptr + m, per_code, (m < M) & is_first)
    c = (c / gl.convert_layout(per_code, tokens_of_c)[:, None]).to(gl.bfloat16)
    m = first_m + gl.arange(0, BLOCK_M, tokens_of_c)
    place = coefficients_ptr + m.to(gl.int64)[:, None] * R + r[None, :]
    gl.store(place, c, (m < M)[:, None] & (r < R)[None, :] & is_first)
    per_unit = 1 / per_code
    if QMAX == 7:
        per_unit = 1 / (14 * per_code)
    # Codes.
    PER_ROW: gl.constexpr = BLOCK_K // 16
    rows: gl.constexpr = gl.BlockedLayout([1, 16], [32 // PER_ROW, PER_ROW], [num_warps, 1], [1, 0])
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, rows))
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, rows))
    target = codes_ptr + m.to(gl.int64)[:, None] * K + first_chunk * BLOCK_K + k[None, :]
    for chunk in range(0, of_part):
        stage = chunk % STAGES
        mbarrier.wait(full.index(stage), (chunk // STAGES) & 1)
        rest = residual(z_ring.index(stage), columns_ring.index(stage), multiplied, STEP, of_chunk)
        barrier()
        copy_chunk(rings, first_m, first_chunk, chunk + STAGES, of_part, R, NUM_CHUNKS)
        if QMAX == 448:
            codes = to_e4m3(rest, per_unit[:, None])
        else:
            gl.static_assert(QMAX == 7)
            codes = to_int4(rest, per_unit[:, None])
        gl.store(target + chunk * BLOCK_K, gl.convert_layout(codes, rows), (m < M)[:, None])


@functools.cache
def layouts(tile: BranchTile) -> tuple[Any, Any]:
    """Shared-memory layouts of a chunk of tokens and of the branch's columns."""
    shared = gl.NVMMASharedLayout.get_default_for
    return (
        shared([tile.block_m, tile.block_k], gl.bfloat16),
        shared([tile.block_k, tile.block_r], gl.bfloat16),
    )


def hopper_branch_quantize(
    z: Tensor,
    lowrank: Tensor,
    token_type: Tensor | None,
    clip: Tensor,
    default_type: int,
    own_rank: int,
    qmax: int,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients, and codes of what is left, of transformed tokens.

    z           [M, K] bf16, contiguous
    lowrank     [K, R] int8, contiguous: codes of the branch (``reference.branch_codes``), rows in plain order
    token_type  [M] integers, or None: all tokens are ``default_type``
    clip        [P] fp32
    own_rank    as in ``reference.transform``
    qmax        7 or 448
    parts       programs for a tile of tokens, of which each has whole chunks, one or more; None:
                ``tiles.parts_of_branch``

    Shapes are those of ``tiles.branch_tile``. Returns codes [M, K] int8 (e4m3 for 448), scale [M, 1] fp32 and
    coefficients [M, branch_width(R)] bf16, in units of the scale.
    """
    num_tokens, num_features = z.shape
    if 0 < num_tokens <= few_tokens(num_features):
        return branch_quantize_few(z, lowrank, token_type, clip, default_type, own_rank, qmax)
    rank = branch_width(lowrank.shape[1])
    codes = torch.empty(num_tokens, num_features, dtype=torch.int8, device=z.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=z.device)
    coefficients = torch.empty(num_tokens, rank, dtype=torch.bfloat16, device=z.device)
    result = codes.view(torch.float8_e4m3fn) if qmax == 448 else codes, scale, coefficients
    if num_tokens == 0:
        return result
    tile = branch_tile(num_features, rank)
    assert tile is not None
    of_z, of_columns = layouts(tile)
    columns = torch.empty(num_features, rank, dtype=torch.bfloat16, device=z.device)
    launch = _launch_of_columns(num_features, lowrank.shape[1], tile.block_r)
    launch(z.device, -(-num_features // _ROWS), lowrank, columns)
    pairs = columns.view(num_features // 2, 2 * rank)
    tiles = -(-num_tokens // tile.block_m)
    if parts is None:
        num_multiprocessors = multiprocessors_of(z.device)
        parts = parts_of_branch(tiles, num_features, tile.block_k, num_multiprocessors)
    partial = maxima = counter = None
    if parts > 1:
        size = tiles * parts * tile.block_m
        partial = torch.empty(size * tile.block_r, dtype=torch.float32, device=z.device)
        maxima = torch.empty(size, dtype=torch.float32, device=z.device)
        counter = counters(z.device, tiles)
    static = (num_features, rank, own_rank, clip.shape[0], default_type, qmax)
    launch = _launch_of(tile, parts, *static)
    launch(
        z.device,
        tiles * parts,
        TensorDescriptor.from_tensor(z, [tile.block_m, tile.block_k], of_z),
        TensorDescriptor.from_tensor(pairs, [tile.block_k, tile.block_r], of_columns),
        token_type,
        clip,
        codes,
        scale,
        coefficients,
        partial,
        maxima,
        counter,
        num_tokens,
    )
    return result


@functools.cache
def _launch_of_columns(num_features: int, rank: int, block_r: int) -> Launch:
    return Launch(
        columns_kernel,
        K=num_features,
        R=rank,
        WIDTH=branch_width(rank),
        ROWS=_ROWS,
        BLOCK_R=block_r,
        num_warps=4,
        launch_pdl=True,
    )


@functools.cache
def _launch_of(
    tile: BranchTile,
    parts: int,
    num_features: int,
    rank: int,
    own_rank: int,
    num_types: int,
    default_type: int,
    qmax: int,
) -> Launch:
    return Launch(
        hopper_branch_quantize_kernel,
        K=num_features,
        R=rank,
        OWN_RANK=own_rank,
        NUM_TYPES=num_types,
        DEFAULT_TYPE=default_type,
        QMAX=qmax,
        STEP=column_step(num_features),
        PARTS=parts,
        STAGES=tile.num_stages,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tile.block_r,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
