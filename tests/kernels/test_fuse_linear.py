"""Whole Linears, as the passes write them and Inductor decomposes them, become one op each on Hopper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_transforms import random_transform
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

import freeact_fx
from freeact_fx import FreeActLinear, QuantConfig, TokenTypes
from freeact_fx.codegen import engine_graph, engine_ops, fuse_linear, lowering
from freeact_fx.convert import GroupTransformModule
from freeact_fx.reference import pack_int4, rows_of_type, slice_of_token
from freeact_fx.transform import pack_linear

ops = torch.ops.freeact
WIDTH, NUM_OUTPUTS, NUM_TYPES = 256, 48, 3


def linear_of(
    plan: str, *, has_bias: bool, width: int = WIDTH, num_outputs: int = NUM_OUTPUTS
) -> nn.Module:
    """Types 1 and 2 share a slice, and the last one is that of tokens without a type."""
    t = random_transform(plan, width, NUM_TYPES, seed=0)
    if len(t.widths) > 1:
        t = replace(t, slice_of_type=(0, 1, 1, 2))
    if not has_bias:
        t = replace(t, shift=None)
    config = QuantConfig(
        plan=t.plan, token_types=TokenTypes.explicit("one", "two", "three"), sink=None
    )
    packed = pack_linear(t, torch.randn(num_outputs, width), None, config)
    return FreeActLinear(GroupTransformModule(t), packed, config, (0.0, 0.0, 0.0)).eval()


def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no kernel runs the reference."""
    for module in (engine_graph, lowering):
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    for module in (engine_ops, lowering):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)


def compiled(
    model: nn.Module, x: Tensor, types: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Counter[str]]:
    """Output, and the ops of the graph."""
    from freeact_fx import compat

    as_on_hopper(monkeypatch)
    names: Counter[str] = Counter()

    def use_engine_ops(graph: Graph, *, tune: bool) -> None:
        engine_graph.use_engine_ops(graph, tune=tune)
        names.update(str(node.target) for node in graph.nodes if node.op == "call_function")

    monkeypatch.setattr(compat, "use_engine_ops", use_engine_ops)
    torch._dynamo.reset()
    call = torch.compile(model, backend="freeact", options={"strict": True})
    with (
        torch.no_grad(),
        torch._inductor.config.patch(fx_graph_cache=False),
        freeact_fx.token_types(types),
    ):
        return call(x), names


@pytest.mark.inductor
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("plan", ["single", "shift", "duplicate", "paper"])
def test_one_op(plan: str, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_of(plan, has_bias=has_bias)
    x = torch.randn(2, 40, WIDTH).bfloat16()
    types = torch.randint(0, NUM_TYPES, (2, 40))
    with torch.no_grad(), freeact_fx.token_types(types):
        want = model(x)
    got, names = compiled(model, x, types, monkeypatch)
    assert names["freeact.engine_linear.default"] == 1
    assert not {"freeact.engine_int_mm.default", "aten.index.Tensor", "aten.mul.Tensor"} & set(
        names
    )
    assert torch.linalg.norm((got - want).float()) < 0.01 * torch.linalg.norm(want.float())


@pytest.mark.inductor
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("plan", ["branch", "own branch"])
def test_branch(plan: str, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four and six columns, which are eight for the kernels."""
    model = linear_of(plan, has_bias=has_bias, width=4096)
    x, types = torch.randn(2, 20, 4096).bfloat16(), torch.randint(0, NUM_TYPES, (2, 20))
    with torch.no_grad(), freeact_fx.token_types(types):
        want = model(x)
    got, names = compiled(model, x, types, monkeypatch)
    assert names["freeact.engine_transform_quantize.default"] == 1
    assert names["freeact.engine_branch_quantize.default"] == 1
    assert names["freeact.engine_linear.default"] == 1
    assert names["freeact.engine_branch_product.default"] == 0
    assert near(got, want)


def near(got: Tensor, want: Tensor) -> bool:
    """Rounded to bf16, tokens have 0.4 % of their codes elsewhere. Codes of these transforms, which are far from
    orthogonal, are off by as much as the output itself."""
    return bool(torch.linalg.norm((got - want).float()) < 0.2 * torch.linalg.norm(want.float()))


def test_branch_of_a_linear_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transform has kernels, its product none that takes the branch."""
    t = random_transform("branch", 4096, NUM_TYPES, seed=2)
    operands = (t.shift, t.channel_scale, t.left, t.right, t.clip, t.lowrank)
    weight = pack_int4(torch.randint(-7, 8, (NUM_OUTPUTS, 4096)).to(torch.int8))
    branch = torch.randint(-127, 128, (4, NUM_OUTPUTS)).to(torch.int8), torch.rand(4)
    scales = torch.rand(1, NUM_OUTPUTS)

    def linear(x: Tensor, types: Tensor) -> Tensor:
        codes, scale, coefficients = ops.transform_quantize_branch(
            x, types, *operands, list(t.widths), list(t.slice_of_type), 0, 0, 7
        )
        y = ops.int_mm(codes, weight) * scale * scales[0]
        return y + ops.engine_branch_product(coefficients, *branch)

    args = torch.randn(2, 20, 4096), torch.randint(0, NUM_TYPES, (2, 20))
    table = {op: f for op, f in select_decomp_table().items() if op.namespace != "freeact"}
    traced = make_fx(linear, table, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    want = traced(*args)
    as_on_hopper(monkeypatch)
    engine_graph.use_engine_ops(traced.graph)
    traced.recompile()
    assert near(traced(*args), want)
    names = Counter(str(node.target) for node in traced.graph.nodes)
    assert names["freeact.engine_branch_quantize.default"] == 1
    assert names["freeact.engine_int_mm.default"] == 1
    assert names["freeact.engine_branch_product.default"] == 1


class Mlp(nn.Module):
    """A norm, and Linears whose transforms have branches; the second one's shape has a kernel without GELU alone."""

    def __init__(self, curve: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.curve = nn.RMSNorm(4096, dtype=torch.bfloat16), curve
        self.up = linear_of("branch", has_bias=True, width=4096, num_outputs=8192)
        self.down = linear_of("own branch", has_bias=True, width=8192)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.curve(self.up(self.norm(x))))


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("curve", "folded"), [(nn.functional.silu, 1), (nn.functional.gelu, 0)], ids=["silu", "gelu"]
)
def test_branch_behind_a_norm_or_an_activation(
    curve: Callable[[Tensor], Tensor], folded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mlp(curve).eval()
    x, types = torch.randn(1, 6, 4096).bfloat16(), torch.randint(0, NUM_TYPES, (1, 6))
    _, names = compiled(model, x, types, monkeypatch)
    assert names["freeact.engine_norm_transform_quantize.default"] == 1
    assert names["freeact.engine_gated_transform_quantize.default"] == folded
    assert names["freeact.engine_transform_quantize.default"] == 1 - folded
    assert names["freeact.engine_branch_quantize.default"] == 2
    assert names["freeact.engine_linear.default"] == 2
    assert names["freeact.engine_branch_product.default"] == 0


@pytest.mark.inductor
def test_branch_of_a_shape_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transform is plain ops, but its product is in the Linear."""
    model = linear_of("branch", has_bias=True)
    x, types = torch.randn(2, 40, WIDTH).bfloat16(), torch.randint(0, NUM_TYPES, (2, 40))
    with torch.no_grad(), freeact_fx.token_types(types):
        want = model(x)
    got, names = compiled(model, x, types, monkeypatch)
    assert names["freeact.engine_branch_quantize.default"] == 0
    assert names["freeact.engine_linear.default"] == 1
    assert torch.linalg.norm((got - want).float()) < 0.01 * torch.linalg.norm(want.float())


Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
SLICES = (0, 1, 2, 1)


def sliced(
    types: Callable[[Tensor], Tensor | None] = lambda types: types,
    scale_types: Callable[[Tensor], Tensor | None] = lambda types: types,
    bias_types: Callable[[Tensor], Tensor | None] = lambda types: types,
    slices: tuple[int, ...] = SLICES,
) -> Linear:
    """A Linear with what each of its parts takes for the types, and with the slices that its scale is chosen by."""
    t = random_transform("paper", WIDTH, NUM_TYPES, seed=1)
    operands = (t.shift, t.channel_scale, t.left, t.right, t.clip)
    weight = pack_int4(torch.randint(-7, 8, (NUM_OUTPUTS, WIDTH)).to(torch.int8))

    def linear(x: Tensor, given: Tensor, tables: Tensor) -> Tensor:
        codes, scale = ops.transform_quantize(
            x, types(given), *operands, list(t.widths), list(SLICES), 1, 7
        )
        y = ops.int_mm(codes, weight) * scale
        y = y * tables[:3][slice_of_token(scale_types(given), slices, 1)]
        return (y + rows_of_type(tables, bias_types(given), 1)).to(x.dtype)

    return linear


@pytest.mark.parametrize(
    ("linear", "fused"),
    [
        (sliced(), 1),
        (sliced(*3 * [lambda types: None]), 1),
        (sliced(types=lambda types: None), 0),
        (sliced(scale_types=lambda types: None), 0),
        (sliced(bias_types=lambda types: types + 1 - 1), 0),
        (sliced(slices=(0, 1, 2, 2)), 0),
    ],
    ids=["typed", "untyped", "another transform", "one scale", "another bias", "other slices"],
)
def test_slices_that_all_parts_agree_on(
    linear: Linear, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, types = torch.randn(2, 40, WIDTH).bfloat16(), torch.randint(0, NUM_TYPES + 1, (2, 40))
    args = (x, types, torch.rand(NUM_TYPES + 1, NUM_OUTPUTS))
    table = {op: f for op, f in select_decomp_table().items() if op.namespace != "freeact"}
    traced = make_fx(linear, table, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    want = traced(*args)
    as_on_hopper(monkeypatch)
    engine_graph.use_engine_ops(traced.graph)
    traced.recompile()
    assert torch.equal(traced(*args), want)
    names = [str(node.target) for node in traced.graph.nodes]
    assert names.count("freeact.engine_linear.default") == fused


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_branch", [True, False])
def test_linears_of_the_same_codes_are_joined(has_bias: bool, has_branch: bool) -> None:
    codes = torch.randint(-7, 8, (1, 6, 128)).to(torch.int8)
    scale, coefficients = torch.rand(1, 6, 1), torch.randn(1, 6, 8).bfloat16()
    types = torch.randint(0, 2, (1, 6))
    linears = [
        (
            pack_int4(torch.randint(-7, 8, (n, 128)).to(torch.int8)),
            torch.rand(1, n),
            torch.randn(2, n) if has_bias else None,
            torch.randint(-127, 128, (8, n)).to(torch.int8),
            torch.rand(8),
        )
        for n in (16, 48, 32)
    ]

    def separate(
        codes: Tensor, scale: Tensor, types: Tensor, coefficients: Tensor, linears: Any
    ) -> list[Tensor]:
        static = (types, [128], [0, 0], 0, torch.bfloat16)
        return [
            ops.engine_linear(
                codes, scale, *tables, *static, *((coefficients, *branch) if has_branch else ())
            )
            for *tables, branch in ((*linear[:3], linear[3:]) for linear in linears)
        ]

    args = (codes, scale, types, coefficients, linears)
    gm = make_fx(separate, tracing_mode="fake")(*args)
    want = gm(*args)
    fuse_linear.join_linears(gm.graph)
    gm.recompile()
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(ops.engine_linears.default) == 1
    assert ops.engine_linear.default not in targets
    assert all(map(torch.equal, gm(*args), want))
