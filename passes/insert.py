"""Replace every marked Linear by freeact ops; of the passes, the one that edits.

::

    before   x ── linear(q) ──             after   x, types ── transform_quantize ─┬ int_mm(q) ── * + bias ──
              ├── linear(k) ──                                  (one per group)    ├ int_mm(k) ── * + bias ──
              └── linear(v) ──                                                     └ int_mm(v) ── * + bias ──

The epilogue (scales, bias table, branch) is ordinary pointwise aten, so Inductor fuses it with what follows. Only
OpOverload calls are added, each with its fake value: AOTAutograd's cache refuses anything else.

Tensors the graph did not have become *trailing* placeholders (``TrailingInputs`` says what to feed them): positions
of the original arguments never change. Dense weights lose their users; their placeholders stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from freeact_fx.config import QuantConfig
from freeact_fx.reference import slice_of_token
from freeact_fx.transform import GroupTransform, PackedLinear

from .annotate import ROOT_KEY, SINK_KEY
from .layouts import is_one
from .node_facts import (
    TOKENS_KEY,
    Axis,
    Layout,
    LinearFact,
    Root,
    TokenFact,
    TypeExpr,
    linears_of,
    set_value,
    source_name,
    value_of,
)

aten = torch.ops.aten
freeact = torch.ops.freeact
TRAILING_KEY = "freeact_trailing"

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass(frozen=True)
class LinearOperands:
    """What a dense Linear becomes: its group's transform and its own packed weight."""

    transform: GroupTransform
    packed: PackedLinear


@dataclass
class TrailingInputs:
    """What to feed the placeholders that were added, in order.

    feeds         ("tensor", tensor) | ("packed", Linear's position in ``dense``, field) | ("types",)
    dense         the dense Linears that were replaced
    root          position of the argument whose leading dimensions are the tokens', or None
    root_is_ids   the root argument holds ids, not hidden states
    num_axes      number of its token dimensions
    recorded      for each added output: position of the original output whose types it holds
    num_outputs   outputs the graph had before
    """

    feeds: list[tuple[Any, ...]] = field(default_factory=list)
    dense: list[LinearFact] = field(default_factory=list)
    root: int | None = None
    root_is_ids: bool = True
    num_axes: int = 0
    recorded: list[int] = field(default_factory=list)
    num_outputs: int = 0


class Editor:
    """Adds nodes with their fake values, and builds type tensors from their recipes."""

    def __init__(self, gm: GraphModule, inputs: dict[Node, Any], config: QuantConfig) -> None:
        self.gm, self.inputs, self.config = gm, inputs, config
        self.graph = gm.graph
        self.trailing = TrailingInputs()
        self.root: Root | None = gm.meta.get(ROOT_KEY)
        self._types: dict[Any, Node] = {}
        self._tensors: dict[int, Node] = {}
        self._explicit: Node | None = None
        values = (value_of(n) for n in self.graph.nodes)
        fakes = [v for v in values if isinstance(v, torch._subclasses.FakeTensor)]
        self.fake_mode = fakes[0].fake_mode if fakes else torch._subclasses.FakeTensorMode()

    # ------------------------------------------------------------------ nodes

    def call(self, op: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
        """Add a call at the insertion point; ``like`` is the user's node whose place in the source it takes."""
        node = self.graph.call_function(op, args, kwargs)
        fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), value_of)
        with self.fake_mode:
            set_value(node, op(*fake_args, **fake_kwargs))
        if like is not None:
            node.meta.update({k: like.meta[k] for k in _KEPT_META if k in like.meta})
        return node

    def size(self, node: Node, dim: int) -> Any:
        """A size as an int, or as a node where it is symbolic."""
        size = value_of(node).shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    def _placeholder(self, name: str, value: Tensor, feed: tuple[Any, ...]) -> Node:
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1:]
        with (
            self.graph.inserting_after(last[0])
            if last
            else self.graph.inserting_before(next(iter(self.graph.nodes)))
        ):
            node = self.graph.placeholder(f"freeact_{name}_{len(self.trailing.feeds)}")
        set_value(node, value)
        node._dynamo_source = None  # type: ignore[attr-defined]
        node.meta["tensor_dict"] = {}
        if feed[0] != "types":
            node.meta["tensor_dict"]["_dynamo_static_input_type"] = "unguarded"
        self.trailing.feeds.append(feed)
        return node

    def tensor_input(self, name: str, tensor: Tensor, feed: tuple[Any, ...] | None = None) -> Node:
        """A trailing placeholder for a tensor of ours; one per tensor."""
        if id(tensor) not in self._tensors:
            fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
            self._tensors[id(tensor)] = self._placeholder(name, fake, feed or ("tensor", tensor))
        return self._tensors[id(tensor)]

    # ------------------------------------------------------------------ token types

    def types_for(self, fact: TokenFact, x: Node) -> Node:
        """The type tensor for an activation: int32 of its leading shape."""
        key = (fact, tuple(map(str, value_of(x).shape[:-1])))
        if key not in self._types:
            self._types[key] = self._arrange(self._build(fact.expr), fact, x)
        return self._types[key]

    def _explicit_types(self, root: Root) -> Node:
        """The trailing input that hands in types from outside; -1 where it has nothing to say."""
        if self._explicit is None:
            device = value_of(root.node).device
            with self.fake_mode:
                value = torch.empty([a.size for a in root.axes], dtype=torch.int32, device=device)
            self._explicit = self._placeholder("types", value, ("types",))
            placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
            self.trailing.root = placeholders.index(_shape_source(root.node, len(root.axes)))
            self.trailing.root_is_ids = root.is_ids
            self.trailing.num_axes = len(root.axes)
        return self._explicit

    def _build(self, expr: TypeExpr) -> Node:
        if ("built", expr) in self._types:
            return self._types["built", expr]
        if expr.op == "slice":
            inner, position, *bounds = expr.args
            dim, (start, stop, step) = position, bounds
            node = self.call(aten.slice.Tensor, self._build(inner), dim, start, stop, step or 1)
        elif expr.op == "select":
            inner, position, index = expr.args
            node = self.call(aten.select.int, self._build(inner), position, index)
        elif expr.op == "cat":
            position, *parts = expr.args
            node = self.call(aten.cat.default, [self._build(p) for p in parts], position)
        else:
            node = self._raw(expr)
            root = _root_below(expr)
            if root is not None:
                explicit = self._explicit_types(root)
                if expr.op != "constant" and self.config.sink_index is not None:
                    node = self._with_sink(node, root)
                given = self.call(aten.ge.Scalar, explicit, 0)
                node = self.call(aten.where.self, given, explicit, node)
        self._types["built", expr] = node
        return node

    def _raw(self, expr: TypeExpr) -> Node:
        """The types before sink and explicit types are laid over them."""
        if expr.op == "tokens":
            (root,) = expr.args
            node = self.call(aten.zeros_like.default, self._explicit_types(root))
            for index, token_type in enumerate(self.config.token_types.types):
                for token_id in token_type.token_ids if root.is_ids else ():
                    mask = self.call(aten.eq.Scalar, root.node, token_id)
                    node = self.call(aten.where.ScalarSelf, mask, index, node)
            return node
        if expr.op == "constant":
            inner, index, _ = expr.args
            return self.call(aten.full_like.default, self._build(inner), index)
        assert expr.op == "merge", expr.op
        inner, mask, layout, index, negated, _ = expr.args
        below = self._raw(inner) if _root_below(inner) is not None else self._build(inner)
        mask = self._mask_over(mask, layout, expr.axes)
        if negated:
            mask = self.call(aten.logical_not.default, mask)
        return self.call(aten.where.ScalarSelf, mask, index, below)

    def _with_sink(self, types: Node, root: Root) -> Node:
        if not self.gm.meta[SINK_KEY]:
            return types
        padding = self._padding_mask(root)
        if padding is None:
            end = self.size(types, len(root.axes) - 1)
            device = value_of(types).device
            positions = self.call(aten.arange.default, end, dtype=torch.int32, device=device)
            first = self.call(aten.eq.Scalar, positions, 0)
        else:
            # With left padding the first position is the first one that is not padding.
            ones = self.call(aten._to_copy.default, padding, dtype=torch.int32)
            count = self.call(aten.cumsum.default, ones, -1)
            started = self.call(aten.eq.Scalar, count, 1)
            first = self.call(aten.logical_and.default, started, self.call(aten.ne.Scalar, ones, 0))
        return self.call(aten.where.ScalarSelf, first, self.config.sink_index, types)

    def _padding_mask(self, root: Root) -> Node | None:
        """Hugging Face's ``attention_mask`` [B, T], if the call has one."""
        for node in self.graph.nodes:
            value = value_of(node)
            if (
                node.op == "placeholder"
                and "attention_mask" in source_name(node)
                and isinstance(value, Tensor)
                and value.dim() == len(root.axes)
                and not value.is_floating_point()
                and str(value.shape[-1]) == str(root.axes[-1].size)
            ):
                return node
        return None

    def _mask_over(self, mask: Node, layout: Layout, axes: Sequence[Axis]) -> Node:
        """Bring a merge's mask into the dimensions of the type tensor, up to broadcasting."""
        kept = [axes_of_dim for axes_of_dim in layout if axes_of_dim]
        for dim in reversed(range(len(layout))):
            if not layout[dim]:
                mask = self.call(aten.select.int, mask, dim, 0)
        order = [next(i for i, a in enumerate(axes) if a is x[0]) for x in kept]
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
        if list(layout) == straight and len(shape) == len(axes):
            return types
        for dim in reversed(range(len(axes))):
            if is_one(axes[dim].size):
                types = self.call(aten.select.int, types, dim, 0)
        current = [a for a in axes if not is_one(a.size)]
        # Cut axes that the activation has cut (windows, blocks).
        while split := [a for f in flat for a in current if a is not f and _is_below(f, a)]:
            at = next(i for i, a in enumerate(current) if a is split[0])
            children = _children_towards(split[0], flat)
            sizes = [self.size(types, d) for d in range(len(current))]
            sizes[at : at + 1] = [c.size if isinstance(c.size, int) else -1 for c in children]
            types = self.call(aten.reshape.default, types, sizes)
            current[at : at + 1] = children
        order = [
            next(i for i, a in enumerate(current) if a is f) for f in flat if _among(f, current)
        ]
        types = self.call(aten.permute.default, types, order)
        # Every dimension of x, and every axis that only repeats types, gets a dimension of its own ...
        dims: list[Axis | None] = [a for x_dim in layout for a in (x_dim or (None,))]
        for position, axis in enumerate(dims):
            if axis is None or not _among(axis, current):
                types = self.call(aten.unsqueeze.default, types, position)
        repeats = [
            axis.size if axis is not None and not _among(axis, current) else -1 for axis in dims
        ]
        types = self.call(aten.expand.default, types, repeats)
        # ... and then those of x are put together.
        target = [self.size(x, d) for d in range(len(shape))]
        if len(dims) != len(target):
            types = self.call(aten.reshape.default, types, target)
        return self.call(aten.expand.default, types, target)


def _root_below(expr: TypeExpr) -> Root | None:
    while expr.op in ("merge", "constant"):
        expr = expr.args[0]
    return expr.args[0] if expr.op == "tokens" else None


def _shape_source(node: Node, rank: int) -> Node:
    """The argument that has the token dimensions in front: the root, or what it was computed from elementwise."""
    while node.op != "placeholder":
        above = [
            n
            for n in node.all_input_nodes
            if isinstance(value_of(n), Tensor)
            and tuple(map(str, value_of(n).shape[:rank]))
            == tuple(map(str, value_of(node).shape[:rank]))
        ]
        if not above:
            raise NotImplementedError(
                f"the shape of {node.name} does not show in the arguments of the graph"
            )
        node = above[0]
    return node


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


def insert_freeact_ops(
    gm: GraphModule,
    *,
    inputs: dict[Node, Any],
    config: QuantConfig,
    operands: Callable[[LinearFact], LinearOperands | str],
) -> GraphModule:
    """Replace every Linear that is not refused.

    operands  gives the transform and packed weight of a dense Linear, or the reason why there are none

    ``gm.meta["freeact_trailing"]`` says afterwards what to feed the new placeholders. A graph in which no Linear is
    replaced only gains the outputs that carry types across graph breaks.
    """
    editor = Editor(gm, inputs, config)
    groups: dict[tuple[Any, ...], tuple[Node, ...]] = {}
    replaced: dict[Node, Node] = {}
    for node, linear in linears_of(gm):
        if linear.refusal is not None:
            continue
        if linear.converted:
            replacement = linear.operands
        else:
            found = operands(linear)
            if isinstance(found, str):
                linear.refusal = found
                continue
            replacement = _dense_operands(editor, linear, found)
        # The activation may be the result of a Linear that was just replaced.
        linear.x = replaced.get(linear.x, linear.x)
        with gm.graph.inserting_before(node):
            result = _quantised_linear(editor, node, linear, replacement, groups)
        replaced[node] = result
        result.meta[TOKENS_KEY] = node.meta.get(TOKENS_KEY)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    _record_types(editor)
    gm.meta[TRAILING_KEY] = editor.trailing
    gm.graph.lint()
    gm.recompile()
    return gm


_GROUP_OPERANDS = ("shift", "channel_scale", "left", "right", "clip", "lowrank")
_LINEAR_OPERANDS = ("weight", "weight_scale", "bias_table", "branch_weight")


def _dense_operands(editor: Editor, linear: LinearFact, found: LinearOperands) -> dict[str, Any]:
    transform, packed = found.transform, found.packed
    index = len(editor.trailing.dense)
    editor.trailing.dense.append(linear)
    values: dict[str, Any] = dict.fromkeys((*_GROUP_OPERANDS, *_LINEAR_OPERANDS))
    for name, tensor in transform.tensors().items():
        values[name] = editor.tensor_input(name, tensor)
    for name, tensor in packed.tensors().items():
        values[name] = editor.tensor_input(name, tensor, ("packed", index, name))
    return values | {
        "widths": list(transform.widths),
        "slice_of_type": list(transform.slice_of_type),
        "own_rank": transform.own_rank,
        "default_type": 0,
        "qmax": editor.config.qmax,
    }


def _quantised_linear(
    editor: Editor,
    node: Node,
    linear: LinearFact,
    operands: dict[str, Any],
    groups: dict[tuple[Any, ...], tuple[Node, ...]],
) -> Node:
    """Build one Linear's nodes; the transform is taken from ``groups`` if a Linear before it made the same one."""
    o = operands
    call = editor.call
    default_type, types = o["default_type"], None
    untyped = len(o["slice_of_type"]) - 1
    if linear.state == "refused":
        default_type = untyped
    elif linear.types is not None and editor.config.num_types > 1:
        types = editor.types_for(linear.types, linear.x)
    statics = (o["widths"], o["slice_of_type"], default_type)
    key = (linear.x, types, *(o[n] for n in _GROUP_OPERANDS), *map(str, statics), o["qmax"])
    if key not in groups:
        group = [o[n] for n in _GROUP_OPERANDS]
        if o["lowrank"] is None:
            args = (linear.x, types, *group[:-1], *statics, o["qmax"])
            made = call(freeact.transform_quantize.default, *args, like=node)
        else:
            args = (linear.x, types, *group, *statics, o["own_rank"], o["qmax"])
            made = call(freeact.transform_quantize_branch.default, *args, like=node)
        outputs = range(2 if o["lowrank"] is None else 3)
        groups[key] = tuple(_getitem(editor, made, i) for i in outputs)
    codes, scale, *coefficients = groups[key]
    if o["qmax"]:
        y = call(freeact.int_mm.default, codes, o["weight"], like=node)
    else:
        y = call(aten.linear.default, codes, o["weight"], like=node)
    y = call(aten.mul.Tensor, y, scale, like=node)
    row = _weight_scale_row(editor, o["weight_scale"], types, o["slice_of_type"], default_type)
    y = call(aten.mul.Tensor, y, row, like=node)
    if coefficients:
        branch = [
            call(aten._to_copy.default, n, dtype=torch.float32, like=node)
            for n in (coefficients[0], o["branch_weight"])
        ]
        y = call(aten.add.Tensor, y, call(aten.matmul.default, *branch, like=node), like=node)
    if o["bias_table"] is not None:
        y = call(aten.add.Tensor, y, _row(editor, o["bias_table"], types, default_type), like=node)
    dtype = value_of(linear.x).dtype
    if dtype != torch.float32:
        y = call(aten._to_copy.default, y, dtype=dtype, like=node)
    return y


def _getitem(editor: Editor, node: Node, index: int) -> Node:
    item = editor.graph.call_function(operator.getitem, (node, index))
    set_value(item, value_of(node)[index])
    item.meta.update({k: node.meta[k] for k in _KEPT_META if k in node.meta})
    return item


def _row(editor: Editor, table: Node, types: Node | None, default_type: int) -> Node:
    if types is None:
        return editor.call(aten.select.int, table, 0, default_type)
    return editor.call(aten.index.Tensor, table, [types])


def _weight_scale_row(
    editor: Editor, table: Node, types: Node | None, slice_of_type: Sequence[int], default_type: int
) -> Node:
    fixed = slice_of_token(None, slice_of_type, default_type)
    if types is None or len(set(slice_of_type)) == 1:
        assert isinstance(fixed, int)
        return editor.call(aten.select.int, table, 0, fixed)
    index = editor.call(aten.zeros_like.default, types)
    for type_index, slice_index in enumerate(slice_of_type):
        mask = editor.call(aten.eq.Scalar, types, type_index)
        index = editor.call(aten.where.ScalarSelf, mask, slice_index, index)
    return editor.call(aten.index.Tensor, table, [index])


def _record_types(editor: Editor) -> None:
    """Add the types of hidden states that leave the graph as outputs, for the graph after a break."""
    (output,) = [n for n in editor.graph.nodes if n.op == "output"]
    results = output.args[0]
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    editor.trailing.num_outputs = len(results)
    if editor.config.num_types == 1 or not isinstance(output.args[0], (tuple, list)):
        return
    added = []
    with editor.graph.inserting_before(output):
        for position, result in enumerate(results):
            fact = result.meta.get(TOKENS_KEY) if isinstance(result, Node) else None
            if isinstance(fact, TokenFact) and fact.layout and not fact.layout[-1]:
                added.append(editor.types_for(fact, result))
                editor.trailing.recorded.append(position)
    output.args = ((*results, *added),)


def insert_observers(
    gm: GraphModule,
    *,
    inputs: dict[Node, Any],
    config: QuantConfig,
    observer: Callable[[list[LinearFact]], Callable[[Tensor, Tensor | None], None] | None],
) -> GraphModule:
    """Calibration: in front of each group, hand its activation and types to an observer. For eager execution only.

    observer  gives the function to call for the Linears that share an activation, or None
    """
    editor = Editor(gm, inputs, config)
    shared: dict[Node, list[tuple[Node, LinearFact]]] = {}
    for node, linear in linears_of(gm):
        if linear.refusal is None:
            shared.setdefault(linear.x, []).append((node, linear))
    for x, members in shared.items():
        function = observer([linear for _, linear in members])
        if function is None:
            continue
        node, linear = members[0]
        with gm.graph.inserting_before(node):
            types = None
            if linear.types is not None and config.num_types > 1:
                types = editor.types_for(linear.types, x)
            gm.graph.call_function(function, (x, types))
    _record_types(editor)
    gm.meta[TRAILING_KEY] = editor.trailing
    gm.graph.lint()
    gm.recompile()
    return gm
