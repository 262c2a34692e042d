"""Make one op of a product and what ``insert`` wrote after it, for the kernel that has all of it: ``engine_linear``.

::

    before   engine_int_mm ── * scale ── * weight_scale[slice] ── + engine_branch_product ── + bias_table[type] ── cast
    after    engine_linear

``join_linears`` makes one ``engine_linears`` of those with the same codes: q, k and v, gate and up.

A Linear with anything else among them stays as it was. Which columns of the codes are a slice is read off the transform
that they come from.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .branch_nodes import coefficients_of_linear
from .engine_ops import takes_linear
from .graph_nodes import add_call
from .tiles import MOST_TYPES

aten, freeact = torch.ops.aten, torch.ops.freeact
# What takes operands out of the tensor that holds several (``linear_form``).
_VIEWS = (aten.slice.Tensor, aten.view.default, aten.reshape.default)


def fuse_linear(graph: Graph, product: Node, output: Node) -> bool:
    """Whether a product and its epilogue, up to the cast ``output``, were one Linear for the kernel, and now are."""
    codes: Any
    weight: Any
    codes, weight = product.args
    dtype = output.meta["val"].dtype
    chain = [product]
    while chain[-1] is not output:
        chain.extend(chain[-1].users)
    steps = chain[1:-1]
    targets = [step.target for step in steps]
    is_chain = all(step.args[0] is before for before, step in zip(chain, steps, strict=False))
    if targets[:2] != 2 * [aten.mul.Tensor] or set(targets[2:]) - {aten.add.Tensor}:
        return False
    addends: list[Any] = [step.args[1] for step in steps[2:]]
    branch: Any = addends.pop(0) if addends and _is_branch(addends[0]) else None
    rank = 0 if branch is None else branch.args[0].meta["val"].shape[-1]
    if len(addends) > 1 or not takes_linear(codes.meta["val"], weight.meta["val"], dtype, rank):
        return False
    weight_scale = _row_of(steps[1].args[1])
    bias = _row_of(addends[0]) if addends else _Row(None, None, 0)
    if not is_chain or weight_scale is None or bias is None:
        return False
    if branch is not None and weight_scale.table.meta["val"].shape[0] > 1:
        return False
    types = _types_of(codes, weight_scale, bias)
    if types is None or len(types[2]) > MOST_TYPES:
        return False
    scale: Any = steps[0].args[1]
    of_branch: tuple[Node, ...] = ()
    if branch is not None:
        coefficients, branch_weight, branch_scale = branch.args
        with graph.inserting_before(output):
            in_units = coefficients_of_linear(coefficients, scale)
        of_branch = in_units, branch_weight, branch_scale
    with graph.inserting_before(output):
        scales = (scale, weight, weight_scale.table)
        args = (codes, *scales, bias.table, *types, dtype, *of_branch)
        fused = graph.call_function(freeact.engine_linear.default, args)
    fused.meta["val"] = output.meta["val"]
    output.replace_all_uses_with(fused)
    return True


def join_linears(graph: Graph) -> None:
    """One op for Linears of the same codes, which may then be one launch."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    groups: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.target is not freeact.engine_linear.default:
            continue
        codes, scale, _, _, bias, types, sizes, slices, default, dtype, *branch = node.args
        shared = (codes, scale, bias is None, types, tuple(sizes), tuple(slices), default, dtype)
        groups.setdefault((*shared, *branch[:1]), []).append(node)
    for linears in groups.values():
        late = _late_operands(linears, place) if len(linears) > 1 else None
        if late is None:
            continue
        for operand in late:
            linears[0].prepend(operand)
        columns = [list(column) for column in zip(*(n.args for n in linears), strict=True)]
        codes, scale, _, _, bias, *static = linears[0].args[:10]
        weights, weight_scales, bias_tables = columns[2:5]
        coefficients: Any = None
        of_branch: list[Any] = [[], []]
        if len(columns) > 10:
            (coefficients, *_), *of_branch = columns[10:]
        with graph.inserting_before(linears[0]):
            joined = add_call(
                graph,
                freeact.engine_linears.default,
                *(codes, scale, weights, weight_scales, [] if bias is None else bias_tables),
                *(*static, coefficients, *of_branch),
            )
            outputs = [
                add_call(graph, operator.getitem, joined, number) for number in range(len(linears))
            ]
        for linear, output in zip(linears, outputs, strict=True):
            linear.replace_all_uses_with(output)
            graph.erase_node(linear)


def _late_operands(linears: list[Node], place: dict[Node, int]) -> list[Node] | None:
    """Operands that are behind the first of some Linears, in order; None if one of them cannot be in front of it."""
    late: set[Node] = set()
    pending = [n for linear in linears for n in linear.all_input_nodes]
    while pending:
        node = pending.pop()
        if place[node] > place[linears[0]]:
            if node.op != "get_attr" and node.target not in _VIEWS:
                return None
            late.add(node)
            pending += node.all_input_nodes
    return sorted(late, key=lambda n: place[n])


def _is_branch(node: Any) -> bool:
    return isinstance(node, Node) and node.target is freeact.engine_branch_product.default


class _Row(NamedTuple):
    """The row of a table [rows, N] that a token has: the same ``number`` for all, unless there is a tensor of them."""

    table: Any
    numbers: Any
    number: int


def _row_of(node: Any) -> _Row | None:
    if not isinstance(node, Node) or node.target not in (aten.select.int, aten.index.Tensor):
        return None
    table: Any
    where: Any
    table, where, *number = node.args
    if table.meta["val"].dim() != 2:
        return None
    if node.target is aten.index.Tensor:
        return _Row(table, where[0], 0) if len(where) == 1 else None
    return _Row(table, None, number[0]) if where == 0 else None  # type: ignore[arg-type]


def _types_of(codes: Node, weight_scale: _Row, bias: _Row) -> tuple[Any, ...] | None:
    """Types, sizes of the slices, slice of each type and default type, if scale and bias agree about them."""
    num_codes = codes.meta["val"].shape[-1]
    if weight_scale.table.meta["val"].shape[0] == 1:
        num_types = 1 if bias.table is None else bias.table.meta["val"].shape[0]
        return bias.numbers, [num_codes], [0] * num_types, bias.number
    transform: Any = codes.args[0] if codes.target is operator.getitem else None
    if transform is None or transform.target not in (
        freeact.engine_transform_quantize.default,
        freeact.engine_gated_transform_quantize.default,
    ):
        return None
    *_, widths, slice_of_type, default_type, _ = transform.args
    sizes = [num_codes // sum(widths) * width for width in widths]
    types = None
    if weight_scale.numbers is not None:
        types = _types_of_slices(weight_scale.numbers, slice_of_type)
        if types is None or types not in transform.all_input_nodes:
            return None
    elif weight_scale.number != slice_of_type[default_type]:
        return None
    expected = (None, default_type) if types is None else (types, 0)
    if bias.table is not None and (bias.numbers, bias.number) != expected:
        return None
    return types, sizes, slice_of_type, default_type


def _types_of_slices(numbers: Node, slice_of_type: Sequence[int]) -> Node | None:
    """The types that ``insert`` chose slices by: where(types == 1, a, where(types == 0, b, that of the last type))."""
    found = []
    while numbers.target is aten.where.self:
        mask: Any
        chosen: Any
        mask, chosen, numbers = numbers.args  # type: ignore[assignment]
        if mask.target is not aten.eq.Scalar:
            return None
        found.append((*mask.args, _constant(chosen)))
    types = found[0][0] if found else None
    expected = [(types, number, chosen) for number, chosen in enumerate(slice_of_type[:-1])]
    is_same = found[::-1] == expected and _constant(numbers) == slice_of_type[-1]
    return types if is_same else None


def _constant(node: Node) -> Any:
    """The value of a tensor full of it, or None."""
    if node.target is aten.full.default:
        return node.args[1]
    return node.args[0] if node.target is aten.scalar_tensor.default else None
