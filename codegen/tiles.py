"""Tile shapes of the kernels: what a shape is, which are legal on a chip, and which one a problem gets.

Nothing here imports Triton. Compute capabilities are written as PTX does: 80, 90, 100.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from freeact_fx.config import MAX_RANK

_Linear = TypeVar("_Linear")

# Bytes of shared memory that one program may use.
_SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448}
_SMALLEST_SHARED_BYTES = 101376
# A thread has 255 registers; the accumulator must leave room for operands and addresses.
_ACCUMULATORS_PER_THREAD = 128

# The accumulator of the int8 engine holds 16 * codes . codes_W in int32.
LARGEST_NUM_CODES = (2**31 - 1) // (16 * 7 * 127)


def branch_width(rank: int) -> int:
    """Columns of a branch in memory: rows are at multiples of 16 bytes of bf16, for the copy engine."""
    return -(-rank // 8) * 8


@dataclass(frozen=True)
class TileConfig:
    """One tile of the integer product.

    block_m     tokens
    block_n     outputs
    block_k     packed bytes of a weight row per step, each holding two codes
    num_warps   per program
    num_stages  steps whose operands are in shared memory at a time
    group_m     neighbouring token tiles that share a weight tile in the L2 cache
    split_k     programs that share the K of one tile; their partial sums are added afterwards

    Of the kernel for Hopper alone:

    groups      of four warps, which multiply and have a part of the outputs each
    programs    that a multiprocessor has room for at a time
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    split_k: int = 1
    groups: int = 2
    programs: int = 1

    @property
    def rows(self) -> int:
        """Outputs of a group."""
        return self.block_n // self.groups

    @property
    def shared_bytes(self) -> int:
        """Packed weights, and the even and the odd columns of the codes, for each stage."""
        return self.num_stages * self.block_k * (self.block_n + 2 * self.block_m)

    @property
    def accumulators_per_thread(self) -> int:
        return self.block_m * self.block_n // (32 * self.num_warps)


def is_legal(tile: TileConfig, capability: int) -> bool:
    """Whether a tile runs on a chip: powers of two that the tensor cores take, and room for them."""
    sizes = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
    return (
        all(size & (size - 1) == 0 for size in sizes)
        and tile.block_m >= 16
        and tile.block_n >= 16 * tile.num_warps
        and tile.block_k >= 32
        and tile.num_stages >= 1
        and tile.split_k >= 1
        and tile.accumulators_per_thread <= _ACCUMULATORS_PER_THREAD
        and tile.shared_bytes <= _SHARED_BYTES.get(capability, _SMALLEST_SHARED_BYTES)
    )


# In the order of preference; the first legal one whose tokens are not mostly padding is the default.
_WIDE = (
    TileConfig(128, 128, 64, num_warps=8, num_stages=4),
    TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 128, 64, num_warps=4, num_stages=3),
    TileConfig(32, 128, 64, num_warps=4, num_stages=4),
    TileConfig(16, 64, 256, num_warps=4, num_stages=4),
)
_DECODE_TOKENS = 64
# Enough programs for two on each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 264
_LARGEST_SPLIT = 8


def candidates(num_tokens: int, capability: int) -> tuple[TileConfig, ...]:
    """Legal tiles that waste at most half of their tokens; the smallest one is always there."""
    legal = [tile for tile in _WIDE if is_legal(tile, capability)]
    return tuple(t for t in legal if t.block_m < 2 * num_tokens) or (legal[-1],)


def choose_tile(
    num_tokens: int, num_outputs: int, num_codes: int, capability: int, *, may_split: bool = True
) -> TileConfig:
    """The tile of a problem: at most 64 tokens share K among programs until the chip is full.

    Not measured yet beyond H100 and H200; a benchmark compares the candidates.
    """
    tile = candidates(num_tokens, capability)[0]
    if num_tokens > _DECODE_TOKENS or not may_split:
        return tile
    programs = -(-num_tokens // tile.block_m) * -(-num_outputs // tile.block_n)
    steps = -(-num_codes // (2 * tile.block_k))
    split = 1
    while 2 * split <= min(_LARGEST_SPLIT, steps) and programs * split < _ENOUGH_PROGRAMS:
        split *= 2
    return TileConfig(
        tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, 1, split
    )


# With how fast an H100 multiplies in each, the first one being 1. Why not 256 x 128, as fast without types: the scales
# and types of its tokens spill registers.
_HOPPER_TILES = (
    (TileConfig(128, 256, 64, num_stages=5, group_m=16), 1.0),
    (TileConfig(128, 192, 64, num_stages=6, group_m=16, groups=3), 0.97),
    (TileConfig(128, 128, 64, num_stages=6, group_m=16), 0.87),
    (TileConfig(64, 128, 128, num_stages=5, group_m=16), 0.75),
    (TileConfig(64, 128, 128, num_stages=3, group_m=16, programs=2), 0.75),
    (TileConfig(32, 128, 128, num_stages=3, group_m=16), 0.45),
    (TileConfig(32, 128, 128, num_stages=9, group_m=16), 0.45),
    (TileConfig(16, 128, 128, num_stages=6, group_m=16), 0.25),
    (TileConfig(16, 128, 128, num_stages=5, group_m=16, programs=2), 0.25),
    (TileConfig(16, 128, 128, num_stages=3, group_m=16), 0.25),
    (TileConfig(16, 128, 128, num_stages=11, group_m=16), 0.25),
)
_SPLITS = (1, 2, 3, 4, 8)
# Microseconds on an H100: a tile of 128 x 256 over 4096 codes; what a program spends besides on a part of a tile, and
# on each byte of its sums; a byte of weights.
_TILE_US, _PART_US, _SUM_BYTE_US, _WEIGHT_BYTE_US = 21.0, 1.0, 8e-5, 1 / 3e6


# Whether e4m3 products are added up in fp32 step by step. Exact for integer codes, and small products stay in the sum
# beside large ones.
PROMOTED = True
# Of a thread; as many again hold the sum of a step.
_PROMOTED_ACCUMULATORS = 64


def hopper_tiles(num_codes: int, *, promoted: bool = False) -> list[tuple[TileConfig, float]]:
    """The legal ones for a number of codes, K split in whole steps or not, with how fast each is.

    promoted  the sum of a step has accumulators of its own
    """
    return [
        (replace(tile, split_k=split), speed)
        for tile, speed in _HOPPER_TILES
        for split in _SPLITS
        if num_codes % (2 * tile.block_k * split) == 0
        and not (promoted and tile.block_m * tile.rows > 128 * _PROMOTED_ACCUMULATORS)
    ]


def is_legal_for_hopper(tile: TileConfig, num_codes: int, *, promoted: bool = False) -> bool:
    """Whether a tile is one of that kernel's, and its steps over a number of codes are whole."""
    return any(tile == legal for legal, _ in hopper_tiles(num_codes, promoted=promoted))


@functools.lru_cache(maxsize=4096)  # asked at every call, and takes longer than the kernel
def choose_hopper_tile(
    num_tokens: int,
    num_outputs: int,
    num_codes: int,
    num_multiprocessors: int = 132,
    *,
    promoted: bool = False,
) -> TileConfig:
    """The tile of the kernel with its own copying warp that is predicted to be fastest; ``num_warps`` is that of one
    of its groups.

    promoted  as for ``hopper_tiles``
    """
    shape = num_tokens, num_outputs, num_codes, num_multiprocessors
    tiles = hopper_tiles(num_codes, promoted=promoted)
    return min((t for t, _ in tiles), key=lambda tile: predicted_us(tile, *shape))


def predicted_us(
    tile: TileConfig,
    num_tokens: int,
    num_outputs: int,
    num_codes: int,
    num_multiprocessors: int = 132,
) -> float:
    """Microseconds on an H100 but for what all tiles take alike: rounds of tiles, or reading the weights."""
    speed = next(s for t, s in _HOPPER_TILES if t == replace(tile, split_k=1))
    size = tile.block_m * tile.block_n
    parts = -(-num_tokens // tile.block_m) * -(-num_outputs // tile.block_n) * tile.split_k
    each = _TILE_US * size / (128 * 256) * num_codes / 4096 / tile.split_k / speed
    rounds = -(-parts // num_multiprocessors)
    # A tile with more tokens than there are multiplies zeros, which still takes its time, if little of it.
    reading = num_outputs * num_codes / 2 * _WEIGHT_BYTE_US * (1 + tile.block_m / 1024)
    summing = rounds * (_PART_US + 4 * size * _SUM_BYTE_US) if tile.split_k > 1 else 0.0
    return max(rounds * each, reading) + summing


# Linears of one input that a launch of the same kernel takes.
MOST_TOGETHER = 3


def in_launches(
    linears: Sequence[_Linear], *, is_e4m3: bool, has_branch: bool
) -> list[Sequence[_Linear]]:
    """Linears of one input as that kernel is launched for them. One by one if they have e4m3 codes and a branch, whose
    sums leave no registers for what several Linears need."""
    size = 1 if is_e4m3 and has_branch else MOST_TOGETHER
    return [linears[first : first + size] for first in range(0, len(linears), size)]


# Of the same kernel, which keeps the rows of the bias table of all types in registers.
MOST_TYPES = 16


def fits_hopper(num_codes: int, num_outputs: int, output_bytes: int) -> bool:
    """Whether that kernel takes a shape: the copy engine wants rows, and the odd codes in them, at multiples of 16
    bytes, and steps are whole.

    output_bytes  of one output
    """
    block_k = _HOPPER_TILES[0][0].block_k
    return (
        num_codes % (2 * block_k) == 0
        and num_codes <= LARGEST_NUM_CODES
        and num_outputs * output_bytes % 16 == 0
        and output_bytes == 2
    )


def fits_branch(rank: int, num_outputs: int) -> bool:
    """Whether that kernel multiplies the branch of a Linear, whose weights are int8 in rows of its outputs."""
    return rank == 0 or (rank <= MAX_RANK and num_outputs % 16 == 0)


@dataclass(frozen=True)
class TransformTile:
    """The padded shape of one token in the transform: X [block_in, columns], Z [block_out, columns].

    columns  one power of two, or two pieces side by side; the second is 0 if there is one
    """

    block_in: int
    block_out: int
    columns: tuple[int, int]
    num_warps: int


@functools.cache
def transform_tile(d1: int, width: int, d2: int) -> TransformTile:
    """The tile of a Kronecker shape [D1, width] x [D2, D2]; both at most 256."""
    columns = (_padded(d2), 0)
    half = columns[0] // 2
    # Two pieces only where they save much of a wide tile: they take four products instead of one.
    if d2 > 128 and half < d2 <= half + half // 2:
        columns = (half, _padded(d2 - half))
    block_out = _padded(width)
    size = max(_padded(d1), block_out) * sum(columns)
    num_warps = 4 if size <= 4096 else 8 if size <= 24576 else 16
    return TransformTile(_padded(d1), block_out, columns, num_warps)


@dataclass(frozen=True)
class HopperTransformTile:
    """The padded shape of one token in the transform for Hopper: [rows, sum of columns].

    rows                of the result: all slices
    columns             in one or two powers of two; the second is 0 if there is one
    rows_in             the same of the rows of X, which the first product sums over
    registers           of a thread, at most
    per_multiprocessor  programs that a multiprocessor gets
    ahead               whether a program prepares a token while it makes the codes of the one before
    tokens_ahead        that are on their way to shared memory; 0: one is, to registers
    """

    rows: int
    columns: tuple[int, int]
    rows_in: tuple[int, int]
    num_warps: int
    registers: int
    per_multiprocessor: int
    ahead: bool
    tokens_ahead: int

    def of_one_token(self, per_multiprocessor: int) -> HopperTransformTile:
        """For so many programs that have no next token to be ahead with. Beside one on a multiprocessor fits a
        product's tile of few tokens: the product before may still run, and the one after begin."""
        registers = min(1280, 2048 // per_multiprocessor) // self.num_warps // 8 * 8
        registers = min(registers, max(128, self.registers))
        return replace(self, ahead=False, tokens_ahead=0, registers=registers)


@functools.cache
def hopper_transform_tile(
    d1: int, widths: tuple[int, ...], d2: int, prologue: str = "none"
) -> HopperTransformTile | None:
    """The tile of a Kronecker shape, or None where the portable kernel is for it: rows that would be mostly padding of
    a warp group's 64, and what does not fit its registers or shared memory.

    widths    rows of the result that each slice has
    prologue  ``Prologue.kind``
    """
    rows, columns = _padded(sum(widths)), _in_pieces(d2)
    rows_in = (_padded(d1), 0) if columns[1] else _in_pieces(d1)
    if not (64 <= rows <= 128 and 16 <= columns[0] <= 128) or d2 % 2:
        return None
    if not rows // 2 <= sum(rows_in) <= 128 or sum(rows_in) * sum(columns) > rows * 160:
        return None
    size = max(rows, sum(rows_in)) * sum(columns)
    if prologue == "gelu" and size > 64 * 64:  # the error function spills registers
        return None
    tokens_ahead = 0
    if size <= 64 * 64:
        # So many programs hide each other's waiting that none has to work ahead.
        registers, programs, ahead = 96, 5, False
        if prologue != "none":
            # What waits for all of a token before the products: the copy engine brings it, if it is one piece.
            copied = d2 % 8 == 0 and not (rows_in[1] or columns[1])
            tokens_ahead = 2 if copied else 0
            registers, programs = 128, 4
    elif size <= 64 * 128:
        registers, programs = (168, 3) if size <= 64 * 96 else (255, 2)
        if rows == 128:
            registers, programs = 128, 2
        ahead = True
    else:
        # With two rows to fetch, the other one would be waited for while there is something to compute.
        registers, programs, ahead = 255, 1, prologue in ("none", "rms", "layer")
    num_slices, num_tokens = len(widths), tokens_ahead + (2 if ahead else 1)
    factors = num_slices * (sum(rows_in) * rows + sum(columns) ** 2)
    shared_bytes = 2 * (factors + num_tokens * sum(rows_in) * sum(columns))
    if columns[1]:  # scales of channels
        shared_bytes += 2 * sum(rows_in) * sum(columns)
    if d2 % 16:  # codes
        shared_bytes += rows * sum(columns)
    # The chip keeps a KiB for each program.
    programs = min(programs, (_SHARED_BYTES[90] + 1024) // (shared_bytes + 1024 + 128))
    if programs == 0:
        return None
    return HopperTransformTile(
        rows, columns, rows_in, rows // 16, registers, programs, ahead, tokens_ahead
    )


@dataclass(frozen=True)
class BranchTile:
    """A step of the kernel that splits off a branch: tokens [block_m, block_k] and columns [block_k, block_r] in bf16,
    ``num_stages`` of them in shared memory."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@functools.cache
def branch_tile(num_codes: int, rank: int) -> BranchTile | None:
    """The tile of a branch of some columns, or None where there is no kernel for it: chunks of the even and of the odd
    features are whole."""
    sizes = [size for size in (256, 128, 64) if num_codes % (2 * size) == 0]
    if not sizes or num_codes > LARGEST_NUM_CODES or rank > MAX_RANK:
        return None
    block_m, block_r = 64, _padded(rank)
    # Of many columns larger chunks leave too few places to copy ahead: 2 to 6 % slower for 8192 tokens.
    block_k = next(size for size in sizes if size <= 128 or block_r <= 64)
    # 32 KB for the exchange between threads, and for the copies' barriers.
    stage_bytes = 2 * block_k * (block_m + block_r)
    num_stages = min(8, (_SHARED_BYTES[90] - 32768) // stage_bytes)
    return BranchTile(block_m, block_k, block_r, 8, num_stages)


def parts_of_branch(num_tiles: int, num_codes: int, block_k: int, num_multiprocessors: int) -> int:
    """How many programs share the features of a tile of 64 tokens: as many as find a multiprocessor each, but with 512
    features or more, and 16 at most, since each adds up what all have found. The last one may have fewer.

    K = 4096 with 64 columns on an H100: 49 us become 18 for 1024 tokens, 24 for 2048 and 32 for 4096; with 8192 tokens,
    which have multiprocessors enough, two programs are as fast as one. Sixteen programs instead of eight are slower.
    """
    num_chunks = num_codes // block_k
    parts = max(1, min(num_multiprocessors // num_tiles, num_codes // 512, 16))
    of_part = -(-num_chunks // parts)
    return -(-num_chunks // of_part)


def few_tokens(num_codes: int) -> int:
    """At most so many tokens have programs that share their features in tiles of sixteen.

    Of K = 4096 and 12288 with 64 or 128 columns on an H100 those are faster up to 360 to 430 and 155 to 195 tokens.
    """
    return 1_600_000 // num_codes


@dataclass(frozen=True)
class FewTokensTile:
    """A program's tokens [block_m, block_k] and columns of a branch [block_k, block_r]; one that makes codes has
    ``chunk`` features of a token."""

    num_codes: int
    block_k: int
    block_r: int
    chunk: int
    block_m: int = 16
    num_warps: int = 8

    def num_parts(self, tiles_m: int) -> int:
        """Programs for the sums of each of so many tiles of tokens: all add up what these have found."""
        return max(1, min(128 // tiles_m, self.num_codes // (2 * self.block_k)))


@functools.cache
def few_tokens_tile(num_codes: int, rank: int) -> FewTokensTile:
    """The tile of a branch that has a ``branch_tile``; its features are even ones alone, or odd ones."""
    power = num_codes & -num_codes
    return FewTokensTile(num_codes, min(power // 2, 256), _padded(rank), min(power, 1024))


def _in_pieces(size: int) -> tuple[int, int]:
    """One power of two, or two where one would be padding for a quarter or more."""
    whole = _padded(size)
    half = whole // 2
    if whole >= 128 and half < size <= half + half // 2:
        return half, _padded(size - half)
    return whole, 0


def _padded(size: int) -> int:
    """The tensor cores' smallest tile, or the next power of two."""
    return max(16, 1 << (size - 1).bit_length())
