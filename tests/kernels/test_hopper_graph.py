"""On Hopper a product with its scales and its bias table is one op; the graph computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import freeact_fx  # noqa: F401  (registers the ops)
from freeact_fx.codegen import engine_graph, engine_ops
from freeact_fx.codegen.engine_graph import use_engine_ops
from freeact_fx.codegen.tiles import MOST_TYPES
from freeact_fx.reference import pack_int4

ops, aten, prims = torch.ops.freeact, torch.ops.aten, torch.ops.prims
NUM_CODES, NUM_OUTPUTS = 256, 24
Linear = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def scaled(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    y = aten.mul.Tensor(ops.int_mm(codes, weight), scale)
    return aten.mul.Tensor(y, aten.select.int(weight_scale, 0, 0))


def typed(
    codes: Tensor, scale: Tensor, weight: Tensor, rows: Tensor, table: Tensor, types: Tensor
) -> Tensor:
    y = aten.add.Tensor(scaled(codes, scale, weight, rows), aten.index.Tensor(table, [types]))
    return prims.convert_element_type.default(y, torch.bfloat16)


def untyped(
    codes: Tensor, scale: Tensor, weight: Tensor, rows: Tensor, table: Tensor, types: Tensor
) -> Tensor:
    y = aten.add.Tensor(scaled(codes, scale, weight, rows), aten.select.int(table, 0, 2))
    return prims.convert_element_type.default(y, torch.bfloat16)


def without_bias(
    codes: Tensor, scale: Tensor, weight: Tensor, rows: Tensor, table: Tensor, types: Tensor
) -> Tensor:
    y = scaled(codes, scale, weight, rows)
    return prims.convert_element_type.default(y, torch.bfloat16)


def with_branch(
    codes: Tensor, scale: Tensor, weight: Tensor, rows: Tensor, table: Tensor, types: Tensor
) -> Tensor:
    y = aten.add.Tensor(scaled(codes, scale, weight, rows), scale)
    y = aten.add.Tensor(y, aten.index.Tensor(table, [types]))
    return prims.convert_element_type.default(y, torch.bfloat16)


def by_slice(
    codes: Tensor, scale: Tensor, weight: Tensor, rows: Tensor, table: Tensor, types: Tensor
) -> Tensor:
    y = aten.mul.Tensor(
        aten.mul.Tensor(ops.int_mm(codes, weight), scale), aten.index.Tensor(table, [types])
    )
    return prims.convert_element_type.default(y, torch.bfloat16)


def in_fp32(
    codes: Tensor, scale: Tensor, weight: Tensor, rows: Tensor, table: Tensor, types: Tensor
) -> Tensor:
    return aten.add.Tensor(scaled(codes, scale, weight, rows), aten.index.Tensor(table, [types]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("linear", "fused"),
    [(typed, 1), (untyped, 1), (without_bias, 1), (with_branch, 0), (by_slice, 0), (in_fp32, 0)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_fused_where_the_kernel_has_it_all(
    linear: Linear, fused: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(-7, 8, (2, 40, NUM_CODES)).to(dtype)
    weight = pack_int4(torch.randint(-7, 8, (NUM_OUTPUTS, NUM_CODES)).to(torch.int8))
    types = torch.randint(0, 3, (2, 40))
    args = (
        codes,
        torch.rand(2, 40, 1),
        weight,
        torch.rand(1, NUM_OUTPUTS),
        torch.rand(3, NUM_OUTPUTS),
        types,
    )
    gm = make_fx(linear, tracing_mode="fake")(*args)
    want = gm(*args)
    monkeypatch.setattr(engine_graph, "has_kernels", lambda device: True)
    monkeypatch.setattr(engine_ops, "is_hopper", lambda device: True)
    monkeypatch.setattr(engine_ops, "has_fp8", lambda device: True)
    use_engine_ops(gm.graph)
    gm.recompile()
    assert torch.equal(gm(*args), want)
    names = Counter(n.target.__name__ for n in gm.graph.nodes if n.op == "call_function")
    assert names["engine_linear.default"] == fused
    assert names["engine_int_mm.default"] == 1 - fused
    assert names["linear_output.default"] == (not fused and linear is not in_fp32)
    if fused:
        assert names["mul.Tensor"] == names["add.Tensor"] == 0


@pytest.mark.parametrize(("num_types", "fused"), [(MOST_TYPES, 1), (MOST_TYPES + 1, 0)])
def test_more_types_than_registers_are_for(
    num_types: int, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((engine_graph, "has_kernels"), (engine_ops, "is_hopper")):
        monkeypatch.setattr(module, name, lambda device: True)
    codes = torch.randint(-7, 8, (40, NUM_CODES)).to(torch.int8)
    weight = pack_int4(torch.randint(-7, 8, (NUM_OUTPUTS, NUM_CODES)).to(torch.int8))
    rows = torch.rand(1, NUM_OUTPUTS), torch.rand(num_types, NUM_OUTPUTS)
    types = torch.randint(0, num_types, (40,))
    gm = make_fx(typed, tracing_mode="fake")(codes, torch.rand(40, 1), weight, *rows, types)
    use_engine_ops(gm.graph)
    targets = [n.target for n in gm.graph.nodes]
    assert targets.count(ops.engine_linear.default) == fused


@pytest.mark.parametrize(
    ("num_codes", "num_outputs", "dtype", "takes"),
    [
        (4096, 12288, torch.bfloat16, True),
        (4096, 12288, torch.float32, False),
        (4160, 12288, torch.float16, False),  # a step that is not whole
        (4096, 12, torch.bfloat16, False),  # rows that the copy engine cannot address
    ],
)
def test_shapes_that_the_kernel_takes(
    num_codes: int,
    num_outputs: int,
    dtype: torch.dtype,
    takes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, weight = torch.empty(1, num_codes, dtype=torch.int8), torch.empty(num_outputs, 1)
    assert not engine_ops.takes_linear(codes, weight, dtype)
    monkeypatch.setattr(engine_ops, "is_hopper", lambda device: True)
    assert engine_ops.takes_linear(codes, weight, dtype) == takes


@pytest.mark.parametrize("lead", [(), (1,), (3, 5)], ids=str)
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_opcheck(lead: tuple[int, ...], typed: bool, dtype: torch.dtype) -> None:
    codes = torch.randint(-7, 8, (*lead, 48)).to(dtype)
    weight = pack_int4(torch.randint(-7, 8, (5, 48)).to(torch.int8))
    table, types = (torch.rand(3, 5), torch.randint(0, 3, lead)) if typed else (None, None)
    scales = (torch.rand(*lead, 1), weight, torch.rand(2, 5))
    branch = (torch.rand(*lead, 8).bfloat16(), torch.rand(8, 5).bfloat16()) if typed else ()
    args = (codes, *scales, table, types, [16, 32], [0, 1, 1], 0, torch.bfloat16, *branch)
    # test_schema compares what goes in, and torch compares no fp8.
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tests += ["test_schema"] if dtype == torch.int8 else []
    torch.library.opcheck(ops.engine_linear.default, args, test_utils=tests)
    torch.library.opcheck(ops.linear_output.default, (torch.rand(*lead, 5),))
