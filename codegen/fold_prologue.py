"""Let the transform's kernel do what precedes it: a norm, the residual add in front of that, or an activation.

::

    before   x ─┬─ pow ─ mean ─ rsqrt ─ * ─ * ── y ── engine_transform_quantize
                └──────────────────────┘
    after    x ── engine_norm_transform_quantize

Only where nothing else reads y, which then is never written. Runs on ATen graphs that ``engine_graph`` has put the
engine's ops into.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from . import prologue_ops  # noqa: F401  (registers the ops)
from .engine_ops import fits_hopper_transform
from .prologue_patterns import find_activation, find_norm

aten, prims = torch.ops.aten, torch.ops.prims
freeact = torch.ops.freeact
_NUM_OPERANDS = 7  # of a transform, x first; what follows is static


def fold_activations(graph: Graph) -> None:
    """SiLU or GELU, gated or not, of the down projections of an MLP."""
    for transform in _transforms(graph):
        y: Any = transform.args[0]
        found = find_activation(y)
        if found is None:
            continue
        wanted = y.meta["val"].dtype
        rows = [found.gate] if found.up is None else [found.gate, found.up]
        if any(n.meta["val"].dtype not in (wanted, torch.float32) for n in rows):
            continue
        if not _has_kernel(transform, found.kind):
            for row in rows:
                _cast_and_back(graph, row, wanted)
            continue
        inputs: list[Any] = [_cast(graph, transform, n, wanted) for n in rows]
        inputs += [None] * (2 - len(rows))
        _replace(graph, transform, freeact.engine_gated_transform_quantize, inputs, [found.kind])


def fold_norms(graph: Graph) -> None:
    """RMSNorm and LayerNorm; then the sum that one is taken of, if an ``engine_linear`` computes one addend: the
    epilogue of any other product has the add already."""
    for transform in _transforms(graph):
        y: Any = transform.args[0]
        found = find_norm(y)
        if found is None or found.source.meta["val"].dtype != y.meta["val"].dtype:
            continue
        settings = [found.kind, found.eps, found.weight_offset]
        inputs = [found.source, found.weight, found.bias]
        folded = _replace(
            graph, transform, freeact.engine_norm_transform_quantize, inputs, settings
        )
        _fold_sum(graph, folded)


def _transforms(graph: Graph) -> Iterable[Node]:
    """Those that alone read their rows."""
    return [
        node
        for node in graph.nodes
        if node.target is freeact.engine_transform_quantize.default and len(node.args[0].users) == 1
    ]


def _has_kernel(transform: Node, prologue: str) -> bool:
    """Whether a transform that leaves its values unrounded, which one kernel alone does, may have that in front."""
    args: Any = transform.args
    left, right = args[4].meta["val"], args[5].meta["val"]
    return args[-1] != 0 or fits_hopper_transform(left, right, args[_NUM_OPERANDS], prologue)


def _cast(graph: Graph, before: Node, node: Node, wanted: torch.dtype) -> Node:
    """A node in the dtype of the rows: AOTAutograd leaves out a cast to bf16 that is followed by one to fp32."""
    if node.meta["val"].dtype == wanted:
        return node
    with graph.inserting_before(before):
        cast = graph.call_function(prims.convert_element_type.default, (node, wanted))
    cast.meta = _meta_of(node)
    cast.meta["val"] = node.meta["val"].to(wanted)
    return cast


def _cast_and_back(graph: Graph, node: Node, wanted: torch.dtype) -> None:
    """Let who reads a node in fp32 read it as rounded to another dtype: the Linear that it comes from ends in a cast
    again, which ``fuse_linear`` looks for."""
    if node.meta["val"].dtype == wanted:
        return
    readers = list(node.users)
    rounded = _cast(graph, node.next, node, wanted)
    back = _cast(graph, rounded.next, rounded, node.meta["val"].dtype)
    for reader in readers:
        reader.replace_input_with(node, back)


def _replace(
    graph: Graph, transform: Node, op: Any, inputs: list[Any], settings: list[Any]
) -> Node:
    """The transform with a prologue that takes ``inputs`` instead of its rows."""
    operands, static = transform.args[1:_NUM_OPERANDS], transform.args[_NUM_OPERANDS:]
    with graph.inserting_before(transform):
        folded = graph.call_function(op.default, (*inputs, *operands, *settings, *static))
    folded.meta = _meta_of(transform)
    transform.replace_all_uses_with(folded)
    graph.erase_node(transform)
    graph.eliminate_dead_code()
    return folded


def _fold_sum(graph: Graph, folded: Node) -> None:
    """Let a transform that has a norm in it add the residual, too, and hand on the sum to who reads it later."""
    total: Any = folded.args[0]
    if total.target is not aten.add.Tensor or total.kwargs:
        return
    addends = total.args
    if not all(isinstance(n, Node) and _is_alike(n, total) for n in addends):
        return
    if not any(n.target is freeact.engine_linear.default for n in addends):
        return
    place = {node: index for index, node in enumerate(graph.nodes)}
    readers = [node for node in total.users if node is not folded]
    if any(place[node] < place[folded] for node in readers):
        return
    with graph.inserting_before(folded):
        both = graph.call_function(
            freeact.engine_add_norm_transform_quantize.default, (*addends, *folded.args[1:])
        )
    both.meta = _meta_of(folded)
    both.meta["val"] = (*folded.meta["val"], total.meta["val"])
    folded.replace_all_uses_with(both)
    graph.erase_node(folded)
    if readers:
        with graph.inserting_after(both):
            handed_on = graph.call_function(operator.getitem, (both, 2))
        handed_on.meta = _meta_of(total)
        total.replace_all_uses_with(handed_on)
    graph.eliminate_dead_code()


def _meta_of(node: Node) -> dict[str, Any]:
    """What a node that takes another's place has of it: not the operands that Inductor lays out inputs by."""
    return {name: value for name, value in node.meta.items() if name != "eager_input_vals"}


def _is_alike(one: Node, other: Node) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)
