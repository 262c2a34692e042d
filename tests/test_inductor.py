"""What Inductor makes of a rewritten graph: read off the code it emits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor import decomposition
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes, backend, compat, reference
from freeact_fx.codegen import lowering
from freeact_fx.options import Options


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.fixture
def after_a_stock_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The state of a process that compiled with plain Inductor and has not met our backend yet."""
    for name in ("transform_quantize", "transform_quantize_branch", "branch_product"):
        op = getattr(torch.ops.freeact, name).default
        monkeypatch.delitem(decomposition.decompositions, op, raising=False)
    lowering.register.cache_clear()
    decomposition.fast_random_decomps.cache_clear()
    decomposition.select_decomp_table()  # as the first compilation of a process does
    yield
    decomposition.fast_random_decomps.cache_clear()


@pytest.mark.inductor
@pytest.mark.usefixtures("after_a_stock_compilation")
@pytest.mark.parametrize("plan", ["shift", "branch"])
def test_transforms_are_fused_whatever_was_compiled_before(plan: str) -> None:
    """Inductor keeps its decompositions from the first compilation of a process on; ours must get in all the same."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        model = GatedMLP().eval()
        want = model(x)
        one_type = TokenTypes.single()  # no ids in this graph to tell several apart
        config = QuantConfig(plan=plan, branch_rank=8, token_types=one_type)
        freeact_fx.convert(model, config)
        got, (code,) = run_and_get_code(torch.compile(model, backend="freeact"), x)
    calls = Counter(re.findall(r"= (torch\.ops\.freeact\.\w+|extern_kernels\.\w+)", code))
    assert "transform_quantize" not in "".join(calls)
    assert "branch_product" not in "".join(calls)
    assert calls["torch.ops.freeact.int_mm"] == 3
    # Two matrix products per transform (gate and up share one) are all that is not fused, besides the branch's.
    assert len(re.findall(r"extern_kernels\.bmm\(", code)) == 2
    assert torch.linalg.norm(got - want) < 0.2 * torch.linalg.norm(want)


@pytest.mark.inductor
@pytest.mark.parametrize("asked", [None, "variable", "option"])
def test_sizes_are_checked_where_that_is_asked_for(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at each call of all tensors that guards have seen, unless the user wants it."""
    monkeypatch.delenv("TORCHINDUCTOR_SIZE_ASSERTS", raising=False)
    if asked == "variable":
        monkeypatch.setenv("TORCHINDUCTOR_SIZE_ASSERTS", "1")
    options: dict[str, Any] = {"inductor": {"size_asserts": True}} if asked == "option" else {}
    model = nn.Linear(64, 32).eval()
    freeact_fx.convert(model, QuantConfig(token_types=TokenTypes.single()))
    compiled = torch.compile(model, backend="freeact", options=options)
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, torch.randn(4, 64))
    calls = re.findall(r"^\s*assert_size_stride\w*\(", code, re.MULTILINE)
    assert bool(calls) == (asked is not None)


@pytest.mark.parametrize("native", [True, False])
def test_branch_product_in_bf16_where_that_is_native(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "_has_bf16_instructions", lambda: native)
    weight = torch.randint(-127, 128, (12, 40)).to(torch.int8)
    for operands in (
        (torch.randn(2, 7, 12), weight, torch.rand(12)),
        (torch.randn(2, 7, 12), torch.randn(12, 40), torch.ones(12)),
    ):
        got, want = lowering._branch_product(*operands), reference.branch_product(*operands)
        assert got.dtype == torch.float32
        if native and operands[1].dtype == torch.int8:
            error = torch.linalg.norm(got - want) / torch.linalg.norm(want)
            assert 0 < error < 2**-8
        else:
            assert torch.equal(got, want)


def test_counters_are_made_on_the_devices_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several GPUs, two of them Hoppers, one of which the graph is on; before Inductor could capture anything."""
    stream_order = pytest.importorskip("freeact_fx.codegen.kernels.stream_order")
    told: list[Any] = []
    monkeypatch.setattr(stream_order, "make_counters", told.append)
    monkeypatch.setattr(lowering, "has_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(lowering, "is_hopper", lambda device: device.index in (1, 2))
    monkeypatch.setattr(compat, "compile_with_inductor", lambda *args: told.append("compiled"))
    gpus = [torch.device("cuda", index) for index in range(3)]
    inputs = [SimpleNamespace(device=device) for device in (*gpus[:2], gpus[1])]
    monkeypatch.setattr(backend, "Tensor", SimpleNamespace)
    backend._compile(
        torch.fx.symbolic_trace(nn.Identity()), [3, *inputs], Options(QuantConfig()), ""
    )
    assert told == [gpus[1], "compiled"]


class UsersPass(CustomGraphPass):
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __call__(self, graph: torch.fx.Graph) -> None:
        self._calls.append("theirs")

    def uuid(self) -> str:
        return "theirs"


@pytest.mark.inductor
def test_a_users_own_pass_and_ours_both_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(compat, "use_engine_ops", lambda graph, tune: calls.append("ours"))
    model = GatedMLP().eval()
    with (
        torch.no_grad(),
        inductor_config.patch(
            {"post_grad_custom_pre_pass": UsersPass(calls), "fx_graph_cache": False}
        ),
    ):
        torch.compile(model, backend="freeact")(torch.randn(2, 8, 64))
    assert calls == ["theirs", "ours"]
