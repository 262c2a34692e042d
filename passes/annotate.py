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

from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from freeact_fx.config import QuantConfig
from freeact_fx.eligibility import is_tower_name, matches
from freeact_fx.reasons import reason
from freeact_fx.token_types import TokenTypes

from .layouts import is_one, layout_of_axes
from .node_facts import (
    TOKENS_KEY,
    Fact,
    Layout,
    Lost,
    Root,
    TokenFact,
    TypeExpr,
    input_name,
    linears_of,
    op_name,
    qualified_name,
    roots_of,
    statically_equal,
    value_of,
    written_by,
)
from .roots import (
    comes_from_caller,
    find_first_positions,
    find_roots,
    merge_operands,
    only_above,
    same_ids,
)
from .token_rules import RULES, assign, pointwise_lost, refines, shape_of

# Ends the source of types that no one graph can tell; a call knows more (``Runner``).
FROM_OUTSIDE = "otherwise as token_types() or an earlier graph says"

_MASK_VIEWS = frozenset(
    "unsqueeze expand expand_as to bool view reshape contiguous clone squeeze type broadcast_to".split()
)
# Operations whose result shares memory with their first argument.
_VIEWS = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze transpose permute t swapaxes swapdims expand expand_as "
    "broadcast_to getitem select slice narrow chunk split unbind detach alias".split()
)


def annotate_token_types(
    gm: GraphModule, *, inputs: dict[Node, Any], config: QuantConfig
) -> GraphModule:
    """Hang a fact on every node that holds tokens and settle the state of every Linear."""
    sweep = _Sweep(gm, find_roots(gm, inputs, config), config.token_types)
    sweep.run()
    find_first_positions(gm, sweep.facts)
    for node, linear in linears_of(gm):
        fact = sweep.arms.get(node) or sweep.facts(linear.x)
        feeds_merge = node in sweep.tower
        if feeds_merge or (fact is None and is_tower_name(linear.name)):
            linear.type_source = "none: " + (
                "feeds a merge" if feeds_merge else "its name says that it is an encoder's"
            )
            if not (
                config.vision_tower or matches(linear.name, config.include) or linear.converted
            ):
                linear.refusal = linear.refusal or reason("tower")
        elif isinstance(fact, TokenFact) and fact.layout and not fact.layout[-1]:
            linear.types = fact
            claims = claims_of(fact.expr, config)
            linear.state = "typed" if claims else "default"
            linear.type_source = _source(claims, fact.expr, config)
        elif isinstance(fact, (TokenFact, Lost)):
            linear.state = "refused"
            linear.type_source = (
                fact.reason if isinstance(fact, Lost) else "its features hold a token dimension"
            )
        else:
            linear.type_source = f"default: no tokens in sight ({config.type_names[0]})"
    gm.graph.lint()
    return gm


def _source(claims: list[str], expr: TypeExpr, config: QuantConfig) -> str:
    if not claims:
        claims = [f"default: {config.type_names[0]}"]
    if not all(root.is_ids for root in roots_of(expr)):
        claims = [*claims, FROM_OUTSIDE]
    return "; ".join(claims)


def claims_of(expr: TypeExpr, config: QuantConfig) -> list[str]:
    """What a graph itself says about the types of some tokens; of two claims about one token the later wins."""
    claims = describe(expr, config.token_types)
    if config.sink is not None and any(r.sink_known for r in roots_of(expr)):
        claims.append("first position")
    return claims


def describe(expr: TypeExpr, token_types: TokenTypes) -> list[str]:
    """The sources behind a recipe, in words, first to last; empty if there is none."""
    if expr.op == "tokens":
        root: Root = expr.args[0]
        name = input_name(root.node, "ids")
        return [
            f"{name} == {' | '.join(map(str, t.token_ids))} -> {t.name}"
            for t in token_types.types
            if root.is_ids and t.token_ids
        ]
    if expr.op == "merge":
        previous, _, _, index, _, source, _ = expr.args
        return [*describe(previous, token_types), f"{source} -> {token_types.types[index].name}"]
    if expr.op == "constant":
        return [f"{expr.args[2]} -> arm of where -> {token_types.types[expr.args[1]].name}"]
    if expr.op == "cat":
        return [c for part in expr.args[1:] for c in describe(part, token_types)]
    return describe(expr.args[0], token_types)


# ---------------------------------------------------------------------------------------------- the sweep


class _Sweep:
    """One pass over the graph in order; ``facts`` of a node are settled when it has been visited."""

    def __init__(self, gm: GraphModule, entries: dict[Node, Fact], token_types: TokenTypes) -> None:
        self.gm, self.entries, self.token_types = gm, entries, token_types
        self.known: dict[Node, Fact] = {}
        self.tower: set[Node] = set()  # what computes the values that merges write
        self.arms: dict[Node, TokenFact] = {}  # Linears in one arm of a where on a type mask

    def facts(self, node: Any) -> Fact:
        return self.known.get(node) if isinstance(node, Node) else None

    def run(self) -> None:
        for node in self.gm.graph.nodes:
            fact = self._visit(node)
            self._settle(node, fact)
            target = written_by(node)
            if target is not None:
                self._write(target, fact)

    def _settle(self, node: Node, fact: Fact) -> None:
        self.known[node] = fact
        node.meta.pop(TOKENS_KEY, None)
        if fact is not None:
            node.meta[TOKENS_KEY] = fact

    def _write(self, target: Node, fact: Fact) -> None:
        """Later readers of a tensor that was written in place see the new types; so do those of its base."""
        if not _is_floating(value_of(target)) or fact == self.known.get(target):
            return
        self._settle(target, fact)
        while op_name(target) in _VIEWS and isinstance(target.args[0], Node):
            target = target.args[0]
            self._settle(target, Lost(f"tokens are written through a view of {target.name}"))

    def _visit(self, node: Node) -> Fact:
        if node in self.entries:
            return self.entries[node]
        if node.op not in ("call_function", "call_method"):
            return None
        handled, fact = self._merge(node)
        if handled:
            return fact
        name = op_name(node)
        if name == "setitem":
            return assign(node, self.facts)
        if not _is_floating(value_of(node)):
            return None
        return RULES.get(name, pointwise_lost)(node, self.facts)

    def _merge(self, node: Node) -> tuple[bool, Fact]:
        """``masked_scatter(x, mask, y)``, ``index_put(x, (mask,), y)``, ``x[mask] = y``, ``where(mask, y, x)``."""
        name = op_name(node)
        operands = merge_operands(node)
        if operands is None and name == "where" and len(node.args) == 3:
            return self._where(node)
        if operands is None or not _is_floating(value_of(operands[0])):
            return False, None
        old, mask, new = operands
        own = self.facts(old)
        before = own or self._buffer_fact(old)
        if before is None and self.facts(new) is not None:
            return True, Lost(f"{name} ({node.name}) puts tokens into a tensor without")
        if not isinstance(before, TokenFact):
            return True, before
        if _is_constant(new) or node.kwargs.get("accumulate") or True in node.args[3:]:
            return True, before
        if isinstance(self.facts(new), TokenFact):
            return True, Lost(f"{name} ({node.name}) writes tokens over tokens")
        fact = self._merged(node, before, mask, old, new, where_true=True)
        # Filling a buffer with the other tokens, those whose ids the mask does not name.
        return True, before if own is None and isinstance(fact, Lost) else fact

    def _where(self, node: Node) -> tuple[bool, Fact]:
        """A merge if the mask shows types and one arm holds the tokens; two arms of tokens are modality experts."""
        mask, new, old = node.args
        if not all(isinstance(a, Node) and _is_floating(value_of(a)) for a in (new, old)):
            return False, None
        assert isinstance(mask, Node)
        assert isinstance(new, Node)
        assert isinstance(old, Node)
        shows_types = self._shows_types(_mask_origin(mask).node)
        where_true = not isinstance(self.facts(new), TokenFact)
        if not where_true:
            if isinstance(self.facts(old), TokenFact):
                return self._arms(node, mask, new, old) if shows_types else (False, None)
            # where(text_mask, text, vision): the merge seen from the other side.
            new, old = old, new
        before = self.facts(old) or (self._buffer_fact(old) if shows_types else None)
        if not isinstance(before, TokenFact) or self.facts(new) is not None or _is_constant(new):
            return False, None
        if shows_types:
            return True, self._merged(node, before, mask, old, new, where_true=where_true)
        if _has_own_tokens(new, before):
            return True, Lost(
                f"where ({node.name}) replaces tokens under a mask that shows no type"
            )
        return False, None  # a padding mask or the like: an ordinary pointwise operation

    def _merged(
        self, node: Node, before: TokenFact, mask: Node, old: Node, new: Any, *, where_true: bool
    ) -> Fact:
        """The types after ``new`` was written where the mask is true (or where it is false)."""
        name, origin = op_name(node), _mask_origin(mask)
        self.tower |= only_above(new, old)
        index, source, named = self._type_of_mask(origin.node)
        if _compared_ids(origin.node) and origin.negated == where_true:
            index, source = None, f"{source}: written where the ids are others"
        if index is None:
            return Lost(f"{name} ({node.name}): {source}")
        layout = _mask_layout(mask, before, aligned_left=name in ("index_put", "setitem"))
        if layout is None:
            return Lost(f"{name} ({node.name}): its mask does not line up with the tokens")
        if not origin.moved and self._already_claimed(before.expr, origin.node, index):
            return before
        chain = " -> ".join((source, *origin.path, name))
        arguments = (before.expr, mask, layout, index, not where_true, chain, named)
        return TokenFact(TypeExpr("merge", arguments, before.expr.axes), before.layout)

    def _buffer_fact(self, node: Node) -> Fact:
        """An untyped buffer [B, T, H] that merges are written into holds the tokens of the ids."""
        for fact in self.entries.values():
            if not isinstance(fact, TokenFact) or not roots_of(fact.expr)[0].is_ids:
                continue
            expr = fact.expr
            sizes = [axis.size for axis in expr.axes]
            given = shape_of(node)[:-1]
            if len(given) == len(sizes) and all(map(statically_equal, given, sizes)):
                return TokenFact(expr, (*layout_of_axes(expr.axes), ()))
        return None

    def _shows_types(self, origin: Node) -> bool:
        """True for a comparison of ids with numbers, and for a bool input if any merge counts."""
        if _compared_ids(origin):
            return True
        return origin.op == "placeholder" and self.token_types.merge_index is not None

    def _type_of_mask(self, origin: Node) -> tuple[int | None, str, bool]:
        """The type that a merge under a mask makes, the mask in words, and True if its ids are declared."""
        ids = _compared_ids(origin)
        if ids:
            comparison = "ne" if op_name(origin) in ("ne", "__ne__") else "eq"
            text = " | ".join(f"{comparison}({qualified_name(node)}, {i})" for node, i in ids)
            claimed = {self.token_types.index_of_id(i) for _, i in ids}
            if claimed == {None} and self.token_types.merge_index is not None:
                return self.token_types.merge_index, text, False
            if len(claimed) == 1 and None not in claimed:
                return claimed.pop(), text, True
            reason = f"{text}: no one token type claims these ids; declare them in TokenTypes"
            return None, reason, False
        text = f"mask {origin.name}"
        if origin.op == "placeholder":
            text = input_name(origin, "a mask of an earlier graph")
        if self.token_types.merge_index is None:
            return None, f"{text} is a bool mask and no token type has merge=True", False
        return self.token_types.merge_index, text, False

    def _already_claimed(self, expr: TypeExpr, origin: Node, index: int) -> bool:
        """True if the merge's ids are declared and the root compares them already."""
        ids = _compared_ids(origin)
        return bool(ids) and all(
            self.token_types.index_of_id(token_id) == index
            and all(root.is_ids and same_ids(node, root.node) for root in roots_of(expr))
            for node, token_id in ids
        )

    def _arms(self, node: Node, mask: Node, new: Node, old: Node) -> tuple[bool, Fact]:
        """``where(mask, vision(x), text(x))``: a Linear that feeds one arm only has that arm's type."""
        a, b = self.facts(new), self.facts(old)
        assert isinstance(a, TokenFact)
        assert isinstance(b, TokenFact)
        origin = _mask_origin(mask)
        index, source, _ = self._type_of_mask(origin.node)
        if index is None:
            return True, Lost(f"where ({node.name}): {source}")
        if origin.negated:
            new, old = old, new
        others = [i for i in range(len(self.token_types.types)) if i != index]
        arms = [(new, index)] + [(old, others[0])] * (len(others) == 1)
        for arm, arm_type in arms:
            for inside in _exclusive(arm, node):
                linear_fact = self.facts(inside.args[0]) if inside.args else None
                if op_name(inside) == "linear" and isinstance(linear_fact, TokenFact):
                    expr = TypeExpr(
                        "constant", (linear_fact.expr, arm_type, source), linear_fact.expr.axes
                    )
                    self.arms[inside] = TokenFact(expr, linear_fact.layout)
        if a.layout == b.layout and (refines(a.expr, b.expr) or refines(b.expr, a.expr)):
            return True, a if refines(a.expr, b.expr) else b
        return True, Lost(f"two arms of where ({node.name}) have conflicting token types")


def _is_floating(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_floating(v) for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()


_CREATIONS = frozenset(
    "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full scalar_tensor".split()
)


def _is_constant(value: Any) -> bool:
    """A number, or a tensor filled with one: writing it replaces no token by another."""
    while isinstance(value, Node) and op_name(value) in _MASK_VIEWS and value.args:
        value = value.args[0]
    if not isinstance(value, Node):
        return True
    return op_name(value) in _CREATIONS or shape_of(value) == ()


def _has_own_tokens(node: Node, fact: TokenFact) -> bool:
    """True if a value from the caller has every token dimension of a fact: it may hold other tokens."""
    shape = shape_of(node)
    rank = len(fact.layout)
    dims = [d - rank for d, axes in enumerate(fact.layout) if axes]
    along = all(-d <= len(shape) and not statically_equal(shape[d], 1) for d in dims)
    return along and comes_from_caller(node)


class _Origin(NamedTuple):
    """What a mask is made of; ``negated``: it is true where that is false; ``moved``: its elements moved; ``path``: the
    operations from there to the mask."""

    node: Node
    negated: bool
    moved: bool
    path: tuple[str, ...]


def _mask_origin(mask: Node) -> _Origin:
    """Follow views, slices and negations back to what a mask is made of."""
    negated = moved = False
    path: list[str] = []
    while (
        mask.op in ("call_function", "call_method") and mask.args and isinstance(mask.args[0], Node)
    ):
        name = op_name(mask)
        if name in ("logical_not", "bitwise_not", "invert", "__invert__"):
            negated = not negated
        elif name in _VIEWS - _MASK_VIEWS:
            moved = moved or not _only_adds_dimensions(mask)
        elif name not in _MASK_VIEWS:
            break
        path.insert(0, name.strip("_"))
        mask = mask.args[0]
    return _Origin(mask, negated != (op_name(mask) in ("ne", "__ne__")), moved, tuple(path))


def _only_adds_dimensions(node: Node) -> bool:
    """True for ``x[..., None]`` and the like."""
    index = node.args[1] if op_name(node) == "getitem" else 0
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)


def _compared_ids(origin: Node) -> list[tuple[Node, int]]:
    """What a mask compares (eq, ne, or an ``or`` of them), each with the number it is compared with; else []."""
    if origin.op not in ("call_function", "call_method") or len(origin.args) < 2:
        return []
    name = op_name(origin)
    if name in ("or", "bitwise_or", "__or__", "logical_or"):
        parts = [_mask_origin(a) for a in origin.args[:2] if isinstance(a, Node)]
        compared = [[] if part.negated else _compared_ids(part.node) for part in parts]
        return [pair for pairs in compared for pair in pairs] if all(compared) else []
    node, value = origin.args[:2]
    if name not in ("eq", "ne", "__eq__", "__ne__") or not isinstance(node, Node):
        return []
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return [(node, value)] if is_number and not _is_floating(value_of(node)) else []  # type: ignore[list-item]


def _mask_layout(mask: Node, fact: TokenFact, *, aligned_left: bool) -> Layout | None:
    """The layout of a mask that is laid over a tensor; None if its dimensions are not whole token axes."""
    rank, layout = len(shape_of(mask)), fact.layout
    if aligned_left:
        cut = layout[:rank]
    else:
        if rank > len(layout):
            return None
        cut = layout[len(layout) - rank :]
    whole = all(any(axis is a for a in fact.expr.axes) for axes in cut for axis in axes)
    # Several axes in one dimension ([B * T]): all of them have to be there, and not one to be broadcast.
    full = all(len(axes) < 2 or not is_one(shape_of(mask)[d]) for d, axes in enumerate(cut))
    return cut if whole and full else None


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
