"""Put the GPU engine's ops into an ATen graph, after AOTAutograd and before Inductor lowers it.

::

    before   transform_quantize ── codes ─┬─ int_mm        after   engine_transform_quantize ─┬─ engine_int_mm
                                          └─ int_mm                                           └─ engine_int_mm

Codes in engine order live only between the two. Codes that come from elsewhere (a branch's transform, which Inductor
makes out of plain ops) are reordered in front of the product.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .engine_ops import has_kernels, takes_codes

aten = torch.ops.aten
freeact = torch.ops.freeact


def use_engine_ops(graph: Graph) -> None:
    """Replace the plain ops whose codes are int8 and on a GPU; edits the graph in place."""
    reordered: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.target is not freeact.int_mm.default:
            continue
        codes = node.args[0]
        value: Tensor = codes.meta["val"]
        if not has_kernels(value.device) or not takes_codes(value):
            continue
        if codes not in reordered:
            reordered[codes] = codes if _swap_producer(codes) else _reorder(graph, codes)
        node.target = freeact.engine_int_mm.default
        node.args = (reordered[codes], *node.args[1:])
    graph.lint()


def _swap_producer(codes: Node) -> bool:
    """Let the transform that codes come from write them in engine order, if only products read them."""
    if codes.target is not operator.getitem:
        return False
    transform = codes.args[0]
    assert isinstance(transform, Node)
    if transform.target is not freeact.transform_quantize.default or not all(
        user.target is freeact.int_mm.default for user in codes.users
    ):
        return False
    transform.target = freeact.engine_transform_quantize.default
    return True


def _reorder(graph: Graph, codes: Node) -> Node:
    with graph.inserting_after(codes):
        even = _call(graph, aten.slice.Tensor, codes, -1, 0, torch.iinfo(torch.int64).max, 2)
    with graph.inserting_after(even):
        odd = _call(graph, aten.slice.Tensor, codes, -1, 1, torch.iinfo(torch.int64).max, 2)
    with graph.inserting_after(odd):
        return _call(graph, aten.cat.default, [even, odd], -1)


def _call(graph: Graph, op: Any, *args: Any) -> Node:
    node = graph.call_function(op, args)
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    fakes = [n.meta["val"] for n in node.all_input_nodes]
    with fakes[0].fake_mode:
        node.meta["val"] = op(*values)
    return node
