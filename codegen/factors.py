"""Values of an ATen graph as arithmetic sees them: products taken apart, casts looked through, sizes compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass
class Factors:
    """A product taken apart, each factor without its casts: ``number * above / below``.

    forms  each factor with its casts
    """

    number: float = 1.0
    above: list[Node] = field(default_factory=list)
    below: list[Node] = field(default_factory=list)
    forms: dict[Node, Node] = field(default_factory=dict)

    def all(self) -> list[Node]:
        return [*self.above, *self.below]

    def count(self, node: Node) -> int:
        return sum(f is node for f in self.above)

    def is_upside_down(self, root: Node) -> bool:
        """Whether a product is divided by 1 / root, or multiplied by a root."""
        is_inverse = root.target is aten.rsqrt.default or is_power(root, -0.5)
        return (self.count(root) == 1) != is_inverse


def factors_of(node: Any, stop: Node | None = None) -> Factors:
    """The factors of a product; ``stop`` is not taken apart."""
    found = Factors()

    def visit(form: Any, is_above: bool) -> None:
        value = without_cast(form)
        if not isinstance(value, Node):
            found.number *= value if is_above else 1 / value if value else math.nan
        elif value is not stop and value.target in (aten.mul.Tensor, aten.mul.Scalar):
            visit(value.args[0], is_above)
            visit(value.args[1], is_above)
        elif value is not stop and is_plain(value, aten.div.Tensor):
            visit(value.args[0], is_above)
            visit(value.args[1], not is_above)
        elif value is not stop and value.target is aten.reciprocal.default:
            visit(value.args[0], not is_above)
        else:
            (found.above if is_above else found.below).append(value)
            found.forms[value] = form

    visit(node, True)
    return found


def is_root(node: Node) -> bool:
    """Whether a node is a square root, or one over it."""
    if node.target in (aten.rsqrt.default, aten.sqrt.default):
        return True
    return is_power(node, 0.5) or is_power(node, -0.5)


def plus_number(node: Any) -> tuple[Any, float]:
    """``(rest, number)`` of ``rest + number``; of anything else it and 0."""
    node = without_cast(node)
    if is_plain(node, aten.add.Tensor) or is_plain(node, aten.add.Scalar):
        one, other = node.args
        for rest, number in ((one, other), (other, one)):
            if isinstance(number, int | float):
                return without_cast(rest), float(number)
    return node, 0.0


def is_power(node: Any, exponent: float) -> bool:
    return (
        isinstance(node, Node)
        and node.target is aten.pow.Tensor_Scalar
        and bool(node.args[1] == exponent)
    )


def is_plain(node: Any, target: Any) -> bool:
    """Whether a node calls an op with its operands alone: no ``alpha``, no rounding mode."""
    return (
        isinstance(node, Node) and node.target is target and len(node.args) == 2 and not node.kwargs
    )


def without_cast(node: Any) -> Any:
    while is_cast(node):
        node = node.args[0]
    return node


def is_cast(node: Any) -> bool:
    return (
        isinstance(node, Node)
        and node.target is prims.convert_element_type.default
        and all(n.meta["val"].is_floating_point() for n in (node, *node.all_input_nodes))
    )


def narrowest(node: Any) -> Node:
    """The value before its casts, or after the one that left the fewest bits."""
    best = node
    while is_cast(node):
        node = node.args[0]
        if node.meta["val"].dtype.itemsize <= best.meta["val"].dtype.itemsize:
            best = node
    return best


def same_value(one: Any, other: Any) -> bool:
    return one is not None and without_cast(one) is without_cast(other)


def has_shape_of(node: Any, y: Node) -> bool:
    return isinstance(node, Node) and _shape(node) == _shape(y)


def is_row_of(node: Any, y: Node) -> bool:
    """Whether a node has one value for each feature of y."""
    return isinstance(node, Node) and _shape(node) == _shape(y)[-1:]


def _shape(node: Node) -> list[Any]:
    """Sizes as expressions: to compare two ``SymInt`` would add a guard."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]
