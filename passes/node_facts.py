"""The facts that passes hang on nodes, and how they read a node's value, name and origin.

Token types travel as a ``TokenFact``: *which* type tensor (a ``TypeExpr``, a recipe that ``insert`` turns into nodes)
and *how* the node's dimensions relate to it (a layout). The layout gives each dimension a tuple of token axes; an
empty tuple is a feature dimension. For hidden states [B, T, H] it is ``((b,), (t,), ())``, after a view to
[B*T, H] ``((b, t), ())``, per head [B, nh, T, hd] ``((b,), (), (t,), ())``. Sizes stay symbolic throughout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from freeact_fx.reasons import Reason

LINEAR_KEY = "freeact_linear"
TOKENS_KEY = "freeact_tokens"
LINEARS_KEY = "freeact_linears"

Size: TypeAlias = "int | torch.SymInt"


def value_of(node: Any) -> Any:
    """The fake value of a node (Dynamo's ``example_value``, export's ``val``), or the argument itself."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("val", node.meta.get("example_value"))


def set_value(node: Node, value: Any) -> None:
    """Record a node's fake value under both keys; AOTAutograd's cache wants it on every node we add."""
    node.meta["val"] = node.meta["example_value"] = value


def op_name(node: Node) -> str:
    """One name per operation: ``x.add_(y)``, ``operator.iadd`` and ``aten.add.Tensor`` are all "add"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2]
    elif isinstance(target, str):
        name = target
    else:
        name = getattr(target, "__name__", str(target))
    name = _IN_PLACE_OPERATORS.get(name, name)
    return name.rstrip("_") if not name.startswith("__") else name


_IN_PLACE_OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "or_": "bitwise_or",
    "ior": "bitwise_or",
    "and_": "bitwise_and",
    "iand": "bitwise_and",
}


def written_by(node: Node) -> Node | None:
    """What an operation writes in place (its first argument), or None."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        writes = node.target._schema.is_mutable
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place_method = name.endswith("_") and not name.startswith("_")
        writes = (in_place_method and name not in ("or_", "and_")) or name in _WRITING
    target = node.args[0]
    return target if writes and isinstance(target, Node) else None


_WRITING = frozenset("setitem iadd isub imul itruediv ior iand".split())


def constant_size(size: Size) -> int | None:
    """The number, if it is one: a SymInt may hold a constant."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def statically_equal(a: Size, b: Size) -> bool:
    """True if two sizes are equal for sure; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def source_name(node: Node) -> str:
    """What Dynamo calls a placeholder, e.g. ``L['self']._modules['lm_head']._parameters['weight']``."""
    if "freeact_argument" in node.meta:
        return f"L['{node.meta['freeact_argument']}']"
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None) or getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    name = name() if callable(name) else name  # a method before torch 2.13
    return name if isinstance(name, str) else str(node.target)


def qualified_name(node: Node) -> str:
    """The dotted name of a parameter or buffer: ``model.layers.0.q_proj.weight``."""
    if node.op == "get_attr":
        return str(node.target)
    parts = re.findall(r"\['([^']+)'\]|\.(?!_modules|_parameters|_buffers)(\w+)", source_name(node))
    path = [a or b for a, b in parts]
    if source_name(node).startswith(("L[", "G[")):
        path = path[1:] or path  # the first is a variable: self, or the tensor itself
    return ".".join(path) or node.name


def input_name(node: Node, otherwise: str) -> str:
    """The name of an argument, for readers; ``otherwise`` if it only has one that Dynamo gave it after a break."""
    name = qualified_name(node)
    return otherwise if "___stack" in name else name


@dataclass(eq=False)
class Axis:
    """One token axis, known by identity. ``split`` and ``derive`` give the same child each time they are asked."""

    size: Size
    parent: Axis | None = None
    siblings: tuple[Axis, ...] = ()
    _children: dict[Any, tuple[Axis, ...]] = field(default_factory=dict, repr=False)

    def split(self, sizes: Sequence[Size]) -> tuple[Axis, ...]:
        """Cut the axis into a row-major grid of axes."""
        key = ("split", *map(str, sizes))
        if key not in self._children:
            children = tuple(Axis(size, parent=self) for size in sizes)
            for child in children:
                child.siblings = children
            self._children[key] = children
        return self._children[key]

    def derive(self, key: tuple[Any, ...], size: Size) -> Axis:
        """The axis that slicing (or the like) makes of this one."""
        if key not in self._children:
            self._children[key] = (Axis(size),)
        return self._children[key][0]


def merge_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Undo splits: a complete row of siblings becomes their parent."""
    merged: list[Axis] = []
    for axis in axes:
        merged.append(axis)
        while (
            merged[-1].siblings
            and tuple(merged[-len(merged[-1].siblings) :]) == merged[-1].siblings
        ):
            last = merged[-1]
            assert last.parent is not None
            merged[-len(last.siblings) :] = [last.parent]
    return tuple(merged)


Layout: TypeAlias = "tuple[tuple[Axis, ...], ...]"


@dataclass(frozen=True)
class TypeExpr:
    """A recipe for a type tensor; its dimensions are ``axes``. Equal recipes give equal tensors.

    ==========  ============================================================================
    op          args
    ==========  ============================================================================
    tokens      (Root,): the types that the ids show
    merge       (expr, mask node, its layout, type, negated, source in words)
    constant    (expr it stands in for, type, source in words)
    slice       (expr, axis position, start, stop, step)
    select      (expr, axis position, index)
    cat         (axis position, *exprs)
    ==========  ============================================================================
    """

    op: str
    args: tuple[Any, ...]
    axes: tuple[Axis, ...]


@dataclass(eq=False)
class Root:
    """Where tokens come into a graph: ids that the vocabulary's embedding reads, or hidden states handed in.

    node        the ids [B, T] (or [T]), or the hidden states [B, T, H]
    is_ids      True for ids
    axes        the token axes of ``node``
    holders     arguments that hold hidden states of these tokens: the root, and a residual beside it
    sink_known  row 0 is the first position of the sequence (``padding`` aside)
    padding     attention_mask [B, T] of the call: 0 where there is padding; None: no padding
    """

    node: Node
    is_ids: bool
    axes: tuple[Axis, ...]
    holders: tuple[Node, ...] = ()
    sink_known: bool = False
    padding: Node | None = None


def roots_of(expr: TypeExpr) -> list[Root]:
    """The roots that a recipe starts from."""
    if expr.op == "tokens":
        return [expr.args[0]]
    inner = expr.args[1:] if expr.op == "cat" else expr.args[:1]
    return [root for part in inner for root in roots_of(part)]


@dataclass(frozen=True)
class TokenFact:
    """Types of a node's tokens: the recipe, and the token axes of each dimension."""

    expr: TypeExpr
    layout: Layout


@dataclass(frozen=True)
class Lost:
    """The node holds tokens, but their types were lost on the way; ``reason`` says where."""

    reason: str


Fact: TypeAlias = "TokenFact | Lost | list[Any] | None"


@dataclass
class LinearFact:
    """What is known of one Linear node.

    name          qualified module name
    num_features  K
    num_outputs   N
    x             the activation node
    weight, bias  nodes of the dense parameters (weight is [K, N] if ``transposed``); of a converted Linear weight
                  is the packed one
    operation     "linear", "addmm", "mm", "matmul" or "converted"
    operands      of a converted Linear: argument nodes of ``freeact::linear`` by name; empty otherwise
    refusal       why it is left alone, or None
    state         "typed", "default" or "refused" (annotate)
    type_source   how its types were found, readable
    types         recipe and layout for ``x`` (state "typed")
    result        the node that took its place (insert)
    """

    name: str
    num_features: int
    num_outputs: int
    x: Node
    weight: Node
    bias: Node | None = None
    transposed: bool = False
    operation: str = "linear"
    operands: dict[str, Any] = field(default_factory=dict)
    refusal: Reason | None = None
    state: str = "default"
    type_source: str = ""
    types: TokenFact | None = None
    result: Node | None = None

    @property
    def converted(self) -> bool:
        return bool(self.operands)


def linears_of(gm: GraphModule) -> list[tuple[Node, LinearFact]]:
    """Every Linear that ``detect`` marked and ``insert`` has not replaced yet, in graph order."""
    return [(n, n.meta[LINEAR_KEY]) for n in gm.graph.nodes if LINEAR_KEY in n.meta]


def facts_of(gm: GraphModule) -> list[LinearFact]:
    """What ``detect`` found, replaced or not."""
    facts: list[LinearFact] = gm.meta[LINEARS_KEY]
    return facts


def tensor_of(gm: GraphModule, node: Node, inputs: dict[Node, Any]) -> Tensor | None:
    """The real tensor behind a parameter node (placeholder or get_attr), or None."""
    value: Any = None
    if node.op == "placeholder":
        value = inputs.get(node)
    elif node.op == "get_attr":
        value = gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None
