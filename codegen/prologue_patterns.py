"""Recognise a norm or an activation in an ATen graph, however a model writes it.

What reads like one op in a model is a chain here, after AOTAutograd::

    x ─ cast ─┬─ pow 2 ─ mean ─ + eps ─ rsqrt ─┐
              └────────────────────────────────* ── cast ── * weight        an RMSNorm of Llama

Casts in such a chain are looked through: a kernel in fp32 is at least as exact as one that rounds in between, and
differs from it by those roundings. Products are taken apart into their factors, so their order does not matter.
Whatever deviates in substance (another place for eps, an unbiased variance, two weights) is not recognised.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .factors import (
    factors_of,
    has_shape_of,
    is_plain,
    is_power,
    is_root,
    is_row_of,
    narrowest,
    plus_number,
    same_value,
    without_cast,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(variance + eps) * (weight_offset + weight) + bias``, where what is None counts as 0.

    source  x, in the fewest bits that it has on the way
    kind    "rms" (the mean counts as 0) or "layer"
    """

    source: Node
    kind: str
    eps: float
    weight: Node | None
    weight_offset: float
    bias: Node | None


@dataclass(frozen=True)
class Activation:
    """``kind(gate) * up``; without ``up`` not gated. ``kind`` is "silu", "gelu" or "gelu_tanh"."""

    gate: Node
    up: Node | None
    kind: str


# ------------------------------------------------------------------ norms


def find_norm(y: Node) -> Norm | None:
    """The norm whose result is ``y`` [..., K]."""
    if y.meta["val"].dim() < 2:
        return None
    product, bias = without_cast(y), None
    if is_plain(product, aten.add.Tensor):
        sides = (product.args, product.args[::-1])
        found = [(a, b) for a, b in sides if has_shape_of(a, y) and is_row_of(b, y)]
        if len(found) != 1:
            return None
        product, bias = found[0]
    for root in factors_of(product).all():
        centred = _centred_under(root, product)
        if centred is None:
            continue
        values, source, kind, eps = centred
        factors = factors_of(product, stop=values)
        weights = [f for f in factors.above if f is not values and f is not root]
        num_others = len(factors.all()) - len(weights)
        if factors.number != 1 or num_others != 2 or factors.is_upside_down(root):
            continue
        if factors.count(values) != 1:
            continue
        if len(weights) > 1 or not all(is_row_of(w, y) for w in weights):
            continue
        if has_shape_of(source, y):
            weight, offset = plus_number(weights[0]) if weights else (None, 1.0)
            return Norm(narrowest(source), kind, eps, weight, offset, bias)
    return None


def _centred_under(root: Node, product: Node) -> tuple[Node, Node, str, float] | None:
    """The values whose mean square is under a root; x; the kind of norm; eps. ``product`` has them as a factor."""
    if not is_root(root):
        return None
    spread, eps = plus_number(without_cast(root.args[0]))
    if eps == 0.0 or not isinstance(spread, Node):
        return None
    x = _operand_of_variance(spread)
    if x is not None:  # aten.var_mean
        for values in factors_of(product).above:
            if _is_minus_mean(values) and same_value(values.args[0], x):
                return values, values.args[0], "layer", eps  # type: ignore[return-value]
        return None
    x = _operand_of_square(_operand_of_mean(spread))
    if x is None:
        return None
    values = without_cast(x)
    if _is_minus_mean(values):
        return values, values.args[0], "layer", eps
    return values, x, "rms", eps


def _operand_of_square(node: Any) -> Node | None:
    node = without_cast(node)
    is_product = isinstance(node, Node) and node.target is aten.mul.Tensor
    if is_power(node, 2) or (is_product and same_value(node.args[0], node.args[1])):
        return node.args[0]
    return None


def _operand_of_mean(node: Any) -> Node | None:
    """What a node is the mean of over the last dimension, which is kept."""
    node = without_cast(node)
    if not isinstance(node, Node):
        return None
    if node.target is operator.getitem and node.args[1] == 1:
        return _operand_of_variance(node.args[0])
    if node.target is not aten.mean.dim or len(node.args) < 3 or node.args[2] is not True:
        return None
    return node.args[0] if _is_last(node.args[1], node.args[0]) else None  # type: ignore[return-value]


def _operand_of_variance(node: Any) -> Node | None:
    """What ``var_mean`` (or its first result) is the biased variance of, over the last dimension, which is kept."""
    node = without_cast(node)
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not aten.var_mean.correction:
        return None
    x, *dims = node.args
    is_biased = node.kwargs.get("correction") == 0 and node.kwargs.get("keepdim") is True
    return x if is_biased and dims and _is_last(dims[0], x) else None  # type: ignore[return-value]


def _is_minus_mean(node: Any) -> bool:
    """Whether a node is ``x - mean(x)``."""
    return is_plain(node, aten.sub.Tensor) and same_value(
        node.args[0], _operand_of_mean(node.args[1])
    )


def _is_last(dims: Any, x: Any) -> bool:
    return list(dims) in ([-1], [x.meta["val"].dim() - 1])


# ------------------------------------------------------------------ activations


def find_activation(y: Node) -> Activation | None:
    """The activation function, gated or not, whose result is ``y`` [..., K]."""
    node = without_cast(y)
    alone = _activation(node)
    if alone is not None:
        return Activation(narrowest(alone[1]), None, alone[0])
    if node.target is not aten.mul.Tensor:
        return None
    for one, other in (node.args, node.args[::-1]):
        found = _activation(without_cast(one))
        if found is not None and all(has_shape_of(n, y) for n in (found[1], other)):
            return Activation(narrowest(found[1]), narrowest(other), found[0])
    return None


def _activation(node: Any) -> tuple[str, Node] | None:
    """The kind of an activation and its operand."""
    if not isinstance(node, Node):
        return None
    for x in _operands_of_product(node):
        factors = factors_of(node, stop=x)
        if len(factors.all()) != 2 or factors.count(x) != 1:
            continue
        (curve,) = (f for f in factors.all() if f is not x)
        for kind, (number, is_curve) in _KINDS.items():
            is_number = math.isclose(factors.number, number, rel_tol=1e-6)
            if is_number and is_curve(curve, x, curve in factors.below):
                return kind, factors.forms[x]
    return None


def _operands_of_product(node: Node) -> list[Node]:
    """What is multiplied, also within products: x may be one itself."""
    found = []
    is_product = node.target in (aten.mul.Tensor, aten.mul.Scalar) or is_plain(
        node, aten.div.Tensor
    )
    for operand in node.args if is_product else ():
        value = without_cast(operand)
        if isinstance(value, Node) and value not in found:
            found += [value, *_operands_of_product(value)]
    return found


def _is_sigmoid(curve: Node, x: Node, is_divisor: bool) -> bool:
    if not is_divisor:
        return curve.target is aten.sigmoid.default and same_value(curve.args[0], x)
    power, one = plus_number(curve)
    if one != 1 or not isinstance(power, Node) or power.target is not aten.exp.default:
        return False
    negative = without_cast(power.args[0])
    return negative.target is aten.neg.default and same_value(negative.args[0], x)


def _is_gaussian(curve: Node, x: Node, is_divisor: bool) -> bool:
    error, one = plus_number(curve)
    if (
        is_divisor
        or one != 1
        or not isinstance(error, Node)
        or error.target is not aten.erf.default
    ):
        return False
    return _is_multiple(error.args[0], math.sqrt(0.5), x)


def _is_tanh(curve: Node, x: Node, is_divisor: bool) -> bool:
    tanh, one = plus_number(curve)
    if is_divisor or one != 1 or not isinstance(tanh, Node) or tanh.target is not aten.tanh.default:
        return False
    inner = factors_of(tanh.args[0], stop=x)
    if len(inner.all()) != 1 or not math.isclose(
        inner.number, math.sqrt(2 / math.pi), rel_tol=1e-6
    ):
        return False
    (total,) = inner.all()
    if not is_plain(total, aten.add.Tensor):
        return False
    return any(
        same_value(one, x) and _is_cubic(other, x) for one, other in (total.args, total.args[::-1])
    )


def _is_cubic(node: Any, x: Node) -> bool:
    factors = factors_of(node, stop=x)
    powers = [f for f in factors.all() if is_power(f, 3) and same_value(f.args[0], x)]
    is_cube = len(factors.all()) == 3 and factors.count(x) == 3
    return math.isclose(factors.number, 0.044715, rel_tol=1e-6) and (
        is_cube or (len(powers) == len(factors.all()) == 1)
    )


def _is_multiple(node: Any, number: float, x: Node) -> bool:
    factors = factors_of(node, stop=x)
    return (
        math.isclose(factors.number, number, rel_tol=1e-6)
        and len(factors.all()) == factors.count(x) == 1
    )


_KINDS = {
    "silu": (1.0, _is_sigmoid),
    "gelu": (0.5, _is_gaussian),
    "gelu_tanh": (0.5, _is_tanh),
}
