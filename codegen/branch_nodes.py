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


def in_fp32(coefficients: Node, rank: int) -> Node:
    """The coefficients [..., R] of who does not multiply them in a kernel."""
    graph = coefficients.graph
    wide = add_call(graph, prims.convert_element_type.default, coefficients, torch.float32)
    if coefficients.meta["val"].shape[-1] == rank:
        return wide
    with graph.inserting_after(wide):
        return add_call(graph, aten.slice.Tensor, wide, -1, 0, rank)


def operands_of_branch(coefficients: Any, weight: Any, scale: Any) -> tuple[Node, Node]:
    """Coefficients [..., R], and the branch's weight [R, N] scaled and transposed, in bf16.

    Why the weight and not the coefficients is scaled: these are the same for all Linears of a group.
    """
    graph, convert = coefficients.graph, prims.convert_element_type.default
    source = coefficients.args[0] if coefficients.target is aten.slice.Tensor else coefficients
    if source.target is convert and source.args[0].meta["val"].dtype == torch.bfloat16:
        source = source.args[0]  # before ``in_fp32``
    else:
        source = pad_columns(add_call(graph, convert, coefficients, torch.bfloat16))
    transposed = add_call(graph, aten.permute.default, weight, [1, 0])
    scaled = add_call(graph, aten.mul.Tensor, transposed, scale)
    rounded = pad_columns(add_call(graph, convert, scaled, torch.bfloat16))
    contiguous = {"memory_format": torch.contiguous_format}
    return source, add_call(graph, aten.clone.default, rounded, **contiguous)
