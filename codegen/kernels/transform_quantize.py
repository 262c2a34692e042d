"""Norm or activation, shift, transform and quantise tokens in one pass over memory; any NVIDIA chip from sm_80 on.

A program takes one token at a time, so a token's type is a scalar: it picks shift, clip, K slice and matrices by
address, whatever the mix of types. A token is a matrix X [D1, D2]; ``Z = L^T X R`` is two products on fp16 tensor
cores, L first. What is rounded to fp16 is kept away from its limits: a token is divided by its largest magnitude, and
so is each matrix; codes do not see that, and the scale takes it back. Reductions and rounding are in fp32.

Tiles are powers of two. The columns of X are split in two pieces, A and B, where one power of two would be much too
wide (148 = 128 + 20 rather than 256); B may be absent.

Codes leave in engine order (``int_mm``): the even columns of all slices, then the odd ones. The accumulator of a
product holds pairs of neighbouring columns in one thread, so taking them apart is free.

Letters: M tokens, K = D1 * D2 features, P token types, S slices.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from freeact_fx.codegen.prologue import NO_PROLOGUE, Prologue
from freeact_fx.codegen.tiles import transform_tile

from .launches import Launch, multiprocessors_of
from .transform_prologue import centred, load_token, shifted, sum_of, weighted

_OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
SMALLEST = tl.constexpr(1e-30)
# Adding and taking away 1.5 * 2^23 rounds an fp32 below 2^22 to the nearest integer, ties to even.
TIES_TO_EVEN = tl.constexpr(12582912.0)


@triton.jit
def largest_magnitude(tile):
    """Largest magnitude of a tile; NaN if it holds one, which as bits is larger than all numbers."""
    bits = tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits).to(tl.float32, bitcast=True)


@triton.jit
def larger(one, other):
    """The larger of two magnitudes; NaN if either is."""
    return tl.where((one >= other) | (one != one), one, other)


@triton.jit
def in_units(matrix, unit):
    return (matrix * (1 / unit)).to(tl.float16)


@triton.jit
def load_left(left_ptr, start, width, D1: tl.constexpr, STRIDE: tl.constexpr, IN, OUT):
    """A slice of the left factor, transposed: [OUT, IN] fp16, zero outside, and its unit."""
    column, row = tl.arange(0, OUT)[:, None], tl.arange(0, IN)[None, :]
    inside = (column < width) & (row < D1)
    left = tl.load(left_ptr + row * STRIDE + start + column, inside, 0.0)
    unit = larger(largest_magnitude(left), SMALLEST)
    return in_units(left, unit), unit


@triton.jit
def load_piece(right_ptr, D2: tl.constexpr, FIRST_ROW, ROWS, FIRST_COLUMN, COLUMNS):
    row = FIRST_ROW + tl.arange(0, ROWS)[:, None]
    column = FIRST_COLUMN + tl.arange(0, COLUMNS)[None, :]
    return tl.load(right_ptr + row * D2 + column, (row < D2) & (column < D2), 0.0)


@triton.jit
def load_right(right_ptr, D2: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The right factor in fp16 pieces (AA, BA, AB, BB), zero outside, and their unit."""
    aa = load_piece(right_ptr, D2, 0, A, 0, A)
    unit = larger(largest_magnitude(aa), SMALLEST)
    if B == 0:
        return (in_units(aa, unit),), unit
    else:
        ba = load_piece(right_ptr, D2, A, B, 0, A)
        ab = load_piece(right_ptr, D2, 0, A, A, B)
        bb = load_piece(right_ptr, D2, A, B, A, B)
        unit = larger(unit, largest_magnitude(ba))
        unit = larger(unit, largest_magnitude(ab))
        unit = larger(unit, largest_magnitude(bb))
        pieces = (in_units(aa, unit), in_units(ba, unit), in_units(ab, unit), in_units(bb, unit))
        return pieces, unit


@triton.jit
def store_codes(z, per_code, here, codes_ptr, width, num_even, QMAX, D2: tl.constexpr, FIRST):
    """Round a piece of Z to codes and store them in engine order; zeros unless the token's slice is ``here``."""
    OUT: tl.constexpr = z.shape[0]
    PAIRS: tl.constexpr = z.shape[1] // 2
    grid = tl.minimum(tl.maximum(z * (1 / per_code), -QMAX), QMAX)
    if QMAX == 448:
        codes = grid.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        codes = ((grid + TIES_TO_EVEN) - TIES_TO_EVEN).to(tl.int8)
    codes = tl.where(here, codes, 0)
    even, odd = tl.split(tl.reshape(codes, (OUT, PAIRS, 2)))
    row, pair = tl.arange(0, OUT)[:, None], FIRST // 2 + tl.arange(0, PAIRS)[None, :]
    target = codes_ptr + row * (D2 // 2) + pair
    inside = (row < width) & (pair < D2 // 2)
    tl.store(target, even, inside)
    tl.store(target + num_even, odd, inside)


@triton.jit
def transform_quantize_kernel(
    x_ptr,  # [M, K] floating
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
    codes_ptr,  # [M, K'] int8 (the bytes of e4m3, too), engine order
    scale_ptr,  # [M] fp32
    M,
    x_stride,
    other_stride,
    D1: tl.constexpr,
    D2: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SLICE_OF_TYPE: tl.constexpr,
    DEFAULT_TYPE: tl.constexpr,
    QMAX: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS_A: tl.constexpr,
    COLUMNS_B: tl.constexpr,
    PROLOGUE: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
):
    K: tl.constexpr = D1 * D2
    NUM_TYPES: tl.constexpr = len(SLICE_OF_TYPE)
    NUM_SLICES: tl.constexpr = len(WIDTHS)
    TOTAL_WIDTH: tl.constexpr = STARTS[NUM_SLICES - 1] + WIDTHS[NUM_SLICES - 1]
    NUM_CODES: tl.constexpr = TOTAL_WIDTH * D2
    if NUM_SLICES == 1:
        left, left_unit = load_left(left_ptr, 0, TOTAL_WIDTH, D1, TOTAL_WIDTH, IN, OUT)
        right, right_unit = load_right(right_ptr, D2, COLUMNS_A, COLUMNS_B)
    for token in range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0)):
        # The token's type, and the slice of K' it goes to.
        token_type = DEFAULT_TYPE
        if type_ptr is not None:
            token_type = tl.load(type_ptr + token).to(tl.int32)
            token_type = tl.where(token_type < 0, token_type + NUM_TYPES, token_type)
        in_slice = 0
        if NUM_SLICES > 1:
            for t in tl.static_range(NUM_TYPES):
                in_slice = tl.where(token_type == t, SLICE_OF_TYPE[t], in_slice)
            start, width = STARTS[0], WIDTHS[0]
            for s in tl.static_range(1, NUM_SLICES):
                start = tl.where(in_slice == s, STARTS[s], start)
                width = tl.where(in_slice == s, WIDTHS[s], width)
            left, left_unit = load_left(left_ptr, start, width, D1, TOTAL_WIDTH, IN, OUT)
            of_slice = right_ptr + in_slice * (D2 * D2)
            right, right_unit = load_right(of_slice, D2, COLUMNS_A, COLUMNS_B)
        # The token as its prologue leaves it.
        other_row, total_row = other_ptr, total_ptr
        if other_ptr is not None:
            other_row += token * other_stride
        if total_ptr is not None:
            total_row += token * K
        x_row = x_ptr + token * x_stride
        x_a = load_token(x_row, other_row, total_row, D1, D2, 0, IN, COLUMNS_A, PROLOGUE)
        if COLUMNS_B > 0:
            x_b = load_token(
                x_row, other_row, total_row, D1, D2, COLUMNS_A, IN, COLUMNS_B, PROLOGUE
            )
        if PROLOGUE == "layer":
            mean = sum_of(x_a) / K
            if COLUMNS_B > 0:
                mean += sum_of(x_b) / K
                x_b = centred(x_b, mean, D1, D2, COLUMNS_A)
            x_a = centred(x_a, mean, D1, D2, 0)
        if PROLOGUE == "rms" or PROLOGUE == "layer":
            variance = sum_of(x_a * x_a) / K
            if COLUMNS_B > 0:
                variance += sum_of(x_b * x_b) / K
            inverse = tl.rsqrt(variance + EPS)
            x_a = weighted(x_a * inverse, weight_ptr, bias_ptr, D1, D2, 0, WEIGHT_OFFSET)
            if COLUMNS_B > 0:
                x_b = weighted(
                    x_b * inverse, weight_ptr, bias_ptr, D1, D2, COLUMNS_A, WEIGHT_OFFSET
                )
        # Shift and scale; then in units of the largest magnitude, so that fp16 holds it.
        shift_row = shift_ptr
        if shift_ptr is not None:
            shift_row += token_type * K
        x_a = shifted(x_a, shift_row, channel_scale_ptr, D1, D2, 0)
        unit = largest_magnitude(x_a)
        if COLUMNS_B > 0:
            x_b = shifted(x_b, shift_row, channel_scale_ptr, D1, D2, COLUMNS_A)
            unit = larger(unit, largest_magnitude(x_b))
        unit = larger(unit, SMALLEST)
        # Z = (L^T X) R: fp16 operands, fp32 sums.
        y_a = tl.dot(left, (x_a * (1 / unit)).to(tl.float16)).to(tl.float16)
        if COLUMNS_B > 0:
            y_b = tl.dot(left, (x_b * (1 / unit)).to(tl.float16)).to(tl.float16)
            z_a = tl.dot(y_b, right[1], tl.dot(y_a, right[0]))
            z_b = tl.dot(y_b, right[3], tl.dot(y_a, right[2]))
            largest = larger(largest_magnitude(z_a), largest_magnitude(z_b))
        else:
            z_a = tl.dot(y_a, right[0])
            largest = largest_magnitude(z_a)
        # Grid of the token, and its codes.
        per_code = larger(largest * tl.load(clip_ptr + token_type) / QMAX, SMALLEST)
        scale = per_code * unit * left_unit * right_unit
        tl.store(scale_ptr + token, larger(scale, SMALLEST))
        row = codes_ptr + token * NUM_CODES
        for s in tl.static_range(NUM_SLICES):
            here = in_slice == s
            target = row + STARTS[s] * (D2 // 2)
            store_codes(z_a, per_code, here, target, WIDTHS[s], NUM_CODES // 2, QMAX, D2, 0)
            if COLUMNS_B > 0:
                store_codes(
                    z_b, per_code, here, target, WIDTHS[s], NUM_CODES // 2, QMAX, D2, COLUMNS_A
                )


def is_supported(left: Tensor, right: Tensor, widths: Sequence[int], qmax: int) -> bool:
    """Whether the kernel has this format and shape; a legal Kronecker shape with an even D2 always fits.

    Triton 3.6 makes an empty kernel for Blackwell of a token in two pieces.
    """
    if qmax not in (7, 127, 448) or right.shape[-1] % 2:
        return False
    tile = transform_tile(left.shape[0], max(widths), right.shape[-1])
    if tile.columns[1] == 0 or not left.is_cuda:
        return True
    return not (_OLD_TRITON and torch.cuda.get_device_capability(left.device) >= (10, 0))


def transform_quantize(
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
    """``reference.transform_quantize`` without a branch on the GPU, codes in engine order.

    x         [M, K]; the rest as there, and ``is_supported``
    prologue  what is done to x first

    Returns codes [M, K'] int8 (e4m3 for 448) and scale [M, 1] fp32. They differ from those of the fp64 reference by
    what rounding operands to fp16 moves across a tie.
    """
    num_tokens, (d1, total_width), d2 = x.shape[0], left.shape, right.shape[-1]
    codes = torch.empty(num_tokens, total_width * d2, dtype=torch.int8, device=x.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    result = codes.view(torch.float8_e4m3fn) if qmax == 448 else codes, scale
    if num_tokens == 0:
        return result
    tile = transform_tile(d1, max(widths), d2)
    x = rows_in_memory(x)
    other = None if prologue.other is None else rows_in_memory(prologue.other)
    optional = (prologue.weight, prologue.bias, token_type, shift, channel_scale)
    contiguous = (None if t is None else t.contiguous() for t in optional)
    launch: Callable[..., None] = _launch_of(
        d1,
        d2,
        tuple(widths),
        tuple(slice_of_type),
        default_type,
        qmax,
        prologue.kind,
        prologue.eps,
        prologue.weight_offset,
    )
    if tile.columns[1] and _OLD_TRITON:
        launch = functools.partial(_without_wgmma, launch)
    launch(
        x.device,
        min(num_tokens, _num_programs(x.device)),
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
    widths: tuple[int, ...],
    slice_of_type: tuple[int, ...],
    default_type: int,
    qmax: int,
    prologue: str,
    eps: float,
    weight_offset: float,
) -> Launch:
    tile = transform_tile(d1, max(widths), d2)
    return Launch(
        transform_quantize_kernel,
        D1=d1,
        D2=d2,
        STARTS=tuple(sum(widths[:i]) for i in range(len(widths))),
        WIDTHS=widths,
        SLICE_OF_TYPE=slice_of_type,
        DEFAULT_TYPE=default_type,
        QMAX=qmax,
        IN=tile.block_in,
        OUT=tile.block_out,
        COLUMNS_A=tile.columns[0],
        COLUMNS_B=tile.columns[1],
        PROLOGUE=prologue,
        EPS=eps,
        WEIGHT_OFFSET=weight_offset,
        num_warps=tile.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )


def _without_wgmma(launch: Callable[..., None], *operands: object) -> None:
    """Triton 3.6 compiles a token in two pieces for Hopper's warp groups so that it reads and writes astray; the
    matrix instruction of sm_80 is right. A switch in the environment is all that it has for it."""
    before = os.environ.get("DISABLE_MMA_V3")
    os.environ["DISABLE_MMA_V3"] = "1"
    try:
        launch(*operands)
    finally:
        if before is None:
            del os.environ["DISABLE_MMA_V3"]
        else:
            os.environ["DISABLE_MMA_V3"] = before


def rows_in_memory(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, be it a part of a wider one."""
    return x if x.stride(1) == 1 else x.contiguous()


def _num_programs(device: torch.device) -> int:
    """A few programs for each multiprocessor; each keeps the matrices and walks over tokens."""
    if device.type != "cuda":
        return 2  # the interpreter runs one after the other
    return 8 * multiprocessors_of(device)
