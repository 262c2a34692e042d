"""Find out the token types of every Linear's input.

Types come from a *root*, where tokens enter the graph, and from *merges*, which overwrite some of them::

    ids ----------------- embedding -- x [B, T, H]        root: the indices of the vocabulary's embedding;
     |                                 |                  ids that are declared token ids have their type
     +-- eq 500 -- unsqueeze -- masked_scatter(x, mask, vision) -- y
                                       |                  merge: y's tokens under the mask are "vision"
                    norm, q_proj, view, transpose, attention, ...   token_rules, one rule per operation

Order of precedence: explicit (``freeact_fx.token_types``) over the sink over merges over declared ids over the default;
the first two are applied when the tensor is made (``insert``). A graph without ids (cut off by a graph break, or called
with ``inputs_embeds``) has its hidden states as root: their types are handed in at run time.

After this pass every Linear that is not refused has one of three states: *typed*, with a recipe for its type tensor;
*default*, no source in sight; *refused*, types were lost or contradict each other: it runs untyped. Linears that
compute what is merged in (a vision tower) are left alone unless ``QuantConfig.vision_tower``.

Nothing is edited: facts first, then ``insert``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from freeact_fx.config import QuantConfig
from freeact_fx.eligibility import TOWER_REASON, is_tower_name, matches
from freeact_fx.token_types import TokenTypes

from .layouts import layout_of_axes
from .node_facts import (
    TOKENS_KEY,
    Axis,
    Fact,
    Layout,
    Lost,
    Root,
    TokenFact,
    TypeExpr,
    is_in_place,
    linears_of,
    op_name,
    qualified_name,
    source_name,
    statically_equal,
    value_of,
)
from .token_rules import RULES, pointwise_lost, refines, shape_of

ROOT_KEY = "freeact_root"
SINK_KEY = "freeact_sink_known"

_MASK_VIEWS = frozenset(
    "unsqueeze expand expand_as to bool view reshape contiguous clone squeeze type broadcast_to".split()
)


def annotate_token_types(
    gm: GraphModule, *, inputs: dict[Node, Any], config: QuantConfig
) -> GraphModule:
    """Hang a fact on every node that holds tokens and settle the state of every Linear."""
    root = _find_root(gm, inputs)
    gm.meta[ROOT_KEY] = root
    sweep = _Sweep(gm, root, config.token_types)
    sweep.run()
    sink = config.sink_index is not None and root is not None and sink_is_known(gm, root)
    gm.meta[SINK_KEY] = sink
    tower = _ancestors(sweep.merged)
    for node, linear in linears_of(gm):
        fact = sweep.arms.get(node) or sweep.facts(linear.x)
        dataflow_tower = node in tower
        if dataflow_tower or (fact is None and is_tower_name(linear.name)):
            linear.type_source = "none: " + (
                "feeds a merge" if dataflow_tower else "its name says that it is an encoder's"
            )
            if not (
                config.vision_tower or matches(linear.name, config.include) or linear.converted
            ):
                linear.refusal = linear.refusal or TOWER_REASON
        elif isinstance(fact, TokenFact) and fact.layout and not fact.layout[-1]:
            linear.types = fact
            claims = describe(fact.expr, config.token_types)
            claims += ["first position"] if sink and _from_root(fact.expr) else []
            linear.state = "typed" if claims else "default"
            linear.type_source = "; ".join(claims) or _default_source(root, config)
        elif isinstance(fact, (TokenFact, Lost)):
            linear.state = "refused"
            linear.type_source = (
                fact.reason if isinstance(fact, Lost) else "its features hold a token dimension"
            )
        else:
            linear.type_source = f"default: no tokens in sight ({config.type_names[0]})"
    gm.graph.lint()
    return gm


def _default_source(root: Root | None, config: QuantConfig) -> str:
    name = config.type_names[0]
    if root is None or root.is_ids:
        return f"default: {name}"
    return f"default: {name}, unless token_types() or an earlier graph says otherwise"


def _from_root(expr: TypeExpr) -> bool:
    while expr.op != "tokens":
        if expr.op not in ("merge", "slice", "select"):
            return False
        expr = expr.args[0]
    return True


def describe(expr: TypeExpr, token_types: TokenTypes) -> list[str]:
    """The sources behind a recipe, in words, first to last; empty if there is none."""
    if expr.op == "tokens":
        root: Root = expr.args[0]
        ids = [i for t in token_types.types for i in t.token_ids]
        if not root.is_ids or not ids:
            return []
        return [f"{qualified_name(root.node)} == {' | '.join(map(str, ids))}"]
    if expr.op == "merge":
        previous, _, _, index, _, source = expr.args
        return [*describe(previous, token_types), f"{source} -> {token_types.types[index].name}"]
    if expr.op == "constant":
        return [f"{token_types.types[expr.args[1]].name}: arm of a where on {expr.args[2]}"]
    if expr.op == "cat":
        return [c for part in expr.args[1:] for c in describe(part, token_types)]
    return describe(expr.args[0], token_types)


# ---------------------------------------------------------------------------------------------- roots


def _find_root(gm: GraphModule, inputs: dict[Node, Any]) -> Root | None:
    """The indices of the vocabulary's embedding; without one, the hidden states that the first Linear reads.

    The vocabulary's embedding is the one with the most rows among those whose indices come from the caller: tables of
    positions and segments are smaller, and their indices are usually buffers.
    """
    found: list[tuple[int, Node]] = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or op_name(node) != "embedding":
            continue
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)][:2]
        table = next((a for a in operands if value_of(a).is_floating_point()), None)
        ids = next((a for a in operands if not value_of(a).is_floating_point()), None)
        if table is not None and ids is not None and _comes_from_caller(ids):
            found.append((int(value_of(table).shape[0]), ids))
    if found:
        ids = max(found, key=lambda pair: pair[0])[1]
        return Root(ids, True, tuple(Axis(s) for s in shape_of(ids)))
    candidates = [n for n in gm.graph.nodes if n.op == "placeholder" and _is_hidden(n, inputs)]
    for _, linear in linears_of(gm):
        above = _ancestors([linear.x]) | {linear.x}
        reaching = [n for n in candidates if n in above]
        exact = [n for n in reaching if statically_equal(shape_of(n)[-1], linear.num_features)]
        if reaching:
            return _hidden_root((exact or reaching)[0])
    merges = [
        n for n in gm.graph.nodes if op_name(n) == "masked_scatter" and n.args[0] in candidates
    ]
    return _hidden_root(merges[0].args[0]) if merges else None


def _hidden_root(node: Node) -> Root:
    return Root(node, False, tuple(Axis(s) for s in shape_of(node)[:-1]))


def _comes_from_caller(node: Node) -> bool:
    """True if a value depends on an input of the call, not only on buffers and constants."""
    for above in _ancestors([node]) | {node}:
        is_tensor = above.op == "placeholder" and isinstance(value_of(above), Tensor)
        if is_tensor and not _is_buffer_name(above):
            return True
    return False


def _is_buffer_name(node: Node) -> bool:
    return "_buffers" in source_name(node) or "_parameters" in source_name(node)


def _is_hidden(node: Node, inputs: dict[Node, Any]) -> bool:
    """A floating input [..., T, H] of the call with one or two token dimensions; no parameter, no buffer."""
    value = value_of(node)
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() in (2, 3)
        and not isinstance(inputs.get(node), torch.nn.Parameter)
        and not _is_buffer_name(node)
    )


def sink_is_known(gm: GraphModule, root: Root) -> bool:
    """True if row 0 of the tokens is the first position of the sequence: no cache precedes it.

    A cache shows in attention with more keys than queries. A graph without attention tells nothing unless it has the
    ids.
    """
    seen = False
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = op_name(node)
        if name == "scaled_dot_product_attention":
            query, key = shape_of(node.args[0]), shape_of(node.args[1])
            if _in_tower(query, root):
                continue
            seen = True
            if not statically_equal(query[-2], key[-2]):
                return False
        elif name in ("softmax", "_softmax"):
            shape = shape_of(node)
            if len(shape) >= 3:
                seen = True
                if not statically_equal(shape[-1], shape[-2]):
                    return False
    return seen or root.is_ids


def _in_tower(query: tuple[Any, ...], root: Root) -> bool:
    """Attention over something else than the root's tokens (a vision tower's) says nothing about them."""
    return not any(statically_equal(query[-2], axis.size) for axis in root.axes)


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    seen: set[Node] = set()
    pending = list(nodes)
    while pending:
        for above in pending.pop().all_input_nodes:
            if above not in seen:
                seen.add(above)
                pending.append(above)
    return seen


# ---------------------------------------------------------------------------------------------- the sweep


class _Sweep:
    """One pass over the graph in order; ``facts`` of a node are settled when it has been visited."""

    def __init__(self, gm: GraphModule, root: Root | None, token_types: TokenTypes) -> None:
        self.gm, self.root, self.token_types = gm, root, token_types
        self.known: dict[Node, Fact] = {}
        self.merged: list[Node] = []  # what merges write
        self.arms: dict[Node, TokenFact] = {}  # Linears in one arm of a where on a type mask

    def facts(self, node: Any) -> Fact:
        return self.known.get(node) if isinstance(node, Node) else None

    def run(self) -> None:
        for node in self.gm.graph.nodes:
            fact = self._visit(node)
            self.known[node] = fact
            if fact is not None:
                node.meta[TOKENS_KEY] = fact

    def _visit(self, node: Node) -> Fact:
        root = self.root
        if node.op == "placeholder":
            if root is not None and not root.is_ids and self._like_root(node):
                return self._root_fact()
            return None
        if node.op not in ("call_function", "call_method"):
            return None
        name = op_name(node)
        if name == "embedding" and root is not None and root.is_ids and root.node in node.args:
            return self._root_fact()
        if name in ("masked_scatter", "index_put", "setitem", "where"):
            handled, fact = self._merge(node, name)
            if handled:
                if is_in_place(node) and isinstance(node.args[0], Node):
                    # Later readers of the tensor that was written see the new types.
                    self.known[node.args[0]] = fact
                    if fact is not None:
                        node.args[0].meta[TOKENS_KEY] = fact
                return fact
        if not _is_floating(value_of(node)):
            return None
        return RULES.get(name, pointwise_lost)(node, self.facts)

    def _like_root(self, node: Node) -> bool:
        """Hidden states handed in beside the root (a residual) hold the same tokens."""
        assert self.root is not None
        a, b = shape_of(node), shape_of(self.root.node)
        if _is_buffer_name(node) or not _is_floating(value_of(node)):
            return False
        return len(a) == len(b) and all(statically_equal(x, y) for x, y in zip(a, b, strict=True))

    def _root_fact(self) -> TokenFact:
        assert self.root is not None
        expr = TypeExpr("tokens", (self.root,), self.root.axes)
        return TokenFact(expr, (*layout_of_axes(self.root.axes), ()))

    def _merge(self, node: Node, name: str) -> tuple[bool, Fact]:
        """``masked_scatter(x, mask, y)``, ``where(mask, y, x)``, ``index_put(x, (mask,), y)``, ``x[mask] = y``."""
        if name == "where":
            if len(node.args) < 3:
                return False, None
            mask, new, old = node.args[:3]
        elif name == "masked_scatter":
            old, mask, new = (*node.args, *node.kwargs.values())[:3]
        else:
            old, index, new = node.args[:3]
            mask = index[0] if isinstance(index, (tuple, list)) and len(index) == 1 else index
        if not isinstance(mask, Node) or not isinstance(old, Node):
            return False, None
        mask_value, result = value_of(mask), value_of(old)
        if not isinstance(mask_value, Tensor) or mask_value.dtype != torch.bool:
            return False, None
        if not _is_floating(result):
            return False, None
        before = self.facts(old)
        origin, negated = _mask_origin(mask)
        if name == "where":
            if isinstance(before, TokenFact) and isinstance(self.facts(new), TokenFact):
                return self._arms(node, origin, negated, new, old)
            if isinstance(self.facts(new), TokenFact) and before is None:
                # where(text_mask, text, vision): the merge seen from the other side.
                new, old, before, negated = old, new, self.facts(new), not negated
            if not isinstance(new, Node) or before is None or not self._shows_types(origin):
                return False, None  # a padding mask or the like: an ordinary pointwise operation
        if before is None and self.root is not None and self.root.is_ids:
            before = self._buffer_fact(old)
        if not isinstance(before, TokenFact):
            return before is not None, before
        if isinstance(self.facts(new), TokenFact) and name != "where":
            return True, Lost(f"{name} ({node.name}) writes tokens over tokens")
        index, source = self._type_of_mask(origin, negated)
        if index is None:
            return True, Lost(f"{name} ({node.name}): {source}")
        if isinstance(new, Node):
            self.merged.append(new)
        layout = _mask_layout(mask, before.layout, aligned_left=name in ("index_put", "setitem"))
        if layout is None:
            return True, Lost(f"{name} ({node.name}): its mask does not line up with the tokens")
        if self._already_claimed(before.expr, origin, negated, index):
            return True, before
        arguments = (before.expr, mask, layout, index, negated, f"{source} -> {name}")
        return True, TokenFact(TypeExpr("merge", arguments, before.expr.axes), before.layout)

    def _buffer_fact(self, node: Node) -> Fact:
        """An untyped buffer [B, T, H] that merges are written into holds the root's tokens."""
        root_fact = self._root_fact()
        a = shape_of(node)[:-1]
        b = tuple(axis.size for axis in root_fact.expr.axes)
        if len(a) == len(b) and all(statically_equal(x, y) for x, y in zip(a, b, strict=True)):
            return root_fact
        return None

    def _shows_types(self, origin: Node) -> bool:
        """True for a comparison of ids with a declared or, where any merge counts, with any id; or for a bool input."""
        if op_name(origin) in ("eq", "ne") and self._compares_ids(origin):
            return True
        return origin.op == "placeholder" and self.token_types.merge_index is not None

    def _compares_ids(self, origin: Node) -> bool:
        return isinstance(_compared_id(origin), int) and not _is_floating(value_of(origin.args[0]))

    def _type_of_mask(self, origin: Node, negated: bool) -> tuple[int | None, str]:
        token_id = _compared_id(origin)
        ids = [token_id] if isinstance(token_id, int) else []
        if op_name(origin) in ("or", "bitwise_or", "__or__", "logical_or", "or_"):
            ids = [_compared_id(_mask_origin(a)[0]) for a in origin.args if isinstance(a, Node)]
        if ids and all(isinstance(i, int) for i in ids):
            text = " | ".join(f"eq({qualified_name(origin.all_input_nodes[0])}, {i})" for i in ids)
            claimed = {self.token_types.index_of_id(i) for i in ids}
            if claimed == {None} and self.token_types.merge_index is not None:
                return self.token_types.merge_index, text
            if len(claimed) == 1 and None not in claimed:
                return claimed.pop(), text
            return None, f"{text}: no one token type claims these ids; declare them in TokenTypes"
        text = qualified_name(origin) if origin.op == "placeholder" else f"mask {origin.name}"
        if self.token_types.merge_index is None:
            return None, f"{text} is a bool mask and no token type has merge=True"
        return self.token_types.merge_index, text

    def _already_claimed(self, expr: TypeExpr, origin: Node, negated: bool, index: int) -> bool:
        """True if the merge's ids are declared and the root compares them already."""
        root = self.root
        return (
            root is not None
            and root.is_ids
            and not negated
            and expr.op in ("tokens", "merge")
            and isinstance(_compared_id(origin), int)
            and origin.args[0] is root.node
            and self.token_types.index_of_id(_compared_id(origin)) == index  # type: ignore[arg-type]
        )

    def _arms(
        self, node: Node, origin: Node, negated: bool, new: Node, old: Node
    ) -> tuple[bool, Fact]:
        """``where(mask, vision(x), text(x))``: a Linear that feeds one arm only has that arm's type."""
        facts = self.facts(new), self.facts(old)
        assert isinstance(facts[0], TokenFact)
        assert isinstance(facts[1], TokenFact)
        if not self._shows_types(origin):
            return False, None
        index, source = self._type_of_mask(origin, negated)
        if index is None:
            return True, Lost(f"where ({node.name}): {source}")
        if negated:
            new, old = old, new
        others = [i for i in range(len(self.token_types.types)) if i != index]
        arms = [(new, index)] + [(old, others[0])] * (len(others) == 1)
        for arm, arm_type in arms:
            fact = self.facts(arm)
            for inside in _exclusive(arm, node):
                linear_fact = self.facts(inside.args[0]) if inside.args else None
                if op_name(inside) == "linear" and isinstance(linear_fact, TokenFact):
                    expr = TypeExpr(
                        "constant", (linear_fact.expr, arm_type, source), linear_fact.expr.axes
                    )
                    self.arms[inside] = TokenFact(expr, linear_fact.layout)
            assert fact is not None
        a, b = facts
        if a.layout == b.layout and (refines(a.expr, b.expr) or refines(b.expr, a.expr)):
            return True, a if refines(a.expr, b.expr) else b
        return True, Lost(f"two arms of where ({node.name}) have conflicting token types")


def _is_floating(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_floating(v) for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def _mask_origin(mask: Node) -> tuple[Node, bool]:
    """Follow views and negations back to what a mask is made of."""
    negated = False
    while (
        mask.op in ("call_function", "call_method") and mask.args and isinstance(mask.args[0], Node)
    ):
        name = op_name(mask)
        if name in ("logical_not", "bitwise_not", "invert", "__invert__"):
            negated = not negated
        elif name == "getitem":
            index = mask.args[1] if isinstance(mask.args[1], tuple) else (mask.args[1],)
            if any(i is not None and i is not Ellipsis and i != slice(None) for i in index):
                break
        elif name not in _MASK_VIEWS:
            break
        mask = mask.args[0]
    if op_name(mask) == "ne":
        negated = not negated
    return mask, negated


def _compared_id(origin: Node) -> int | None:
    """The constant that ids are compared with (eq or ne), or None."""
    if origin.op not in ("call_function", "call_method") or op_name(origin) not in (
        "eq",
        "ne",
        "__eq__",
        "__ne__",
    ):
        return None
    value = origin.args[1] if len(origin.args) > 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _mask_layout(mask: Node, layout: Layout, *, aligned_left: bool) -> Layout | None:
    """The layout of a mask that is laid over a tensor; None if a token dimension is one of its several axes."""
    rank = len(shape_of(mask))
    if aligned_left:
        cut = layout[:rank]
    else:
        if rank > len(layout):
            return None
        cut = layout[len(layout) - rank :]
    if any(len(axes) > 1 for axes in cut):
        return None
    return cut


def _exclusive(arm: Node, where: Node) -> set[Node]:
    """Nodes all of whose results reach one arm of a ``where`` and nothing else."""
    if set(arm.users) != {where}:
        return set()
    inside = {arm}
    pending = list(arm.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in inside and node.op != "placeholder" and set(node.users) <= inside:
            inside.add(node)
            pending += node.all_input_nodes
    return inside
