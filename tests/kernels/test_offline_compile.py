"""Each kernel compiled for GPUs that are not there: the matrix instruction that is meant, and no spilled registers."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

import torch
import triton
from offline import (
    FP16_INSTRUCTIONS,
    INT8_INSTRUCTIONS,
    Compiled,
    compile_gluon,
    compile_kernel,
)

from freeact_fx.codegen.kernels.hopper_int_mm import hopper_linear_kernel, layouts
from freeact_fx.codegen.kernels.hopper_transform_quantize import hopper_transform_quantize_kernel
from freeact_fx.codegen.kernels.int_mm import int_mm_kernel
from freeact_fx.codegen.kernels.transform_quantize import transform_quantize_kernel
from freeact_fx.codegen.tiles import (
    TileConfig,
    candidates,
    choose_hopper_tile,
    hopper_transform_tile,
    transform_tile,
)
from freeact_fx.transform import kronecker_shape

OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def compile_product(capability: int, tile: TileConfig) -> Compiled:
    return compile_kernel(
        int_mm_kernel,
        capability,
        pointers={"codes_ptr": "*i8", "weight_ptr": "*i32", "out_ptr": "*fp32"},
        numbers=dict.fromkeys(("M", "N", "K", "weight_stride"), "i32"),
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
            "SPLIT_K": tile.split_k,
            "MASKED": False,
            "ASSEMBLY": True,
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


def _left_in_registers(instruction: str) -> bool:
    return re.search(r"\},\s*\{", instruction) is not None


def compile_transform(capability: int, num_features: int, num_slices: int) -> Compiled:
    shape = kronecker_shape(num_features)
    assert shape is not None
    d1, d2 = shape
    tile = transform_tile(d1, d1, d2)
    factors = dict.fromkeys(("channel_scale_ptr", "left_ptr", "right_ptr", "clip_ptr"), "*fp32")
    pointers = {"x_ptr": "*bf16", "type_ptr": "*i32", "shift_ptr": "*bf16", "codes_ptr": "*i8"}
    return compile_kernel(
        transform_quantize_kernel,
        capability,
        pointers={**pointers, **factors, "scale_ptr": "*fp32"},
        numbers={"M": "i32"},
        constants={
            "D1": d1,
            "D2": d2,
            "STARTS": tuple(d1 * i for i in range(num_slices)),
            "WIDTHS": (d1,) * num_slices,
            "SLICE_OF_TYPE": (0, num_slices - 1, 0),
            "DEFAULT_TYPE": 0,
            "QMAX": 7,
            "IN": tile.block_in,
            "OUT": tile.block_out,
            "COLUMNS_A": tile.columns[0],
            "COLUMNS_B": tile.columns[1],
        },
        num_warps=tile.num_warps,
        num_stages=1,
    )


@pytest.mark.parametrize(("num_features", "num_slices"), [(4096, 1), (4096, 2), (18944, 1)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_transform(capability: int, num_features: int, num_slices: int) -> None:
    if OLD_TRITON and capability == 100 and num_features == 18944:
        pytest.skip("not for Blackwell before Triton 3.9; see is_supported")
    compiled = compile_transform(capability, num_features, num_slices)
    assert re.search(FP16_INSTRUCTIONS[capability], compiled.ptx)
    assert "st.global" in compiled.ptx
    # Of 148 columns a few values may go to the stack.
    assert compiled.local_bytes <= (256 if num_features == 18944 else 16)


@pytest.mark.parametrize(("num_tokens", "typed"), [(4096, True), (65, False)])
def test_hopper_linear(num_tokens: int, typed: bool) -> None:
    tile = choose_hopper_tile(num_tokens)
    shapes = (
        (tile.block_m, tile.block_k),
        (tile.block_n, tile.block_k),
        (tile.block_m, tile.block_n // 2),
    )
    tiles = zip(("i8", "i8", "bf16"), shapes, layouts(tile, torch.bfloat16), strict=True)
    descriptors = [f"tensordesc<{kind}{list(shape)},{layout!r}>" for kind, shape, layout in tiles]
    constants = {
        "DEFAULT_TYPE": 0,
        "NUM_TYPES": 3,
        "STAGES": tile.num_stages,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
    }
    tables = {"bias_ptr": "*fp32", "type_ptr": "*i32"}
    compiled = compile_gluon(
        hopper_linear_kernel,
        arguments={
            **dict(zip(("codes", "weight", "out"), descriptors, strict=True)),
            **dict.fromkeys(("scale_ptr", "weight_scale_ptr"), "*fp32"),
            **(tables if typed else {}),
            **dict.fromkeys(("M", "N", "num_even"), "i32"),
        },
        constants=constants | ({} if typed else dict.fromkeys(tables)),
        num_warps=tile.num_warps,
    )
    instructions = re.findall(r"wgmma\.mma_async[^;]+;", compiled.ptx)
    assert re.search(INT8_INSTRUCTIONS[90], instructions[0])
    assert all(map(_left_in_registers, instructions))
    assert "cp.async.bulk.tensor" in compiled.ptx
    assert compiled.local_bytes == 0


@pytest.mark.parametrize("shape", [(64, 64), (96, 128)], ids=str)
def test_hopper_transform(shape: tuple[int, int]) -> None:
    tile = hopper_transform_tile(*shape)
    assert tile is not None
    factors = dict.fromkeys(("channel_scale_ptr", "left_ptr", "right_ptr", "clip_ptr"), "*fp32")
    pointers = {"x_ptr": "*bf16", "type_ptr": "*i32", "shift_ptr": "*bf16", "codes_ptr": "*i8"}
    compiled = compile_gluon(
        hopper_transform_quantize_kernel,
        arguments={**pointers, **factors, "scale_ptr": "*fp32", "M": "i32"},
        constants={
            "D1": shape[0],
            "D2": shape[1],
            "NUM_TYPES": 3,
            "DEFAULT_TYPE": 0,
            "QMAX": 7,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "IN_A": tile.rows_in[0],
            "IN_B": tile.rows_in[1],
            "num_warps": tile.num_warps,
        },
        num_warps=tile.num_warps,
    )
    assert re.search(FP16_INSTRUCTIONS[90], compiled.ptx)
    assert compiled.local_bytes == 0
    assert compiled.registers * 32 * tile.num_warps * tile.per_multiprocessor <= 65536
