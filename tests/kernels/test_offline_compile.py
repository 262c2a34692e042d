"""Each kernel compiled for GPUs that are not there: the matrix instruction that is meant, and no spilled registers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch
import triton
from offline import (
    BF16_ON_HOPPER,
    E4M3_INSTRUCTIONS,
    FP16_INSTRUCTIONS,
    INT8_INSTRUCTIONS,
    Compiled,
    compile_gluon,
    compile_kernel,
)

from freeact_fx.codegen.kernels import hopper_branch_few, hopper_branch_quantize
from freeact_fx.codegen.kernels.hopper_int_mm import hopper_linear_kernel, layouts, registers
from freeact_fx.codegen.kernels.hopper_transform_quantize import (
    box_of_token,
    hopper_transform_quantize_kernel,
)
from freeact_fx.codegen.kernels.int_mm import adds_apart, int_mm_kernel
from freeact_fx.codegen.kernels.transform_quantize import transform_quantize_kernel
from freeact_fx.codegen.tiles import (
    TileConfig,
    branch_tile,
    branch_width,
    candidates,
    few_tokens_tile,
    hopper_tiles,
    hopper_transform_tile,
    transform_tile,
)
from freeact_fx.transform import kronecker_shape

OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def compile_product(capability: int, tile: TileConfig, codes: str = "i8") -> Compiled:
    return compile_kernel(
        int_mm_kernel,
        capability,
        pointers={"codes_ptr": f"*{codes}", "weight_ptr": "*i32", "out_ptr": "*fp32"},
        numbers=dict.fromkeys(("M", "N", "K", "weight_stride"), "i32"),
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
            "SPLIT_K": tile.split_k,
            "MASKED": False,
            "ASSEMBLY": True,
            "APART": adds_apart(torch.int8 if codes == "i8" else torch.float8_e4m3fn, capability),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@pytest.mark.parametrize("num_tokens", [4096, 1])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_integer_product(capability: int, num_tokens: int) -> None:
    tile = candidates(num_tokens, capability)[0]
    compiled = compile_product(capability, tile)
    # Triton 3.6 takes Ampere's instruction for integers on Blackwell.
    instruction = INT8_INSTRUCTIONS[80 if OLD_TRITON and capability == 100 else capability]
    assert re.search(instruction, compiled.ptx)
    assert compiled.local_bytes == 0
    assert compiled.shared_bytes <= tile.shared_bytes
    if capability == 90:  # weights out of registers, where they were unpacked
        assert all(map(_left_in_registers, re.findall(r"wgmma\.mma_async[^;]+;", compiled.ptx)))


@pytest.mark.parametrize("num_tokens", [4096, 1])
@pytest.mark.parametrize("capability", [89, 90, 100])
def test_e4m3_product(capability: int, num_tokens: int) -> None:
    tile = candidates(num_tokens, capability)[0]
    compiled = compile_product(capability, tile, "fp8e4nv")
    assert re.search(E4M3_INSTRUCTIONS[capability], compiled.ptx)
    assert compiled.local_bytes == 0
    # Triton 3.6 has unpacked weights go through it on Blackwell.
    assert compiled.shared_bytes <= tile.shared_bytes * (1.1 if capability == 100 else 1)
    if capability == 90:
        assert all(map(_left_in_registers, re.findall(r"wgmma\.mma_async[^;]+;", compiled.ptx)))
    if capability < 100:  # sums are promoted, each of the even and of the odd codes of a step
        num_sums = 2 * tile.accumulators_per_thread
        assert len(re.findall(r"add\.(?:rn\.)?f32", compiled.ptx)) == num_sums


def _left_in_registers(instruction: str) -> bool:
    return re.search(r"\},\s*\{", instruction) is not None


PROLOGUES = {
    "none": {},
    "rms": {"weight_ptr": "*bf16"},
    "rms of a sum": {"weight_ptr": "*bf16", "other_ptr": "*bf16", "total_ptr": "*bf16"},
    "layer": {"weight_ptr": "*bf16", "bias_ptr": "*bf16"},
    "silu": {"other_ptr": "*bf16"},
    "gelu": {"other_ptr": "*bf16"},
    "gelu_tanh": {"other_ptr": "*bf16"},
}
STRIDES = {"M": "i32", "x_stride": "i32", "other_stride": "i32"}


def constants_of(prologue: str) -> dict[str, object]:
    absent = {"other_ptr", "total_ptr", "weight_ptr", "bias_ptr"} - PROLOGUES[prologue].keys()
    settings = {"PROLOGUE": prologue.split()[0], "EPS": 1e-6, "WEIGHT_OFFSET": 1.0}
    return settings | dict.fromkeys(absent)


def compile_transform(
    capability: int, num_features: int, num_slices: int, prologue: str, qmax: int = 7
) -> Compiled:
    shape = kronecker_shape(num_features)
    assert shape is not None
    d1, d2 = shape
    tile = transform_tile(d1, d1, d2)
    factors = dict.fromkeys(("channel_scale_ptr", "left_ptr", "right_ptr", "clip_ptr"), "*fp32")
    pointers = {"x_ptr": "*bf16", "type_ptr": "*i32", "shift_ptr": "*bf16", "codes_ptr": "*i8"}
    return compile_kernel(
        transform_quantize_kernel,
        capability,
        pointers={**pointers, **factors, "scale_ptr": "*fp32", **PROLOGUES[prologue]},
        numbers=STRIDES,
        constants=constants_of(prologue)
        | {
            "D1": d1,
            "D2": d2,
            "STARTS": tuple(d1 * i for i in range(num_slices)),
            "WIDTHS": (d1,) * num_slices,
            "SLICE_OF_TYPE": (0, num_slices - 1, 0),
            "DEFAULT_TYPE": 0,
            "QMAX": qmax,
            "IN": tile.block_in,
            "OUT": tile.block_out,
            "COLUMNS_A": tile.columns[0],
            "COLUMNS_B": tile.columns[1],
        },
        num_warps=tile.num_warps,
        num_stages=1,
    )


@pytest.mark.parametrize(
    ("num_features", "num_slices", "prologue"),
    [
        (4096, 2, "layer"),
        (4096, 1, "rms of a sum"),
        (12288, 1, "silu"),
        (18944, 1, "gelu"),
    ],
)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_transform(capability: int, num_features: int, num_slices: int, prologue: str) -> None:
    if OLD_TRITON and capability == 100 and num_features == 18944:
        pytest.skip("not for Blackwell before Triton 3.9; see is_supported")
    compiled = compile_transform(capability, num_features, num_slices, prologue)
    assert re.search(FP16_INSTRUCTIONS[capability], compiled.ptx)
    assert "st.global" in compiled.ptx
    # Of 148 columns a few values may go to the stack.
    assert compiled.local_bytes <= (320 if num_features == 18944 else 16)


@pytest.mark.parametrize(
    ("num_features", "prologue"), [(4096, "rms of a sum"), (12288, "silu"), (18944, "none")]
)
@pytest.mark.parametrize("capability", [89, 90, 100])
def test_transform_to_e4m3(capability: int, num_features: int, prologue: str) -> None:
    if OLD_TRITON and capability == 100 and num_features == 18944:
        pytest.skip("not for Blackwell before Triton 3.9; see is_supported")
    compiled = compile_transform(capability, num_features, 1, prologue, 448)
    # Triton 3.6 goes by way of fp16 on sm_89: what is nearly half-way between two codes may be rounded twice.
    source = "f16x2" if OLD_TRITON and capability == 89 else "f32"
    assert f"cvt.rn.satfinite.e4m3x2.{source}" in compiled.ptx
    assert compiled.local_bytes <= (320 if num_features == 18944 else 16)


def tiles_for(codes: torch.dtype) -> list[TileConfig]:
    """For Hopper, with K whole or in four parts."""
    tiles = [tile for tile, _ in hopper_tiles(4096, promoted=codes != torch.int8)]
    return [tile for tile in tiles if tile.split_k in (1, 4)]


def distinct_tiles(codes: torch.dtype) -> list[TileConfig]:
    """Of each kind the one with most stages: in registers the others are like it. How many programs share a
    multiprocessor is nothing that is compiled."""
    kinds: dict[TileConfig, TileConfig] = {}
    for tile in sorted(tiles_for(codes), key=lambda tile: tile.num_stages):
        kinds[replace(tile, num_stages=0, programs=1)] = tile
    return list(kinds.values())


ENGINES = (torch.int8, torch.float8_e4m3fn)
LINEAR_TILES = [(tile, codes) for codes in ENGINES for tile in distinct_tiles(codes)]
SHARING_TILES = [
    (tile, codes) for codes in ENGINES for tile in tiles_for(codes) if tile.programs > 1
]


@pytest.mark.parametrize(("typed", "num_slices", "rank"), [(True, 3, 0), (True, 1, 72)])
@pytest.mark.parametrize(("tile", "codes"), LINEAR_TILES, ids=str)
def test_hopper_linear(
    tile: TileConfig, codes: torch.dtype, typed: bool, num_slices: int, rank: int
) -> None:
    check_linear(tile, codes, typed, num_slices, rank, 1)


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(
    ("tile", "codes"), [(tile, codes) for tile, codes in LINEAR_TILES if tile.split_k == 1], ids=str
)
def test_hopper_linear_with_less(tile: TileConfig, codes: torch.dtype, typed: bool) -> None:
    """Without slices and branch; where K is split, too, these have fewer registers to fill than those."""
    check_linear(tile, codes, typed, 1, 0, 1)


@pytest.mark.parametrize(("tile", "codes"), LINEAR_TILES + SHARING_TILES, ids=str)
def test_hopper_linears(tile: TileConfig, codes: torch.dtype) -> None:
    """Three in one launch; with a branch on the int8 engine. They take the most shared memory: where two programs have
    to find room, these tell."""
    check_linear(tile, codes, True, 1, 72 if codes == torch.int8 else 0, 3)


def check_linear(
    tile: TileConfig,
    codes: torch.dtype,
    typed: bool,
    num_slices: int,
    rank: int,
    num_linears: int,
) -> None:
    is_e4m3 = codes == torch.float8_e4m3fn
    shapes = (
        (tile.block_m, tile.block_k),
        (tile.rows, tile.block_k),
        (tile.block_m, tile.rows),
        (tile.block_m, tile.block_k // 2),
        (tile.block_k // 2, tile.rows),
    )
    kinds = ("fp8e4nv" if is_e4m3 else "i8", "i8", "bf16", "bf16", "i8")
    tiles = zip(kinds, shapes, layouts(tile, torch.bfloat16, codes), strict=True)
    descriptors = dict(
        zip(
            ("codes", "weight", "out", "coefficients", "branch"),
            (f"tensordesc<{kind}{list(shape)},{layout!r}>" for kind, shape, layout in tiles),
            strict=True,
        )
    )
    constants = {
        "DEFAULT_TYPE": 0,
        "SLICE_OF_TYPE": (0, num_slices - 1, 0),
        "SLICE_STARTS": (0, 1024, 1500)[:num_slices],
        "STAGES": tile.num_stages,
        "BLOCK_M": tile.block_m,
        "ROWS": tile.rows,
        "BLOCK_K": tile.block_k,
        "GROUPS": tile.groups,
        "GROUP_M": tile.group_m,
        "SPLIT_K": tile.split_k,
        "GROUP_REGISTERS": registers(tile)["GROUP_REGISTERS"],
        "PROMOTED": is_e4m3,
        "R": max(rank - 2, 0),
        "RANK": rank,
        "ONE": 16.0,
        "num_warps": tile.num_warps,
    }
    arguments = {
        **{name: descriptors[name] for name in ("codes", "weight", "out")},
        **dict.fromkeys(("scale_ptr", "weight_scale_ptr"), "*fp32"),
        **dict.fromkeys(("M", "N", "num_even"), "i32"),
    }
    if rank:
        arguments |= {name: descriptors[name] for name in ("coefficients", "branch")}
        arguments |= {"branch_scale_ptr": "*fp32"}
    if typed:
        arguments |= {"bias_ptr": "*fp32", "type_ptr": "*i32"}
    if tile.split_k > 1:
        arguments |= {"partial_ptr": "*fp32" if is_e4m3 else "*i32", "counter_ptr": "*i32"}
    of_others = ("weight", "out", "branch", "branch_scale_ptr", "weight_scale_ptr", "bias_ptr", "N")
    for number in range(1, num_linears):
        given = {name: arguments[name] for name in of_others if name in arguments}
        arguments |= {f"{name}_{number}": kind for name, kind in given.items()}
    missing = set(hopper_linear_kernel.arg_names) - {*arguments, *constants}
    compiled = compile_gluon(
        hopper_linear_kernel,
        arguments=arguments,
        constants=constants | dict.fromkeys(missing),
        num_warps=tile.num_warps,
        maxnreg=registers(tile)["maxnreg"],
    )
    instructions = re.findall(r"wgmma\.mma_async[^;]+;", compiled.ptx)
    of_branch = [i for i in instructions if re.search(BF16_ON_HOPPER, i)]
    instructions = [i for i in instructions if i not in of_branch]
    assert bool(of_branch) == bool(rank)
    wanted = (E4M3_INSTRUCTIONS if is_e4m3 else INT8_INSTRUCTIONS)[90]
    assert all(re.search(wanted, instruction) for instruction in instructions)
    assert all(map(_left_in_registers, instructions))
    assert "cp.async.bulk.tensor" in compiled.ptx
    # Outside of the loop: addresses, and rows of the epilogue.
    has_most = is_e4m3 and rank > 0 and (tile.block_m, tile.split_k) == (64, 4)
    assert compiled.local_bytes <= (192 if has_most else 184)
    assert compiled.registers * 128 * (tile.groups + 1) * tile.programs <= 65536
    assert (compiled.shared_bytes + 1024) * tile.programs <= 228 * 1024


@pytest.mark.parametrize("qmax", [7, 448])
@pytest.mark.parametrize(
    ("num_features", "rank", "own_rank"), [(4096, 64, 32), (18944, 128, 0), (3584, 102, 0)]
)
@pytest.mark.parametrize("typed", [True, False])
def test_hopper_branch_of_few_tokens(
    num_features: int, rank: int, own_rank: int, qmax: int, typed: bool
) -> None:
    tile = few_tokens_tile(num_features, rank)
    num_tiles = num_features // tile.block_k
    shared = {
        "K": num_features,
        "R": rank,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": tile.block_r,
        "num_warps": tile.num_warps,
    }
    pointers = {"z_ptr": "*bf16", "columns_ptr": "*i8", "partial_ptr": "*fp32"}
    types = {"type_ptr": "*i32"} if typed else {}
    numbers = {"M": "i32", "num_parts": "i32"}
    no_types: dict[str, object] = {} if typed else {"type_ptr": None}
    of_types = no_types | {"NUM_TYPES": 3, "DEFAULT_TYPE": 0}
    found = dict.fromkeys(("rest_ptr", "largest_ptr", "sums_ptr"), "*fp32")
    for kernel, arguments, constants in (
        (hopper_branch_few.coefficients_kernel, pointers | numbers, shared),
        (
            hopper_branch_few.rest_kernel,
            pointers | types | found | numbers,
            shared | of_types | {"OWN_RANK": own_rank, "STEP": 0.01},
        ),
        (
            hopper_branch_few.codes_kernel,
            found
            | types
            | dict.fromkeys(("clip_ptr", "scale_ptr"), "*fp32")
            | {"codes_ptr": "*i8", "coefficients_ptr": "*bf16"},
            of_types
            | {
                "K": num_features,
                "WIDTH": branch_width(rank),
                "QMAX": qmax,
                "NUM_TILES": num_tiles,
                "TILES": 1 << (num_tiles - 1).bit_length(),
                "CHUNK": tile.chunk,
                "BLOCK_R": tile.block_r,
                "num_warps": tile.num_warps,
            },
        ),
    ):
        compiled = compile_gluon(
            kernel, arguments=arguments, constants=constants, num_warps=tile.num_warps
        )
        assert compiled.local_bytes == 0
        # What does not depend on the kernel before is asked for before that one is done.
        before = compiled.ptx.index("griddepcontrol.wait")
        assert ("ld.global" in compiled.ptx[:before]) == ("columns_ptr" in arguments)
        assert bool(re.search(r"mma\.sync\S*\.bf16\.bf16\.", compiled.ptx)) == (
            "columns_ptr" in arguments
        )


@pytest.mark.parametrize("rank", [64, 102])
def test_columns_of_a_branch(rank: int) -> None:
    """They are asked for before the kernel ahead is done."""
    sizes = {"R": rank, "WIDTH": branch_width(rank), "BLOCK_R": 64 if rank == 64 else 128}
    compiled = compile_gluon(
        hopper_branch_quantize.columns_kernel,
        arguments={"codes_ptr": "*i8", "columns_ptr": "*bf16"},
        constants={"K": 4096, **sizes, "ROWS": 32, "num_warps": 4},
        num_warps=4,
    )
    assert compiled.local_bytes == 0
    before, after = compiled.ptx.split("griddepcontrol.wait")
    assert "ld.global" in before
    assert "st.global" not in before
    assert "st.global" in after


@pytest.mark.parametrize("qmax", [7, 448])
@pytest.mark.parametrize(
    ("num_features", "rank", "own_rank"), [(4096, 64, 32), (12288, 128, 0), (640, 8, 0)]
)
@pytest.mark.parametrize(("typed", "parts"), [(True, 2), (False, 4), (False, 1)])
def test_hopper_branch(
    num_features: int, rank: int, own_rank: int, qmax: int, typed: bool, parts: int
) -> None:
    tile = branch_tile(num_features, rank)
    assert tile is not None
    shapes = ((tile.block_m, tile.block_k), (tile.block_k, tile.block_r))
    tiles = zip(shapes, hopper_branch_quantize.layouts(tile), strict=True)
    z, columns = (f"tensordesc<bf16{list(shape)},{layout!r}>" for shape, layout in tiles)
    types = {"type_ptr": "*i32"}
    exchange = {"partial_ptr": "*fp32", "maxima_ptr": "*fp32", "counter_ptr": "*i32"}
    compiled = compile_gluon(
        hopper_branch_quantize.hopper_branch_quantize_kernel,
        arguments={
            "z": z,
            "columns": columns,
            **(types if typed else {}),
            **dict.fromkeys(("clip_ptr", "scale_ptr"), "*fp32"),
            "codes_ptr": "*i8",
            "coefficients_ptr": "*bf16",
            **(exchange if parts > 1 else {}),
            "M": "i32",
        },
        constants=({} if typed else dict.fromkeys(types))
        | ({} if parts > 1 else dict.fromkeys(exchange))
        | {
            "K": num_features,
            "R": rank,
            "OWN_RANK": own_rank,
            "NUM_TYPES": 3,
            "DEFAULT_TYPE": 0,
            "QMAX": qmax,
            "STEP": 0.01,
            "PARTS": parts,
            "STAGES": tile.num_stages,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": tile.block_r,
            "num_warps": tile.num_warps,
        },
        num_warps=tile.num_warps,
    )
    assert re.search(BF16_ON_HOPPER, compiled.ptx)
    assert "cp.async.bulk.tensor" in compiled.ptx
    assert compiled.local_bytes == 0
    assert compiled.shared_bytes <= 227 * 1024


@pytest.mark.parametrize(
    ("shape", "widths", "prologue"),
    [
        ((64, 64), (64,), "none"),
        ((64, 64), (32, 32), "none"),
        ((56, 64), (56,), "rms"),
        ((64, 64), (24, 40, 64), "rms"),
        ((128, 64), (64, 40), "rms"),
        ((64, 64), (64,), "rms of a sum"),
        ((64, 64), (64,), "gelu"),
        ((64, 128), (64,), "layer"),
        ((80, 64), (80,), "rms"),
        ((86, 128), (86,), "silu"),
        ((96, 128), (48, 48), "silu"),
        ((112, 128), (112,), "none"),
        ((112, 128), (112,), "rms of a sum"),
        ((64, 80), (64,), "rms"),
        ((128, 148), (128,), "silu"),
        ((128, 148), (128,), "none"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("typed", "qmax", "many"),
    [(True, 7, True), (False, 7, True), (True, 0, True), (True, 7, False)],
)
def test_hopper_transform(
    shape: tuple[int, int],
    widths: tuple[int, ...],
    prologue: str,
    typed: bool,
    qmax: int,
    many: bool,
) -> None:
    tile = hopper_transform_tile(shape[0], widths, shape[1], prologue.split()[0])
    assert tile is not None
    if not many:
        tile = tile.of_one_token(tile.per_multiprocessor)
    factors = dict.fromkeys(("channel_scale_ptr", "left_ptr", "right_ptr", "clip_ptr"), "*fp32")
    pointers = {"x_ptr": "*bf16", "shift_ptr": "*bf16", "codes_ptr": "*i8" if qmax else "*bf16"}
    types = {"type_ptr": "*i32"}
    box, layout = box_of_token(tile)
    rows = {"x_rows": f"tensordesc<bf16{box},{layout!r}>"}
    compiled = compile_gluon(
        hopper_transform_quantize_kernel,
        arguments={
            **pointers,
            **(rows if tile.tokens_ahead else {}),
            **(types if typed else {}),
            **factors,
            "scale_ptr": "*fp32",
            **PROLOGUES[prologue],
            **STRIDES,
        },
        constants=constants_of(prologue)
        | ({} if typed else dict.fromkeys(types))
        | ({} if tile.tokens_ahead else dict.fromkeys(rows))
        | {
            "D1": shape[0],
            "D2": shape[1],
            "STARTS": tuple(sum(widths[:i]) for i in range(len(widths))),
            "WIDTHS": widths,
            "SLICE_OF_TYPE": (0, len(widths) - 1, 0),
            "DEFAULT_TYPE": 0,
            "QMAX": qmax,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns[0],
            "COLUMNS_B": tile.columns[1],
            "IN_A": tile.rows_in[0],
            "IN_B": tile.rows_in[1],
            "AHEAD": tile.ahead,
            "TOKENS_AHEAD": tile.tokens_ahead,
            "ONE_EACH": not many,
            "num_warps": tile.num_warps,
        },
        num_warps=tile.num_warps,
        maxnreg=tile.registers,
    )
    assert re.search(BF16_ON_HOPPER, compiled.ptx)
    # The next token's other row, or all of the only token before the kernel ahead is done.
    fetches = not many or "other_ptr" in PROLOGUES[prologue]
    assert ("ld.volatile.global.L2::128B" in compiled.ptx) == fetches
    assert ("cp.async.bulk.tensor" in compiled.ptx) == bool(tile.tokens_ahead)
    # Addresses, mostly: read again rather than computed. For one token that is nothing.
    most = 400 if sum(tile.columns) > 128 or prologue == "layer" else 200
    assert compiled.local_bytes <= (most if many else 800)
    assert compiled.registers * 32 * tile.num_warps * tile.per_multiprocessor <= 65536
    assert (compiled.shared_bytes + 1024) * tile.per_multiprocessor <= 228 * 1024
