"""Activation codes times packed weight codes on tensor cores; int8 on any NVIDIA chip from sm_80 on, e4m3 from sm_89.

Weights stay as ``reference.pack_int4`` writes them. Read as bytes, byte ``b`` of a row holds code ``2 b`` in its low
nibble and code ``2 b + 1`` in its high one, each plus 8. Activation codes come in *engine order*, even columns first::

    weight bytes    w0|w1   w2|w3   w4|w5  ...
    codes           x0 x2 x4 ...   |   x1 x3 x5 ...

so that a step takes one tile of bytes and two contiguous tiles of codes: ``acc += lo . even`` and ``acc += hi . odd``.
A nibble is used as ``16 * w`` in an int8: shift or mask, then flip the sign bit (the plus 8). Four at a time in a
32-bit register. int32 holds the sum exactly, and 1 / 16 is taken out when it becomes fp32.

With e4m3 codes the weights are e4m3, too: a code w in [-7, 7] is the subnormal ``w * 2^-9``, which is a sign and three
bits. Hopper's tensor cores align what they add to its largest magnitude and keep 14 bits of it; so what a dot adds up
is then added to the rest in fp32. Integers come out exact: 256 products of at most 7 * 7 stay below 2^14.

Why the weights are on the left of the dot, and the tile is computed transposed: on Hopper the left operand may come
out of registers, where it was unpacked; the right one must be in shared memory.

Letters: M tokens, N outputs, K codes of a token, KE even ones (the bytes of a weight row that hold codes).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from freeact_fx.codegen.tiles import TileConfig, choose_tile

# The interpreter has no inline assembly.
ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def unpack_codes(packed, ASSEMBLY: tl.constexpr):
    """The even and the odd code of each byte, times 16, in an int8."""
    if ASSEMBLY:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 low;
            shl.b32 low, $2, 4;
            lop3.b32 $0, low, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
            }""",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        even = ((packed << 4) ^ -128).to(tl.int8)
        odd = ((packed & -16) ^ -128).to(tl.int8)
    return even, odd


@triton.jit
def unpack_e4m3(packed, ASSEMBLY: tl.constexpr):
    """The even and the odd code of each byte, times 2^-9, in an e4m3.

    A nibble of 8 or more is the code plus 8: its low bits are the magnitude. One below 8 is taken from 0x88, which
    leaves magnitude and sign.
    """
    if ASSEMBLY:
        even, odd = tl.inline_asm_elementwise(
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
            dtype=(tl.float8e4nv, tl.float8e4nv),
            is_pure=True,
            pack=4,
        )
    else:
        even = packed & 15
        odd = (packed >> 4) & 15
        even = tl.where(even < 8, -120 - even, even - 8).to(tl.int8)
        odd = tl.where(odd < 8, -120 - odd, odd - 8).to(tl.int8)
        even = even.to(tl.float8e4nv, bitcast=True)
        odd = odd.to(tl.float8e4nv, bitcast=True)
    return even, odd


@triton.jit
def in_whole_codes(total):
    """Sums of unpacked codes as sums of codes, in fp32."""
    if total.dtype == tl.int32:
        return total.to(tl.float32) * 0.0625
    else:
        return total * 512.0


@triton.jit
def tile_of_program(program, num_m, num_n, GROUP_M: tl.constexpr):
    """Token tile and output tile of a program: columns of GROUP_M token tiles, so that they share weights in L2."""
    per_group = GROUP_M * num_n
    first = program // per_group * GROUP_M
    rows = min(num_m - first, GROUP_M)
    return first + program % per_group % rows, program % per_group // rows


@triton.jit
def accumulate_codes(
    codes_ptr,  # [M, K] int8 or e4m3, engine order
    weight_ptr,  # [N, weight_stride] int8
    K,
    weight_stride,
    rows_m,  # [BLOCK_M], all below M
    rows_n,  # [BLOCK_N], all below N
    first_byte,
    last_byte,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    APART: tl.constexpr,
):
    """Unpacked codes_W . codes over a range of weight bytes: [BLOCK_N, BLOCK_M] int32, or fp32 for e4m3."""
    E4M3: tl.constexpr = codes_ptr.dtype.element_ty == tl.float8e4nv
    SUM: tl.constexpr = tl.float32 if E4M3 else tl.int32
    PER_ADDITION: tl.constexpr = BLOCK_K if E4M3 else None
    num_even = (K + 1) // 2
    column = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + rows_n.to(tl.int64)[:, None] * weight_stride
    even_rows = codes_ptr + rows_m.to(tl.int64)[None, :] * K
    odd_rows = even_rows + num_even
    total = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    for start in range(first_byte, last_byte, BLOCK_K):
        byte = start + column
        if MASKED:
            packed = tl.load(weight_rows + byte[None, :], (byte < weight_stride)[None, :], 0)
            even_codes = tl.load(even_rows + byte[:, None], (byte < last_byte)[:, None], 0.0)
            last_odd = min(last_byte, K - num_even)
            odd_codes = tl.load(odd_rows + byte[:, None], (byte < last_odd)[:, None], 0.0)
        else:
            packed = tl.load(weight_rows + byte[None, :])
            even_codes = tl.load(even_rows + byte[:, None])
            odd_codes = tl.load(odd_rows + byte[:, None])
        if E4M3:
            even_weight, odd_weight = unpack_e4m3(packed, ASSEMBLY)
        else:
            even_weight, odd_weight = unpack_codes(packed, ASSEMBLY)
        if APART:
            # With that argument Triton leaves a product and an addition what they are.
            even = tl.dot(even_weight, even_codes, max_num_imprecise_acc=PER_ADDITION)
            odd = tl.dot(odd_weight, odd_codes, max_num_imprecise_acc=PER_ADDITION)
            total += even
            total += odd
        else:
            total = tl.dot(
                even_weight, even_codes, total, max_num_imprecise_acc=PER_ADDITION, out_dtype=SUM
            )
            total = tl.dot(
                odd_weight, odd_codes, total, max_num_imprecise_acc=PER_ADDITION, out_dtype=SUM
            )
    return total


@triton.jit
def int_mm_kernel(
    codes_ptr,  # [M, K] int8 or e4m3, engine order
    weight_ptr,  # [N, weight_stride / 4] int32
    out_ptr,  # [M, N] fp32; [SPLIT_K, M, N] int32 partial sums, fp32 for e4m3
    M,
    N,
    K,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    MASKED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    APART: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    split = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    num_even = (K + 1) // 2
    bytes_of_split = tl.cdiv(num_even, BLOCK_K * SPLIT_K) * BLOCK_K
    first_byte = split * bytes_of_split
    # Rows past the end read valid ones instead, and are not stored.
    total = accumulate_codes(
        codes_ptr,
        weight_ptr.to(tl.pointer_type(tl.int8), bitcast=True),
        K,
        weight_stride,
        m % M,
        n % N,
        first_byte,
        min(num_even, first_byte + bytes_of_split),
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        MASKED,
        ASSEMBLY,
        APART,
    )
    rows = split.to(tl.int64) * M + m
    inside = (m < M)[:, None] & (n < N)[None, :]
    total = tl.trans(total)
    if SPLIT_K == 1:
        tl.store(out_ptr + rows[:, None] * N + n[None, :], in_whole_codes(total), inside)
    else:
        tl.store(out_ptr + rows[:, None] * N + n[None, :], total, inside)


def capability_of(device: torch.device) -> int:
    """As PTX writes it; Hopper's where there is no GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def partial_dtype(codes: torch.dtype) -> torch.dtype:
    """Of partial sums."""
    return torch.int32 if codes == torch.int8 else torch.float32


def whole_code(codes: torch.dtype) -> float:
    """What turns the sum of all partial sums into one of codes; as ``in_whole_codes``."""
    return 0.0625 if codes == torch.int8 else 512.0


def adds_apart(codes: torch.dtype, capability: int) -> bool:
    """Whether the kernel adds the sums of steps itself. Ada's tensor cores keep few bits of an e4m3 sum, as Hopper's;
    ``max_num_imprecise_acc`` bounds what they add up, but Triton heeds it on Hopper alone."""
    return codes != torch.int8 and capability < 90


def is_masked(num_codes: int, tile: TileConfig) -> bool:
    """Whether some step of a tile is not whole."""
    return num_codes % (2 * tile.block_k * tile.split_k) != 0


def int_mm(codes: Tensor, weight: Tensor, tile: TileConfig | None = None) -> Tensor:
    """The product on the GPU.

    codes   [M, K] int8 or e4m3 in engine order, contiguous
    weight  [N, ceil(K / 8)] int32, contiguous
    tile    None: ``choose_tile``

    Returns [M, N] fp32, for int8 the exact sum rounded once. K is at most ``tiles.LARGEST_NUM_CODES``.
    """
    (num_tokens, num_codes), num_outputs = codes.shape, weight.shape[0]
    out = torch.empty(num_tokens, num_outputs, dtype=torch.float32, device=codes.device)
    if out.numel() == 0:
        return out
    capability = capability_of(codes.device)
    if tile is None:
        tile = choose_tile(num_tokens, num_outputs, num_codes, capability)
    target = out
    if tile.split_k > 1:
        shape = (tile.split_k, *out.shape)
        target = torch.empty(shape, dtype=partial_dtype(codes.dtype), device=codes.device)
    tiles_m, tiles_n = triton.cdiv(num_tokens, tile.block_m), triton.cdiv(num_outputs, tile.block_n)
    int_mm_kernel[(tiles_m * tiles_n, tile.split_k)](
        codes,
        weight,
        target,
        num_tokens,
        num_outputs,
        num_codes,
        4 * weight.shape[1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        SPLIT_K=tile.split_k,
        MASKED=is_masked(num_codes, tile),
        ASSEMBLY=ASSEMBLY,
        APART=adds_apart(codes.dtype, capability),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    if tile.split_k > 1:
        torch.mul(target.sum(0), whole_code(codes.dtype), out=out)
    return out
