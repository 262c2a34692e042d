"""One small rule per operation: how token types pass through it.

A rule is a function ``(node, facts) -> Fact``. It returns a ``TokenFact``, a ``Lost`` with the reason, a list of facts
for an operation with several outputs, or None: no tokens here. An operation without a rule loses the types it is
given; that is a stated reason, never a guess. Merges and embeddings, where types come *from*, are in ``annotate``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from .layouts import broadcast_layout, is_one, permute_layout, reshape_layout
from .node_facts import (
    Axis,
    Fact,
    Layout,
    Lost,
    Size,
    TokenFact,
    TypeExpr,
    op_name,
    statically_equal,
    value_of,
)

Facts: TypeAlias = "Callable[[Any], Fact]"
Rule: TypeAlias = "Callable[[Node, Facts], Fact]"


def shape_of(node: Any) -> tuple[Size, ...]:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _where(node: Node) -> str:
    return f"{op_name(node)} ({node.name})"


def refines(a: TypeExpr, b: TypeExpr) -> bool:
    """True if ``a`` is ``b`` or ``b`` with more merges."""
    while a != b:
        if a.op != "merge":
            return False
        a = a.args[0]
    return True


def _agree(facts: Sequence[TokenFact], node: Node) -> Fact:
    """The one fact that several operands share; of two that differ by a merge, the later."""
    best = facts[0]
    for other in facts[1:]:
        if best.layout != other.layout or not (
            refines(best.expr, other.expr) or refines(other.expr, best.expr)
        ):
            return Lost(f"two operands of {_where(node)} have conflicting token types")
        best = other if refines(other.expr, best.expr) else best
    return best


def pointwise(node: Node, facts: Facts) -> Fact:
    """Same types as the operands that have every token dimension; what is broadcast along them is passed over."""
    shape = shape_of(node)
    found: list[TokenFact] = []
    lost: Lost | None = None
    for operand in node.all_input_nodes:
        fact = facts(operand)
        if isinstance(fact, TokenFact):
            layout = broadcast_layout(fact.layout, shape_of(operand), shape)
            if layout is None:
                return Lost(f"{_where(node)} repeats tokens")
            found.append(TokenFact(fact.expr, layout))
        elif isinstance(fact, Lost):
            lost = lost or fact
    if not found:
        return lost
    token_dims = [{d for d, axes in enumerate(fact.layout) if axes} for fact in found]
    widest = max(token_dims, key=len)
    if not all(dims <= widest for dims in token_dims):
        return Lost(f"two operands of {_where(node)} have tokens along different dimensions")
    return _agree([f for f, dims in zip(found, token_dims, strict=True) if dims == widest], node)


def cast(node: Node, facts: Facts) -> Fact:
    """Another dtype, device or memory: types of the first operand; the others (``x.to(y)``) lend their dtype only."""
    return facts(node.args[0])


def view(node: Node, facts: Facts) -> Fact:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: read off the two shapes."""
    source = node.args[0]
    fact = facts(source)
    if not isinstance(fact, TokenFact):
        return fact
    layout = reshape_layout(fact.layout, shape_of(source), shape_of(node), fact.expr)
    if layout is None:
        return Lost(f"{_where(node)} mixes token dimensions")
    return TokenFact(fact.expr, layout)


def permute(node: Node, facts: Facts) -> Fact:
    fact = facts(node.args[0])
    if not isinstance(fact, TokenFact):
        return fact
    rank, name = len(fact.layout), op_name(node)
    dims = list(range(rank))
    if name in ("transpose", "swapaxes", "swapdims"):
        a = argument(node, 1, "dim0") % rank
        b = argument(node, 2, "dim1") % rank
        dims[a], dims[b] = dims[b], dims[a]
    elif name == "permute":
        given: Any = argument(node, 1, "dims")
        given = node.args[1:] if isinstance(given, int) else given
        dims = [d % rank for d in given]
    else:  # t
        dims.reverse()
    return TokenFact(fact.expr, permute_layout(fact.layout, dims))


def attribute(node: Node, facts: Facts) -> Fact:
    """``x.mT``, ``x.T``: tensors that are had by name."""
    fact = facts(node.args[0])
    if not isinstance(fact, TokenFact):
        return fact
    dims = list(range(len(fact.layout)))
    if node.args[1] in ("mT", "mH"):
        dims[-2:] = dims[:-3:-1]
    elif node.args[1] in ("T", "H"):
        dims.reverse()
    elif node.args[1] != "data":
        return pointwise_lost(node, facts)
    return TokenFact(fact.expr, permute_layout(fact.layout, dims))


def expand(node: Node, facts: Facts) -> Fact:
    source = node.args[0]
    fact = facts(source)
    if not isinstance(fact, TokenFact):
        return fact
    layout = broadcast_layout(fact.layout, shape_of(source), shape_of(node))
    return (
        Lost(f"{_where(node)} repeats tokens") if layout is None else TokenFact(fact.expr, layout)
    )


def _index_layout(fact: TokenFact, items: Sequence[Any], node: Node) -> Fact:
    """Basic indexing: slices, ints, None and one Ellipsis."""
    source_shape = shape_of(node.args[0])
    used = sum(1 for item in items if item is not None and item is not Ellipsis)
    padding = [slice(None)] * (len(source_shape) - used)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items = [*items[:at], *padding, *items[at + 1 :]]
    else:
        items = [*items, *padding]
    expr, dim, out = fact.expr, 0, 0
    layout: list[tuple[Axis, ...]] = []
    out_shape = shape_of(node)
    for item in items:
        if item is None:
            layout.append(())
            out += 1
            continue
        axes = fact.layout[dim]
        if isinstance(item, slice):
            same = statically_equal(source_shape[dim], out_shape[out]) and item.step in (None, 1)
            if not axes or same:
                layout.append(axes)
            else:
                if len(axes) != 1 or not any(axes[0] is a for a in expr.axes):
                    return Lost(f"{_where(node)} slices a dimension that holds several token axes")
                expr, axis = _slice(
                    expr, axes[0], (item.start, item.stop, item.step), out_shape[out]
                )
                layout.append(() if is_one(axis.size) else (axis,))
            out += 1
        elif isinstance(item, (int, torch.SymInt)) or (
            isinstance(item, Node) and not isinstance(value_of(item), Tensor)
        ):
            if axes:
                if len(axes) != 1 or not any(axes[0] is a for a in expr.axes):
                    return Lost(f"{_where(node)} indexes a dimension that holds several token axes")
                position = next(i for i, a in enumerate(expr.axes) if a is axes[0])
                rest = expr.axes[:position] + expr.axes[position + 1 :]
                expr = TypeExpr("select", (expr, position, item), rest)
        else:
            return Lost(f"{_where(node)} picks tokens by a tensor")
        dim += 1
    return TokenFact(expr, tuple(layout))


def assign(node: Node, facts: Facts) -> Fact:
    """``x[index] = y`` by position: fine along features, lost along tokens. (By mask it is a merge.)"""
    target, index, value = node.args
    before, new = facts(target), facts(value)
    if isinstance(before, Lost) or (before is None and new is None):
        return before
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(before, TokenFact):
        return Lost(f"{_where(node)} puts tokens into a tensor without")
    items = [item for item in items if item is not None]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = len(before.layout) - len(items) + 1
        items = [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]
    touched = [i for i, item in enumerate(items) if item != slice(None)]
    if not touched and new is None and isinstance(value, Node):
        return Lost(f"{_where(node)} replaces all tokens")
    if any(isinstance(value_of(items[i]), Tensor) or before.layout[i] for i in touched):
        return Lost(f"{_where(node)} writes tokens by position")
    return before


def copy(node: Node, facts: Facts) -> Fact:
    """``x.copy_(y)``: the types of y, if it has any."""
    target, source = node.args[0], argument(node, 1, "src")
    fact = facts(source)
    if isinstance(fact, TokenFact):
        layout = broadcast_layout(fact.layout, shape_of(source), shape_of(target))
        return (
            Lost(f"{_where(node)} repeats tokens")
            if layout is None
            else TokenFact(fact.expr, layout)
        )
    return fact or (facts(target) and Lost(f"{_where(node)} replaces tokens"))


def _slice(
    expr: TypeExpr, axis: Any, bounds: tuple[Any, Any, Any], size: Size
) -> tuple[TypeExpr, Any]:
    position = next(i for i, a in enumerate(expr.axes) if a is axis)
    new_axis = axis.derive(("slice", *map(str, bounds)), size)
    axes = (*expr.axes[:position], new_axis, *expr.axes[position + 1 :])
    return TypeExpr("slice", (expr, position, *bounds), axes), new_axis


def getitem(node: Node, facts: Facts) -> Fact:
    source, index = node.args[0], node.args[1]
    fact = facts(source)
    if isinstance(fact, list):
        return fact[index] if isinstance(index, int) else None
    if not isinstance(fact, TokenFact):
        return fact
    # A list is one index of several positions; a tuple is one index per dimension.
    return _index_layout(fact, list(index) if isinstance(index, tuple) else [index], node)


def select_or_slice(node: Node, facts: Facts) -> Fact:
    """aten's slice.Tensor, select.int and narrow, in terms of basic indexing."""
    fact = facts(node.args[0])
    if not isinstance(fact, TokenFact):
        return fact
    dim = argument(node, 1, "dim", 0) % len(fact.layout)
    name = op_name(node)
    if name == "slice":
        item: Any = slice(
            argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
        )
    elif name == "narrow":
        start, length = argument(node, 2, "start"), argument(node, 3, "length")
        if not isinstance(start, int) or not isinstance(length, int):
            return Lost(f"{_where(node)} has computed bounds")
        item = slice(start, start + length)
    else:
        item = argument(node, 2, "index")
    return _index_layout(fact, [slice(None)] * dim + [item], node)


def pieces(node: Node, facts: Facts) -> Fact:
    """chunk, split, unbind: free along features, lost along tokens."""
    fact = facts(node.args[0])
    outputs = value_of(node)
    if not isinstance(fact, TokenFact) or not isinstance(outputs, (tuple, list)):
        return [fact] * len(outputs) if isinstance(outputs, (tuple, list)) else fact
    name = op_name(node)
    dim = argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(fact.layout)
    if fact.layout[dim]:
        return [Lost(f"{_where(node)} cuts along tokens")] * len(outputs)
    layout = fact.layout[:dim] + fact.layout[dim + 1 :] if name == "unbind" else fact.layout
    return [TokenFact(fact.expr, layout)] * len(outputs)


def concatenate(node: Node, facts: Facts) -> Fact:
    # An empty operand (a cache before its first use) adds nothing.
    operands = [n for n in argument(node, 0, "tensors") if not _is_empty(n)]
    found = [facts(operand) for operand in operands]
    typed = [f for f in found if isinstance(f, TokenFact)]
    if not typed:
        return next((f for f in found if isinstance(f, Lost)), None)
    rank = len(typed[0].layout)
    if len(found) == 1 and op_name(node) != "stack":
        return typed[0]
    if op_name(node) == "stack":
        dim = argument(node, 1, "dim", 0) % (rank + 1)
        fact = _agree(typed, node)
        if not isinstance(fact, TokenFact):
            return fact
        return TokenFact(fact.expr, (*fact.layout[:dim], (), *fact.layout[dim:]))
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0)) % rank
    if not any(fact.layout[dim] for fact in typed):
        # A dimension of size 1 may be a token axis too (a decode step beside its cache).
        if len(typed) == len(found) or not _is_token_dimension(typed[0], dim):
            return _agree(typed, node)
        return Lost(f"{_where(node)} joins tokens to others whose types are unknown")
    if len(typed) != len(found):
        return Lost(f"{_where(node)} joins tokens to others whose types are unknown")
    positions = set()
    for fact in typed:
        axes = fact.layout[dim]
        if len(axes) > 1 or (axes and not any(axes[0] is a for a in fact.expr.axes)):
            return Lost(f"{_where(node)} joins tokens that were reshaped")
        positions |= {i for i, a in enumerate(fact.expr.axes) if axes and a is axes[0]}
    first = next(f for f in typed if f.layout[dim])
    others = (*first.layout[:dim], *first.layout[dim + 1 :])
    position = min(positions)
    if len(positions) != 1 or not all(
        (*f.layout[:dim], *f.layout[dim + 1 :]) == others and _runs_along(f, dim, position)
        for f in typed
    ):
        return Lost(f"{_where(node)} joins tokens of different layouts")
    key = ("cat", *(id(f.expr.axes[position]) for f in typed))
    axis = first.layout[dim][0].derive(key, shape_of(node)[dim])
    new_axes = (*first.expr.axes[:position], axis, *first.expr.axes[position + 1 :])
    expr = TypeExpr("cat", (position, *(f.expr for f in typed)), new_axes)
    return TokenFact(expr, (*first.layout[:dim], (axis,), *first.layout[dim + 1 :]))


def _runs_along(fact: TokenFact, dim: int, position: int) -> bool:
    """True if a dimension is one axis of the type tensor; one of size 1 does not show in the layout."""
    axes = fact.expr.axes
    return bool(fact.layout[dim]) or (position < len(axes) and is_one(axes[position].size))


def _is_empty(node: Any) -> bool:
    return any(statically_equal(size, 0) for size in shape_of(node))


def _is_token_dimension(fact: TokenFact, dim: int) -> bool:
    """True if a size-1 dimension may be a token axis: not the last, features' one."""
    return dim != len(fact.layout) - 1 and any(is_one(a.size) for a in fact.expr.axes)


def reduction(node: Node, facts: Facts) -> Fact:
    fact = facts(node.args[0])
    if not isinstance(fact, TokenFact):
        return fact
    # The order of a norm comes before its dimensions.
    dims = argument(node, 2 if op_name(node).endswith("norm") else 1, "dim")
    outputs = value_of(node)
    if isinstance(dims, Node):  # max(a, b)
        return pointwise(node, facts)
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, (list, tuple)):
        return Lost(f"{_where(node)} reduces over all tokens")
    rank = len(fact.layout)
    reduced = {d % rank for d in dims}
    if any(fact.layout[d] for d in reduced):
        return Lost(f"{_where(node)} reduces over tokens")
    first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    keep = first.dim() == rank
    layout = tuple(x for d, x in enumerate(fact.layout) if keep or d not in reduced)
    result = TokenFact(fact.expr, layout)
    return [result, None] if isinstance(outputs, (tuple, list)) else result


def _features_last(fact: TokenFact, node: Node) -> Fact:
    if fact.layout[-1]:
        return Lost(f"{_where(node)} contracts a token dimension")
    return fact


def linear(node: Node, facts: Facts) -> Fact:
    position = 1 if op_name(node) == "addmm" else 0
    fact = facts(node.args[position] if len(node.args) > position else node.kwargs["input"])
    return _features_last(fact, node) if isinstance(fact, TokenFact) else fact


def matmul(node: Node, facts: Facts) -> Fact:
    """Rows of the product are rows of the left operand (or columns those of the right one)."""
    left, right = node.args[0], node.args[1]
    a, b = facts(left), facts(right)
    rank = len(shape_of(node))
    if isinstance(a, TokenFact):
        if a.layout[-1]:
            return Lost(f"{_where(node)} contracts a token dimension")
        padding: Layout = ((),) * (rank - len(a.layout))
        return TokenFact(a.expr, padding + a.layout)
    if isinstance(a, Lost):
        return a
    if isinstance(b, TokenFact):
        if len(b.layout) < 2 or b.layout[-2] or len(b.layout) != rank:
            return Lost(f"{_where(node)} mixes tokens")
        return b
    return b


def attention(node: Node, facts: Facts) -> Fact:
    """Each query keeps its type."""
    fact = facts(argument(node, 0, "query"))
    result = _features_last(fact, node) if isinstance(fact, TokenFact) else fact
    outputs = value_of(node)
    return [result, *[None] * (len(outputs) - 1)] if isinstance(outputs, (tuple, list)) else result


def normalise(node: Node, facts: Facts) -> Fact:
    """layer_norm, rms_norm: the normalised dimensions must be features."""
    fact = facts(argument(node, 0, "input"))
    if not isinstance(fact, TokenFact):
        return fact
    shape = argument(node, 1, "normalized_shape")
    count = len(shape) if isinstance(shape, (tuple, list)) else 1
    if any(fact.layout[-count:]):
        return Lost(f"{_where(node)} normalises over tokens")
    outputs = value_of(node)
    return [fact, *[None] * (len(outputs) - 1)] if isinstance(outputs, (tuple, list)) else fact


def pad(node: Node, facts: Facts) -> Fact:
    fact = facts(node.args[0])
    if not isinstance(fact, TokenFact):
        return fact
    padded = len(argument(node, 1, "pad")) // 2
    if any(fact.layout[-padded:]):
        return Lost(f"{_where(node)} pads tokens")
    return fact


def einsum(node: Node, facts: Facts) -> Fact:
    """The first operand whose token letters all survive gives its types."""
    equation = node.args[0]
    operands = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return pointwise_lost(node, facts)
    inputs, output = equation.replace(" ", "").split("->")
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        fact = facts(operand)
        if not isinstance(fact, TokenFact):
            continue
        by_letter = {c: x for c, x in zip(letters, fact.layout, strict=True) if x}
        if all(c in output for c in by_letter):
            return TokenFact(fact.expr, tuple(by_letter.get(c, ()) for c in output))
    return pointwise_lost(node, facts)


def pointwise_lost(node: Node, facts: Facts) -> Fact:
    """The rule of operations without a rule."""
    for operand in node.all_input_nodes:
        fact = facts(operand)
        if isinstance(fact, Lost):
            return fact
        if isinstance(fact, TokenFact) or (
            isinstance(fact, list) and any(isinstance(f, TokenFact) for f in fact)
        ):
            return Lost(f"no rule carries token types through {_where(node)}")
    return None


def no_tokens(node: Node, facts: Facts) -> Fact:
    return None


_POINTWISE = """
    add sub rsub mul div truediv floordiv true_divide pow rsqrt sqrt neg abs exp exp2 log sigmoid tanh relu relu6 gelu
    silu mish softplus leaky_relu elu selu hardswish hardtanh hardsigmoid celu clamp clamp_min clamp_max
    clip erf sin cos round floor reciprocal square where masked_fill softmax log_softmax dropout feature_dropout
    positive maximum minimum addcmul lerp nan_to_num logaddexp sign remainder fmod mod expm1 log1p sinh cosh softsign
    threshold _threshold prelu pos _softmax _log_softmax
""".split()
_CASTS = """
    to float half bfloat16 double type type_as contiguous clone detach alias _to_copy convert_element_type lift_fresh
    cpu cuda
""".split()
_NO_TOKENS = """
    zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_CASTS, cast),
    **dict.fromkeys(_NO_TOKENS, no_tokens),
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "_unsafe_view",
            "ravel",
        ),
        view,
    ),
    **dict.fromkeys(("transpose", "permute", "swapaxes", "swapdims", "t"), permute),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), expand),
    **dict.fromkeys(("slice", "select", "narrow"), select_or_slice),
    **dict.fromkeys(("chunk", "split", "unbind", "tensor_split", "split_with_sizes"), pieces),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), concatenate),
    **dict.fromkeys(
        (
            "mean",
            "sum",
            "amax",
            "amin",
            "max",
            "min",
            "var",
            "std",
            "norm",
            "linalg_vector_norm",
            "logsumexp",
        ),
        reduction,
    ),
    **dict.fromkeys(("linear", "addmm"), linear),
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    **dict.fromkeys(
        ("scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"),
        attention,
    ),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"), normalise),
    "getattr": attribute,
    "getitem": getitem,
    "copy": copy,
    "pad": pad,
    "einsum": einsum,
}
