"""Every reason for which the types of tokens are lost: a graph that provokes it, and the words that are reported.

The reasons are read out of the source of the passes, so that a new one without a graph here fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recording import Recorder
from torch import Tensor, nn

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.model_report import FOLLOW

PASSES = Path(__file__).parents[2] / "passes"
B = T = 4
H = 64
IMAGE, MASK = 7, 9
MASKED, MERGED = TokenTypes.mask_token(MASK), TokenTypes.auto()


def ids() -> Tensor:
    return torch.tensor([[1, 7, 7, 2], [7, 1, 8, 9], [9, 3, 4, 7], [1, 2, 8, 4]])


def reasons_in_the_source() -> set[str]:
    """What ``Lost`` is made with anywhere in the passes; ``{}`` where something is filled in."""
    found = set()
    for file in PASSES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Lost":
                found.add(_template(node.args[0]))
    return found


def _template(text: ast.expr) -> str:
    if isinstance(text, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in text.values)
        return "".join(map(str, parts))
    assert isinstance(text, ast.Constant), f"not a literal: {ast.unparse(text)}"
    return str(text.value)


class Tables(nn.Module):
    """An embedding, some Linears, and a function between the embedding and the last of them."""

    def __init__(self, body: Callable[..., Tensor], features: int = H) -> None:
        super().__init__()
        self.body = body
        self.embedding = nn.Embedding(10, H)
        self.vision, self.text = nn.Linear(H, H), nn.Linear(H, H)
        self.after = nn.Linear(features, H)


class OfTokens(Tables):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.after(self.body(self.embedding(input_ids)))


class OfIds(Tables):
    def forward(self, input_ids: Tensor, pictures: Tensor) -> Tensor:
        return self.after(self.body(self, self.embedding(input_ids), input_ids, pictures))


def reported(model: nn.Module, *inputs: Tensor, types: TokenTypes = MASKED) -> str:
    """What is said of the last Linear, as Dynamo traces the model."""
    recorder = Recorder(model.eval(), token_types=types, sink=None)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        recorder.compile(fullgraph=True)(*inputs)
    fact = recorder.facts["after"]
    assert fact.state == "refused"
    return fact.type_source


def of_tokens(body: Callable[[Tensor], Tensor], features: int = H) -> str:
    """The same where the graph has the operation as it is written, which Dynamo may word differently."""
    graph = torch.fx.symbolic_trace(OfTokens(body, features).eval())
    config = QuantConfig(token_types=MASKED, sink=None)
    row = freeact_fx.rewrite(graph, (ids(),), config).report["after"]
    assert (row.state, row.way_out) == ("refused", FOLLOW)
    return row.type_source


def of_ids(body: Callable[..., Tensor], types: TokenTypes = MASKED) -> str:
    return reported(OfIds(body), ids(), torch.randn(B, T, H), types=types)


def is_image(ids: Tensor) -> Tensor:
    return (ids == IMAGE)[..., None]


def assigned(index: Any) -> Callable[..., Tensor]:
    def body(m: Any, x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
        x = x.clone()
        x[index] = v[index]
        return x

    return body


def put_into_another(m: Any, x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    v[:, :2] = x[:, 2:]
    return v


def written_through_a_view(m: Any, x: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:3].copy_(v[:, :2])
    return x


def lookup_of_chosen_ids() -> str:
    class Chosen(Tables):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.after(self.embedding(input_ids[input_ids != 1]))

    return reported(Chosen(lambda: None), ids())


# What follows the operation where it is a mask that does not say which type is written.
MASKS: dict[str, Callable[[], str]] = {
    "eq(input_ids, 7): no one token type claims these ids; declare them in TokenTypes": lambda: (
        of_ids(lambda m, x, ids, v: x.masked_scatter(is_image(ids), v))
    ),
    "mask gt is a bool mask and no token type has merge=True": lambda: of_ids(
        lambda m, x, ids, v: x.masked_scatter(v[..., :1] > 0, v)
    ),
    "eq(input_ids, 7): written where the ids are others": lambda: of_ids(
        lambda m, x, ids, v: x.masked_scatter(~is_image(ids), v), MERGED
    ),
}
PROVOKED: dict[str, list[Callable[[], str]]] = {
    "two operands of {} have conflicting token types": [
        lambda: of_tokens(lambda x: x + x.transpose(0, 1)),
        lambda: of_tokens(lambda x: torch.stack([x, x.transpose(0, 1)], 1)),
    ],
    "two operands of {} have tokens along different dimensions": [
        lambda: of_tokens(lambda x: x[:, :1] + x[:1])
    ],
    "{} repeats tokens": [
        lambda: of_tokens(lambda x: x.repeat(1, 2, 1)),
        lambda: of_ids(lambda m, x, ids, v: v.repeat(1, 2, 1).copy_(x.repeat(1, 2, 1))),
    ],
    "{} mixes token dimensions": [
        lambda: of_tokens(lambda x: x[:, :3].reshape(6, 2, H)),
    ],
    "{} slices a dimension that holds several token axes": [
        lambda: of_tokens(lambda x: x.view(B * T, H)[3:])
    ],
    "{} indexes a dimension that holds several token axes": [
        lambda: of_tokens(lambda x: x.view(B * T, H)[3])
    ],
    "{} picks tokens by a tensor": [
        lambda: of_tokens(lambda x: x[:, torch.tensor([3, 1])]),
        lambda: of_tokens(lambda x: x[[3, 1]]),
    ],
    "{} puts tokens into a tensor without": [lambda: of_ids(put_into_another)],
    "{} replaces all tokens": [lambda: of_ids(assigned(slice(None)))],
    "{} writes tokens by position": [
        lambda: of_ids(assigned((slice(None), slice(1, 3)))),
        lambda: of_ids(assigned((slice(None), 2))),
    ],
    "{} replaces tokens": [lambda: of_ids(lambda m, x, ids, v: x.clone().copy_(v))],
    "{} has computed bounds": [lambda: of_tokens(lambda x: x.narrow(1, x.size(1) // 4, 2))],
    "{} cuts along tokens": [
        lambda: of_tokens(lambda x: x.chunk(2, 1)[1]),
        lambda: of_tokens(lambda x: x.unbind(1)[0]),
    ],
    "{} joins tokens to others whose types are unknown": [
        lambda: of_tokens(lambda x: torch.cat([torch.ones(B, 1, H), x], 1)),
        lambda: of_tokens(lambda x: torch.cat([torch.ones(B, 3, H), x[:, :1]], 1)),
    ],
    "{} joins tokens that were reshaped": [
        lambda: of_tokens(lambda x: torch.cat([x.view(B * T, H), x.view(B * T, H)]))
    ],
    "{} joins tokens of different layouts": [
        lambda: of_tokens(lambda x: torch.cat([x, x.transpose(0, 1)], 1))
    ],
    "{} reduces over all tokens": [lambda: of_tokens(lambda x: torch.ones(B, T, H) * x.sum())],
    "{} reduces over tokens": [lambda: of_tokens(lambda x: x.mean(1))],
    "{} contracts a token dimension": [
        lambda: of_tokens(lambda x: F.linear(x.transpose(1, 2), torch.ones(T, T)).transpose(1, 2)),
        lambda: of_tokens(lambda x: (x.transpose(1, 2) @ torch.ones(T, T)).transpose(1, 2)),
    ],
    "{} mixes tokens": [lambda: of_tokens(lambda x: torch.ones(T, T) @ x)],
    "{} normalises over tokens": [lambda: of_tokens(lambda x: F.layer_norm(x, (T, H)))],
    "{} pads tokens": [lambda: of_tokens(lambda x: F.pad(x, (0, 0, 1, -1)))],
    "no rule carries token types through {}": [lambda: of_tokens(lambda x: x.cumsum(1))],
    "{} ({}) puts tokens into a tensor without": [
        lambda: of_ids(
            lambda m, x, ids, v: torch.cat([v, v]).masked_scatter(
                torch.cat([is_image(ids), is_image(ids)]), x
            )
        )
    ],
    "{} ({}) writes tokens over tokens": [
        lambda: of_ids(lambda m, x, ids, v: x.masked_scatter(is_image(ids), 2 * x), MERGED)
    ],
    "{} ({}): {}": list(MASKS.values()),
    "{} ({}): its mask does not line up with the tokens": [
        lambda: of_ids(
            lambda m, x, ids, v: x.view(B, 2, 2, H).masked_scatter(
                is_image(ids).view(B, 2, 2, 1), v
            ),
            MERGED,
        )
    ],
    "where ({}): {}": [
        lambda: of_ids(lambda m, x, ids, v: torch.where(is_image(ids), m.vision(x), m.text(x)))
    ],
    "where ({}) replaces tokens under a mask that shows no type": [
        lambda: of_ids(lambda m, x, ids, v: torch.where((torch.arange(T) < 2)[None, :, None], v, x))
    ],
    "two arms of where ({}) have conflicting token types": [
        lambda: of_ids(
            lambda m, x, ids, v: torch.where(is_image(ids), m.vision(x), m.text(x.transpose(0, 1))),
            MERGED,
        )
    ],
    "tokens are written through a view of {}": [lambda: of_ids(written_through_a_view)],
    "how many tokens there are is not known before the graph runs": [lookup_of_chosen_ids],
}
CASES = [(template, body) for template, bodies in PROVOKED.items() for body in bodies]


def test_every_reason_of_the_passes_has_a_graph() -> None:
    assert set(PROVOKED) == reasons_in_the_source()


@pytest.mark.parametrize(("template", "source"), CASES, ids=[template for template, _ in CASES])
def test_the_reason_is_told(template: str, source: Callable[[], str]) -> None:
    filled = r".+" if template.endswith(": {}") else r"\w+(?: \(\w+\))?"
    told = source()
    assert re.fullmatch(re.escape(template).replace(r"\{\}", filled), told), told


@pytest.mark.parametrize("told", MASKS)
def test_what_is_wrong_with_a_mask_is_told(told: str) -> None:
    assert MASKS[told]() == f"masked_scatter (masked_scatter): {told}"


def test_features_that_hold_tokens() -> None:
    told = of_tokens(lambda x: x.transpose(1, 2).reshape(B * T, H))
    assert told == "its features hold a token dimension"
