"""What stands in a graph between a branch and the kernels that multiply it: in bf16, columns a multiple of eight."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph_nodes import add_call

aten, prims = torch.ops.aten, torch.ops.prims
_MULTIPLE = 8  # 16 bytes, which rows are at multiples of for the copy engine


def pad_columns(table: Node) -> Node:
    """A table [..., R] with columns of zeros behind."""
    padding = -table.meta["val"].shape[-1] % _MULTIPLE
    if padding == 0:
        return table
    return add_call(table.graph, aten.constant_pad_nd.default, table, [0, padding], 0.0)


def in_fp32(coefficients: Node, scale: Node, rank: int) -> Node:
    """The coefficients [..., R] in bf16, in units of the scale, for who does not multiply them in a kernel."""
    graph = coefficients.graph
    wide = add_call(graph, prims.convert_element_type.default, coefficients, torch.float32)
    with graph.inserting_after(wide):
        plain = add_call(graph, aten.mul.Tensor, wide, scale)
    if coefficients.meta["val"].shape[-1] == rank:
        return plain
    with graph.inserting_after(plain):
        return add_call(graph, aten.slice.Tensor, plain, -1, 0, rank)


def operands_of_branch(
    coefficients: Any,
    weight: Node,
    branch_scale: Node,
    scale: Node,
    weight_scale: Node,
    one: float,
) -> tuple[Node, Node]:
    """The last two operands of an ``engine_linear``, of a branch's coefficients [..., R], weight [R, N] and scale [R].

    one  of ``ONE_IN_SUMS``
    """
    graph, convert = weight.graph, prims.convert_element_type.default
    source = _in_units_of(scale, coefficients)
    if source is None:
        divided = add_call(graph, aten.div.Tensor, coefficients, scale)
        source = pad_columns(add_call(graph, convert, divided, torch.bfloat16))
    of_columns = add_call(graph, aten.mul.Tensor, branch_scale, one)
    of_outputs = add_call(graph, aten.permute.default, weight_scale, [1, 0])
    transposed = add_call(graph, aten.permute.default, weight, [1, 0])
    scaled = add_call(graph, aten.mul.Tensor, transposed, of_columns)
    divided = add_call(graph, aten.div.Tensor, scaled, of_outputs)
    rounded = pad_columns(add_call(graph, convert, divided, torch.bfloat16))
    contiguous = {"memory_format": torch.contiguous_format}
    return source, add_call(graph, aten.clone.default, rounded, **contiguous)


def _in_units_of(scale: Node, coefficients: Any) -> Node | None:
    """What ``in_fp32`` made coefficients of, if it did."""
    plain = coefficients.args[0] if coefficients.target is aten.slice.Tensor else coefficients
    if plain.target is not aten.mul.Tensor or not isinstance(plain.args[1], Node):
        return None
    wide, by = plain.args
    is_ours = by.args == scale.args and wide.target is prims.convert_element_type.default
    return wide.args[0] if is_ours and wide.args[0].meta["val"].dtype == torch.bfloat16 else None
