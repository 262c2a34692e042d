"""The integer product as an Inductor template: what comes after it is fused into its kernel.

The template writes fp32 sums; scales, bias table, bias, residual and casts are ordinary pointwise ops, which the
scheduler makes its epilogue. The main loop is that of ``kernels/int_mm``: its functions are copied into the kernel.
With K split among programs the template writes partial sums, and their sum is the head of one pointwise kernel.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.virtualized import V

from freeact_fx.codegen.engine_ops import E4M3
from freeact_fx.codegen.kernels import int_mm as kernel
from freeact_fx.codegen.tiles import TileConfig, candidates, choose_tile

aten, prims = torch.ops.aten, torch.ops.prims


@SymbolicGridFn
def _grid(*sizes: Any, cdiv: Any) -> tuple[Any, Any, int]:
    *_, m, n, meta = sizes
    return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), meta["SPLIT_K"], 1


_BODY = r"""
{{def_kernel("codes", "weight")}}
    M = {{size("codes", 0)}}
    K = {{size("codes", 1)}}
    N = {{size("weight", 0)}}
    weight_stride = 4 * {{size("weight", 1)}}
    num_even = (K + 1) // 2
    tile_m, tile_n = tile_of_program(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    idx_split = tl.program_id(1).to(INDEX_DTYPE)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    bytes_of_split = tl.cdiv(num_even, BLOCK_K * SPLIT_K) * BLOCK_K
    first_byte = idx_split * bytes_of_split
    # Where Inductor reads bytes as e4m3, the pointer that it hands over is still one to bytes.
    typed_codes = codes.to(tl.pointer_type(tl.float8e4nv if E4M3 else tl.int8), bitcast=True)
    total = accumulate_codes(
        typed_codes,
        weight.to(tl.pointer_type(tl.int8), bitcast=True),
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
        True,
        APART,
    )
    idx_m = m[:, None]
    idx_n = n[None, :]
    mask = (idx_m < M) & (idx_n < N)
"""

_WHOLE = r"""
    result = tl.trans(in_whole_codes(total))
    {{store_output(("idx_m", "idx_n"), "result", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""

_PARTIAL = r"""
    result = tl.trans(total)
    {{store_output(("idx_split", "idx_m", "idx_n"), "result", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""


_FUNCTIONS = (
    kernel.unpack_codes,
    kernel.unpack_e4m3,
    kernel.tile_of_program,
    kernel.accumulate_codes,
)


def _template(name: str, store: str, *functions: Any) -> TritonTemplate:
    sources = "\n\n".join(inspect.getsource(function.fn) for function in functions)
    return TritonTemplate(name=name, grid=_grid, source=f"{_BODY}{store}\n{sources}")


WHOLE = _template("freeact_int_mm", _WHOLE, *_FUNCTIONS, kernel.in_whole_codes)
PARTIAL = _template("freeact_int_mm_partial", _PARTIAL, *_FUNCTIONS)


def _tiles(codes: Any, weight: Any, capability: int) -> tuple[TileConfig, ...]:
    """The default, or under max-autotune all candidates; for the number of tokens of the first call."""
    num_tokens, num_codes = codes.get_size()
    num_tokens = V.graph.sizevars.optimization_hint(num_tokens)
    if config.max_autotune or config.max_autotune_gemm:
        return candidates(num_tokens, capability)
    return (choose_tile(num_tokens, int(weight.get_size()[0]), int(num_codes), capability),)


@register_lowering(torch.ops.freeact.engine_int_mm.default, type_promotion_kind=None)
def engine_int_mm(codes: Any, weight: Any) -> Any:
    *lead, num_codes = codes.get_size()
    num_outputs = weight.get_size()[0]
    flat = _contiguous(lowerings[aten.reshape](codes, [-1, num_codes]))
    weight = _contiguous(weight)
    capability = kernel.capability_of(flat.get_device())
    tiles = _tiles(flat, weight, capability)
    split_k = tiles[0].split_k
    shape, dtype, template = [flat.get_size()[0], num_outputs], torch.float32, WHOLE
    if split_k > 1:
        shape, template = [split_k, *shape], PARTIAL
        dtype = kernel.partial_dtype(codes.get_dtype())
    layout = ir.FixedLayout(flat.get_device(), dtype, shape)
    choices: list[Any] = []
    for tile in tiles:
        template.maybe_append_choice(
            choices,
            input_nodes=(flat, weight),
            layout=layout,
            num_stages=tile.num_stages,
            num_warps=tile.num_warps,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            SPLIT_K=tile.split_k,
            MASKED=kernel.is_masked(int(num_codes), tile),
            E4M3=codes.get_dtype() == E4M3,
            APART=kernel.adds_apart(codes.get_dtype(), capability),
        )
    product = autotune_select_algorithm("freeact_int_mm", choices, [flat, weight], layout)
    if isinstance(product, tuple):  # from torch 2.13 on with the choice it made
        product = product[0]
    if split_k > 1:
        whole = lowerings[aten.sum](product, [0], dtype=dtype)
        product = lowerings[aten.mul](
            lowerings[prims.convert_element_type](whole, torch.float32),
            kernel.whole_code(codes.get_dtype()),
        )
    return lowerings[aten.reshape](product, [*lead, num_outputs])


@register_lowering(torch.ops.freeact.linear_output.default, type_promotion_kind=None)
def linear_output(y: Any) -> Any:
    y.realize()
    return y


def _contiguous(node: Any) -> Any:
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))
