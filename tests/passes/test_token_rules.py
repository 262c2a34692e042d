"""Every propagation rule on a graph of its own: the types that reach a Linear behind the operation are the right ones.

The number of sequences, of tokens and of windows are all equal, so that a rule that mixes dimensions up still gives a
tensor of the right shape. Each rule is then replaced by a plausible wrong one, and the same check has to fail.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recording import Seen, run_rewritten
from torch import Tensor, nn

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.passes import annotate, token_rules
from freeact_fx.passes.node_facts import Lost, TokenFact, TypeExpr
from freeact_fx.passes.token_rules import RULES

aten = torch.ops.aten
MASK = 9
B = T = 4
H = 64
CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK), sink=None)
# The untyped row, which a refused Linear uses.
UNTYPED = CONFIG.num_types


def ids() -> Tensor:
    """No two rows or columns hold the same types."""
    types = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0]])
    return torch.where(types == 1, MASK, torch.arange(B * T).view(B, T) % 8)


class Program(nn.Module):
    """An embedding, the operation, a Linear."""

    def __init__(self, body: Callable[[Tensor], Any], features: int) -> None:
        super().__init__()
        self.body = body
        self.embedding = nn.Embedding(10, H)
        self.linear = nn.Linear(features, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.body(self.embedding(input_ids)))


@dataclass(frozen=True)
class Case:
    """An operation and what its Linear must see.

    body      embeddings [B, T, H] to the Linear's input
    expected  types [B, T] to those of the Linear's input; or "refused" or "default"
    features  the Linear's K
    """

    body: Callable[[Tensor], Any]
    expected: Callable[[Tensor], Tensor] | str = lambda types: types
    features: int = H


def problem_of(case: Case) -> str | None:
    """What is wrong with the types that the Linear of a case runs with, or None."""
    program = Program(case.body, case.features).eval().requires_grad_(False)
    graph = torch.fx.symbolic_trace(program)
    rewritten = freeact_fx.rewrite(graph, (ids(),), CONFIG)
    _, seen = run_rewritten(rewritten, ids())
    last = next(s for s in seen if s.name == "linear")
    return _compare(last, rewritten.report["linear"].state, case.expected)


def _compare(seen: Seen, state: str, expected: Callable[[Tensor], Tensor] | str) -> str | None:
    if isinstance(expected, str):
        row = UNTYPED if expected == "refused" else 0
        right = state == expected and seen.types is None and seen.default_type == row
        return None if right else f"expected {expected}, got {state} with row {seen.default_type}"
    want = expected((ids() == MASK).int())
    if state != "typed" or seen.types is None:
        return f"expected types, got {state}"
    if seen.types.shape != want.shape or not torch.equal(seen.types, want):
        return f"got {seen.types.tolist()}, expected {want.tolist()}"
    return None


def is_noticed(case: Case) -> bool:
    """True if the check fails, or if a type tensor of an impossible shape makes the graph fail."""
    try:
        return problem_of(case) is not None
    except (RuntimeError, ValueError):
        return True


def drop(node: Any, facts: Any) -> None:
    """The simplest wrong rule: no tokens come out."""


# ------------------------------------------------------------------------------------- pointwise and casts

ONE = torch.ones(H)
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + ONE,
    "sub": lambda x: x - 1,
    "rsub": lambda x: torch.rsub(x, 1),
    "mul": lambda x: 2 * x,
    "div": lambda x: torch.div(x, 2),
    "truediv": lambda x: operator.truediv(x, 2),
    "floordiv": lambda x: x // 1,
    "true_divide": lambda x: torch.true_divide(x, 2),
    "pow": lambda x: x**2,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": lambda x: torch.log(x.abs() + 1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(-1),
    "clamp_max": lambda x: x.clamp_max(1),
    "clip": lambda x: x.clip(-1, 1),
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "round": torch.round,
    "floor": torch.floor,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 1),
    "square": torch.square,
    "where": lambda x: torch.where(ONE > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(ONE == 0, 0.0),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, False),
    "positive": torch.positive,
    "maximum": lambda x: torch.maximum(x, ONE),
    "minimum": lambda x: torch.minimum(x, ONE),
    "addcmul": lambda x: torch.addcmul(x, ONE, ONE),
    "lerp": lambda x: torch.lerp(x, ONE, 0.5),
    "nan_to_num": torch.nan_to_num,
    "logaddexp": lambda x: torch.logaddexp(x, ONE),
    "sign": torch.sign,
    "remainder": lambda x: torch.remainder(x, 2),
    "fmod": lambda x: torch.fmod(x, 2),
    "mod": lambda x: x % 2,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "softsign": F.softsign,
    "threshold": lambda x: aten.threshold(x, 0, 0),
    "_threshold": lambda x: F.threshold(x, 0, 0),
    "prelu": lambda x: F.prelu(x, torch.ones(1)),
    "pos": lambda x: +x,
    "_softmax": lambda x: aten._softmax(x, -1, False),
    "_log_softmax": lambda x: aten._log_softmax(x, -1, False),
}
CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(ONE),
    "contiguous": lambda x: x.contiguous(),
    "clone": torch.clone,
    "detach": lambda x: x.detach(),
    "alias": lambda x: aten.alias(x),
    "_to_copy": lambda x: aten._to_copy(x),
    "convert_element_type": lambda x: torch.ops.prims.convert_element_type(x, torch.float32),
    "lift_fresh": lambda x: aten.lift_fresh(x),
    "cpu": lambda x: x.cpu(),
}
NO_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "empty_like": lambda x: torch.empty_like(x),
    "full_like": lambda x: torch.full_like(x, 2.0),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "new_zeros": lambda x: x.new_zeros((B, T, H)),
    "new_ones": lambda x: x.new_ones((B, T, H)),
    "new_empty": lambda x: x.new_empty((B, T, H)),
    "new_full": lambda x: x.new_full((B, T, H), 2.0),
}


# ------------------------------------------------------------------------------------- everything else


@torch.fx.wrap
def flex_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stands for the higher-order operation of that name: its rule goes by the name."""
    return F.scaled_dot_product_attention(query, key, value)


def _attention(x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Queries and keys whose types differ: the queries are the tokens with rows and columns exchanged."""
    return attend(x.transpose(0, 1), x, x)


def _by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def _flat(types: Tensor) -> Tensor:
    return types.reshape(-1)


def _same(types: Tensor) -> Tensor:
    return types


def _swapped(types: Tensor) -> Tensor:
    return types.t()


WEIGHT = torch.ones(H, H)
STRUCTURAL: dict[str, list[Case]] = {
    "view": [
        Case(lambda x: x.view(B * T, H), _flat),
        Case(lambda x: x.view(B, 2, 2, H), lambda t: t.view(B, 2, 2)),
        Case(lambda x: x.view(2, 2, T, H), lambda t: t.view(2, 2, T)),
        Case(lambda x: x.view(B, T, 2, 32), lambda t: t[..., None].expand(B, T, 2), 32),
        Case(lambda x: x.view(B, T * 2, 32), lambda t: t.repeat_interleave(2, 1), 32),
        Case(lambda x: x.view(2, 2 * T, H), lambda t: t.view(2, 2 * T)),
        Case(lambda x: x.transpose(0, 1).contiguous().view(B * T, H), lambda t: t.t().reshape(-1)),
        # The features of a Linear hold tokens.
        Case(lambda x: x.view(B, T * H), "refused", T * H),
    ],
    "reshape": [Case(lambda x: x.transpose(0, 1).reshape(-1, H), lambda t: t.t().reshape(-1))],
    "flatten": [Case(lambda x: x.flatten(0, 1), _flat)],
    "unflatten": [Case(lambda x: x.unflatten(1, (2, 2)), lambda t: t.view(B, 2, 2))],
    "squeeze": [Case(lambda x: x[:, None].squeeze(1), _same)],
    "unsqueeze": [Case(lambda x: x.unsqueeze(1), lambda t: t[:, None])],
    "_unsafe_view": [Case(lambda x: aten._unsafe_view(x, [B * T, H]), _flat)],
    "ravel": [Case(lambda x: x.ravel().view(B, T, H), _same)],
    "transpose": [
        Case(lambda x: x.transpose(0, 1), _swapped),
        Case(lambda x: x.transpose(1, 2).transpose(-1, -2), _same),
    ],
    "permute": [
        Case(
            lambda x: x.view(B, T, 2, 32).permute(2, 1, 0, 3),
            lambda t: t.t().expand(2, T, B),
            32,
        ),
        Case(lambda x: x.permute((1, 0, 2)), _swapped),
    ],
    "swapaxes": [Case(lambda x: x.swapaxes(0, 1), _swapped)],
    "swapdims": [Case(lambda x: x.swapdims(0, 1), _swapped)],
    "t": [Case(lambda x: x.view(B * T, H).t().transpose(0, 1), _flat)],
    "getattr": [
        Case(lambda x: x.transpose(1, 2).mT, _same),
        Case(lambda x: x.view(B * T, H).mT.T, _flat),
        Case(lambda x: x.data, _same),
    ],
    "expand": [
        Case(lambda x: x[:, None].expand(B, 3, T, H), lambda t: t[:, None].expand(B, 3, T)),
        Case(lambda x: x[:1].expand(B, T, H), lambda t: t[:1].expand(B, T)),
    ],
    "expand_as": [
        Case(
            lambda x: x[:, :, None].expand_as(torch.ones(B, T, 2, H)),
            lambda t: t[..., None].expand(B, T, 2),
        )
    ],
    "broadcast_to": [
        Case(lambda x: x.broadcast_to(2, B, T, H), lambda t: t.expand(2, B, T)),
        Case(lambda x: x[:, 1:2].broadcast_to(B, T, H), lambda t: t[:, 1:2].expand(B, T)),
    ],
    "repeat": [
        Case(lambda x: x[:, None].repeat(1, 2, 1, 1), lambda t: t[:, None].expand(B, 2, T)),
        Case(lambda x: x.repeat(1, 2, 1), "refused"),
    ],
    "slice": [
        Case(lambda x: aten.slice(aten.slice(x, 1, 1), 0, 0, 3), lambda t: t[:3, 1:]),
        Case(lambda x: aten.slice(x, 0, 1, 4, 2), lambda t: t[1:4:2]),
    ],
    "select": [
        Case(lambda x: x.select(1, 2), lambda t: t[:, 2]),
        Case(lambda x: aten.select(x, 0, -1), lambda t: t[-1]),
    ],
    "narrow": [Case(lambda x: x.narrow(1, 1, 2).narrow(0, 0, 2), lambda t: t[:2, 1:3])],
    "getitem": [
        Case(lambda x: x[1:3, ::2, :32], lambda t: t[1:3, ::2], 32),
        Case(lambda x: x[:, 1:], lambda t: t[:, 1:]),
        Case(lambda x: x[:, -1], lambda t: t[:, -1]),
        Case(lambda x: x[:, -1:], lambda t: t[:, -1:]),
        Case(lambda x: x[2], lambda t: t[2]),
        Case(lambda x: x[..., None, :, :], lambda t: t[:, None]),
        Case(lambda x: x[..., 32:], _same, 32),
        Case(lambda x: x[:, 1:][:, 1:], lambda t: t[:, 2:]),
        Case(lambda x: x[[3, 1]], "refused"),
        Case(lambda x: x[:, torch.tensor([3, 1])], "refused"),
        Case(lambda x: x.view(B * T, H)[3:], "refused"),
    ],
    "chunk": [
        Case(lambda x: x.chunk(2, -1)[1], _same, 32),
        Case(lambda x: x.chunk(2, 1)[1], "refused"),
    ],
    "split": [Case(lambda x: torch.split(x, [32, 32], 2)[0], _same, 32)],
    "unbind": [
        Case(lambda x: x.view(B, T, 2, 32).unbind(2)[0], _same, 32),
        Case(lambda x: x.unbind(1)[0], "refused"),
    ],
    "tensor_split": [Case(lambda x: torch.tensor_split(x, 2, dim=-1)[1], _same, 32)],
    "split_with_sizes": [Case(lambda x: aten.split_with_sizes(x, [32, 32], -1)[0], _same, 32)],
    "cat": [
        Case(lambda x: torch.cat([x, 2 * x], -1), _same, 2 * H),
        Case(lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), lambda t: t.roll(1, 1)),
        Case(lambda x: torch.cat([x[1:], x[:1]]), lambda t: t.roll(-1, 0)),
        Case(lambda x: torch.cat([torch.ones(B, 1, H), x], 1), "refused"),
        Case(lambda x: torch.cat([torch.ones(B, 0, H), x], 1), _same),
        Case(lambda x: torch.cat([x.transpose(0, 1), x], -1), "refused", 2 * H),
    ],
    "concat": [Case(lambda x: torch.concat([x[:, 1:], x[:, :1]], 1), lambda t: t.roll(-1, 1))],
    "concatenate": [Case(lambda x: torch.concatenate([x, x], axis=-1), _same, 2 * H)],
    "stack": [
        Case(lambda x: torch.stack([x, -x], 1), lambda t: t[:, None].expand(B, 2, T)),
        Case(lambda x: torch.stack([x, x.transpose(0, 1)], 1), "refused"),
    ],
    "mean": [
        Case(lambda x: x.view(B, T, 2, 32).mean(2), _same, 32),
        Case(lambda x: x * x.pow(2).mean(-1, keepdim=True), _same),
        Case(lambda x: x.mean(1), "refused"),
    ],
    "sum": [
        Case(lambda x: x.view(B, T, 2, 32).sum([2]), _same, 32),
        Case(lambda x: x.view(B, 2, 2, H).sum(2), "refused"),
    ],
    "amax": [Case(lambda x: x.view(B, T, 2, 32).amax(-2), _same, 32)],
    "amin": [Case(lambda x: x.view(B, T, 2, 32).amin(-2), _same, 32)],
    "max": [
        Case(lambda x: x.view(B, T, 2, 32).max(2)[0], _same, 32),
        Case(lambda x: torch.max(x, ONE), _same),
    ],
    "min": [Case(lambda x: x.view(B, T, 2, 32).min(2)[0], _same, 32)],
    "var": [Case(lambda x: x.view(B, T, 2, 32).var(2), _same, 32)],
    "std": [Case(lambda x: x.view(B, T, 2, 32).std(dim=2), _same, 32)],
    "norm": [Case(lambda x: x.view(B, 1, T, H).transpose(1, 2).norm(1, 2), _same)],
    "linalg_vector_norm": [
        Case(lambda x: torch.linalg.vector_norm(x.view(B, T, 2, 32), 1, 2), _same, 32),
        Case(lambda x: aten.linalg_vector_norm(x.view(B, T, 2, 32), 1, [2]), _same, 32),
    ],
    "logsumexp": [Case(lambda x: x.view(B, T, 2, 32).logsumexp(2), _same, 32)],
    "linear": [
        Case(lambda x: F.linear(x, WEIGHT), _same),
        # Mixes tokens: a Linear over them.
        Case(lambda x: F.linear(x.transpose(1, 2), torch.ones(T, T)).transpose(1, 2), "refused"),
    ],
    "addmm": [Case(lambda x: torch.addmm(ONE, x.flatten(0, 1), WEIGHT), _flat)],
    "matmul": [
        Case(lambda x: x @ WEIGHT, _same),
        Case(lambda x: _attention(x, _by_hand), _swapped),
        Case(lambda x: torch.ones(T, T) @ x, "refused"),
        Case(lambda x: (WEIGHT @ x.transpose(1, 2)).transpose(1, 2), _same),
    ],
    "bmm": [Case(lambda x: torch.bmm(x, WEIGHT.expand(B, H, H)), _same)],
    "mm": [Case(lambda x: torch.mm(x.flatten(0, 1), WEIGHT), _flat)],
    "scaled_dot_product_attention": [
        Case(lambda x: _attention(x, F.scaled_dot_product_attention), _swapped)
    ],
    "flex_attention": [Case(lambda x: _attention(x, flex_attention), _swapped)],
    "multi_head_attention_forward": [
        Case(
            lambda x: F.multi_head_attention_forward(
                *(x.transpose(0, 1), x, x, H, 2, torch.ones(3 * H, H), torch.ones(3 * H)),
                *(None, None, False, 0.0, WEIGHT, ONE),
                training=False,
            )[0],
            _swapped,
        )
    ],
    "layer_norm": [
        Case(lambda x: F.layer_norm(x, (H,)), _same),
        Case(lambda x: F.layer_norm(x, (T, H)), "refused"),
    ],
    "rms_norm": [Case(lambda x: F.rms_norm(x, (H,)), _same)],
    "native_layer_norm": [Case(lambda x: aten.native_layer_norm(x, [H], ONE, ONE, 1e-5)[0], _same)],
    "_fused_rms_norm": [Case(lambda x: aten._fused_rms_norm(x, [H], ONE, 1e-5)[0], _same)],
    "pad": [
        Case(lambda x: F.pad(x, (0, 32)), _same, 96),
        Case(lambda x: F.pad(x, (0, 0, 1, -1)), "refused"),
    ],
    "einsum": [
        Case(lambda x: torch.einsum("bth,hk->tbk", x, WEIGHT), _swapped),
        Case(lambda x: torch.einsum("bqk,bkh->bqh", x @ x.transpose(1, 2), x), _same),
        Case(lambda x: torch.einsum("bth,ts->bsh", x, torch.ones(T, T)), "refused"),
    ],
    "copy": [Case(lambda x: torch.ones(B, T, H).copy_(x), _same)],
}
NO_RULE = [
    Case(lambda x: x.cumsum(1), "refused"),
    Case(lambda x: x.flip(1), "refused"),
    Case(lambda x: torch.roll(x, 1, 1), "refused"),
    Case(lambda x: x.index_select(1, torch.tensor([1, 0, 2, 3])), "refused"),
    Case(
        lambda x: F.conv1d(x.transpose(1, 2), torch.ones(H, H, 3), padding=1).transpose(1, 2),
        "refused",
    ),
]

CASES: list[tuple[str, Case]] = [
    *((name, Case(body)) for table in (POINTWISE, CASTS) for name, body in table.items()),
    *((name, Case(body, "default")) for name, body in NO_TOKENS.items()),
    *((name, case) for name, cases in STRUCTURAL.items() for case in cases),
    ("add", Case(lambda x: x[:, :1] + x)),
    ("add", Case(lambda x: x + x.transpose(0, 1), "refused")),
    ("to", Case(lambda x: x.to(torch.ones(1, dtype=torch.float64)))),
    *(("no rule", case) for case in NO_RULE),
]


def _label(argument: Any) -> str:
    return argument if isinstance(argument, str) else ""


@pytest.mark.parametrize(("name", "case"), CASES, ids=_label)
def test_types_behind_the_operation(name: str, case: Case) -> None:
    assert problem_of(case) is None


def test_every_rule_has_a_case() -> None:
    # cuda is cpu's twin and needs a GPU.
    assert set(RULES) - {"cuda"} <= {name for name, _ in CASES}


# ------------------------------------------------------------------------------------- planted faults


def scrambled(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule with two token dimensions of one size exchanged, or the order of axes in one."""

    def scramble(fact: Any) -> Any:
        if isinstance(fact, list):
            return [scramble(f) for f in fact]
        if not isinstance(fact, TokenFact):
            return fact
        layout = [tuple(reversed(axes)) for axes in fact.layout]
        sizes = [math.prod(a.size for a in axes) if axes else d for d, axes in enumerate(layout)]
        pairs = [(a, b) for b in range(len(sizes)) for a in range(b) if sizes[a] == sizes[b] > 1]
        for a, b in pairs[-1:]:
            layout[a], layout[b] = layout[b], layout[a]
        return TokenFact(fact.expr, tuple(layout))

    return lambda node, facts: scramble(rule(node, facts))


TYPED = [
    (name, next(case for n, case in CASES if n == name and not isinstance(case.expected, str)))
    for name in dict.fromkeys(name for name, case in CASES if not isinstance(case.expected, str))
]


@pytest.mark.parametrize(("name", "case"), TYPED, ids=_label)
def test_a_rule_that_drops_the_types_is_noticed(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, name, drop)
    assert problem_of(case) is not None


# One row or one token is left: there is nothing to exchange.
@pytest.mark.parametrize(
    ("name", "case"), [t for t in TYPED if t[0] not in ("select", "t")], ids=_label
)
def test_a_rule_that_mixes_dimensions_up_is_noticed(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, name, scrambled(RULES[name]))
    assert problem_of(case) is not None


def first_operand(node: Any, facts: Any) -> Any:
    return facts(node.all_input_nodes[0])


def second_operand(node: Any, facts: Any) -> Any:
    return facts(node.all_input_nodes[1])


def from_the_start(node: Any, facts: Any) -> Any:
    """Right number of tokens, wrong place."""
    fact = token_rules.getitem(node, facts)
    _, position, _, stop, step = fact.expr.args
    start = 0 if fact.expr.args[2] else 1
    expr = TypeExpr("slice", (fact.expr.args[0], position, start, stop and start - 1, step), ())
    expr = TypeExpr("slice", (expr.args[0], position, 0, 3, 1), fact.expr.axes)
    return TokenFact(expr, fact.layout)


def reversed_parts(node: Any, facts: Any) -> Any:
    fact = token_rules.concatenate(node, facts)
    position, *parts = fact.expr.args
    expr = TypeExpr("cat", (position, *reversed(parts)), fact.expr.axes)
    return TokenFact(expr, fact.layout)


def same_for_all_pieces(node: Any, facts: Any) -> Any:
    return [facts(node.args[0])] * 2


def on_the_other_side(node: Any, facts: Any) -> Any:
    """Broadcasting aligned left instead of right."""
    fact = facts(node.args[0])
    return TokenFact(fact.expr, (*fact.layout, ()))


FAULTS: list[tuple[str, Callable[..., Any], Case]] = [
    ("add", first_operand, Case(lambda x: x[:, :1] + x)),
    ("add", first_operand, Case(lambda x: x + x.transpose(0, 1), "refused")),
    ("to", second_operand, Case(lambda x: x.to(ONE))),
    ("zeros_like", first_operand, Case(torch.zeros_like, "default")),
    ("transpose", first_operand, STRUCTURAL["transpose"][0]),
    (
        "expand",
        on_the_other_side,
        Case(lambda x: x.expand(B, B, T, H), lambda t: t.expand(B, B, T)),
    ),
    ("getitem", from_the_start, Case(lambda x: x[:, 1:], lambda t: t[:, 1:])),
    ("cat", reversed_parts, STRUCTURAL["cat"][1]),
    ("cat", first_operand, STRUCTURAL["cat"][5]),
    ("stack", first_operand, STRUCTURAL["stack"][1]),
    ("chunk", same_for_all_pieces, STRUCTURAL["chunk"][1]),
    ("mean", token_rules.cast, STRUCTURAL["mean"][2]),
    ("linear", token_rules.cast, STRUCTURAL["linear"][1]),
    ("matmul", second_operand, STRUCTURAL["matmul"][1]),
    ("scaled_dot_product_attention", second_operand, STRUCTURAL["scaled_dot_product_attention"][0]),
    ("layer_norm", token_rules.cast, STRUCTURAL["layer_norm"][1]),
    ("pad", token_rules.cast, STRUCTURAL["pad"][1]),
    ("einsum", second_operand, STRUCTURAL["einsum"][0]),
    ("copy", token_rules.cast, STRUCTURAL["copy"][0]),
]


@pytest.mark.parametrize(("name", "fault", "case"), FAULTS, ids=_label)
def test_a_planted_fault_is_noticed(
    name: str, fault: Callable[..., Any], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem_of(case) is None
    monkeypatch.setitem(RULES, name, fault)
    assert is_noticed(case)


@pytest.mark.parametrize("case", NO_RULE)
def test_guessing_where_there_is_no_rule_is_noticed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotate, "pointwise_lost", token_rules.cast)
    assert problem_of(case) is not None


def test_a_lost_type_names_the_operation() -> None:
    program = Program(lambda x: x.cumsum(1), H).eval()
    rewritten = freeact_fx.rewrite(torch.fx.symbolic_trace(program), (ids(),), CONFIG)
    reason = "no rule carries token types through cumsum (cumsum)"
    assert rewritten.report["linear"].type_source == reason
    assert isinstance(Lost(reason).reason, str)
