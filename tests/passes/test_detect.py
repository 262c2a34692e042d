"""Which nodes are Linears, what they are called, and why some are left alone. Nothing is edited."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recording import Recorder
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.passes.detect import detect_linears
from freeact_fx.passes.node_facts import LinearFact, facts_of, linears_of

H, N = 64, 48
SKIPPED = "listed in QuantConfig.skip ['lm_head']"


class Forms(nn.Module):
    """Every form of a Linear that is recognised, and products that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(H, N)
        self.without_bias = nn.Linear(H, N, bias=False)
        self.conv1d = Conv1D(N, H)
        self.addmm = nn.Module()
        self.addmm.weight = nn.Parameter(torch.randn(H, N))
        self.turned = nn.Module()
        self.turned.weight = nn.Parameter(torch.randn(N, H))
        self.three = nn.Parameter(torch.randn(2, H, N))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            self.plain(x),
            self.without_bias(x),
            self.conv1d(x),
            x @ self.addmm.weight,
            x @ self.turned.weight.t(),
            torch.mm(x, self.turned.weight.transpose(0, 1)),
            torch.bmm(x.expand(2, -1, -1), self.three),
            x @ x.t(),
        )


def facts(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, LinearFact]:
    recorder = Recorder(model.eval(), token_types=TokenTypes.single(), **options)
    with torch.no_grad():
        recorder.compile(fullgraph=True)(*inputs)
    found = recorder.graphs[0].linears
    return {f.name: f for f in found}


def test_every_form_of_a_linear_is_found() -> None:
    found = facts(Forms(), torch.randn(5, H))
    forms = {
        name: (f.num_outputs, f.num_features, f.bias is not None, f.transposed, f.refusal)
        for name, f in found.items()
    }
    assert forms == {
        "plain": (N, H, True, False, None),
        "without_bias": (N, H, False, False, None),
        "conv1d": (N, H, True, True, None),
        "addmm": (N, H, False, True, None),
        "turned": (N, H, False, False, None),
    }


@pytest.mark.parametrize("quantize", [True, False])
def test_every_form_computes_what_it_did(quantize: bool) -> None:
    torch.manual_seed(0)
    model, x = Forms().eval(), torch.randn(5, H)
    run = Recorder(model, token_types=TokenTypes.single(), quantize=quantize)
    with torch.no_grad():
        got, want = run.compile()(x), model(x)
    assert run.num_products == 6  # one weight is used twice
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < (0.3 if quantize else 1e-5)


class Odd(nn.Module):
    """Linears that cannot be, or should not be, quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N, H)
        self.fine = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, N)
        self.tied = nn.Linear(H, N, bias=False)
        self.tied.weight = self.embedding.weight
        self.narrow = nn.Linear(16, H)
        self.odd = nn.Linear(33, H)
        self.prime = nn.Linear(2 * 257, H)
        self.in_fp64 = nn.Linear(H, H, dtype=torch.float64)
        self.adapted = nn.Linear(H, H)
        self.low, self.high = nn.Parameter(torch.randn(H, 4)), nn.Parameter(torch.randn(4, H))
        self.biased = nn.Linear(H, H)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.fine(self.embedding(ids))
        return (
            self.lm_head(x),
            self.tied(x),
            self.narrow(x[..., :16]),
            self.odd(x[..., :33]),
            self.prime(F.pad(x, (0, 2 * 257 - H))),
            self.in_fp64(x.double()),
            F.linear(x, self.adapted.weight + self.low @ self.high),
            F.linear(x, self.biased.weight, 2 * self.biased.bias),
        )


REASONS = {
    "fine": None,
    "lm_head": SKIPPED,
    "tied": "its weight is tied to an embedding",
    "narrow": "in_features must be at least 32 for a transform to help, got 16",
    "odd": "in_features must be even to pack two 4-bit codes per byte, got 33",
    "prime": "in_features needs a Kronecker shape D1 x D2 with both factors in 2..256, and 514 has none",
    "in_fp64": "weights must be float32, bfloat16 or float16, got torch.float64",
    "biased": "its bias is computed in the graph (mul), not a parameter",
}


def test_each_linear_that_is_left_alone_has_its_reason() -> None:
    found = facts(Odd(), torch.arange(N)[None])
    (name,) = set(found) - set(REASONS)
    computed = found.pop(name)
    assert computed.refusal == "its weight is computed in the graph (add), not a parameter"
    assert {name: f.refusal for name, f in found.items()} == REASONS


def test_what_is_left_alone_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model, ids = Odd().eval(), torch.arange(N)[None]
    recorder = Recorder(model, token_types=TokenTypes.single(), skip=("*",))
    with torch.no_grad():
        got, want = recorder.compile(fullgraph=True)(ids), model(ids)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert recorder.num_transforms == recorder.num_products == 0


@pytest.mark.parametrize(
    ("options", "quantised"),
    [
        ({}, {"fine", "adapted", "biased"}),
        ({"skip": ()}, {"fine", "adapted", "biased", "lm_head"}),
        ({"include": ("lm_head",)}, {"fine", "adapted", "biased", "lm_head"}),
        ({"include": ("tied",)}, {"fine", "adapted", "biased", "tied"}),
        ({"skip": ("fine", "lm_head")}, {"adapted", "biased"}),
        ({"skip": ("*d",)}, {"fine"}),
        ({"skip": ("*",), "include": ("fine",)}, {"fine"}),
    ],
)
def test_skip_and_include(options: dict[str, Any], quantised: set[str]) -> None:
    class Simple(Odd):
        def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
            x = self.embedding(ids)
            return tuple(
                layer(x)
                for layer in (self.fine, self.adapted, self.biased, self.lm_head, self.tied)
            )

    found = facts(Simple(), torch.arange(N)[None], **options)
    assert {name for name, f in found.items() if f.refusal is None} == quantised


def test_detect_edits_nothing_and_can_be_repeated() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(H, H), nn.Linear(H, H)).eval())
    gm = freeact_fx.rewrite.__globals__["functional_form"](gm, (torch.randn(3, H),))
    before = str(gm.graph)
    names = []
    for _ in range(2):
        detect_linears(gm, inputs={}, config=QuantConfig())
        names.append([f.name for _, f in linears_of(gm)])
        assert [f.name for f in facts_of(gm)] == names[0]
    assert names == [["0", "1"]] * 2
    assert str(gm.graph) == before


def test_a_converted_linear_is_found_by_its_operation() -> None:
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H)).eval()
    freeact_fx.convert(model, QuantConfig(token_types=TokenTypes.single()))
    found = facts(model, torch.randn(3, H))
    assert set(found) == {"0", "1"}
    assert all(f.converted and f.refusal is None for f in found.values())


def test_names_across_a_graph_break_are_whole() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(H, H)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.inner(x)

    model = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())}).eval()
    model.forward = model["blocks"].forward
    recorder = Recorder(model, token_types=TokenTypes.single(), skip=("blocks.1.*",))
    wrapped = torch.no_grad()(torch.compile(model, backend=recorder))
    x = torch.randn(3, H)
    with pytest.warns(
        UserWarning, match="blocks.1.inner shares a compiled graph with blocks.0.inner"
    ):
        wrapped(x)
    assert [f.name for g in recorder.graphs for f in g.linears] == ["blocks.0.inner"]
    assert [s.name for s in recorder.seen] == ["blocks.0.inner"]
