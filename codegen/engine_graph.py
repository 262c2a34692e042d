"""Put the GPU engines' ops into an ATen graph, after AOTAutograd and before Inductor lowers it.

::

    before   transform_quantize ── codes ─┬─ int_mm        after   engine_transform_quantize ─┬─ engine_int_mm
                                          └─ int_mm                                           └─ engine_int_mm

Codes in engine order live only between the two. Codes that come from elsewhere (a branch's transform, which Inductor
makes out of plain ops) are reordered in front of the product.

On Hopper ``fuse_linear`` makes one ``engine_linear`` of a product with its scales and its bias table. Elsewhere, and
where something else is among them, they stay pointwise ops that Inductor makes the epilogue of the product's template.

Under ``mode="max-autotune"`` the tiles of the ``engine_linear``s are measured (``tune_linear``). ``fold_prologue`` puts
norms and activations into the transforms.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .engine_ops import has_kernels, takes_codes
from .fold_prologue import fold_activations, fold_norms
from .fuse_linear import fuse_linear
from .tune_linear import tune_linears

aten, prims = torch.ops.aten, torch.ops.prims
freeact = torch.ops.freeact


def use_engine_ops(graph: Graph, *, tune: bool = False) -> None:
    """Replace the plain ops whose codes a GPU has an engine for; edits the graph in place.

    tune  measure the tiles of its Linears that this machine does not know yet
    """
    reordered: dict[Node, Node] = {}
    products = []
    for node in list(graph.nodes):
        if node.target is not freeact.int_mm.default:
            continue
        codes: Any = node.args[0]
        value: Tensor = codes.meta["val"]
        if not has_kernels(value.device) or not takes_codes(value):
            continue
        if codes not in reordered:
            reordered[codes] = codes if _swap_producer(codes) else _reorder(graph, codes)
        node.target = freeact.engine_int_mm.default
        node.args = (reordered[codes], *node.args[1:])
        products.append(node)
    if not products:
        return
    fold_activations(graph)
    for product in products:
        output = _output_of(product)
        if output is not None and not fuse_linear(graph, product, output):
            _mark(graph, output)
    graph.eliminate_dead_code()
    fold_norms(graph)
    if tune:
        tune_linears(graph)
    graph.lint()


def _mark(graph: Graph, output: Node) -> None:
    users = list(output.users)
    with graph.inserting_after(output):
        marked = graph.call_function(freeact.linear_output.default, (output,))
    marked.meta["val"] = output.meta["val"]
    for user in users:
        user.replace_input_with(output, marked)


def _output_of(product: Node) -> Node | None:
    """The cast at the end of a product's epilogue; None if the Linear's output is in fp32 or not to be found."""
    node = product
    while len(node.users) == 1:
        (node,) = node.users
        if node.target is prims.convert_element_type.default:
            return None if node.args[1] == torch.float32 else node
        if node.target not in (aten.mul.Tensor, aten.add.Tensor):
            return None
    return None


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
    """``to_engine_order``."""
    dtype, last = codes.meta["val"].dtype, torch.iinfo(torch.int64).max
    with graph.inserting_before(codes.next):
        as_bytes = codes
        if dtype != torch.int8:
            as_bytes = _call(graph, aten.view.dtype, codes, torch.int8)
        even = _call(graph, aten.slice.Tensor, as_bytes, -1, 0, last, 2)
        odd = _call(graph, aten.slice.Tensor, as_bytes, -1, 1, last, 2)
        ordered = _call(graph, aten.cat.default, [even, odd], -1)
        return ordered if dtype == torch.int8 else _call(graph, aten.view.dtype, ordered, dtype)


def _call(graph: Graph, op: Any, *args: Any) -> Node:
    node = graph.call_function(op, args)
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    fakes = [n.meta["val"] for n in node.all_input_nodes]
    with fakes[0].fake_mode:
        node.meta["val"] = op(*values)
    return node
