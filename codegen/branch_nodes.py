"""What stands in a graph between a branch's coefficients and their product: in bf16, columns a multiple of eight."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph_nodes import add_call
from .tiles import branch_width

aten, prims = torch.ops.aten, torch.ops.prims


def pad_columns(table: Node) -> Node:
    """A table [..., R] with columns of zeros behind."""
    rank = table.meta["val"].shape[-1]
    padding = branch_width(rank) - rank
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


def coefficients_of_linear(coefficients: Any, scale: Node) -> Node:
    """Coefficients [..., R] in fp32 as an ``engine_linear`` takes them."""
    found = _made_plain(coefficients, scale)
    if found is not None:
        return found
    graph, convert = scale.graph, prims.convert_element_type.default
    in_units = add_call(graph, aten.div.Tensor, coefficients, scale)
    return pad_columns(add_call(graph, convert, in_units, torch.bfloat16))


def _made_plain(coefficients: Any, scale: Node) -> Node | None:
    """What ``in_fp32`` made coefficients of, if it did."""
    plain = coefficients.args[0] if coefficients.target is aten.slice.Tensor else coefficients
    if plain.target is not aten.mul.Tensor or not isinstance(plain.args[1], Node):
        return None
    wide, by = plain.args
    is_ours = by.args == scale.args and wide.target is prims.convert_element_type.default
    return wide.args[0] if is_ours and wide.args[0].meta["val"].dtype == torch.bfloat16 else None
