"""Put the GPU engines' ops into an ATen graph, after AOTAutograd and before Inductor lowers it.

::

    before   transform_quantize ── codes ─┬─ int_mm        after   engine_transform_quantize ─┬─ engine_int_mm
                                          └─ int_mm                                           └─ engine_int_mm

Codes in engine order live only between the two. Codes that come from elsewhere (a branch's transform, which Inductor
makes out of plain ops but on Hopper) are reordered in front of the product.

On Hopper a branch's transform is one that leaves its values in bf16, and ``engine_branch_quantize`` of them.
``fuse_linear`` makes one ``engine_linear`` there of a product with its scales, its branch and its bias table, and one
``engine_linears`` of those that read the same codes.
Elsewhere, and where something else is among them, they stay pointwise ops that Inductor makes the epilogue of the
product's template.

Under ``mode="max-autotune"`` the tiles of both are measured (``tune_linear``). ``fold_prologue`` puts
norms and activations into the transforms.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .branch_nodes import in_fp32
from .engine_ops import has_kernels, takes_branch, takes_codes
from .fold_prologue import fold_activations, fold_norms
from .fuse_linear import fuse_linear, join_linears
from .graph_nodes import add_call
from .tune_linear import tune_linears

aten, prims = torch.ops.aten, torch.ops.prims
freeact = torch.ops.freeact

_TRANSFORMS = (
    freeact.engine_transform_quantize.default,
    freeact.engine_norm_transform_quantize.default,
    freeact.engine_add_norm_transform_quantize.default,
    freeact.engine_gated_transform_quantize.default,
    freeact.engine_branch_quantize.default,
)


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
    join_linears(graph)
    _bring_to_readers(graph)
    if tune:
        tune_linears(graph)
    graph.lint()


def _bring_to_readers(graph: Graph) -> None:
    """Put each transform in front of what first reads it.

    Inductor has put those of Linears that know nothing of each other one after the other, and the products behind all
    of them. But the weights of a product come while the transform before it runs, and codes need not wait in memory.
    """
    waiting: set[Node] = set()

    def bring(node: Node, reader: Node) -> None:
        for operand in node.all_input_nodes:
            if operand in waiting:
                waiting.remove(operand)
                bring(operand, reader)
                reader.prepend(operand)

    for node in list(graph.nodes):
        is_result = node.target is operator.getitem and node.args[0] in waiting
        if is_result or node.target in _TRANSFORMS:
            waiting.add(node)
        else:
            bring(node, node)


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
    if not all(user.target is freeact.int_mm.default for user in codes.users):
        return False
    if transform.target is freeact.transform_quantize.default:
        transform.target = freeact.engine_transform_quantize.default
        return True
    return _swap_branch(transform)


def _swap_branch(transform: Node) -> bool:
    """Take a transform with a branch apart, if it is one and kernels have its shapes."""
    if transform.target is not freeact.transform_quantize_branch.default:
        return False
    tensors: Any
    static: Any
    tensors, static = transform.args[:8], transform.args[8:]
    _, types, *_, left, right, clip, lowrank = tensors
    widths, slice_of_type, default_type, own_rank, qmax = static
    factors = left.meta["val"], right.meta["val"]
    if not takes_branch(*factors, lowrank.meta["val"], widths, qmax):
        return False
    graph = transform.graph
    with graph.inserting_before(transform):
        unrounded = (*tensors[:7], widths, slice_of_type, default_type, 0)
        transformed = add_call(graph, freeact.engine_transform_quantize.default, *unrounded)
        z = add_call(graph, operator.getitem, transformed, 0)
    rounded = (z, lowrank, types, clip, default_type, own_rank, qmax)
    with graph.inserting_before(transform):
        quantized = add_call(graph, freeact.engine_branch_quantize.default, *rounded)
        scale = add_call(graph, operator.getitem, quantized, 1)
    for result in list(transform.users):
        result.replace_input_with(transform, quantized)
        if result.args[1] == 2:
            readers = list(result.users)
            result.meta["val"] = quantized.meta["val"][2]
            with graph.inserting_after(result):
                wide = in_fp32(result, scale, lowrank.meta["val"].shape[1])
            for reader in readers:
                reader.replace_input_with(result, wide)
    graph.erase_node(transform)
    return True


def _reorder(graph: Graph, codes: Node) -> Node:
    """``to_engine_order``."""
    dtype, last = codes.meta["val"].dtype, torch.iinfo(torch.int64).max
    with graph.inserting_before(codes.next):
        as_bytes = codes
        if dtype != torch.int8:
            as_bytes = add_call(graph, aten.view.dtype, codes, torch.int8)
        even = add_call(graph, aten.slice.Tensor, as_bytes, -1, 0, last, 2)
        odd = add_call(graph, aten.slice.Tensor, as_bytes, -1, 1, last, 2)
        ordered = add_call(graph, aten.cat.default, [even, odd], -1)
        return ordered if dtype == torch.int8 else add_call(graph, aten.view.dtype, ordered, dtype)
