"""A graph as readable code: one line per node, with shapes and the names of its Linears as comments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .passes.node_facts import facts_of, linears_of, op_name, qualified_name, value_of
from .passes.roots import is_own

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def readable(gm: GraphModule) -> str:
    """The graph as a function, shorter than ``print_readable``::

    def forward(input_ids, q_weight):
        x = embedding(input_ids, table)  # f32[2, s0, 48]
        q = linear(x, q_weight)  # f32[2, s0, 48]  blocks.0.q
    """
    linears = {node: linear.name for node, linear in linears_of(gm)}
    linears |= {fact.result: fact.name for fact in facts_of(gm) if fact.result is not None}
    text = _Text(gm)
    nodes = list(gm.graph.nodes)
    arguments = [f"    {text.of(n)},{_comment(n)}" for n in nodes if n.op == "placeholder"]
    body = [
        f"    {text.line(n)}{_comment(n, linears.get(n))}" for n in nodes if n.op != "placeholder"
    ]
    return "\n".join(["def forward(", *arguments, "):", *body])


class _Text:
    """Nodes and arguments in words; parameters have their names in the model."""

    def __init__(self, gm: GraphModule) -> None:
        own = {n: qualified_name(n).replace(".", "_") for n in gm.graph.nodes if is_own(n)}
        unique = Counter([*own.values(), *(n.name for n in gm.graph.nodes)])
        self._names = {node: name for node, name in own.items() if unique[name] == 1}

    def line(self, node: Node) -> str:
        name = self.of(node)
        arguments = [
            *map(self.of, node.args),
            *(f"{key}={self.of(value)}" for key, value in node.kwargs.items()),
        ]
        if node.op == "output":
            return f"return {', '.join(arguments)}"
        if node.op == "get_attr":
            return f"{name} = self.{node.target}"
        if node.op == "call_method":
            return f"{name} = {arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        return f"{name} = {_called(node)}({', '.join(arguments)})"

    def of(self, value: Any) -> str:
        if isinstance(value, Node):
            return self._names.get(value, value.name)
        if isinstance(value, (tuple, list)):
            parts = ", ".join(map(self.of, value))
            return f"[{parts}]" if isinstance(value, list) else f"({parts})"
        if isinstance(value, slice):
            return ":".join("" if v is None else self.of(v) for v in (value.start, value.stop))
        return "..." if value is Ellipsis else str(value).removeprefix("torch.")


def _called(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{op_name(node)}"
    if isinstance(node.target, str):
        return f"self.{node.target}"
    return op_name(node)


def _comment(node: Node, linear: str | None = None) -> str:
    parts = [*_shapes(value_of(node)), *([linear] if linear else [])]
    return f"  # {'  '.join(parts)}" if parts else ""


def _shapes(value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        for word, letter in _DTYPES.items():
            if dtype.startswith(word) and dtype[len(word) :].isdigit():
                dtype = letter + dtype[len(word) :]
        yield f"{dtype}[{', '.join(map(str, value.shape))}]"
