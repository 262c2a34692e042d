"""Where tokens come into a graph, and where a sequence begins.

An *ids root* is what the vocabulary's embedding reads; a *hidden root* is an argument of floating type, in a graph
that has no such embedding (cut off by a graph break, or called with ``inputs_embeds``). Found from the graph alone:

* Of several embeddings the vocabulary's is the one with the most rows among those whose indices come from the caller
  and are not computed from the indices of another (positions counted from ids).
* The hidden states are the argument that the first Linear reads, not counting what a merge writes into them.

The first position of a sequence is known where the graph shows attention from the tokens to themselves: with a cache
the keys would be more than the tokens. Padding is known from Hugging Face's ``attention_mask`` [B, T]; a mask made of
something else leaves the first position unknown, rather than guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from freeact_fx.config import QuantConfig
from freeact_fx.eligibility import is_tower_name

from .layouts import layout_of_axes
from .node_facts import (
    Axis,
    Fact,
    Lost,
    Root,
    TokenFact,
    TypeExpr,
    linears_of,
    op_name,
    roots_of,
    source_name,
    statically_equal,
    value_of,
    written_by,
)
from .sizes import Sizes
from .token_rules import (
    RULES,
    argument,
    cast,
    normalise,
    pointwise,
    pointwise_lost,
    shape_of,
)

# Operations that hand on ids as they are, if only in another shape.
_ID_VIEWS = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze to long int contiguous clone detach type".split()
)


def find_roots(gm: GraphModule, inputs: dict[Node, Any], config: QuantConfig) -> dict[Node, Fact]:
    """The nodes where tokens come in (embeddings or arguments), each with its fact; empty if there are none."""
    sizes = Sizes(gm)
    lookups = _vocabulary_lookups(gm, config)
    hidden = _hidden_states(gm, inputs)
    if lookups and not (hidden is not None and _is_beside(gm, hidden.node, lookups[0], config)):
        written = {written_by(n) for n in gm.graph.nodes}
        entries: dict[Node, Fact] = {}
        roots: dict[Node, Root] = {}
        for lookup, _, ids in lookups:
            path = _ids_path(ids, written)
            origin = path[0]
            # Ids that are written in place may differ from one look-up to the next.
            key = lookup if origin in written else origin
            if key not in roots:
                roots[key] = Root(origin, True, tuple(Axis(s) for s in shape_of(origin)))
            entries[lookup] = _through(path, roots[key], sizes)
        return entries
    return {} if hidden is None else _hidden_entries(gm, hidden, sizes)


def _hidden_entries(gm: GraphModule, hidden: Root, sizes: Sizes) -> dict[Node, Fact]:
    if not sizes.can_tell([axis.size for axis in hidden.axes]):
        return {hidden.node: Lost("how many tokens there are is not known before the graph runs")}
    written_in = merge_sources(gm)
    beside = [
        node
        for node in gm.graph.nodes
        if node.op == "placeholder" and node not in written_in and _is_like(node, hidden)
    ]
    hidden.holders = (hidden.node, *(n for n in beside if n is not hidden.node))
    return {node: _entry(hidden, node) for node in hidden.holders}


def _entry(root: Root, node: Node) -> TokenFact:
    """The fact of an argument whose leading dimensions are the root's."""
    expr = TypeExpr("tokens", (root,), root.axes)
    features = len(shape_of(node)) - len(root.axes)
    return TokenFact(expr, layout_of_axes(root.axes) + ((),) * features)


def _through(path: list[Node], root: Root, sizes: Sizes) -> Fact:
    """The fact of an embedding whose indices are views of ids."""
    if not sizes.can_tell(shape_of(root.node)):
        return Lost("how many tokens there are is not known before the graph runs")
    expr = TypeExpr("tokens", (root,), root.axes)
    known: dict[Any, Fact] = {path[0]: TokenFact(expr, layout_of_axes(root.axes))}
    for node in path[1:]:
        known[node] = RULES[op_name(node)](node, known.get)
    fact = known[path[-1]]
    return TokenFact(fact.expr, (*fact.layout, ())) if isinstance(fact, TokenFact) else fact


def _ids_path(ids: Node, written: set[Any]) -> list[Node]:
    """Ids and their views, from the origin to the node that the embedding reads."""
    path = [ids]
    while (
        ids.op in ("call_function", "call_method")
        and op_name(ids) in _ID_VIEWS & RULES.keys()
        and isinstance(ids.args[0], Node)
        and ids not in written
    ):
        ids = ids.args[0]
        path.insert(0, ids)
    return path


def same_ids(a: Node, b: Node) -> bool:
    """True if two nodes hold the same ids, if only in another shape."""
    return _ids_path(a, set())[0] is _ids_path(b, set())[0]


# ---------------------------------------------------------------------------------------------- ids


def _vocabulary_lookups(gm: GraphModule, config: QuantConfig) -> list[tuple[Node, Node, Node]]:
    """(embedding, table, ids) of every look-up in the vocabulary's table."""
    found: list[tuple[Node, Node, Node]] = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or op_name(node) != "embedding":
            continue
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)][:2]
        table = next((a for a in operands if value_of(a).is_floating_point()), None)
        ids = next((a for a in operands if not value_of(a).is_floating_point()), None)
        if table is not None and ids is not None and comes_from_caller(ids):
            found.append((node, table, ids))
    independent = [lookup for lookup in found if not _is_counted_from_ids(lookup, found)]
    if not independent:
        return []
    best = max(independent, key=lambda lookup: _vocabulary_rank(lookup, config))[1]
    return [lookup for lookup in independent if lookup[1] is best]


def _is_counted_from_ids(
    lookup: tuple[Node, Node, Node], others: list[tuple[Node, Node, Node]]
) -> bool:
    """True if the indices (positions) are computed from what is looked up in another table."""
    _, table, indices = lookup
    above = ancestors([indices])
    return any(t is not table and _ids_path(i, set())[0] in above for _, t, i in others)


def _vocabulary_rank(lookup: tuple[Node, Node, Node], config: QuantConfig) -> tuple[Any, ...]:
    _, table, ids = lookup
    origin = source_name(_ids_path(ids, set())[0])
    return ("position" not in origin, _holds_declared_ids(table, config), _rows(table))


def _rows(table: Node) -> int:
    return int(shape_of(table)[0])


def _holds_declared_ids(table: Node, config: QuantConfig) -> bool:
    declared = [i for t in config.token_types.types for i in t.token_ids]
    return bool(declared) and _rows(table) > max(declared)


def _is_beside(
    gm: GraphModule, hidden: Node, lookup: tuple[Node, Node, Node], config: QuantConfig
) -> bool:
    """True if hidden states were handed in, and the look-up only adds positions or segments to them."""
    node, table, _ = lookup
    if _holds_declared_ids(table, config):
        return False
    for _, linear in linears_of(gm):
        above = set(_pointwise_above(linear.x))
        if hidden in above or node in above:
            return hidden in above and node in above
    return False


def _pointwise_above(node: Node) -> Iterator[Node]:
    """A value and what it is computed from elementwise, or by a norm over features."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        yield node
        same_shape = RULES.get(op_name(node)) in (pointwise, cast, normalise)
        for above in node.all_input_nodes if same_shape and node.op != "placeholder" else []:
            if above not in seen:
                seen.add(above)
                pending.append(above)


def comes_from_caller(node: Node) -> bool:
    """True if a value depends on an input of the call, not only on buffers and constants."""
    return any(_is_callers(above) for above in ancestors([node]) | {node})


def _is_callers(node: Node) -> bool:
    return node.op == "placeholder" and isinstance(value_of(node), Tensor) and not is_own(node)


def is_own(node: Node) -> bool:
    """True for a parameter or buffer of a module."""
    return "_buffers" in source_name(node) or "_parameters" in source_name(node)


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    seen: set[Node] = set()
    pending = list(nodes)
    while pending:
        for above in pending.pop().all_input_nodes:
            if above not in seen:
                seen.add(above)
                pending.append(above)
    return seen


# ---------------------------------------------------------------------------------------------- hidden states


def _hidden_states(gm: GraphModule, inputs: dict[Node, Any]) -> Root | None:
    """The argument whose tokens the first Linear reads; without one, what a merge writes into or the graph returns."""
    candidates = {n for n in gm.graph.nodes if n.op == "placeholder" and _may_be_hidden(n, inputs)}
    written = merge_sources(gm)
    for node, linear in linears_of(gm):
        if node in written or is_tower_name(linear.name):
            continue
        reaching = [n for n in _tokens_above(linear.x) if n in candidates]
        exact = [n for n in reaching if statically_equal(shape_of(n)[-1], linear.num_features)]
        for candidate in (*exact, *reaching):
            axes = _token_axes(candidate, linear.x)
            if axes is not None:
                return Root(candidate, False, axes)
    if linears_of(gm):
        return None
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    merged = [m[0] for n in gm.graph.nodes if (m := merge_operands(n)) is not None]
    for read in (*merged, *output.all_input_nodes):
        for candidate in _tokens_above(read):
            if candidate in candidates and len(shape_of(candidate)) < 4:
                return Root(candidate, False, _all_but_last(candidate))
    return None


def _may_be_hidden(node: Node, inputs: dict[Node, Any]) -> bool:
    """A floating input of the call, tokens first and features last; no parameter, no buffer."""
    value = value_of(node)
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= 2
        and not isinstance(inputs.get(node), torch.nn.Parameter)
        and not is_own(node)
    )


def _all_but_last(node: Node) -> tuple[Axis, ...]:
    return tuple(Axis(size) for size in shape_of(node)[:-1])


def _token_axes(hidden: Node, x: Node) -> tuple[Axis, ...] | None:
    """The leading dimensions of an argument that are still there in a Linear's activation.

    The others are features: of an attention's output [B, T, heads, size] the Linear reads the heads side by side.
    """
    shape, between = shape_of(hidden), ancestors([x]) | {x}
    for count in reversed(range(1, len(shape))):
        root = Root(hidden, False, tuple(Axis(size) for size in shape[:count]))
        arguments = [n for n in hidden.graph.nodes if n.op == "placeholder" and _is_like(n, root)]
        known: dict[Any, Fact] = {n: _entry(root, n) for n in arguments}
        for node in hidden.graph.nodes:
            if node in between and node.op in ("call_function", "call_method"):
                rule = cast if merge_operands(node) else RULES.get(op_name(node), pointwise_lost)
                known[node] = rule(node, known.get)
        fact = known.get(x)
        if isinstance(fact, TokenFact) and not fact.layout[-1]:
            return root.axes
    # The types will be lost on the way, and the reason told; a picture [B, C, H, W] holds no tokens.
    return _all_but_last(hidden) if len(shape) < 4 else None


def _is_like(node: Node, hidden: Root) -> bool:
    """Hidden states with the same leading dimensions hold the same tokens (a residual)."""
    value, count = value_of(node), len(hidden.axes)
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not is_own(node)
        and value.dim() > count
        and all(statically_equal(s, a.size) for s, a in zip(value.shape, hidden.axes, strict=False))
    )


def _tokens_above(node: Node) -> Iterator[Node]:
    """The nodes a value is computed from, nearest first, leaving out what merges write."""
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop(0)
        yield node
        merge = merge_operands(node)
        for above in node.all_input_nodes if merge is None else [merge[0]]:
            if isinstance(above, Node) and above not in seen:
                seen.add(above)
                pending.append(above)


def merge_operands(node: Node) -> tuple[Any, Any, Any] | None:
    """(old, mask, new) of ``masked_scatter(x, mask, y)``, ``index_put(x, (mask,), y)``, ``x[mask] = y``; or None."""
    name = op_name(node) if node.op in ("call_function", "call_method") else ""
    if name == "masked_scatter":
        old, mask, new = (*node.args, *node.kwargs.values())[:3]
    elif name in ("index_put", "setitem"):
        old, index, new = (*node.args, *node.kwargs.values())[:3]
        items = index if isinstance(index, (tuple, list)) else (index,)
        whole = all(item is Ellipsis or item == slice(None) for item in items[1:])
        mask = items[0] if items and whole else None
    else:
        return None
    mask_value = value_of(mask)
    if not isinstance(mask_value, Tensor) or mask_value.dtype != torch.bool:
        return None
    return old, mask, new


def merge_sources(gm: GraphModule) -> set[Node]:
    """What merges write, and everything it is computed from, if the tokens written into are not."""
    result: set[Node] = set()
    for node in gm.graph.nodes:
        operands = merge_operands(node)
        if operands is None or not isinstance(operands[2], Node):
            continue
        result |= only_above(operands[2], operands[0])
    return result


def only_above(new: Node, old: Node) -> set[Node]:
    """A value and what it is computed from, less what another is computed from as well."""
    return ({new} | ancestors([new])) - ({old} | ancestors([old]))


# ---------------------------------------------------------------------------------------------- first positions


def find_first_positions(gm: GraphModule, facts: Callable[[Any], Fact]) -> None:
    """Settle ``sink_known`` and ``padding`` of every root, from the facts of the finished sweep."""
    known: dict[Root, bool] = {}
    for node in gm.graph.nodes:
        attention = _self_attention(node, facts)
        if attention is None:
            continue
        root, keys_are_the_tokens, mask_inputs = attention
        masks = [n for n in mask_inputs if "attention_mask" in source_name(n)]
        padding = next((n for n in masks if _is_padding_mask(n, root)), None)
        certain = keys_are_the_tokens and (padding is not None or not mask_inputs)
        known[root] = certain and known.get(root, True)
        root.padding = padding or root.padding
    for root, certain in known.items():
        root.sink_known = certain


def _self_attention(
    node: Node, facts: Callable[[Any], Fact]
) -> tuple[Root, bool, set[Node]] | None:
    """The root whose tokens attend, whether the keys are just these tokens, and what the caller gave for the mask."""
    name = op_name(node) if node.op in ("call_function", "call_method") else ""
    if name in ("scaled_dot_product_attention", "flex_attention"):
        parts = [argument(node, i, n) for i, n in enumerate(("query", "key", "value"))]
        fact, key_fact, key_dim = facts(parts[0]), facts(parts[1]), -2
        others = [n for n in node.all_input_nodes if n not in parts]
    elif name in ("softmax", "_softmax"):
        scores, others = _scores(node)
        if scores is None:
            return None
        fact, key_fact, key_dim = facts(scores.args[0]), facts(scores.args[1]), -1
    else:
        return None
    if not isinstance(fact, TokenFact) or key_fact is None:
        return None  # not our tokens, or attention to something else
    (root, *more) = roots_of(fact.expr)
    keys_are_the_tokens = False
    if isinstance(key_fact, TokenFact):
        more += [r for r in roots_of(key_fact.expr) if r is not root]
        keys_are_the_tokens = key_fact.layout[key_dim] == fact.layout[-2]
    return None if more else (root, keys_are_the_tokens, _callers(others))


def _scores(softmax: Node) -> tuple[Node | None, list[Node]]:
    """The product of queries and keys that a softmax normalises, if any, and what was done to it on the way."""
    node: Any = softmax.args[0]
    others: list[Node] = []
    while isinstance(node, Node) and node.op in ("call_function", "call_method"):
        if op_name(node) in ("matmul", "bmm"):
            return node, others
        if RULES.get(op_name(node)) is not pointwise or not node.args:
            break
        inner = node.args[1] if op_name(node) == "where" else node.args[0]
        others += [n for n in node.all_input_nodes if n is not inner]
        node = inner
    return None, others


def _callers(nodes: Iterable[Node]) -> set[Node]:
    nodes = list(nodes)
    return {n for n in ancestors(nodes) | set(nodes) if _is_callers(n)}


def _is_padding_mask(node: Node, root: Root) -> bool:
    value = value_of(node)
    axes = root.axes
    return (
        not value.is_floating_point()
        and value.dim() == len(axes)
        and statically_equal(value.shape[-1], axes[-1].size)
    )
