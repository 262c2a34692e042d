"""Replace every marked Linear by freeact ops; of the passes, the one that edits.

::

    before   x ── linear(q) ──             after   x, types ── transform_quantize ─┬ int_mm(q) ── * + bias ──
              ├── linear(k) ──                                  (one per group)    ├ int_mm(k) ── * + bias ──
              └── linear(v) ──                                                     └ int_mm(v) ── * + bias ──

A branch is one more op, ``branch_product``. The rest (scales, bias table) is ordinary pointwise aten, so Inductor fuses
it with what follows. Dense weights lose their users; their placeholders stay. How nodes and tensors are added is in
``editor``, how types become tensors in ``type_tensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from freeact_fx.config import QuantConfig
from freeact_fx.linear_form import Part, operands_of
from freeact_fx.reasons import Reason
from freeact_fx.reference import slice_of_token
from freeact_fx.transform import GroupTransform, PackedLinear, treats_types_alike

from .annotate import claims_of
from .detect import LINEAR_ARGUMENTS
from .editor import Editor, aten
from .node_facts import (
    TOKENS_KEY,
    LinearFact,
    TokenFact,
    facts_of,
    linears_of,
    qualified_name,
    value_of,
)
from .type_tensors import TypeTensors

freeact = torch.ops.freeact
TRAILING_KEY = "freeact_trailing"


@dataclass(frozen=True)
class LinearOperands:
    """What a dense Linear becomes: its group's transform and its own packed weight."""

    transform: GroupTransform
    packed: PackedLinear


def insert_freeact_ops(
    gm: GraphModule,
    *,
    inputs: dict[Node, Any],
    config: QuantConfig,
    operands: Callable[[LinearFact], LinearOperands | Reason],
) -> GraphModule:
    """Replace every Linear that is not refused.

    operands  gives the transform and packed weight of a dense Linear, or the reason why there are none

    ``gm.meta["freeact_trailing"]`` says afterwards what to feed the new placeholders. A graph in which no Linear is
    replaced only gains the outputs that carry types across graph breaks.
    """
    editor = Editor(gm, inputs, config)
    types = TypeTensors(editor)
    groups: dict[tuple[Any, ...], tuple[Node, ...]] = {}
    parts: dict[tuple[Node, Part], Node] = {}
    replaced: dict[Node, Node] = {}
    for node, linear in linears_of(gm):
        if linear.refusal is not None:
            continue
        if linear.converted:
            with gm.graph.inserting_before(node), editor.part_of(_label(linear), node):
                linear.operands = replacement = _converted_operands(editor, linear, parts)
        else:
            found = operands(linear)
            if isinstance(found, Reason):
                linear.refusal = found
                continue
            with editor.part_of(_label(linear)):
                replacement = _dense_operands(editor, linear, found)
        # The activation may be the result of a Linear that was just replaced.
        linear.x = replaced.get(linear.x, linear.x)
        with gm.graph.inserting_before(node), editor.part_of(_label(linear), node):
            result = _quantised_linear(editor, types, linear, replacement, groups)
        replaced[node] = linear.result = result
        result.meta[TOKENS_KEY] = node.meta.get(TOKENS_KEY)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    _record_types(editor, types)
    gm.meta[TRAILING_KEY] = editor.trailing
    gm.graph.lint()
    gm.recompile()
    return gm


def use_reference_product(gm: GraphModule) -> None:
    """Have the reference compute the integer products of a graph, not the engine (``bypass=("engine",)``)."""
    for node in gm.graph.nodes:
        if node.target is freeact.int_mm.default:
            node.target = freeact.int_mm_reference.default
    gm.recompile()


def _label(linear: LinearFact) -> str:
    """A Linear's name in the frame that Dynamo traced.

    Why not its name in the model: a graph may serve several layers, and one that is compiled for each of them should
    be found in torch's caches.
    """
    return qualified_name(linear.weight).rpartition(".")[0] or linear.name


_GROUP_OPERANDS = ("shift", "channel_scale", "left", "right", "clip", "lowrank")
_LINEAR_OPERANDS = ("weight", "weight_scale", "bias_table", "branch_weight", "branch_scale")


def _converted_operands(
    editor: Editor, linear: LinearFact, parts: dict[tuple[Node, Part], Node]
) -> dict[str, Any]:
    """Operands out of the tensors that hold several; those of a group once for all of its Linears."""

    def take(values: Node, part: Part) -> Node:
        if (values, part) not in parts:
            flat = editor.call(aten.slice.Tensor, values, 0, part.start, part.end)
            parts[values, part] = editor.call(
                aten.view.default, flat, list(part.shape), called=part.name
            )
        return parts[values, part]

    return operands_of(take, *(linear.operands[name] for name in LINEAR_ARGUMENTS[2:]))


def _dense_operands(editor: Editor, linear: LinearFact, found: LinearOperands) -> dict[str, Any]:
    transform, packed = found.transform, found.packed
    index = facts_of(editor.gm).index(linear)
    editor.trailing.transforms[index] = transform
    values: dict[str, Any] = dict.fromkeys((*_GROUP_OPERANDS, *_LINEAR_OPERANDS))
    for name, tensor in transform.tensors().items():
        values[name] = editor.tensor_input(name, tensor, ("transform", index, name))
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
    type_tensors: TypeTensors,
    linear: LinearFact,
    operands: dict[str, Any],
    groups: dict[tuple[Any, ...], tuple[Node, ...]],
) -> Node:
    """Build one Linear's nodes; the transform is taken from ``groups`` if a Linear before it made the same one."""
    o = operands
    call = editor.call
    default_type, types = o["default_type"], None
    untyped = len(o["slice_of_type"]) - 1
    if not treats_types_alike(len(o["slice_of_type"]), editor.config.num_types):
        if linear.state == "refused":
            default_type = untyped
        elif linear.types is not None and editor.config.num_types > 1:
            types = type_tensors.of(linear.types, linear.x)
    statics = (o["widths"], o["slice_of_type"], default_type)
    key = (linear.x, types, *(o[n] for n in _GROUP_OPERANDS), *map(str, statics), o["qmax"])
    if key not in groups:
        group = [o[n] for n in _GROUP_OPERANDS]
        if o["lowrank"] is None:
            args = (linear.x, types, *group[:-1], *statics, o["qmax"])
            made = call(freeact.transform_quantize.default, *args)
        else:
            args = (linear.x, types, *group, *statics, o["own_rank"], o["qmax"])
            made = call(freeact.transform_quantize_branch.default, *args)
        outputs = ("codes", "scale", "coefficients")[: 2 if o["lowrank"] is None else 3]
        groups[key] = tuple(editor.item(made, i, name) for i, name in enumerate(outputs))
    codes, scale, *coefficients = groups[key]
    product = freeact.int_mm.default if o["qmax"] else aten.linear.default
    y = call(product, codes, o["weight"])
    y = call(aten.mul.Tensor, y, scale)
    row = _weight_scale_row(editor, o["weight_scale"], types, o["slice_of_type"], default_type)
    y = call(aten.mul.Tensor, y, row)
    if coefficients:
        args = (coefficients[0], o["branch_weight"], o["branch_scale"])
        branch = call(freeact.branch_product.default, *args)
        y = call(aten.add.Tensor, y, branch)
    if o["bias_table"] is not None:
        y = call(aten.add.Tensor, y, _row(editor, o["bias_table"], types, default_type))
    dtype = value_of(linear.x).dtype
    if dtype != torch.float32:
        y = call(aten._to_copy.default, y, dtype=dtype, called="cast")
    return y


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
    *others, last = slice_of_type
    index = editor.call(aten.full_like.default, types, last)
    for type_index, slice_index in enumerate(others):
        mask = editor.call(aten.eq.Scalar, types, type_index)
        index = editor.call(aten.where.ScalarSelf, mask, slice_index, index)
    return editor.call(aten.index.Tensor, table, [index])


def _record_types(editor: Editor, types: TypeTensors) -> None:
    """Add the types of hidden states that leave the graph as outputs, for the graph after a break."""
    (output,) = [n for n in editor.graph.nodes if n.op == "output"]
    results = output.args[0]
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    editor.trailing.num_outputs = len(results)
    if editor.config.num_types == 1 or not isinstance(output.args[0], (tuple, list)):
        return
    if TRAILING_KEY in editor.gm.meta:
        return  # a graph that has been through this pass has them
    added = []
    with editor.graph.inserting_before(output):
        for position, result in enumerate(results):
            fact = result.meta.get(TOKENS_KEY) if isinstance(result, Node) else None
            if isinstance(fact, TokenFact) and fact.layout and not fact.layout[-1]:
                with editor.part_of("token_types", result):
                    added.append(types.of(fact, result, needed=False))
                claims = claims_of(fact.expr, types.config)
                editor.trailing.recorded.append((position, types.rests_on(fact), claims))
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
    types = TypeTensors(editor)
    shared: dict[Node, list[tuple[Node, LinearFact]]] = {}
    for node, linear in linears_of(gm):
        if linear.refusal is None:
            shared.setdefault(linear.x, []).append((node, linear))
    for x, members in shared.items():
        function = observer([linear for _, linear in members])
        if function is None:
            continue
        node, linear = members[0]
        with gm.graph.inserting_before(node), editor.part_of(_label(linear), node):
            x_types = None
            if linear.types is not None and config.num_types > 1:
                x_types = types.of(linear.types, x)
            gm.graph.call_function(function, (x, x_types))
    _record_types(editor, types)
    gm.meta[TRAILING_KEY] = editor.trailing
    gm.graph.lint()
    gm.recompile()
    return gm
