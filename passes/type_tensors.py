"""Make type tensors out of their recipes (``TypeExpr``), as nodes of the graph.

Three layers, each cut and joined as the recipe says; a later one wins where it has something to say::

    base       ids that are declared (or what an earlier graph recorded), under the merges
    first      the sink type at the first position of each sequence
    explicit   what ``freeact_fx.token_types`` hands in
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch.fx import Node

from .editor import Editor, RootInput, aten
from .layouts import is_one
from .node_facts import (
    Axis,
    Layout,
    Root,
    TokenFact,
    TypeExpr,
    input_name,
    roots_of,
    statically_equal,
    value_of,
)
from .sizes import Sizes

Layer: TypeAlias = Literal["base", "first", "explicit"]


class TypeTensors:
    """The type tensors of one graph; equal ones are made once."""

    def __init__(self, editor: Editor) -> None:
        self.editor, self.call, self.size = editor, editor.call, editor.size
        self.config = editor.config
        self._made: dict[Any, Node | None] = {}
        self._roots: dict[Root, RootInput] = {}

    def of(self, fact: TokenFact, x: Node, *, needed: bool = True) -> Node:
        """The types of an activation: int32 of its leading shape.

        needed  they are for a Linear, so that it is worth a warning if no one knows them
        """
        key = (fact, tuple(map(str, value_of(x).shape[:-1])))
        if key not in self._made:
            with self.editor.part_of("token_types"):
                self._made[key] = self._arrange(self._types(fact.expr), fact, x)
        for root_input in self.rests_on(fact) if needed else []:
            root_input.is_needed = True
        node = self._made[key]
        assert node is not None
        return node

    def rests_on(self, fact: TokenFact) -> list[RootInput]:
        """The roots without which nothing is known of a fact's types; none if a merge knows something."""
        return [] if _has_merge(fact.expr) else list(map(self._root_input, roots_of(fact.expr)))

    # ------------------------------------------------------------------ layers

    def _types(self, expr: TypeExpr) -> Node:
        node = self._layer("base", expr)
        assert node is not None
        first = self._layer("first", expr) if self.config.sink is not None else None
        if first is not None:
            node = self.call(aten.where.ScalarSelf, first, self.config.sink_index, node)
        explicit = self._layer("explicit", expr)
        assert explicit is not None
        given = self.call(aten.ge.Scalar, explicit, 0)
        return self.call(aten.where.self, given, explicit, node)

    def _layer(self, layer: Layer, expr: TypeExpr) -> Node | None:
        """One layer of a recipe; None: a layer "first" in which no first position is known."""
        key = (layer, expr)
        if key not in self._made:
            self._made[key] = self._make(layer, expr)
        return self._made[key]

    def _make(self, layer: Layer, expr: TypeExpr) -> Node | None:
        if expr.op == "tokens":
            return self._of_root(layer, expr.args[0])
        if expr.op == "cat":
            position, *parts = expr.args
            layers = [self._layer(layer, part) for part in parts]
            if all(node is None for node in layers):
                return None
            whole = [
                node if node is not None else self._nowhere(part)
                for node, part in zip(layers, parts, strict=True)
            ]
            return self.call(aten.cat.default, whole, position)
        inner = self._layer(layer, expr.args[0])
        if inner is None:
            return None
        if expr.op == "slice":
            _, position, start, stop, step = expr.args
            return self.call(aten.slice.Tensor, inner, position, start, stop, step or 1)
        if expr.op == "select":
            _, position, index = expr.args
            return self.call(aten.select.int, inner, position, index)
        if layer != "base":
            return inner
        if expr.op == "constant":
            return self.call(aten.full_like.default, inner, expr.args[1])
        assert expr.op == "merge", expr.op
        _, mask, layout, index, negated, _, named = expr.args
        mask = self._mask_over(mask, layout, expr.axes, inner)
        if negated:
            mask = self.call(aten.logical_not.default, mask)
        if not named:
            # A mask that does not name its type says so of tokens only that nothing else has a name for.
            nameless = self.call(aten.eq.Scalar, inner, 0)
            mask = self.call(aten.logical_and.default, mask, nameless)
        return self.call(aten.where.ScalarSelf, mask, index, inner)

    def _nowhere(self, expr: TypeExpr) -> Node:
        like = self._layer("base", expr)
        assert like is not None
        return self.call(aten.zeros_like.default, like, dtype=torch.bool)

    # ------------------------------------------------------------------ roots

    def _of_root(self, layer: Layer, root: Root) -> Node | None:
        if layer == "explicit":
            return self._input(root, "explicit")
        if layer == "first":
            return self._first_position(root) if root.sink_known else None
        if not root.is_ids:
            recorded = self._input(root, "recorded")
            return self.call(aten.clamp_min.default, recorded, 0)
        node = self.call(aten.zeros_like.default, root.node, dtype=torch.int32)
        for index, token_type in enumerate(self.config.token_types.types):
            for token_id in token_type.token_ids:
                mask = self.call(aten.eq.Scalar, root.node, token_id)
                node = self.call(aten.where.ScalarSelf, mask, index, node)
        return node

    def _input(self, root: Root, feed: str) -> Node:
        """A trailing input [B, T] int32 that hands in types; -1 where it has nothing to say."""
        key = (feed, root)
        if key not in self._made:
            root_input = self._root_input(root)
            with self.editor.fake_mode:
                sizes = [axis.size for axis in root.axes]
                value = torch.empty(sizes, dtype=torch.int32, device=root_input.device)
            self._made[key] = self.editor.placeholder(feed, value, (feed, root_input))
        node = self._made[key]
        assert node is not None
        return node

    def _root_input(self, root: Root) -> RootInput:
        if root not in self._roots:
            gm = self.editor.gm
            placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
            self._roots[root] = RootInput(
                input_name(root.node, "hidden states"),
                Sizes(gm).reader([axis.size for axis in root.axes]),
                value_of(root.node).device,
                root.is_ids,
                tuple(placeholders.index(n) for n in root.holders),
            )
            self.editor.trailing.roots.append(self._roots[root])
        return self._roots[root]

    def _first_position(self, root: Root) -> Node:
        """True at the first position of each sequence; with left padding, the first one that is not padding."""
        if root.padding is not None:
            there = self.call(aten.ne.Scalar, root.padding, 0)
            ones = self.call(aten._to_copy.default, there, dtype=torch.int32)
            count = self.call(aten.cumsum.default, ones, -1)
            return self.call(aten.logical_and.default, there, self.call(aten.eq.Scalar, count, 1))
        end = self.size(root.node, len(root.axes) - 1)
        device = value_of(root.node).device
        positions = self.call(aten.arange.default, end, dtype=torch.int32, device=device)
        first = self.call(aten.eq.Scalar, positions, 0)
        sizes = [self.size(root.node, dim) for dim in range(len(root.axes))]
        return self.call(aten.expand.default, first, sizes)

    # ------------------------------------------------------------------ shapes

    def _mask_over(self, mask: Node, layout: Layout, axes: Sequence[Axis], types: Node) -> Node:
        """Bring a merge's mask into the dimensions of the type tensor, up to broadcasting."""
        for dim in reversed(range(len(layout))):
            if not layout[dim]:
                mask = self.call(aten.select.int, mask, dim, 0)
        kept = [axes_of_dim for axes_of_dim in layout if axes_of_dim]
        order = [_position(axis, axes) for axes_of_dim in kept for axis in axes_of_dim]
        if len(order) != len(kept):
            mask = self.call(aten.reshape.default, mask, [self.size(types, i) for i in order])
        mask = self.call(
            aten.permute.default, mask, sorted(range(len(order)), key=order.__getitem__)
        )
        for position in range(len(axes)):
            if position not in order:
                mask = self.call(aten.unsqueeze.default, mask, position)
        return mask

    def _arrange(self, types: Node, fact: TokenFact, x: Node) -> Node:
        """Lay a type tensor out like the leading dimensions of an activation."""
        axes, layout = fact.expr.axes, fact.layout[:-1]
        shape = value_of(x).shape[:-1]
        flat = [a for axes_of_dim in layout for a in axes_of_dim]
        straight = [(a,) if not is_one(a.size) else () for a in axes]
        same_sizes = len(shape) == len(axes) and all(
            statically_equal(size, axis.size) for size, axis in zip(shape, axes, strict=True)
        )
        if list(layout) == straight and same_sizes:
            return types
        for dim in reversed(range(len(axes))):
            if is_one(axes[dim].size):
                types = self.call(aten.select.int, types, dim, 0)
        current = [a for a in axes if not is_one(a.size)]
        # Cut axes that the activation has cut (windows, blocks).
        while split := [a for f in flat for a in current if a is not f and _is_below(f, a)]:
            at = _position(split[0], current)
            children = _children_towards(split[0], flat)
            sizes = [self.size(types, d) for d in range(len(current))]
            sizes[at : at + 1] = [self.editor.size_argument(c.size) for c in children]
            types = self.call(aten.reshape.default, types, sizes)
            current[at : at + 1] = children
        order = [_position(f, current) for f in flat if _among(f, current)]
        types = self.call(aten.permute.default, types, order)
        # Every dimension of x, and every axis that only repeats types, gets a dimension of its own ...
        target = [self.size(x, d) for d in range(len(shape))]
        repeats: list[Any] = []
        for size, x_dim in zip(target, layout, strict=True):
            for axis in x_dim or (None,):
                if axis is None or not _among(axis, current):
                    types = self.call(aten.unsqueeze.default, types, len(repeats))
                    repeats.append(size if axis is None else self.editor.size_argument(axis.size))
                else:
                    repeats.append(-1)
        types = self.call(aten.expand.default, types, repeats)
        # ... and then those of x are put together.
        if len(repeats) != len(target):
            types = self.call(aten.reshape.default, types, target)
        return types


def _has_merge(expr: TypeExpr) -> bool:
    if expr.op in ("tokens", "merge"):
        return expr.op == "merge"
    return any(_has_merge(e) for e in (expr.args[1:] if expr.op == "cat" else expr.args[:1]))


def _position(axis: Axis, axes: Sequence[Axis]) -> int:
    return next(i for i, a in enumerate(axes) if a is axis)


def _among(axis: Axis, axes: Sequence[Axis]) -> bool:
    return any(axis is a for a in axes)


def _is_below(axis: Axis, ancestor: Axis) -> bool:
    parent = axis.parent
    while parent is not None:
        if parent is ancestor:
            return True
        parent = parent.parent
    return False


def _children_towards(axis: Axis, wanted: Sequence[Axis]) -> tuple[Axis, ...]:
    for target in wanted:
        current = target
        while current.parent is not None:
            if current.parent is axis:
                return current.siblings
            current = current.parent
    raise AssertionError("a split axis without children")
