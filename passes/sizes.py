"""Sizes of a call, read off its arguments: what the runner needs to make a type tensor of the right shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule

from .node_facts import Size, value_of


class Sizes:
    """Where the symbols of a graph show in its arguments."""

    def __init__(self, gm: GraphModule) -> None:
        # Symbol -> position of the argument, and its dimension (None: the argument is the size itself).
        self.places: dict[sympy.Symbol, tuple[int, int | None]] = {}
        for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                self._note(value, position, None)
            elif isinstance(value, Tensor):
                for dim, size in enumerate(value.shape):
                    self._note(size, position, dim)

    def _note(self, size: Size, position: int, dim: int | None) -> None:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            self.places.setdefault(size.node.expr, (position, dim))

    def can_tell(self, sizes: Sequence[Size]) -> bool:
        """True if the sizes follow from the shapes of the arguments."""
        return all(
            isinstance(s, int) or s.node.expr.free_symbols <= self.places.keys() for s in sizes
        )

    def reader(self, sizes: Sequence[Size]) -> SizeReader:
        exprs = tuple(s if isinstance(s, int) else s.node.expr for s in sizes)
        used = {s for e in exprs if not isinstance(e, int) for s in e.free_symbols}
        return SizeReader(exprs, {s: p for s, p in self.places.items() if s in used})


@dataclass(frozen=True)
class SizeReader:
    """Callable with the arguments of a call; returns sizes."""

    exprs: tuple[int | sympy.Expr, ...]
    places: dict[sympy.Symbol, tuple[int, int | None]]

    def __call__(self, args: Sequence[Any]) -> tuple[int, ...]:
        values = {
            symbol: int(args[position] if dim is None else args[position].shape[dim])
            for symbol, (position, dim) in self.places.items()
        }
        return tuple(_evaluate(e, values) for e in self.exprs)


def _evaluate(expr: int | sympy.Expr, values: dict[sympy.Symbol, int]) -> int:
    if isinstance(expr, int):
        return expr
    return values[expr] if expr in values else int(expr.subs(values))
