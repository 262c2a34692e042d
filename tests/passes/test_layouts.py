"""Random chains of operations that move tokens about: their types move with them, or are given up; never wrong.

The embedding of each token *is* its type, so that the value of an activation says what its type tensor must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from recording import run_rewritten
from torch import Tensor, nn

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.passes.layouts import broadcast_layout, layout_of_axes, reshape_layout
from freeact_fx.passes.node_facts import Axis, TypeExpr

MASK, H = 1, 64
CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK), sink=None)


@dataclass(frozen=True)
class Step:
    """One operation, with the arguments that were drawn for it."""

    name: str
    apply: Callable[[Tensor], Tensor]


class Chain(nn.Module):
    def __init__(self, steps: list[Step], features: int) -> None:
        super().__init__()
        self.steps = steps
        self.embedding = nn.Embedding(2, H, _weight=torch.arange(2.0)[:, None].expand(2, H).clone())
        self.linear = nn.Linear(features, 8)

    def move(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for step in self.steps:
            x = step.apply(x)
        return x

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.move(input_ids))


def factorisations(draw: st.DrawFn, size: int, parts: int) -> list[int]:
    """A row of numbers whose product is ``size``."""
    result = []
    for _ in range(parts - 1):
        result.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= result[-1]
    return [*result, size]


def draw_step(draw: st.DrawFn, shape: tuple[int, ...]) -> Step:
    rank = len(shape)
    kinds = ["view", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "index"]
    kinds += ["expand", "cat", "stack", "chunk", "flip features", "add"]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(0, rank - 1))
    if kind == "view":
        # Mostly views that leave the features alone, or split or join a dimension.
        tail = draw(st.booleans()) and rank > 1
        size = math.prod(shape[:-1]) if tail else math.prod(shape)
        lead = factorisations(draw, size, draw(st.integers(1, 3)))
        target = (*lead, shape[-1]) if tail else tuple(lead)
        return Step(f"reshape{target}", lambda x: x.reshape(target))
    if kind == "transpose":
        other = draw(st.integers(0, rank - 1))
        return Step(f"transpose({dim}, {other})", lambda x: x.transpose(dim, other))
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return Step(f"permute{order}", lambda x: x.permute(order))
    if kind == "unsqueeze":
        return Step(f"unsqueeze({dim})", lambda x: x.unsqueeze(dim))
    if kind == "squeeze":
        return Step(f"squeeze({dim})", lambda x: x.squeeze(dim))
    if kind == "expand" and shape[dim] == 1:
        sizes = [*shape]
        sizes[dim] = draw(st.integers(1, 3))
        return Step(f"expand{sizes}", lambda x: x.expand(sizes))
    start = draw(st.integers(0, shape[dim] - 1))
    if kind == "slice":
        stop = draw(st.integers(start + 1, shape[dim]))
        step = draw(st.integers(1, 2))
        index = (*[slice(None)] * dim, slice(start, stop, step))
        return Step(f"[{index}]", lambda x: x[index])
    if kind == "select" and rank > 2:
        return Step(f"select({dim}, {start})", lambda x: x.select(dim, start))
    if kind == "index":
        return Step("[..., None, :]", lambda x: x[..., None, :])
    if kind == "cat":
        front = (*[slice(None)] * dim, slice(0, start))
        back = (*[slice(None)] * dim, slice(start, None))
        return Step(f"roll({start}, {dim})", lambda x: torch.cat([x[back], x[front]], dim))
    if kind == "stack":
        return Step(f"stack({dim})", lambda x: torch.stack([x, x], dim))
    if kind == "chunk" and shape[dim] % 2 == 0:
        return Step(f"chunk({dim})[1]", lambda x: x.chunk(2, dim)[1])
    if kind == "add" and dim < rank - 1:
        one = (*[slice(None)] * dim, slice(start, start + 1))
        return Step(f"+ 0 * [{one}]", lambda x: x + 0 * x[one])
    return Step("x", lambda x: x)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Step], Tensor]:
    batch, length = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 6]))
    ids = torch.tensor(
        draw(st.lists(st.integers(0, 1), min_size=batch * length, max_size=batch * length))
    )
    ids = ids.view(batch, length)
    x, steps = torch.empty(batch, length, H), []
    for _ in range(draw(st.integers(1, 5))):
        step = draw_step(draw, tuple(x.shape))
        moved = step.apply(x)
        if 0 < moved.numel() <= 1 << 14 and moved.dim() >= 1:
            x, steps = moved, [*steps, step]
    return steps, ids


@given(chains())
def test_types_move_with_their_tokens(drawn: tuple[list[Step], Tensor]) -> None:
    steps, ids = drawn
    features = Chain(steps, H).move(ids).shape[-1]
    model = Chain(steps, features).eval().requires_grad_(False)
    graph = torch.fx.symbolic_trace(model)
    rewritten = freeact_fx.rewrite(graph, (ids,), CONFIG)
    row = rewritten.report["linear"]
    if row.reason is not None:
        assert "in_features" in row.reason
        return
    _, (seen,) = run_rewritten(rewritten, ids)
    values = model.move(ids)
    if row.state == "refused":
        assert seen.types is None
        assert seen.default_type == CONFIG.num_types
        return
    assert row.state == "typed"
    assert seen.types is not None
    assert seen.types.shape == values.shape[:-1], [s.name for s in steps]
    expected = seen.types[..., None].expand(values.shape)
    assert torch.equal(values, expected.float()), [s.name for s in steps]


COMMON = {
    "heads": ((2, 6, 64), (2, 6, 4, 16)),
    "heads together": ((2, 6, 4, 16), (2, 6, 64)),
    "tokens in a row": ((2, 6, 64), (12, 64)),
    "windows": ((2, 6, 64), (2, 3, 2, 64)),
    "heads beside tokens": ((2, 6, 64), (2, 24, 16)),
    "one more dimension": ((2, 6, 64), (2, 1, 6, 64)),
}


@given(st.sampled_from(sorted(COMMON)))
def test_common_views_are_not_given_up(name: str) -> None:
    """Views that models do keep the types: giving up is safe, but not for these."""
    old, new = COMMON[name]
    tokens = [Axis(size) for size in old[: len(old) - 1 - (name == "heads together")]]
    expr = TypeExpr("tokens", (), tuple(tokens))
    layout = layout_of_axes(tokens) + ((),) * (len(old) - len(tokens))
    assert reshape_layout(layout, old, new, expr) is not None


def test_broadcasting_is_aligned_right() -> None:
    axis = Axis(4)
    assert broadcast_layout(((axis,), ()), (4, 8), (4, 4, 8)) == ((), (axis,), ())
    assert broadcast_layout(((axis,), ()), (4, 8), (4, 8)) == ((axis,), ())
    # Tokens themselves are not repeated by broadcasting.
    assert broadcast_layout(((axis,), ()), (4, 8), (2, 8)) is None
    assert broadcast_layout(((), (axis,), ()), (1, 4, 8), (4, 8)) is None
