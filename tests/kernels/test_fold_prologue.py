"""Norms, residual adds and activations put into the transforms of a graph; without a GPU the reference runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from random_transforms import random_transform
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import freeact_fx  # noqa: F401  (registers the ops)
from freeact_fx.codegen import engine_graph, engine_ops, fold_prologue
from freeact_fx.codegen.engine_graph import use_engine_ops
from freeact_fx.reference import pack_int4

ops = torch.ops.freeact
WIDTH, HIDDEN = 256, 512
NUM_TYPES = 2
TYPES = torch.randint(0, NUM_TYPES, (2, 3))
NORM_WEIGHT = torch.rand(WIDTH)


class Group:
    """Linears that share a transform, as ``insert`` writes them."""

    def __init__(self, num_inputs: int, *num_outputs: int) -> None:
        t = random_transform("shift", num_inputs, NUM_TYPES, seed=0)
        self.tensors = (t.shift, t.channel_scale, t.left, t.right, t.clip)
        self.static = (list(t.widths), list(t.slice_of_type), 0, 7)
        codes = [torch.randint(-7, 8, (n, num_inputs)).to(torch.int8) for n in num_outputs]
        self.weights = [pack_int4(c) for c in codes]
        self.scales = [torch.rand(1, n) / num_inputs for n in num_outputs]

    def __call__(self, x: Tensor) -> list[Tensor]:
        codes, scale = ops.transform_quantize(x, TYPES, *self.tensors, *self.static)
        linears = zip(self.weights, self.scales, strict=True)
        return [(ops.int_mm(codes, w) * scale * s.select(0, 0)).to(x.dtype) for w, s in linears]


def rms_norm(x: Tensor) -> Tensor:
    """As Llama writes it."""
    row = x.float()
    row = row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + 1e-6)
    return NORM_WEIGHT.to(x.dtype) * row.to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), NORM_WEIGHT.to(x.dtype))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def x(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, WIDTH).to(request.param)


@pytest.fixture(params=["hopper", "portable"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(engine_graph, "has_kernels", lambda device: True)
    monkeypatch.setattr(engine_ops, "is_hopper", lambda device: request.param == "hopper")
    return str(request.param)


def traced(function: Callable[[Tensor], Tensor], x: Tensor) -> GraphModule:
    table = {op: f for op, f in select_decomp_table().items() if op.namespace != "freeact"}
    ops = make_fx(function, table)(x)
    gm = make_fx(torch.func.functionalize(ops), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    gm.graph = fx_graph_cse(gm.graph)
    return gm


def ops_of(gm: GraphModule) -> Counter[str]:
    names = (n.target.__name__ for n in gm.graph.nodes if n.op == "call_function")
    return Counter(name.partition(".")[0] for name in names)


def folded(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[GraphModule, Counter[str]]:
    """The graph of a function afterwards and its ops; it must compute the same but for a few codes at ties."""
    gm = traced(function, x)
    want = gm(x)
    use_engine_ops(gm.graph)
    gm.recompile()
    got = gm(x)
    assert got.dtype == want.dtype
    assert (got - want).float().norm() < 0.05 * want.float().norm()
    return gm, ops_of(gm)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_norm(norm: Callable[[Tensor], Tensor], x: Tensor, chip: str) -> None:
    linear = Group(WIDTH, WIDTH)
    _, counts = folded(lambda x: linear(norm(x))[0], x)
    assert counts["engine_norm_transform_quantize"] == 1
    assert not {"rsqrt", "native_layer_norm", "mean", "pow", "engine_transform_quantize"} & set(
        counts
    )


def test_norm_that_something_else_reads_stays(x: Tensor, chip: str) -> None:
    linear = Group(WIDTH, WIDTH)

    def both(x: Tensor) -> Tensor:
        y = rms_norm(x)
        return linear(y)[0] + y

    _, counts = folded(both, x)
    assert counts["engine_transform_quantize"] == counts["rsqrt"] == 1
    assert counts["engine_norm_transform_quantize"] == 0


@pytest.mark.parametrize("curve", [F.silu, F.gelu])
@pytest.mark.parametrize("is_gated", [True, False])
def test_activation(
    curve: Callable[[Tensor], Tensor], is_gated: bool, x: Tensor, chip: str
) -> None:
    gate_up, down = Group(WIDTH, HIDDEN, HIDDEN), Group(HIDDEN, WIDTH)

    def mlp(x: Tensor) -> Tensor:
        gate, up = gate_up(x)
        return down(curve(gate) * up if is_gated else curve(gate))[0]

    _, counts = folded(mlp, x)
    assert counts["engine_gated_transform_quantize"] == 1
    assert not {"sigmoid", "silu", "gelu", "erf"} & set(counts)
    if chip == "hopper" and x.dtype == torch.bfloat16:
        assert counts["engine_linear"] == 2 - is_gated
        assert counts["engine_linears"] == is_gated


@pytest.mark.parametrize("folds", [True, False])
def test_cast_that_was_left_out_comes_back(
    folds: bool, chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 hands the gate to its activation in fp32, before the cast that ends its Linear."""
    if not folds:
        monkeypatch.setattr(fold_prologue, "_has_kernel", lambda transform, prologue: False)
    gate_up, down = Group(WIDTH, HIDDEN, HIDDEN), Group(HIDDEN, WIDTH)

    def mlp(x: Tensor) -> Tensor:
        gate, up = gate_up(x)
        row = F.silu(gate.float()).to(x.dtype) * up
        return down(row)[0]

    x = torch.randn(2, 3, WIDTH).bfloat16()
    gm = traced(mlp, x)
    casts = [n for n in gm.graph.nodes if "to" in n.name or "convert" in n.name]
    pairs = [n for n in casts if n.meta["val"].dtype == torch.float32 and n.args[0] in casts]
    assert len(pairs) == 1
    (to_float,) = pairs
    to_float.replace_all_uses_with(to_float.args[0].args[0])
    gm.graph.eliminate_dead_code()
    use_engine_ops(gm.graph)
    gm.recompile()
    counts = Counter(
        n.target.__name__.partition(".")[0]
        for n in gm.graph.nodes
        if n.op != "output" and n.op == "call_function"
    )
    assert counts["engine_gated_transform_quantize"] == folds
    assert counts["engine_linear"] == counts["engine_linears"] == (chip == "hopper")
    assert gm(x).isfinite().all()


def test_residual_add(x: Tensor, chip: str) -> None:
    """Folded where an ``engine_linear`` is an addend, whose epilogue does not have it."""
    first, second = Group(WIDTH, WIDTH), Group(WIDTH, WIDTH)

    def two_blocks(x: Tensor) -> Tensor:
        total = x + first(x)[0]
        return total + second(rms_norm(total))[0]

    _, counts = folded(two_blocks, x)
    adds = chip == "hopper" and x.dtype == torch.bfloat16
    assert counts["engine_add_norm_transform_quantize"] == adds
    assert counts["engine_norm_transform_quantize"] == 1 - adds
    assert counts["add"] >= 1


def test_sum_that_is_read_before_stays(x: Tensor, chip: str) -> None:
    first, second = Group(WIDTH, WIDTH), Group(WIDTH, WIDTH)

    def read_before(x: Tensor) -> Tensor:
        total = x + first(x)[0]
        early = total * 2
        return early + second(rms_norm(total))[0]

    _, counts = folded(read_before, x)
    assert counts["engine_add_norm_transform_quantize"] == 0
    assert counts["engine_norm_transform_quantize"] == 1
